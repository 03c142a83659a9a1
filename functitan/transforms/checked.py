"""Checking mode: ranks compare their programs before they communicate, and values that should be equal on all.

Invariant: a check never changes a result, and is not entered in the ledger. What it finds, every rank raises.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan import tree
from functitan.axes import Axes, write_axes
from functitan.capture.nodes import Capture
from functitan.errors import CollectiveError, FunctitanError, ReplicationError, report
from functitan.ops.function import is_batched
from functitan.sharding.context import current, using
from functitan.sharding.cut import refuse_shards
from functitan.sharding.env import Env
from functitan.sharding.layout import axes_of, check_rank, layout_of, table_of
from functitan.sharding.ledger import Ledger
from functitan.sharding.message import Label
from functitan.sharding.moves import Step
from functitan.sharding.program import Checks, checks
from functitan.sharding.rules import AxisRules, Dims, idle_dims
from functitan.sharding.steps import run_step

CHUNK = 1 << 18  # elements that are made float64 at once: 2 MiB


def checked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, whose ranks compare their programs: collective, mesh dims, shape, dtype, op, pattern, and the user's line.

    Ranks that part ways raise a `CollectiveError` with both programs and lines, where they would hang, or send each
    other wrong data; so do those that wait for one that fails, leaves early, or does not come within the mesh's
    timeout. Ranks of one pipeline stage are compared. Holds for the backward pass of what `fn` computes, too, and
    inside `fn` `ft.train_step` checks state, batch and values of each step. A check costs one exchange with
    torch.distributed's store before each collective: tenths of a millisecond. Use inside `ft.spmd`.

    Shards of one operand that have other shapes on other ranks are such a difference, and named. And named ops remember
    how their results lie, as `ft.shard` and `ft.init` do: a tensor that the next op calls by axes that lie otherwise
    raises `LayoutError`. (So it does where `ft.jit` captures a program, and where `ft.explain` runs it.) Plain torch
    ops give tensors without such a memory. Mesh dims that no rule uses are a warning.

    >>> from functitan.ops.reduce import reduce
    >>> checked(lambda x: reduce("batch ->", x))(torch.ones(3))
    tensor(3.)
    """
    name = getattr(fn, "__qualname__", type(fn).__name__)

    @functools.wraps(fn)
    def inside(*args: Any, **kwargs: Any) -> Any:
        env = current()
        if (capture := env.find(Capture)) is not None:  # what a program that is traced sends is compared before it runs
            capture.compared = True
            return fn(*args, **kwargs)
        if env.find(Checks) is not None or (env.mesh is not None and not env.mesh.transport.has_values):
            return fn(*args, **kwargs)
        _warn(env)
        agree = env.mesh.transport.agree if env.mesh is not None else lambda program, wait=True: None
        try:
            with using(env.inside(checks())):
                out = fn(*args, **kwargs)
        except CollectiveError:
            raise  # the others have it too
        except Exception as error:
            agree(f"raises {type(error).__name__}: {str(error).partition(chr(10))[0]}", wait=False)
            raise
        agree(f"runs the end of ft.checked({name})")
        return out

    return inside


def _warn(env: Env) -> None:
    """Warn of mesh dims that no rule uses: from one rank, since all would say the same."""
    everyone = env.of_all_stages().mesh
    if env.mesh is None or env.rules is None or everyone is None or everyone.rank:
        return
    if text := idle_dims(env.rules, env.mesh.sizes):
        warnings.warn(f"functitan: {text}; let a rule name it, or leave it out of the mesh", stacklevel=3)


def check_equal(values: tree.Tree, patterns: tree.Tree = None) -> None:
    """Raise `ReplicationError` on every rank if a leaf differs along a mesh dim that its pattern does not use.

    `values` are shards, inside `ft.spmd`; without a mesh nothing is checked. `patterns` is a tree, or a prefix, of
    patterns or `Param`s; `None`: equal on every rank. What is compared is two sums of each leaf with random signs. They
    may differ by sqrt(eps) of the leaf's dtype times its norm, half way in digits between a sum in another order (eps)
    and a sum that is missing (1), and by eps times the largest leaf's norm, which is left of sums that cancel. Whole
    numbers differ or do not. NaN and infinity count as equal.

    A value may be equal on all ranks and wrong: `ft.testing.assert_mesh_invariant` compares it with one rank's.

    >>> check_equal({"w": torch.ones(2, 3)}, "embed mlp")
    """
    if current().mesh is None:
        refuse_shards("ft.check_equal", zip(tree.paths(values), tree.leaves(values), strict=True))
    found = differences([held_in(values, patterns, "")], current())
    if found:
        raise ReplicationError(report("ft.check_equal", [f"{path}: {line}" for path, line in found.items()], _FIX))


class Held(NamedTuple):
    """A leaf that ranks hold: its path, itself, its axes (`None`: equal on every rank) and the table it lies under."""

    path: str
    x: Tensor
    axes: Axes | None
    rules: AxisRules | None = None  # `None`: the table in force


def held_in(values: tree.Tree, patterns: tree.Tree, name: str, rules: AxisRules | None = None) -> list[Held]:
    """The tensors of a tree with their patterns, under paths that begin with a name."""
    of_leaves = tree.broadcast_prefix(patterns, values, "patterns")
    return [
        Held(".".join(part for part in (name, path) if part), x, axes_of(pattern), table_of(pattern, rules))
        for path, x, pattern in zip(tree.paths(values), tree.leaves(values), of_leaves, strict=True)
        if isinstance(x, Tensor)
    ]


def check_step(state: list[Held], loss: Tensor, count: Tensor, aux: tree.Tree, grads: list[Held]) -> None:
    """`check_equal` of what a train step has before its update; the error says what kind of value lacks what.

    `state` are the leaves of the parameters, the optimizer's state and the key, which ranks must begin with alike.
    """
    of_groups = {
        _FIX_STATE: state,
        _FIX_SCALARS: [Held("loss", loss, ()), Held("count", count, ())],
        _FIX_AUX: held_in(aux, None, "aux"),
        _FIX_GRADIENTS: grads,
    }
    roots = [[leaf for leaf in state if _root(leaf) == root] for root in dict.fromkeys(map(_root, state))]
    found = differences([*roots, *list(of_groups.values())[1:]], current())
    if found:
        fixes = [fix for fix, group in of_groups.items() if any(leaf.path in found for leaf in group)]
        problems = [f"{path}: {line}" for path, line in found.items()]
        raise ReplicationError(report("ft.train_step", problems, "; ".join(fixes)))


def differences(groups: list[list[Held]], env: Env) -> dict[str, str]:
    """How each leaf differs that should be equal on several ranks and is not, by path: the same on every rank.

    Leaves of one group are of one kind: what rounding may leave of one is judged by the largest of them.
    """
    leaves = [leaf for group in groups for leaf in group]
    dims = compared_dims(env)
    if not dims or not leaves:
        return {}
    if any(is_batched(leaf.x) for leaf in leaves):
        problem = "values under vmap are not compared over ranks"
        raise FunctitanError(report("ft.check_equal", [problem], "vmap a step that is made with check=False"))
    used = [_used(leaf, env) for leaf in leaves]
    sums = digests([leaf.x for leaf in leaves])
    gaps = sums.new_zeros(len(dims), len(leaves))
    for row, dim in zip(gaps, dims, strict=True):
        equal = [i for i, own in enumerate(used) if dim not in own]
        if equal:
            both = torch.cat([sums[equal], -sums[equal]], 1)
            both = over_ranks(both, (dim,), env)
            start = 0
            for group in groups:
                mine = [n for n, i in enumerate(equal) if start <= i < start + len(group)]
                start += len(group)
                if mine:
                    dtypes = [leaves[equal[n]].x.dtype for n in mine]
                    row[[equal[n] for n in mine]] = _gap(both[mine, :4], both[mine, 4:], dtypes)
    worst = over_ranks(gaps, dims, env).T.tolist()
    rows = zip(leaves, worst, strict=True)
    return {leaf.path: _difference(leaf, dims, row) for leaf, row in rows if any(row)}


def compared_dims(env: Env) -> Dims:
    """The mesh dims over which values are compared: those of several ranks, within a stage of a pipeline."""
    sizes = env.mesh.shape if env.mesh is not None and env.mesh.transport.has_values else {}
    return tuple(dim for dim, n in sizes.items() if n > 1 and dim != "pp")


def over_ranks(x: Tensor, dims: Dims, env: Env, op: str = "max") -> Tensor:
    """The maximum (or sum) over ranks, which no ledger enters."""
    return run_step(x, Step("all_reduce", dims), env.without(Ledger), Label("check_equal", ""), op)


def digests(leaves: list[Tensor]) -> Tensor:
    """A digest of each leaf, `[leaves, 4]`, float64: equal where leaves are, and else almost surely not."""
    signs = signs_of(min(CHUNK, max(x.numel() for x in leaves)) * 2)  # complex numbers and long integers are two
    return torch.stack([sums_of(x, signs.to(x.device)).to(leaves[0].device) for x in leaves])


def _root(leaf: Held) -> str:
    return leaf.path.split(".")[0]


def _used(leaf: Held, env: Env) -> set[str]:
    """The mesh dims that shard a leaf."""
    if leaf.axes is None:
        return set()
    assert env.mesh is not None and env.rules is not None
    check_rank(leaf.axes, tuple(leaf.x.shape), leaf.path)
    layout = layout_of(leaf.axes, leaf.rules or env.rules, env.mesh.sizes)
    return {dim for dims in layout.dims for dim in dims}


def sums_of(x: Tensor, signs: Tensor) -> Tensor:
    """Two sums with random signs, the norm, and 1 if all is finite, else (0, 0, 0, 0): `[4]`, float64."""
    x = x.detach().contiguous()
    flat = (torch.view_as_real(x) if x.is_complex() else x).reshape(-1)
    flat = flat.view(torch.int32) if flat.dtype == torch.int64 else flat  # float64 holds 53 bits
    sums, square = signs.new_zeros(2), signs.new_zeros(())
    for number, chunk in enumerate(flat.split(CHUNK)):
        wide = chunk.to(torch.float64)
        a, b = signs[:, : len(wide)] @ wide
        c, s = math.cos(number), math.sin(number)  # the signs repeat: turn them, so that chunks do not cancel
        sums = sums + torch.stack([c * a - s * b, s * a + c * b])
        square = square + wide @ wide
    digest = torch.cat([sums, square.sqrt()[None], torch.ones_like(square)[None]])
    return torch.where(digest.isfinite().all(), digest, 0.0)


def signs_of(n: int) -> Tensor:
    """Random signs, the same on every rank: `[2, n]`, float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, (2, n), generator=generator).to(torch.float64).mul_(2).sub_(1)


def _gap(most: Tensor, least: Tensor, dtypes: list[torch.dtype]) -> Tensor:
    """By leaf, the difference of its sums over its norm, or 0 if small enough; from the digests' maxima `[leaves, 4]`.

    `least` are the maxima of the negated ones.
    """
    rounded = [dtype.is_floating_point or dtype.is_complex for dtype in dtypes]
    eps = most.new_tensor([torch.finfo(dtype).eps if r else 0.0 for dtype, r in zip(dtypes, rounded, strict=True)])
    spread, norm = most + least, most[:, 2]
    gap = spread[:, :2].amax(1)
    relative = torch.where(gap > eps.sqrt() * norm + eps * norm.max(), gap / norm, 0.0)
    return torch.where(spread[:, 3] > 0, torch.inf, relative)


def _difference(leaf: Held, dims: Dims, gaps: list[float]) -> str:
    along = [
        f"{dim} by {gap:.2g} of its norm" if gap < math.inf else f"{dim}, where some ranks have NaN or infinity"
        for dim, gap in zip(dims, gaps, strict=True)
        if gap
    ]
    pattern, x = f"{write_axes(leaf.axes)!r}, " if leaf.axes else "", leaf.x
    return f"{pattern}{str(x.dtype).removeprefix('torch.')}{list(x.shape)}, differs along {' and along '.join(along)}"


_FIX = "sum what is partial by ft.reduce, or give the pattern whose axes are sharded; start all ranks from the same key"
_FIX_STATE = (
    "begin all ranks alike: one key in ft.TrainState.create(..., ft.random.key(0), ...), one checkpoint, and "
    "initializers that draw from their key"
)
_FIX_AUX = "give values beside the loss that are equal on every rank: ft.reduce('batch embed -> embed', x, op='mean')"
_FIX_SCALARS = "a plain sum or mean ran over a sharded axis: name its axes, as in ft.reduce('batch seq ->', x)"
_FIX_GRADIENTS = (
    "a parameter met a plain torch op, and its gradient lacks a sum over ranks: "
    "write ft.broadcast('embed -> batch seq embed', scale) for x * scale, ft.einsum for a product"
)
