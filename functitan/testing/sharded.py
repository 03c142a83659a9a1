"""Run a function of shards as a function of global values, on a virtual mesh: the shape of every law of sharding.

Invariant: every rank must return the same global values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from functitan import tree
from functitan.ops.move import shard, unshard
from functitan.sharding.context import spmd
from functitan.sharding.mesh import Mesh
from functitan.sharding.rules import AxisRules
from functitan.sharding.virtual import simulate


def sharded(
    fn: Callable[..., Any], patterns: tree.Tree, results: tree.Tree, *, mesh: Mapping[str, int], rules: AxisRules
) -> Callable[..., Any]:
    """`fn` on the shards of global values, as a function from global values to global results.

    `patterns` is a tree or prefix for the tuple of arguments, `results` for what `fn` returns (`None`: not sharded).
    `mesh` gives the sizes of a virtual mesh. Raises `AssertionError` if ranks disagree.

    >>> from functitan.ops.einsum import einsum
    >>> rules = AxisRules({"batch": "dp", "embed": "tp", "mlp": "tp"})
    >>> matmul = lambda x, w: einsum("batch embed, embed mlp -> batch mlp", x, w)
    >>> matmul = sharded(matmul, ("batch embed", "embed mlp"), "batch mlp", mesh=dict(dp=2, tp=2), rules=rules)
    >>> matmul(torch.ones(2, 4), torch.ones(4, 2))
    tensor([[4., 4.],
            [4., 4.]])
    """

    def rank(own: Mesh, *values: Any) -> Any:
        shards = shard(values, patterns, mesh=own, rules=rules)
        return unshard(spmd(fn, mesh=own, rules=rules)(*shards), results, mesh=own, rules=rules)

    def run(*values: Any) -> Any:
        first, *others = simulate(**mesh)(rank)(*values)
        for other in others:
            assert_close(other, first, tolerance=0.0)
        return first

    return run


def assert_close(actual: tree.Tree, expected: tree.Tree, tolerance: float = 1e-10) -> None:
    """Assert equal structure, shapes, dtypes, and values within `tolerance` of the largest finite one (at least 1)."""
    leaves, structure = tree.flatten(expected)
    assert tree.flatten(actual)[1] == structure, f"{tree.flatten(actual)[1]} is not {structure}"
    for path, x, y in zip(tree.paths(expected), tree.leaves(actual), leaves, strict=True):
        finite = y[y.isfinite()] if y.is_floating_point() else y
        largest = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
        torch.testing.assert_close(
            x, y, rtol=0.0, atol=tolerance * largest, msg=lambda text, path=path: f"{path or 'value'}: {text}"
        )
