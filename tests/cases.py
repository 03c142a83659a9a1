"""An op with its oracle, on tensors whose patterns, sizes, rules and mesh are known: what the laws of ops are about.

Cases are closed under derivatives and vmap: `vjp_of`, `jvp_of`, `hvp_of` and `batched` turn one case into another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

import functitan as ft
from functitan.axes import parse_axes, write_axes
from functitan.testing.sharded import assert_close, sharded


class Arg(NamedTuple):
    """One operand: floats, or integers below `high`."""

    pattern: str
    high: int | None = None


class Case(NamedTuple):
    """An op on tensors and its oracle, both from a tuple of tensors to a tuple of tensors."""

    fn: Callable
    oracle: Callable
    args: tuple[Arg, ...]
    results: tuple[str, ...]
    sizes: dict[str, int]
    mesh: dict[str, int]
    rules: ft.AxisRules
    common: tuple[int, ...] = ()  # operands that every result depends on

    @property
    def floats(self) -> list[int]:
        return [i for i, arg in enumerate(self.args) if arg.high is None]


def check(case: Case, seed: int) -> None:
    """Assert that on the case's mesh every rank gets the oracle's values."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for pattern, high in case.args:
        shape = [case.sizes[axis] for axis in parse_axes(pattern)]
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        values.append(x if high is None else torch.randint(0, high, shape, generator=generator))
    run = sharded(case.fn, tuple(arg.pattern for arg in case.args), case.results, mesh=case.mesh, rules=case.rules)
    # float64 sums of up to 2**17 products in another order: 1e-10 of the magnitude leaves three digits
    assert_close(run(*values), tuple(case.oracle(*values)))


def _of_floats(case: Case, fn: Callable, tensors: tuple) -> tuple[Callable, list, tuple]:
    """fn of its float operands alone, these operands, and the tensors that follow the operands."""
    given, more = list(tensors[: len(case.args)]), tensors[len(case.args) :]

    def of_floats(*xs):
        full = dict(enumerate(given)) | dict(zip(case.floats, xs, strict=True))
        return tuple(fn(*full.values()))

    return of_floats, [given[i] for i in case.floats], more


def vjp_of(case: Case) -> Case:
    """The cotangents of the float operands, of random cotangents of the results."""

    def pull(fn, *tensors):
        of_floats, xs, cotangents = _of_floats(case, fn, tensors)
        return torch.func.vjp(of_floats, *xs)[1](cotangents)

    return case._replace(
        fn=lambda *xs: pull(case.fn, *xs),
        oracle=lambda *xs: pull(case.oracle, *xs),
        args=case.args + tuple(map(Arg, case.results)),
        results=tuple(case.args[i].pattern for i in case.floats),
        common=(len(case.args),) if len(case.results) == 1 else (),
    )


def jvp_of(case: Case) -> Case:
    """The tangents of the results, of random tangents of the float operands; true forward mode is the oracle."""

    def push(jvp, fn, *tensors):
        of_floats, xs, tangents = _of_floats(case, fn, tensors)
        return jvp(of_floats, tuple(xs), tangents)[1]

    return case._replace(
        fn=lambda *xs: push(ft.jvp, case.fn, *xs),
        oracle=lambda *xs: push(torch.func.jvp, case.oracle, *xs),
        args=case.args + tuple(case.args[i] for i in case.floats),
    )


def hvp_of(case: Case) -> Case:
    """The Hessian of the sum of sin(results), times random directions; forward over reverse is the oracle."""

    def ours(*tensors):
        of_floats, xs, directions = _of_floats(case, case.fn, tensors)

        def loss(xs):
            sums = [ft.reduce(f"{p} ->", y.sin()) for p, y in zip(case.results, of_floats(*xs), strict=True)]
            return sum(sums[1:], sums[0])

        return ft.hvp(loss, (tuple(xs),), (directions,))

    def oracle(*tensors):
        of_floats, xs, directions = _of_floats(case, case.oracle, tensors)
        gradient = torch.func.grad(lambda *xs: sum(y.sin().sum() for y in of_floats(*xs)), tuple(range(len(xs))))
        return torch.func.jvp(gradient, tuple(xs), directions)[1]

    args = case.args + tuple(case.args[i] for i in case.floats)
    return case._replace(fn=ours, oracle=oracle, args=args, results=tuple(case.args[i].pattern for i in case.floats))


def batched(case: Case, axis: str, places: list[int | None], vmap: Callable) -> Case:
    """The case for each position of `axis`, which stands at `places` of the operands; a for-loop is the oracle."""

    def loop(*values):
        rows = [
            case.oracle(*(x if at is None else x.select(at, i) for x, at in zip(values, places, strict=True)))
            for i in range(case.sizes[axis])
        ]
        return tuple(map(torch.stack, zip(*rows, strict=True)))

    def with_axis(arg: Arg, at: int | None) -> Arg:
        names = parse_axes(arg.pattern)
        return arg if at is None else arg._replace(pattern=write_axes((*names[:at], axis, *names[at:])))

    return case._replace(
        fn=vmap(case.fn, tuple(places)),
        oracle=loop,
        args=tuple(with_axis(arg, at) for arg, at in zip(case.args, places, strict=True)),
        results=tuple(f"{axis} {pattern}".strip() for pattern in case.results),
    )
