"""The schedule of a plan on one rank's shards: operands move, products are taken, results are brought to their layouts.

Invariant: each operand moves once, when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.axes import Axes
from functitan.ops.arithmetic import Arithmetic, Value
from functitan.ops.local import maximum
from functitan.sharding.contraction import Contraction
from functitan.sharding.env import Env
from functitan.sharding.message import Label
from functitan.sharding.moves import Step
from functitan.sharding.plan import Group, Plan, Product
from functitan.sharding.steps import settle

Key = tuple[int, Any]  # an operand as products take it: its place in `Plan.moved`, and its use
Piece = tuple[int, int]  # (start, length) along an axis


class Work(NamedTuple):
    """One local product: its operands, the axes of its result, and the sizes of those that it broadcasts."""

    axes: tuple[Axes, ...]
    values: tuple[Value, ...]
    result: Axes
    broadcast: tuple[tuple[str, int], ...]

    def run(self, how: Arithmetic) -> Tensor:
        """The product."""
        return how.product(self.axes, self.result, self.values, self.broadcast)

    def part(self, how: Arithmetic, axis: str, piece: Piece, given: dict[int, Value] | None = None) -> Tensor:
        """The product of a piece of an axis; `given` are values that are such a piece, by their places."""
        known = given or {}
        cut = (
            known[i] if i in known else how.narrow(value, own.index(axis), *piece) if axis in own else value
            for i, (own, value) in enumerate(zip(self.axes, self.values, strict=True))
        )
        return self._replace(values=tuple(cut)).run(how)


class Part(NamedTuple):
    """A product of the plan, and its operands."""

    result: int
    item: Product
    keys: tuple[Key, ...]


class Running:
    """A plan on this rank's tensors: its products, and its operands, each of which moves when it is first asked for."""

    def __init__(
        self,
        full: Contraction,
        plan: Plan,
        tensors: tuple[Tensor, ...],
        how: Arithmetic,
        reduction: str,
        env: Env,
        label: Label,
    ) -> None:
        self.full, self.plan, self.tensors, self.how = full, plan, tensors, how
        self.reduction, self.env, self.label = reduction, env, label
        self.parts = [[self._parts(r, group) for group in groups] for r, groups in enumerate(plan.results)]
        self.every = [part for groups in self.parts for group in groups for part in group]
        wanted = tuple(dict.fromkeys((plan.moved[i][0], use) for part in self.every for i, use in part.keys))
        self._packed = dict(zip(wanted, how.pack(tensors, wanted, full, env, label), strict=True))
        self._arrived: dict[Key, Value] = {}

    def moved(self, key: Key, steps: tuple[Step, ...]) -> Value:
        """An operand after some steps."""
        value = self._packed[self.plan.moved[key[0]][0], key[1]]
        for step in steps:
            value = self.how.move(value, step, self.env, self.label)
        return value

    def operand(self, key: Key) -> Value:
        """An operand as its products take it."""
        if key not in self._arrived:
            self._arrived[key] = self.how.arrive(self.moved(key, self.plan.moved[key[0]][1]))
        return self._arrived[key]

    def work(self, part: Part, without: Key | None = None) -> Work:
        """A product with its operands; one of them may be left out, to come later."""
        axes = tuple(self.full.operands[self.plan.moved[i][0]].axes for i in part.item.moved)
        values = tuple(None if key == without else self.operand(key) for key in part.keys)
        return Work(axes, values, self.full.results[part.result].axes, part.item.broadcast)

    def product(self, part: Part) -> Tensor:
        """The local product, or the local maximum."""
        work = self.work(part)
        if self.reduction == "sum":
            return work.run(self.how)
        return maximum(work.axes[0], work.result, work.values[0])

    def _parts(self, result: int, group: Group) -> list[Part]:
        parts = []
        for item in group.products:
            places = tuple(self.plan.moved[i][0] for i in item.moved)
            uses = (self.how.use(self.full, places, result, which) for which in range(len(places)))
            parts.append(Part(result, item, tuple(zip(item.moved, uses, strict=True))))
        return parts


Sum = tuple[Tensor, torch.dtype, tuple[Step, ...]]  # of a group's products, their dtype, and the steps that are left


def plain_sum(
    running: Running, result: int, group: int, product: Callable[[Running, Part], Tensor] = Running.product
) -> Sum:
    """The sum of a group's products, each as `product` takes it, one after the other."""
    first, *others = (product(running, part) for part in running.parts[result][group])
    y = sum(others, first)
    return y, y.dtype, running.plan.results[result][group].steps


def run_plan(
    running: Running, made: tuple[torch.dtype | None, ...], summed: Callable[[Running, int, int], Sum]
) -> tuple[Tensor, ...]:
    """The results of a plan, in the dtypes `made` (`None`: as they come); `summed` gives the sum of each group."""
    results: list[Tensor] = []
    for r, (groups, dtype) in enumerate(zip(running.plan.results, made, strict=True)):
        settled: list[Tensor] = []
        for g in range(len(groups)):
            y, own, steps = summed(running, r, g)
            settled.append(settle(y, own, dtype or own, steps, running.env, running.label, running.reduction))
        results.append(sum(settled[1:], settled[0]))
    return tuple(results)
