"""`ft.pipeline.value_and_grad`: mean gradients of a model in stages, by any schedule.

Invariant: the result is that of `ft.accumulate` with as many microbatches, whatever the schedule and whoever runs which
stage. A rank does what its actions say, in their order, and nothing else until they are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functitan import tree
from functitan.axes import parse_axes
from functitan.errors import CaptureError, FunctitanError, MeshError, report
from functitan.ops.function import transforms_active
from functitan.ops.replica import merge_sums, one_replica
from functitan.pipeline.edges import Edges, described, edges_of, zero_sums
from functitan.pipeline.exchange import over_stages, shared_sums
from functitan.pipeline.schedule import Schedule
from functitan.pipeline.stages import Stage, check_stages, declarations, holders_of
from functitan.pipeline.step import RUN, Part, Step, reduce_gradients
from functitan.sharding.context import current, within
from functitan.sharding.env import Env
from functitan.transforms.beside import check_ways, merged
from functitan.transforms.closures import refuse_shards_of
from functitan.transforms.loss import divisor, is_on_mesh
from functitan.transforms.microbatches import (
    Sums,
    batch_places,
    gathered,
    microbatch_size,
    replica_dims,
    rows,
    sum_and_beside,
)

WHERE = "ft.pipeline.value_and_grad"


def value_and_grad(
    stages: Sequence[Stage],
    schedule: Schedule,
    *,
    batch_axis: str = "batch",
    dtype: torch.dtype | None = None,
    gather: bool = True,
    aux: tree.Tree = None,
    batch_patterns: tree.Tree = None,
) -> Callable[..., tuple[tuple[Tensor, tuple[Tensor, Any]], tree.Tree]]:
    """`f(params, batch, key=None, *, scale=None, times=None) -> ((loss, (count, aux)), grads)`: what a rank computes.

    `params` are this rank's shards of what `ft.pipeline.declarations` declares for its place, and `grads` lie as they
    do. `batch` is this rank's shard too, whole along `pp`: tensors whose first axis is `batch_axis`, of one size that
    the number of microbatches divides. Loss, count and aux are those of the whole batch, equal on all ranks. The last
    stage must be a sum over examples; microbatches, keys, `dtype`, `aux`, `batch_patterns` and the loss are those of
    `ft.accumulate`; `scale` multiplies the loss. A leaf that its declaration freezes (`ft.trainable(stages, ...)`) has
    the gradient `None`; with `zeros=False`, as in `ft.train_step`, so has one that the loss does not reach, unless
    ranks share it. A list `times` gets (start, end) of each action, in seconds, for `schedule.plot(measured=)`.

    Inside `ft.spmd` on a mesh with `pp`, of as many ranks as the schedule's; the others of its dims shard every stage.
    With `gather`, a stage's parameters are gathered over the batch's mesh dims where the schedule says `UNSHARD`, and
    its gradients reduced there at `REDUCE_GRAD`: once in a step. Without, every op gathers and reduces for itself, in
    less memory. Raises `FunctitanError` and its kinds before anything is sent, of a schedule what its `check` finds;
    `CollectiveError` where another rank fails.

    >>> import functitan as ft
    >>> def first(params, x, batch, key):
    ...     return ft.einsum("batch embed, embed mlp -> batch mlp", batch, params["w"])
    >>> last = Stage({}, lambda params, x, batch, key: (x.sum(), ft.count("batch mlp", x)))
    >>> stages = [Stage({"w": ft.Param("embed mlp", (2, 3))}, first), last]
    >>> schedule = ft.pipeline.schedule("gpipe", num_stages=2, num_microbatches=2, num_ranks=1)
    >>> f = value_and_grad(stages, schedule)
    >>> (mean, (count, aux)), grads = f({"w": torch.ones(2, 3)}, torch.arange(8.0).view(4, 2))
    >>> mean, count, grads["w"][:, 0]
    (tensor(7.), tensor(12.), tensor([1.0000, 1.3333]))
    """
    check_ways(aux, WHERE)
    schedule.check(buffers=None)
    check_stages(stages, schedule)
    flat = [tree.flatten(stage.declarations) for stage in stages]
    parts = [
        Part(
            stage.apply,
            tuple(tree.paths(stage.declarations)),
            tuple(parse_axes(leaf.pattern) for leaf in leaves),
            tuple(leaf.trainable for leaf in leaves),
            form,
        )
        for stage, (leaves, form) in zip(stages, flat, strict=True)
    ]
    holders = holders_of(stages, schedule)
    known: list[tuple[Any, Edges]] = []  # edges, by the shapes of a microbatch and the surroundings

    def gradients(
        params: tree.Tree,
        batch: Any,
        key: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        times: list[tuple[float, float]] | None = None,
        zeros: bool = True,
    ) -> Any:
        env = current()
        place = _check(params, stages, schedule, env)
        dims = replica_dims(batch_axis, env, WHERE) if gather else ()
        one = one_replica(dims)
        places = batch_places(batch, batch_patterns, batch_axis, WHERE)
        size = microbatch_size(batch, places, schedule.num_microbatches, dims, env, WHERE)
        batch = gathered(batch, batch_patterns, places, dims, WHERE)
        first, number = 0, schedule.num_microbatches
        if env.mesh is not None:
            first, number = env.mesh.index(dims) * number, env.mesh.sizes.size(dims) * number
        part = rows(batch, places, 0, size)
        sums_of = partial(sum_and_beside, where=WHERE, ways=aux, on_mesh=is_on_mesh(env))
        kind = described(part), one.mesh and one.mesh.sizes, one.rules, one.precision
        edges = next((found for like, found in known if like == kind), None)
        if edges is None:
            for stage in stages:
                refuse_shards_of(stage.apply, dims, WHERE)
            edges = edges_of(stages, part, key, one, sums_of)
            known.append((kind, edges))
        own = dict(zip(tree.paths(params), tree.leaves(params), strict=True))
        split = {(action.stage, action.microbatch) for action in schedule.actions[place] if action.kind == "I"}
        step = Step(
            sums_of, parts, schedule, place, own, batch, key, scale, split, first, size, places, number, dims, dtype,
            env, one, edges,
            {}, {}, {}, {}, {}, {}, {}, {}, [], [],
        )  # fmt: skip
        with torch.no_grad():
            for action in schedule.actions[place]:
                start = time.monotonic()
                within(f"pipeline {action}", RUN[action.kind], step, action.stage, action.microbatch)
                if times is not None:
                    times.append((start, time.monotonic()))
            total, count, beside = _sums(step)
            by = divisor(count)
            grads = _gradients(step, holders, by, zeros)
            for pending in step.leaving:
                pending.wait()
        return (total / by, (count, merged(beside, aux, WHERE, number))), tree.unflatten(tree.flatten(params)[1], grads)

    return gradients


def _sums(step: Step) -> Sums:
    """The loss, the count and aux of all microbatches of all replicas, on every rank of every stage."""
    leaves, structure = tree.flatten(step.sums[0] if step.sums else zero_sums(step.edges))
    if step.sums:
        leaves = merge_sums(leaves, step.dims)
    return tree.unflatten(structure, over_stages(leaves, step.env))


def _gradients(step: Step, holders: dict[str, tuple[int, ...]], by: Tensor, zeros: bool) -> list[Tensor | None]:
    """The mean gradients of this rank's parameters; those that several stages share are added up."""
    found: dict[str, Tensor] = {}
    reached: set[str] = set()
    for stage in step.schedule.stages(step.place):
        if stage in step.totals:
            reduce_gradients(step, stage, 0)
        part = step.parts[stage]
        mine = [path for path, trained in zip(part.paths, part.trained, strict=True) if trained]
        reached.update(mine[n] for n in step.reached.get(stage, ()))
        for path, g in zip(part.paths, step.grads.pop(stage), strict=True):
            if g is not None:
                found[path] = found[path] + g if path in found else g
    shared_sums(found, holders, step.env)
    given = (path for path in found if zeros or path in reached or len(holders[path]) > 1)  # others may reach it
    means = {path: found[path].div_(by).to(step.params[path].dtype) for path in given}
    return [means.get(path) for path in step.params]


def _check(params: tree.Tree, stages: Sequence[Stage], schedule: Schedule, env: Env) -> int:
    """This rank's place along `pp`. Raises unless the parameters are its own, and nothing differentiates the step."""
    mesh, leaves = env.pipeline, tree.leaves(params)
    ranks = 1 if mesh is None else mesh.sizes.size("pp")
    if ranks != schedule.num_ranks:
        problem = f"the schedule is for {schedule.num_ranks} ranks, the mesh has pp={ranks}"
        fix = f"make the mesh by ft.make_mesh(pp={schedule.num_ranks}, ...), and call inside ft.spmd(fn, mesh=, rules=)"
        raise MeshError(report(WHERE, [problem], fix))
    if env.is_captured:
        fix = "capture the stages instead: Stage(declarations, ft.compile(apply))"
        raise CaptureError(report(WHERE, ["one graph cannot hold a pipeline: each rank runs its own program"], fix))
    if mesh is not None and not mesh.transport.has_values:
        fix = (
            "explain a stage, as a function of its parameters, its input and its batch; schedule.timeline has the order"
        )
        raise MeshError(
            report(WHERE, ["ft.explain runs one rank, and a pipeline's ranks run programs of their own"], fix)
        )
    outside = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
    if transforms_active() or env.differentiated or outside:
        raise FunctitanError(report(WHERE, ["it is differentiated, or inside a transform"], "call it outermost"))
    place = 0 if mesh is None else mesh.place
    declared = declarations(stages, schedule, place)
    if problems := tree.mismatches(declared, params, f"the declarations of place {place}", "params"):
        fix = "make them by ft.init(ft.pipeline.declarations(stages, schedule, place), key, mesh=, rules=)"
        raise FunctitanError(report(WHERE, problems, fix))
    return place
