"""What a function reaches by other ways than its arguments: tensors, and random generators.

Invariant: nothing is run. Cells, defaults, partial arguments, bound objects and the functions among them are looked
through; globals are not, but for generators, and modules of them, that the function's own code names.
"""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from functitan import tree
from functitan.errors import LayoutError, report
from functitan.ops.function import is_differentiated
from functitan.sharding.cut import cut_of
from functitan.sharding.rules import Dims

GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)


def closed_over(fn: Any) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of each tensor in `fn` that autograd or a torch.func transform tracks."""
    tensors = ((path, x) for path, x in _within(fn, "", set()) if isinstance(x, Tensor))
    return ((path, x) for path, x in tensors if is_differentiated(x))


def closure_problems(fn: Any) -> list[str]:
    """What is wrong with a function that runs below all transforms: each tensor that would get no gradient."""
    return problems_and_generators(fn)[0]


def problems_and_generators(fn: Any) -> tuple[list[str], list[Any]]:
    """The same, and the random generators that the function reaches, other than torch's own."""
    problems, generators = [], {}
    for path, x in _within(fn, "", set()):
        if not isinstance(x, Tensor):
            generators[id(x)] = x
        elif is_differentiated(x):
            what = f"a tensor {tuple(x.shape)} that is differentiated and would get no gradient"
            problems.append(f"it closes over {path}, {what}")
    return problems, list(generators.values())


def refuse_shards_of(fn: Any, dims: Dims, what: str) -> None:
    """Raise `LayoutError` for shards over these mesh dims in `fn`, the program of one replica: they lie whole there."""
    tensors = ((path, x) for path, x in _within(fn, "", set()) if isinstance(x, Tensor))
    cuts = ((path, cut) for path, x in tensors if (cut := cut_of(x)) is not None)
    over = lambda layout: any(dim in dims for its in layout.dims for dim in its)
    problems = [f"it closes over {path}, a shard, {cut}" for path, cut in cuts if over(cut.layout)]
    if problems:
        fix = (
            "put it among the parameters, and freeze it there: ft.trainable(declarations, globs of what is trained); "
            "what all examples share but is no parameter may be whole: ft.unshard(x, pattern, mesh=, rules=)"
        )
        raise LayoutError(report(f"{what}, whose replicas have what is closed over whole", problems, fix))


def _within(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(value) in seen or isinstance(value, (type, types.ModuleType)):
        return
    seen.add(id(value))
    if isinstance(value, GENERATORS):
        yield path, value
        return
    if isinstance(value, types.FunctionType):
        yield from ((path, found) for found in _named(value))
    if isinstance(value, Tensor):
        yield repr(path), value
        return
    for name, part in _parts(value):
        own = f"{path}.{name}" if path else name
        names, leaves = tree.paths(part), tree.leaves(part)
        for below, leaf in zip(names, leaves, strict=True):
            yield from _within(leaf, f"{own}.{below}" if below else own, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("__self__", value.__self__), ("__func__", value.__func__))
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            if cell != types.CellType():  # an empty one
                yield name, cell.cell_contents
        yield from (("__defaults__", value.__defaults__), ("__kwdefaults__", value.__kwdefaults__))
    elif isinstance(value, nn.Module):
        yield from value.named_parameters()
        for name, part in value.named_modules():
            yield from ((f"{name}.{own}", x) for own, x in vars(part).items() if isinstance(x, GENERATORS))
    elif callable(value) and hasattr(value, "__dict__"):
        yield from vars(value).items()


def _named(fn: types.FunctionType) -> Iterator[Any]:
    """The generators that the function's code names among globals, by themselves, by a method, or by their module."""
    for name in _names(fn.__code__):
        value = fn.__globals__.get(name)
        if value is random:
            yield random.random.__self__  # type: ignore[attr-defined]
        elif value is np or value is np.random:
            yield np.random.rand.__self__  # type: ignore[attr-defined]
        elif isinstance(owner := getattr(value, "__self__", value), GENERATORS):
            yield owner


@functools.lru_cache(maxsize=2**12)
def _names(code: types.CodeType) -> frozenset[str]:
    inner = (_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return frozenset(code.co_names).union(*inner)
