"""Precision: the dtype that named ops compute in, and those in which sums cross ranks.

Invariant: a value of dtypes alone. Ops cast inside, on the shard, so that a cotangent has the dtype of its operand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.sharding.rules import Dims


class Precision(NamedTuple):
    """`compute`: of products; `reduce`: of sums over ranks, by mesh dim, `otherwise` where it names none."""

    compute: torch.dtype
    reduce: tuple[tuple[str, torch.dtype], ...] = ()
    otherwise: torch.dtype = torch.float32

    def reduces(self, dims: Dims, own: torch.dtype) -> torch.dtype:
        """The dtype to sum values of dtype `own` over these mesh dims in: the widest of all that are asked for."""
        asked = dict(self.reduce)
        for dim in dims:
            own = torch.promote_types(own, asked.get(dim, self.otherwise))
        return own


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating tensor in this dtype; `None` and tensors that are not floating change nothing."""
    return x.to(dtype) if dtype is not None and x.is_floating_point() else x


def narrowed(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`cast`, where that does not make the tensor larger: what is to be sent."""
    return cast(x, dtype) if dtype is not None and dtype.itemsize <= x.dtype.itemsize else x


def widened(x: Tensor, precision: Precision | None) -> Tensor:
    """Under a precision, float32 or better: for sums, which bfloat16 could not hold."""
    return x if precision is None else cast(x, torch.promote_types(x.dtype, torch.float32))


def in_compute(tensors: tuple[Any, ...], precision: Precision | None) -> tuple[Any, ...]:
    """Operands in the dtype to compute in; as they are without a precision."""
    return tensors if precision is None else tuple(cast(x, precision.compute) for x in tensors)
