"""`Around`: the hooks of what sees, or answers instead of, the ops and messages of a program.

Invariant: the core calls these hooks, knows no feature by its name, and gives every op the ones that were in force
where it was called. They nest: the first of `Env.around` is the outermost, and calls what is inside it. Those that
change what runs stand outside those that only watch, so that a ledger holds what is sent in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from functitan.axes import Axes
from functitan.sharding.mesh import Mesh, Transport
from functitan.sharding.message import Label, Message

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Around:
    """The hooks of one feature, all of them optional, and how the core treats it. Opaque to pytrees.

    `state` is what the hooks are about (a ledger, say), by whose type its feature finds it again: `Env.find`.
    """

    state: Any
    op: Callable[[Any, Results, Callable[..., Results]], Results] | None = None  # (call, tensors, run(call, tensors))
    message: Callable[..., Any] | None = None  # (message, tensor, env, start): what start(message, tensor) gives
    entered: Callable[[Iterable[Message]], None] | None = None  # messages that a compiled program sends by itself
    span: Callable[[str], AbstractContextManager[Any]] | None = None  # around what has this name in a trace
    note: Callable[[str], None] | None = None  # a remark on how the program runs
    patterns: Callable[[Iterable[Axes]], None] | None = None  # whose layouts are looked up
    called: Callable[[], Around] | None = None  # the hooks for an op that is called here
    inside: Callable[[Label, str], Around] | None = None  # for the ops inside an op of several lowerings
    recomputation: Callable[[], AbstractContextManager] | None = None  # around what is computed again
    transport: Callable[[Mesh], Transport] | None = None  # what carries messages instead of the mesh's own transport
    # how the core treats it
    sees_every_op: bool = False  # also where plain torch ops would do, without a named op
    remembers: bool = False  # named ops mark their results with how they lie
    is_of_derivatives: bool = True  # the ops that a vjp calls have it, too
    changes_programs: bool = False  # a cache of programs tells surroundings apart by it


def noting(notes: list[str]) -> Callable[[str], None]:
    """The hook that keeps each remark once."""
    return lambda text: None if text in notes else notes.append(text)


def around_op(around: tuple[Around, ...], call: Any, tensors: Results, run: Callable[..., Results]) -> Results:
    """The results of `run(call, tensors)`, inside the hooks."""
    for each in reversed(around):
        if each.op is not None:
            run = _op_inside(each.op, run)
    return run(call, tensors)


def around_message(message: Message, x: Tensor | None, env: Any, start: Callable[..., Any]) -> Any:
    """Send a message by `start(message, x)`, inside the hooks; `x` is `None` for a message that is awaited."""
    for each in reversed(env.around):
        if each.message is not None:
            start = _message_inside(each.message, env, start)
    return start(message, x)


def _op_inside(hook: Callable[..., Results], run: Callable[..., Results]) -> Callable[..., Results]:
    return lambda call, tensors: hook(call, tensors, run)


def _message_inside(hook: Callable[..., Any], env: Any, start: Callable[..., Any]) -> Callable[..., Any]:
    return lambda message, x: hook(message, x, env, start)
