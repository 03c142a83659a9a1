"""`ft.dropout`: masks that depend on the key and the global index alone.

Invariant: every mesh drops the same elements, bitwise, and no rank makes more of the mask than its shard.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from functitan import threefry
from functitan.axes import parse_axes
from functitan.errors import FunctitanError, report
from functitan.ops.contraction import lift
from functitan.ops.operands import Operand, check_operands
from functitan.ops.remembered import made
from functitan.ops.types import Type
from functitan.random import draw_at, place_like
from functitan.sharding.context import current
from functitan.sharding.message import Label


def dropout(pattern: str, x: Tensor, key: Tensor, rate: float) -> Tensor:
    """Zero each element with probability `rate`, and divide the others by 1 - rate: `"batch seq embed"`.

    Under `ft.vmap` every position of the hidden axis has the same mask, as one key gives; fold the index into the key
    for others. Raises `FunctitanError` for a rate outside [0, 1).

    >>> dropout("batch", torch.ones(4), threefry.key(0), 0.5).unique()
    tensor([0., 2.])
    """
    axes, env = parse_axes(pattern), current()
    check_operands(f"dropout({pattern!r})", Operand("x", x, axes, "inexact"))
    threefry.check_key(key, f"dropout({pattern!r})")
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        found = rate if isinstance(rate, (int, float)) else f"a {type(rate).__name__}"
        raise FunctitanError(report(f"dropout({pattern!r})", [f"rate is {found}"], "give a number in [0, 1)"))
    if rate == 0:
        return x
    place = place_like(axes, x, key, env)
    if env.mesh is not None:  # where a vmap over keys has taken mesh dims of x
        x = lift(Type(axes), x, place.hidden, env, Label("dropout", pattern))
    kept = draw_at(place, partial(_kept, 1 - rate), key, x.device)
    return made("dropout", axes, torch.where(kept, x / (1 - rate), 0.0), env)


def _kept(p: float, key: Tensor, shape: tuple[int, ...], **where: Any) -> Tensor:
    return threefry.bernoulli(key, p, shape, **where)
