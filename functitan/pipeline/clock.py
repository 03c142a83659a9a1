"""The simulated clock of a pipeline: when each action of each rank starts and ends, and what follows from that.

Invariant: times follow from orders and costs alone. A rank does its actions in order; a posted receive never holds it
up, and a send does so only where the channel to the other rank is full.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from functitan.errors import ScheduleError, report
from functitan.pipeline.actions import (
    BACKWARD,
    FORWARD,
    INPUT,
    RECEIVES,
    SENDS,
    WEIGHT,
    Action,
    Order,
    Orders,
    StageRank,
    before,
    done_by,
    is_compute,
    peer,
)

Cost = float | Sequence[float]  # of every stage, or of each
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

    A receive starts where it is posted and ends when its message is there. `buffers` is how many messages from one
    rank to another may be under way without a posted receive (None: any number); a send beyond that waits.
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


def costs(forward: Cost, input: Cost, weight: Cost, num_stages: int) -> Callable[[Action], float]:
    """The time of a compute action, from those of F, I and W: one number, or one for each stage. B is I and W."""
    table = {}
    problems = []
    for name, kind, cost in (("forward", FORWARD, forward), ("input", INPUT, input), ("weight", WEIGHT, weight)):
        table[kind] = [cost] * num_stages if isinstance(cost, int | float) else list(cost)
        if len(table[kind]) != num_stages:
            problems.append(f"{name} has {len(table[kind])} costs for {num_stages} stages")
        problems += [f"{name} of stage {s} is {c}" for s, c in enumerate(table[kind]) if not 0 <= c < math.inf]
    if problems:
        raise ScheduleError(report("costs of a schedule", problems, "give one time, or one for each stage"))
    table[BACKWARD] = [i + w for i, w in zip(table[INPUT], table[WEIGHT], strict=True)]
    return lambda action: table[action.kind][action.stage]


def compute_spans(orders: Sequence[Order], times: Sequence[Times]) -> Iterator[tuple[int, Action, float, float]]:
    """(rank, action, start, end) of each compute action, rank by rank."""
    for rank, (order, row) in enumerate(zip(orders, times, strict=True)):
        for action, (start, end) in zip(order, row, strict=True):
            if is_compute(action):
                yield rank, action, start, end


def makespan(orders: Orders, times: Sequence[Times]) -> tuple[float, float]:
    """When the first compute action starts, and the time from there to the end of the last."""
    spans = list(compute_spans(orders, times))
    first = min((start for *_, start, _ in spans), default=0.0)
    return first, max((end for *_, end in spans), default=first) - first


def bubble(orders: Orders, times: Sequence[Times]) -> float:
    """The share of the ranks' time in which they do not compute, from the first start to the last end."""
    total = makespan(orders, times)[1] * len(orders)
    busy = sum(end - start for *_, start, end in compute_spans(orders, times))
    return (total - busy) / total if total else 0.0


def peak(order: Order, kept: float = 1) -> float:
    """The most activations that a rank holds at once: from F to B, or to W; of those, the share `kept` from I on."""
    step = {FORWARD: 1, BACKWARD: -1, INPUT: kept - 1, WEIGHT: -kept}
    return max(accumulate((step.get(action.kind, 0) for action in order), initial=0))


def _arrived(need: Action) -> Action:
    """A message is there when it was sent."""
    return peer(need) if need.kind in RECEIVES else need
