"""`ft.pipeline.value_and_grad`: mean gradients of a model in stages, by any schedule.

Invariant: the result is that of `ft.accumulate` with as many microbatches, whatever the schedule and whoever runs which
stage. A rank does what its actions say, in their order, and nothing else until they are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan import tree
from functitan.axes import Axes, parse_axes
from functitan.errors import CaptureError, FunctitanError, MeshError, report
from functitan.ops.function import transforms_active
from functitan.ops.replica import merge, merge_scalars, one_replica, spread
from functitan.pipeline.edges import Edges, check_edge, described, edges_of, zero_sums
from functitan.pipeline.exchange import over_stages, post_all, receive_all, shared_sums
from functitan.pipeline.passes import Pass, backward, forward, weight_half
from functitan.pipeline.schedule import Schedule
from functitan.pipeline.stages import Stage, check_stages, declarations, holders_of
from functitan.sharding.context import Env, current, using, within
from functitan.sharding.mesh import Pending
from functitan.sharding.rules import Dims
from functitan.transforms.microbatches import Sums, added, key_of, microbatch_size, replica_dims, rows, sum_and_beside

WHERE = "ft.pipeline.value_and_grad"


def value_and_grad(
    stages: Sequence[Stage],
    schedule: Schedule,
    *,
    batch_axis: str = "batch",
    dtype: torch.dtype | None = None,
    gather: bool = True,
) -> Callable[..., tuple[tuple[Tensor, tuple[Tensor, Any]], tree.Tree]]:
    """`f(params, batch, key=None, *, scale=None, times=None) -> ((loss, (count, aux)), grads)`: what a rank computes.

    `params` are this rank's shards of what `ft.pipeline.declarations` declares for its place, and `grads` lie as they
    do. `batch` is this rank's shard too, whole along `pp`: tensors whose first axis is `batch_axis`, of one size that
    the number of microbatches divides. Loss, count and aux are those of the whole batch, equal on all ranks. The last
    stage must be a sum over examples; microbatches, keys, `dtype` and the loss are those of `ft.accumulate`; `scale`
    multiplies the loss. A list `times` gets (start, end) of each action, in seconds, for `schedule.plot(measured=)`.

    Inside `ft.spmd` on a mesh with `pp`, of as many ranks as the schedule's; the others of its dims shard every stage.
    With `gather`, a stage's parameters are gathered over the batch's mesh dims where the schedule says `UNSHARD`, and
    its gradients reduced there at `REDUCE_GRAD`: once in a step. Without, every op gathers and reduces for itself, in
    less memory. Raises `FunctitanError` and its kinds before anything is sent, `CollectiveError` where another rank
    fails.

    >>> import functitan as ft
    >>> def first(params, x, batch, key):
    ...     return ft.einsum("batch embed, embed mlp -> batch mlp", batch, params["w"])
    >>> last = Stage({}, lambda params, x, batch, key: (x.sum(), x.numel()))
    >>> stages = [Stage({"w": ft.Param("embed mlp", (2, 3))}, first), last]
    >>> schedule = ft.pipeline.schedule("gpipe", num_stages=2, num_microbatches=2, num_ranks=1)
    >>> f = value_and_grad(stages, schedule)
    >>> (mean, (count, aux)), grads = f({"w": torch.ones(2, 3)}, torch.arange(8.0).view(4, 2))
    >>> mean, count, grads["w"][:, 0]
    (tensor(7.), tensor(12.), tensor([1.0000, 1.3333]))
    """
    check_stages(stages, schedule)
    flat = [tree.flatten(stage.declarations) for stage in stages]
    parts = [
        _Part(
            stage.apply, tuple(tree.paths(stage.declarations)), tuple(parse_axes(leaf.pattern) for leaf in leaves), form
        )
        for stage, (leaves, form) in zip(stages, flat, strict=True)
    ]
    holders, known = holders_of(stages, schedule), {}  # edges, by the shapes of a microbatch and the mesh

    def gradients(
        params: tree.Tree,
        batch: Any,
        key: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        times: list[tuple[float, float]] | None = None,
    ) -> Any:
        env = current()
        place = _check(params, stages, schedule, env)
        dims = replica_dims(batch_axis, env, WHERE) if gather else ()
        one = one_replica(dims)
        size = microbatch_size(batch, schedule.num_microbatches, dims, env, WHERE)
        first = 0 if env.mesh is None else env.mesh.index(dims) * schedule.num_microbatches
        part = rows(batch, 0, size)
        kind = described(part), one.mesh and one.mesh.sizes, one.rules, one.precision
        edges = next((found for like, found in known.items() if like == kind), None)
        if edges is None:
            edges = known[kind] = edges_of(stages, part, key, one, WHERE)
        own = dict(zip(tree.paths(params), tree.leaves(params), strict=True))
        split = {(action.stage, action.microbatch) for action in schedule.actions[place] if action.kind == "I"}
        step = _Step(
            parts, schedule, place, own, batch, key, scale, split, first, size, dims, dtype, env, one, edges,
            {}, {}, {}, {}, {}, {}, {}, [], [],
        )  # fmt: skip
        with torch.no_grad():
            for action in schedule.actions[place]:
                start = time.monotonic()
                within(f"pipeline {action}", _RUN[action.kind], step, action.stage, action.microbatch)
                if times is not None:
                    times.append((start, time.monotonic()))
            total, count, aux = _sums(step)
            grads = _gradients(step, holders, count)
            for pending in step.leaving:
                pending.wait()
        return (total / count, (count, aux)), tree.unflatten(tree.flatten(params)[1], grads)

    return gradients


class _Part(NamedTuple):
    """What is known of a stage before any step."""

    apply: Callable[..., Any]
    paths: tuple[str, ...]
    axes: tuple[Axes, ...]
    structure: Any


Place = tuple[str, int, int]  # "F" or "B", the stage that takes it, the microbatch


class _Step(NamedTuple):
    """One step of one rank: what it is given, and what it has at the moment."""

    parts: list[_Part]
    schedule: Schedule
    place: int
    params: dict[str, Tensor]
    batch: Any
    key: Tensor | None
    scale: Tensor | None
    split: set[tuple[int, int]]  # stages and microbatches whose backward has two halves
    first: int  # the number of this replica's first microbatch
    size: int
    dims: Dims
    dtype: torch.dtype | None
    env: Env
    one: Env  # of one replica's own program
    edges: Edges
    copies: dict[int, list[Tensor]]  # by stage: its parameters, gathered
    totals: dict[int, list[Tensor]]  # by stage: the gradients of this replica, added up
    grads: dict[int, list[Tensor]]  # by stage: those of all replicas
    passes: dict[tuple[int, int], Pass]
    here: dict[Place, list[Tensor]]  # made by a stage of this rank for another of it
    going: dict[Place, list[Tensor]]  # made here, to be sent
    coming: dict[Place, list[Pending]]
    leaving: list[Pending]
    sums: list[Sums]

    @property
    def last(self) -> int:
        return len(self.parts) - 1


def _unshard(step: _Step, stage: int, _: int) -> None:
    part = step.parts[stage]
    step.copies[stage] = [
        spread(axes, step.params[path], step.dims) for path, axes in zip(part.paths, part.axes, strict=True)
    ]


def _reshard(step: _Step, stage: int, _: int) -> None:
    step.copies.pop(stage, None)


def _reduce(step: _Step, stage: int, _: int) -> None:
    sums, grads = step.totals.pop(stage), step.grads.setdefault(stage, [])
    with using(step.env._replace(phase="backward")):
        for axes in step.parts[stage].axes:
            grads.append(merge(axes, sums.pop(0), step.dims))  # a sum is freed when it is merged


def _forward(step: _Step, stage: int, microbatch: int) -> None:
    part, (apply, _, _, structure) = rows(step.batch, microbatch * step.size, step.size), step.parts[stage]
    key = key_of(step.key, step.first + microbatch)
    if stage not in step.copies:
        _unshard(step, stage, microbatch)
    weights, into = step.copies[stage], step.edges.into
    if stage not in step.totals:
        like = dict(dtype=step.dtype, memory_format=torch.contiguous_format)
        step.totals[stage] = [torch.zeros_like(x, **like) for x in weights]

    def run(weights: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], Any]:
        out = apply(tree.unflatten(structure, weights), into[stage].joined(inputs), part, key)
        if stage < step.last:
            return check_edge(out, into[stage + 1], stage), None
        total, counted = sum_and_beside(out, WHERE)
        return [total if step.scale is None else total * step.scale], counted

    inputs = _taken(step, ("F", stage, microbatch)) if stage else []
    split = (stage, microbatch) in step.split
    results, beside, its = forward(run, weights, step.totals[stage], inputs, step.one, split)
    step.passes[stage, microbatch] = its
    if stage < step.last:
        _hand_on(step, ("F", stage + 1, microbatch), results)
    else:
        step.sums[:] = [added(step.sums[0] if step.sums else None, results[0], beside)]


def _input_half(step: _Step, stage: int, microbatch: int) -> None:
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


def _weight_half(step: _Step, stage: int, microbatch: int) -> None:
    weight_half(step.passes.pop((stage, microbatch)))


def _backward(step: _Step, stage: int, microbatch: int) -> None:
    _input_half(step, stage, microbatch)
    del step.passes[stage, microbatch]


def _hand_on(step: _Step, to: Place, tensors: list[Tensor]) -> None:
    near = step.schedule.stage_rank[to[1]] == step.place
    (step.here if near else step.going)[to] = tensors


def _taken(step: _Step, at: Place) -> list[Tensor]:
    if at in step.coming:
        return [pending.wait() for pending in step.coming.pop(at)]
    return step.here.pop(at)


def _sender(kind: str, towards: int) -> Callable[[_Step, int, int], None]:
    def send(step: _Step, stage: int, microbatch: int) -> None:
        to = kind, stage + towards, microbatch
        step.leaving[:] = [pending for pending in step.leaving if not pending.done()]
        step.leaving.extend(post_all(step.going.pop(to), to, step.schedule.stage_rank[to[1]], step.env))

    return send


def _receiver(kind: str, towards: int) -> Callable[[_Step, int, int], None]:
    def receive(step: _Step, stage: int, microbatch: int) -> None:
        at, edges = (kind, stage, microbatch), step.edges.into
        specs = edges[stage].specs if kind == "F" else [edges[stage + 1].specs[i] for i in edges[stage + 1].floats()]
        step.coming[at] = receive_all(specs, at, step.schedule.stage_rank[stage - towards], step.env)

    return receive


_RUN: dict[str, Callable[[_Step, int, int], None]] = {
    "F": _forward, "B": _backward, "I": _input_half, "W": _weight_half,
    "SEND_F": _sender("F", 1), "RECV_F": _receiver("F", 1), "SEND_B": _sender("B", -1), "RECV_B": _receiver("B", -1),
    "UNSHARD": _unshard, "RESHARD": _reshard, "REDUCE_GRAD": _reduce,
}  # fmt: skip


def _sums(step: _Step) -> Sums:
    """The loss, the count and aux of all microbatches of all replicas, on every rank of every stage."""
    leaves, structure = tree.flatten(step.sums[0] if step.sums else zero_sums(step.edges))
    if step.sums:
        leaves = merge_scalars(leaves, step.dims)
    total, count, aux = tree.unflatten(structure, over_stages(leaves, step.env))
    return total, count.clamp(min=1), aux


def _gradients(step: _Step, holders: dict[str, tuple[int, ...]], count: Tensor) -> list[Tensor]:
    """The mean gradients of this rank's parameters; those that several stages share are added up."""
    found: dict[str, Tensor] = {}
    for stage in step.schedule.stages(step.place):
        if stage in step.totals:
            _reduce(step, stage, 0)
        for path, g in zip(step.parts[stage].paths, step.grads.pop(stage), strict=True):
            found[path] = found[path] + g if path in found else g
    shared_sums(found, holders, step.env)
    return [found.pop(path).div_(count).to(x.dtype) for path, x in step.params.items()]


def _check(params: tree.Tree, stages: Sequence[Stage], schedule: Schedule, env: Env) -> int:
    """This rank's place along `pp`. Raises unless the parameters are its own, and nothing differentiates the step."""
    mesh, leaves = env.pipeline, tree.leaves(params)
    ranks = 1 if mesh is None else mesh.sizes.size("pp")
    if ranks != schedule.num_ranks:
        problem = f"the schedule is for {schedule.num_ranks} ranks, the mesh has pp={ranks}"
        fix = f"make the mesh by ft.make_mesh(pp={schedule.num_ranks}, ...), and call inside ft.spmd(fn, mesh=, rules=)"
        raise MeshError(report(WHERE, [problem], fix))
    if env.capture is not None:
        fix = "capture the stages instead: Stage(declarations, ft.compile(apply))"
        raise CaptureError(report(WHERE, ["one graph cannot hold a pipeline: each rank runs its own program"], fix))
    outside = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
    if transforms_active() or env.differentiated or outside:
        raise FunctitanError(report(WHERE, ["it is differentiated, or inside a transform"], "call it outermost"))
    place = 0 if mesh is None else mesh.place
    declared = declarations(stages, schedule, place)
    if problems := tree.mismatches(declared, params, f"the declarations of place {place}", "params"):
        fix = "make them by ft.init(ft.pipeline.declarations(stages, schedule, place), key, mesh=, rules=)"
        raise FunctitanError(report(WHERE, problems, fix))
    return place
