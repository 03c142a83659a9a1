"""The five collectives as differentiable functions, for who writes ranks by hand.

Invariant: each collective is a linear map of all ranks' tensors together, and its vjp is the transpose:
`<f(x), y> == <x, f^T(y)>`, with `<,>` summed over ranks. The transposes are all_gather <-> reduce_scatter,
all_reduce <-> all_reduce, all_to_all <-> all_to_all with its axes exchanged, permute <-> permute back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.errors import MeshError, report
from functitan.sharding.context import current
from functitan.sharding.env import Env
from functitan.sharding.mesh import Mesh, check_dim
from functitan.sharding.message import Label, Passing
from functitan.sharding.moves import Step, View
from functitan.sharding.rules import Dims
from functitan.sharding.steps import reduced, run_step, send


def all_gather(x: Tensor, dims: str | Dims, axis: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """Every rank's `x` of the group over `dims`, joined along `axis`. Transpose: `reduce_scatter` (in `dtype`)."""
    return _call("all_gather", x, dims, (axis,), dtype)


def reduce_scatter(x: Tensor, dims: str | Dims, axis: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """This rank's part along `axis` of the sum over the group, taken in `dtype`. Transpose: `all_gather`."""
    return _call("reduce_scatter", x, dims, (axis,), dtype)


def all_reduce(x: Tensor, dims: str | Dims, op: str = "sum", dtype: torch.dtype | None = None) -> Tensor:
    """The sum (or "max", which has no transpose) over the group, taken in `dtype`. Transpose: itself."""
    return _call("all_reduce", x, dims, (op,), dtype)


def all_to_all(x: Tensor, dims: str | Dims, split: int, join: int, dtype: torch.dtype | None = None) -> Tensor:
    """Cut along axis `split`, a part to each rank, and join what comes along `join`. Transpose: the two swapped."""
    return _call("all_to_all", x, dims, (split, join), dtype)


def permute(x: Tensor, dims: str | Dims, shift: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """The `x` of the rank `shift` places before this one, around the group. Transpose: `shift` negated."""
    return _call("permute", x, dims, (shift,), dtype)


class _Linear(NamedTuple):
    kind: str
    dims: Dims
    places: tuple[Any, ...]
    dtype: torch.dtype | None
    env: Env

    def transpose(self) -> _Linear:
        kind = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather"}.get(self.kind, self.kind)
        places = tuple(-shift for shift in self.places) if kind == "permute" else self.places
        if self.kind == "all_reduce" and self.places != ("sum",):
            raise MeshError(report(f"the transpose of all_reduce {self.places[0]}", ["it is not linear"], "detach it"))
        if kind == "all_to_all":
            places = (self.places[1], self.places[0])
        return self._replace(kind=kind, places=places, env=self.env._replace(phase="backward"))

    def batched(self) -> _Linear:
        """The same map with one more axis in front."""
        return (
            self if self.kind in ("all_reduce", "permute") else self._replace(places=tuple(p + 1 for p in self.places))
        )

    def run(self, x: Tensor) -> Tensor:
        mesh, label = self.env.mesh, Label(self.kind, "")
        assert mesh is not None
        n = mesh.sizes.size(self.dims)
        if self.kind == "permute":
            return send("permute", x, self.dims, self.env, label, Passing(self.places[0]))
        if self.kind == "all_reduce":
            return reduced(x, Step("all_reduce", self.dims), self.env, label, self.places[0], self.dtype)
        views = [View(axis, (n,), (0,)) for axis in self.places]
        source = views[-1] if self.kind != "reduce_scatter" else None
        target = views[0] if self.kind != "all_gather" else None
        if self.kind == "all_to_all" and self.places[0] == self.places[1]:  # a permutation of parts of one axis
            axis = self.places[0]
            parts = x.movedim(axis, 0).unflatten(0, (n, -1))
            return send("all_to_all", parts, self.dims, self.env, label).flatten(0, 1).movedim(0, axis)
        return run_step(x, Step(self.kind, self.dims, source, target), self.env, label, dtype=self.dtype)


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(linear: _Linear, x: Tensor) -> Tensor:  # type: ignore[override]
        return linear.run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.linear = inputs[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, _Collective.apply(ctx.linear.transpose(), g)

    @staticmethod
    def jvp(ctx: Any, _: None, t: Tensor) -> Tensor:  # type: ignore[override]
        refuse_forward_mode(ctx.linear.env.mesh, ctx.linear.kind)
        return _Collective.apply(ctx.linear, t)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], linear: _Linear, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return _Collective.apply(linear.batched(), x.movedim(in_dims[1], 0)), 0


def refuse_forward_mode(mesh: Mesh | None, what: str) -> None:
    """Raise `MeshError` on a virtual mesh: threads share torch's forward-AD levels, the numbers would be wrong."""
    if mesh is not None and mesh.transport.shares_a_process:
        problem = "torch's forward mode is not thread-safe, and a virtual mesh is threads: its numbers would be wrong"
        raise MeshError(
            report(f"jvp of {what}", [problem], "use ft.jvp or ft.hvp, which take two vjps here, or processes")
        )


def _call(kind: str, x: Tensor, dims: str | Dims, places: tuple[Any, ...], dtype: torch.dtype | None) -> Tensor:
    env, dims = current().of_all_stages(), (dims,) if isinstance(dims, str) else tuple(dims)
    if env.mesh is None:
        raise MeshError(
            report(f"{kind} over {dims}", ["there is no mesh"], "call it inside ft.spmd(fn, mesh=, rules=)")
        )
    sizes = env.mesh.sizes
    problems = [complaint for dim in dims if (complaint := check_dim(dim, sizes))]
    if len(set(dims)) < len(dims):
        problems.append(f"a mesh dim stands twice in {dims}")
    if kind not in ("all_reduce", "permute"):
        problems += [
            f"the tensor has no axis {p}: its shape is {tuple(x.shape)}" for p in places if not -x.dim() <= p < x.dim()
        ]
        places = tuple(p % max(x.dim(), 1) for p in places)
    if kind in ("reduce_scatter", "all_to_all") and not problems and x.shape[places[0]] % sizes.size(dims):
        problems.append(f"axis {places[0]} of size {x.shape[places[0]]} is not divisible by {sizes.size(dims)} ranks")
    if kind == "all_reduce" and places[0] not in ("sum", "max"):
        problems.append(f"op is {places[0]!r}, not 'sum' or 'max'")
    if problems:
        raise MeshError(report(f"{kind} over {dims}", problems, f"the mesh is {env.mesh.shape}"))
    dims = tuple(dim for dim in dims if sizes.size(dim) > 1)
    return _Collective.apply(_Linear(kind, dims, places, dtype, env), x) if dims else x
