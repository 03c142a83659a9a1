"""Dynamic loss scaling, so that float16 holds small cotangents.

Invariant: a scale is a power of `growth` and `backoff` carried by the optimizer's state, and every rank decides alike
whether a step is skipped, by one all-reduce of one flag. Nothing is read on the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan import tree
from functitan.errors import FunctitanError, report
from functitan.optim.factors import times
from functitan.optim.finite import any_nonfinite
from functitan.optim.kernels import copied, transformed
from functitan.optim.state import scalar_beside
from functitan.optim.transform import GradientTransformation, donating
from functitan.param import Param, constant


class LossScaleState(NamedTuple):
    """`scale` `[]` float32; `good_steps` `[]` int64, since it changed last; `inner`, the wrapped state."""

    scale: Any
    good_steps: Any
    inner: Any


def dynamic_loss_scale(
    transformation: GradientTransformation,
    init_scale: float = 2.0**16,
    growth: float = 2.0,
    backoff: float = 0.5,
    interval: int = 2000,
) -> GradientTransformation:
    """A transformation of the gradients of `loss * state.scale`; the outermost one, so that a clip sees them unscaled.

    `ft.train_step` multiplies by the scale; a loop of one's own does so itself. Where a gradient is infinite or NaN on
    any rank, updates are zero, the inner state stays, and the scale is multiplied by `backoff`; after `interval` good
    steps in a row by `growth`. As `torch.amp.GradScaler`; Micikevicius et al., Mixed Precision Training, 2018.

    >>> from functitan.optim.sgd import sgd
    >>> params = {"w": torch.ones(1)}
    >>> tx = dynamic_loss_scale(sgd(1.0), init_scale=4.0)
    >>> updates, state = tx.update({"w": torch.tensor([8.0])}, tx.init(params), params)
    >>> updates["w"], state.scale
    (tensor([-2.]), tensor(4.))
    >>> updates, state = tx.update({"w": torch.tensor([torch.inf])}, state, params)
    >>> updates["w"], state.scale
    (tensor([0.]), tensor(2.))
    """
    given = {"init_scale": init_scale, "growth": growth, "interval": interval}
    problems = [f"{name} is {x}: it must be at least 1" for name, x in given.items() if not x >= 1]
    problems += [] if 0 < backoff <= 1 else [f"backoff is {backoff}: it must lie in (0, 1]"]
    if problems:
        fix = "usual are init_scale=2**16, growth=2, backoff=0.5, interval=2000"
        raise FunctitanError(report("dynamic_loss_scale", problems, fix))

    def init(params: tree.Tree) -> LossScaleState:
        scale = scalar_beside(params, torch.float32)
        scale = Param("", (), constant(init_scale)) if isinstance(scale, Param) else scale + init_scale
        return LossScaleState(scale, scalar_beside(params, torch.int64), transformation.init(params))

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        updates = times("dynamic_loss_scale", updates, 1 / state.scale, patterns, donate)
        grads, structure = tree.flatten(updates)
        bad = any_nonfinite(grads)
        if transformed(grads):  # infinities that are not taken would have derivatives all the same
            grads = [x.masked_fill(bad, 0.0) for x in grads]
        changes, inner = transformation.update(tree.unflatten(structure, grads), state.inner, params, patterns=patterns)
        changes = tree.map(lambda x: torch.where(bad, torch.zeros_like(x), x), changes)
        inner = tree.map(lambda old, new: torch.where(bad, old, new), state.inner, inner)
        if donate:
            leaves, inside = tree.flatten(state.inner)
            inner = tree.unflatten(inside, copied(leaves, tree.leaves(inner), donate))
        good = torch.where(bad, 0, state.good_steps + 1)
        grows = good == interval
        factor = torch.where(bad, backoff, torch.where(grows, growth, 1.0))
        return changes, LossScaleState(state.scale * factor, torch.where(grows, 0, good), inner)

    return GradientTransformation(init, update)


def loss_scale(opt_state: Any) -> Tensor | None:
    """The scale `[]` to multiply the loss by, of an optimizer's state; `None` where nothing scales it."""
    return opt_state.scale if isinstance(opt_state, LossScaleState) else None
