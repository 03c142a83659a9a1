"""List scheduling: at each moment each rank takes the most urgent action that it can.

Invariant: no rank ever holds more activations than the cap, and the microbatches begun can always be ended within it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

from functitan.pipeline.actions import FORWARD, INPUT, WEIGHT, Action, Orders, StageRank


class Preference(NamedTuple):
    """Which action a rank takes of those it can."""

    deepest: bool  # of forwards the one of the last stage first, else of the first
    patience: float  # a weight gradient is begun though it makes others wait for up to this share of its time


def greedy(
    stage_rank: StageRank,
    num_microbatches: int,
    num_ranks: int,
    cost: Callable[[Action], float],
    send: float,
    cap: int | None,
    preference: Preference,
) -> Orders:
    """The compute order of each rank. Input gradients go first, weight gradients where a rank would wait."""
    orders: list[list[Action]] = [[] for _ in range(num_ranks)]
    clock = [0.0] * num_ranks
    ended: dict[Action, float] = {}
    count: Counter[tuple[str, int]] = Counter()  # of a kind and stage: its microbatches go in order
    weights: dict[int, list[Action]] = defaultdict(list)
    held: Counter[tuple[int, int]] = Counter()  # activations by rank and microbatch

    def start(action: Action) -> float | None:
        """When a rank can begin it; None: it is not known yet, or there is no room."""
        kind, stage, m = action
        neighbour = stage + (-1 if kind == FORWARD else 1)
        needs = [] if kind == FORWARD else [Action(FORWARD, stage, m)]
        needs += [Action(kind, neighbour, m)] if 0 <= neighbour < len(stage_rank) else []
        rank = stage_rank[stage]
        if m >= num_microbatches or any(need not in ended for need in needs):
            return None
        if kind == FORWARD and cap is not None and not _safe(action, stage_rank, held, ended, cap, num_ranks):
            return None
        arrivals = (ended[need] + send * (stage_rank[need.stage] != rank) for need in needs)
        return max([clock[rank], *arrivals])

    def choice(rank: int) -> tuple[float, Action] | None:
        options = []
        for stage in (s for s, there in enumerate(stage_rank) if there == rank):
            for kind in (INPUT, FORWARD):
                action = Action(kind, stage, count[kind, stage])
                if (begin := start(action)) is not None:
                    depth = -stage if preference.deepest or kind == INPUT else stage
                    options.append((begin, kind == FORWARD, depth, action))
        best = min(options, default=None)
        if weights[rank]:
            waits = weights[rank][0]
            until = clock[rank] + cost(waits) * (1 - preference.patience)
            if best is None or (best[0] > clock[rank] and until <= best[0]):
                return clock[rank], waits
        return best and (best[0], best[-1])

    while chosen := min(
        ((*found, rank) for rank in range(num_ranks) if (found := choice(rank))),
        key=lambda c: (c[0], c[2]),
        default=None,
    ):
        begin, action, rank = chosen
        clock[rank] = ended[action] = begin + cost(action)
        orders[rank].append(action)
        count[action.kind, action.stage] += 1
        if action.kind == FORWARD:
            held[rank, action.microbatch] += 1
        elif action.kind == INPUT:
            weights[rank].append(action._replace(kind=WEIGHT))
        else:
            weights[rank].remove(action)
            held[rank, action.microbatch] -= 1
    return tuple(map(tuple, orders))


def _safe(
    action: Action,
    stage_rank: StageRank,
    held: Counter[tuple[int, int]],
    ended: dict[Action, float],
    cap: int,
    num_ranks: int,
) -> bool:
    """Whether after one more forward all microbatches begun can end, one after the other (the banker's algorithm)."""
    new = stage_rank[action.stage], action.microbatch
    holds = Counter(held)
    holds[new] += 1
    begun = sorted({m for (_, m), n in holds.items() if n})
    free = [cap - sum(n for (rank, _), n in holds.items() if rank == r) for r in range(num_ranks)]
    if min(free) < 0:
        return False
    for m in begun:
        needs = Counter(
            there for stage, there in enumerate(stage_rank)
            if Action(FORWARD, stage, m) not in ended and Action(FORWARD, stage, m) != action
        )  # fmt: skip
        if any(n > free[rank] for rank, n in needs.items()):
            return False
        free = [room + holds[rank, m] for rank, room in enumerate(free)]
    return True
