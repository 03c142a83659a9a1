"""`Lowering`: the hooks by which a feature chooses how the plans of ops run: arithmetic and order, never the meaning.

Invariant: a lowering is a value. What it knows is in its `state`, and its hooks are functions of a module, which take
the state first: two lowerings are equal where their states are, and caches of programs compare them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Lowering:
    """The hooks of one feature, all of them optional, and opaque to pytrees; `Env.find` finds it by its state's type.

    `arithmetic(state, pattern, signature, tensors, env)` gives an einsum's `Arithmetic`, or `None` for the plain one.
    `rewrite(state, contraction, plan, env, label)` gives how the products of a plan are taken and summed, in the place
    of `schedule.plain_sum`, or `None`. `mark(state)` is where it stands, and `at(state, mark)` its state there: what a
    recomputation begins with.
    """

    state: Any
    arithmetic: Callable[..., Any] | None = None
    rewrite: Callable[..., Any] | None = None
    mark: Callable[[Any], Any] | None = None
    at: Callable[[Any, Any], Any] | None = None
    is_of_derivatives: bool = True  # the ops that a vjp calls have it, too

    def again(self, mark: Any) -> Lowering:
        """This lowering as it was at a mark."""
        return self if self.at is None else replace(self, state=self.at(self.state, mark))
