"""Products that run beside the transfer of what they need or make: rings that compute with one chunk while one travels.

Invariant: the same products of the same numbers. Sums over a gathered axis, and those of a reduce-scatter, are taken
chunk by chunk in the order of the ring; all else is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from functitan.ops.arithmetic import Arithmetic, Value
from functitan.ops.schedule import Part, Running, Sum, Work, plain_sum
from functitan.overlap.fused import fused_gather, fused_scatter
from functitan.overlap.ring import Ring
from functitan.overlap.rings import Pipelining, local_size, rings
from functitan.sharding.contraction import Contraction
from functitan.sharding.env import Env
from functitan.sharding.lowering import Lowering
from functitan.sharding.message import Label, span_name
from functitan.sharding.moves import Step
from functitan.sharding.plan import Plan, Product
from functitan.sharding.precision import cast
from functitan.sharding.steps import summed_in


def lowering(asked: Pipelining) -> Lowering:
    """The lowering of a function inside `ft.async_tp`."""
    return Lowering(asked, rewrite=rewritten)


def rewritten(
    asked: Pipelining, full: Contraction, plan: Plan, env: Env, label: Label
) -> Callable[[Running, int, int], Sum] | None:
    """The sums of a plan in which rings run beside products; `None` where it has no ring.

    A step that stays as it is becomes a note of the ledger.
    """
    if plan.is_local:
        return None
    found = rings(full, plan, asked.dims)
    for step, why in found.left:
        where = span_name(*label, env.phase, env.recomputed)
        env.note(f"async_tp: {step.kind} over {', '.join(step.dims)} of {where} is not pipelined: {why}")
    if not (found.gathers or found.scatters):
        return None
    return partial(_summed, _Rings(dict(found.gathers), set(found.scatters), asked.pieces, {}))


class _Rings(NamedTuple):
    """The rings of one run of a plan, and the products that those have given already."""

    gathers: dict[int, int]
    scatters: set[tuple[int, int]]
    pieces: int
    streamed: dict[Part, Tensor]


def _summed(found: _Rings, running: Running, result: int, group: int) -> Sum:
    """The sum of a group's products, as `schedule.plain_sum` gives it, beside rings where the plan has some."""
    if (result, group) not in found.scatters:
        return plain_sum(running, result, group, partial(_product, found))
    steps = running.plan.results[result][group].steps
    y, own = _scattered(found, running, result, steps[0], running.parts[result][group])
    return y, own, steps[1:]


def _product(found: _Rings, running: Running, part: Part) -> Tensor:
    streams = next((key for key in part.keys if key[0] in found.gathers), None)
    if streams is None:
        return running.product(part)
    if part not in found.streamed:
        place, steps = running.plan.moved[streams[0]]
        at = found.gathers[streams[0]]
        step, others = steps[at], steps[:at] + steps[at + 1 :]
        together = [other for other in running.every if streams in other.keys]
        works = [(other.keys.index(streams), running.work(other, streams)) for other in together]
        assert step.source is not None
        axis = step.source.axis
        size = local_size(running.tensors[place].shape[axis], axis, others)
        name = running.full.operands[place].axes[axis]
        ring = Ring(name, step.dims, size, found.pieces, running.env, running.label)
        values = after_gather(ring, running.moved(streams, others), works, running.how)
        found.streamed.update(zip(together, values, strict=True))
    return found.streamed[part]


def _scattered(
    found: _Rings, running: Running, result: int, step: Step, parts: list[Part]
) -> tuple[Tensor, torch.dtype]:
    assert step.target is not None and running.env.mesh is not None
    axis = running.full.results[result].axes[step.target.axis]
    size = _size(running, parts[0].item, axis) // running.env.mesh.sizes.size(step.dims)
    ring = Ring(axis, step.dims, size, found.pieces, running.env, running.label)
    return before_scatter(ring, [running.work(part) for part in parts], running.how)


def _size(running: Running, item: Product, axis: str) -> int:
    """The local size of an axis in a product."""
    moved = (running.plan.moved[i] for i in item.moved)
    places = ((place, steps, running.full.operands[place].axes) for place, steps in moved)
    return next(
        local_size(running.tensors[place].shape[axes.index(axis)], axes.index(axis), steps)
        for place, steps, axes in places
        if axis in axes
    )


def after_gather(ring: Ring, x: Value, works: list[tuple[int, Work]], how: Arithmetic) -> list[Tensor]:
    """The products of `x`, gathered: the value at a place of each work. Each rank begins with the part that it has.

    It passes on what it has while it computes with it, so that after n - 1 messages all have met every part. Sums over
    the gathered axis are taken in float32 or better.
    """
    if (fused := fused_gather(ring, x, works, how)) is not None:
        return fused
    (n, me), pieces = ring.place, ring.pieces
    first, other = works[0]
    at = other.axes[first].index(ring.axis)
    here: list[Callable[[], Value]] = [partial(how.narrow, x, at, *piece) for piece in pieces]
    parts: list[dict[int, Tensor]] = [{} for _ in works]  # by where they begin
    sums: dict[int, Tensor] = {}
    dtypes: dict[int, torch.dtype] = {}
    for hop in range(n):
        begin = (me - hop) % n * ring.size
        for p, (offset, length) in enumerate(pieces):
            value = here[p]()
            if hop < n - 1:
                here[p] = how.travel(value, at, ring.pass_on)
            value, piece = how.arrive(value), (begin + offset, length)
            for w, (place, work) in enumerate(works):
                y = work.part(how, ring.axis, piece, {place: value})
                dtypes[w] = y.dtype
                if ring.axis in work.result:
                    parts[w][piece[0]] = y
                else:
                    sums[w] = sums[w] + y if w in sums else cast(y, torch.promote_types(y.dtype, torch.float32))
    return [
        sums[w].to(dtypes[w]) if w in sums else _joined(parts[w], work.result.index(ring.axis))
        for w, (_, work) in enumerate(works)
    ]


def before_scatter(ring: Ring, works: list[Work], how: Arithmetic) -> tuple[Tensor, torch.dtype]:
    """This rank's part of the sum of the works over the group, and the dtype that the works had.

    Each rank begins with the part of the rank before it, and adds its own to what arrives: the part of a rank is summed
    from the next rank on, around the ring, and last there.
    """
    if (fused := fused_scatter(ring, works)) is not None:
        return fused, fused.dtype
    (n, me), pieces = ring.place, ring.pieces
    under_way: list[Callable[[], Tensor]] = []
    done: dict[int, Tensor] = {}
    for hop in range(n):
        begin = (me - 1 - hop) % n * ring.size
        for offset, length in pieces:
            first, *others = (work.part(how, ring.axis, (begin + offset, length)) for work in works)
            y = sum(others, first)
            own = y.dtype
            y = y.to(summed_in(own, ring.dims, ring.env))
            if hop > 0:
                y = under_way.pop(0)() + y
            if hop < n - 1:
                under_way.append(ring.pass_on(y))
            else:
                done[offset] = y
    return _joined(done, works[0].result.index(ring.axis)), own


def _joined(parts: dict[int, Tensor], axis: int) -> Tensor:
    """Parts of an axis, by where they begin, as one tensor."""
    ordered = [parts[begin] for begin in sorted(parts)]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered, axis)
