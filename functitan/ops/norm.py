"""`ft.rms_norm` and `ft.layer_norm`: normalisation over a named axis, whole or sharded.

Invariant: where a rank holds whole rows, torch's fused kernel normalises them; where it does not, the statistics are
named reductions. Scale and bias are named ops, so that their gradients are summed over the ranks that share them.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from functitan.axes import Axes, parse_operands, write_axes
from functitan.errors import PatternError, report
from functitan.ops.contraction import lift
from functitan.ops.function import vmaps_around
from functitan.ops.operands import Operand, check_operands
from functitan.ops.reduce import broadcast, reduce
from functitan.ops.remembered import made
from functitan.ops.types import Type, layout_here
from functitan.sharding.context import current, using
from functitan.sharding.message import Label
from functitan.sharding.precision import widened


def rms_norm(pattern: str, x: Tensor, scale: Tensor, *, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale over the scale's one axis: `"batch seq embed, embed"`.

    The mean is taken in float32 or better; the result has the dtype of `x`. Under `ft.precision` the
    product with the scale, too, and only then is it rounded. Zhang and Sennrich, Root Mean Square Layer Normalization,
    2019. Raises `PatternError`.

    >>> rms_norm("batch embed, embed", torch.tensor([[3.0, 4.0]]), torch.ones(2), eps=0.0)
    tensor([[0.8485, 1.1314]])
    """
    axes, own = _checked("rms_norm", pattern, x, eps, scale=scale)
    x, dtype = _lifted("rms_norm", pattern, axes, x), _dtype(x)
    if _holds_rows(axes, own, x):
        x = widened(x, current().precision)
        if current().mesh is None:
            with current().span("rms_norm", pattern):
                return functional.rms_norm(x, scale.shape, scale.to(dtype).to(x.dtype), eps).to(dtype)
        with current().span("rms_norm", pattern):
            normal = functional.rms_norm(x, x.shape[-1:], eps=eps)
    else:
        high = x if x.dtype == torch.float64 else x.float()
        normal = _kept(high * _spread(axes, own, torch.rsqrt(_mean(axes, own, high * high) + eps)), dtype)
    return made("rms_norm", axes, (normal * _wide(axes, own, scale).to(normal.dtype)).to(dtype), current())


def layer_norm(pattern: str, x: Tensor, scale: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the axis of scale and bias: `"batch seq embed, embed"`.

    The statistics are taken in float32 or better; the result has the dtype of `x`. The variance is the mean of
    (x - mean)^2, as it is for whole rows: E[x^2] - mean^2 would save the second of two small reductions where rules
    shard the axis, but loses all digits where the mean is some thousand times the deviation. Ba, Kiros and Hinton,
    Layer Normalization, 2016. Raises `PatternError`.

    >>> layer_norm("batch embed, embed", torch.tensor([[3.0, 5.0]]), torch.ones(2), torch.tensor([0.0, 1.0]), eps=0.0)
    tensor([[-1.,  2.]])
    """
    axes, own = _checked("layer_norm", pattern, x, eps, scale=scale, bias=bias)
    x, dtype = _lifted("layer_norm", pattern, axes, x), _dtype(x)
    if _holds_rows(axes, own, x):
        x = widened(x, current().precision)
        if current().mesh is None:
            of = lambda y: None if y is None else y.to(dtype).to(x.dtype)
            with current().span("layer_norm", pattern):
                return functional.layer_norm(x, scale.shape, of(scale), of(bias), eps).to(dtype)
        with current().span("layer_norm", pattern):
            normal = functional.layer_norm(x, x.shape[-1:], eps=eps)
    else:
        high = x if x.dtype == torch.float64 else x.float()
        centred = high - _spread(axes, own, _mean(axes, own, high))
        inverse = torch.rsqrt(_mean(axes, own, centred * centred) + eps)
        normal = _kept(centred * _spread(axes, own, inverse), dtype)
    scaled = normal * _wide(axes, own, scale).to(normal.dtype)
    shifted = scaled if bias is None else scaled + _wide(axes, own, bias).to(normal.dtype)
    return made("layer_norm", axes, shifted.to(dtype), current())


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype of the result."""
    precision = current().precision
    return x.dtype if precision is None else precision.compute


def _kept(normal: Tensor, dtype: torch.dtype) -> Tensor:
    """Under a precision the product with the scale is in float32 too, and only then is it rounded."""
    return normal if current().precision is not None else normal.to(dtype)


def _lifted(op: str, pattern: str, axes: Axes, x: Tensor) -> Tensor:
    """x where the scale will be: one that all examples share may meet a scale of each."""
    env = current()
    return x if env.mesh is None else lift(Type(axes), x, vmaps_around(env), env, Label(op, pattern))


def _holds_rows(axes: Axes, own: str, x: Tensor) -> bool:
    """True where each rank has whole rows, along the last axis, as torch's kernels want them."""
    env = current()
    return axes[-1] == own and (env.mesh is None or not layout_here(axes, x, env).of(own))


def _mean(axes: Axes, own: str, x: Tensor) -> Tensor:
    with using(current()._replace(precision=None)):
        return reduce(f"{write_axes(axes)} -> {_rows(axes, own)}", x, op="mean")


def _spread(axes: Axes, own: str, x: Tensor) -> Tensor:
    with using(current()._replace(precision=None)):
        return broadcast(f"{_rows(axes, own)} -> {write_axes(axes)}", x)


def _wide(axes: Axes, own: str, x: Tensor) -> Tensor:
    return broadcast(f"{own} -> {write_axes(axes)}", x)


def _rows(axes: Axes, own: str) -> str:
    return write_axes(tuple(axis for axis in axes if axis != own))


def _checked(op: str, pattern: str, x: Tensor, eps: float, **others: Tensor | None) -> tuple[Axes, str]:
    """The axes of x, and the one of what scales or shifts it; raises `PatternError`."""
    what, (axes, own) = f"{op}({pattern!r})", _parse(op, pattern)
    named = [Operand(name, y, own, "float") for name, y in others.items() if y is not None or name != "bias"]
    check_operands(what, Operand("x", x, axes, "float"), *named)
    if not eps >= 0:
        raise PatternError(report(what, [f"eps is {eps}"], "give a number of at least 0"))
    return axes, own[0]


@cache
def _parse(op: str, pattern: str) -> tuple[Axes, Axes]:
    operands = parse_operands(pattern)
    if len(operands) != 2:
        problems = [f"{len(operands)} patterns: one of x, one of the scale"]
    else:
        axes, own = operands
        problems = [f"scale {write_axes(own)!r} must be one axis of {write_axes(axes)!r}"]
        if len(own) == 1 and own[0] in axes:
            return axes, own
    raise PatternError(report(f"{op}({pattern!r})", problems, _FIX))


_FIX = "write 'batch seq embed, embed'"
