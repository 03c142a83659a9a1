"""Moves between layouts: `constrain`, `where_whole`, `reshard`, `shard`, `unshard`.

Invariant: each is the identity of global values, a contraction with one operand whose result has another layout. Its
transpose moves back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from functitan import tree
from functitan.axes import Axes, parse_axes, parse_signature, write_axes
from functitan.errors import MeshError, PatternError, report
from functitan.ops.contraction import move
from functitan.ops.operands import Operand, check_operands
from functitan.ops.order import renamed, reordered, with_whole, zigzag_ranks
from functitan.ops.remembered import made
from functitan.ops.types import Type, layout_here
from functitan.param import Param
from functitan.sharding.context import as_mesh, current
from functitan.sharding.cut import mark_cut, refuse_shards
from functitan.sharding.env import Env
from functitan.sharding.layout import axes_of, block_of, check_leaves, global_shape, layout_of, table_of, whole
from functitan.sharding.mesh import Mesh
from functitan.sharding.message import Label
from functitan.sharding.rules import AxisRules


def constrain(pattern: str, x: Tensor) -> Tensor:
    """Move a tensor by renaming its axes: `"batch seq embed -> batch whole_seq embed"`.

    The rules give the new names their layout. An axis that `ft.context_parallel` orders is under another name in the
    order of positions. Transpose: the move back.

    >>> import torch
    >>> constrain("batch seq -> batch whole_seq", torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    axes, names = _parse(pattern)
    check_operands(f"constrain({pattern!r})", Operand("x", x, axes))
    env = current()
    if env.mesh is None:
        return x
    return made("constrain", axes, renamed(axes, names, x, env, Label("constrain", pattern)), env, names)


def where_whole(pattern: str, axis: str, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`fn` of a tensor moved so that one axis is whole on every rank, and its result moved back.

    For functions that mix the positions of that axis and keep the shape, elementwise in all others; in the usual
    layouts nothing moves.

    >>> import torch
    >>> where_whole("batch embed", "embed", lambda x: x.flip(-1), torch.tensor([[1, 2]]))
    tensor([[2, 1]])
    """
    axes, env = parse_axes(pattern), current()
    check_operands(f"where_whole({pattern!r})", Operand("x", x, axes))
    if env.mesh is None:
        return fn(x)
    label, own = Label("where_whole", pattern), Type(axes)
    ranks = zigzag_ranks(axis, env)
    if ranks == 1 and not layout_here(axes, x, env).of(axis):
        return fn(x)
    at, goal = axes.index(axis), with_whole(axes, {axis}, x, env)
    found = fn(reordered(move(own, goal, x, env, label), at, ranks, 1))
    return made("where_whole", axes, move(goal, own, reordered(found, at, 1, ranks), env, label), env)


def constrain_like(pattern: str, x: Tensor, like_pattern: str, like: Tensor) -> Tensor:
    """Move a tensor to where its axes lie in another: positions "batch seq" to the queries' "batch seq heads head_dim".

    >>> import torch
    >>> constrain_like("seq", torch.arange(3), "seq heads", torch.ones(3, 2))
    tensor([0, 1, 2])
    """
    axes, others, env = parse_axes(pattern), parse_axes(like_pattern), current()
    what = f"constrain_like({pattern!r}, {like_pattern!r})"
    check_operands(what, Operand("x", x, axes))  # apart: of one axis each may have a layout of its own
    check_operands(what, Operand("like", like, others))
    if env.mesh is None:
        return x
    layout = layout_here(others, like, env)
    return move(Type(axes), Type(axes, layout=layout), x, env, Label("constrain_like", pattern))


def reshard(values: tree.Tree, patterns: tree.Tree, *, to_rules: AxisRules) -> tree.Tree:
    """Move a tree of shards from the rules in force to another table, inside `ft.spmd`. Transpose: the move back.

    `patterns` is a tree or prefix of patterns, or of `Param`s. Use the result inside `ft.spmd(..., rules=to_rules)`.
    """
    env = current()
    if env.mesh is None:
        refuse_shards("ft.reshard", zip(tree.paths(values), tree.leaves(values), strict=True))
        return _read(values)
    assert env.rules is not None
    return _moved(values, patterns, env, env.rules, _table(to_rules, "ft.reshard, to_rules"), "reshard")


def shard(
    values: tree.Tree, patterns: tree.Tree, *, mesh: Mesh | DeviceMesh | None, rules: AxisRules | None
) -> tree.Tree:
    """This rank's shards of a tree of global values, which every rank has. Nothing is sent.

    `patterns` is a tree or a prefix of patterns; `None` keeps a leaf whole. Inside an `ft.context_parallel` that orders
    an axis it is put in that order, too. Raises `LayoutError` that lists every leaf whose sizes its mesh dims do not
    divide, before any is cut.
    """
    known = as_mesh(mesh)
    if known is None:
        return _read(values)
    leaves, structure = tree.flatten(values)
    layouts = check_leaves("ft.shard", _leaves(values, patterns, "ft.shard"), _table(rules, "ft.shard"), known.sizes)
    env = current()._replace(mesh=known)
    leaves = [
        x if layout is None else _in_order(x, layout.axes, env, False)
        for x, layout in zip(leaves, layouts, strict=True)
    ]
    cut = [
        x if layout is None or not any(layout.dims) else x[block_of(layout, tuple(x.shape), known)].contiguous()
        for x, layout in zip(leaves, layouts, strict=True)
    ]
    for x, layout in zip(cut, layouts, strict=True):
        if isinstance(x, Tensor):
            known_order = layout is not None and env.sequence.zigzag  # else only who brought the data knows
            zigzag = tuple(zigzag_ranks(axis, env) for axis in layout.axes) if layout and known_order else None
            mark_cut(x, "ft.shard", layout, known.sizes, zigzag)
    return tree.unflatten(structure, cut)


def unshard(
    values: tree.Tree, patterns: tree.Tree, *, mesh: Mesh | DeviceMesh | None, rules: AxisRules | None
) -> tree.Tree:
    """The tree of global values, on every rank, of a tree of shards. Transpose: `shard`.

    Inside an `ft.context_parallel` that orders an axis, too, they are in the order of positions.
    """
    known = as_mesh(mesh)
    if known is None:
        return _read(values)
    table = _table(rules, "ft.unshard")
    return _moved(values, patterns, current()._replace(mesh=known, rules=table), table, None, "unshard")


def _read(values: tree.Tree) -> tree.Tree:
    """The values as they are; a leaf that was donated raises what it raises on a mesh."""
    for x in tree.leaves(values):
        getattr(x, "shape", None)
    return values


def _moved(
    values: tree.Tree, patterns: tree.Tree, env: Env, rules: AxisRules, to: AxisRules | None, op: str
) -> tree.Tree:
    assert env.mesh is not None
    leaves, structure = tree.flatten(values)
    known, mesh = _leaves(values, patterns, f"ft.{op}"), env.mesh.sizes
    layouts = check_leaves(f"ft.{op}", known, rules, mesh, shapes_are_local=True)
    if to is not None:
        shapes = [
            s if now is None else global_shape(now, s, mesh) for now, (_, _, s) in zip(layouts, known, strict=True)
        ]
        names = [None if now is None else write_axes(now.axes) for now in layouts]  # a declaration's table ends here
        check_leaves(f"ft.{op}", zip(tree.paths(values), names, shapes, strict=True), to, mesh)
    moved = []
    for x, (_, pattern, _) in zip(leaves, known, strict=True):
        axes = axes_of(pattern)
        if axes is None:
            moved.append(x)
            continue
        now = Type(axes, rules=table_of(pattern, rules))
        goal = Type(axes, layout=whole(axes)) if to is None else Type(axes, rules=to)
        there = move(now, goal, x, env, Label(op, write_axes(axes)))
        if to is None:
            there = _in_order(there, axes, env, True)
        else:
            mark_cut(there, "ft.reshard", layout_of(axes, to, mesh), mesh)
        moved.append(there)
    return tree.unflatten(structure, moved)


def _in_order(x: Tensor, axes: Axes, env: Env, inverse: bool) -> Tensor:
    """A global tensor put in the order that the surroundings give its axes, or back in that of positions."""
    for at, axis in enumerate(axes):
        ranks = zigzag_ranks(axis, env)
        x = reordered(x, at, *((ranks, 1) if inverse else (1, ranks)))
    return x


def _leaves(values: tree.Tree, patterns: tree.Tree, what: str) -> list[tuple[str, str | Param | None, tuple[int, ...]]]:
    """(path, pattern, shape) of each leaf, from a tree or prefix of patterns, `Param`s and `None`."""
    leaves, paths, given = tree.leaves(values), tree.paths(values), tree.broadcast_prefix(patterns, values, what)
    bad = [
        f"{path or 'the value'} is a {type(x).__name__}, not a tensor"
        for path, x, pattern in zip(paths, leaves, given, strict=True)
        if pattern is not None and not isinstance(x, Tensor)
    ]
    if bad:
        raise PatternError(report(what, bad, "None in place of a pattern passes a leaf as it is"))
    shapes = [() if pattern is None else tuple(x.shape) for x, pattern in zip(leaves, given, strict=True)]
    return list(zip(paths, given, shapes, strict=True))


def _table(rules: AxisRules | None, what: str) -> AxisRules:
    if not isinstance(rules, AxisRules):
        raise MeshError(report(what, [f"rules is {rules!r}"], "give a table: ft.AxisRules({...})"))
    return rules


@cache
def _parse(pattern: str) -> tuple[Axes, Axes]:
    signature = parse_signature(pattern)
    (axes, *more), (names, *others) = signature
    if more or others or len(axes) != len(names):
        sides = " to ".join(str([len(its) for its in side]) for side in signature)
        problem = f"it renames the axes of one tensor, one for one; these patterns have {sides} axes"
        raise PatternError(report(f"constrain({pattern!r})", [problem], "write as in 'batch seq -> batch whole_seq'"))
    return axes, names
