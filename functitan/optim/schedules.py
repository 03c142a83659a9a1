"""Schedules: functions from the number of steps taken to a value.

Invariant: a schedule is pure and has no branch on its step, so it may be traced: a step `[]` gives a value `[]` in
float64, on its device; a number gives a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from functitan.errors import FunctitanError, report

Schedule = Callable[[Any], Any]  # (step: int) -> float, (step: Tensor []) -> Tensor []


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return _schedule(lambda step: torch.full_like(step, value))


def linear(start: float, end: float, steps: int) -> Schedule:
    """From `start` at step 0 to `end` at step `steps`, and `end` from there on.

    >>> linear(1.0, 0.0, 4)(1), linear(1.0, 0.0, 4)(9)
    (0.75, 0.0)
    """
    _check("linear", steps=(steps, 1))
    return _schedule(lambda step: start + (end - start) * _part(step, steps))


def cosine(peak: float, total_steps: int, end: float = 0.0) -> Schedule:
    """From `peak` at step 0 to `end` at step `total_steps` along half a cosine, and `end` from there on.

    Loshchilov and Hutter, arXiv:1608.03983, without restarts.

    >>> cosine(1.0, 4, end=0.5)(2)
    0.75
    """
    _check("cosine", total_steps=(total_steps, 1))
    return _schedule(lambda step: end + (peak - end) * 0.5 * (1 + torch.cos(math.pi * _part(step, total_steps))))


def warmup_cosine(peak: float, warmup_steps: int, total_steps: int, end: float = 0.0) -> Schedule:
    """From 0 straight to `peak` at step `warmup_steps`, then `cosine` to `end` at step `total_steps`.

    >>> [warmup_cosine(1.0, 2, 6)(step) for step in (0, 1, 2, 4, 6)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    _check("warmup_cosine", warmup_steps=(warmup_steps, 0), total_steps=(total_steps, 1))
    if warmup_steps >= total_steps:
        problem = f"warmup_steps is {warmup_steps} and total_steps {total_steps}: nothing is left to fall in"
        raise FunctitanError(report("warmup_cosine", [problem], "let the warmup be a part of all steps"))
    fall = cosine(peak, total_steps - warmup_steps, end)
    return _schedule(
        lambda step: torch.where(step < warmup_steps, peak * step / max(warmup_steps, 1), fall(step - warmup_steps))
    )


def warmup_stable_decay(peak: float, warmup: int, stable: int, decay: int, end: float = 0.0) -> Schedule:
    """From 0 straight to `peak` in `warmup` steps, `peak` for `stable` steps, straight to `end` in `decay` steps.

    Hu et al., MiniCPM, arXiv:2404.06395.

    >>> [warmup_stable_decay(1.0, 2, 2, 4)(step) for step in (0, 1, 2, 4, 6, 9)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    _check("warmup_stable_decay", warmup=(warmup, 0), stable=(stable, 0), decay=(decay, 1))
    rise, fall = linear(0.0, peak, max(warmup, 1)), linear(peak, end, decay)
    return _schedule(lambda step: torch.where(step < warmup, rise(step), fall(step - warmup - stable)))


def piecewise(factors: Mapping[int, float], init: float) -> Schedule:
    """`init`, multiplied by each factor from its step on, as in `optax.piecewise_constant_schedule`.

    >>> [piecewise({2: 0.5, 5: 0.5}, 1.0)(step) for step in (0, 1, 2, 4, 5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    if not isinstance(factors, Mapping):
        problem = f"factors is a {type(factors).__name__}, not a dict from steps to factors"
        raise FunctitanError(report("piecewise", [problem], "write as in piecewise({1000: 0.1, 2000: 0.1}, 3e-4)"))
    _check("piecewise", **{f"step {step!r}": (step, 0) for step in factors})

    def at(step: Tensor) -> Tensor:
        value = torch.full_like(step, init)
        for start, factor in factors.items():
            value = torch.where(step >= start, value * factor, value)
        return value

    return _schedule(at)


def _schedule(value: Callable[[Tensor], Tensor]) -> Schedule:
    def at(step):
        if isinstance(step, Tensor):
            return value(step.to(torch.float64))
        return value(torch.tensor(step, dtype=torch.float64)).item()

    return at


def _part(step: Tensor, steps: int) -> Tensor:
    return (step / steps).clamp(0.0, 1.0)


def _check(name: str, **counts: tuple[Any, int]) -> None:
    problems = [
        f"{what} is {count!r}: it must be a whole number of at least {least}"
        for what, (count, least) in counts.items()
        if type(count) is not int or count < least
    ]
    if problems:
        raise FunctitanError(report(name, problems, "count optimizer steps, as in warmup_cosine(3e-4, 100, 10_000)"))
