"""Microbatches: the parts of a batch, what a loss gives for one, and the mesh dims that each replica has for itself.

Invariant: microbatch i of replica r is the same examples, with the same key, whoever computes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functitan import threefry, tree
from functitan.axes import Axes
from functitan.errors import FunctitanError, RulesError, report
from functitan.ops.replica import spread
from functitan.sharding.context import current
from functitan.sharding.env import Env
from functitan.sharding.layout import axes_of, check_rank, layout_of
from functitan.sharding.rules import Dims
from functitan.transforms.beside import check_aux, part_of
from functitan.transforms.loss import count_of, split_loss

Sums = tuple[Tensor, Tensor, Any]  # the loss, the count, aux: what is added over microbatches and replicas


def sum_and_beside(
    out: Any, where: str, ways: tree.Tree = None, is_last: bool = True, on_mesh: bool = False
) -> tuple[Tensor, tuple[Tensor, Any]]:
    """A loss function's sum, and the (count, aux) that are added beside it, in float32 or wider.

    `ways` says how aux is merged, and `is_last` whether this microbatch is the last one of all. Raises
    `FunctitanError` for another value, for an aux that cannot be merged, and `on_mesh` for a count that is no tensor.
    """
    (total, count), aux = split_loss(out, where, on_mesh)
    check_aux(aux, where)
    return total, (count_of(count, total), part_of(aux, ways, where, is_last, total))


def rows(batch: Any, places: list[int | None], start: int, size: int) -> Any:
    """The examples of one microbatch: a part of the tensors along their batch axis, and all else as it is."""
    leaves, structure = tree.flatten(batch)
    part = (x if place is None else x.narrow(place, start, size) for x, place in zip(leaves, places, strict=True))
    return tree.unflatten(structure, part)


def added(sums: Sums | None, total: Tensor, counted: tuple[Tensor, Any]) -> Sums:
    """The sums with those of one more microbatch; loss and count have one dtype."""
    found = (total.to(counted[0].dtype), *counted)
    return found if sums is None else tree.map(torch.add, sums, found)


def key_of(key: Tensor | None, number: int) -> Tensor | None:
    """The key of a microbatch, by its number among those of all replicas."""
    return None if key is None else threefry.fold_in(key, number)


def replica_dims(batch_axis: str, env: Env, where: str) -> Dims:
    """The mesh dims that the batch takes in every tensor of the batch. Raises `RulesError`."""
    if env.mesh is None:
        return ()
    assert env.rules is not None
    dims = layout_of((batch_axis,), env.rules, env.mesh.sizes).of(batch_axis)
    before = list(env.rules)[: list(env.rules).index(batch_axis)]
    problems = [
        f"rule {name!r} stands before {batch_axis!r} and takes {dim!r} first in tensors that have both"
        for name in before
        for dim in env.rules[name]
        if dim in dims
    ]
    if problems:
        raise RulesError(report(where, problems, f"put the rule of {batch_axis!r} first in the table"))
    return dims


def batch_places(batch: Any, patterns: tree.Tree, batch_axis: str, where: str) -> list[int | None]:
    """Where each leaf of a batch has its batch axis; `None`: all examples share it. Raises `PatternError`.

    Without patterns tensors have it first; in a tree or prefix of them a leaf whose pattern lacks it is shared.
    """
    leaves = tree.leaves(batch)
    if patterns is None:
        return [0 if isinstance(x, Tensor) and x.dim() > 0 else None for x in leaves]
    found: list[int | None] = []
    for path, x, axes in zip(tree.paths(batch), leaves, axes_in(batch, patterns, where), strict=True):
        if axes is not None:
            check_rank(axes, tuple(torch.as_tensor(x).shape), f"{where}: batch{'.' if path else ''}{path}")
        found.append(None if axes is None or batch_axis not in axes else axes.index(batch_axis))
    return found


def axes_in(batch: Any, patterns: tree.Tree, where: str) -> list[Axes | None]:
    """The axes of each leaf of a batch, from a tree or prefix of patterns; `None` for one without a pattern."""
    return list(map(axes_of, tree.broadcast_prefix(patterns, batch, f"{where}: batch_patterns")))


def gathered(batch: Any, patterns: tree.Tree, places: list[int | None], dims: Dims, where: str) -> Any:
    """The batch with leaves that all examples share as they lie in one replica's own program, as parameters do."""
    env = current()
    if patterns is None or env.mesh is None or not dims:
        return batch
    leaves, structure = tree.flatten(batch)
    for i, (axes, place) in enumerate(zip(axes_in(batch, patterns, where), places, strict=True)):
        if place is None and axes is not None and any(dim in dims for its in env.layout(axes).dims for dim in its):
            leaves[i] = spread(axes, leaves[i], dims)
    return tree.unflatten(structure, leaves)


def microbatch_size(batch: Any, places: list[int | None], k: int, dims: Dims, env: Env, where: str) -> int:
    """The number of examples of one microbatch on this rank. Raises `FunctitanError` where k does not divide."""
    sizes = {
        f"batch{'.' if path else ''}{path}": x.shape[place]
        for path, x, place in zip(tree.paths(batch), tree.leaves(batch), places, strict=True)
        if place is not None
    }
    over = "·".join(f"{dim}={env.mesh.sizes.size(dim)}" for dim in dims) if env.mesh is not None else ""
    here = f"on this rank ({over})" if over else "on this rank"
    if not sizes:
        raise FunctitanError(report(where, ["the batch has no tensor with a batch axis"], _FIX_BATCH))
    if len(set(sizes.values())) > 1:
        problems = [f"{path}: {size} examples {here}" for path, size in sizes.items()]
        raise FunctitanError(report(f"{where}: the batch's tensors differ in size", problems, _FIX_BATCH))
    if next(iter(sizes.values())) % k:
        problems = [f"{path}: {size} examples {here} are not divisible by {k}" for path, size in sizes.items()]
        raise FunctitanError(report(f"{where}: {k} microbatches", problems, FIX_K))
    return next(iter(sizes.values())) // k


FIX_K = "k is the number of microbatches: it divides the examples that each rank has"
_FIX_BATCH = (
    "the first axis of each tensor is the batch; where all examples share one, give patterns that say so: "
    "batch_patterns={'x': 'batch embed', 'mean': 'embed'}"
)
