"""Products of weights without a mesh, whose gradients are added up where they are made, or wait.

Invariant: the local products, and the order of sums, are those of the named op, which plans them on a mesh: this is
the same without its planning. A first reverse derivative, by plain autograd, as all that a `Sink` serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from functitan.axes import Axes, Signature
from functitan.ops.local import add_product, product
from functitan.sharding.contraction import terms_of
from functitan.sharding.sink import Sink


@cache
def are_pairs(signature: Signature) -> bool:
    """Whether each result is of two operands, and each cotangent the product of the other one and the result's."""
    operands, results = signature
    for term in terms_of(len(operands), len(results)):
        if len(term.operands) != 2:
            return False
        a, b = (set(operands[i]) for i in term.operands)
        result = set(results[term.result])
        if not (a <= b | result and b <= a | result):
            return False
    return True


def weighted(axes: tuple[Axes, ...], result: Axes, tensors: tuple[Tensor, ...], sink: Sink) -> Tensor:
    """The product of two tensors; the gradients of those that are weights go into the sink."""
    return _Weighted.apply(axes, result, sink, *tensors)


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axes: tuple[Axes, ...], result: Axes, sink: Sink, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        ctx.axes, ctx.result, ctx.sink = axes, result, sink
        ctx.numbers = sink.number(a), sink.number(b)
        ctx.save_for_backward(a, b)
        return product(axes, result, (a, b))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        found: list[Tensor | None] = [None, None]
        tensors = ctx.saved_tensors
        for i, other in ((1, 0), (0, 1)):
            if not ctx.needs_input_grad[3 + i]:
                continue
            own, given = ctx.axes[i], ((ctx.axes[other], ctx.result), (tensors[other], g))
            if ctx.numbers[i] is None:
                found[i] = product(given[0], own, given[1])
            else:
                ctx.sink.put((ctx.numbers[i],), partial(_add, *given, own))
        return None, None, None, *found


def _add(axes: tuple[Axes, ...], tensors: tuple[Tensor, ...], own: Axes, totals: Sequence[Tensor]) -> None:
    (total,) = totals
    with torch.no_grad():
        add_product(total, axes, own, tensors)
