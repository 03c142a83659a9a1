"""`ft.init`: from declarations to each rank's shards.

Invariant: a leaf's value depends on the key and the leaf's path alone, so every mesh gets the same bits; a rank makes
its shard and nothing more.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from functitan import random, tree
from functitan.errors import FunctitanError, LayoutError, MeshError, report
from functitan.param import Param
from functitan.sharding.context import as_mesh
from functitan.sharding.layout import axes_of, block_of, divisibility, layout_of, table_of
from functitan.sharding.mesh import Mesh
from functitan.sharding.rules import AxisRules


def init(
    declarations: tree.Tree, key: Tensor, *, mesh: Mesh | DeviceMesh | None = None, rules: AxisRules | None = None
) -> tree.Tree:
    """The tree of this rank's shards (whole values without a mesh), on the key's device.

    A declaration with `rules` of its own lies under those.
    Raises `LayoutError` that lists every leaf whose sizes its mesh dims do not divide, before anything is allocated.

    >>> params = init({"w": Param("embed mlp", (4, 8))}, random.key(0))
    >>> params["w"].shape
    torch.Size([4, 8])
    """
    known = as_mesh(mesh)
    paths, leaves = tree.paths(declarations), tree.leaves(declarations)
    bad = [
        f"{path} is a {type(leaf).__name__}, not a Param"
        for path, leaf in zip(paths, leaves, strict=True)
        if not isinstance(leaf, Param)
    ]
    if bad:
        raise FunctitanError(report("ft.init", bad, "declare each parameter as ft.Param('embed mlp', (256, 768))"))
    if known is None:
        return tree.map_with_path(lambda path, param: param.init(random.fold_in(key, path), param, None), declarations)
    if not isinstance(rules, AxisRules):
        raise MeshError(report("ft.init", [f"rules is {rules!r}"], "give a table: rules=ft.AxisRules({...})"))
    layouts = [layout_of(axes_of(param), table_of(param, rules), known.sizes) for param in leaves]
    bad = [
        line
        for path, param, layout in zip(paths, leaves, layouts, strict=True)
        for line in divisibility(layout, param.shape, known.sizes, path)
    ]
    if bad:
        raise LayoutError(report("ft.init", bad, "change the sizes, the mesh, or the rules of those axes"))
    return tree.unflatten(
        tree.flatten(declarations)[1],
        [
            param.init(
                random.fold_in(key, path), param, block_of(layout, param.shape, known) if any(layout.dims) else None
            )
            for path, param, layout in zip(paths, leaves, layouts, strict=True)
        ],
    )
