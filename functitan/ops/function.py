"""The one autograd Function behind every named op, and the axes that vmap hides.

Invariant: an op is a value of pure functions, and a call of it carries all that its derivatives need. Layouts are
decided when the op is called, from the axes that the caller sees and those that `ft.vmap` hides; the Function runs
only after every transform has been peeled off. Also the one user of `torch._C._functorch` (tried on torch 2.11, 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # type: ignore[attr-defined]
from torch.autograd import forward_ad

from functitan.sharding.around import around_op
from functitan.sharding.collectives import refuse_forward_mode
from functitan.sharding.env import Env


class Hidden(NamedTuple):
    """One axis of a tensor that a vmap hides: its level, its local size, its name if `ft.vmap` gave one.

    `axis` is its name inside an op: its own, since the caller may see the rest of the same axis (a batch of one).
    """

    level: int
    size: int
    name: str | None
    axis: str


Hiddens = tuple[Hidden, ...]  # of one tensor, outermost first


class Op(NamedTuple):
    """A named op: how to run it on plain shards, and its derivatives in terms of named ops."""

    name: str
    run: Callable[..., tuple[Tensor, ...]]  # (call, *tensors) -> results
    vjp: Callable[..., tuple[Tensor | None, ...]]  # (call, tensors, results, cotangents, wanted) -> cotangents
    jvp: Callable[..., tuple[Tensor | None, ...]] | None  # (call, tensors, results, tangents) -> tangents
    show: Callable[..., Any]  # (call, hidden, which operands, which results) -> static data where these show the axis
    saves_results: bool = False
    saves_operands: bool = True


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an op: its surroundings, its static data, and the axes still hidden in each tensor.

    Opaque to pytrees: torch.func flattens what an op is given at each of its levels.
    """

    op: Op
    env: Env
    static: Any
    operands: tuple[Hiddens, ...]
    results: tuple[Hiddens, ...]

    def shown(self, hidden: Hidden) -> Call:
        """The call below one vmap: its axis stands first in the tensors that have it, and derivatives see it there."""
        here = [tuple(hidden in own for own in tensors) for tensors in (self.operands, self.results)]
        left = [
            tuple(tuple(h for h in own if h != hidden) for own in tensors) for tensors in (self.operands, self.results)
        ]
        env = self.env._replace(vmap_axes=tuple(pair for pair in self.env.vmap_axes if pair[0] != hidden.level))
        return Call(self.op, env, self.op.show(self, hidden, *here), *left)

    def transposed(self) -> Env:
        """The surroundings of the ops that its vjp calls."""
        return self.env.of_derivatives


def apply(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Call an op on tensors, differentiably where any transform or autograd is at work."""
    if not transforms_active() and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return _run(call, tensors)
    return _NamedOp.apply(call, *tensors)


def hidden_axes(x: Tensor, env: Env, shown: frozenset[str] = frozenset()) -> Hiddens:
    """The axes that vmaps hide in a tensor, outermost first; an axis of `torch.func.vmap` has no name, and no rule.

    Their names inside the op are none of `shown`: the backward of an earlier vmap of the same level shows its axis.
    """
    if not transforms_active():
        return ()
    names, found = dict(env.vmap_axes), []
    while True:
        if functorch.is_batchedtensor(x):
            level, place = functorch.maybe_get_level(x), functorch.maybe_get_bdim(x)
            x = functorch.get_unwrapped(x)
            found.append(_hidden(level, x.shape[place], names.get(level), shown))
        elif functorch.is_gradtrackingtensor(x):
            x = functorch.get_unwrapped(x)
        else:
            return tuple(reversed(found))


def peeled(x: Tensor) -> Tensor:
    """The plain tensor under all transforms; axes that vmaps hide stand somewhere in it."""
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def vmaps_around(env: Env) -> Hiddens:
    """The axes of each `ft.vmap` around the caller, outermost first: those of a tensor that all of them batch."""
    names = dict(env.vmap_axes)
    alive = [level for level in functorch.get_interpreter_stack() or () if level.key() == functorch.TransformType.Vmap]
    return tuple(
        _hidden(level.level(), functorch.CVmapInterpreterPtr(level).batchSize(), names[level.level()])
        for level in alive
        if level.level() in names
    )


def hide(x: Tensor, hidden: Hiddens) -> Tensor:
    """A view of a tensor that no vmap batches, with these axes hidden in it: equal along each of them."""
    if not hidden:
        return x
    x = peeled(x.expand(*(h.size for h in hidden), *x.shape))  # of transforms further in than these axes
    for h in hidden:
        x = functorch._add_batch_dim(x, 0, h.level)
    return x


def _hidden(level: int, size: int, name: str | None, shown: frozenset[str] = frozenset()) -> Hidden:
    axis = f"_vmap{level}"
    while axis in shown:
        axis += "_"
    return Hidden(level, size, name, axis)


def transforms_active() -> bool:
    """True inside any torch.func transform."""
    return functorch.peek_interpreter_stack() is not None


def has_derivative(x: Any) -> bool:
    """True for tensors of floating-point or complex numbers."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def is_differentiated(x: Tensor) -> bool:
    """True for a tensor that plain autograd tracks, or that a torch.func transform has wrapped."""
    return x.requires_grad or functorch.is_functorch_wrapped_tensor(x)


def is_batched(x: Tensor) -> bool:
    """True for a tensor that a vmap batches: there is no one value to be read."""
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def requires_gradient(x: Tensor) -> bool:
    """True for a tensor that plain autograd, or a torch.func transform around the caller, takes a gradient of."""
    while not x.requires_grad and functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x.requires_grad and torch.is_grad_enabled()


def needs_higher_derivatives(env: Env) -> bool:
    """True where a kernel with no more than a first reverse derivative would fail: nested transforms, forward mode."""
    stack = functorch.get_interpreter_stack() or []
    return needs_second_derivative(env) or any(level.key() != functorch.TransformType.Grad for level in stack)


def needs_second_derivative(env: Env) -> bool:
    """True where an op with no more than a first reverse derivative, and a rule for vmap, would fail."""
    keys = [level.key() for level in functorch.get_interpreter_stack() or ()]
    reverse = keys.count(functorch.TransformType.Grad) + env.differentiated
    return reverse > 1 or functorch.TransformType.Jvp in keys or forward_ad._current_level >= 0


def current_level() -> int:
    """The level of the innermost transform around the caller."""
    return functorch.maybe_current_level()


def _run(call: Call, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run an op on plain shards, inside the hooks of its surroundings: the one place where all ops run."""
    return around_op(call.env.around, call, tensors, _computed)


def _computed(call: Call, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with call.env.span(*getattr(call.static, "label", (call.op.name, ""))):
        return tuple(call.op.run(call, *tensors))


class _NamedOp(torch.autograd.Function):
    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        assert not any(call.operands), "a batched tensor reached the innermost call"
        # an output that is an input (nothing to do on this rank) would confuse autograd: give it a view of its own
        return tuple(y.view_as(y) if any(y is x for x in tensors) else y for y in _run(call, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        op = ctx.call.op
        saved = (tensors if op.saves_operands else []) + (list(output) if op.saves_results else [])
        ctx.num_operands = len(tensors)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(y for y in output if not has_derivative(y)))
        if len(output) > 1:
            ctx.zeros = [partial(torch.zeros, y.shape, dtype=y.dtype, device=y.device) for y in output]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = tuple(i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed)
        if all(g is None for g in cotangents):  # of a result that only unused results need
            return (None,) * (1 + ctx.num_operands)
        given = dict(zip(wanted, ctx.call.op.vjp(ctx.call, *_saved(ctx), cotangents, wanted), strict=True))
        return (None, *(given.get(i) for i in range(ctx.num_operands)))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:  # type: ignore[override]
        refuse_forward_mode(ctx.call.env.mesh, ctx.call.op.name)
        assert ctx.call.op.jvp is not None
        found = tuple(ctx.call.op.jvp(ctx.call, *_saved(ctx), tangents))
        if len(found) == 1:
            return found
        return tuple(zeros() if t is None else t for t, zeros in zip(found, ctx.zeros, strict=True))  # torch wants all

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Call, *tensors: Tensor) -> Any:  # type: ignore[override]
        batched = [i for i, place in enumerate(in_dims[1:]) if place is not None]
        hidden = call.operands[batched[0]][-1]
        assert all(call.operands[i][-1] == hidden for i in batched)
        moved = [x if place is None else x.movedim(place, 0) for x, place in zip(tensors, in_dims[1:], strict=True)]
        return _NamedOp.apply(call.shown(hidden), *moved), tuple(0 if hidden in own else None for own in call.results)


def _saved(ctx: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    split = ctx.num_operands if ctx.call.op.saves_operands else 0
    return ctx.saved_tensors[:split], ctx.saved_tensors[split:]
