"""Products that run beside the transfer of what they need or make: rings that compute with one chunk while one travels.

Invariant: the same products of the same numbers. Sums over a gathered axis, and those of a reduce-scatter, are taken
chunk by chunk in the order of the ring; all else is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from functitan.ops.arithmetic import Arithmetic, Value
from functitan.ops.fused import fused_gather, fused_scatter
from functitan.ops.ring import Ring, Work
from functitan.sharding.context import Env
from functitan.sharding.contraction import Contraction
from functitan.sharding.message import Label, span_name
from functitan.sharding.plan import Plan
from functitan.sharding.precision import cast
from functitan.sharding.rings import NONE, Rings, rings
from functitan.sharding.steps import summed_in


def rings_here(full: Contraction, plan: Plan, env: Env, label: Label) -> Rings:
    """The rings of a plan, as these surroundings ask. A step that stays as it is becomes a note of the ledger."""
    if env.pipelined is None or plan.is_local:
        return NONE
    found = rings(full, plan, env.pipelined.dims)
    for step, why in found.left:
        where = span_name(*label, env.phase, env.recomputed)
        env.note(f"async_tp: {step.kind} over {', '.join(step.dims)} of {where} is not pipelined: {why}")
    return found


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
