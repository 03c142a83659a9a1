"""The labels of losses: whether they are in the vocabulary, and in whose part of it.

Invariant: a label outside the vocabulary never gives a finite loss: an error where its value can be read at once, on
the CPU, and NaN elsewhere, since reading it would make the device wait.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from functitan.errors import FunctitanError, report
from functitan.ops.function import peeled
from functitan.sharding.env import Env
from functitan.sharding.message import Label

IGNORE = -100
_SHOWN = 5  # labels that an error lists


def check_labels(labels: Tensor, vocab: int, ignore_index: int, env: Env, label: Label) -> None:
    """Raise `FunctitanError` for labels outside the vocabulary, where they are real values on the CPU."""
    values = peeled(labels)
    planned = env.mesh is not None and not env.mesh.transport.has_values
    if planned or type(values) is not Tensor or values.device.type != "cpu" or not values.numel():
        return
    least, most = values.aminmax()
    if least.item() >= 0 and most.item() < vocab:
        return
    bad = values[outside(values, vocab, ignore_index)]
    if bad.numel():
        kinds = bad.unique().tolist()
        more = ", ..." if len(kinds) > _SHOWN else ""
        problem = (
            f"{bad.numel()} of {values.numel()} labels here are neither in the vocabulary, 0 to {vocab - 1}, nor "
            f"ignore_index={ignore_index}: {', '.join(map(str, kinds[:_SHOWN]))}{more}"
        )
        raise FunctitanError(report(f"{label.op}({label.pattern!r})", [problem], _FIX))


def outside(labels: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Which labels count and are not in the vocabulary."""
    return ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)


def poisoned(lse: Tensor, labels: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """The logsumexp of rows, NaN where the label is outside the vocabulary: so are the row's loss and gradient."""
    return torch.where(outside(labels, vocab, ignore_index), math.nan, lse)


def own_labels(labels: Tensor, first: int, size: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels as indices into the part of the vocabulary from `first` on, and which of those that count are in it."""
    at = labels - first
    inside = (at >= 0) & (at < size) & (labels != ignore_index)
    return torch.where(inside, at, 0), inside


_FIX = "labels are global indices into the vocabulary; rows that do not count have ignore_index as label"
