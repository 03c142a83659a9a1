"""What a step on a mesh is given as its batch: this rank's shard, and no other rank's work.

Invariant: a check sends shapes and digests alone, changes nothing, and what it finds every rank raises.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from functitan import tree
from functitan.errors import LayoutError, ReplicationError, report
from functitan.sharding.context import current
from functitan.sharding.cut import cut_of
from functitan.sharding.env import Env
from functitan.sharding.layout import layout_of
from functitan.sharding.rules import Dims
from functitan.transforms.checked import Held, compared_dims, differences, digests, held_in, over_ranks

BATCH_AXIS = "batch"


def check_batch(batch: Any, patterns: tree.Tree = None) -> None:
    """Raise unless the ranks' batches are shards of one: of one shape, equal where they must be, not all alike.

    `LayoutError` names leaves of several shapes, which would be averaged as if of one, and mesh dims along which every
    tensor of the batch is the same, bit for bit, where the ranks' parts should be others: those ranks would compute,
    and count, the same examples again. Tensors that `ft.shard` cut may be alike. `patterns` is a tree or prefix of the
    leaves' patterns: with them a leaf that ranks should share is compared, too (`ReplicationError`).
    """
    env = current()
    dims = compared_dims(env)
    leaves = held_in(batch, patterns, "batch")
    if not dims or not leaves:
        return
    assert env.mesh is not None
    names = ", ".join(f"{leaf.path} {_dtype(leaf)} of {leaf.x.dim()} axes" for leaf in leaves)
    env.mesh.transport.agree(f"runs a step of {names}")
    _check_shapes(leaves, dims, env)
    shared = [leaf._replace(axes=leaf.axes or ()) for leaf in leaves if leaf.axes is not None or not leaf.x.dim()]
    if found := differences([shared], env):
        problems = [f"{path}: {line}" for path, line in found.items()]
        raise ReplicationError(report("ft.train_step", problems, _FIX_SHARED))
    _check_repeated(leaves, dims, env)


def _check_shapes(leaves: list[Held], dims: Dims, env: Env) -> None:
    """Raise `LayoutError` that lists each leaf whose shards are of several shapes, with the ranks that have each."""
    assert env.mesh is not None
    shapes = [tuple(leaf.x.shape) for leaf in leaves]
    rows = torch.zeros(env.mesh.sizes.size(dims), sum(map(len, shapes)), dtype=torch.int64)
    rows[env.mesh.index(dims)] = torch.tensor([n for shape in shapes for n in shape], dtype=torch.int64)
    sizes = over_ranks(rows.to(leaves[0].x.device), dims, env, "sum").cpu()
    problems = []
    for leaf, of_ranks in zip(leaves, sizes.split([len(shape) for shape in shapes], 1), strict=True):
        ranks = defaultdict(list)
        for rank, shape in enumerate(of_ranks.tolist()):
            ranks[tuple(shape)].append(str(rank))
        if len(ranks) > 1:
            each = (f"{shape} on rank{'s' * (len(of) > 1)} {', '.join(of)}" for shape, of in ranks.items())
            problems.append(f"{leaf.path}: {'; '.join(each)}")
    if problems:
        raise LayoutError(report("ft.train_step: the batch's shards differ in shape", problems, _FIX_SHAPES))


def _check_repeated(leaves: list[Held], dims: Dims, env: Env) -> None:
    """Raise `LayoutError` if ranks repeat each other's work."""
    of_leaves = {i: own for i, leaf in enumerate(leaves) if (own := _shards(leaf, env))}
    if not of_leaves or any(cut_of(leaf.x) is not None for leaf in leaves):
        return
    sums = digests([leaf.x for leaf in leaves])
    differ = sums.new_zeros(len(dims))
    for n, dim in enumerate(dims):
        mine = [i for i, own in of_leaves.items() if dim in own]
        most = over_ranks(torch.cat([sums[mine], -sums[mine]], 1), (dim,), env) if mine else sums.new_ones(1, 8)
        alike = (most[:, :4] + most[:, 4:] == 0).all() & (most[:, 3] == 1).all()  # NaN has no digest
        differ[n] = (~alike).to(differ.dtype)
    found = [dim for dim, its in zip(dims, over_ranks(differ, dims, env).tolist(), strict=True) if not its]
    if found:
        assert env.mesh is not None
        over = " and along ".join(f"{dim}={env.mesh.sizes.size(dim)}" for dim in found)
        problems = [
            f"{leaves[i].path}: {_dtype(leaves[i])}{list(leaves[i].x.shape)} is the same on all ranks along {over}"
            for i, own in of_leaves.items()
            if any(dim in own for dim in found)
        ]
        raise LayoutError(report("ft.train_step: ranks repeat each other's batch", problems, _FIX_REPEATED))


def _shards(leaf: Held, env: Env) -> set[str]:
    """The mesh dims along which a leaf's parts should be others: of its pattern, or of the batch axis."""
    assert env.mesh is not None and env.rules is not None
    axes: Any = leaf.axes if leaf.axes is not None else (BATCH_AXIS,)
    if not leaf.x.dim() or not leaf.x.numel() or any(axis not in env.rules for axis in axes):
        return set()
    return {dim for its in layout_of(axes, env.rules, env.mesh.sizes).dims for dim in its}


def _dtype(leaf: Held) -> str:
    return str(leaf.x.dtype).removeprefix("torch.")


_FIX_SHAPES = "cut the whole batch by ft.shard(batch, patterns, mesh=mesh, rules=rules); pad it, or leave the rest out"
_FIX_SHARED = (
    "give what all ranks share alike to all: scalars, and tensors whose batch_patterns no mesh dim shards there"
)
_FIX_REPEATED = (
    "give each rank its shard: ft.shard(batch, patterns, mesh=mesh, rules=rules), or examples of its own; "
    "check=False where all are to compute the same"
)
