"""The schedules that have a name, and `schedule`, which makes one.

Invariant: a named schedule passes `check` with no buffers between ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from functitan.errors import ScheduleError, nearest, report
from functitan.pipeline import orders, v_orders
from functitan.pipeline.actions import Order
from functitan.pipeline.communication import place
from functitan.pipeline.placement import loop, v_shape
from functitan.pipeline.schedule import Schedule


class _Kind(NamedTuple):
    order: Callable[[int, Sequence[int], int, int], Order]  # of a rank, with its stages, of so many, and microbatches
    stages_per_rank: int | None = None  # None: any number
    is_v: bool = False
    whole_rounds: bool = False  # as many microbatches as ranks, or a multiple


NAMES = {
    "gpipe": _Kind(orders.gpipe),
    "1f1b": _Kind(orders.one_f_one_b, 1),
    "interleaved_1f1b": _Kind(orders.interleaved, whole_rounds=True),
    "flexible_interleaved_1f1b": _Kind(orders.interleaved),
    "looped_bfs": _Kind(orders.looped_bfs),
    "zero_bubble_h1": _Kind(orders.zero_bubble, 1),
    "interleaved_zero_bubble": _Kind(orders.zero_bubble),
    "zbv": _Kind(v_orders.zbv, 2, is_v=True),
    "dualpipev": _Kind(v_orders.dualpipev, 2, is_v=True),
}


def schedule(
    name: str, *, num_stages: int, num_microbatches: int, num_ranks: int, max_unsharded: int | None = None
) -> Schedule:
    """The schedule of this name: `gpipe`, `1f1b`, `interleaved_1f1b`, `flexible_interleaved_1f1b`, `looped_bfs`,
    `zero_bubble_h1`, `interleaved_zero_bubble`, `zbv` or `dualpipev`.

    Stage s lives on rank s % num_ranks; those of zbv and dualpipev go down the ranks and up again. 1f1b and
    zero_bubble_h1 have one stage on each rank, zbv and dualpipev two, the others any number; interleaved_1f1b wants a
    multiple of num_ranks microbatches. A stage's parameters are gathered over fsdp once in a step, or where memory is
    short only `max_unsharded` stages of a rank are gathered at a time. Raises `ScheduleError` for other sizes.

    >>> s = schedule("interleaved_1f1b", num_stages=4, num_microbatches=4, num_ranks=2)
    >>> s.stage_rank, round(s.bubble_fraction(), 3)
    ((0, 1, 0, 1), 0.111)
    """
    problems = _problems(name, num_stages, num_microbatches, num_ranks, max_unsharded)
    if problems:
        raise ScheduleError(report(f"schedule {name!r}", problems, _FIX))
    kind = NAMES[name]
    stage_rank = (v_shape if kind.is_v else loop)(num_stages, num_ranks)
    stages = [[s for s, there in enumerate(stage_rank) if there == rank] for rank in range(num_ranks)]
    compute = tuple(kind.order(rank, stages[rank], num_ranks, num_microbatches) for rank in range(num_ranks))
    actions = place(compute, stage_rank, max_unsharded)
    return Schedule(name, num_stages, num_microbatches, num_ranks, stage_rank, actions)


def _problems(
    name: str, num_stages: int, num_microbatches: int, num_ranks: int, max_unsharded: int | None
) -> list[str]:
    if name not in NAMES:
        return [f"no schedule has this name{nearest(str(name), NAMES)}; there are {', '.join(NAMES)}"]
    sizes = dict(num_stages=num_stages, num_microbatches=num_microbatches, num_ranks=num_ranks)
    sizes |= {} if max_unsharded is None else dict(max_unsharded=max_unsharded)
    found = [f"{key} is {n!r}, and must be 1 or more" for key, n in sizes.items() if not isinstance(n, int) or n < 1]
    if found:
        return found
    kind = NAMES[name]
    per_rank = kind.stages_per_rank
    if num_stages < num_ranks:
        found.append(f"rank {num_stages} has no stage: there are {num_stages} stages for {num_ranks} ranks")
    elif per_rank and num_stages != per_rank * num_ranks:
        found.append(
            f"it has {per_rank} stage{'s' * (per_rank > 1)} on each rank, {per_rank * num_ranks} on {num_ranks} ranks, "
            f"and not {num_stages}"
        )
    elif num_stages % num_ranks:
        rank = num_stages % num_ranks
        found.append(f"rank {rank} has a stage less than rank 0: {num_stages} stages on {num_ranks} ranks")
    if kind.whole_rounds and num_microbatches % num_ranks:
        found.append(
            f"its microbatches go in rounds of {num_ranks}, one for each rank, and {num_microbatches} is no multiple; "
            "flexible_interleaved_1f1b takes any number"
        )
    return found


_FIX = "num_stages is num_ranks for 1f1b and zero_bubble_h1, twice that for zbv and dualpipev, else a multiple of it"
