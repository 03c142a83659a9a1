"""What a rank of a pipeline does next: one action of a stage, and what must be done before it.

Invariant: an action is plain data; whether it sends follows from where its stage and the next stage live.
"""

from __future__ import annotations

import re
from typing import NamedTuple

ALL = -1  # the microbatch of what is done once for all of them: UNSHARD, RESHARD, REDUCE_GRAD
FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"
COMPUTE = (FORWARD, BACKWARD, INPUT, WEIGHT)
SENDS, RECEIVES = ("SEND_F", "SEND_B"), ("RECV_F", "RECV_B")
GATHERS = ("UNSHARD", "RESHARD", "REDUCE_GRAD")
KINDS = (*COMPUTE, *SENDS, *RECEIVES, *GATHERS)


class Action(NamedTuple):
    """One thing a rank does. It equals the plain tuple `(kind, stage, microbatch)`.

    `F` forward; `B` whole backward, or `I` input gradient and later `W` weight gradient. `SEND_F` sends the stage's
    output to the next stage, `RECV_F` posts the receive of the stage's input; `SEND_B` sends the cotangent of its input
    to the stage before, `RECV_B` posts the receive of its output's cotangent. `UNSHARD` gathers the stage's parameters
    over fsdp, `RESHARD` frees what was gathered, `REDUCE_GRAD` reduces its gradients: their microbatch is -1.

    >>> str(Action("SEND_F", 0, 3)), str(Action("UNSHARD", 1, -1))
    ('0SEND_F3', '1UNSHARD')
    """

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.microbatch == ALL else self.microbatch}"


Order = tuple[Action, ...]  # what one rank does, in order
Orders = tuple[Order, ...]  # of each rank
StageRank = tuple[int, ...]  # stage -> rank


def parse_action(text: str) -> Action | None:
    """The action written so, or None where it is none: the inverse of `str`.

    >>> parse_action("1I2")
    Action(kind='I', stage=1, microbatch=2)
    """
    found = _ACTION.fullmatch(text.strip())
    if not found or (found[2] in GATHERS) != (found[3] == ""):
        return None
    return Action(found[2], int(found[1]), int(found[3] or ALL))


def is_compute(action: Action) -> bool:
    """Whether the action takes the rank's own time."""
    return action.kind in COMPUTE


def done_by(action: Action) -> tuple[Action, ...]:
    """The actions that count as done after this one: a whole backward is an input gradient and a weight gradient."""
    return (action, action._replace(kind=INPUT), action._replace(kind=WEIGHT)) if action.kind == BACKWARD else (action,)


def peer(action: Action) -> Action:
    """The send of a receive and the receive of a send.

    >>> str(peer(Action("SEND_F", 0, 3))), str(peer(Action("RECV_B", 0, 3)))
    ('1RECV_F3', '1SEND_B3')
    """
    direction = action.kind[-1]
    up = (action.kind in SENDS) == (direction == "F")
    kind = f"RECV_{direction}" if action.kind in SENDS else f"SEND_{direction}"
    return Action(kind, action.stage + (1 if up else -1), action.microbatch)


def before(action: Action, stage_rank: StageRank) -> list[Action]:
    """What must be done before an action: by this rank, or for a receive by the rank that sends.

    >>> [str(needed) for needed in before(Action("B", 0, 3), (0, 1))]
    ['0F3', '0RECV_B3']
    """
    kind, stage, microbatch = action
    if kind == FORWARD:
        return _from_neighbour(FORWARD, "RECV_F", stage, stage - 1, microbatch, stage_rank)
    if kind in (BACKWARD, INPUT):
        return [
            Action(FORWARD, stage, microbatch),
            *_from_neighbour(INPUT, "RECV_B", stage, stage + 1, microbatch, stage_rank),
        ]
    if kind in RECEIVES:
        return [peer(action)]
    needs = {WEIGHT: INPUT, "SEND_F": FORWARD, "SEND_B": INPUT}
    return [Action(needs[kind], stage, microbatch)] if kind in needs else []


def send_after(action: Action, stage_rank: StageRank) -> Action | None:
    """The send of what a compute action makes; None where the next stage is on this rank, or there is none."""
    kind, stage, microbatch = action
    step = {FORWARD: 1, BACKWARD: -1, INPUT: -1}.get(kind, 0)
    there = stage + step
    if not step or not 0 <= there < len(stage_rank) or stage_rank[there] == stage_rank[stage]:
        return None
    return Action("SEND_F" if kind == FORWARD else "SEND_B", stage, microbatch)


def _from_neighbour(
    kind: str, receive: str, stage: int, neighbour: int, microbatch: int, stage_rank: StageRank
) -> list[Action]:
    if not 0 <= neighbour < len(stage_rank):
        return []
    here = stage_rank[neighbour] == stage_rank[stage]
    return [Action(kind, neighbour, microbatch) if here else Action(receive, stage, microbatch)]


_ACTION = re.compile(rf"([0-9]{{1,9}})({'|'.join(sorted(KINDS, key=len, reverse=True))})([0-9]{{0,9}})")
