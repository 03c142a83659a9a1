"""`Env`: what a named op knows besides its tensors: mesh, rules, the phase, and the hooks of features.

Invariant: an `Env` is an immutable value. An op reads it once, when it is called, and keeps it: backward and
recomputation read the kept one, because they may run on another thread, where the context is empty.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from functitan.sharding.around import Around
from functitan.sharding.layout import Layout, layout_of
from functitan.sharding.lowering import Lowering
from functitan.sharding.mesh import Mesh, MeshSizes, Transport
from functitan.sharding.message import Label, Message, Passing, span_name
from functitan.sharding.precision import Precision
from functitan.sharding.rules import AxisRules, Dims
from functitan.sharding.sequence import DEFAULT, Sequence

T = TypeVar("T")


class Env(NamedTuple):
    """The surroundings of an op. Without a mesh, named ops are plain torch."""

    mesh: Mesh | None = None
    rules: AxisRules | None = None
    phase: str = "forward"
    recomputed: bool = False
    vmap_axes: tuple[tuple[int, str], ...] = ()  # (functorch level, name) of each `ft.vmap` around the op
    differentiated: bool = False  # by plain autograd, which torch.func's own stack does not show
    precision: Precision | None = None  # none: dtypes are left as they are
    sequence: Sequence = DEFAULT  # how positions lie, and how attention meets them where they are sharded
    pipeline: Mesh | None = None  # of all pipeline stages, where `mesh` is that of the ranks of this one
    lowering: tuple[Lowering, ...] = ()  # how the plans of ops run; the last is of the innermost wrapper
    around: tuple[Around, ...] = ()  # what sees, or answers instead of, ops and messages; the first is the outermost

    @property
    def remembers(self) -> bool:
        """Whether named ops remember how their results lie: on a mesh, where a program runs for the first time."""
        if self.mesh is None:
            return False
        return not self.mesh.transport.has_values or any(each.remembers for each in self.around)

    @property
    def sees_every_op(self) -> bool:
        """Whether something around wants each op to be a named one, also where plain torch ops would do."""
        return bool(self.around) and any(each.sees_every_op for each in self.around)  # most have nothing around

    @property
    def is_captured(self) -> bool:
        """Whether a program is being captured, whose tensors have no values yet and whose messages become nodes."""
        return bool(self.around) and any(each.transport is not None for each in self.around)

    def layout(self, axes: tuple[str, ...]) -> Layout:
        """The layout of a pattern here; only where there is a mesh."""
        assert self.mesh is not None and self.rules is not None
        self.ask((axes,))
        return layout_of(axes, self.rules, self.mesh.sizes)

    def ask(self, patterns: Iterable[tuple[str, ...]]) -> None:
        """Tell what is around of patterns whose layouts are looked up."""
        for each in self.around:
            if each.patterns is not None:
                each.patterns(patterns)

    @property
    def key(self) -> Env:
        """These surroundings without what only watches: all that caches of programs compare, and nobody else lists."""
        return self._replace(around=tuple(each for each in self.around if each.changes_programs))

    @property
    def uncaptured(self) -> Env:
        """These surroundings, where messages are sent by the mesh's own transport."""
        return self._replace(around=tuple(each for each in self.around if each.transport is None))

    def inside(self, around: Around) -> Env:
        """These surroundings, with one more thing around: inside the others, but for those that only watch."""
        if not around.changes_programs:
            return self._replace(around=(*self.around, around))
        changing = tuple(each for each in self.around if each.changes_programs)
        return self._replace(around=(*changing, around, *(x for x in self.around if not x.changes_programs)))

    def find(self, kind: type[T]) -> T | None:
        """The state, of this type, of something that is around, or of a lowering; `None` if there is none."""
        for each in (*self.around, *self.lowering):
            if isinstance(each.state, kind):
                return each.state
        return None

    def without(self, *kinds: type) -> Env:
        """These surroundings without what has a state of one of these types."""
        around = tuple(each for each in self.around if not isinstance(each.state, kinds))
        return self._replace(around=around, lowering=tuple(x for x in self.lowering if not isinstance(x.state, kinds)))

    def lowered_by(self, lowering: Lowering) -> Env:
        """These surroundings with a lowering, in the place of one with a state of its type."""
        env = self.without(type(lowering.state))
        return env._replace(lowering=(*env.lowering, lowering))

    def rewritten(self, contraction: Any, plan: Any, label: Label) -> Callable[..., Any] | None:
        """How a lowering takes and sums the products of a plan; `None` where none has anything to say."""
        for each in self.lowering:
            if each.rewrite is not None and (found := each.rewrite(each.state, contraction, plan, self, label)):
                return found
        return None

    def marks(self) -> dict[type, Any]:
        """Where lowerings stand that count what they meet, by the type of their state: there is one of each."""
        return {type(each.state): each.mark(each.state) for each in self.lowering if each.mark is not None}

    def again(self, marks: dict[type, Any]) -> Env:
        """These surroundings for a recomputation, whose lowerings stand at these marks."""
        phase = "backward" if self.phase == "forward" else self.phase
        lowering = tuple(x.again(marks[type(x.state)]) if type(x.state) in marks else x for x in self.lowering)
        return self._replace(phase=phase, recomputed=True, lowering=lowering)

    @property
    def of_derivatives(self) -> Env:
        """These surroundings for the ops that a vjp calls."""
        phase = "backward" if self.phase == "forward" else self.phase
        around = tuple(each for each in self.around if each.is_of_derivatives)
        lowering = tuple(each for each in self.lowering if each.is_of_derivatives)
        return self._replace(phase=phase, recomputed=False, lowering=lowering, around=around)

    def in_one_way(self, label: Label, way: str) -> Env:
        """These surroundings for the ops inside an op that is lowered in one of several ways."""
        each_inside = (each.inside(label, way) if each.inside is not None else each for each in self.around)
        return self._replace(around=tuple(each_inside)) if self.around else self

    def on(self, mesh: Mesh | None, rules: AxisRules | None) -> Env:
        """These surroundings on a mesh, of which named ops see the ranks of this one's pipeline stage."""
        if mesh is None or mesh.sizes.size("pp") == 1:
            return self._replace(mesh=mesh, rules=rules, pipeline=None)
        stage = mesh.without(("pp",))
        return self._replace(mesh=stage, rules=None if stage is None else rules, pipeline=mesh)

    def of_all_stages(self) -> Env:
        """These surroundings on the mesh of all pipeline stages: for what ranks do that are not of one stage."""
        return self if self.pipeline is None else self._replace(mesh=self.pipeline)

    def on_one_rank(self, axes: tuple[str, ...]) -> Env:
        """These surroundings with a mesh, of one rank if there is none: for ops that run in one way only."""
        if self.mesh is not None:
            return self
        return self._replace(mesh=_ALONE, rules=_nothing_sharded(axes, tuple(name for _, name in self.vmap_axes)))

    def span(self, op: str, pattern: str) -> AbstractContextManager[Any]:
        """The span of an op in a trace; nothing where no profile is on."""
        for each in self.around:
            if each.span is not None:
                return each.span(span_name(op, pattern, self.phase, self.recomputed))
        return _OFF

    def note(self, text: str) -> None:
        """Let a ledger, and that of a program which is being captured, say something once."""
        for each in self.around:
            if each.note is not None:
                each.note(text)

    def entered(self, messages: Iterable[Message]) -> None:
        """Tell what is around of messages that a compiled program sends by itself."""
        for each in self.around:
            if each.entered is not None:
                each.entered(messages)

    def message(self, collective: str, x: Tensor, dims: Dims, label: Label, how: str | Passing = "") -> Message:
        """The message of a collective here, of a tensor as it is sent."""
        assert self.mesh is not None
        ranks = self.mesh.sizes.size(dims)
        return Message(collective, dims, ranks, tuple(x.shape), x.dtype, how, *label, self.phase, self.recomputed)

    @property
    def transport(self) -> Transport:
        """What carries messages here: the mesh's own transport, or the graph of the program that is being captured."""
        assert self.mesh is not None
        others = (each.transport for each in self.around if each.transport is not None)
        return next((other(self.mesh) for other in others), self.mesh.transport)


_OFF: AbstractContextManager[Any] = nullcontext()


@functools.cache
def _nothing_sharded(*groups: tuple[str, ...]) -> AxisRules:
    return AxisRules(dict.fromkeys(itertools.chain(*groups)))


def _no_message(*args: Any) -> Any:
    raise AssertionError("a mesh of one rank sends nothing")


_NOBODY = Transport(_no_message, _no_message)
_ALONE = Mesh(MeshSizes((), ()), (), _NOBODY)


def nowhere(sizes: MeshSizes) -> Mesh:
    """A mesh to look layouts up in: of no rank, which sends nothing."""
    return Mesh(sizes, (), _NOBODY)
