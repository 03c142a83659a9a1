"""Which moves of a plan run beside its products, in rings: a gather before a matmul, a reduce-scatter after one.

Invariant: a ring takes the place of one step of the plan, over the same mesh dims and with the same bytes. A step over
the dims asked for that no ring can take the place of is named, with the reason.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from functitan.axes import Axes, write_axes
from functitan.sharding.contraction import Contraction
from functitan.sharding.moves import Step, View
from functitan.sharding.plan import Group, Plan, Product
from functitan.sharding.rules import Dims


class Pipelining(NamedTuple):
    """The mesh dims whose transfers run beside matmuls, and the pieces into which a message is cut."""

    dims: Dims
    pieces: int = 1


class Unpipelined(NamedTuple):
    """A step that stays one message of its own, and why."""

    step: Step
    why: str


class Rings(NamedTuple):
    """The steps that rings replace, of moved operands and of groups of products, and those that stay as they are."""

    gathers: tuple[tuple[int, int], ...]  # (place in `Plan.moved`, which of its steps)
    scatters: tuple[tuple[int, int], ...]  # (result, group), of which it is the first step
    left: tuple[Unpipelined, ...]


@lru_cache(maxsize=2**14)  # as plans are
def rings(full: Contraction, plan: Plan, dims: Dims) -> Rings:
    """The rings of a plan over these mesh dims. A product has one ring: of its first operand that needs one, or after.

    A gather becomes a ring where one of its products is a matmul, and its shards are the parts of an axis in order. A
    reduce-scatter does where it follows its products at once, and an operand of each of them has the scattered axis.
    """
    asked = _Asked(full, plan, frozenset(dims))
    gathers: dict[int, int] = {}
    streams: set[_Use] = set()  # products that a gather feeds chunk by chunk
    left: list[Unpipelined] = []
    for moved, (_, steps) in enumerate(plan.moved):
        for s in asked.over(steps):
            why = _TAKEN if moved in gathers else _of_gather(asked, moved, s, streams)
            if why:
                left.append(Unpipelined(steps[s], why))
            else:
                gathers[moved] = s
        if moved in gathers:
            streams |= {use for use in asked.uses if moved in use.item.moved}
    scatters: list[tuple[int, int]] = []
    for r, groups in enumerate(plan.results):
        for g, group in enumerate(groups):
            for s in asked.over(group.steps):
                if why := _of_result(asked, r, group, s, streams):
                    left.append(Unpipelined(group.steps[s], why))
                else:
                    scatters.append((r, g))
    return Rings(tuple(gathers.items()), tuple(scatters), tuple(left))


def local_size(size: int, axis: int, steps: tuple[Step, ...]) -> int:
    """The local size of an axis after steps, from that before them."""
    for step in steps:
        if step.source is not None and step.source.axis == axis:
            size *= _ranks(step.source)
        if step.target is not None and step.target.axis == axis:
            size //= _ranks(step.target)
    return size


class _Use(NamedTuple):
    """A product and the result that it is of."""

    result: int
    item: Product


class _Asked(NamedTuple):
    """A plan, and the mesh dims asked for."""

    full: Contraction
    plan: Plan
    dims: frozenset[str]

    @property
    def uses(self) -> list[_Use]:
        return [
            _Use(r, item) for r, groups in enumerate(self.plan.results) for group in groups for item in group.products
        ]

    def over(self, steps: tuple[Step, ...]) -> list[int]:
        """The steps that send something over the mesh dims asked for."""
        return [s for s, step in enumerate(steps) if step.kind != "slice" and self.dims & {*step.dims}]

    def axes(self, item: Product) -> list[Axes]:
        return [self.full.operands[self.plan.moved[i][0]].axes for i in item.moved]

    def is_matmul(self, use: _Use) -> bool:
        """Whether two operands share an axis that is summed, and each has an axis that the other lacks."""
        made, axes = self.full.results[use.result].axes, self.axes(use.item)
        return any({*a} & {*b} - {*made} and {*a} - {*b} and {*b} - {*a} for i, a in enumerate(axes) for b in axes[:i])

    def splits(self, item: Product) -> set[str]:
        """The mesh dims over which ranks compute different parts of a product."""
        dims: set[str] = set()
        for place, steps in (self.plan.moved[i] for i in item.moved):
            own = {dim for over in self.full.operands[place].dims for dim in over}
            for step in steps:
                own = own - {*step.dims} if step.target is None else own | {*step.dims}
            dims |= own
        return dims

    def merged(self, step: Step) -> str:
        rest = [dim for dim in step.dims if dim not in self.dims]
        return f"it is one message with {', '.join(rest)}: name them in dims= too" if rest else ""


def _of_gather(asked: _Asked, moved: int, place: int, streams: set[_Use]) -> str:
    """Why a step of an operand is no ring, if it is none."""
    steps = asked.plan.moved[moved][1]
    step, uses = steps[place], [use for use in asked.uses if moved in use.item.moved]
    if step.kind != "all_gather" or step.source is None:
        return _EXCHANGE
    if not any(map(asked.is_matmul, uses)):
        return _NO_MATMUL_AFTER
    if merged := asked.merged(step):
        return merged
    touched = {view.axis for later in steps[place + 1 :] for view in (later.source, later.target) if view is not None}
    if not _in_order(step.source) or step.source.axis in touched:
        return _ORDER
    if streams & set(uses):
        return _TAKEN
    name = asked.full.operands[asked.plan.moved[moved][0]].axes[step.source.axis]
    adds = [use for use in uses if name not in asked.full.results[use.result].axes]
    return "" if all(asked.splits(use.item) >= {*step.dims} for use in adds) else _REPLICATED


def _of_result(asked: _Asked, result: int, group: Group, place: int, streams: set[_Use]) -> str:
    """Why a step of a result is no ring, if it is none."""
    step, uses = group.steps[place], [_Use(result, item) for item in group.products]
    axes = asked.full.results[result].axes
    if not any(map(asked.is_matmul, uses)):
        return _NO_MATMUL_BEFORE
    if step.kind == "all_reduce":
        return f"the result {write_axes(axes)!r} is not sharded over it: no part is wanted before the others"
    if step.kind != "reduce_scatter" or step.target is None:
        return _EXCHANGE if step.kind == "all_to_all" else _AFTER
    if merged := asked.merged(step):
        return merged
    if place > 0:
        return _NOT_FIRST
    if streams & set(uses):
        return _TAKEN
    axis = axes[step.target.axis]
    if not all(any(axis in own for own in asked.axes(use.item)) for use in uses):
        return f"it scatters axis {axis!r}, which no operand of a product has"
    return "" if _in_order(step.target) else _ORDER


def _ranks(view: View) -> int:
    return math.prod(view.sizes[p] for p in view.moved)


def _in_order(view: View) -> bool:
    """Whether the parts that move are the axis cut into pieces in the order of the group's ranks."""
    first = view.moved[0]
    return view.moved == tuple(range(first, first + len(view.moved))) and math.prod(view.sizes[:first]) == 1


_EXCHANGE = "an all-to-all has no ring"
_AFTER = "it follows its product, and nothing is left to compute beside it"
_NO_MATMUL_AFTER = "it comes before no matmul"
_NO_MATMUL_BEFORE = "it comes after no matmul"
_NOT_FIRST = "another move comes between the matmul and it"
_TAKEN = "its product has a ring already"
_REPLICATED = "all ranks compute one sum over its axis, which must have one order"
_ORDER = "its shards are not the parts of an axis in order"
