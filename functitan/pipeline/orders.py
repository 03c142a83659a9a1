"""The orders of pipelines whose stages are looped: GPipe, 1F1B, their interleaved kinds, breadth first, zero bubble.

Invariant: an order is what a rank computes; where it communicates is placed later, by one rule for all orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise

from functitan.pipeline.actions import Action, Order


def gpipe(rank: int, stages: Sequence[int], num_ranks: int, num_microbatches: int) -> Order:
    """All forwards, then all backwards (Huang et al., GPipe, 2019)."""
    forwards = [Action("F", stage, m) for stage in stages for m in range(num_microbatches)]
    return (*forwards, *(Action("B", stage, m) for stage in reversed(stages) for m in range(num_microbatches)))


def looped_bfs(rank: int, stages: Sequence[int], num_ranks: int, num_microbatches: int) -> Order:
    """All microbatches of a stage before the rank's next stage (Lamy-Poirier, Breadth-First Pipeline, 2023)."""
    forwards = [Action("F", stage, m) for stage in stages for m in range(num_microbatches)]
    return (*forwards, *(Action("B", *action[1:]) for action in reversed(forwards)))


def one_f_one_b(rank: int, stages: Sequence[int], num_ranks: int, num_microbatches: int) -> Order:
    """As many forwards as ranks follow, then forward and backward in turn (Narayanan et al., PipeDream, 2019)."""
    forwards, backwards = _by_rounds(stages, num_ranks, num_microbatches, "B")
    return _in_turn(forwards, backwards, num_ranks - 1 - rank)


def interleaved(rank: int, stages: Sequence[int], num_ranks: int, num_microbatches: int) -> Order:
    """1F1B in rounds of microbatches that pass all the rank's stages (Narayanan et al., Megatron-LM, 2021).

    A round has one microbatch for each rank, or as many more as make all rounds alike; the larger rounds come first, so
    any number of microbatches will do.
    """
    forwards, backwards = _by_rounds(stages, num_ranks, num_microbatches, "B")
    first_round = (len(stages) - 1) * len(_rounds(num_ranks, num_microbatches)[0])
    return _in_turn(forwards, backwards, first_round + 2 * (num_ranks - 1 - rank))


def zero_bubble(rank: int, stages: Sequence[int], num_ranks: int, num_microbatches: int) -> Order:
    """Interleaved 1F1B whose weight gradients fill the bubbles; ZB-H1 for one stage a rank (Qi et al., 2023).

    Rank r puts each weight gradient r input gradients later, so all ranks hold as many activations as 1F1B's first.
    """
    forwards, inputs = _by_rounds(stages, num_ranks, num_microbatches, "I")
    first_round = (len(stages) - 1) * len(_rounds(num_ranks, num_microbatches)[0])
    found: list[Action] = []
    weights = (action._replace(kind="W") for action in inputs)
    done = 0
    for action in _in_turn(forwards, inputs, first_round + num_ranks - 1 - rank):
        found.append(action)
        done += action.kind == "I"
        if action.kind == "I" and done > rank:
            found.append(next(weights))
    return (*found, *weights)


def _by_rounds(
    stages: Sequence[int], num_ranks: int, num_microbatches: int, backward: str
) -> tuple[list[Action], list[Action]]:
    """The forwards of a rank, and its backwards: round by round, each through all stages."""
    rounds = _rounds(num_ranks, num_microbatches)
    forwards = [Action("F", stage, m) for span in rounds for stage in stages for m in span]
    backwards = [Action(backward, stage, m) for span in rounds for stage in reversed(stages) for m in span]
    return forwards, backwards


def _rounds(num_ranks: int, num_microbatches: int) -> list[range]:
    """Microbatches in rounds of `num_ranks` or more, the larger first.

    >>> _rounds(4, 9)
    [range(0, 5), range(5, 9)]
    """
    size, larger = divmod(num_microbatches, max(1, num_microbatches // num_ranks))
    count = max(1, num_microbatches // num_ranks)
    starts = [i * size + min(i, larger) for i in range(count + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


def _in_turn(forwards: list[Action], backwards: list[Action], warmup: int) -> Order:
    """`warmup` forwards, then a forward and a backward in turn, then the backwards that are left."""
    steady = list(chain.from_iterable(zip(forwards[warmup:], backwards, strict=False)))
    return (*forwards[:warmup], *steady, *backwards[len(steady) // 2 :])
