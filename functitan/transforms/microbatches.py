"""Microbatches: the parts of a batch, what a loss gives for one, and the mesh dims that each replica has for itself.

Invariant: microbatch i of replica r is the same examples, with the same key, whoever computes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functitan import threefry, tree
from functitan.errors import FunctitanError, RulesError, report
from functitan.sharding.context import Env
from functitan.sharding.layout import layout_of
from functitan.sharding.rules import Dims
from functitan.transforms.loss import count_of, split_loss

Sums = tuple[Tensor, Tensor, Any]  # the loss, the count, aux: what is added over microbatches and replicas


def sum_and_beside(out: Any, where: str) -> tuple[Tensor, tuple[Tensor, Any]]:
    """A loss function's sum, and the (count, aux) that are added beside it: scalars, in float32 or wider.

    Raises `FunctitanError` for another value, and for an aux that is no tree of scalars.
    """
    (total, count), aux = split_loss(out, where)
    bad = [
        f"aux{'.' if path else ''}{path} is a tensor of shape {tuple(leaf.shape)}"
        for path, leaf in zip(tree.paths(aux), tree.leaves(aux), strict=True)
        if isinstance(leaf, Tensor) and leaf.dim()
    ]
    if bad:
        raise FunctitanError(report(f"{where}: aux is summed over microbatches and replicas", bad, _FIX_AUX))
    beside = lambda x: _wide(torch.as_tensor(x, device=total.device))
    return total, (count_of(count, _wide(total)), tree.map(beside, aux))


def rows(batch: Any, start: int, size: int) -> Any:
    """The examples of one microbatch: rows of the tensors with a first axis, and all else as it is."""
    return tree.map(lambda x: x.narrow(0, start, size) if _is_batched(x) else x, batch)


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


def microbatch_size(batch: Any, k: int, dims: Dims, env: Env, where: str) -> int:
    """The number of examples of one microbatch on this rank. Raises `FunctitanError` where k does not divide."""
    sizes = {
        f"batch{'.' if path else ''}{path}": x.shape[0]
        for path, x in zip(tree.paths(batch), tree.leaves(batch), strict=True)
        if _is_batched(x)
    }
    over = "·".join(f"{dim}={env.mesh.sizes.size(dim)}" for dim in dims) if env.mesh is not None else ""
    here = f"on this rank ({over})" if over else "on this rank"
    if not sizes:
        raise FunctitanError(report(where, ["the batch has no tensor with a first axis"], _FIX_BATCH))
    if len(set(sizes.values())) > 1:
        problems = [f"{path}: {size} examples {here}" for path, size in sizes.items()]
        raise FunctitanError(report(f"{where}: the batch's tensors differ in size", problems, _FIX_BATCH))
    if next(iter(sizes.values())) % k:
        problems = [f"{path}: {size} examples {here} are not divisible by {k}" for path, size in sizes.items()]
        raise FunctitanError(report(f"{where}: {k} microbatches", problems, FIX_K))
    return next(iter(sizes.values())) // k


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32 if x.is_floating_point() else torch.int64))


def _is_batched(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


FIX_K = "k is the number of microbatches: it divides the examples that each rank has"
_FIX_BATCH = "the first axis of each tensor is the batch; close over tensors that all examples share"
_FIX_AUX = "return scalars, sums over the batch: ft.reduce('batch seq ->', hits.float())"
