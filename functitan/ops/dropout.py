"""`ft.dropout`: masks that depend on the key and the global index alone.

Invariant: every mesh drops the same elements, bitwise, and no rank makes more of the mask than its shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functitan import random
from functitan.axes import parse_axes
from functitan.errors import FunctitanError, report
from functitan.ops.operands import Operand, check_operands
from functitan.ops.types import layout_here
from functitan.sharding.context import current
from functitan.sharding.layout import Layout, block_of, global_shape


def dropout(pattern: str, x: Tensor, key: Tensor, rate: float) -> Tensor:
    """Zero each element with probability `rate`, and divide the others by 1 - rate: `"batch seq embed"`.

    Under `ft.vmap` every position of the hidden axis has the same mask, as one key gives; fold the index into the key
    for others. Raises `FunctitanError` for a rate outside [0, 1).

    >>> dropout("batch", torch.ones(4), random.key(0), 0.5).unique()
    tensor([0., 2.])
    """
    axes, env = parse_axes(pattern), current()
    check_operands(f"dropout({pattern!r})", Operand("x", x, axes, "float"))
    random.check_key(key, f"dropout({pattern!r})")
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        found = rate if isinstance(rate, (int, float)) else f"a {type(rate).__name__}"
        raise FunctitanError(report(f"dropout({pattern!r})", [f"rate is {found}"], "give a number in [0, 1)"))
    if rate == 0:
        return x
    shape, block = tuple(x.shape), None
    if env.mesh is not None:
        full = layout_here(axes, x, env)
        layout = Layout(axes, tuple(full.of(axis) for axis in axes))
        shape = global_shape(layout, shape, env.mesh.sizes)
        block = block_of(layout, shape, env.mesh)
    kept = random.bernoulli(key, 1 - rate, shape, block=block)
    return torch.where(kept, x / (1 - rate), 0.0)
