"""A pipeline schedule: what each rank does, in order, as a value that can be printed, checked and drawn.

Invariant: a schedule is immutable data made before anything runs; the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from functitan.pipeline import orders
from functitan.pipeline.actions import Order, Orders, StageRank, is_compute
from functitan.pipeline.communication import place


@dataclass(frozen=True)
class Schedule:
    """What each rank of a pipeline does in one step.

    `actions[rank]` is a tuple of `Action(kind, stage, microbatch)`; `stage_rank[stage]` the rank where a stage lives.
    """

    name: str
    num_stages: int
    num_microbatches: int
    num_ranks: int
    stage_rank: StageRank
    actions: Orders

    def compute(self, rank: int) -> Order:
        """The compute actions of a rank, without communication."""
        return tuple(filter(is_compute, self.actions[rank]))

    def stages(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, in order."""
        return tuple(stage for stage, there in enumerate(self.stage_rank) if there == rank)


def schedule(name: str, *, num_stages: int, num_microbatches: int, num_ranks: int) -> Schedule:
    """The schedule of a name."""
    stage_rank = tuple(stage % num_ranks for stage in range(num_stages))
    build = {"gpipe": orders.gpipe, "1f1b": orders.one_f_one_b}[name]
    stages = [[s for s in range(num_stages) if stage_rank[s] == rank] for rank in range(num_ranks)]
    compute = tuple(build(rank, stages[rank], num_ranks, num_microbatches) for rank in range(num_ranks))
    return Schedule(name, num_stages, num_microbatches, num_ranks, stage_rank, place(compute, stage_rank))
