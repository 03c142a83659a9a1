"""The orders of the classical pipelines, with a whole backward: GPipe, 1F1B, and their interleaved kinds.

Invariant: an order is what each rank computes; where it communicates is placed later, by one rule for all.
"""

from __future__ import annotations

from functitan.pipeline.actions import Action, Order


def gpipe(rank: int, stages: list[int], num_ranks: int, num_microbatches: int) -> Order:
    """All forwards, then all backwards (Huang et al., GPipe, 2019)."""
    (stage,) = stages
    return tuple(Action(kind, stage, m) for kind in "FB" for m in range(num_microbatches))


def one_f_one_b(rank: int, stages: list[int], num_ranks: int, num_microbatches: int) -> Order:
    """As many forwards as ranks follow, then one forward and one backward in turn (Narayanan et al., PipeDream, 2019)."""
    (stage,) = stages
    warmup = min(num_ranks - 1 - rank, num_microbatches)
    return in_turn(
        [Action("F", stage, m) for m in range(num_microbatches)],
        [Action("B", stage, m) for m in range(num_microbatches)],
        warmup,
    )


def in_turn(forwards: list[Action], backwards: list[Action], warmup: int) -> Order:
    """`warmup` forwards, then one forward and one backward in turn, then the backwards that are left."""
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return (*forwards[:warmup], *steady, *backwards[len(forwards) - warmup :])
