"""Run a function of shards as a function of global values, on a virtual mesh: the shape of every law of sharding.

Invariant: every rank must return the same global values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from functitan import tree
from functitan.ops.move import shard, unshard
from functitan.sharding.context import spmd
from functitan.sharding.mesh import Mesh
from functitan.sharding.rules import AxisRules
from functitan.sharding.simulate import simulate
from functitan.testing.asserts import assert_trees_all_close


def sharded(
    fn: Callable[..., Any], patterns: tree.Tree, results: tree.Tree, *, mesh: Mapping[str, int], rules: AxisRules
) -> Callable[..., Any]:
    """`fn` on the shards of global values, as a function from global values to global results.

    `patterns` is a tree or prefix for the tuple of arguments, `results` for what `fn` returns (`None`: not sharded).
    `mesh` gives the sizes of a virtual mesh. Raises `AssertionError` if ranks disagree.

    >>> import torch
    >>> from functitan.ops.einsum import einsum
    >>> rules = AxisRules({"batch": "dp", "embed": "tp", "mlp": "tp"})
    >>> matmul = lambda x, w: einsum("batch embed, embed mlp -> batch mlp", x, w)
    >>> matmul = sharded(matmul, ("batch embed", "embed mlp"), "batch mlp", mesh=dict(dp=2, tp=2), rules=rules)
    >>> matmul(torch.ones(2, 4), torch.ones(4, 2))
    tensor([[4., 4.],
            [4., 4.]])
    """

    def run(*values: Any) -> Any:
        first, *others = on_ranks(fn, values, patterns, results, mesh=mesh, rules=rules)
        for other in others:
            assert_close(other, first, tolerance=0.0)
        return first

    return run


def on_ranks(
    fn: Callable[..., Any],
    values: tuple[Any, ...],
    patterns: tree.Tree,
    results: tree.Tree,
    *,
    mesh: Mapping[str, int],
    rules: AxisRules,
) -> list[Any]:
    """The global results of `fn` on the shards of global values, as each rank has them."""

    def rank(own: Mesh) -> Any:
        shards = shard(values, patterns, mesh=own, rules=rules)
        return unshard(spmd(fn, mesh=own, rules=rules)(*shards), results, mesh=own, rules=rules)

    return simulate(**mesh)(rank)()


def assert_close(actual: tree.Tree, expected: tree.Tree, tolerance: float = 1e-10) -> None:
    """`assert_trees_all_close` with one tolerance, relative and absolute."""
    assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)
