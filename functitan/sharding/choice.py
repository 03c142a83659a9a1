"""The planner's choice: for each term of a contraction and each mesh dim, the axis that splits the local work.

Invariant: mesh dims are chosen for one by one, each as if it were alone, so their order changes nothing. The terms of a
contraction are chosen for together: an operand that one term has brought somewhere is there for all.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

from functitan.sharding.contraction import Contraction, Term
from functitan.sharding.layout import Layout
from functitan.sharding.mesh import MeshSizes
from functitan.sharding.moves import Frames, Splits

FEW = 64  # ways to choose for all terms, up to which each is looked at
FACTOR = 16  # a choice that moves more than this times the cheapest one's elements is not worth a saved latency


class Fixed(NamedTuple):
    """Choices that are not the planner's: the axis of some mesh dims (a table never moves), and barred axes."""

    splits: tuple[tuple[str, str], ...] = ()
    barred: tuple[str, ...] = ()


FREE = Fixed()
SUM = "+"  # where a term is before its reduction: no axis has such a name


class _Move(NamedTuple):
    """One collective over one mesh dim: of an operand, or of a result; from which split axis (or a sum) to which."""

    tensor: int  # operands count from 0, results from -1 downwards
    now: str | None
    then: str | None


class _Option(NamedTuple):
    """One axis (or none) for one term, or one for each; the collectives it takes, and its rank among equals."""

    axis: Any  # a name or None; of all terms together a tuple of them
    moves: frozenset[_Move]
    rank: tuple[int, int]  # how many terms are worked out alike on every rank, and how many are summed over ranks


def choose(contraction: Contraction, mesh: MeshSizes, fixed: Fixed) -> list[tuple[Splits, Frames]]:
    """For each term, the mesh dims that split each axis of its local work, and the order of each axis's shards in it.

    Every axis of a term that the mesh dims divide is a candidate, and so is "none". Choices that move more than 16
    times the elements of the cheapest are dropped; of the rest the fewest collectives win, then the fewest elements,
    counted from the layouts before any move; ties go to gathers and reductions before exchanges, a split before none,
    an output axis before a contracted one, then to the order in the pattern.
    """
    sizes = dict(contraction.sizes)
    dims = {dim for layout in (*contraction.operands, *contraction.results) for dims in layout.dims for dim in dims}
    axes = {dim: _choose(dim, dims, contraction, sizes, mesh, fixed) for dim in dims}
    chosen: list[tuple[Splits, Frames]] = []
    for t, term in enumerate(contraction.terms):
        layouts = _layouts(contraction, term)
        split = {axis: tuple(sorted(dim for dim in dims if axes[dim][t] == axis)) for axis in _axes(layouts)}
        splits = {axis: over for axis, over in split.items() if over}
        chosen.append((splits, {axis: _frame(axis, over, layouts, sizes, mesh) for axis, over in splits.items()}))
    return chosen


def _choose(
    dim: str, dims: set[str], contraction: Contraction, sizes: dict[str, int], mesh: MeshSizes, fixed: Fixed
) -> tuple[str | None, ...]:
    """The axis of each term for one mesh dim: the best of all ways, where they are few.

    Terms share moves. So where they are many each move in turn (and none) counts as paid while every term takes its
    best option; then each takes its best given what the others pay. The best end of all is taken.
    """
    options = [_options(dim, dims, term, contraction, sizes, mesh, fixed) for term in contraction.terms]
    moves = {move for own in options for option in own for move in option.moves}
    price = {move: _price(move, dim, contraction, sizes, mesh) for move in moves}
    few = math.prod(map(len, options)) <= FEW
    ends = set(itertools.product(*(range(len(own)) for own in options))) if few else _ends(options, moves, price)
    together = [_joint([own[i] for own, i in zip(options, end, strict=True)]) for end in sorted(ends)]
    return _best(together, set(), price).axis


def _ends(options: list[list[_Option]], moves: set[_Move], price: dict[_Move, int]) -> set[tuple[int, ...]]:
    """Good ways for all terms together: the place of each one's option."""
    ends = set()
    for paid in (None, *moves):
        chosen = [_best(own, {paid}, price) for own in options]
        for t in range(len(options)):
            others = {move for i, option in enumerate(chosen) if i != t for move in option.moves}
            chosen[t] = _best(options[t], others, price)
        ends.add(tuple(own.index(option) for own, option in zip(options, chosen, strict=True)))
    return ends


def _joint(chosen: list[_Option]) -> _Option:
    """The options of all terms as one, which pays a move that they share once."""
    repeated, summed = (sum(option.rank[i] for option in chosen) for i in (0, 1))
    moves = frozenset(move for option in chosen for move in option.moves)
    return _Option(tuple(option.axis for option in chosen), moves, (repeated, summed))


def _best(options: list[_Option], paid: set[Any], price: dict[_Move, int]) -> _Option:
    costs = []
    for option in options:
        moves = option.moves - paid
        exchanges = sum(m.now != SUM and m.then is not None for m in moves)
        costs.append((len(moves), sum(price[move] for move in moves), exchanges, option.rank))
    cheapest = min(cost[1] for cost in costs)
    kept = [i for i, cost in enumerate(costs) if cost[1] <= FACTOR * cheapest]
    return options[min(kept, key=lambda i: costs[i])]  # min keeps the first of equals: the order in the pattern


def _options(
    dim: str,
    dims: set[str],
    term: Term,
    contraction: Contraction,
    sizes: dict[str, int],
    mesh: MeshSizes,
    fixed: Fixed,
) -> list[_Option]:
    result, layouts, forced = contraction.results[term.result], _layouts(contraction, term), dict(fixed.splits)
    free = (a for a in _axes(layouts) if a not in fixed.barred and _may_split(dim, dims, a, layouts, sizes, mesh))
    options = []
    for axis in [forced[dim]] if dim in forced else [*free, None]:
        moves = set()
        for i in term.operands:
            layout = contraction.operands[i]
            now, then = layout.axis_of(dim), axis if axis in layout.axes else None
            if now is not None and now != then:
                moves.add(_Move(i, now, then))
        made, wanted = (SUM if axis is not None and axis not in result.axes else axis), result.axis_of(dim)
        if made is not None and made != wanted:
            moves.add(_Move(-1 - term.result, made, wanted))
        options.append(_Option(axis, frozenset(moves), (axis is None, made == SUM)))
    return options


def _price(move: _Move, dim: str, contraction: Contraction, sizes: dict[str, int], mesh: MeshSizes) -> int:
    """Elements that one rank sends in a move, from the layouts before any move; times the mesh dim's size: exact."""
    n, of_result = mesh.size(dim), move.tensor < 0
    layout = contraction.results[-1 - move.tensor] if of_result else contraction.operands[move.tensor]
    if move.now == SUM:
        factor = 2 * (n - 1) if move.then is None else n * (n - 1)
    else:
        factor = n * (n - 1) if move.then is None and not of_result else n - 1
    return _elements(layout, sizes, mesh) * factor


def _may_split(
    dim: str, dims: set[str], axis: str, layouts: list[Layout], sizes: dict[str, int], mesh: MeshSizes
) -> bool:
    """An axis may be split where all mesh dims that may split it divide it together: those that shard it, or all."""
    sharding = {other for layout in layouts for other in layout.of(axis)}
    together = sharding if dim in sharding else dims
    return sizes[axis] % mesh.size(tuple(together)) == 0


def _frame(
    axis: str, split: tuple[str, ...], layouts: list[Layout], sizes: dict[str, int], mesh: MeshSizes
) -> tuple[str, ...]:
    """The order of shards of one axis inside a term: that of the tensors which are costly to bring to another order."""

    def cost(frame: tuple[str, ...]) -> tuple[int, int, tuple[str, ...]]:
        moved = 0
        for layout in layouts:
            dims = layout.of(axis)
            gathered = dims if dims != frame[: len(dims)] else tuple(dim for dim in dims if dim not in split)
            moved += _elements(layout, sizes, mesh) * mesh.size(gathered)
        return moved, -len(frame), frame

    orders = [layout.of(axis) for layout in layouts]
    frames = [order + tuple(dim for dim in split if dim not in order) for order in orders]
    return min((frame for frame in frames if sizes[axis] % mesh.size(frame) == 0), key=cost)


def _layouts(contraction: Contraction, term: Term) -> list[Layout]:
    return [*(contraction.operands[i] for i in term.operands), contraction.results[term.result]]


def _axes(layouts: list[Layout]) -> tuple[str, ...]:
    """The axes of a term in the order of its pattern."""
    return tuple(dict.fromkeys(axis for layout in layouts for axis in layout.axes))


def _elements(layout: Layout, sizes: dict[str, int], mesh: MeshSizes) -> int:
    """Number of elements of one rank's shard."""
    return math.prod(sizes[axis] // mesh.size(dims) for axis, dims in zip(layout.axes, layout.dims, strict=True))
