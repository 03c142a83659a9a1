"""What a function closes over: differentiated tensors that it reaches by other ways than its arguments.

Invariant: nothing is run. Cells, defaults, partial arguments, bound objects and the functions among them are looked
through; globals are not.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from functitan import tree
from functitan.ops.function import is_differentiated


def closed_over(fn: Any) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of each tensor in `fn` that autograd or a torch.func transform tracks."""
    yield from _within(fn, "", set())


def closure_problems(fn: Any) -> list[str]:
    """What is wrong with a function that runs below all transforms: each tensor that would get no gradient."""
    return [
        f"it closes over {path}, a tensor {tuple(x.shape)} that is differentiated and would get no gradient"
        for path, x in closed_over(fn)
    ]


def _within(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if id(value) in seen or isinstance(value, (type, types.ModuleType)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if is_differentiated(value):
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
    elif callable(value) and hasattr(value, "__dict__"):
        yield from vars(value).items()
