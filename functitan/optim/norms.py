"""Norms of shards: of all leaves together, and of each leaf.

Invariant: each leaf's squares are summed over exactly the mesh dims that shard it, with one all-reduce for each
distinct set of mesh dims, so that a norm is the unsharded one on every rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from functitan import tree
from functitan.errors import FunctitanError, report
from functitan.ops.reduce import reduce
from functitan.optim.kernels import root, square, squares, transformed, wide_dtype
from functitan.optim.patterns import Leaf, leaves_of
from functitan.sharding.context import current, using
from functitan.sharding.env import Env
from functitan.sharding.message import Label
from functitan.sharding.moves import Step
from functitan.sharding.rules import Dims
from functitan.sharding.steps import run_step


def global_norm(values: tree.Tree, patterns: tree.Tree | None = None) -> Tensor:
    """The Euclidean norm `[]` of all leaves together, taken in float32 or wider.

    `patterns` is a tree, or a prefix, of patterns or `Param`s (`None`: equal on every rank). Raises `PatternError` if
    it is left out where the rules shard anything.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    tensor(5.)
    """
    return norm_in(current(), values, patterns)


def norm_in(env: Env, values: tree.Tree, patterns: tree.Tree | None) -> Tensor:
    """`global_norm` in these surroundings."""
    leaves = tree.leaves(values)
    dtype = wide_dtype([x.dtype for x in leaves])
    total = torch.zeros((), dtype=dtype, device=leaves[0].device if leaves else None)
    known = leaves_of("global_norm", values, patterns, env)
    if transformed(leaves):
        _check_stages("global_norm", env)
        return root(total + sum(_reduced(leaf, square(x, dtype), "sum") for leaf, x in zip(known, leaves, strict=True)))
    mine = [env.pipeline is None or env.pipeline.place == leaf.owner for leaf in known]
    for dims, group in _by_dims(known, env).items():
        counted = [leaves[i] for i in group if mine[i]]
        part = squares(counted, dtype).sum() if counted else torch.zeros_like(total)
        total = total + (run_step(part, Step("all_reduce", dims), env, Label("global_norm", "")) if dims else part)
    if env.pipeline is not None:  # in a dtype that all stages have
        wide, over = total.to(torch.float64), Step("all_reduce", ("pp",))
        total = run_step(wide, over, env.of_all_stages(), Label("global_norm", "")).to(dtype)
    return total.sqrt()


def rms_in(env: Env, what: str, values: tree.Tree, patterns: tree.Tree | None) -> list[Tensor]:
    """The root of the mean square `[]` of each leaf, in float32 or wider."""
    leaves, known = tree.leaves(values), leaves_of(what, values, patterns, env)
    dtype = wide_dtype([x.dtype for x in leaves])
    if transformed(leaves):
        _check_stages(what, env)
        return [root(_reduced(leaf, square(x, dtype), "mean")) for leaf, x in zip(known, leaves, strict=True)]
    found: dict[int, Tensor] = {}
    for dims, group in _by_dims(known, env).items():
        sums = squares([leaves[i] for i in group], dtype)
        sums = run_step(sums, Step("all_reduce", dims), env, Label(what, "")) if dims else sums
        found.update(zip(group, sums.unbind(), strict=True))
    sizes = [math.prod(leaf.global_shape(tuple(x.shape))) for leaf, x in zip(known, leaves, strict=True)]
    return [(found[i] / size).sqrt() for i, size in enumerate(sizes)]


def _reduced(leaf: Leaf, x: Tensor, op: str) -> Tensor:
    """The sum or mean of a leaf's elements by a named op, which has derivatives and sees what vmaps hide."""
    with using(leaf.env):
        return reduce(f"{leaf.pattern} ->", x, op=op) if leaf.axes else x


def _check_stages(what: str, env: Env) -> None:
    """Raise `FunctitanError` where stages of a pipeline would add up squares: what they send has no derivative."""
    if env.pipeline is not None:
        problem = "it is differentiated, or under vmap, on a pipeline's mesh"
        raise FunctitanError(report(what, [problem], "differentiate updates on a mesh without pp"))


def _by_dims(leaves: list[Leaf], env: Env) -> dict[Dims, list[int]]:
    """The numbers of the leaves by the mesh dims that shard them, as a set: in the mesh's order, `()` for none."""
    found: dict[Dims, list[int]] = {}
    for i, leaf in enumerate(leaves):
        sharded = {dim for dims in leaf.layout.dims for dim in dims}
        order = () if env.mesh is None else env.mesh.sizes.dims
        found.setdefault(tuple(dim for dim in order if dim in sharded), []).append(i)
    return found
