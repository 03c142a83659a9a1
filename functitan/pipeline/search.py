"""A search for a schedule under given costs and a memory cap: greedy list scheduling, then local search.

Invariant: what is found is valid and keeps the cap, and the same arguments find the same schedule.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from itertools import pairwise, product

from functitan.errors import ScheduleError, report
from functitan.pipeline.actions import BACKWARD, FORWARD, INPUT, WEIGHT, Action, Orders, StageRank
from functitan.pipeline.clock import Cost, costs, makespan, peak, run
from functitan.pipeline.communication import with_messages
from functitan.pipeline.greedy import Preference, greedy
from functitan.pipeline.named import NAMES, schedule
from functitan.pipeline.placement import loop
from functitan.pipeline.schedule import Schedule, from_actions


def search(
    *,
    num_stages: int,
    num_microbatches: int,
    num_ranks: int,
    forward: Cost = 1,
    input: Cost = 1,
    weight: Cost = 1,
    send: float = 0,
    max_activations: int | None = None,
    stage_rank: StageRank | None = None,
    trials: int = 300,
    seed: int = 0,
    name: str = "search",
) -> Schedule:
    """The fastest schedule found in which no rank holds more than `max_activations` at once.

    Costs are as in `Schedule.timeline`; one activation is that of a microbatch in a stage, from F to B or W. Stages
    live where `stage_rank` says, or on rank s % num_ranks. Several greedy schedules are made (Qi et al., Zero Bubble,
    2023, section 4.3); the best of them and of the named ones is improved by `trials` moves of one action, drawn with
    `seed`. Raises `ScheduleError` if a rank has more stages than `max_activations`: a microbatch needs one in each.

    >>> found = search(num_stages=2, num_microbatches=4, num_ranks=2, max_activations=2)
    >>> found.peak_activations(), round(found.bubble_fraction(), 3)
    ((2, 2), 0.077)
    """
    homes = loop(num_stages, num_ranks) if stage_rank is None else tuple(stage_rank)
    if problems := _problems(num_stages, num_microbatches, num_ranks, max_activations, homes):
        raise ScheduleError(report("search for a schedule", problems, _FIX))
    cost = costs(forward, input, weight, num_stages)

    def value(orders: Orders) -> tuple[float, float]:
        """How long it takes, then how much it holds; infinite where it can't run or holds too much."""
        peaks = [peak(order) for order in orders]
        placed = tuple(with_messages(order, homes) for order in orders)
        done = run(placed, homes, cost, send)
        if done.stuck or (max_activations is not None and max(peaks) > max_activations):
            return math.inf, math.inf
        return round(makespan(placed, done.times)[1], 9), sum(peaks)  # rounded: sums in another order are equal

    starts = [
        greedy(homes, num_microbatches, num_ranks, cost, send, cap, preference)
        for cap in _caps(max_activations, num_stages, num_microbatches, num_ranks)
        for preference in map(Preference._make, product((True, False), (0.0, 0.5, 1.0)))
    ]
    starts += list(_named(homes, num_microbatches, num_ranks))
    best = _improved(min(starts, key=value), value, trials, random.Random(seed))
    return from_actions(_merged(best, value), name=name, num_stages=num_stages, num_microbatches=num_microbatches)


def _named(homes: StageRank, num_microbatches: int, num_ranks: int) -> Iterator[Orders]:
    """The compute orders of the named schedules whose stages live so."""
    sizes = dict(num_stages=len(homes), num_microbatches=num_microbatches, num_ranks=num_ranks)
    for kind in NAMES:
        try:
            known = schedule(kind, **sizes)
        except ScheduleError:  # not for these sizes
            continue
        if known.stage_rank == homes:
            yield tuple(map(known.compute, range(num_ranks)))


def _caps(max_activations: int | None, num_stages: int, num_microbatches: int, num_ranks: int) -> list[int]:
    """Caps to try: a rank that begins fewer microbatches is sometimes sooner done with them."""
    mine = -(-num_stages // num_ranks)  # stages of a rank
    most = num_microbatches * num_stages
    top = most if max_activations is None else min(max_activations, most)
    return sorted({max(mine, min(top, cap)) for cap in (num_stages, 2 * num_stages - 1, top)})


def _improved(
    orders: Orders, value: Callable[[Orders], tuple[float, float]], trials: int, draws: random.Random
) -> Orders:
    """The orders after moves of single actions that make them no worse."""
    best = value(orders)
    for _ in range(trials):
        rank = draws.randrange(len(orders))
        order = list(orders[rank])
        action = order.pop(i := draws.randrange(len(order)))
        order.insert(max(0, min(len(order), i + draws.choice((-3, -2, -1, 1, 2, 3)))), action)
        moved = (*orders[:rank], tuple(order), *orders[rank + 1 :])
        if _in_order(order) and (now := value(moved)) <= best:
            orders, best = moved, now
    return orders


def _in_order(order: list[Action]) -> bool:
    """Whether F, B or I, and W of each microbatch and stage stand so; other dependencies show as waiting."""
    place = {action: i for i, action in enumerate(order)}
    for action, i in place.items():
        needed = action._replace(kind={WEIGHT: INPUT}.get(action.kind, FORWARD))
        if place[needed] > i:
            return False
    return True


def _merged(orders: Orders, value: Callable[[Orders], tuple[float, float]]) -> Orders:
    """I and W that follow each other as one B, which costs less to run, wherever nobody waits longer for that."""
    best = value(orders)
    for rank in range(len(orders)):
        for action in [a for a, b in pairwise(orders[rank]) if a.kind == INPUT and b == a._replace(kind=WEIGHT)]:
            i = orders[rank].index(action)
            order = (*orders[rank][:i], action._replace(kind=BACKWARD), *orders[rank][i + 2 :])
            merged = (*orders[:rank], order, *orders[rank + 1 :])
            if value(merged) <= best:
                orders = merged
    return orders


def _problems(
    num_stages: int, num_microbatches: int, num_ranks: int, max_activations: int | None, homes: StageRank
) -> list[str]:
    sizes = dict(num_stages=num_stages, num_microbatches=num_microbatches, num_ranks=num_ranks)
    found = [f"{name} is {n}" for name, n in sizes.items() if n < 1]
    if len(homes) != num_stages or sorted(set(homes)) != list(range(num_ranks)):
        found.append(
            f"stage_rank is {homes}, not a rank for each of {num_stages} stages, with {num_ranks} ranks all used"
        )
    for rank in range(num_ranks):
        mine = [stage for stage, there in enumerate(homes) if there == rank]
        if max_activations is not None and len(mine) > max_activations:
            found.append(
                f"rank {rank} must hold {len(mine)} activations, of one microbatch in its stages {mine}, "
                f"and max_activations is {max_activations}"
            )
    return found


_FIX = "allow as many activations as a rank has stages, or more; or put fewer stages on a rank"
