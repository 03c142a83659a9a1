"""Sums that take cotangents where these are made.

Invariant: a cotangent is added in place as soon as it is there, and goes no further; which sums got any is noted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def add_into(x: Tensor, total: Tensor, reached: set[int], number: int) -> Tensor:
    """`x`, whose cotangent is added to `total`; `reached` gets `number` if there is one."""
    return _AddInto.apply(x, _Sum(total, reached, number))


class _Sum(NamedTuple):
    total: Tensor
    reached: set[int]
    number: int


class _AddInto(torch.autograd.Function):
    """The identity, whose cotangent is added to a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, its: _Sum) -> Tensor:  # type: ignore[override]
        ctx.its = its
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[None, None]:  # type: ignore[override]
        if g is not None:  # what goes into a `Sink` does not come here
            ctx.its.total.add_(g)
            ctx.its.reached.add(ctx.its.number)
        return None, None
