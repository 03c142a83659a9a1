"""Dynamic loss scaling, so that float16 holds small cotangents.

Invariant: a scale is finite and at least the smallest one, carried by the optimizer's state, and every rank decides
alike whether a step is skipped, by one all-reduce of one flag. Nothing is read on the host.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan import tree
from functitan.capture.nodes import Capture
from functitan.errors import FunctitanError, NonFiniteError, report
from functitan.ops.function import is_batched
from functitan.optim.factors import times
from functitan.optim.finite import any_nonfinite, refuse
from functitan.optim.kernels import copied, transformed
from functitan.optim.numbers import numbers_of, telling
from functitan.optim.state import scalar_beside
from functitan.optim.transform import GradientTransformation, donating
from functitan.param import Param, constant
from functitan.sharding.context import current


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
    min_scale: float = 1.0,
    max_scale: float = 2.0**126,
) -> GradientTransformation:
    """A transformation of the gradients of `loss * state.scale`; the outermost one, so that a clip sees them unscaled.

    `ft.train_step` multiplies by the scale; a loop of one's own does so itself. Where a gradient is infinite or NaN on
    any rank, or the learning rate, updates are zero, the inner state stays, and the scale is multiplied by `backoff`;
    after `interval` good steps in a row by `growth`; it stays in [`min_scale`, `max_scale`], whose default is the
    largest with an inverse in float32. Where gradients are not finite at `min_scale`, no scale can help, and
    `ft.train_step(..., nonfinite="raise")` raises `NonFiniteError`. As `torch.amp.GradScaler`; Micikevicius et al.,
    Mixed Precision Training, 2018.

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
    problems = [f"{name} is {x}: it must be at least 1" for name, x in given.items() if not 1 <= x < math.inf]
    problems += [] if 0 < backoff <= 1 else [f"backoff is {backoff}: it must lie in (0, 1]"]
    if not 2.0**-126 <= min_scale <= init_scale <= max_scale <= 2.0**126:
        order = f"min_scale {min_scale:g}, init_scale {init_scale:g}, max_scale {max_scale:g}"
        problems += [] if problems else [f"{order}: they must ascend, within [2**-126, 2**126], where float32 is exact"]
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
        if transformed(grads):  # infinities that are not taken would have derivatives all the same
            wrong = any_nonfinite(grads)
            grads = [x.masked_fill(wrong, 0.0) for x in grads]
        else:
            wrong = None
        numbers = numbers_of(transformation, state.inner)
        beside = [torch.as_tensor(x, dtype=torch.float32, device=state.scale.device) for _, x in numbers or ()]
        changes, inner = transformation.update(tree.unflatten(structure, grads), state.inner, params, patterns=patterns)
        bad = any_nonfinite([*grads, *beside, *(tree.leaves(changes) if numbers is None else ())])
        bad = bad if wrong is None else bad | wrong
        changes = tree.map(lambda x: torch.where(bad, torch.zeros_like(x), x), changes)
        inner = tree.map(lambda old, new: torch.where(bad, old, new), state.inner, inner)
        if donate:
            leaves, inside = tree.flatten(state.inner)
            inner = tree.unflatten(inside, copied(leaves, tree.leaves(inner), donate))
        good = torch.where(bad, 0, state.good_steps + 1)
        grows = (good >= interval) & (state.scale < max_scale) & (growth > 1)  # else steps are counted on
        factor = torch.where(bad, backoff, torch.where(grows, growth, 1.0))
        scale = (state.scale * factor).clamp(min_scale, max_scale)
        return changes, LossScaleState(scale, torch.where(grows, 0, good), inner)

    numbers = lambda state: numbers_of(transformation, state.inner)
    return telling(GradientTransformation(init, update), numbers)


def judged(
    policy: str,
    tx: GradientTransformation,
    scale: Tensor,
    new: LossScaleState,
    loss: Tensor,
    grads: tree.Tree,
    step: Any,
) -> dict[str, Tensor]:
    """Metrics of an update under a loss scale that was `scale`, which leaves a state as it was where it is skipped.

    "raise": `NonFiniteError` where the update was skipped, and the scale cannot become smaller. "skip": the metric
    "skipped". "ignore", and under vmap, where there is no one value to read: nothing.
    """
    if policy == "ignore" or is_batched(scale):
        return {}
    skipped = (new.good_steps == 0) & (new.scale <= scale)
    if policy == "skip":
        return {"skipped": skipped.to(torch.int64)}
    stuck, capture = skipped & (new.scale == scale), current().find(Capture)
    if capture is not None:
        capture.failures.append((stuck, _captured))
    else:
        beside = {name: torch.as_tensor(x, device=scale.device) for name, x in numbers_of(tx, new) or []}
        refuse(stuck, loss, grads, step, beside, {}, fix="no smaller loss scale can help; ")
    return {}


def _captured() -> NonFiniteError:
    problem = "a gradient is not finite at the smallest loss scale, or the learning rate is not"
    fix = "the state is as before this step: lower the learning rate, look at the batch; nonfinite='skip' goes on"
    return NonFiniteError(report("a captured step of ft.train_step", [problem], fix))


def loss_scale(opt_state: Any) -> Tensor | None:
    """The scale `[]` to multiply the loss by, of an optimizer's state; `None` where nothing scales it."""
    return opt_state.scale if isinstance(opt_state, LossScaleState) else None
