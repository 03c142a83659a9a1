"""`ft.init`: from declarations to each rank's shards.

Invariant: a leaf's value depends on the key and the leaf's path alone, so every mesh gets the same bits; a rank makes
its shard and nothing more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from functitan import threefry, tree
from functitan.errors import FunctitanError, MeshError, report
from functitan.param import Block, Param
from functitan.sharding.context import as_mesh, current, using
from functitan.sharding.cut import mark_cut
from functitan.sharding.layout import Layout, block_of, check_leaves
from functitan.sharding.mesh import Mesh
from functitan.sharding.rules import AxisRules


def init(
    declarations: tree.Tree, key: Tensor, *, mesh: Mesh | DeviceMesh | None = None, rules: AxisRules | None = None
) -> tree.Tree:
    """The tree of this rank's shards (whole values without a mesh), on the key's device.

    A declaration with `rules` of its own lies under those.
    Raises `LayoutError` that lists every leaf whose sizes its mesh dims do not divide, before anything is allocated;
    `FunctitanError` for initializers that give another shape, dtype or device than was declared.

    >>> params = init({"w": Param("embed mlp", (4, 8))}, threefry.key(0))
    >>> params["w"].shape
    torch.Size([4, 8])
    """
    return initial(declarations, key, as_mesh(mesh), rules, "ft.init")


def initial(declarations: tree.Tree, key: Tensor, mesh: Mesh | None, rules: AxisRules | None, what: str) -> tree.Tree:
    """What `init` gives, whose errors say that `what` asked for it."""
    layouts = check_declarations(declarations, key, mesh, rules, what)
    leaves, structure = tree.flatten(declarations)
    blocks = [
        block_of(layout, param.shape, mesh) if mesh is not None and layout is not None and any(layout.dims) else None
        for param, layout in zip(leaves, layouts, strict=True)
    ]
    paths = tree.paths(declarations)
    made = zip(paths, leaves, blocks, strict=True)
    with using(current().on(None, None)):  # an initializer sees no mesh: it makes blocks of global values
        values = [param.init(threefry.fold_in(key, path), param, block) for path, param, block in made]
    _check_values(what, paths, leaves, blocks, values, key)
    values = [x.detach() for x in values]  # no views: of one, its base holds the memory too, and donation copies it
    if mesh is not None:
        for x, layout in zip(values, layouts, strict=True):
            mark_cut(x, what, layout, mesh.sizes, (1,) * x.dim())  # whatever order data has
    return tree.unflatten(structure, values)


def _check_values(
    what: str, paths: list[str], leaves: list[Param], blocks: list[Block], values: list[Any], key: Tensor
) -> None:
    """Raise `FunctitanError` that lists every value that is not the block which its declaration asked for."""
    problems = []
    for path, param, block, x in zip(paths, leaves, blocks, values, strict=True):
        shape = param.shape if block is None else tuple(part.stop - part.start for part in block)
        wanted = _described(shape, param.dtype, key.device)
        found = _described(tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        if found != wanted:
            part = "" if block is None else f", the block {_sliced(block)} of {param.shape}"
            problems.append(f"{path or 'the value'}: init gives {found}, not {wanted}{part}")
    if problems:
        raise FunctitanError(report(what, problems, _FIX_INIT))


def _described(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"


def _sliced(block: tuple[slice, ...]) -> str:
    return f"[{', '.join(f'{part.start}:{part.stop}' for part in block)}]"


def check_declarations(
    declarations: tree.Tree, key: Tensor, mesh: Mesh | None, rules: AxisRules | None, what: str
) -> list[Layout | None]:
    """The layout of each leaf on a mesh; raises what `init` would, before anything is allocated."""
    threefry.check_key(key, what)
    paths, leaves = tree.paths(declarations), tree.leaves(declarations)
    bad = [
        f"{path or 'the value'} is a {type(leaf).__name__}, not a Param"
        for path, leaf in zip(paths, leaves, strict=True)
        if not isinstance(leaf, Param)
    ]
    if bad:
        raise FunctitanError(report(what, bad, "declare each parameter as ft.Param('embed mlp', (256, 768))"))
    if mesh is None:
        return [None] * len(leaves)
    if not isinstance(rules, AxisRules):
        raise MeshError(report(what, [f"rules is {rules!r}"], "give a table: rules=ft.AxisRules({...})"))
    return check_leaves(what, [(p, leaf, leaf.shape) for p, leaf in zip(paths, leaves, strict=True)], rules, mesh.sizes)


_FIX_INIT = (
    "let init(key, param, block) return the block of the value that is asked for, in param.dtype on key.device, as "
    "ft.param.normal(0.02) does; where block is None, that is the whole value"
)
