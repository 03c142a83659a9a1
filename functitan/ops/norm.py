"""`ft.rms_norm`: normalisation over a named axis, whole or sharded.

Invariant: mean square and scale are named ops, so sums cross ranks exactly where the axis or the scale's users do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from functitan.axes import parse_axes, write_axes
from functitan.errors import PatternError, report
from functitan.ops.reduce import broadcast, reduce
from functitan.sharding.context import current
from functitan.sharding.layout import check_rank


def rms_norm(pattern: str, x: Tensor, scale: Tensor, *, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale over the scale's one axis: `"batch seq embed, embed"`.

    The mean is taken in float32 or better; the result has the dtype of `x`. Zhang and Sennrich, Root Mean Square Layer
    Normalization, 2019. Raises `PatternError`.

    >>> rms_norm("batch embed, embed", torch.tensor([[3.0, 4.0]]), torch.ones(2), eps=0.0)
    tensor([[0.8485, 1.1314]])
    """
    axes, own = (parse_axes(part.strip()) for part in pattern.split(","))
    if len(own) != 1 or own[0] not in axes:
        problem = f"scale {write_axes(own)!r} must be one axis of {write_axes(axes)!r}"
        raise PatternError(report(f"rms_norm({pattern!r})", [problem], "write 'batch seq embed, embed'"))
    check_rank(axes, tuple(x.shape), f"rms_norm({pattern!r})")
    if current().mesh is None and axes[-1] == own[0]:
        return functional.rms_norm(x, scale.shape, scale.to(x.dtype), eps)
    rows = write_axes(tuple(axis for axis in axes if axis != own[0]))
    high = x if x.dtype == torch.float64 else x.float()
    mean = reduce(f"{write_axes(axes)} -> {rows}", high * high, op="mean")
    inverse = broadcast(f"{rows} -> {write_axes(axes)}", torch.rsqrt(mean + eps))
    wide = broadcast(f"{own[0]} -> {write_axes(axes)}", scale)
    return (high * inverse).to(x.dtype) * wide.to(x.dtype)
