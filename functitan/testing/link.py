"""A simulated link: the messages of a mesh take the time that their bytes need, while computation goes on.

Invariant: values, and the order of messages, are those of the mesh. A rank's link carries one message after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from torch import Tensor

from functitan.errors import MeshError, report
from functitan.sharding.mesh import Mesh, Wait
from functitan.sharding.message import Message


@contextmanager
def slow_link(mesh: Mesh, bandwidth: float) -> Iterator[Mesh]:
    """A rank's mesh (virtual, or `ft.as_mesh` of processes) whose link sends `bandwidth` bytes a second.

    A message of b bytes, as the ledger counts them, reaches the others b / bandwidth seconds after the link is free. A
    thread of the rank sleeps so long, and the rank waits only where it waits for the message. On one machine, where
    messages and matmuls compete for the same cores, this shows what overlaps on a machine with a network. A captured
    step runs its graph's plain ops. Raises `MeshError`.

    >>> import torch, functitan as ft
    >>> rules = ft.AxisRules({"embed": "tp"})
    >>> def whole(mesh, x):
    ...     with slow_link(mesh, bandwidth=1e6) as slow:
    ...         return ft.unshard(x + mesh.rank, "embed", mesh=slow, rules=rules)
    >>> ft.simulate(tp=2)(whole)(torch.zeros(1))
    [tensor([0., 1.]), tensor([0., 1.])]
    """
    if not bandwidth > 0:
        raise MeshError(report("slow_link", [f"bandwidth is {bandwidth}"], "give bytes per second, more than 0"))
    with ThreadPoolExecutor(1, "link") as link:
        start = _delayed(mesh.transport.start, bandwidth, link)
        yield mesh._replace(transport=mesh.transport._replace(start=start, group=None))


def _delayed(begin: Callable[..., Wait], bandwidth: float, link: ThreadPoolExecutor) -> Callable[..., Wait]:
    def start(message: Message, x: Tensor) -> Wait:
        def carry() -> Wait:
            time.sleep(message.bytes / bandwidth)
            return begin(message, x)

        sent = link.submit(carry)
        return lambda: sent.result()()

    return start
