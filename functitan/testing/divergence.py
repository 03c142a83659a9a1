"""The first named op that does not give one program's values on two meshes.

Invariant: values are compared in their global form: a rank's shard with the part of the other mesh's whole tensor that
its layout says it holds. So two ranks that should hold the same and do not are found, too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan import tree
from functitan.axes import write_axes
from functitan.ops.contraction import Static
from functitan.ops.function import Call
from functitan.ops.move import shard
from functitan.sharding.around import Around
from functitan.sharding.context import current, spmd, using
from functitan.sharding.layout import Layout, block_of, global_shape
from functitan.sharding.ledger import Ledger, entering
from functitan.sharding.mesh import Mesh
from functitan.sharding.message import Message
from functitan.sharding.rules import AxisRules
from functitan.sharding.simulate import simulate
from functitan.testing.asserts import bound_of, distance


class Tap(NamedTuple):
    """What a call of an op gave, as plain shards, and how many messages the ledger held by then."""

    call: Call
    results: tuple[Tensor, ...]
    collectives: int


class Divergence(NamedTuple):
    """A result of a named op that differs between two meshes.

    `result` is the result's own pattern, which in backward is that of an operand. `axis` is the sharded axis of which
    only some shards differ, if there is one. `collectives` ran between the named value before and this one.
    """

    index: int  # of the result, among those of all named ops in the order of execution
    phase: str
    op: str
    pattern: str
    result: str
    axis: str | None
    difference: float
    collectives: tuple[Message, ...]

    def __str__(self) -> str:
        sent = ", ".join(f"{e.collective} over {'·'.join(e.mesh_dims)}" for e in self.collectives) or "no collective"
        where = f", in some shards of axis {self.axis!r}" if self.axis else ""
        what = f"{self.op}({self.pattern!r}), {self.phase}, result {self.result!r}"
        return f"value {self.index}, {what}: differs by {self.difference:.3g}{where} (behind it: {sent})"


def first_divergence(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    mesh_a: Mapping[str, int] | None,
    mesh_b: Mapping[str, int] | None,
    *,
    patterns: tree.Tree,
    rules: AxisRules,
    rtol: float | None = None,
    atol: float | None = None,
) -> Divergence | None:
    """The first result of a named op that differs when `fn` runs on two virtual meshes, or `None`.

    `args` are global values, `patterns` a tree or prefix of theirs; `None` or `{}` is one rank, on which nothing is
    sharded. Forward and backward are compared, each value with the same occurrence of its op and pattern on the other
    mesh; moves that one mesh does not need are passed over. Tolerances as in `assert_trees_all_close`.

    >>> from functitan.ops.einsum import einsum
    >>> from functitan.ops.reduce import reduce
    >>> rules = AxisRules({"batch": "dp", "embed": None})
    >>> mean = lambda x: reduce("embed ->", x.sum(0))  # a plain sum over a sharded axis: each rank has its own
    >>> found = first_divergence(mean, (torch.ones(4, 2),), None, dict(dp=2), patterns=("batch embed",), rules=rules)
    >>> found.op, found.pattern, found.difference
    ('reduce', 'embed ->', 4.0)
    """
    meshes = [dict(mesh or {}) for mesh in (mesh_a, mesh_b)]
    dims = [dim for mesh in meshes for dim in mesh]  # rules may name them, so that both meshes have to know them
    of_a, of_b = (_run(fn, args, patterns, {**dict.fromkeys(dims, 1), **mesh}, rules) for mesh in meshes)
    expected, actual = _by_key(of_a), _by_key(of_b)
    seen: Counter[Any] = Counter()
    for index, value in enumerate(of_b):
        occurrence, same = seen[value.key], expected.get(value.key, [])
        seen[value.key] += 1
        if len(same) == len(actual[value.key]):
            found = _compare(value, same[occurrence], rtol, atol)
            if found is not None:
                return Divergence(index, *value.key[:4], *found, value.collectives)
    return None


class _Key(NamedTuple):
    phase: str
    op: str
    pattern: str
    result: str
    place: int  # of the result in the op


class _Value(NamedTuple):
    key: _Key
    layout: Layout
    shards: list[tuple[Mesh, Tensor]]  # by rank
    collectives: tuple[Message, ...]  # of rank 0


def _run(
    fn: Callable[..., Any], args: tuple[Any, ...], patterns: tree.Tree, mesh: dict[str, int], rules: AxisRules
) -> list[_Value]:
    """Every named value of a run, in the order of execution."""

    def rank(own: Mesh) -> tuple[Mesh, list[Tap], Ledger]:
        ledger, taps = Ledger(), []

        def tap(call: Call, tensors: tuple[Tensor, ...], run: Callable[..., Any]) -> Any:
            results = run(call, tensors)
            if call.env.mesh is not None and call.env.mesh.sizes == own.sizes:  # else of one replica's own program
                taps.append(Tap(call, tuple(y.clone() for y in results), len(ledger)))
            return results

        env = current().without(Ledger).inside(entering(ledger)).inside(Around(taps, op=tap, sees_every_op=True))
        with using(env):
            spmd(fn, mesh=own, rules=rules)(*shard(args, patterns, mesh=own, rules=rules))
        return own, taps, ledger

    meshes, taps, ledgers = zip(*simulate(**mesh)(rank)(), strict=True)
    values, before = [], 0
    for ranks in zip(*taps, strict=True):
        for key, layout in _named(ranks[0]):
            shards = [(own, tap.results[key.place]) for own, tap in zip(meshes, ranks, strict=True)]
            values.append(_Value(key, layout, shards, tuple(ledgers[0].entries[before : ranks[0].collectives])))
            before = ranks[0].collectives
    return values


def _named(tap: Tap) -> Iterator[tuple[_Key, Layout]]:
    """The results whose layout the rules give; others are steps inside an op, made for one mesh."""
    static = tap.call.static
    if not hasattr(static, "full"):
        return  # cross entropy works where its logits lie, and moves its result by a contraction
    if isinstance(static, Static):
        types: Any = static.typed.results
    else:
        types = (static.types.result if static.kind == "take" else static.types.table,)
    for r, (own, layout) in enumerate(zip(types, static.full.results, strict=True)):
        if own.layout is None:
            named = layout.axes if own.lookup is None else own.lookup  # so that hidden axes have their names
            op, pattern = static.label
            yield _Key(tap.call.env.phase, op, pattern, write_axes(named), r), layout


def _by_key(values: list[_Value]) -> dict[Any, list[_Value]]:
    found: dict[Any, list[_Value]] = defaultdict(list)
    for value in values:
        found[value.key].append(value)
    return found


def _compare(value: _Value, other: _Value, rtol: float | None, atol: float | None) -> tuple[str | None, float] | None:
    """(axis of which some shards differ, largest difference) between a value and the same one on another mesh."""
    expected, wrong, largest = _whole(other), torch.zeros(_shape(value), dtype=torch.bool), 0.0
    bound = bound_of(expected, rtol, atol)
    for side in (other, value):
        shape = _shape(side)
        for mesh, x in side.shards:
            block = block_of(side.layout, shape, mesh)
            gap = distance(x, _part(expected, block, shape))
            largest = max(largest, gap.max().item() if gap.numel() else 0.0)
            if side is value:
                wrong[block] |= gap > bound
    if largest <= bound:
        return None
    mesh = value.shards[0][0]
    for place, (axis, dims) in enumerate(zip(value.key.result.split(), value.layout.dims, strict=True)):
        bad = wrong.movedim(place, 0).reshape(mesh.sizes.size(dims), -1).any(1)
        if bad.any() and not bad.all():
            return axis, largest
    return None, largest


def _whole(value: _Value) -> Tensor:
    """The global tensor; of ranks that share a part, the first one's."""
    shape = _shape(value)
    out = value.shards[0][1].new_empty(shape)
    for mesh, x in reversed(value.shards):
        out[block_of(value.layout, shape, mesh)] = x
    return out


def _part(whole: Tensor, block: tuple[slice, ...], shape: tuple[int, ...]) -> Tensor:
    """A block of a whole tensor; an axis new by `ft.broadcast` has one place for each rank, all alike: its first."""
    places = zip(whole.shape, block, shape, strict=True)
    return whole[tuple(part if size == n else slice(0, 1) for size, part, n in places)]


def _shape(value: _Value) -> tuple[int, ...]:
    mesh, x = value.shards[0]
    return global_shape(value.layout, tuple(x.shape), mesh.sizes)
