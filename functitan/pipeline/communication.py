"""Where a rank communicates: sends, receives, gathers and reductions put between its compute actions.

Invariant: the compute actions keep their order, and what is placed needs no buffer between two ranks: whenever a rank
sends, the other has posted its receive, or posts it without waiting for this rank.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from functitan.pipeline.actions import (
    ALL,
    BACKWARD,
    RECEIVES,
    SENDS,
    WEIGHT,
    Action,
    Order,
    Orders,
    StageRank,
    before,
    is_compute,
    peer,
    send_after,
)
from functitan.pipeline.clock import costs, run


def place(orders: Orders, stage_rank: StageRank, max_unsharded: int | None = None) -> Orders:
    """Compute orders with all communication.

    A send stands right after the compute that makes it. A receive is posted before the action in whose time, at unit
    costs, its message is sent, and at least one action before the one that takes it: a message travels while its rank
    computes. Receives from one rank stand in the order of its sends. A stage's parameters are gathered before its first
    use and freed after its last, `max_unsharded` stages at a time (None: all); its gradients are reduced when whole.
    """
    plain = tuple(with_messages(order, stage_rank) for order in orders)
    times = run(plain, stage_rank, costs(1, 1, 1, len(stage_rank))).times
    moments = {action: time for row in zip(plain, times, strict=True) for action, time in zip(*row, strict=True)}
    return tuple(with_gathers(_posted_early(order, moments, stage_rank), max_unsharded) for order in orders)


def with_messages(order: Order, stage_rank: StageRank) -> Order:
    """A compute order with each receive right before the action that takes it, each send right after what makes it."""
    found: list[Action] = []
    for action in order:
        found += [need for need in before(action, stage_rank) if need.kind in RECEIVES]
        found += filter(None, [action, send_after(action, stage_rank)])
    return tuple(found)


def with_gathers(order: Order, max_unsharded: int | None) -> Order:
    """A rank's order with UNSHARD before what it computes, and RESHARD and REDUCE_GRAD after it and its send."""
    gathers = iter(_gathers([action for action in order if is_compute(action)], max_unsharded))
    found: list[Action] = []
    after: list[Action] = []
    for action in order:
        if action.kind not in SENDS:
            found, after = found + after, []
        if is_compute(action):
            gather = next(gathers)
            found += gather.before
            after = gather.after
        found.append(action)
    return tuple(found + after)


def _posted_early(order: Order, moments: dict[Action, tuple[float, float]], stage_rank: StageRank) -> Order:
    receives = _receives(order, moments, stage_rank)
    found: list[Action] = []
    for i, action in enumerate(order):
        found += [receive for place, receive in receives if place == i]
        found += filter(None, [action, send_after(action, stage_rank)])
    return tuple(found)


def _receives(
    order: Order, moments: dict[Action, tuple[float, float]], stage_rank: StageRank
) -> list[tuple[int, Action]]:
    """The receives of one rank in the order of their messages, each with the index of the action to stand before."""
    takes = [(i, need) for i, action in enumerate(order) for need in before(action, stage_rank)]
    ends = [moments[action][1] for action in order]
    receives: list[tuple[float, int, Action]] = []  # the moment of its message, its place, the receive
    for i, need in takes:
        if need.kind in RECEIVES:
            sent = moments[peer(need)][0]
            place = bisect_left(ends, sent, hi=i)
            receives.append((sent, max(0, min(place, i - 1)), need))
    latest: dict[int, int] = {}  # from the last message to the first: none is overtaken by another of the same rank
    found = []
    for _, place, need in sorted(receives, reverse=True):
        source = stage_rank[peer(need).stage]
        latest[source] = min(place, latest[source]) if source in latest else place
        found.append((latest[source], need))
    return found[::-1]


class _Gathers(NamedTuple):
    before: list[Action]
    after: list[Action]


def _gathers(order: Sequence[Action], max_unsharded: int | None) -> list[_Gathers]:
    """UNSHARD, RESHARD and REDUCE_GRAD beside each compute action of one rank."""
    last = {action.stage: i for i, action in enumerate(order)}
    weights = {action.stage: i for i, action in enumerate(order) if action.kind in (BACKWARD, WEIGHT)}
    held: list[int] = []  # the stage used last stands last, and is freed last
    found = [_Gathers([], []) for _ in order]
    for i, action in enumerate(order):
        if action.stage in held:
            held.remove(action.stage)
        else:
            while max_unsharded is not None and len(held) >= max_unsharded:
                found[i].before.append(Action("RESHARD", held.pop(0), ALL))
            found[i].before.append(Action("UNSHARD", action.stage, ALL))
        held.append(action.stage)
        if i == last[action.stage]:
            found[i].after.append(Action("RESHARD", held.pop(), ALL))
        if i == weights.get(action.stage):
            found[i].after.append(Action("REDUCE_GRAD", action.stage, ALL))
    return found
