"""`ft.init`: from declarations to each rank's shards.

Invariant: a leaf's value depends on the key and the leaf's path alone, so every mesh gets the same bits; a rank makes
its shard and nothing more.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from functitan import threefry, tree
from functitan.errors import FunctitanError, MeshError, report
from functitan.param import Param
from functitan.sharding.context import as_mesh, current, using
from functitan.sharding.layout import Layout, block_of, check_leaves
from functitan.sharding.mesh import Mesh
from functitan.sharding.rules import AxisRules


def init(
    declarations: tree.Tree, key: Tensor, *, mesh: Mesh | DeviceMesh | None = None, rules: AxisRules | None = None
) -> tree.Tree:
    """The tree of this rank's shards (whole values without a mesh), on the key's device.

    A declaration with `rules` of its own lies under those.
    Raises `LayoutError` that lists every leaf whose sizes its mesh dims do not divide, before anything is allocated.

    >>> params = init({"w": Param("embed mlp", (4, 8))}, threefry.key(0))
    >>> params["w"].shape
    torch.Size([4, 8])
    """
    known = as_mesh(mesh)
    layouts = check_declarations(declarations, key, known, rules, "ft.init")
    leaves, structure = tree.flatten(declarations)
    blocks = [
        block_of(layout, param.shape, known) if known is not None and layout is not None and any(layout.dims) else None
        for param, layout in zip(leaves, layouts, strict=True)
    ]
    made = zip(tree.paths(declarations), leaves, blocks, strict=True)
    with using(current().on(None, None)):  # an initializer sees no mesh: it makes blocks of global values
        return tree.unflatten(
            structure, [param.init(threefry.fold_in(key, path), param, block) for path, param, block in made]
        )


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
