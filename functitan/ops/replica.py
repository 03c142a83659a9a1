"""The hidden replica axis: what each replica of a model has for itself, and the sum over replicas.

Invariant: every value keeps a global meaning. The replica axis takes some mesh dims, one position for each of their
ranks, so a gradient that is not reduced yet is a tensor *sharded* over `replica`, like any other. Its local size is 1,
and local tensors do not show it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from functitan.axes import Axes, write_axes
from functitan.ops.contraction import contract
from functitan.ops.types import Type
from functitan.sharding.context import current
from functitan.sharding.contraction import Contraction, Term
from functitan.sharding.env import Env
from functitan.sharding.layout import Layout
from functitan.sharding.message import Label
from functitan.sharding.rules import AxisRules, Dims

_REPLICA = "_replica"


def one_replica(dims: Dims) -> Env:
    """The surroundings of one replica's own program: the mesh and the rules without the mesh dims of the replica axis.

    A function in them is `ft.vmap` of it over the replica axis: as each rank has one position, there is no batch to
    add to its ops, and none of them can communicate over `dims`. What the function closes over is its replica's own.
    """
    env = current()
    if env.mesh is None or env.rules is None or not dims:
        return env
    mesh = env.mesh.without(dims)
    rules = None if mesh is None else env.rules.without(dims)
    return env._replace(mesh=mesh, rules=rules)


def spread(axes: Axes, x: Tensor, dims: Dims) -> Tensor:
    """A tensor for each replica: `"embed mlp -> replica embed mlp"`, gathered over `dims`. Transpose: `merge`."""
    env = current()
    if env.mesh is None or not dims:
        return x
    label = Label("accumulate", f"{write_axes(axes)} -> replica {write_axes(axes)}")
    known = ((_REPLICA, env.mesh.sizes.size(dims)),)
    typed = Contraction((Type(axes),), (_of_replicas(axes, dims, env),), (Term(0, (0,)),), known)
    return contract(typed, (x,), env, label)[0].squeeze(0)


def merge(axes: Axes, x: Tensor, dims: Dims, to_rules: AxisRules | None = None) -> Tensor:
    """The sum of the replicas' tensors, `"replica embed mlp -> embed mlp"`, in the layout of the rules in force.

    One reduce-scatter where the result is sharded over `dims`, one all-reduce where not. `to_rules` is a table for the
    result's layout alone. Transpose: `spread`.
    """
    env = current()
    if env.mesh is None or not (dims or to_rules):
        return x
    label = Label("accumulate", f"replica {write_axes(axes)} -> {write_axes(axes)}")
    result = Type(axes, rules=to_rules)
    typed = Contraction((_of_replicas(axes, dims, env),), (result,), (Term(0, (0,)),), ())
    return contract(typed, (x.unsqueeze(0),), env, label)[0]


def merge_sums(values: list[Tensor], dims: Dims) -> list[Tensor]:
    """The sums of the replicas' tensors, each equal in shape on all, in one all-reduce for each dtype."""
    if current().mesh is None or not dims:
        return values
    return in_rows(values, lambda row: merge(("_scalars",), row, dims))


def in_rows(values: list[Tensor], sum_row: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Tensors after `sum_row`, which takes the elements of all of one dtype at once."""
    of_dtype: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(values):
        of_dtype.setdefault(x.dtype, []).append(i)
    sums = list(values)
    for places in of_dtype.values():
        row = sum_row(torch.cat([values[i].reshape(-1) for i in places]))
        for i, x in zip(places, row.split([values[i].numel() for i in places]), strict=True):
            sums[i] = x.reshape(values[i].shape)
    return sums


def _of_replicas(axes: Axes, dims: Dims, env: Env) -> Type:
    """Sharded over the replica axis; the others keep what it does not take."""
    own = env.layout(axes)
    left = (tuple(dim for dim in its if dim not in dims) for its in own.dims)
    names = (_REPLICA, *axes)
    return Type(names, layout=Layout(names, (dims, *left)))
