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
from functitan.errors import LayoutError, MeshError, PatternError, report
from functitan.ops.contraction import move
from functitan.ops.types import Type, layout_here
from functitan.sharding.context import Env, as_mesh, current
from functitan.sharding.layout import Layout, axes_of, block_of, check_rank, divisibility, layout_of, table_of, whole
from functitan.sharding.mesh import Mesh
from functitan.sharding.rules import AxisRules, check_rules
from functitan.sharding.steps import Label


def constrain(pattern: str, x: Tensor) -> Tensor:
    """Move a tensor by renaming its axes: `"batch seq embed -> batch whole_seq embed"`.

    The rules give the new names their layout. Transpose: the move back.

    >>> import torch
    >>> constrain("batch seq -> batch whole_seq", torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    axes, names = _parse(pattern)
    check_rank(axes, tuple(x.shape), f"constrain({pattern!r})")
    env = current()
    if env.mesh is None:
        return x
    return move(Type(axes), Type(axes, lookup=names), x, env, Label("constrain", pattern))


def where_whole(pattern: str, axis: str, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`fn` of a tensor moved so that one axis is whole on every rank, and its result moved back.

    For functions that mix the positions of that axis and keep the shape, elementwise in all others; in the usual
    layouts nothing moves.

    >>> import torch
    >>> where_whole("batch embed", "embed", lambda x: x.flip(-1), torch.tensor([[1, 2]]))
    tensor([[2, 1]])
    """
    axes, env = parse_axes(pattern), current()
    check_rank(axes, tuple(x.shape), f"where_whole({pattern!r})")
    if env.mesh is None:
        return fn(x)
    label, own = Label("where_whole", pattern), Type(axes)
    layout = layout_here(axes, x, env)
    if not layout.of(axis):
        return fn(x)
    goal = Type(axes, layout=Layout(layout.axes, tuple(() if a == axis else layout.of(a) for a in layout.axes)))
    return move(goal, own, fn(move(own, goal, x, env, label)), env, label)


def constrain_like(pattern: str, x: Tensor, like_pattern: str, like: Tensor) -> Tensor:
    """Move a tensor to where its axes lie in another: positions "batch seq" to the queries' "batch seq heads head_dim".

    >>> import torch
    >>> constrain_like("seq", torch.arange(3), "seq heads", torch.ones(3, 2))
    tensor([0, 1, 2])
    """
    axes, others, env = parse_axes(pattern), parse_axes(like_pattern), current()
    check_rank(axes, tuple(x.shape), f"constrain_like({pattern!r})")
    check_rank(others, tuple(like.shape), f"constrain_like({like_pattern!r})")
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
        return values
    check_rules(to_rules, env.mesh.sizes)
    assert env.rules is not None
    return _moved(values, patterns, env, env.rules, to_rules, "reshard")


def shard(
    values: tree.Tree, patterns: tree.Tree, *, mesh: Mesh | DeviceMesh | None, rules: AxisRules | None
) -> tree.Tree:
    """This rank's shards of a tree of global values, which every rank has. Nothing is sent.

    `patterns` is a tree or a prefix of patterns; `None` keeps a leaf whole. Raises `LayoutError` that lists every leaf
    whose sizes its mesh dims do not divide, before any is cut.
    """
    known = as_mesh(mesh)
    if known is None:
        return values
    leaves, structure = tree.flatten(values)
    types = _types(values, patterns, rules, "ft.shard")
    layouts = [layout_of(t.axes, _table(t.rules), known.sizes) if t is not None else None for t in types]
    problems = []
    for path, x, layout in zip(tree.paths(values), leaves, layouts, strict=True):
        if layout is not None:
            check_rank(layout.axes, tuple(x.shape), path)
            problems += divisibility(layout, tuple(x.shape), known.sizes, path)
    if problems:
        raise LayoutError(report("ft.shard", problems, "change the sizes, the mesh, or the rules of those axes"))
    return tree.unflatten(
        structure,
        [
            x if layout is None else x[block_of(layout, tuple(x.shape), known)].contiguous() if any(layout.dims) else x
            for x, layout in zip(leaves, layouts, strict=True)
        ],
    )


def unshard(
    values: tree.Tree, patterns: tree.Tree, *, mesh: Mesh | DeviceMesh | None, rules: AxisRules | None
) -> tree.Tree:
    """The tree of global values, on every rank, of a tree of shards. Transpose: `shard`."""
    known = as_mesh(mesh)
    if known is None:
        return values
    env = current()._replace(mesh=known, rules=_table(rules))
    return _moved(values, patterns, env, _table(rules), None, "unshard")


def _moved(
    values: tree.Tree, patterns: tree.Tree, env: Env, rules: AxisRules, to: AxisRules | None, op: str
) -> tree.Tree:
    leaves, structure = tree.flatten(values)
    moved = []
    for x, now in zip(leaves, _types(values, patterns, rules, f"ft.{op}"), strict=True):
        if now is None:
            moved.append(x)
            continue
        axes = now.axes
        check_rank(axes, tuple(x.shape), f"ft.{op}")
        goal = Type(axes, layout=whole(axes)) if to is None else Type(axes, rules=to)
        moved.append(move(now, goal, x, env, Label(op, write_axes(axes))))
    return tree.unflatten(structure, moved)


def _types(values: tree.Tree, patterns: tree.Tree, rules: AxisRules | None, what: str) -> list[Type | None]:
    """The type of each leaf, from a tree or prefix of patterns, `Param`s (each under its own rules) and `None`."""
    given = tree.broadcast_prefix(patterns, values, what)
    return [None if (axes := axes_of(p)) is None else Type(axes, rules=table_of(p, rules)) for p in given]


def _table(rules: AxisRules | None) -> AxisRules:
    if not isinstance(rules, AxisRules):
        raise MeshError(
            report("sharding on a mesh", [f"rules is {rules!r}"], "give a table: rules=ft.AxisRules({...})")
        )
    return rules


@cache
def _parse(pattern: str) -> tuple[Axes, Axes]:
    signature = parse_signature(pattern)
    (axes, *more), (names, *others) = signature
    if more or others or len(axes) != len(names):
        problem = f"constrain renames the axes of one tensor, one for one; this has {signature}"
        raise PatternError(report(f"constrain({pattern!r})", [problem], "write as in 'batch seq -> batch whole_seq'"))
    return axes, names
