"""Helpers for tests of programs written with functitan: asserts, laws of sharding, and hypothesis strategies.

Two modules are imported by their own names: `testing.strategies` needs hypothesis, `testing.variants` pytest.
"""

from functitan.testing.asserts import assert_max_traces, assert_tree_shapes, assert_trees_all_close
from functitan.testing.divergence import Divergence, first_divergence
from functitan.testing.invariant import assert_mesh_invariant
from functitan.testing.link import slow_link
from functitan.testing.sharded import sharded

__all__ = [
    "Divergence",
    "assert_max_traces",
    "assert_mesh_invariant",
    "assert_tree_shapes",
    "assert_trees_all_close",
    "first_divergence",
    "sharded",
    "slow_link",
]
