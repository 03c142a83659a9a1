"""The transport of shapes alone: what `ft.explain`, and whoever asks what a function would give, send messages by.

Invariant: nothing is sent, and a result has the shape and dtype that it would have. Tensors are fake, or on "meta".
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from functitan.sharding.mesh import Transport, Wait
from functitan.sharding.message import Message


def shapes_only() -> Transport:
    """A transport that gives empty results, for fake tensors."""
    return Transport(_start, lambda program, wait=True, everyone=False: None, has_values=False)


def shape_of_result(collective: str, x: Tensor, ranks: int) -> Tensor:
    """An empty result of a collective of so many ranks, each of which gives a tensor of the shape of `x`.

    >>> import torch
    >>> shape_of_result("all_gather", torch.empty(3, device="meta"), 4).shape
    torch.Size([4, 3])
    """
    if collective == "all_gather":
        return x.new_empty((ranks, *x.shape))
    if collective == "reduce_scatter":
        return x.new_empty(x.shape[1:])
    return x.new_empty(x.shape)


def _start(message: Message, x: Tensor) -> Wait:
    return partial(shape_of_result, message.collective, x, message.ranks)
