"""A ring of ranks, beside which local products run.

Invariant: every rank of the group cuts its part of the axis alike.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from functitan.ops.schedule import Piece
from functitan.sharding.env import Env
from functitan.sharding.message import Label, Passing
from functitan.sharding.rules import Dims
from functitan.sharding.steps import start

_UNIT = 32  # tiles of matmuls, and blocks of float8 formats, are not cut


class Ring(NamedTuple):
    """Where a ring runs: along an axis, of which each rank of the group over `dims` has a part of `size`."""

    axis: str
    dims: Dims
    size: int
    most: int  # pieces that a part is cut into
    env: Env
    label: Label

    @property
    def place(self) -> tuple[int, int]:
        """(number of ranks, this rank's number)."""
        assert self.env.mesh is not None
        return self.env.mesh.sizes.size(self.dims), self.env.mesh.index(self.dims)

    @property
    def pieces(self) -> list[Piece]:
        """A part cut into the pieces that travel, as even as can be: at multiples of 32, if the part is one."""
        unit = _UNIT if self.size % _UNIT == 0 else 1
        units = self.size // unit
        count = max(1, min(self.most, units))
        ends = [units * i // count * unit for i in range(count + 1)]
        return [(begin, end - begin) for begin, end in pairwise(ends)]

    def pass_on(self, x: Tensor) -> Callable[[], Tensor]:
        """Send to the next rank of the ring; what waits for the tensor of the one before."""
        return start("permute", x, self.dims, self.env, self.label, Passing(1))
