"""The orders of pipelines whose stages go down the ranks and up again, a V: ZBV and DualPipeV.

Invariant: each rank has two stages, `down` and `up`. An order for few microbatches is the order for more without those
that there are not: what is left waits for less.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from functitan.pipeline.actions import Action, Order, done_by

_Step = tuple[str, int | None]  # a kind and its stage; no stage: the weight gradient that has waited longest


def zbv(rank: int, stages: Sequence[int], num_ranks: int, num_microbatches: int) -> Order:
    """ZB-V: no bubble where forward, input and weight gradient take equal times (Qi et al., Zero Bubble, 2023).

    Holds no more activations than 1F1B. From 2 num_ranks - 1 microbatches on, a rank that has begun never waits.
    """
    down, up = stages
    left, total = num_ranks - rank, max(2 * num_ranks - 1, num_microbatches)
    both = total - 2 * num_ranks + rank + 1  # of the steady steps; the others have no forward on the way down
    backward_down, all_up = [("I", down), ("W", down)], [("F", up), ("I", up), ("W", up)]
    return _numbered(
        [("F", down)] * (2 * left - 1)
        + [("F", up), ("F", down)] * rank
        + all_up * left
        + [("F", down), *backward_down, *all_up] * both
        + [*backward_down, *all_up] * (total - num_ranks - both)
        + [("I", down), ("I", up)] * rank
        + backward_down * left
        + [("W", up)] * rank
        + [("W", down)] * rank,
        num_microbatches,
    )


def dualpipev(rank: int, stages: Sequence[int], num_ranks: int, num_microbatches: int) -> Order:
    """DualPipe cut in half: in steady state a forward stands beside a backward of the other stage (DeepSeek, 2025).

    Weight gradients stand apart only in warmup and cooldown, where a bubble would be (github.com/deepseek-ai/DualPipe).
    """
    down, up = stages
    left, total = num_ranks - rank - 1, max(2 * num_ranks, num_microbatches)
    last = [up, down] * (rank + 1)
    return _numbered(
        [("F", down)] * (2 * left)
        + [("F", down), ("F", up)] * (rank + 1)
        + [("I", up), ("W", None), ("F", up)] * left
        + [("F", down), ("B", up), ("F", up), ("B", down)] * (total - 2 * num_ranks + rank + 1)
        + [("B", up), ("F", up), ("B", down)] * left
        + [("B", stage) for stage in last[: rank + 1]]
        + [("I", stage) for stage in last[rank + 1 :]]
        + [("W", None), ("I", down)] * left
        + [("W", None)] * (rank + 1),
        num_microbatches,
    )


def _numbered(steps: Sequence[_Step], num_microbatches: int) -> Order:
    """Each kind of each stage takes the microbatches in order, and those that there are not are left out."""
    count: Counter[_Step] = Counter()
    waiting: deque[Action] = deque()
    found: list[Action] = []
    for kind, stage in steps:
        if stage is None:
            action = waiting.popleft()
        else:
            action = Action(kind, stage, count["I" if kind == "B" else kind, stage])
            waiting += [action._replace(kind="W")] if kind == "I" else []
        count.update((done.kind, done.stage) for done in done_by(action))
        found.append(action)
    return tuple(action for action in found if action.microbatch < num_microbatches)
