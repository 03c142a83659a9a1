"""Checking mode: ranks compare their programs before they communicate, and values that should be equal on all.

Invariant: a check never changes a result, and is not entered in the ledger. What it finds, every rank raises.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functitan import tree
from functitan.axes import Axes, write_axes
from functitan.errors import CollectiveError, ReplicationError, report
from functitan.ops.move import axes_of
from functitan.sharding.context import Env, current, using
from functitan.sharding.layout import check_rank
from functitan.sharding.moves import Step
from functitan.sharding.rules import Dims
from functitan.sharding.steps import Label, run_step

CHUNK = 1 << 18  # elements that are made float64 at once: 2 MiB


def checked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, whose ranks compare their programs: collective, mesh dims, shape, dtype, op, pattern, and the user's line.

    Ranks that part ways raise a `CollectiveError` with both programs and lines, where they would hang, or send each
    other wrong data; so do those that wait for one that fails, leaves early, or does not come within the mesh's
    timeout. Ranks of one pipeline stage are compared. Holds for the backward pass of what `fn` computes, too, and
    inside `fn` `ft.train_step` checks the values of each step (`check_equal`). A check costs one exchange with
    torch.distributed's store before each collective: tenths of a millisecond. Use inside `ft.spmd`.

    >>> from functitan.ops.reduce import reduce
    >>> checked(lambda x: reduce("batch ->", x))(torch.ones(3))
    tensor(3.)
    """
    name = getattr(fn, "__qualname__", type(fn).__name__)

    @functools.wraps(fn)
    def inside(*args: Any, **kwargs: Any) -> Any:
        env = current()
        if (
            env.capture is not None
        ):  # nothing is sent while a program is traced: what it sends is compared before it runs
            env.capture.compared = True
            return fn(*args, **kwargs)
        if env.checked or (env.mesh is not None and env.mesh.transport.name == "explain"):
            return fn(*args, **kwargs)
        agree = env.mesh.transport.agree if env.mesh is not None else lambda program, wait=True: None
        try:
            with using(env._replace(checked=True)):
                out = fn(*args, **kwargs)
        except CollectiveError:
            raise  # the others have it too
        except Exception as error:
            agree(f"raises {type(error).__name__}: {str(error).partition(chr(10))[0]}", wait=False)
            raise
        agree(f"runs the end of ft.checked({name})")
        return out

    return inside


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
    found = _differences(tree.paths(values), tree.leaves(values), _axes(values, patterns), current())
    if found:
        raise ReplicationError(report("ft.check_equal", [f"{path}: {line}" for path, line in found.items()], _FIX))


def check_step(loss: Tensor, count: Tensor, grads: tree.Tree, patterns: tree.Tree) -> None:
    """`check_equal` of what a train step has before its update; the error says what kind of op lacks its name."""
    scalars = {"loss": loss, "count": count}
    paths = [*scalars, *(f"gradients.{path}" for path in tree.paths(grads))]
    leaves = [*scalars.values(), *tree.leaves(grads)]
    found = _differences(paths, leaves, [(), (), *_axes(grads, patterns)], current())
    if found:
        fixes = [_FIX_SCALARS] * any(path in scalars for path in found)
        fixes += [_FIX_GRADIENTS] * any(path not in scalars for path in found)
        problems = [f"{path}: {line}" for path, line in found.items()]
        raise ReplicationError(report("ft.train_step", problems, "; ".join(fixes)))


def _axes(values: tree.Tree, patterns: tree.Tree) -> list[Axes | None]:
    return [axes_of(pattern) for pattern in tree.broadcast_prefix(patterns, values, "patterns")]


def _differences(paths: list[str], leaves: list[Tensor], axes: list[Axes | None], env: Env) -> dict[str, str]:
    """How each leaf differs that should be equal on several ranks and is not, by path: the same on every rank."""
    sizes = env.mesh.shape if env.mesh is not None and env.mesh.transport.name != "explain" else {}
    dims = tuple(dim for dim, n in sizes.items() if n > 1 and dim != "pp")
    if not dims or not leaves:
        return {}
    used = [_used(path, x, its, env) for path, x, its in zip(paths, leaves, axes, strict=True)]
    quiet, label = env._replace(ledger=None), Label("check_equal", "")
    signs = signs_of(min(CHUNK, max(x.numel() for x in leaves)) * 2)  # a complex number is two
    digests = torch.stack([sums_of(x, signs.to(x.device)).to(leaves[0].device) for x in leaves])
    gaps = digests.new_zeros(len(dims), len(leaves))
    for row, dim in zip(gaps, dims, strict=True):
        equal = [i for i, own in enumerate(used) if dim not in own]
        if equal:
            both = torch.cat([digests[equal], -digests[equal]], 1)
            both = run_step(both, Step("all_reduce", (dim,)), quiet, label, "max")
            row[equal] = _gap(both[:, :4], both[:, 4:], [leaves[i].dtype for i in equal])
    worst = run_step(gaps, Step("all_reduce", dims), quiet, label, "max").T.tolist()
    rows = zip(paths, leaves, axes, worst, strict=True)
    return {path: _difference(x, its, dims, row) for path, x, its, row in rows if any(row)}


def _used(path: str, x: Tensor, axes: Axes | None, env: Env) -> set[str]:
    """The mesh dims that shard a leaf."""
    if axes is None:
        return set()
    check_rank(axes, tuple(x.shape), path)
    return {dim for dims in env.layout(axes).dims for dim in dims}


def sums_of(x: Tensor, signs: Tensor) -> Tensor:
    """Two sums with random signs, the norm, and 1 if all is finite, else (0, 0, 0, 0): `[4]`, float64."""
    x = x.detach()
    flat = (torch.view_as_real(x) if x.is_complex() else x).reshape(-1)
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


def _difference(x: Tensor, axes: Axes | None, dims: Dims, gaps: list[float]) -> str:
    along = [
        f"{dim} by {gap:.2g} of its norm" if gap < math.inf else f"{dim}, where some ranks have NaN or infinity"
        for dim, gap in zip(dims, gaps, strict=True)
        if gap
    ]
    pattern = f"{write_axes(axes)!r}, " if axes else ""
    return f"{pattern}{str(x.dtype).removeprefix('torch.')}{list(x.shape)}, differs along {' and along '.join(along)}"


_FIX = "sum what is partial by ft.reduce, or give the pattern whose axes are sharded; start all ranks from the same key"
_FIX_SCALARS = "a plain sum or mean ran over a sharded axis: name its axes, as in ft.reduce('batch seq ->', x)"
_FIX_GRADIENTS = (
    "a parameter met a plain torch op, and its gradient lacks a sum over ranks: "
    "write ft.broadcast('embed -> batch seq embed', scale) for x * scale, ft.einsum for a product"
)
