"""One step of one rank of a pipeline: what it has at the moment, and what each kind of action does with it.

Invariant: an action touches its own stage and microbatch alone; what it takes, another has put there before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan import tree
from functitan.axes import Axes
from functitan.ops.replica import merge, spread
from functitan.pipeline.edges import Edges, check_edge
from functitan.pipeline.exchange import post_all, receive_all
from functitan.pipeline.passes import Pass, backward, forward, weight_half
from functitan.pipeline.schedule import Schedule
from functitan.sharding.context import using
from functitan.sharding.env import Env
from functitan.sharding.mesh import Pending
from functitan.sharding.rules import Dims
from functitan.transforms.microbatches import Sums, added, key_of, rows


class Part(NamedTuple):
    """What is known of a stage before any step."""

    apply: Callable[..., Any]
    paths: tuple[str, ...]
    axes: tuple[Axes, ...]
    trained: tuple[bool, ...]
    structure: Any


Place = tuple[str, int, int]  # "F" or "B", the stage that takes it, the microbatch


class Step(NamedTuple):
    """One step of one rank: what it is given, and what it has at the moment."""

    sums_of: Callable[..., Any]  # from what the last stage gives, and whether this is the last microbatch of all
    parts: list[Part]
    schedule: Schedule
    place: int
    params: dict[str, Tensor]
    batch: Any
    key: Tensor | None
    scale: Tensor | None
    split: set[tuple[int, int]]  # stages and microbatches whose backward has two halves
    first: int  # the number of this replica's first microbatch
    size: int
    places: list[int | None]  # of the batch axis in each leaf of the batch
    number: int  # of the microbatches of all replicas
    dims: Dims
    dtype: torch.dtype | None
    env: Env
    one: Env  # of one replica's own program
    edges: Edges
    copies: dict[int, list[Tensor]]  # by stage: its parameters, gathered
    totals: dict[int, list[Tensor | None]]  # by stage: the gradients of this replica, added up; none of frozen leaves
    reached: dict[int, set[int]]  # by stage: which of its trained leaves have a gradient
    grads: dict[int, list[Tensor | None]]  # by stage: those of all replicas
    passes: dict[tuple[int, int], Pass]
    here: dict[Place, list[Tensor]]  # made by a stage of this rank for another of it
    going: dict[Place, list[Tensor]]  # made here, to be sent
    coming: dict[Place, list[Pending]]
    leaving: list[Pending]
    sums: list[Sums]

    @property
    def last(self) -> int:
        return len(self.parts) - 1


def _unshard(step: Step, stage: int, _: int) -> None:
    part = step.parts[stage]
    step.copies[stage] = [
        spread(axes, step.params[path], step.dims) for path, axes in zip(part.paths, part.axes, strict=True)
    ]


def _reshard(step: Step, stage: int, _: int) -> None:
    step.copies.pop(stage, None)


def reduce_gradients(step: Step, stage: int, _: int) -> None:
    """Reduce the gradients of a stage, of all its microbatches, over the replicas."""
    sums, grads = step.totals.pop(stage), step.grads.setdefault(stage, [])
    with using(step.env._replace(phase="backward")):
        for axes in step.parts[stage].axes:
            total = sums.pop(0)  # a sum is freed when it is merged
            grads.append(None if total is None else merge(axes, total, step.dims))


def _forward(step: Step, stage: int, microbatch: int) -> None:
    part, (apply, *_, structure) = rows(step.batch, step.places, microbatch * step.size, step.size), step.parts[stage]
    key = key_of(step.key, step.first + microbatch)
    if stage not in step.copies:
        _unshard(step, stage, microbatch)
    weights, into = step.copies[stage], step.edges.into
    if stage not in step.totals:
        zeros = partial(torch.zeros_like, dtype=step.dtype, memory_format=torch.contiguous_format)
        step.totals[stage] = [
            zeros(x) if trained else None for x, trained in zip(weights, step.parts[stage].trained, strict=True)
        ]

    def run(weights: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], Any]:
        out = apply(tree.unflatten(structure, weights), into[stage].joined(inputs), part, key)
        if stage < step.last:
            return check_edge(out, into[stage + 1], stage), None
        total, counted = step.sums_of(out, is_last=step.first + microbatch == step.number - 1)
        return [total if step.scale is None else total * step.scale], counted

    inputs = _taken(step, ("F", stage, microbatch)) if stage else []
    split = (stage, microbatch) in step.split
    reached = step.reached.setdefault(stage, set())
    results, beside, its = forward(run, weights, step.totals[stage], inputs, step.one, split, reached)
    step.passes[stage, microbatch] = its
    if stage < step.last:
        _hand_on(step, ("F", stage + 1, microbatch), results)
    else:
        step.sums[:] = [added(step.sums[0] if step.sums else None, results[0], beside)]


def _input_half(step: Step, stage: int, microbatch: int) -> None:
    edges = step.edges.into
    if stage < step.last:
        given: dict[int, Tensor | None] = dict(
            zip(edges[stage + 1].floats(), _taken(step, ("B", stage, microbatch)), strict=True)
        )
        cotangents = [given.get(i) for i in range(len(edges[stage + 1].specs))]
    else:
        cotangents = [None]  # of a scalar, 1
    its = step.passes[stage, microbatch]
    found = backward(its, cotangents)
    step.passes[stage, microbatch] = its._replace(ends=(), inputs=())  # what the second half does not need
    if stage:
        into = edges[stage]
        made = [into.specs[i].zeros() if (g := found[i]) is None else g for i in into.floats()]
        _hand_on(step, ("B", stage - 1, microbatch), made)


def _weight_half(step: Step, stage: int, microbatch: int) -> None:
    weight_half(step.passes.pop((stage, microbatch)))


def _backward(step: Step, stage: int, microbatch: int) -> None:
    _input_half(step, stage, microbatch)
    del step.passes[stage, microbatch]


def _hand_on(step: Step, to: Place, tensors: list[Tensor]) -> None:
    near = step.schedule.stage_rank[to[1]] == step.place
    (step.here if near else step.going)[to] = tensors


def _taken(step: Step, at: Place) -> list[Tensor]:
    if at in step.coming:
        return [pending.wait() for pending in step.coming.pop(at)]
    return step.here.pop(at)


def _sender(kind: str, towards: int) -> Callable[[Step, int, int], None]:
    def send(step: Step, stage: int, microbatch: int) -> None:
        to = kind, stage + towards, microbatch
        step.leaving[:] = [pending for pending in step.leaving if not pending.done()]
        step.leaving.extend(post_all(step.going.pop(to), to, step.schedule.stage_rank[to[1]], step.env))

    return send


def _receiver(kind: str, towards: int) -> Callable[[Step, int, int], None]:
    def receive(step: Step, stage: int, microbatch: int) -> None:
        at, edges = (kind, stage, microbatch), step.edges.into
        specs = edges[stage].specs if kind == "F" else [edges[stage + 1].specs[i] for i in edges[stage + 1].floats()]
        step.coming[at] = receive_all(specs, at, step.schedule.stage_rank[stage - towards], step.env)

    return receive


RUN: dict[str, Callable[[Step, int, int], None]] = {
    "F": _forward, "B": _backward, "I": _input_half, "W": _weight_half,
    "SEND_F": _sender("F", 1), "RECV_F": _receiver("F", 1), "SEND_B": _sender("B", -1), "RECV_B": _receiver("B", -1),
    "UNSHARD": _unshard, "RESHARD": _reshard, "REDUCE_GRAD": reduce_gradients,
}  # fmt: skip
