"""The planner's choice: for each term of a contraction and each mesh dim, the axis that splits the local work.

Invariant: mesh dims are chosen for one by one, each as if it were alone, so their order changes nothing. The terms of a
contraction are chosen for together: an operand that one term has brought somewhere is there for all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from functitan.sharding.contraction import Contraction, Term
from functitan.sharding.layout import Layout
from functitan.sharding.mesh import MeshSizes
from functitan.sharding.moves import Frames, Splits

FACTOR = 16  # a choice that moves more than this times the cheapest one's elements is not worth a saved latency


class Fixed(NamedTuple):
    """Choices that are not the planner's: the axis of some mesh dims (a table never moves), and barred axes."""

    splits: tuple[tuple[str, str], ...] = ()
    barred: tuple[str, ...] = ()


FREE = Fixed()


class _Move(NamedTuple):
    """One collective over one mesh dim: of an operand, or of a result; from which split axis to which ("+": a sum)."""

    tensor: int  # operands count from 0, results from -1 downwards
    now: str | None
    then: str | None


class _Option(NamedTuple):
    """One axis (or none) for one term, the collectives it takes, and its rank among equals."""

    axis: str | None
    moves: frozenset[_Move]
    rank: tuple[bool, bool]  # repeated work last, then sums


def choose(contraction: Contraction, mesh: MeshSizes, fixed: Fixed) -> list[tuple[Splits, Frames]]:
    """For each term, the mesh dims that split each axis of its local work, and the order of each axis's shards in it.

    Every axis of a term is a candidate, and so is "none". Choices that move more than 16 times the elements of the
    cheapest are dropped; of the rest the fewest collectives win, then the fewest elements, counted from the layouts
    before any move; ties go to gathers and reductions before exchanges, a split before none, an output axis before a
    contracted one, then to the order in the pattern.
    """
    sizes = dict(contraction.sizes)
    tensors = (*contraction.operands, *contraction.results)
    dims = sorted({dim for layout in tensors for dims in layout.dims for dim in dims})
    banned = {(t, dim, axis) for t in range(len(contraction.terms)) for dim in dims for axis in fixed.barred}
    while True:
        axes = {dim: _choose(dim, contraction, sizes, mesh, fixed, banned) for dim in dims}
        chosen: list[tuple[Splits, Frames]] = []
        for t, term in enumerate(contraction.terms):
            layouts = [contraction.operands[i] for i in term.operands] + [contraction.results[term.result]]
            splits: dict[str, tuple[str, ...]] = {}
            for dim in dims:
                axis = axes[dim][t]
                if axis is not None:
                    splits[axis] = (*splits.get(axis, ()), dim)
            frames = {axis: _frame(axis, split, layouts, sizes, mesh) for axis, split in splits.items()}
            odd = next((axis for axis, frame in frames.items() if frame is None), None)
            if odd is not None:  # these dims together do not divide the axis: one of them goes elsewhere
                longest = max((layout.of(odd) for layout in layouts), key=lambda t: (len(t), t))
                banned.add((t, next(dim for dim in splits[odd] if dim not in longest), odd))
                break
            chosen.append((splits, frames))  # type: ignore[arg-type]
        else:
            return chosen


def _choose(
    dim: str, contraction: Contraction, sizes: dict[str, int], mesh: MeshSizes, fixed: Fixed, banned: set
) -> tuple[str | None, ...]:
    """The axis of each term for one mesh dim.

    Each term takes its best option given what the others pay for, until nothing changes; this is begun once with
    nothing paid, and once with each move that several terms could share, and the best end is taken.
    """
    options = [_options(dim, t, contraction, sizes, mesh, fixed, banned) for t in range(len(contraction.terms))]
    seen = [move for own in options for move in sorted({m for o in own for m in o.moves}, key=str)]
    price = {move: _price(move, dim, contraction, sizes, mesh) for move in seen}
    shared = [move for move in dict.fromkeys(seen) if seen.count(move) > 1]
    ends = []
    for start in (None, *shared):
        chosen = [_best(own, {start}, price) for own in options]
        for _ in options:
            before = list(chosen)
            for t, own in enumerate(options):
                chosen[t] = _best(own, {m for i, o in enumerate(chosen) if i != t for m in o.moves}, price)
            if chosen == before:
                break
        moves = frozenset(move for option in chosen for move in option.moves)
        rank = (any(o.rank[0] for o in chosen), any(o.rank[1] for o in chosen))
        ends.append((_Option(None, moves, rank), tuple(option.axis for option in chosen)))
    best = _best([end for end, _ in ends], set(), price)
    return next(axes for end, axes in ends if end is best)


def _best(options: list[_Option], paid: set[_Move | None], price: dict[_Move, float]) -> _Option:
    costs = []
    for option in options:
        moves = option.moves - paid
        exchanges = sum(m.now not in (None, "+") and m.then is not None for m in moves)
        costs.append((len(moves), sum(price[m] for m in sorted(moves, key=str)), exchanges, option.rank))
    cheapest = min(cost[1] for cost in costs)
    kept = [i for i, cost in enumerate(costs) if cost[1] <= FACTOR * cheapest]
    return options[min(kept, key=lambda i: costs[i])]  # min keeps the first of equals: the order in the pattern


def _options(
    dim: str, t: int, contraction: Contraction, sizes: dict[str, int], mesh: MeshSizes, fixed: Fixed, banned: set
) -> list[_Option]:
    term: Term = contraction.terms[t]
    result = contraction.results[term.result]
    layouts = [contraction.operands[i] for i in term.operands] + [result]
    axes = tuple(dict.fromkeys(axis for layout in layouts for axis in layout.axes))
    allowed = [a for a in axes if (t, dim, a) not in banned and _may_split(dim, a, layouts, sizes, mesh)]
    forced = dict(fixed.splits)
    options = []
    for axis in [forced[dim]] if dim in forced else [*allowed, None]:
        moves = set()
        for i, layout in zip(term.operands, layouts, strict=False):
            now, then = layout.axis_of(dim), axis if axis in layout.axes else None
            if now is not None and now != then:
                moves.add(_Move(i, now, then))
        made, wanted = ("+" if axis is not None and axis not in result.axes else axis), result.axis_of(dim)
        if made is not None and made != wanted:
            moves.add(_Move(-1 - term.result, made, wanted))
        options.append(_Option(axis, frozenset(moves), (axis is None, made == "+")))
    return options


def _price(move: _Move, dim: str, contraction: Contraction, sizes: dict[str, int], mesh: MeshSizes) -> float:
    """Elements that one rank sends in a move, from the layouts before any move."""
    n, of_result = mesh.size(dim), move.tensor < 0
    layout = contraction.results[-1 - move.tensor] if of_result else contraction.operands[move.tensor]
    if of_result and move.now == "+":
        factor = 2 * (n - 1) / n if move.then is None else n - 1
    else:
        factor = n - 1 if move.then is None and not of_result else (n - 1) / n
    return _elements(layout, sizes, mesh) * factor


def _may_split(dim: str, axis: str, layouts: list[Layout], sizes: dict[str, int], mesh: MeshSizes) -> bool:
    """An axis that no tensor shards over `dim` may be split by it where all dims that shard it still divide it."""
    sharding = {other for layout in layouts for other in layout.of(axis)}
    return dim in sharding or sizes[axis] % (mesh.size(dim) * mesh.size(tuple(sharding))) == 0


def _frame(
    axis: str, split: tuple[str, ...], layouts: list[Layout], sizes: dict[str, int], mesh: MeshSizes
) -> tuple[str, ...] | None:
    """The order of shards of one axis inside a term: that of the tensors which are costly to bring to another order."""
    tensors = [layout for layout in layouts if layout.of(axis)]
    best: tuple[float, int, tuple[str, ...]] | None = None
    for order in {layout.of(axis) for layout in tensors} | {()}:
        frame = order + tuple(dim for dim in sorted(split) if dim not in order)
        if sizes[axis] % mesh.size(frame):
            continue
        cost = 0.0
        for layout in tensors:
            dims = layout.of(axis)
            gathered = dims if dims != frame[: len(dims)] else tuple(dim for dim in dims if dim not in split)
            cost += _elements(layout, sizes, mesh) * (mesh.size(gathered) - 1)
        if best is None or (cost, -len(frame), frame) < best:
            best = (cost, -len(frame), frame)
    return best and best[2]


def _elements(layout: Layout, sizes: dict[str, int], mesh: MeshSizes) -> float:
    """Number of elements of one rank's shard."""
    return math.prod(sizes[axis] / mesh.size(dims) for axis, dims in zip(layout.axes, layout.dims, strict=True))
