"""What is no tensor among the arguments of a captured function: a program serves the values that it was made with.

Invariant: values are compared by type and value, numbers bit for bit, so that a NaN is itself; what cannot be compared
is refused before it is captured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any

from torch import Tensor

from functitan.errors import CaptureError, report

MANY = 8  # programs that differ in one value


def same(x: Any, y: Any) -> bool:
    """True if a program that was made with `y` serves `x`.

    >>> same(float("nan"), float("nan")), same(0.0, -0.0), same(1, True), same((1, "a"), (1, "a"))
    (True, False, False, True)
    """
    if type(x) is not type(y):
        return False
    if isinstance(x, Number) and not isinstance(x, int):  # of numpy, too
        return repr(x) == repr(y)
    try:
        return bool(x == y)
    except Exception:
        return False


def all_same(xs: Sequence[Any], ys: Sequence[Any]) -> bool:
    """True if a program that was made with these values serves those."""
    return all(x is y or same(x, y) for x, y in zip(xs, ys, strict=True))


def check_statics(what: str, name_of: Callable[[int], str], leaves: Sequence[Any]) -> None:
    """Raise `CaptureError` that lists every leaf that is neither a tensor nor a value that can be compared."""
    problems = [
        f"{name_of(i)} {problem}"
        for i, leaf in enumerate(leaves)
        if not isinstance(leaf, Tensor) and (problem := _problem(leaf))
    ]
    if problems:
        raise CaptureError(report(what, problems, _FIX))


def warn_of_values(
    what: str, name_of: Callable[[int], str], new: Sequence[Any], others: Sequence[Sequence[Any]]
) -> None:
    """Warn, once, of each leaf whose value in `new` is one of `MANY`, where `others` were captured before."""
    if len(others) < MANY - 1:
        return
    lines = []
    for i, value in enumerate(new):
        distinct: list[Any] = []
        for leaves in others:
            if not any(same(leaves[i], x) for x in distinct):
                distinct.append(leaves[i])
        if len(distinct) == MANY - 1 and not any(same(value, x) for x in distinct):
            lines.append(f"{name_of(i)} had {MANY} values, the last {value!r}: {MANY} programs")
    if lines:
        warnings.warn(report(what, lines, _FIX_VALUES), stacklevel=2)


def _problem(leaf: Any) -> str:
    """Why a program cannot be known by this value."""
    kind = type(leaf).__name__
    if getattr(leaf, "shape", ()) and hasattr(leaf, "__array__"):
        return f"is a {kind} of shape {tuple(leaf.shape)}, not a tensor"
    inside = leaf.values() if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {}).values()
    if not callable(leaf) and any(isinstance(x, Tensor) or hasattr(x, "__array__") for x in inside):
        return f"is a {kind}, which holds tensors or arrays and is no tree"
    return ""


_FIX = "give arrays as tensors, torch.as_tensor(x), and what holds them as a dict: dict(batch), vars(batch)"
_FIX_VALUES = (
    "give what changes from call to call as a tensor, torch.tensor(x): a program is captured and compiled for each "
    "value of what is none"
)
