"""`ft.context_parallel`: how attention meets a sequence that is sharded; `ft.zigzag`: the order that balances its work.

Invariant: neither changes what a program means. The order of tokens is a layout of the data: permute whole batches by
`ft.zigzag` before `ft.shard`, and tell the function by `order="zigzag"`; nothing in a model knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from functitan import tree
from functitan.errors import FunctitanError, LayoutError, check_function, nearest, report
from functitan.sharding.context import as_mesh, current, using
from functitan.sharding.layout import axes_of, check_rank
from functitan.sharding.mesh import Mesh, check_dim
from functitan.sharding.rules import Dims
from functitan.sharding.sequence import METHODS, check_zigzag, positions_of, runs

ORDERS = ("contiguous", "zigzag")


def context_parallel(
    fn: Callable[..., Any],
    *,
    method: str | Mapping[str, str] | None = None,
    order: str | None = None,
    axis: str = "seq",
    dims: str | Dims = "cp",
) -> Callable[..., Any]:
    """A function that runs `fn` with its `ft.attention` lowered by `method`, and tokens in this order.

    `method` is "ring" (keys and values travel around the ranks, the next block while one is used), "all_gather" (of
    keys and values), "all_to_all" (heads for sequence), or one for each mesh dim of the sequence: {"cp": "ring",
    "tp": "all_to_all"} exchanges heads over tp inside a ring over cp. By default the bytes that each sends, and the
    number of collectives, decide for every call (`functitan.attention.method`). Bytes sent by one of n ranks, in
    forward, with K those of its keys, or values, and Q those of its queries: ring and all-gather 2 (n-1) K, all-to-all
    2 (n-1)/n (Q + K); of a ring less, where causality and a window let no rank see some distance. Backward sends as
    much again, and a ring twice: keys and values, and their gradients in the dtype that `ft.precision` reduces in. A
    ring's keys go only to ranks that see some of them or pass them on, so ranks may send less than the ledger says: it
    has what one of them sends.

    `order="zigzag"` says that along `axis` data lies as `ft.zigzag` puts it over the mesh dims `dims`, so that causal
    work is equal on all ranks. Inside, the order is part of how `axis` lies, and every named op that knows positions
    counts them as one process would: `ft.iota`, `ft.select`, `ft.take`, `ft.random`, rotary positions, attention; an
    axis that `ft.constrain` renames comes in the order of positions, and so does what `ft.unshard` gives, while
    `ft.shard` puts values in this order. What cannot know raises `LayoutError`: `ft.rearrange` of a composite with the
    axis, generation. Plain torch ops along the axis (a cumsum, a shift, x[:, -1]) see slots: rename it first.
    The other order is "contiguous". Of nested wrappers the inner one wins, in what it is given.

    Raises `FunctitanError` here, and `LayoutError` where a fixed method cannot run.

    >>> import torch, functitan as ft
    >>> rules = ft.AxisRules({"seq": "cp", "heads": None, "head_dim": None})
    >>> pattern, q = "seq heads head_dim", torch.ones(8, 1, 2)
    >>> attend = lambda q: ft.attention(f"{pattern}, {pattern}", q, q, q, causal=True)
    >>> attend = context_parallel(attend, method="ring")
    >>> ft.explain(attend, q, mesh=dict(cp=4), rules=rules, patterns=pattern)[0].collective
    'permute'
    """
    check_function(fn, "ft.context_parallel")
    over = (dims,) if isinstance(dims, str) else tuple(dims)
    each = dict(method) if isinstance(method, Mapping) else {}
    names = list(each.values()) if isinstance(method, Mapping) else [] if method is None else [method]
    problems = [f"method {name!r} is none{nearest(str(name), METHODS)}" for name in names if name not in METHODS]
    problems += [] if order in (None, *ORDERS) else [f"order {order!r} is none{nearest(str(order), ORDERS)}"]
    if problems:
        raise FunctitanError(report("ft.context_parallel", problems, f"methods are {METHODS}, orders {ORDERS}"))
    given: dict[str, Any] = {}
    if method is not None:
        one = None if isinstance(method, Mapping) else method
        given |= dict(method=one, methods=tuple(each.items()))
    if order is not None:
        given |= dict(axis=axis, zigzag=over if order == "zigzag" else ())

    @functools.wraps(fn)
    def inside(*args: Any, **kwargs: Any) -> Any:
        env = current()
        if env.mesh is not None:
            _check_dims((*over, *each), env.mesh)
        with using(env._replace(sequence=env.sequence._replace(**given))):
            return fn(*args, **kwargs)

    return inside


def zigzag(
    values: tree.Tree,
    patterns: tree.Tree,
    *,
    mesh: Mesh | DeviceMesh | None,
    axis: str = "seq",
    dims: str | Dims = "cp",
    inverse: bool = False,
) -> tree.Tree:
    """The tree of *global* tensors with their tokens along `axis` in head-tail order over the n ranks of `dims`.

    Of 2n equal blocks rank i gets the i-th from the front and the i-th from the back, so that under a causal mask all
    have equal work. Tokens, labels, positions and segments go together: `patterns` is a tree or prefix of patterns,
    and tensors without the axis stay. Then `ft.shard` as ever, and `ft.context_parallel(fn, order="zigzag")`.
    `inverse` puts results of all positions back. Without a mesh, and over one rank, nothing is moved.

    Raises `LayoutError` for a length that 2n does not divide, and inside a function that lies in this order already.

    Brandon et al., Striped Attention, 2023; The Llama 3 Herd of Models, 2024, section 3.3.2.

    >>> import torch, functitan as ft
    >>> ft.simulate(cp=2)(lambda mesh: ft.zigzag(torch.arange(8), "seq", mesh=mesh).tolist())()[0]
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    known, over = as_mesh(mesh), (dims,) if isinstance(dims, str) else tuple(dims)
    if known is None:
        return values
    _check_dims(over, known)
    if current().sequence.ranks(axis, known.sizes) > 1:
        problem = f"it is called inside ft.context_parallel(order='zigzag'), where {axis!r} lies in that order already"
        fix = "leave it out: ft.shard and ft.unshard know the order there; or permute outside"
        raise LayoutError(report("ft.zigzag", [problem], fix))
    leaves, structure = tree.flatten(values)
    given = [axes_of(pattern) for pattern in tree.broadcast_prefix(patterns, values, "ft.zigzag")]
    ranks, lengths, places = known.sizes.size(over), [], []
    for path, x, axes in zip(tree.paths(values), leaves, given, strict=True):
        if axes is not None and isinstance(x, Tensor):
            check_rank(axes, tuple(x.shape), path or "tensor")
        places.append(axes.index(axis) if axes is not None and axis in axes else None)
        lengths += [] if places[-1] is None else [(path or "the tensor", x.shape[places[-1]])]
    check_zigzag("ft.zigzag", lengths, ranks)
    if ranks == 1:
        return values
    return tree.unflatten(
        structure, [x if at is None else _ordered(x, at, ranks, inverse) for x, at in zip(leaves, places, strict=True)]
    )


def _ordered(x: Tensor, at: int, ranks: int, inverse: bool) -> Tensor:
    length = x.shape[at]
    slots = positions_of(runs(length, ranks, 0, length), x.device)
    return x.index_select(at, slots.argsort() if inverse else slots)


def _check_dims(dims: Dims, mesh: Mesh) -> None:
    if problems := [complaint for dim in dims if (complaint := check_dim(dim, mesh.sizes))]:
        raise LayoutError(report("ft.context_parallel", problems, "name the mesh dims that shard the sequence"))
