"""A rematerialized region: one autograd Function that stores little, whose backward is a region again.

Invariant: `run` is called below all transforms, once, and may store results; `replay` gives the same results
differentiably, from the inputs and what was stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.vmap import restore_vmap  # private: tried on torch 2.13
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes  # private: tried on torch 2.13

from functitan.errors import FunctitanError, report
from functitan.ops.function import Call, current_level, has_derivative, is_differentiated, transforms_active
from functitan.remat.draws import Source, again, first_time, unmoved
from functitan.remat.memo import Kept, Memo, remembering
from functitan.remat.policies import Budget, Made, Names, Policy, check_names, made, nothing_saveable
from functitan.sharding.collectives import refuse_forward_mode
from functitan.sharding.context import current, using
from functitan.sharding.cut import carry_cut
from functitan.sharding.env import Env
from functitan.sharding.ledger import Ledger, entering
from functitan.sharding.shapes import shapes_only
from functitan.sharding.sink import Sink

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Region:
    """A function of flat tensors. Opaque to pytrees, which would rebuild it."""

    run: Callable[..., Tensors]  # results, then what is stored
    replay: Callable[[Tensors, Tensors], Tensors]  # of inputs and what was stored
    env: Env  # of the caller, which holds the names of the vmaps still around it
    known: dict[str, Any]  # what `run` finds out: "results", their number
    where: str  # for errors
    again: bool = False  # it computes something again
    batches: tuple[Any, ...] = ()  # the vmaps already put into `run`


def apply_region(region: Region, tensors: Sequence[Tensor]) -> Tensors:
    """The results of the region, differentiably."""
    return _Region.apply(region, *tensors)[: region.known["results"]]


def recorded(
    flat: Callable[..., Tensors],
    policy: Policy | Budget,
    offload: bool,
    env: Env,
    where: str,
    sources: tuple[Source, ...],
    planned: Callable[[Any, Callable[[], Any]], Any],
) -> Region:
    """The region of a function. `planned(shapes, plan)` remembers what a budget chose."""
    known: dict[str, Any] = {}
    wants = policy is not nothing_saveable

    def run(*xs: Tensor) -> Tensors:
        names: set[str | None] = set()
        accepts = known.get("accepts", policy)

        def saves(place: int, call: Call, found: Tensors) -> bool:
            its = made(place, call, found)
            names.add(its.name)
            return accepts(its)

        memo = Memo(saves) if wants else None
        here = current()
        known["marks"] = here.marks()
        with using(_with_memo(here, memo)):
            results, known["drawn"] = first_time(lambda: flat(*xs), sources, where)
        if isinstance(policy, Names):
            check_names(policy.names, names, where)
        entries = () if memo is None else memo.entries()
        known["notes"] = None if memo is None else memo.finish()
        known["results"], known["places"] = len(results), [(kept.place, len(kept.results)) for kept in entries]
        stored = [x for kept in entries for x in kept.results]
        known["devices"] = [x.device for x in stored]
        return (*results, *(_to_host(x) if offload else x for x in stored))

    def replay(xs: Tensors, stored: Tensors) -> Tensors:
        if offload:
            stored = tuple(x.to(d, non_blocking=True) for x, d in zip(stored, known["devices"], strict=True))
        left = iter(stored)
        kept = tuple(Kept(place, tuple(next(left) for _ in range(n))) for place, n in known["places"])
        here = current()
        memo = Memo(None, kept, known["notes"], where) if wants else None
        here = here.again(known["marks"])
        with using(_with_memo(here, memo)):
            results = again(lambda: flat(*xs), known["drawn"], env, where)
        if memo is not None:
            memo.finish()
        return results

    def choose(region: Region, tensors: Tensors) -> None:
        assert isinstance(policy, Budget)
        with unmoved(sources):
            chosen = planned(_shapes(region, tensors), lambda: policy.choose(_dry_run(region, tensors)))
        left = [policy.bytes]

        def accepts(its: Made) -> bool:
            fits = its.place in chosen and its.bytes <= left[0]
            left[0] -= its.bytes * fits
            return fits

        known["accepts"] = accepts

    if isinstance(policy, Budget):
        known["choose"] = choose
    return Region(run, replay, env, known, where)


def _pulled(region: Region, count: int, stored: int, wanted: tuple[int, ...], given: tuple[int, ...]) -> Region:
    """The region of (inputs, what was stored, cotangents `given`) that gives the cotangents of the inputs `wanted`."""
    known: dict[str, Any] = {}

    def cotangents(ys: Tensors, nested: bool) -> Sequence[Tensor | None]:
        xs, kept, gs = ys[:count], ys[count : count + stored], ys[count + stored :]

        def of_wanted(*ws: Tensor) -> Tensors:
            full = dict(enumerate(xs)) | dict(zip(wanted, ws, strict=True))
            results = region.replay(tuple(full.values()), kept)
            return tuple(results[i] for i in given)

        ws = [xs[i] for i in wanted]
        if nested or transforms_active():
            return torch.func.vjp(of_wanted, *ws)[1](tuple(gs))
        ws = [w.detach().requires_grad_() for w in ws]  # torch.func would keep the graph of the backward
        _stand_in(ws, [xs[i] for i in wanted], region.env)
        with using(current()._replace(differentiated=True)):
            pairs = [(y, g) for y, g in zip(of_wanted(*ws), gs, strict=True) if y.requires_grad]
            return _grads(ws, pairs)

    def run(*ys: Tensor) -> Tensors:
        found = cotangents(ys, nested=False)
        known["places"] = [i for i, g in enumerate(found) if g is not None]
        known["results"] = len(known["places"])
        return tuple(g for g in found if g is not None)

    def replay(ys: Tensors, _: Tensors) -> Tensors:
        found = cotangents(ys, nested=True)
        return tuple(found[i] for i in known["places"])  # type: ignore[misc]

    return Region(run, replay, region.env, known, region.where, again=True)


def _with_memo(env: Env, memo: Memo | None) -> Env:
    env = env.without(Memo)
    return env if memo is None else env.inside(remembering(memo))


def _stand_in(new: Sequence[Tensor], old: Sequence[Tensor], env: Env) -> None:
    """Weights whose gradients wait are known by their tensors, and these are others with all of their cotangents."""
    if (sink := env.find(Sink)) is not None:
        sink.renamed(old, new)


def _grads(inputs: list[Tensor], pairs: list[tuple[Tensor, Tensor]]) -> Sequence[Tensor | None]:
    if not pairs:
        return [None] * len(inputs)
    return torch.autograd.grad([y for y, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)


def _batched(region: Region, in_dims: tuple[Any, ...], size: int, randomness: str) -> Region:
    """The region below one vmap: its axis comes first in the results that have it; `known["out_dims"]` says which."""
    level = (current_level() or 0) + 1  # the levels below it are those still on the stack
    name = dict(region.env.vmap_axes).get(level)
    env = region.env._replace(vmap_axes=tuple(pair for pair in region.env.vmap_axes if pair[0] != level))
    out_dims: list[int | None] = []

    def mapped(fn: Callable[..., Tensors], xs: Tensors) -> tuple[list[Tensor], list[int | None]]:
        def inside(*xs: Tensor) -> Tensors:
            here = current()
            axes = here.vmap_axes if name is None else (*here.vmap_axes, (current_level(), name))
            with using(here._replace(vmap_axes=axes)):
                return fn(*xs)

        found, dims = restore_vmap(inside, in_dims[: len(xs)], size, randomness)(*xs)
        moved = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(found, dims, strict=True)]
        return moved, [None if dim is None else 0 for dim in dims]

    def run(*xs: Tensor) -> Tensors:
        found, out_dims[:] = mapped(region.run, xs)
        region.known["out_dims"] = out_dims
        return tuple(found)

    def replay(xs: Tensors, stored: Tensors) -> Tensors:
        found, dims = mapped(lambda *xs: region.replay(xs, stored), xs)
        pairs = zip(found, dims, out_dims, strict=False)  # what is stored follows the results
        return tuple(x if now == then else x.expand(size, *x.shape) for x, now, then in pairs)

    batches = (*region.batches, (in_dims, size, name))
    return replace(region, run=run, replay=replay, env=env, batches=batches)


class _Region(torch.autograd.Function):
    @staticmethod
    def forward(region: Region, *tensors: Tensor) -> Tensors:  # type: ignore[override]
        env = region.env.without(Memo)._replace(vmap_axes=(), differentiated=False)
        with using(env), torch.enable_grad(), _marked(region):
            inputs = tuple(carry_cut(x, x.detach()) for x in tensors)
            _stand_in(inputs, tensors, env)
            if "choose" in region.known:
                region.known["choose"](region, inputs)
            results = region.run(*inputs)
        if any(is_differentiated(y) for y in results):
            problem = "a tensor that it reaches, but that is no argument, is differentiated and would get no gradient"
            raise FunctitanError(report(region.where, [problem], "pass it as an argument"))
        return tuple(y.view_as(y) if any(y is x for x in (*inputs, *results[:i])) else y for i, y in enumerate(results))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.region, *tensors = inputs
        count = ctx.region.known["results"]
        ctx.num_inputs, stored = len(tensors), output[count:]
        ctx.save_for_backward(*tensors, *stored)
        ctx.save_for_forward(*tensors, *stored)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(y for y in output[:count] if not has_derivative(y)), *stored)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        n, saved = ctx.num_inputs, ctx.saved_tensors
        wanted = tuple(i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed)
        given = tuple(i for i, g in enumerate(cotangents[: ctx.region.known["results"]]) if g is not None)
        if not wanted or not given:
            return (None,) * (1 + n)
        pulled = _pulled(ctx.region, n, len(saved) - n, wanted, given)
        found = apply_region(pulled, (*saved, *(cotangents[i] for i in given)))  # type: ignore[misc]
        of = dict(zip((wanted[i] for i in pulled.known["places"]), found, strict=True))
        return (None, *(of.get(i) for i in range(n)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], region: Region, *tensors: Tensor) -> Any:  # type: ignore[override]
        batched = _batched(region, in_dims[1:], info.batch_size, info.randomness)
        results = _Region.apply(batched, *tensors)
        return results, tuple(region.known["out_dims"])

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:  # type: ignore[override]
        refuse_forward_mode(ctx.region.env.mesh, "remat")
        problem = "forward mode through it is not supported"
        raise FunctitanError(report(ctx.region.where, [problem], "take ft.hvp, or torch.func.jacrev"))


def _marked(region: Region) -> ExitStack:
    """Inside the hooks of what is around a recomputation, if this is one."""
    stack = ExitStack()
    for each in region.env.around if region.again else ():
        if each.recomputation is not None:
            stack.enter_context(each.recomputation())
    return stack


def _to_host(x: Tensor) -> Tensor:
    if x.is_cuda:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    return x.to("cpu", copy=True)


def _shapes(region: Region, tensors: Tensors) -> Any:
    mesh = None if region.env.mesh is None else region.env.mesh.sizes
    shapes = tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in tensors)
    return region.batches, mesh, region.env.rules, region.env.sequence, shapes


def _dry_run(region: Region, tensors: Tensors) -> list[Made]:
    """Each call of a named op in the region, with what it sends, by running it on fake tensors."""
    ledger, calls = Ledger(), []
    mesh = current().mesh
    if mesh is not None:
        mesh = mesh._replace(transport=shapes_only())

    def note(its: Made) -> bool:
        calls.append(its._replace(sent=ledger.total_bytes()))
        ledger.entries.clear()
        return False

    region.known["accepts"] = note
    env = current().key.uncaptured._replace(mesh=mesh).inside(entering(ledger))
    with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True), using(env):
        region.run(*(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in tensors))
    return calls
