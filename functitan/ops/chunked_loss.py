"""Cross entropy of `x @ w` on one device, a chunk of rows at a time: statistics of rows, and gradients.

Invariant: no tensor has more than `chunk` times `vocab` elements of logits, nor do those of two chunks live at once.
Nothing here knows of meshes: `w` may be some columns of a larger matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_LEAST = 256  # rows of a chunk: fewer leave a matmul waiting for the weight


class Rows(NamedTuple):
    """Rows of `x` [rows, embed], the columns of their labels [rows], and whose label is among the columns [rows]."""

    x: Tensor
    at: Tensor
    inside: Tensor


class Cotangents(NamedTuple):
    """Of each row's logsumexp over all columns (itself the first), and of its label's logit, negated."""

    lse: Tensor
    of_lse: Tensor
    of_label: Tensor


def default_chunk(rows: int, embed: int, vocab: int) -> int:
    """As many rows as make a chunk of logits no larger than `x`, and no fewer than 256.

    Then the memory of the loss is that of its input (Hsu et al., Liger Kernel, 2024).

    >>> default_chunk(8192, 4096, 32768), default_chunk(128, 64, 32)
    (1024, 256)
    """
    return max(_LEAST, rows * embed // max(vocab, 1))


def statistics(rows: Rows, w: Tensor, chunk: int) -> Tensor:
    """Maximum, sum of exp(logit - maximum), and the label's logit, of each row: [3, rows], float32 or better.

    `w` is [embed, vocab]. The label's logit is 0 where it is not `inside`; without columns the maximum is -inf and the
    sum 0.
    """
    out = rows.x.new_zeros((3, rows.x.shape[0]), dtype=high(rows.x.dtype))
    if w.shape[1]:
        for part in _chunks(rows, chunk):
            _put_statistics(Rows._make(y[part] for y in rows), w, out[:, part])
    else:
        out[0] = -math.inf
    return out


def gradients(rows: Rows, given: Cotangents, w: Tensor, chunk: int, dx: Tensor | None, dw: Tensor | None) -> None:
    """Add d logits w^T into `dx` and x^T d logits into `dw`; what is `None` costs nothing.

    d logits = exp(logits - lse) of_lse - onehot of_label, made again for each chunk. `dw` is float32 or better: sums
    over chunks are not rounded to the dtype of `x`.
    """
    for part in _chunks(rows, chunk) if w.shape[1] else ():
        own, its = Rows._make(y[part] for y in rows), Cotangents._make(y[part] for y in given)
        _add_gradients(own, its, w, None if dx is None else dx[part], dw)


def high(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _put_statistics(rows: Rows, w: Tensor, out: Tensor) -> None:
    """One chunk's: its logits live no longer than this call."""
    logits = (rows.x @ w).to(out.dtype)
    picked, top = logits.gather(1, rows.at.unsqueeze(1)).squeeze(1), logits.amax(1)
    shift = torch.where(top.isinf(), 0.0, top)
    out[0], out[2] = top, torch.where(rows.inside, picked, 0.0)
    out[1] = logits.sub_(shift.unsqueeze(1)).exp_().sum(1)


def _add_gradients(rows: Rows, given: Cotangents, w: Tensor, dx: Tensor | None, dw: Tensor | None) -> None:
    d = (rows.x @ w).to(given.lse.dtype)
    d.sub_(given.lse.unsqueeze(1)).exp_().mul_(given.of_lse.unsqueeze(1))
    d.scatter_add_(1, rows.at.unsqueeze(1), torch.where(rows.inside, -given.of_label, 0.0).unsqueeze(1))
    d = d.to(rows.x.dtype)
    if dx is not None:
        dx.addmm_(d, w.T)
    if dw is not None and dw.dtype == d.dtype:
        dw.addmm_(rows.x.T, d)
    elif dw is not None:
        dw.add_(rows.x.T @ d)


def _chunks(rows: Rows, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, rows.x.shape[0], chunk))
