"""The steps of plans, run on this rank's tensors: sub-axes of framed axes are gathered, scattered and exchanged.

Invariant: every collective that runs anywhere passes through `send` or `start`, inside the hooks of `Env.around`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from functitan.sharding.around import around_message
from functitan.sharding.env import Env
from functitan.sharding.message import Label, Passing
from functitan.sharding.moves import Step, View
from functitan.sharding.precision import narrowed
from functitan.sharding.rules import Dims


def run_step(
    x: Tensor, step: Step, env: Env, label: Label, op: str = "sum", dtype: torch.dtype | None = None
) -> Tensor:
    """One step of a plan on this rank's tensor. `dtype` is the one to reduce in, where the step reduces."""
    if step.kind == "all_reduce":
        return reduced(x, step, env, label, op, dtype)
    shape, after = _framed(x, step)
    if step.kind == "slice":
        out = _own(x.reshape(shape), step, env)
    elif step.kind == "all_gather":
        out = send("all_gather", x, step.dims, env, label)
    elif step.kind == "all_to_all":
        out = send("all_to_all", _scattered_first(x, shape, step), step.dims, env, label)
    else:
        out = reduced(_scattered_first(x, shape, step), step, env, label, op, dtype)
    return _merged(out, step, after)


def settle(
    x: Tensor,
    own: torch.dtype,
    goal: torch.dtype,
    steps: tuple[Step, ...],
    env: Env,
    label: Label,
    op: str = "sum",
) -> Tensor:
    """Bring a local result, computed in dtype `own`, to its layout and the dtype `goal`, by the steps of a plan.

    Sums over ranks run in what `env.precision` gives for `own`, and stay in it until the next or the end.
    """
    for step in steps:
        if step.kind in ("all_gather", "all_to_all"):
            x = narrowed(x, goal)
        elif step.kind != "slice" and op == "sum" and env.precision is not None:
            x = x.to(summed_in(own, step.dims, env))
        x = run_step(x, step, env, label, op)
    return x.to(goal)


def summed_in(own: torch.dtype, dims: Dims, env: Env) -> torch.dtype:
    """The dtype in which values of dtype `own` are summed over these mesh dims."""
    return own if env.precision is None or not own.is_floating_point else env.precision.reduces(dims, own)


def _framed(x: Tensor, step: Step) -> tuple[list[int], list[int]]:
    """The tensor's shape with its framed axes as sub-axes, and that when the scattered ones have become of size 1."""
    shape, after = list(x.shape), list(x.shape)
    for view in reversed(_views(step)):
        sizes = [1 if view is step.source and p in view.moved else n for p, n in enumerate(view.sizes)]
        rest = x.shape[view.axis] // math.prod(sizes)
        shape[view.axis : view.axis + 1] = [*sizes, rest]
        after[view.axis : view.axis + 1] = [*(1 if p in view.moved else n for p, n in enumerate(view.sizes)), rest]
    return shape, after


def _scattered_first(x: Tensor, shape: list[int], step: Step) -> Tensor:
    """The sub-axes to be scattered flattened into one leading axis: row j is for rank j."""
    assert step.target is not None
    moved = _places(step, step.target)
    rest = [i for i in range(len(shape)) if i not in moved]
    return _turned(x, shape, [*moved, *rest], [math.prod(shape[i] for i in moved), *(shape[i] for i in rest)])


def _own(sub: Tensor, step: Step, env: Env) -> Tensor:
    """This rank's part of the sub-axes to be scattered: a view."""
    assert env.mesh is not None and step.target is not None
    own = env.transport.own
    for axis, dim in zip(_places(step, step.target), step.dims, strict=True):
        sub = own(sub, axis, dim, env.mesh.index((dim,)))
    return sub


def _merged(out: Tensor, step: Step, shape: list[int]) -> Tensor:
    """The tensor with a leading axis of gathered sub-axes moved to their places, and sub-axes merged."""
    now, order = shape, list(range(len(shape)))
    if step.source is not None:
        places = _places(step, step.source)
        sizes = [step.source.sizes[p] for p in step.source.moved]
        now, lead = [*sizes, *shape], len(places)
        order = [places.index(i) if i in places else lead + i for i in range(len(shape))] + [lead + i for i in places]
        shape = [sizes[places.index(i)] if i in places else n for i, n in enumerate(shape)]
    for view in reversed(_views(step)):
        at, width = _offset(step, view), len(view.sizes) + 1
        shape = [*shape[:at], math.prod(shape[at : at + width]), *shape[at + width :]]
    return _turned(out, now, order, shape)


def _turned(x: Tensor, shape: list[int], order: list[int], final: list[int]) -> Tensor:
    """`x` seen as `shape`, permuted, and reshaped; the permutation of axes of size 1 moves nothing."""
    moving = [i for i in order if shape[i] != 1]
    return x.reshape(final) if moving == sorted(moving) else x.reshape(shape).permute(order).reshape(final)


def _views(step: Step) -> list[View]:
    return sorted((view for view in (step.source, step.target) if view is not None), key=lambda view: view.axis)


def _offset(step: Step, view: View) -> int:
    return view.axis + sum(len(other.sizes) for other in _views(step) if other.axis < view.axis)


def _places(step: Step, view: View) -> list[int]:
    return [_offset(step, view) + p for p in view.moved]


def reduced(x: Tensor, step: Step, env: Env, label: Label, op: str, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or dtype == x.dtype:
        return send(step.kind, x, step.dims, env, label, op)
    return send(step.kind, x.to(dtype), step.dims, env, label, op).to(x.dtype)


def send(kind: str, x: Tensor, dims: Dims, env: Env, label: Label, how: str | Passing = "") -> Tensor:
    """Run one collective over a group of mesh dims, inside what is around it: a ledger, checks, a profile."""
    sent = _on_wire(x)
    message = env.message(kind, sent, dims, label, how)
    result = around_message(message, sent, env, env.transport.start)()
    return torch.view_as_complex(result) if x.is_complex() else result


def start(kind: str, x: Tensor, dims: Dims, env: Env, label: Label, how: str | Passing = "") -> Callable[[], Tensor]:
    """Start a collective, as `send` would run it; the function that waits for its result, to be called once.

    What is computed between the two hides it: the ledger's entry is `hidden`. Until then `x` stays as it is, and all
    ranks of the group start their collectives in one order. A captured one starts where it stands in the graph, and is
    waited for where its result is first used. A trace has the message's `name` for the start, its `wait` for the wait.
    """
    sent = _on_wire(x)
    message = env.message(kind, sent, dims, label, how)._replace(hidden=True)
    wait = around_message(message, sent, env, env.transport.start)
    return (lambda: torch.view_as_complex(wait())) if x.is_complex() else wait


def enter_fused(x: Tensor, dims: Dims, env: Env, label: Label) -> None:
    """Let what is around see a `permute` of `x` that an op sends by itself, beside what it computes."""
    message = env.message("permute", x, dims, label, Passing(1))._replace(hidden=True)
    around_message(message, x, env, lambda message, x: None)


def _on_wire(x: Tensor) -> Tensor:
    """What is sent: the numbers themselves, where a view only says that they are conjugate; complex ones as pairs."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x.resolve_neg()
