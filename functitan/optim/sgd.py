"""Stochastic gradient descent with momentum.

Invariant: `sgd` equals `torch.optim.SGD` without dampening.
"""

from __future__ import annotations

from typing import NamedTuple

from functitan import tree
from functitan.errors import FunctitanError, report
from functitan.optim import kernels
from functitan.optim.numbers import telling
from functitan.optim.schedules import Schedule
from functitan.optim.state import aligned, check_number, check_state, zeros_beside
from functitan.optim.transform import GradientTransformation, chain, donating, scale_by_learning_rate


class MomentumState(NamedTuple):
    """`momentum`: a tree like the parameters."""

    momentum: tree.Tree


def sgd(
    learning_rate: float | Schedule, momentum: float | None = None, nesterov: bool = False
) -> GradientTransformation:
    """Gradient descent, with momentum where it is given, as `torch.optim.SGD`.

    >>> import torch
    >>> tx = sgd(0.1)
    >>> tx.update({"w": torch.ones(2)}, tx.init({"w": torch.ones(2)}))[0]
    {'w': tensor([-0.1000, -0.1000])}
    """
    if momentum is None and nesterov:
        raise FunctitanError(report("sgd", ["nesterov=True without momentum"], "sgd(0.1, momentum=0.9, nesterov=True)"))
    step = scale_by_learning_rate(learning_rate)
    return step if momentum is None else chain(scale_by_momentum(momentum, nesterov), step)


def scale_by_momentum(decay: float, nesterov: bool = False) -> GradientTransformation:
    """The running sum `m = decay m + g`; with `nesterov`, `g + decay m`.

    Sutskever et al., On the importance of initialization and momentum in deep learning, 2013.
    """
    check_number("scale_by_momentum", "decay", decay, below=1.0)

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        check_state("scale_by_momentum", state, MomentumState)
        grads, momentum = aligned("scale_by_momentum", updates, momentum=state.momentum)
        grads, momentum = kernels.momentum(grads, momentum, decay, nesterov, donate)
        structure = tree.flatten(updates)[1]
        return tree.unflatten(structure, grads), MomentumState(tree.unflatten(structure, momentum))

    return telling(GradientTransformation(lambda params: MomentumState(zeros_beside(params)), update))
