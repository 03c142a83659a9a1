"""torch.autocast around a named op that multiplies: for the op it is `ft.precision` in autocast's dtype.

Invariant: inside such an op autocast is off, so that the op casts alike on every mesh, forward and backward. An
`ft.precision` inside the autocast wins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from functitan.sharding.context import current, using
from functitan.sharding.precision import Precision

_DEVICES = tuple(torch._C._autocast_supported_devices())  # private, as the next: tried on torch 2.13
autocast_is_on = torch._C._is_any_autocast_enabled


def in_precision(op: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """`op(*args, **kwargs)` in the precision that autocast has on the device of `x`, without autocast."""
    env = current()
    device = x.device.type if isinstance(x, Tensor) else "cpu"
    if env.precision is None and torch.is_autocast_enabled(device):
        env = env._replace(precision=Precision(torch.get_autocast_dtype(device)))
    with using(env), _autocast(dict.fromkeys(_states())):
        return op(*args, **kwargs)


def replayed(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, which runs under the autocast of this moment whenever it is called: a backward runs under none."""
    if not autocast_is_on():
        return fn
    states = _states()

    @functools.wraps(fn)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with _autocast(states):
            return fn(*args, **kwargs)

    return inside


def _states() -> dict[str, torch.dtype | None]:
    """The dtype of autocast by the devices that have it on."""
    return {device: torch.get_autocast_dtype(device) for device in _DEVICES if torch.is_autocast_enabled(device)}


@contextmanager
def _autocast(states: dict[str, torch.dtype | None]) -> Iterator[None]:
    """Autocast to a dtype on each of these devices; `None` is off."""
    with ExitStack() as stack:
        for device, dtype in states.items():
            stack.enter_context(torch.autocast(device, dtype, enabled=dtype is not None))
        yield


FIX_AUTOCAST = (
    "give the function ft.precision(fn, compute=torch.bfloat16), and call it under torch.autocast('cpu', enabled=False)"
)
