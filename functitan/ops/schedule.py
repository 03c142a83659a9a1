"""The schedule of a plan on one rank's shards: operands move, products are taken, results are brought to their layouts.

Invariant: each operand moves once, when it is first used. A move that became a ring runs beside its products instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.ops.arithmetic import Arithmetic, Value
from functitan.ops.local import maximum
from functitan.ops.pipelined import after_gather, before_scatter, rings_here
from functitan.ops.ring import Ring, Work
from functitan.sharding.context import Env
from functitan.sharding.contraction import Contraction
from functitan.sharding.message import Label
from functitan.sharding.moves import Step
from functitan.sharding.plan import Group, Plan, Product
from functitan.sharding.rings import local_size
from functitan.sharding.steps import settle

Key = tuple[int, Any]  # an operand as products take it: its place in `Plan.moved`, and its use


class _Part(NamedTuple):
    """A product of the plan, and its operands."""

    result: int
    item: Product
    keys: tuple[Key, ...]


def run_plan(
    full: Contraction,
    plan: Plan,
    tensors: tuple[Tensor, ...],
    made: tuple[torch.dtype | None, ...],
    reduction: str,
    how: Arithmetic,
    env: Env,
    label: Label,
) -> tuple[Tensor, ...]:
    """The results of a contraction, in the dtypes `made` (`None`: as they come)."""
    parts = [[_parts(full, plan, r, group, how) for group in groups] for r, groups in enumerate(plan.results)]
    every = [part for groups in parts for group in groups for part in group]
    wanted = tuple(dict.fromkeys((plan.moved[i][0], use) for part in every for i, use in part.keys))
    packed = dict(zip(wanted, how.pack(tensors, wanted, full, env, label), strict=True))
    found = rings_here(full, plan, env, label)
    gathers = dict(found.gathers)
    arrived: dict[Key, Value] = {}
    streamed: dict[_Part, Tensor] = {}

    def moved(key: Key, steps: tuple[Step, ...]) -> Value:
        value = packed[plan.moved[key[0]][0], key[1]]
        for step in steps:
            value = how.move(value, step, env, label)
        return value

    def operand(key: Key) -> Value:
        if key not in arrived:
            arrived[key] = how.arrive(moved(key, plan.moved[key[0]][1]))
        return arrived[key]

    def work(part: _Part, streams: Key | None = None) -> Work:
        axes = tuple(full.operands[plan.moved[i][0]].axes for i in part.item.moved)
        values = tuple(None if key == streams else operand(key) for key in part.keys)
        return Work(axes, values, full.results[part.result].axes, part.item.broadcast)

    def product_of(part: _Part) -> Tensor:
        streams = next((key for key in part.keys if key[0] in gathers), None)
        if streams is None:
            its = work(part)
            return its.run(how) if reduction == "sum" else maximum(its.axes[0], its.result, its.values[0])
        if part not in streamed:
            place, steps = plan.moved[streams[0]]
            at = gathers[streams[0]]
            step, others = steps[at], steps[:at] + steps[at + 1 :]
            together = [other for other in every if streams in other.keys]
            works = [(other.keys.index(streams), work(other, streams)) for other in together]
            assert step.source is not None
            axis = step.source.axis
            size = local_size(tensors[place].shape[axis], axis, others)
            ring = Ring(full.operands[place].axes[axis], step.dims, size, env, label)
            values = after_gather(ring, moved(streams, others), works, how)
            streamed.update(zip(together, values, strict=True))
        return streamed[part]

    def scattered(result: int, group: Group, its: list[_Part]) -> tuple[Tensor, torch.dtype]:
        step = group.steps[0]
        assert step.target is not None
        axis = full.results[result].axes[step.target.axis]
        size = _size(full, plan, tensors, its[0].item, axis) // env.mesh.sizes.size(step.dims)  # type: ignore[union-attr]
        return before_scatter(Ring(axis, step.dims, size, env, label), [work(part) for part in its], how)

    results: list[Tensor] = []
    for r, (groups, dtype) in enumerate(zip(plan.results, made, strict=True)):
        settled: list[Tensor] = []
        for g, group in enumerate(groups):
            if (r, g) in found.scatters:
                y, own = scattered(r, group, parts[r][g])
                steps = group.steps[1:]
            else:
                first, *others = map(product_of, parts[r][g])
                y = sum(others, first)
                own, steps = y.dtype, group.steps
            settled.append(settle(y, own, dtype or own, steps, env, label, reduction))
        results.append(sum(settled[1:], settled[0]))
    return tuple(results)


def _parts(full: Contraction, plan: Plan, result: int, group: Group, how: Arithmetic) -> list[_Part]:
    parts = []
    for item in group.products:
        places = tuple(plan.moved[i][0] for i in item.moved)
        uses = (how.use(full, places, result, which) for which in range(len(places)))
        parts.append(_Part(result, item, tuple(zip(item.moved, uses, strict=True))))
    return parts


def _size(full: Contraction, plan: Plan, tensors: tuple[Tensor, ...], item: Product, axis: str) -> int:
    """The local size of an axis in a product."""
    places = ((plan.moved[i], full.operands[plan.moved[i][0]].axes) for i in item.moved)
    return next(
        local_size(tensors[place].shape[axes.index(axis)], axes.index(axis), steps)
        for (place, steps), axes in places
        if axis in axes
    )
