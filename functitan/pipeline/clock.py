"""The simulated clock of a pipeline: when each action of each rank starts and ends.

Invariant: times follow from the orders and the costs alone. A rank does its actions in order; a posted receive never holds
it up, and a send only where the channel to that rank is full.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from functitan.pipeline.actions import (
    RECEIVES,
    SENDS,
    Action,
    Orders,
    StageRank,
    before,
    done_by,
    is_compute,
    peer,
)

Times = tuple[tuple[float, float], ...]  # (start, end) of each action of a rank


class Run(NamedTuple):
    """The times of what ran, and for each rank that could not go on what its next action waits for."""

    times: tuple[Times, ...]
    stuck: dict[int, tuple[Action, list[Action]]]


def run(
    orders: Orders,
    stage_rank: StageRank,
    cost: Callable[[Action], float],
    latency: float = 0,
    buffers: int | None = None,
) -> Run:
    """Let each rank do its actions in order, with `cost` the time of a compute action and `latency` that of a message.

    A receive starts where it is posted and ends when its message is there. `buffers` is how many messages from one rank to
    another may be under way without a posted receive (None: any number); a send beyond that waits.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in orders]
    clock = [0.0] * len(orders)
    done: dict[Action, float] = {}
    sent: dict[tuple[int, int], int] = defaultdict(int)
    posted: dict[tuple[int, int], list[float]] = defaultdict(list)
    receives: list[tuple[int, int, Action]] = []
    stuck: dict[int, tuple[Action, list[Action]]] = {}
    moving = True
    while moving:
        moving, stuck = False, {}
        for rank, order in enumerate(orders):
            while len(times[rank]) < len(order):
                action, start = order[len(times[rank])], clock[rank]
                if action.kind in RECEIVES:
                    receives.append((rank, len(times[rank]), action))
                    posted[stage_rank[peer(action).stage], rank].append(start)
                    end = start
                else:
                    needed = [_arrived(need) for need in before(action, stage_rank)]
                    if missing := [need for need in needed if need not in done]:
                        stuck[rank] = action, missing
                        break
                    start = max([start, *(done[need] + latency * (need.kind in SENDS) for need in needed)])
                    end = start + (cost(action) if is_compute(action) else 0)
                if action.kind in SENDS:
                    channel = rank, stage_rank[peer(action).stage]
                    free = sent[channel] + 1 - buffers if buffers is not None else 0  # receives that must be posted
                    if free > len(posted[channel]):
                        stuck[rank] = action, [peer(action)]
                        break
                    start = end = max(start, posted[channel][free - 1] if free > 0 else 0)
                    sent[channel] += 1
                times[rank].append((start, end))
                clock[rank] = end
                done |= dict.fromkeys(done_by(action), end)
                moving = True
    for rank, i, action in receives:
        start, end = times[rank][i]
        times[rank][i] = start, max(end, done.get(peer(action), end) + latency)
    return Run(tuple(map(tuple, times)), stuck)


def _arrived(need: Action) -> Action:
    """A message is there when it was sent."""
    return peer(need) if need.kind in RECEIVES else need
