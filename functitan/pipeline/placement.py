"""Where the stages of a pipeline live: stage -> rank.

Invariant: each rank has as many stages as any other, and a stage's neighbours live on its rank or on ranks beside it.
"""

from __future__ import annotations

from functitan.pipeline.actions import StageRank


def loop(num_stages: int, num_ranks: int) -> StageRank:
    """Round and round.

    >>> loop(6, 3)
    (0, 1, 2, 0, 1, 2)
    """
    return tuple(stage % num_ranks for stage in range(num_stages))


def v_shape(num_stages: int, num_ranks: int) -> StageRank:
    """Down and up again: the last stage of a rank's two is the one after it on the way back.

    >>> v_shape(6, 3)
    (0, 1, 2, 2, 1, 0)
    """
    turn = 2 * num_ranks
    return tuple(min(stage % turn, turn - 1 - stage % turn) for stage in range(num_stages))
