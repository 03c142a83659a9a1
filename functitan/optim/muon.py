"""Muon: momentum made orthogonal, for weights that are matrices.

Invariant: a matrix is made orthogonal whole, in a layout of its own where its rows and columns are on every rank, so
the direction is the same on every mesh; only momentum is stored, in the weight's layout.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from functitan import tree
from functitan.axes import Axes
from functitan.errors import FunctitanError, report
from functitan.ops.move import reshard
from functitan.optim.kernels import copied, moved, replaced
from functitan.optim.matrices import Matrices, Matrix, as_matrices, parse_matrices
from functitan.optim.numbers import telling
from functitan.optim.patterns import Leaf, leaves_of, named_axes
from functitan.optim.schedules import Schedule
from functitan.optim.sgd import MomentumState
from functitan.optim.state import aligned, check_real, check_state, zeros_beside
from functitan.optim.transform import (
    GradientTransformation,
    Mask,
    add_decayed_weights,
    chain,
    donating,
    scale_by_learning_rate,
)
from functitan.param import Param
from functitan.sharding.context import current, using
from functitan.sharding.rules import AxisRules


def muon(
    learning_rate: float | Schedule,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    weight_decay: float = 0.1,
    mask: Mask | None = None,
    matrices: Matrices | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
) -> GradientTransformation:
    """Muon with decoupled weight decay of the leaves that `mask` chooses (default: all), as `torch.optim.Muon`.

    Takes matrices only; embeddings, scales and the last layer go to another optimizer:

    >>> import functitan as ft
    >>> tx = ft.optim.multi_transform(
    ...     {"muon": muon(0.02, matrices=ft.nn.attention.MATRICES), "adamw": ft.optim.adamw(3e-4)},
    ...     {"*norm.scale": "adamw", "layers.*": "muon", "*": "adamw"},
    ... )
    >>> params = ft.models.llama.params(ft.models.llama.DEBUG)
    >>> len(ft.tree.leaves(tx.init(params)["muon"]))  # the momentum of 7 matrices in each of 6 layers
    42

    `matrices` and `dtype` are those of `scale_by_muon`. Jordan et al., https://kellerjordan.github.io/posts/muon, 2024.
    """
    return chain(
        scale_by_muon(momentum, nesterov, ns_steps, matrices, dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def scale_by_muon(
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    matrices: Matrices | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
) -> GradientTransformation:
    """From gradients to the orthogonal matrix nearest their momentum, times `sqrt(max(1, outputs / inputs))`.

    `m = momentum m + (1 - momentum) g`; of `m`, with `nesterov` of `momentum m + (1 - momentum) g`, `ns_steps` of
    Newton-Schulz in `dtype` (`None`: the weight's) bring all singular values near 1. A weight of two axes maps its
    first to its second. `matrices` says which axes of others are inputs and outputs, by pattern:
    `{"heads head_dim embed": "heads head_dim -> embed"}`; there is a matrix for each place along the axes that it
    leaves out, as in `{"experts embed mlp": "embed -> mlp"}`. A bias is no matrix, of however many axes. On a mesh a
    matrix is gathered in `dtype`, with one all-gather for each sharded axis, made orthogonal on every rank, and sliced.
    Raises `FunctitanError` that lists every leaf that is no matrix.
    """
    problems = [] if 0 <= momentum < 1 else [f"momentum is {momentum}: it must lie in [0, 1)"]
    problems += [] if ns_steps >= 1 else [f"ns_steps is {ns_steps}: it must be at least 1"]
    if problems:
        raise FunctitanError(report("scale_by_muon", problems, "usual are momentum=0.95, ns_steps=5"))
    table = parse_matrices("scale_by_muon", matrices or {})

    def init(params: tree.Tree) -> MomentumState:
        check_real("scale_by_muon", params)
        pairs = zip(tree.paths(params), tree.leaves(params), strict=True)
        declared = [(path, named_axes(x)) for path, x in pairs if isinstance(x, Param)]  # of tensors update is told
        as_matrices("scale_by_muon", table, declared)
        return MomentumState(zeros_beside(params))

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        check_state("scale_by_muon", state, MomentumState)
        grads, moments = aligned("scale_by_muon", updates, momentum=state.momentum)
        known = leaves_of("scale_by_muon", updates, patterns, current()._replace(phase="update"))
        views = as_matrices("scale_by_muon", table, ((leaf.path, leaf.axes) for leaf in known))
        moments = moved(moments, grads, 1 - momentum, donate)
        grads = moved(grads, moments, momentum, donate) if nesterov else copied(grads, moments, donate)
        directions = []
        for leaf, view, g in zip(known, views, grads, strict=True):
            sizes = dict(zip(leaf.axes, leaf.global_shape(tuple(g.shape)), strict=True))
            outputs, inputs = (math.prod(sizes[axis] for axis in axes) for axes in (view.outputs, view.inputs))
            direction = _direction(leaf, view, g if dtype is None else g.to(dtype), ns_steps)
            directions.append(replaced(g, direction, max(1.0, outputs / inputs) ** 0.5))
        structure = tree.flatten(updates)[1]
        return tree.unflatten(structure, directions), MomentumState(tree.unflatten(structure, moments))

    return telling(GradientTransformation(init, update))


def orthogonalized(x: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal matrix nearest to each matrix `[n, rows, columns]`, roughly: singular values in 0.7 to 1.2.

    Newton-Schulz with the quintic `a x + (b x xᵀ + c (x xᵀ)²) x`, whose coefficients are steepest at 0.

    >>> orthogonalized(torch.tensor([[[3.0, 0.0], [0.0, 0.5]]])).round()
    tensor([[[1., 0.],
             [0., 1.]]])
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    if x.shape[1] > x.shape[2]:
        return orthogonalized(x.mT, steps).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _direction(leaf: Leaf, view: Matrix, x: Tensor, steps: int) -> Tensor:
    """The leaf's direction, from its shard to its shard, by way of whole matrices."""
    if leaf.env.mesh is None:
        return _of_whole(leaf.axes, view, x, steps)
    assert leaf.env.rules is not None
    own = _whole(leaf.env.rules, view.inputs + view.outputs)
    with using(leaf.env):
        x = reshard(x, leaf.pattern, to_rules=own)
    with using(leaf.env._replace(rules=own)):
        return reshard(_of_whole(leaf.axes, view, x, steps), leaf.pattern, to_rules=leaf.env.rules)


def _of_whole(axes: Axes, view: Matrix, x: Tensor, steps: int) -> Tensor:
    """The direction of whole matrices, whose axes lie as those of `x`."""
    order = [axes.index(axis) for axis in (*view.rest, *view.outputs, *view.inputs)]
    turned = x.permute(order)
    columns = math.prod(turned.shape[-len(view.inputs) :])
    rows = math.prod(turned.shape[len(view.rest) : -len(view.inputs)])
    y = orthogonalized(turned.reshape(-1, rows, columns), steps).reshape(turned.shape)
    return y.permute([order.index(i) for i in range(len(order))])


@cache
def _whole(rules: AxisRules, axes: Axes) -> AxisRules:
    """The table under which these axes are whole; others keep their rules."""
    return rules.replace(**dict.fromkeys(axes))
