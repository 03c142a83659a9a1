"""A ring of ranks, and the local products that run beside it.

Invariant: every rank of the group cuts its part of the axis alike.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from functitan.axes import Axes
from functitan.ops.arithmetic import Arithmetic, Value
from functitan.sharding.context import Env
from functitan.sharding.message import Label, Passing
from functitan.sharding.rules import Dims
from functitan.sharding.steps import start

Piece = tuple[int, int]  # (start, length) along an axis
_UNIT = 32  # tiles of matmuls, and blocks of float8 formats, are not cut


class Work(NamedTuple):
    """One local product: its operands, the axes of its result, and the sizes of those that it broadcasts."""

    axes: tuple[Axes, ...]
    values: tuple[Value, ...]
    result: Axes
    broadcast: tuple[tuple[str, int], ...]

    def run(self, how: Arithmetic) -> Tensor:
        """The product."""
        return how.product(self.axes, self.result, self.values, self.broadcast)

    def part(self, how: Arithmetic, axis: str, piece: Piece, given: dict[int, Value] | None = None) -> Tensor:
        """The product of a piece of an axis; `given` are values that are such a piece, by their places."""
        known = given or {}
        cut = (
            known[i] if i in known else how.narrow(value, own.index(axis), *piece) if axis in own else value
            for i, (own, value) in enumerate(zip(self.axes, self.values, strict=True))
        )
        return self._replace(values=tuple(cut)).run(how)


class Ring(NamedTuple):
    """Where a ring runs: along an axis, of which each rank of the group over `dims` has a part of `size`."""

    axis: str
    dims: Dims
    size: int
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
        assert self.env.pipelined is not None
        unit = _UNIT if self.size % _UNIT == 0 else 1
        units = self.size // unit
        count = max(1, min(self.env.pipelined.pieces, units))
        ends = [units * i // count * unit for i in range(count + 1)]
        return [(begin, end - begin) for begin, end in pairwise(ends)]

    def pass_on(self, x: Tensor) -> Callable[[], Tensor]:
        """Send to the next rank of the ring; what waits for the tensor of the one before."""
        return start("permute", x, self.dims, self.env, self.label, Passing(1))
