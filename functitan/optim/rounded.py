"""Optimizer state in bfloat16, rounded stochastically.

Invariant: the random bits of an element depend on the seed, the step, the leaf's path and the element's global index
alone, so every mesh rounds alike; what is computed is computed in the state's own dtype.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan import threefry, tree
from functitan.axes import parse_axes
from functitan.errors import FunctitanError, report
from functitan.optim.kernels import copied, transformed
from functitan.optim.numbers import numbers_of, telling
from functitan.optim.patterns import leaves_of
from functitan.optim.state import scalar_beside
from functitan.optim.transform import GradientTransformation, donating
from functitan.param import Param, zeros
from functitan.sharding.context import current
from functitan.sharding.env import Env
from functitan.sharding.layout import block_of, layout_of, table_of


class RoundedState(NamedTuple):
    """`count` `[]` int64, the steps taken; `inner`, the state of the wrapped transformation, in bfloat16."""

    count: Any
    inner: Any


def bfloat16_state(transformation: GradientTransformation, seed: int = 0) -> GradientTransformation:
    """Keeps the float32 state of a transformation in bfloat16: Adam's moments take half the memory.

    The update itself is computed in float32, and the new state rounded up or down at random, so that its mean is
    exact: a moving average whose step is smaller than a bfloat16 digit moves all the same. Scalars and integers stay as
    they are. Gupta et al., Deep Learning with Limited Numerical Precision, 2015. Raises `FunctitanError` where there is
    nothing to round, and `PatternError` without patterns where the rules shard anything.

    >>> from functitan.optim.adam import adamw
    >>> params = {"w": torch.ones(2)}
    >>> tx = bfloat16_state(adamw(0.1))
    >>> updates, state = tx.update({"w": torch.ones(2)}, tx.init(params), params)
    >>> updates["w"].dtype, state.inner[0].mu["w"].dtype
    (torch.float32, torch.bfloat16)
    """

    def init(params: tree.Tree) -> RoundedState:
        inner = transformation.init(params)
        if tree.leaves(params) and not any(map(_is_rounded, tree.leaves(inner))):
            problem = "the transformation's state has no float32 leaf with an axis"
            raise FunctitanError(
                report("bfloat16_state", [problem], "wrap one that has moments, of float32 parameters")
            )
        return RoundedState(scalar_beside(params, torch.int64), tree.map(_low, inner))

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        env = current()
        declared = transformation.init(_declared(updates, patterns, env))
        stored, structure = tree.flatten(state.inner)
        wide = [x.to(param.dtype) for x, param in zip(stored, tree.leaves(declared), strict=True)]
        updates, new = transformation.update(
            updates, tree.unflatten(structure, wide), params, patterns=patterns, donate=donate
        )
        key = threefry.fold_in(threefry.key(seed).to(state.count.device), state.count)
        rounded = [
            _rounded(x, threefry.fold_in(key, path), param, env) if _is_rounded(param) else x
            for x, path, param in zip(tree.leaves(new), tree.paths(new), tree.leaves(declared), strict=True)
        ]
        if donate:
            rounded = copied(stored, rounded, donate)
        return updates, RoundedState(state.count + 1, tree.unflatten(structure, rounded))

    numbers = lambda state: numbers_of(transformation, getattr(state, "inner", ()))
    return telling(GradientTransformation(init, update), numbers)


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """Float32 `x` in bfloat16: up with the probability of the part that is cut off. `bits`: random integers, 16 bits.

    A float32 is its bfloat16 and 16 more bits: these overflow into it in `cut` of 2**16 cases. Values of bfloat16 stay.
    The derivative is that of the mean, 1.

    >>> stochastic_round(torch.tensor([1.0, 1.00390625]), torch.tensor([65535, 32768]))
    tensor([1.0000, 1.0078], dtype=torch.bfloat16)
    """
    whole = x.detach().view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    up = (whole & -0x10000).view(torch.float32)
    if transformed((x,)):
        up = x + (up - x.detach())  # exactly `up`: the part that is cut off has few digits
    return torch.where(x.isfinite(), up, x).to(torch.bfloat16)


def _rounded(x: Tensor, key: Tensor, param: Param, env: Env) -> Tensor:
    axes, block = parse_axes(param.pattern), None
    if env.mesh is not None and env.rules is not None and not any(axis not in env.rules for axis in axes):
        layout = layout_of(axes, table_of(param, env.rules), env.mesh.sizes)
        block = block_of(layout, param.shape, env.mesh)  # numbered axes have no rule: equal on every rank
    return stochastic_round(x.contiguous(), threefry.bits(key, param.shape, block=block))


def _is_rounded(leaf: Any) -> bool:
    return leaf.dtype == torch.float32 and len(leaf.shape) > 0


def _low(leaf: Any) -> Any:
    if not _is_rounded(leaf):
        return leaf
    return replace(leaf, dtype=torch.bfloat16) if isinstance(leaf, Param) else leaf.bfloat16()


def _declared(updates: tree.Tree, patterns: tree.Tree | None, env: Env) -> tree.Tree:
    """The parameters' declarations, global: the transformation makes those of its state from them."""
    leaves, structure = tree.flatten(updates)
    declared = [
        Param(leaf.pattern, leaf.global_shape(tuple(x.shape)), zeros, x.dtype)
        for leaf, x in zip(leaves_of("bfloat16_state", updates, patterns, env), leaves, strict=True)
    ]
    return tree.unflatten(structure, declared)
