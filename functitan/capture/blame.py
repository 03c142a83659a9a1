"""Where in the user's program something happened that a graph cannot hold: found by running it once more on fakes.

Invariant: nothing here runs unless an error is about to be raised. A line is the innermost that is neither torch's nor
functitan's.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from functitan import tree
from functitan.lines import is_users


def lines_of_writes(fn: Callable[..., Any], fakes: tuple[Tensor, ...]) -> dict[int, str]:
    """For each input that `fn` writes into: where it does so first."""
    places = {x.untyped_storage()._cdata: i for i, x in enumerate(fakes)}
    found: dict[int, str] = {}

    def see(func: Any, args: tuple[Any, ...]) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in value if isinstance(value, (list, tuple)) else [value]:
                    place = places.get(x.untyped_storage()._cdata)
                    if place is not None:
                        found.setdefault(place, _line_here())

    _watch(fn, fakes, see)
    return found


def lines_of_strangers(fn: Callable[..., Any], fakes: tuple[Tensor, ...]) -> dict[str, str]:
    """For each real tensor that `fn` uses, as text: where it does so first."""
    found: dict[str, str] = {}

    def see(func: Any, args: tuple[Any, ...]) -> None:
        if func is torch.ops.aten.lift_fresh.default:
            return  # of torch.tensor(...): a number
        for x in tree.leaves(args):
            if isinstance(x, Tensor) and not isinstance(x, FakeTensor):
                found.setdefault(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}", _line_here())

    _watch(fn, fakes, see)
    return found


def line_of_error(error: BaseException) -> str:
    """The innermost line of a traceback that is the user's."""
    return next(
        map(_written, (f for f in reversed(traceback.extract_tb(error.__traceback__)) if is_users(f.filename))), ""
    )


class _Watch(TorchDispatchMode):
    def __init__(self, see: Callable[[Any, tuple[Any, ...]], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.see(func, args)
        return func(*args, **(kwargs or {}))


def _watch(fn: Callable[..., Any], fakes: tuple[Tensor, ...], see: Callable[..., None]) -> None:
    with suppress(Exception), _Watch(see):  # the error that led here is the one to show
        fn(*fakes)


def _line_here() -> str:
    frame = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return ""
    return _written(traceback.extract_stack(frame, limit=1)[0])


def _written(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename}:{frame.lineno}: {frame.line}"
