"""Lion: the sign of an interpolated momentum.

Invariant: each element of a direction is -1, 0 or 1, and the state is one moment, half of Adam's.
"""

from __future__ import annotations

from typing import NamedTuple

from functitan import tree
from functitan.errors import FunctitanError, report
from functitan.optim import kernels
from functitan.optim.numbers import telling
from functitan.optim.schedules import Schedule
from functitan.optim.state import aligned, check_real, check_state, zeros_beside
from functitan.optim.transform import (
    GradientTransformation,
    Mask,
    add_decayed_weights,
    chain,
    donating,
    scale_by_learning_rate,
)


class LionState(NamedTuple):
    """`mu`, the moment: a tree like the parameters."""

    mu: tree.Tree


def lion(
    learning_rate: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Lion with decoupled weight decay of the leaves that `mask` chooses (default: all).

    Its learning rate is 3 to 10 times smaller than AdamW's, its decay as much larger. Chen et al., arXiv:2302.06675.

    >>> import torch
    >>> tx, params = lion(0.1), {"w": torch.ones(2)}
    >>> tx.update({"w": torch.tensor([3.0, -0.5])}, tx.init(params), params)[0]
    {'w': tensor([-0.1000,  0.1000])}
    """
    return chain(scale_by_lion(b1, b2), add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))


def scale_by_lion(b1: float = 0.9, b2: float = 0.99) -> GradientTransformation:
    """From gradients to Lion's direction `sign(b1 mu + (1 - b1) g)`; then `mu = b2 mu + (1 - b2) g`.

    The moment has the parameters' dtypes.
    """
    problems = [f"{name} is {b}: it must lie in [0, 1)" for name, b in (("b1", b1), ("b2", b2)) if not 0 <= b < 1]
    if problems:
        raise FunctitanError(report("scale_by_lion", problems, "usual are b1=0.9, b2=0.99"))

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        check_state("scale_by_lion", state, LionState)
        grads, mu = aligned("scale_by_lion", updates, mu=state.mu)
        grads, mu = kernels.lion(grads, mu, b1, b2, donate)
        structure = tree.flatten(updates)[1]
        return tree.unflatten(structure, grads), LionState(tree.unflatten(structure, mu))

    def init(params: tree.Tree) -> LionState:
        check_real("scale_by_lion", params)
        return LionState(zeros_beside(params))

    return telling(GradientTransformation(init, update))
