"""Adam and AdamW.

Invariant: `adamw` is a chain of three pieces, and equals `torch.optim.AdamW`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from functitan import tree
from functitan.errors import FunctitanError, report
from functitan.optim.kernels import adam
from functitan.optim.numbers import telling
from functitan.optim.schedules import Schedule
from functitan.optim.state import aligned, check_real, check_state, scalar_beside, zeros_beside
from functitan.optim.transform import (
    GradientTransformation,
    Mask,
    add_decayed_weights,
    chain,
    donating,
    scale_by_learning_rate,
)


class AdamState(NamedTuple):
    """`count` `[]` int64, the steps taken; `mu` and `nu`, the moments: trees like the parameters."""

    count: Any
    mu: tree.Tree
    nu: tree.Tree


def adamw(
    learning_rate: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam with decoupled weight decay of the leaves that `mask` chooses (default: all), as `torch.optim.AdamW`.

    Loshchilov and Hutter, arXiv:1711.05101.

    >>> import torch
    >>> tx = adamw(0.1, weight_decay=0.0)
    >>> params = {"w": torch.ones(2)}
    >>> updates, state = tx.update({"w": torch.tensor([3.0, -3.0])}, tx.init(params), params)
    >>> updates
    {'w': tensor([-0.1000,  0.1000])}
    """
    return chain(
        scale_by_adam(b1, b2, eps), add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate)
    )


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> GradientTransformation:
    """From gradients to Adam's direction: `mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps)`.

    The moments have the parameters' dtypes, the arithmetic float32 at least; complex parameters are refused by `init`.
    Kingma and Ba, arXiv:1412.6980.
    """
    problems = [f"{name} is {b}: it must lie in [0, 1)" for name, b in (("b1", b1), ("b2", b2)) if not 0 <= b < 1]
    problems += [f"eps is {eps}: it must not be negative"] if eps < 0 else []
    if problems:
        raise FunctitanError(report("scale_by_adam", problems, "usual are b1=0.9, b2=0.95 or 0.999, eps=1e-8"))

    def init(params: tree.Tree) -> AdamState:
        check_real("scale_by_adam", params)
        return AdamState(scalar_beside(params, torch.int64), zeros_beside(params), zeros_beside(params))

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        check_state("scale_by_adam", state, AdamState)
        grads, *of_state = aligned("scale_by_adam", updates, mu=state.mu, nu=state.nu)
        moments, seconds = of_state
        count = state.count + 1
        structure = tree.flatten(updates)[1]
        made = adam(grads, moments, seconds, count, b1, b2, eps, donate)
        updates, mu, nu = (tree.unflatten(structure, xs) for xs in made)
        return updates, AdamState(count, mu, nu)

    made = GradientTransformation(init, update)
    return telling(made) if eps > 0 else made  # without eps a gradient of 0 is divided by 0
