"""Messages between pipeline stages: from this rank to the one at the same place of another stage, and back.

Invariant: every message that runs anywhere passes through `post`, which enters it into the ledger and names its span,
and `receive`. Neither waits for the other rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functitan.sharding.context import Env, within
from functitan.sharding.mesh import Pending, Transport
from functitan.sharding.message import Label, Message

DIM = "pp"


def post(x: Tensor, to: int, env: Env, label: Label) -> Pending:
    """Send a tensor to the rank at place `to` along `pp`; who waits for it waits until it has left.

    Nobody may write to the tensor before. It arrives there at the `receive` of the same number from this rank.
    """
    its, message = _transport(env).post, _message(tuple(x.shape), x.dtype, env, label)
    assert its is not None
    _agree(f"sends {message}", env)
    if env.ledger is not None:
        env.ledger.entries.append(message)
    return within(message.name, its, message, x, to) if env.profiled else its(message, x, to)


def receive(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, source: int, env: Env, label: Label
) -> Pending:
    """Make room for a tensor of the rank at place `source` along `pp`; who waits for it gets it.

    Raises `CollectiveError`, which names that rank and the message, if it does not come within the mesh's timeout.
    """
    its, message = _transport(env).receive, _message(tuple(shape), dtype, env, label)
    assert its is not None
    _agree(f"awaits {message}", env)
    pending = its(message, device, source)
    if not env.profiled:
        return pending
    name = message._replace(collective="receive").name
    return pending._replace(wait=lambda: within(name, pending.wait))


def _message(shape: tuple[int, ...], dtype: torch.dtype, env: Env, label: Label) -> Message:
    return Message("send", (DIM,), 2, shape, dtype, "", *label, env.phase, env.recomputed)


def _transport(env: Env) -> Transport:
    assert env.pipeline is not None
    return env.pipeline.transport


def _agree(program: str, env: Env) -> None:
    if env.checked:
        _transport(env).agree(program)
