"""`ft.vmap`: `torch.func.vmap` over an axis that has a name.

Invariant: inside, patterns do not show the axis; the ops know its name, and put it back before they choose layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functitan import tree
from functitan.axes import parse_axes
from functitan.errors import FunctitanError, check_function, report
from functitan.ops.function import current_level
from functitan.sharding.context import current, using


def vmap(fn: Callable[..., Any], in_dims: Any = 0, *, axis: str, out_dims: int = 0) -> Callable[..., Any]:
    """A function that runs `fn` for each position of a named axis, which the mesh may shard.

    `in_dims` gives the axis's place in each argument (an int, `None`, or a tree or tuple of them, as in
    `torch.func.vmap`); it is at `out_dims` of each result. Per-example gradients are `ft.vmap(ft.grad(loss), (None, 0),
    axis="batch")`; parameters that the axis's mesh dims shard are resharded first, and an error says so.
    Give the axis the first rule of the table, so that it lies alike in every argument. Arguments without the axis meet
    those with it in named ops (`ft.broadcast` before elementwise ones), and every result depends on one that has it.

    >>> x = torch.arange(6.0).view(3, 2)
    >>> vmap(lambda row: row.sum(), axis="batch")(x)
    tensor([1., 5., 9.])
    """
    check_function(fn, "ft.vmap")
    if not isinstance(axis, str) or len(parse_axes(axis)) != 1:
        raise FunctitanError(report("ft.vmap", [f"axis={axis!r} is not one axis name"], "write axis='batch'"))

    def batched(*args: Any) -> Any:
        places = tree.broadcast_prefix(
            in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args), tuple(args), "ft.vmap in_dims"
        )
        leaves, structure = tree.flatten(tuple(args))
        if all(place is None for place in places):
            raise FunctitanError(report("ft.vmap", ["every in_dims is None"], "at least one argument has the axis"))
        _check_places(tree.paths(tuple(args)), leaves, places)
        sizes = {
            path: x.shape[place]
            for path, x, place in zip(tree.paths(tuple(args)), leaves, places, strict=True)
            if place is not None
        }
        if len(set(sizes.values())) > 1:
            problems = [f"argument {path}: {size} on this rank" for path, size in sizes.items()]
            raise FunctitanError(report(f"ft.vmap over {axis!r}: its local size differs", problems, _FIX_SIZES))
        out_structure: list[Any] = []

        def flat(*values: Any) -> tuple[Any, ...]:
            env = current()
            with using(env._replace(vmap_axes=(*env.vmap_axes, (current_level(), axis)))):
                out, found = tree.flatten(fn(*tree.unflatten(structure, values)))
            out_structure[:] = [found]
            return tuple(out)

        outs = torch.func.vmap(flat, tuple(places), out_dims)(*leaves)
        return tree.unflatten(out_structure[0], outs)

    return batched


def _check_places(paths: list[str], leaves: list[Any], places: list[Any]) -> None:
    problems = []
    for path, x, place in zip(paths, leaves, places, strict=True):
        if place is not None and not isinstance(x, Tensor):
            problems.append(f"argument {path} is a {type(x).__name__}, not a tensor")
        elif place is not None and (type(place) is not int or not -x.dim() <= place < x.dim()):
            problems.append(f"argument {path} of shape {tuple(x.shape)} has no dimension {place!r}")
    if problems:
        fix = "in_dims says where each argument has the axis, None where one lacks it, as in (0, None)"
        raise FunctitanError(report("ft.vmap", problems, fix))


_FIX_SIZES = "give the axis one global size, and the first rule of the table, so that it lies alike in every argument"
