"""The contract of loss functions: `(sum, count)` over the whole batch, or `((sum, count), aux)`.

Invariant: whoever uses a loss divides once, by the total count, so masks, meshes and microbatches do not change it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functitan.errors import FunctitanError, report
from functitan.transforms.grad import described


def split_loss(out: Any, where: str) -> tuple[tuple[Tensor, Any], Any]:
    """((sum, count), aux) of what a loss function gave to `where`; raises `FunctitanError` for anything else.

    >>> import torch
    >>> split_loss((torch.tensor(6.0), 3), "ft.train_step")
    ((tensor(6.), 3), None)
    """
    if isinstance(out, tuple) and len(out) == 2:
        pair, aux = (out, None) if isinstance(out[0], Tensor) else out
        if isinstance(pair, tuple) and len(pair) == 2 and _is_sum(pair[0]) and _is_count(pair[1]):
            return (pair[0], pair[1]), aux
    raise FunctitanError(report(f"{where}: the loss function", [f"it returned {_describe(out)}"], _FIX))


def count_of(count: Any, total: Tensor) -> Tensor:
    """A count beside its sum: `[]`, of the sum's dtype and device, without a derivative."""
    return torch.as_tensor(count, dtype=total.dtype, device=total.device).detach()


def _is_sum(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 0 and x.is_floating_point()


def _is_count(x: Any) -> bool:
    return x.dim() == 0 if isinstance(x, Tensor) else type(x) in (int, float) and x >= 0


def _describe(out: Any) -> str:
    if isinstance(out, tuple):
        return f"({', '.join(map(_describe, out))})"
    return repr(out) if isinstance(out, (int, float)) else described(out)


_FIX = "return (sum, count), scalars over the whole batch: (ft.reduce('batch seq ->', loss), tokens); or (those, aux)"
