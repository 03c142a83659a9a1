"""The global norm of a tree of shards, and clipping by it.

Invariant: each leaf's squares are summed over exactly the mesh dims that shard it, with one all-reduce for each
distinct set of mesh dims, so that the norm is the unsharded one on every rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan import tree
from functitan.errors import FunctitanError, PatternError, report
from functitan.optim.kernels import owned, scale_, squares, wide_dtype
from functitan.optim.state import scalar_beside
from functitan.optim.transform import GradientTransformation
from functitan.sharding.context import Env, current
from functitan.sharding.layout import axes_of, check_rank
from functitan.sharding.moves import Step
from functitan.sharding.rules import Dims
from functitan.sharding.steps import Label, run_step


class ClipState(NamedTuple):
    """`norm`: the global norm before the last clip, `[]`, in float32 or wider."""

    norm: Any


def global_norm(values: tree.Tree, patterns: tree.Tree | None = None) -> Tensor:
    """The Euclidean norm `[]` of all leaves together, taken in float32 or wider.

    `patterns` is a tree, or a prefix, of patterns or `Param`s (`None`: equal on every rank). Raises `PatternError` if
    it is left out where the rules shard anything.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    tensor(5.)
    """
    return _norm(values, patterns, current())


def clip_by_global_norm(max_norm: float) -> GradientTransformation:
    """Scales all updates by `min(1, max_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`.

    The state holds the norm before clipping. Pascanu et al., arXiv:1211.5063.
    """
    if not max_norm > 0:
        raise FunctitanError(report("clip_by_global_norm", [f"max_norm is {max_norm}"], "give a positive number"))

    def init(params: tree.Tree) -> ClipState:
        return ClipState(scalar_beside(params, wide_dtype([leaf.dtype for leaf in tree.leaves(params)])))

    def update(updates, state, params=None, patterns=None, donate=False):
        norm = _norm(updates, patterns, current()._replace(phase="update"))
        leaves, structure = tree.flatten(updates)
        leaves = owned(leaves, donate)
        scale_(leaves, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return tree.unflatten(structure, leaves), ClipState(norm)

    return GradientTransformation(init, update)


def _norm(values: tree.Tree, patterns: tree.Tree | None, env: Env) -> Tensor:
    leaves = tree.leaves(values)
    if not leaves:
        return torch.zeros(())
    dtype = wide_dtype([x.dtype for x in leaves])
    total = None
    for dims, group in _by_dims(values, patterns, env).items():
        part = squares([leaves[i] for i in group], dtype)
        part = run_step(part, Step("all_reduce", dims), env, Label("global_norm", "")) if dims else part
        total = part if total is None else total + part
    assert total is not None
    return total.sqrt()  # with pipeline stages, each rank's total is first summed over pp: this is the place


def _by_dims(values: tree.Tree, patterns: tree.Tree | None, env: Env) -> dict[Dims, list[int]]:
    """The numbers of the leaves by the mesh dims that shard them, as a set: in the mesh's order, `()` for none."""
    leaves = tree.leaves(values)
    if env.mesh is None:
        return {(): list(range(len(leaves)))}
    assert env.rules is not None
    if patterns is None:
        sharding = [
            f"rule {name!r} shards over {dims}" for name, dims in env.rules.items() if env.mesh.sizes.size(dims) > 1
        ]
        if sharding:
            raise PatternError(report("global_norm without patterns", sharding, _FIX_PATTERNS))
        return {(): list(range(len(leaves)))}
    found: dict[Dims, list[int]] = {}
    known = map(axes_of, tree.broadcast_prefix(patterns, values, "patterns"))
    for i, (path, x, axes) in enumerate(zip(tree.paths(values), leaves, known, strict=True)):
        sharded: set[str] = set()
        if axes is not None:
            check_rank(axes, tuple(x.shape), path)
            sharded.update(dim for dims in env.layout(axes).dims for dim in dims)
        found.setdefault(tuple(dim for dim in env.mesh.sizes.dims if dim in sharded), []).append(i)
    return found


_FIX_PATTERNS = "say how each leaf is sharded: tx.update(grads, state, params, patterns=patterns)"
