"""Rotary position embedding, with Llama 3.1's frequency scaling.

Invariant: a rotation depends on the global position alone; the axis it mixes is brought whole where rules shard it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from functitan.axes import parse_axes
from functitan.errors import PatternError, report
from functitan.ops.lookup import iota
from functitan.ops.move import constrain_like, where_whole
from functitan.ops.operands import Operand, check_operands


class RopeScaling(NamedTuple):
    """Llama 3.1's scaling: wavelengths beyond the trained context are stretched by `factor`, short ones are kept."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, device: torch.device | None = None
) -> Tensor:
    """The angle per position of each pair, float32 [head_dim / 2]: theta^(-2i / head_dim), scaled.

    Su et al., RoFormer, 2021; The Llama 3 Herd of Models, 2024, and its reference code.

    >>> frequencies(4, 10000.0)
    tensor([1.0000, 0.0100])
    """
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if scaling is None:
        return freqs
    wavelength = 2 * math.pi / freqs
    low, high = scaling.original_context / scaling.low_freq_factor, scaling.original_context / scaling.high_freq_factor
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    return torch.where(wavelength > low, freqs / scaling.factor, torch.where(wavelength < high, freqs, between))


def apply(
    pattern: str, x: Tensor, *, theta: float, scaling: RopeScaling | None = None, positions: Tensor | None = None
) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of each head by position: `"batch seq heads head_dim"`.

    The last axes are positions, heads, head_dim. `positions` (int64, the pattern of x without its last two axes)
    replaces the places in the sequence.

    >>> apply("seq heads head_dim", torch.ones(2, 1, 2), theta=10000.0)[1].flatten()
    tensor([-0.3012,  1.3818])
    """
    axes = parse_axes(pattern)
    if len(axes) < 3:
        raise PatternError(report(f"rope({pattern!r})", [f"{len(axes)} axes"], "end with positions, heads, head_dim"))
    *batch, seq, _, head_dim = axes
    check_operands(f"rope({pattern!r})", Operand("x", x, axes, "float"))

    def rotate(x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            problem = f"axis {head_dim!r} of size {x.shape[-1]} has no pairs"
            raise PatternError(report(f"rope({pattern!r})", [problem], "give heads of an even size"))
        freqs = frequencies(x.shape[-1], theta, scaling, x.device)
        angles = at.to(freqs.dtype).unsqueeze(-1) * freqs
        cos, sin = (f(angles).to(x.dtype).unsqueeze(-2) for f in (torch.cos, torch.sin))
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    if positions is None:
        at = iota(pattern, seq, like=x)[(0,) * len(batch)][:, 0, 0]
    else:
        at = constrain_like(" ".join((*batch, seq)), positions, pattern, x)
    return where_whole(pattern, head_dim, rotate, x)
