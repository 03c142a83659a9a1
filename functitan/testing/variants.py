"""One test, run as plain torch and on virtual meshes: chex's variants. Needs pytest.

Invariant: a test sees global values only, so that it can't tell which variant it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest

from functitan import tree
from functitan.sharding.rules import AxisRules
from functitan.testing.invariant import MESHES
from functitan.testing.sharded import sharded

Variant = Callable[..., Callable[..., Any]]  # (fn, patterns of the arguments, patterns of the result) -> fn


def variants(*, rules: AxisRules, meshes: Sequence[Mapping[str, int]] = MESHES) -> pytest.MarkDecorator:
    """A decorator that runs a test once without a mesh and once on each virtual mesh, under `rules`.

    The test's argument `variant` makes a function of shards one of global values: `variant(fn, patterns, results)`,
    as `sharded` does; without a mesh it is `fn`. The variants' ids are `eager`, `fsdp2`, `fsdp2-tp2`, ...

    >>> rules = AxisRules({"batch": "dp"})
    >>> @variants(rules=rules, meshes=[dict(dp=2)])
    ... def test_doubling_doubles(variant):
    ...     double = variant(lambda x: 2 * x, ("batch",), "batch")
    ...     assert double(torch.ones(4)).sum() == 8
    """
    ids = ["-".join(f"{dim}{size}" for dim, size in mesh.items()) for mesh in meshes]
    on_meshes = [partial(sharded, mesh=dict(mesh), rules=rules) for mesh in meshes]
    return pytest.mark.parametrize("variant", [_eager, *on_meshes], ids=["eager", *ids])


def _eager(fn: Callable[..., Any], patterns: tree.Tree, results: tree.Tree) -> Callable[..., Any]:
    return fn
