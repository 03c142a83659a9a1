"""Leaves times numbers: what a clip, a learning rate and a loss scale do to updates.

Invariant: on a mesh a number is equal on every rank, and its gradient is the sum over the ranks that hold parts of what
it scales: so where a number is differentiated, the product is a named op.
"""

from __future__ import annotations

from torch import Tensor

from functitan import tree
from functitan.float8.recipes import Float8
from functitan.ops.einsum import einsum
from functitan.ops.function import requires_gradient
from functitan.optim.kernels import refuse_donation, scaled, scaled_each, wide_dtype
from functitan.optim.patterns import Leaf, leaves_of
from functitan.sharding.context import current, using


def times(what: str, values: tree.Tree, factor: float | Tensor, patterns: tree.Tree | None, donate: bool) -> tree.Tree:
    """Each leaf times one number, or tensor `[]`."""
    leaves, structure = tree.flatten(values)
    if isinstance(factor, Tensor) and _summed([factor]):
        return _named(what, values, [factor] * len(leaves), patterns, donate)
    return tree.unflatten(structure, scaled(leaves, factor, donate))


def times_each(
    what: str, values: tree.Tree, factors: list[Tensor], patterns: tree.Tree | None, donate: bool
) -> tree.Tree:
    """Each leaf times a tensor `[]` of its own."""
    leaves, structure = tree.flatten(values)
    if _summed(factors):
        return _named(what, values, factors, patterns, donate)
    return tree.unflatten(structure, scaled_each(leaves, factors, donate))


def _summed(factors: list[Tensor]) -> bool:
    """True where a factor is differentiated, on a mesh."""
    return current().mesh is not None and any(map(requires_gradient, factors))


def _named(what: str, values: tree.Tree, factors: list[Tensor], patterns: tree.Tree | None, donate: bool) -> tree.Tree:
    refuse_donation(donate)
    env = current().without(Float8)._replace(phase="update", precision=None)
    leaves, structure = tree.flatten(values)
    known = leaves_of(what, values, patterns, env)
    return tree.unflatten(structure, list(map(_product, known, leaves, factors)))


def _product(leaf: Leaf, x: Tensor, factor: Tensor) -> Tensor:
    wide = x.dtype if x.is_complex() else wide_dtype([x.dtype])
    with using(leaf.env):
        return einsum(f"{leaf.pattern}, -> {leaf.pattern}", x.to(wide), factor.to(wide)).to(x.dtype)
