"""Messages between pipeline stages: from this rank to the one at the same place of another stage, and back.

Invariant: every message that runs anywhere passes through `post` and `receive`,
inside the hooks of `Env.around`. Neither waits for the other rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functitan.sharding.around import around_message
from functitan.sharding.env import Env
from functitan.sharding.mesh import Pending, Transport
from functitan.sharding.message import Label, Message

DIM = "pp"


def post(x: Tensor, to: int, env: Env, label: Label) -> Pending:
    """Send a tensor to the rank at place `to` along `pp`; who waits for it waits until it has left.

    Nobody may write to the tensor before. It arrives there at the `receive` of the same number from this rank.
    """
    transport, message = _transport(env), _message("send", tuple(x.shape), x.dtype, env, label)
    assert transport.post is not None
    send = transport.post
    return around_message(message, x, env, lambda message, x: send(message, x, to))


def receive(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, source: int, env: Env, label: Label
) -> Pending:
    """Make room for a tensor of the rank at place `source` along `pp`; who waits for it gets it.

    Raises `CollectiveError`, which names that rank and the message, if it does not come within the mesh's timeout.
    """
    transport, message = _transport(env), _message("receive", tuple(shape), dtype, env, label)
    assert transport.receive is not None
    await_ = transport.receive
    return around_message(message, None, env, lambda message, _: await_(message, device, source))


def _message(collective: str, shape: tuple[int, ...], dtype: torch.dtype, env: Env, label: Label) -> Message:
    return Message(collective, (DIM,), 2, shape, dtype, "", *label, env.phase, env.recomputed)


def _transport(env: Env) -> Transport:
    assert env.pipeline is not None
    return env.pipeline.transport
