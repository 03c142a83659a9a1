"""The order of a sequence's tokens over ranks, and how attention is to meet a sequence that is sharded.

Invariant: a token lies in a slot, and belongs at a position; the order of slots is a static value, so which positions a
rank holds is known without communication and without reading a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from functitan.errors import LayoutError, report
from functitan.sharding.mesh import Mesh, MeshSizes
from functitan.sharding.rules import Dims

METHODS = ("ring", "all_gather", "all_to_all")
Methods = tuple[tuple[str, str], ...]  # (mesh dim, method), for those that are fixed


class Run(NamedTuple):
    """Slots side by side that hold positions side by side: the first position, and how many."""

    first: int
    size: int


Runs = tuple[Run, ...]  # in the order of slots


class Sequence(NamedTuple):
    """What `ft.context_parallel` fixes: a method for all mesh dims or for some, and the order of one axis's tokens.

    `zigzag` names the mesh dims over whose n ranks blocks lie head to tail: of 2n blocks rank i has the i-th from the
    front and the i-th from the back. Without it slots are positions.
    """

    method: str | None = None  # of every mesh dim; `None`: the cost rule's
    methods: Methods = ()
    axis: str = "seq"
    zigzag: Dims = ()

    def ranks(self, axis: str, mesh: MeshSizes) -> int:
        """Over how many ranks an axis lies zigzag; 1 where its slots are its positions."""
        return mesh.size(self.zigzag) if axis == self.axis else 1

    def held(self, axis: str, size: int, dims: Dims, mesh: Mesh, rank: int | None = None) -> Runs:
        """The positions of a shard of `size` slots over `dims`: this rank's, or that of a number in its group."""
        at = mesh.index(dims) if rank is None else rank
        return runs(size * mesh.sizes.size(dims), self.ranks(axis, mesh.sizes), at * size, size)


DEFAULT = Sequence()


@lru_cache(maxsize=2**12)  # lengths may vary without end
def runs(length: int, ranks: int, first: int, size: int) -> Runs:
    """The positions in the slots `first` ... `first + size` of a sequence that lies zigzag over `ranks`.

    Raises `LayoutError` for a length that 2 * ranks does not divide.

    >>> runs(8, 2, 0, 4), runs(8, 2, 4, 4)
    ((Run(first=0, size=2), Run(first=6, size=2)), (Run(first=2, size=4),))
    """
    if ranks == 1:
        return (Run(first, size),)
    check_zigzag("zigzag", [("the sequence", length)], ranks)
    block, found = length // (2 * ranks), []
    for number in range(first // block, -(-(first + size) // block)):
        begin, end = max(first, number * block), min(first + size, (number + 1) * block)
        position = (2 * ranks - 1 - number // 2 if number % 2 else number // 2) * block + begin - number * block
        if found and found[-1].first + found[-1].size == position:
            found[-1] = Run(found[-1].first, found[-1].size + end - begin)
        else:
            found.append(Run(position, end - begin))
    return tuple(found)


def positions_of(held: Runs, device: torch.device | None = None) -> Tensor:
    """Runs as a tensor of positions, int64."""
    rows = [torch.arange(run.first, run.first + run.size, device=device) for run in held]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def check_zigzag(what: str, lengths: Iterable[tuple[str, int]], ranks: int) -> None:
    """Raise `LayoutError` that lists the lengths which do not split into two equal blocks for each rank."""
    n = 2 * ranks
    problems = [
        f"{name} has {length} positions, which do not split into {n} equal blocks, two for each of {ranks} ranks; "
        f"{length // n * n or n} or {(length // n + 1) * n} would"
        for name, length in lengths
        if length % n
    ]
    if problems:
        raise LayoutError(report(what, problems, "pad or cut the sequence, or keep the contiguous order"))
