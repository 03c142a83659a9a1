"""Clipping: of all updates by their global norm, of each leaf by its own.

Invariant: clipping scales a whole leaf by one number, which is the same on every rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from functitan import tree
from functitan.errors import FunctitanError, report
from functitan.optim.factors import times, times_each
from functitan.optim.kernels import wide_dtype
from functitan.optim.norms import norm_in, rms_in
from functitan.optim.numbers import telling
from functitan.optim.state import scalar_beside
from functitan.optim.transform import GradientTransformation, donating
from functitan.sharding.context import current, spmd
from functitan.sharding.mesh import Mesh
from functitan.sharding.rules import AxisRules


class ClipState(NamedTuple):
    """`norm`: the global norm before the last clip, `[]`, in float32 or wider."""

    norm: Any


def clip_by_global_norm(max_norm: float) -> GradientTransformation:
    """Scales all updates by `min(1, max_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`.

    The state holds the norm before clipping. Pascanu et al., arXiv:1211.5063.
    """
    _check("clip_by_global_norm", "max_norm", max_norm)

    def init(params: tree.Tree) -> ClipState:
        return ClipState(scalar_beside(params, wide_dtype([leaf.dtype for leaf in tree.leaves(params)])))

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        norm = norm_in(current()._replace(phase="update"), updates, patterns)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return times("clip_by_global_norm", updates, factor, patterns, donate), ClipState(norm)

    return telling(GradientTransformation(init, update))


def clip_grads(
    grads: tree.Tree,
    max_norm: float,
    patterns: tree.Tree = None,
    *,
    mesh: Mesh | DeviceMesh | None = None,
    rules: AxisRules | None = None,
) -> tuple[tree.Tree, Tensor]:
    """(gradients scaled by `min(1, max_norm / (norm + 1e-6))`, their norm before `[]`): for loops of one's own.

    In place of `torch.nn.utils.clip_grad_norm_`, which is wrong on shards: each rank would measure its own shards
    alone, scale by a number of its own, and weights that should be equal on all ranks would part. Here the norm is that
    of all shards, and one number for all.

    `grads` is a tree of this rank's shards, with `None` for a leaf without a gradient; `patterns` a tree, or a prefix,
    of patterns or `Param`s. Call it inside `ft.spmd`, or give the mesh and the rules. Raises `PatternError` without
    patterns where the rules shard anything.

    >>> import torch
    >>> grads, norm = clip_grads({"w": torch.tensor([3.0, 4.0]), "idle": None}, 1.0)
    >>> grads, norm
    ({'w': tensor([0.6000, 0.8000]), 'idle': None}, tensor(5.))
    """
    _check("clip_grads", "max_norm", max_norm)

    def clip(values: tree.Tree) -> tuple[tree.Tree, Tensor]:
        tx = clip_by_global_norm(max_norm)
        clipped, state = tx.update(values, tx.init(values), patterns=patterns)
        return clipped, state.norm

    return clip(grads) if mesh is None else spmd(clip, mesh=mesh, rules=rules)(grads)


def clip_by_block_rms(threshold: float) -> GradientTransformation:
    """Scales each leaf by `1 / max(1, rms / threshold)`, with the root mean square of its elements.

    Shazeer and Stern, arXiv:1804.04235, section 6.

    >>> import torch
    >>> clip_by_block_rms(1.0).update({"a": torch.tensor([4.0, 4.0]), "b": torch.tensor([0.5])}, ())[0]
    {'a': tensor([1., 1.]), 'b': tensor([0.5000])}
    """
    _check("clip_by_block_rms", "threshold", threshold)

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        each = rms_in(current()._replace(phase="update"), "clip_by_block_rms", updates, patterns)
        factors = [1 / (rms / threshold).clamp(min=1.0) for rms in each]
        return times_each("clip_by_block_rms", updates, factors, patterns, donate), state

    return telling(GradientTransformation(lambda params: (), update))


def _check(what: str, name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not value > 0:
        raise FunctitanError(report(what, [f"{name} is {value!r}"], "give a positive number"))
