"""Adafactor: factored second moments, and steps in proportion to the parameters.

Invariant: `adafactor` is a chain of pieces, and equals `torch.optim.Adafactor`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functitan.errors import FunctitanError, report
from functitan.optim.clip import clip_by_block_rms
from functitan.optim.factored import scale_by_factored_rms
from functitan.optim.factors import times_each
from functitan.optim.norms import rms_in
from functitan.optim.numbers import telling
from functitan.optim.schedules import Schedule
from functitan.optim.state import aligned
from functitan.optim.transform import (
    GradientTransformation,
    Mask,
    add_decayed_weights,
    chain,
    donating,
    scale,
    scale_by_learning_rate,
)
from functitan.sharding.context import current


def adafactor(
    learning_rate: float | Schedule = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adafactor without momentum, as `torch.optim.Adafactor`: memory for rows and columns instead of Adam's moments.

    The step is `min(learning_rate, 1 / sqrt(t)) max(eps[1], rms(param))` times a direction of root mean square at most
    `d`; decay of the leaves that `mask` chooses (default: all) is decoupled, by `learning_rate`. Like torch, and unlike
    the paper, `eps[0]` (`None`: the dtype's) bounds the factored estimate, not the squares. Shazeer and Stern,
    arXiv:1804.04235.

    >>> import torch
    >>> tx, params = adafactor(0.1), {"w": torch.ones(2, 2)}
    >>> tx.update({"w": torch.full((2, 2), 3.0)}, tx.init(params), params)[0]
    {'w': tensor([[-0.1000, -0.1000],
            [-0.1000, -0.1000]])}
    """

    def capped(step: Tensor) -> Tensor:
        """What makes `learning_rate` the smaller of itself and 1 / sqrt(t)."""
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        return ((step + 1).to(torch.float64).rsqrt() / rate).clamp(max=1.0)  # a rate of 0 gives 1

    return chain(
        scale_by_factored_rms(beta2_decay, eps[0]),
        clip_by_block_rms(d),
        scale_by_param_block_rms(eps[1]),
        scale(capped),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def scale_by_param_block_rms(least: float = 1e-3) -> GradientTransformation:
    """Multiplies each leaf by the root mean square of its parameter, `least` at least.

    Shazeer and Stern, arXiv:1804.04235, section 8.
    """

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        if params is None:
            raise FunctitanError(
                report("scale_by_param_block_rms", ["params is None"], "tx.update(updates, state, params)")
            )
        aligned("scale_by_param_block_rms", updates, params=params)
        each = rms_in(current()._replace(phase="update"), "scale_by_param_block_rms", params, patterns)
        factors = [rms.clamp(min=least) for rms in each]
        return times_each("scale_by_param_block_rms", updates, factors, patterns, donate), state

    return telling(GradientTransformation(lambda params: (), update))
