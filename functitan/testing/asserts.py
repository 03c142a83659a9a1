"""Asserts about pytrees: closeness, shapes, number of runs. After chex's asserts.

Invariant: an `AssertionError` lists every leaf that is wrong, by its path, not the first one alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functitan import tree
from functitan.errors import report
from functitan.param import Param

# by dtype: some hundred roundings of a sum in another order
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def assert_trees_all_close(
    actual: tree.Tree, expected: tree.Tree, *, rtol: float | None = None, atol: float | None = None
) -> None:
    """Assert equal structure, shapes and dtypes, and values within `atol` + `rtol` * the leaf's largest magnitude.

    `rtol` is relative to the largest finite value of the whole expected leaf, because sums in another order err by the
    size of their terms. By default both are 1e-10 for float64, 1e-5 for float32, 2e-3 for float16, 2e-2 for bfloat16,
    and 0 for other dtypes. Infinities equal themselves, NaN equals nothing. Raises `AssertionError` that lists every
    leaf that differs, with its largest difference and where that is.

    >>> x = torch.ones(2, 2)
    >>> assert_trees_all_close({"a": x}, {"a": x + 1e-7})
    >>> assert_trees_all_close({"a": x, "b": x}, {"a": x, "b": x.triu()})
    Traceback (most recent call last):
    AssertionError: assert_trees_all_close:
      - b: 1 of 4 values differ by more than 2e-05, most by 1 at [1, 0]: 1.0 is not 0.0
    """
    problems = structure_differences(actual, expected) or leaf_differences(actual, expected, rtol, atol)
    if problems:
        raise AssertionError(report("assert_trees_all_close", problems))


def structure_differences(actual: tree.Tree, expected: tree.Tree) -> list[str]:
    """The leaves that only one of two trees has, by path; the containers, where only those differ."""
    mine, theirs = tree.paths(actual), tree.paths(expected)
    problems = [f"{_named(path)}: only in the expected tree" for path in theirs if path not in set(mine)]
    problems += [f"{_named(path)}: only in the actual tree" for path in mine if path not in set(theirs)]
    found, wanted = tree.flatten(actual)[1], tree.flatten(expected)[1]
    return problems or ([f"containers differ: {found} is not {wanted}"] if found != wanted else [])


def leaf_differences(actual: tree.Tree, expected: tree.Tree, rtol: float | None, atol: float | None) -> list[str]:
    """One line for each leaf that differs, of two trees of one structure."""
    pairs = zip(tree.paths(expected), tree.leaves(actual), tree.leaves(expected), strict=True)
    lines = ((path, _difference(x, y, rtol, atol)) for path, x, y in pairs)
    return [f"{_named(path)}: {line}" for path, line in lines if line]


def bound_of(expected: Tensor, rtol: float | None, atol: float | None) -> float:
    """The largest difference that counts as none: `atol` + `rtol` * the largest finite magnitude."""
    default = _TOLERANCES.get(expected.dtype, 0.0)
    finite = expected[expected.isfinite()].abs().to(torch.float64)
    largest = finite.max().item() if finite.numel() else 0.0
    return (default if atol is None else atol) + (default if rtol is None else rtol) * largest


def distance(actual: Tensor, expected: Tensor) -> Tensor:
    """|actual - expected|, float64, elementwise: 0 where both are the same infinity, infinite where one is NaN."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    gap = (actual.detach().to(wide) - expected.detach().to(wide)).abs().nan_to_num(math.inf, math.inf)
    gap = gap if expected.is_floating_point() or expected.is_complex() else gap.clamp_min(1.0)  # beyond 2**53, too
    return torch.where(actual == expected, 0.0, gap)


def assert_tree_shapes(values: tree.Tree, shapes: tree.Tree) -> None:
    """Assert the shape of every leaf: `shapes` is a tree or prefix of tuples of sizes, or of `Param`s.

    A size of `None` may be any, and so may the shapes of leaves whose prefix is `None`. Raises `AssertionError` that
    lists every leaf of another shape.

    >>> values = {"x": torch.ones(2, 3), "layers": [torch.ones(4), torch.ones(4)]}
    >>> assert_tree_shapes(values, {"x": (None, 3), "layers": (4,)})
    """
    spread = tree.broadcast_prefix(_as_leaves(shapes), values, "assert_tree_shapes")
    problems = []
    for path, leaf, given in zip(tree.paths(values), tree.leaves(values), spread, strict=True):
        wanted = given.shape if isinstance(given, (Param, _Shape)) else None
        shape = tuple(leaf.shape) if hasattr(leaf, "shape") else ()
        if wanted is not None and not _fits(shape, wanted):
            of = f", declared as {given!r}" if isinstance(given, Param) else ""
            problems.append(f"{_named(path)}: shape {shape} is not {tuple(wanted)}{of}")
    if problems:
        raise AssertionError(report("assert_tree_shapes", problems))


def assert_max_traces(fn: Callable[..., Any], n: int) -> Callable[..., Any]:
    """`fn`, which raises `AssertionError` when it is run more than `n` times: inside `ft.jit`, traced more often.

    >>> run = assert_max_traces(torch.sin, 1)
    >>> run(torch.zeros(()))
    tensor(0.)
    >>> run(torch.zeros(()))
    Traceback (most recent call last):
    AssertionError: assert_max_traces:
      - sin ran 2 times, at most 1 was expected
      Fix: keep shapes, dtypes and static arguments the same from call to call
    """
    name, count = getattr(fn, "__name__", repr(fn)), 0

    @functools.wraps(fn)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > n:
            problem = f"{name} ran {count} times, at most {n} {'was' if n == 1 else 'were'} expected"
            raise AssertionError(report("assert_max_traces", [problem], _FIX_TRACES))
        return fn(*args, **kwargs)

    return counted


class _Shape:
    """A shape as a leaf of a tree."""

    def __init__(self, shape: tuple[int | None, ...]) -> None:
        self.shape = shape


def _as_leaves(shapes: tree.Tree) -> tree.Tree:
    """The tree with its shapes as leaves: tuples of sizes are nodes to a pytree."""
    if isinstance(shapes, dict):
        return {key: _as_leaves(value) for key, value in shapes.items()}
    if isinstance(shapes, tuple) and not any(isinstance(n, (tuple, list, dict, Param)) for n in shapes):
        return _Shape(tuple(shapes))
    if isinstance(shapes, (tuple, list)):
        children = [_as_leaves(value) for value in shapes]
        return type(shapes)(*children) if hasattr(shapes, "_fields") else type(shapes)(children)
    return shapes


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(n is None or n == m for m, n in zip(shape, wanted, strict=True))


def _difference(actual: Any, expected: Any, rtol: float | None, atol: float | None) -> str:
    """What differs between two leaves, in one line; empty if nothing does."""
    kinds = [isinstance(x, (Tensor, int, float)) for x in (actual, expected)]
    if not all(kinds):
        return "" if type(actual) is type(expected) and actual == expected else f"{actual!r} is not {expected!r}"
    x, y = (z if isinstance(z, Tensor) else torch.tensor(z, dtype=torch.float64) for z in (actual, expected))
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        return f"{_kind(x)} is not {_kind(y)}"
    gap, bound = distance(x, y), bound_of(y, rtol, atol)
    count = int((gap > bound).sum())
    if not count:
        return ""
    at = [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)]
    values = f"{x[tuple(at)].item()!r} is not {y[tuple(at)].item()!r}"
    where = f" at {at}" if at else ""
    return f"{count} of {x.numel()} values differ by more than {bound:.3g}, most by {gap.max():.3g}{where}: {values}"


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def _named(path: str) -> str:
    return path or "value"


_FIX_TRACES = "keep shapes, dtypes and static arguments the same from call to call"
