"""Numbers in float8 with their scales: made from tensors, moved by the steps of plans, cut, and read again.

Invariant: a number stands for `data * scale`. A scale belongs to whole global axes (or to blocks of 32), so a shard has
the very numbers that the whole tensor has there. What is not finite becomes NaN; what is too large, the largest number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from functitan.errors import LayoutError, report
from functitan.float8.recipes import BLOCK
from functitan.sharding.env import Env
from functitan.sharding.message import Label
from functitan.sharding.moves import Step, View
from functitan.sharding.steps import run_step

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2  # of operands, and of the cotangents of results
EPS = 1e-12  # the least magnitude that a scale is made for, as in torchao: zeros have a scale too


class Quantized(NamedTuple):
    """A tensor in float8."""

    data: Tensor
    scale: Tensor  # float32, of size 1 along `shared` axes; or biased exponents (uint8), one for each block
    shared: tuple[int, ...]
    block: int | None
    dtype: torch.dtype  # of products


def largest(x: Tensor, shared: tuple[int, ...]) -> Tensor:
    """The largest finite magnitude over some axes, which stay with size 1: float32."""
    if not x.numel():
        return x.new_zeros([1 if i in shared else n for i, n in enumerate(x.shape)], dtype=torch.float32)
    magnitudes = torch.where(x.isfinite(), x, 0).abs()
    return magnitudes.amax(shared, keepdim=True).float().clamp_max(torch.finfo(torch.float32).max)


def scale_of(maxima: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale by which the largest magnitude becomes the largest number of the float8 dtype."""
    return maxima.clamp_min(EPS) / torch.finfo(dtype).max


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x / scale` in float8, rounded to nearest even from float32."""
    limit = torch.finfo(dtype).max
    scaled = (x.float() / scale).clamp(-limit, limit)
    return torch.where(x.isfinite(), scaled, math.nan).to(dtype)


def quantize_blocks(x: Tensor, axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` in float8, and the biased exponents of its blocks along an axis: OCP Microscaling Formats v1.0, 6.3.

    The scale of a block is the largest power of two in its largest magnitude, over that of the float8 dtype.
    """
    blocks = x.unflatten(axis, (-1, BLOCK))
    maxima = largest(blocks, (axis + 1,))
    exponents = (maxima.view(torch.int32) >> 23) - int(math.log2(torch.finfo(dtype).max))
    exponents = exponents.clamp(1, 254)
    data = quantize(blocks, _power(exponents), dtype).flatten(axis, axis + 1)
    return data, exponents.squeeze(axis + 1).to(torch.uint8)


def dequantize(q: Quantized, dtype: torch.dtype) -> Tensor:
    """The numbers that it stands for, in a dtype that holds them."""
    if q.block is None:
        return q.data.to(dtype) * q.scale.to(dtype)
    blocks = q.data.to(dtype).unflatten(q.block, (-1, BLOCK))
    scale = _power(q.scale.int()).to(dtype).unsqueeze(q.block + 1)
    return (blocks * scale).flatten(q.block, q.block + 1)


def move(q: Quantized, step: Step, env: Env, label: Label) -> Quantized:
    """A step of a plan: float8 travels as bytes, and scales beside it where they differ along the axes of the step."""
    data = run_step(q.data.view(torch.uint8), step, env, label).view(q.data.dtype)
    of_scale = _of_scale(step, q.shared)
    if of_scale is None:
        return q._replace(data=data)
    _check_blocks(q, of_scale, label)
    return q._replace(data=data, scale=run_step(q.scale, of_scale, env, label))


def narrow(q: Quantized, axis: int, start: int, length: int) -> Quantized:
    """A part of an axis, as of a tensor; one along which blocks lie is cut between blocks."""
    data = q.data.narrow(axis, start, length)
    if axis in q.shared:
        return q._replace(data=data)
    size = BLOCK if axis == q.block else 1
    assert start % size == 0 == length % size, "a block has one scale"
    return q._replace(data=data, scale=q.scale.narrow(axis, start // size, length // size))


def travel(q: Quantized, axis: int, start: Callable[[Tensor], Callable[[], Tensor]]) -> Callable[[], Quantized]:
    """Start what differs along an axis: the bytes of the numbers, and the scales unless they share one."""
    data = start(q.data.view(torch.uint8))
    scale = (lambda: q.scale) if axis in q.shared else start(q.scale)
    return lambda: q._replace(data=data().view(q.data.dtype), scale=scale())


def _power(exponents: Tensor) -> Tensor:
    """2 ** (exponent - 127) in float32, of biased exponents from 1 to 254."""
    return (exponents << 23).view(torch.float32)


def _of_scale(step: Step, shared: tuple[int, ...]) -> Step | None:
    """What a step is for scales that are of size 1 along some axes."""
    source, target = (None if view is None or view.axis in shared else view for view in (step.source, step.target))
    kinds = {(True, True): "all_to_all", (True, False): "all_gather", (False, True): "slice"}
    kind = kinds.get((source is not None, target is not None))
    return None if kind is None else Step(kind, step.dims, source, target)


def _check_blocks(q: Quantized, step: Step, label: Label) -> None:
    views: list[View] = [view for view in (step.source, step.target) if view is not None and view.axis == q.block]
    parts = [math.prod(n for p, n in enumerate(v.sizes) if v is step.target or p not in v.moved) for v in views]
    size = 0 if q.block is None else q.data.shape[q.block]
    problems = [f"a shard of {size} is cut into {n} parts inside the op" for n in parts if size % (n * BLOCK)]
    if problems:
        raise LayoutError(report(f"{label.op}({label.pattern!r}) in mxfp8", problems, FIX_BLOCKS))


FIX_BLOCKS = (
    f"blocks of {BLOCK} lie along an axis that is summed: keep its shards multiples of {BLOCK}, choose "
    "recipe='rowwise', or leave the einsum to ft.float8(filter=...)"
)
