"""The contract of loss functions: `(sum, count)` over the whole batch, or `((sum, count), aux)`.

Invariant: whoever uses a loss divides once, by the total count, so masks, meshes and microbatches do not change it. On
a mesh a count is a tensor: a number of Python is taken from this rank's shapes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from functitan.errors import FunctitanError, check_function, report
from functitan.sharding.env import Env
from functitan.transforms.grad import described


def check_loss(loss_fn: Any, where: str) -> None:
    """Raise `FunctitanError` for what cannot be called as a loss function is: with parameters, a batch, and a key."""
    check_function(loss_fn, where)
    try:
        taken = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # one without a signature
        return
    try:
        taken.bind(None, None, None)
    except TypeError:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        problem = f"{name}{taken} cannot be called as {name}(params, batch, key)"
        fix = "write def loss(params, batch, key), also where it draws nothing: key is what ft.random and dropout take"
        raise FunctitanError(report(f"{where}: the loss function", [problem], fix)) from None


def split_loss(out: Any, where: str, on_mesh: bool = False) -> tuple[tuple[Tensor, Any], Any]:
    """((sum, count), aux) of what a loss function gave to `where`; raises `FunctitanError` for anything else.

    With `on_mesh` a count that is no tensor is refused.

    >>> import torch
    >>> split_loss((torch.tensor(6.0), 3), "ft.train_step")
    ((tensor(6.), 3), None)
    """
    if isinstance(out, tuple) and len(out) == 2:
        pair, aux = (out, None) if isinstance(out[0], Tensor) else out
        if isinstance(pair, tuple) and len(pair) == 2 and _is_sum(pair[0]) and _is_count(pair[1]):
            if on_mesh and not isinstance(pair[1], Tensor):
                problem = f"the count is the number {pair[1]}: on a mesh x.numel() and len(x) count this rank's shard"
                raise FunctitanError(report(f"{where}: the loss function", [problem], _FIX_COUNT))
            return (pair[0], pair[1]), aux
    raise FunctitanError(report(f"{where}: the loss function", [f"it returned {_describe(out)}"], _FIX))


def is_on_mesh(env: Env) -> bool:
    """Whether other ranks have parts of the batch, or stages of the model: where what one rank counts is not all."""
    return env.mesh is not None or env.pipeline is not None


def count_of(count: Any, total: Tensor) -> Tensor:
    """A count beside its sum: `[]`, of the sum's dtype, float32 at least, and device, without a derivative."""
    dtype = torch.promote_types(total.dtype, torch.float32)  # float16 ends at 65504
    return torch.as_tensor(count, dtype=dtype, device=total.device).detach()


def divisor(count: Tensor) -> Tensor:
    """What sums are divided by: the count as it is, also below 1; infinity where it is 0, so that nothing gives 0.

    >>> torch.tensor([3.0, 3.0, 3.0]) / divisor(torch.tensor([2.0, 0.25, 0.0]))
    tensor([ 1.5000, 12.0000,  0.0000])
    """
    return torch.where(count == 0, torch.inf, count)


def _is_sum(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 0 and x.is_floating_point()


def _is_count(x: Any) -> bool:
    return x.dim() == 0 if isinstance(x, Tensor) else type(x) in (int, float) and x >= 0


def _describe(out: Any) -> str:
    if isinstance(out, tuple):
        return f"({', '.join(map(_describe, out))})"
    return repr(out) if isinstance(out, (int, float)) else described(out)


_FIX = "return (sum, count), scalars over the whole batch: (ft.reduce('batch seq ->', loss), tokens); or (those, aux)"
_FIX_COUNT = (
    "count over the whole batch: ft.count('batch mlp', y) for the elements of a tensor of that pattern, "
    "ft.reduce('batch seq ->', mask) for those that a mask keeps, torch.ones(()) where the sum is a mean already"
)
