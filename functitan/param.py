"""Declarations of parameters: a pattern, a global shape, and how it begins.

Invariant: a `Param` is a leaf, and allocates nothing; equal arguments make equal ones. An initializer makes any block
of the global value alone, the same bits whoever asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from functitan import threefry
from functitan.axes import parse_axes
from functitan.errors import PatternError, nearest, report

Block = tuple[slice, ...] | None
Initializer = Callable[[Tensor, "Param", Block], Tensor]  # (key, declaration, block of the global value) -> the block


@dataclass(frozen=True)
class Param:
    """One parameter: the pattern names its axes, `shape` is global, `init` makes its first value (default: by fan-in).

    `rules` is the `ft.AxisRules` table that it is stored under, where that is not the program's: `optim.stored`.
    `pp` lists the places along the mesh dim `pp` that have it, where not all of them do; the first owns it.
    With `trainable=False` it is frozen: no gradient, optimizer state, or decay; `ft.trainable` says so of many.

    >>> Param("embed mlp", (256, 768))
    Param('embed mlp', (256, 768))
    """

    pattern: str
    shape: tuple[int, ...]
    init: Initializer = field(default_factory=lambda: fan_in())
    dtype: torch.dtype = torch.float32
    rules: Any = None  # tables belong to a layer above this one
    pp: tuple[int, ...] | None = None
    trainable: bool = True

    @property
    def owner(self) -> int:
        """The place along `pp` that counts it in norms, and writes it: every leaf has one, whoever else has a copy."""
        return 0 if self.pp is None else self.pp[0]

    def __post_init__(self) -> None:
        names, problems = parse_axes(self.pattern), []
        if isinstance(self.shape, Iterable):
            object.__setattr__(self, "shape", tuple(self.shape))
            if len(names) != len(self.shape):
                problems.append(f"the pattern names {len(names)} axes, the shape has {len(self.shape)}: {self.shape}")
            problems += [
                f"{n!r} is not a size: a whole number of at least 1" for n in self.shape if type(n) is not int or n < 1
            ]
        else:
            problems.append(f"the shape is {self.shape!r}, not a tuple of sizes")
        if not callable(self.init):
            problems.append(f"init is {self.init!r}, not a function such as ft.param.normal(0.02)")
        if isinstance(self.init, _Begins) and self.init.make is _fan_in:
            problems += [
                f"init is fan_in of {axis!r}{nearest(str(axis), names)}, which the pattern does not name"
                for axis in self.init.given
                if axis not in names
            ]
        if not isinstance(self.dtype, torch.dtype):
            problems.append(f"dtype is {self.dtype!r}, not a dtype of torch")
        if not isinstance(self.trainable, bool):
            problems.append(f"trainable is {self.trainable!r}, not True or False, which freezes it")
        if problems:
            fix = "write as in ft.Param('embed mlp', (256, 768)): one size for each name, in order"
            raise PatternError(report(f"Param({self.pattern!r}, {self.shape!r})", problems, fix))

    def __repr__(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f", dtype={self.dtype}"
        frozen = "" if self.trainable else ", trainable=False"
        return f"Param({self.pattern!r}, {self.shape}{dtype}{frozen})"


@dataclass(frozen=True)
class _Begins:
    """An initializer as a value: those of one function and equal numbers are equal, and so are declarations."""

    make: Callable[..., Tensor]
    given: tuple[Any, ...]

    def __call__(self, key: Tensor, param: Param, block: Block) -> Tensor:
        return self.make(key, param, block, *self.given)


def normal(std: float) -> Initializer:
    """Normal values of mean 0.

    >>> normal(0.02) == normal(0.02), normal(0.02) == normal(0.01)
    (True, False)
    """
    return _Begins(_normal, (std,))


def uniform(low: float, high: float) -> Initializer:
    """Uniform values in [low, high)."""
    return _Begins(_uniform, (low, high))


def constant(value: float) -> Initializer:
    """One value everywhere."""
    return _Begins(_constant, (value,))


def fan_in(*axes: str) -> Initializer:
    """Normal values with variance 1 / (product of the sizes of `axes`), by default of all axes but the last.

    LeCun et al., Efficient BackProp, 1998.
    """
    return _Begins(_fan_in, axes)


def _normal(key: Tensor, param: Param, block: Block, std: float) -> Tensor:
    return threefry.normal(key, param.shape, dtype=param.dtype, block=block).mul_(std)


def _uniform(key: Tensor, param: Param, block: Block, low: float, high: float) -> Tensor:
    return threefry.uniform(key, param.shape, low=low, high=high, dtype=param.dtype, block=block)


def _constant(key: Tensor, param: Param, block: Block, value: float) -> Tensor:
    shape = param.shape if block is None else tuple(part.stop - part.start for part in block)
    return torch.full(shape, value, dtype=param.dtype, device=key.device)


def _fan_in(key: Tensor, param: Param, block: Block, *axes: str) -> Tensor:
    sizes = dict(zip(parse_axes(param.pattern), param.shape, strict=True))
    names = axes or tuple(sizes)[:-1] or tuple(sizes)
    return _normal(key, param, block, math.prod(sizes[axis] for axis in names) ** -0.5)


zeros, ones = constant(0.0), constant(1.0)
