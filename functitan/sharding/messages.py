"""Messages between pipeline stages: from this rank to the one at the same place of another stage, and back.

Invariant: every message that runs anywhere passes through `post`, which enters it into the ledger and names its span,
and `receive`. Neither waits for the other rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functitan.sharding.context import Env, within
from functitan.sharding.ledger import FORMULAS
from functitan.sharding.mesh import Pending, Transport
from functitan.sharding.program import describe
from functitan.sharding.steps import Label

DIM = "pp"


def post(x: Tensor, to: int, env: Env, label: Label) -> Pending:
    """Send a tensor to the rank at place `to` along `pp`; who waits for it waits until it has left.

    Nobody may write to the tensor before. It arrives there at the `receive` of the same number from this rank.
    """
    its = _transport(env).post
    assert its is not None
    _agree(f"sends {describe('message', (DIM,), tuple(x.shape), x.dtype, label)}", env)
    if env.ledger is None and not env.profiled:
        return its(x, DIM, to, label)
    entry = env.entry("send", (DIM,), FORMULAS["send"](x.numel() * x.element_size(), 2), x.dtype, *label)
    if env.ledger is not None:
        env.ledger.entries.append(entry)
    return within(entry.name, its, x, DIM, to, label)


def receive(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, source: int, env: Env, label: Label
) -> Pending:
    """Make room for a tensor of the rank at place `source` along `pp`; who waits for it gets it.

    Raises `CollectiveError`, which names that rank and the message, if it does not come within the mesh's timeout.
    """
    its = _transport(env).receive
    assert its is not None
    _agree(f"awaits {describe('message', (DIM,), tuple(shape), dtype, label)}", env)
    pending = its(shape, dtype, device, DIM, source, label)
    if not env.profiled:
        return pending
    name = env.entry("receive", (DIM,), 0, dtype, *label).name
    return pending._replace(wait=lambda: within(name, pending.wait))


def _transport(env: Env) -> Transport:
    assert env.pipeline is not None
    return env.pipeline.transport


def _agree(program: str, env: Env) -> None:
    if env.checked:
        _transport(env).agree(program)
