"""`ft.compile`: one region, as a block, captured and compiled once for all layers of its shapes, forward and backward.

Invariant: the region runs below all transforms, as two programs in two autograd Functions, so that the derivative of
the second, which nobody captured, is an error. A program serves exactly what it was made for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule

from functitan import tree
from functitan.capture.halves import Halves, trace_halves
from functitan.capture.opaque import Opaque, call, opaque
from functitan.capture.passes.table import chosen_passes, run_passes
from functitan.capture.statics import all_same, check_statics, warn_of_values
from functitan.errors import FunctitanError, check_function, report
from functitan.float8.wrapper import FIX_DELAYED, outside
from functitan.ops.autocast import FIX_AUTOCAST, autocast_is_on
from functitan.ops.function import requires_gradient, transforms_active
from functitan.remat.draws import FIX_DRAWS, draws
from functitan.remat.memo import Memo
from functitan.sharding.context import current, using
from functitan.sharding.env import Env
from functitan.sharding.sink import Sink
from functitan.transforms.closures import closure_problems
from functitan.transforms.flat import TENSOR, Form, join, of_tensors, split


def compile(fn: Callable[..., Any], *, skip: Sequence[str] = (), backend: str = "inductor") -> Compiled:
    """`fn` as a region that is captured and compiled once, forward and backward, and called by every layer.

    Made at the first call, and again for other structures, shapes, strides, dtypes, static values, meshes and rules,
    or where other arguments are differentiated: 32 equal layers compile as fast as one. Works in eager, under
    reverse-mode transforms (`ft.value_and_grad`, `torch.func.vjp`), and inside `ft.jit`, whose graph then holds one op
    for each call. Arguments and results are trees; leaves that are no tensors are static; results are new tensors.
    Backward keeps what autograd would keep, less what elementwise ops make again; `ft.compile(ft.remat(fn))` keeps the
    arguments. `compiled.regions` are those made. `skip` turns passes off by name, and `backend` is "inductor" or
    "graph", as in `ft.jit`.

    Raises `CaptureError`, with the line, for what a graph cannot hold, as `ft.jit` does; `FunctitanError` for forward
    mode, for a second derivative, under vmap, and for a differentiated tensor that `fn` closes over.

    >>> import torch, functitan as ft
    >>> block = ft.compile(lambda w, x: torch.tanh(w * x), backend="graph")
    >>> ft.grad(lambda w, x: block(w, block(w, x)).sum())(torch.zeros(2), torch.ones(2))
    tensor([0., 0.])
    >>> len(block.regions)
    2
    """
    check_function(fn, "ft.compile")
    return Compiled(fn, chosen_passes("ft.compile", skip, backend), backend)


@dataclass(frozen=True, eq=False)
class Region:
    """What was made for one kind of call. Opaque to pytrees."""

    made_for: tuple[Any, ...]
    statics: tuple[Any, ...]  # the leaves that are no tensors
    forward: Opaque
    backward: Opaque | None
    halves: Halves
    result: Form
    draws: bool  # from torch's generator


@dataclass(frozen=True, eq=False)
class Compiled:
    """A function that runs as compiled regions: what `compile` gives."""

    fn: Callable[..., Any]
    passes: tuple[str, ...]  # those that run, in order
    backend: str
    regions: list[Region] = field(default_factory=list, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors, form = split((args, kwargs))
        wanted = tuple(i for i, x in enumerate(tensors) if requires_gradient(x))
        env = current()
        if transforms_active() or torch.is_grad_enabled() or autocast_is_on():
            _check(self, env)
        its = _Call(self, env, form, wanted, [])
        *values, _ = _Forward.apply(its, *tensors)
        return join(its.region.result, values)

    @property
    def name(self) -> str:
        """For errors."""
        return f"ft.compile of {getattr(self.fn, '__qualname__', repr(self.fn))}"


@dataclass(frozen=True, eq=False)
class _Call:
    """One call: all that its programs need besides tensors. Opaque to pytrees."""

    compiled: Compiled
    env: Env
    form: Form
    wanted: tuple[int, ...]
    found: list[Region]

    @property
    def region(self) -> Region:
        return self.found[0]

    def names(self) -> list[str]:
        """What the caller calls each leaf."""
        return [_called(path) for path in tree.paths(tree.unflatten(self.form.structure, self.form.leaves))]


def _region(its: _Call, xs: tuple[Tensor, ...]) -> Region:
    """What was made for such a call, or is now."""
    env = its.env.key.uncaptured.without(Sink, Memo)._replace(differentiated=False, vmap_axes=())
    shapes = tuple((x.shape, x.stride(), x.dtype, x.device) for x in xs)
    made_for, statics = (shapes, its.wanted, its.form.structure, env), its.form.leaves
    alike = [region for region in its.compiled.regions if region.made_for == made_for]
    known = next((region for region in alike if all_same(statics, region.statics)), None)
    if known is None:
        with using(env):
            known = _made(its, xs, made_for)
        warn_of_values(its.compiled.name, its.names().__getitem__, statics, [region.statics for region in alike])
        its.compiled.regions.append(known)
    return known


def _made(its: _Call, xs: tuple[Tensor, ...], made_for: tuple[Any, ...]) -> Region:
    compiled, mesh, form, called = its.compiled, its.env.mesh, its.form, its.names()
    check_statics(compiled.name, called.__getitem__, form.leaves)
    flat, result = of_tensors(lambda given: compiled.fn(*given[0], **given[1]), form)
    names = [name for name, x in zip(called, form.leaves, strict=True) if x is TENSOR]
    halves = trace_halves(flat, xs, its.wanted, compiled.name, names)
    plain = mesh is not None and not mesh.transport.compiles  # threads, and `ft.explain`'s fake tensors
    make = lambda program: opaque(run_passes(program, compiled.passes), "graph" if plain else compiled.backend)
    forward, backward = make(halves.forward), None if halves.backward is None else make(halves.backward)
    return Region(made_for, form.leaves, forward, backward, halves, result[0], _draws(halves.forward.graph))


def _draws(graph: GraphModule) -> bool:
    nodes = graph.graph.nodes
    return any(isinstance(node.target, OpOverload) and draws(node.target, node.args, node.kwargs) for node in nodes)


def _no_forward_mode(ctx: Any, *tangents: Any) -> Any:
    raise _unsupported(ctx.its, "forward mode through it", _FIX_SECOND)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(its: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        xs = tuple(x.detach() for x in tensors)
        its.found[:] = [_region(its, xs)]
        if its.region.draws and (its.env.recomputed or its.env.is_captured):
            raise FunctitanError(report(its.compiled.name, [_DRAWS], FIX_DRAWS))
        # the last result holds nothing but its history: backward's is differentiable wherever an argument is
        return (*call(its.region.forward, xs, its.env), torch.empty(0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.its, *tensors = inputs
        *results, history = output
        halves, row = ctx.its.region.halves, (*tensors, *results)
        ctx.num_inputs = len(tensors)
        ctx.save_for_backward(history, *(row[i] for i in halves.saved))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(y for r, y in enumerate(results) if r not in halves.differentiable))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        region, n = ctx.its.region, ctx.num_inputs
        places = region.halves.differentiable
        if all(cotangents[r] is None for r in places):
            return (None,) * (1 + n)
        gs = (_zeros(region.forward.results[r]) if cotangents[r] is None else cotangents[r] for r in places)
        found = _Backward.apply(ctx.its, *ctx.saved_tensors, *gs)
        of = dict(zip(region.halves.given, found, strict=True))
        return (None, *(of.get(i) for i in range(n)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, its: _Call, *tensors: Tensor) -> Any:  # type: ignore[override]
        raise _unsupported(its, "vmap around it", _FIX_VMAP)

    jvp = staticmethod(_no_forward_mode)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(its: _Call, history: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        region = its.region
        count = len(region.halves.saved)
        assert region.backward is not None
        saved, gs = tensors[:count], tensors[count:]
        xs = (*(x.detach() for x in saved), *(g.detach().contiguous() for g in gs))
        return call(region.backward, xs, its.env)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.its = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:  # type: ignore[override]
        raise _unsupported(ctx.its, "a second derivative through it", _FIX_SECOND)

    @staticmethod
    def vmap(info: Any, in_dims: Any, its: _Call, *tensors: Tensor) -> Any:  # type: ignore[override]
        raise _unsupported(its, "vmap around its gradient", _FIX_VMAP)

    jvp = staticmethod(_no_forward_mode)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device)


def _check(compiled: Compiled, env: Env) -> None:
    problems = closure_problems(compiled.fn)
    fix = "pass it as an argument: ft.compile(lambda w, x: ...)(w, x)"
    if env.find(Memo) is not None:
        problems.append("a policy of the ft.remat around it cannot choose among the ops inside it")
        fix = "rematerialize inside: ft.compile(ft.remat(fn, policy=...))"
    if autocast_is_on():
        problems, fix = [*problems, "it is called under torch.autocast, which a graph does not hold"], FIX_AUTOCAST
    if problem := outside(env):
        problems, fix = [*problems, problem], FIX_DELAYED.format("compile")
    if problems:
        raise FunctitanError(report(compiled.name, problems, fix))


def _unsupported(its: _Call, problem: str, fix: str) -> FunctitanError:
    return FunctitanError(report(its.compiled.name, [f"{problem} is not supported"], fix))


def _called(path: str) -> str:
    """An argument as the caller knows it: `0.w` of `0.0.w`, and `key` of `1.key`."""
    return path.partition(".")[2]


_DRAWS = "it draws from torch's generator, and a graph around it, or a recomputation, would not draw the same"
_FIX_VMAP = "vmap inside: ft.compile(ft.vmap(fn, ...))"
_FIX_SECOND = "differentiate inside, as in ft.compile(ft.grad(fn)), or leave the function uncompiled there"
