"""`ft.accumulate`: mean gradients over microbatches, with one gather and one reduction for each weight.

Invariant: the gradients are those of one big batch. Weights are spread once to a hidden replica axis that takes the
mesh dims of the batch axis, every replica adds up the gradients of its own microbatches, and the sums are merged once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from functitan import tree
from functitan.axes import Axes
from functitan.errors import FunctitanError, LayoutError, PatternError, report
from functitan.frozen import which_trained
from functitan.ops.function import has_derivative
from functitan.ops.replica import merge, merge_sums, one_replica, spread
from functitan.sharding.context import current, using
from functitan.sharding.env import Env
from functitan.sharding.layout import axes_of, check_rank, divisibility, global_shape, layout_of
from functitan.sharding.rules import AxisRules, check_rules
from functitan.transforms.beside import check_ways, merged
from functitan.transforms.closures import refuse_shards_of
from functitan.transforms.grad import add_gradients, described
from functitan.transforms.loss import check_loss, divisor, is_on_mesh
from functitan.transforms.microbatches import (
    FIX_K,
    added,
    batch_places,
    gathered,
    key_of,
    microbatch_size,
    replica_dims,
    rows,
    sum_and_beside,
)

WHERE = "ft.accumulate"


def accumulate(
    loss_fn: Callable[..., Any],
    k: int,
    *,
    patterns: tree.Tree = None,
    batch_axis: str = "batch",
    dtype: torch.dtype | None = None,
    to_rules: AxisRules | None = None,
    aux: tree.Tree = None,
    batch_patterns: tree.Tree = None,
) -> Callable[..., tuple[tuple[Tensor, tuple[Tensor, Any]], tree.Tree]]:
    """`f(params, batch, key=None) -> ((loss, (count, aux)), grads)` of `loss_fn(params, batch, key) -> (sum, count)`.

    As `ft.value_and_grad(..., has_aux=True)` of sum / count for the whole batch, at the activation memory of one of
    `k` microbatches. Sums are added over microbatches and replicas and divided once, by the total count. The loss
    function must be a sum over examples: it sees one replica's microbatch at a time, and what it closes over lies whole
    on each replica; what is sharded and not trained stands among the parameters, frozen. It may give `((sum, count),
    aux)` too. `aux` here says how these values, of any shape, are merged over microbatches and replicas: a tree or
    prefix of "mean", "sum" and "last", that of the last microbatch of the last replica; by default floating-point
    numbers are averaged, whole ones and bools summed.

    `patterns`: those of the parameters, a tree or prefix of patterns or `Param`s; not needed without a mesh. Leaves
    that a `Param` there freezes (`ft.trainable`) are gathered like the others, and their gradient is `None`. `batch`:
    tensors whose first axis is `batch_axis`, of one size that `k` divides on each rank; scalars, and what is no tensor,
    are passed as they are. Where examples share tensors that have axes (running statistics), `batch_patterns` gives the
    patterns of the batch's leaves, a tree or prefix: those without `batch_axis` are shared, not cut. Microbatch i of
    replica r gets `fold_in(key, r * k + i)`: masks of dropout differ from those of one big batch, and are the same on
    every mesh where microbatches are as large. `dtype`: in which gradients are added and reduced (default: the
    parameter's; the result always has that one). `to_rules`: a table for the layout of the gradients, as of optimizer
    state that is sharded otherwise.

    Over the mesh dims of the batch axis (FSDP, HSDP, DDP) each weight is gathered once and reduced once, whatever `k`,
    and stays gathered in between with its gradient, which is ZeRO-2's memory; so `k=1` too has a use. Over other
    dims (tp, cp) all is as ever, for each microbatch. Raises `FunctitanError` and its kinds, before anything is sent
    unless it is for what the loss function gave.

    >>> import functitan as ft
    >>> def loss(params, batch, key):
    ...     y = ft.einsum("batch embed, embed mlp -> batch mlp", batch, params["w"])
    ...     return ft.reduce("batch mlp ->", y * y), ft.count("batch mlp", y)
    >>> params, batch = {"w": torch.ones(2, 3)}, torch.arange(8.0).view(4, 2)
    >>> (mean, (count, aux)), grads = ft.accumulate(loss, 2)(params, batch)
    >>> mean, count, grads["w"][:, 0]
    (tensor(69.), tensor(12.), tensor([20.6667, 25.3333]))
    """
    return accumulated(loss_fn, k, patterns, batch_axis, dtype, to_rules, aux, batch_patterns)


def accumulated(
    loss_fn: Callable[..., Any],
    k: int,
    patterns: tree.Tree = None,
    batch_axis: str = "batch",
    dtype: torch.dtype | None = None,
    to_rules: AxisRules | None = None,
    aux: tree.Tree = None,
    batch_patterns: tree.Tree = None,
    *,
    zeros: bool = True,
    looked: list[Any] | None = None,
) -> Callable[..., tuple[tuple[Tensor, tuple[Tensor, Any]], tree.Tree]]:
    """`accumulate`; without `zeros` a leaf that no microbatch reaches has the gradient `None`: nothing is reduced.

    `looked` keeps, over functions made anew for each step, that what `loss_fn` closes over has been looked through.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise FunctitanError(report(WHERE, [f"k is {k!r}: it must be a whole number of at least 1"], FIX_K))

    check_loss(loss_fn, WHERE)
    looked = [] if looked is None else looked
    check_ways(aux, WHERE)

    def gradients(params: tree.Tree, batch: Any, key: Tensor | None = None) -> Any:
        leaves, structure = tree.flatten(params)
        env = current()
        dims = replica_dims(batch_axis, env, WHERE)
        if dims and dims not in looked:
            refuse_shards_of(loss_fn, dims, WHERE)
            looked.append(dims)
        mine = [i for i, is_trained in enumerate(which_trained(params, patterns, WHERE)) if is_trained]
        axes = _axes_of(params, patterns, mine, to_rules, env)
        places = batch_places(batch, batch_patterns, batch_axis, WHERE)
        size = microbatch_size(batch, places, k, dims, env, WHERE)
        batch = gathered(batch, batch_patterns, places, dims, WHERE)
        number = k if env.mesh is None else env.mesh.sizes.size(dims) * k  # of microbatches
        first = 0 if env.mesh is None else env.mesh.index(dims) * k
        copies = [spread(its, x, dims) for its, x in zip(axes, leaves, strict=True)]
        given = [copies[i] for i in mine]
        sums = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in given]
        reached: set[int] = set()  # places in `mine`
        scalars: Any = None
        for i in range(k):
            part, own = rows(batch, places, i * size, size), key_of(key, first + i)

            def sum_of(*values: Tensor) -> Any:
                full = dict(enumerate(copies)) | dict(zip(mine, values, strict=True))
                out = loss_fn(tree.unflatten(structure, full.values()), part, own)  # noqa: B023
                return sum_and_beside(out, WHERE, aux, first + i == number - 1, is_on_mesh(env))  # noqa: B023

            with using(one_replica(dims)), _cut_named(batch, places, k, batch_patterns):
                total, counted, sums = add_gradients(sum_of, given, sums, reached)
            scalars = added(scalars, total, counted)
        copies.clear()
        given.clear()
        values, form = tree.flatten(scalars)
        total, count, beside = tree.unflatten(form, merge_sums(values, dims))
        by = divisor(count)
        with using(env._replace(phase="backward" if env.phase == "forward" else env.phase)):
            grads: list[Tensor | None] = [None] * len(leaves)
            for n, i in enumerate(mine):
                summed = sums.pop(0)  # a sum is freed when it is merged
                if zeros or n in reached:
                    grads[i] = (merge(axes[i], summed, dims, to_rules) / by).to(leaves[i].dtype)
        return (total / by, (count, merged(beside, aux, WHERE, number))), tree.unflatten(structure, grads)

    return gradients


@contextmanager
def _cut_named(batch: Any, places: list[int | None], k: int, patterns: tree.Tree) -> Iterator[None]:
    """Let an error of the loss function say which tensors were cut as examples, where no pattern says so."""
    try:
        yield
    except Exception as error:
        cut = [path for path, place in zip(tree.paths(batch), places, strict=True) if place is not None]
        if k > 1 and patterns is None and len(cut) > 1:
            error.add_note(
                f"{WHERE} cuts {', '.join(cut)} of the batch into {k} microbatches, along the first axis: "
                "batch_patterns= says which of them all examples share"
            )
        raise


def _axes_of(
    params: tree.Tree, patterns: tree.Tree, mine: list[int], to_rules: AxisRules | None, env: Env
) -> list[Axes]:
    """The axes of each parameter (numbered ones where it has no pattern), checked against its shape and the tables."""
    leaves, paths = tree.leaves(params), tree.paths(params)
    bad = [f"{paths[i]} is {described(leaves[i])}" for i in mine if not has_derivative(leaves[i])]
    if bad:
        raise FunctitanError(report(f"{WHERE}: parameters without a derivative", bad, _FIX_LEAVES))
    if env.mesh is None:
        return [()] * len(leaves)
    if patterns is None:
        raise PatternError(report(WHERE, ["patterns is None, on a mesh"], _FIX_PATTERNS))
    assert env.rules is not None
    axes = [
        tuple(f"_{i}" for i in range(x.dim())) if found is None else found
        for found, x in zip(map(axes_of, tree.broadcast_prefix(patterns, params, WHERE)), leaves, strict=True)
    ]
    for path, its, x in zip(paths, axes, leaves, strict=True):
        check_rank(its, tuple(x.shape), f"{WHERE}: {path}")
    if to_rules is not None:
        check_rules(to_rules, env.mesh.sizes)
        sizes = env.mesh.sizes
        whole = [global_shape(env.layout(its), tuple(x.shape), sizes) for its, x in zip(axes, leaves, strict=True)]
        bad = [
            line
            for path, its, shape in zip(paths, axes, whole, strict=True)
            for line in divisibility(layout_of(its, to_rules, sizes), shape, sizes, path)
        ]
        if bad:
            raise LayoutError(report(f"{WHERE}: to_rules", bad, "change the sizes, the mesh, or the rules of to_rules"))
    return axes


_FIX_LEAVES = "freeze such leaves: patterns=ft.trainable(declarations, globs of the others)"
_FIX_PATTERNS = "say how each parameter is sharded: ft.accumulate(loss_fn, k, patterns=declarations)"
