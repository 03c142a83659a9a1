"""The order of tokens, for named ops that know positions: along one axis data may lie as `ft.zigzag` puts it.

Invariant: in a pattern the axis that `ft.context_parallel` orders lies in that order, and every other axis in the order
of positions. So positions are looked up through slots, and a tensor whose axis is renamed is put in its new order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functitan.axes import Axes
from functitan.ops.contraction import move
from functitan.ops.types import Type, layout_here
from functitan.sharding.env import Env
from functitan.sharding.layout import Layout
from functitan.sharding.message import Label
from functitan.sharding.sequence import positions_of, runs


def zigzag_ranks(axis: str, env: Env) -> int:
    """Over how many ranks an axis lies zigzag; 1 where it lies in the order of positions."""
    return 1 if env.mesh is None else env.sequence.ranks(axis, env.mesh.sizes)


def slots_of(positions: Tensor, ranks: int, length: int) -> Tensor:
    """Where in an axis of this global length, which lies zigzag over `ranks`, these positions are.

    What is no position stays as it is.

    >>> slots_of(torch.tensor([0, 1, 7, 8]), 2, 8)
    tensor([0, 1, 3, 8])
    """
    if ranks == 1:
        return positions
    slots = positions_of(runs(length, ranks, 0, length), positions.device).argsort()
    inside = (positions >= 0) & (positions < length)
    return torch.where(inside, slots[torch.where(inside, positions, 0)], positions)


def reordered(x: Tensor, at: int, before: int, after: int) -> Tensor:
    """A tensor whose whole dimension `at` lies zigzag over `before` ranks, put in the order over `after`.

    >>> reordered(torch.tensor([0, 1, 6, 7, 2, 3, 4, 5]), 0, 2, 1)
    tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    for ranks, inverse in ((before, True), (after, False)):
        if before != after and ranks > 1:
            held = positions_of(runs(x.shape[at], ranks, 0, x.shape[at]), x.device)
            x = x.index_select(at, held.argsort() if inverse else held)
    return x


def renamed(axes: Axes, names: Axes, x: Tensor, env: Env, label: Label) -> Tensor:
    """The tensor where `names` would lie, in their order. Transpose: the move back."""
    changes = [
        (at, *(zigzag_ranks(name, env) for name in pair))
        for at, pair in enumerate(zip(axes, names, strict=True))
        if pair[0] != pair[1]
    ]
    changes = [(at, before, after) for at, before, after in changes if before != after]
    now, then = Type(axes), Type(axes, lookup=names)
    if changes:
        there = with_whole(axes, {axes[at] for at, *_ in changes}, x, env)
        x, now = move(now, there, x, env, label), there
        for change in changes:
            x = reordered(x, *change)
    return move(now, then, x, env, label)


def with_whole(axes: Axes, whole: set[str], x: Tensor, env: Env) -> Type:
    """The type of a tensor that lies as its pattern says, but for these axes, which are whole."""
    full = layout_here(axes, x, env)
    dims = (() if axis in whole else own for axis, own in zip(full.axes, full.dims, strict=True))
    return Type(axes, layout=Layout(full.axes, tuple(dims)))
