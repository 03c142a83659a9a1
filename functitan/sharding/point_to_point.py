"""Messages between two processes over torch.distributed: posted, and waited for later.

Invariant: a posted message never waits for one of the other direction. Those to a later rank and those to an earlier
one have a group each, because NCCL runs what is posted on one group in order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from functitan.errors import CollectiveError, report
from functitan.sharding.mesh import Pending
from functitan.sharding.message import Message


class Line(NamedTuple):
    """The processes along one mesh dim, this one's place among them, and a group of them for each direction."""

    members: tuple[int, ...]
    me: int
    up: dist.ProcessGroup
    down: dist.ProcessGroup


def point_to_point(line: Callable[[str], Line]) -> tuple[Callable[..., Pending], Callable[..., Pending]]:
    """`Transport`'s `post` and `receive`. `line` makes the groups, when all ranks along a mesh dim first ask for it."""
    line = cache(line)

    def post(message: Message, x: Tensor, to: int) -> Pending:
        its, x = line(*message.mesh_dims), x.contiguous()
        group = its.up if to > its.me else its.down
        what = f"{message} to rank {its.members[to]}"
        return _pending(what, x, lambda: dist.isend(x, group=group, group_dst=to))

    def receive(message: Message, device: torch.device, source: int) -> Pending:
        its = line(*message.mesh_dims)
        group = its.up if source < its.me else its.down
        x = torch.empty(message.shape, dtype=message.dtype, device=device)
        what = f"{message} from rank {its.members[source]}"
        return _pending(what, x, lambda: dist.irecv(x, group=group, group_src=source))

    return post, receive


def _pending(what: str, x: Tensor, start: Callable[[], dist.Work | None]) -> Pending:
    work = _clear(what, start)
    assert work is not None, "the process is in the group"

    def wait() -> Tensor:
        _clear(what, work.wait)
        return x

    return Pending(wait, work.is_completed)


def _clear(what: str, call: Callable[[], dist.Work | bool | None]) -> dist.Work | None:
    """What the call gives; its failure as a `CollectiveError` that names both ranks and the message."""
    try:
        return call()  # type: ignore[return-value]
    except RuntimeError as error:
        if type(error) is not RuntimeError and not isinstance(error, dist.DistError):  # out of memory
            raise
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CollectiveError(report(f"rank {dist.get_rank()} waited for the {what}", [line], _FIX)) from error


_FIX = "look for a rank that failed, left, or waits elsewhere: all ranks run one schedule"
