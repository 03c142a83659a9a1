"""What a named op knows besides its tensors: mesh, rules, the phase, hidden vmap axes, precision, the ledger.

Invariant: an `Env` is an immutable value. An op reads it once, when it is called, and keeps it: backward and
recomputation read the kept one, because they may run on another thread, where the context is empty.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import record_function

from functitan.errors import MeshError, check_function, report
from functitan.sharding.deferred import Deferred
from functitan.sharding.distributed import mesh_of
from functitan.sharding.float8 import Float8
from functitan.sharding.layout import Layout, layout_of
from functitan.sharding.ledger import Ledger, Taps
from functitan.sharding.memo import Memo
from functitan.sharding.mesh import Mesh, MeshSizes, Transport
from functitan.sharding.message import Label, Message, Passing, span_name
from functitan.sharding.precision import Precision
from functitan.sharding.program import user_line
from functitan.sharding.rings import Pipelining
from functitan.sharding.rules import AxisRules, Dims, check_rules
from functitan.sharding.sequence import DEFAULT, Sequence
from functitan.sharding.traced import Capture


class Env(NamedTuple):
    """The surroundings of an op. Without a mesh, named ops are plain torch."""

    mesh: Mesh | None = None
    rules: AxisRules | None = None
    phase: str = "forward"
    recomputed: bool = False
    vmap_axes: tuple[tuple[int, str], ...] = ()  # (functorch level, name) of each `ft.vmap` around the op
    ledger: Ledger | None = None
    differentiated: bool = False  # by plain autograd, which torch.func's own stack does not show
    taps: Taps | None = None
    checked: bool = False  # ranks compare programs before they communicate
    line: str = ""  # the user's, where an op was called; only while checked
    precision: Precision | None = None  # none: dtypes are left as they are
    float8: Float8 | None = None
    capture: Capture | None = None  # of the program that is being captured
    memo: Memo | None = None  # what remat stores, or has stored, of the function that runs
    pipelined: Pipelining | None = None  # what runs beside matmuls; none: nothing does
    sequence: Sequence = DEFAULT  # how positions lie, and how attention meets them where they are sharded
    profiled: bool = False  # ops, collectives and phases name their spans for `ft.profile`
    pipeline: Mesh | None = None  # of all pipeline stages, where `mesh` is that of the ranks of this one
    deferred: Deferred | None = None  # takes the gradients of weights, of a backward whole or split in two

    @property
    def remembers(self) -> bool:
        """Whether named ops remember how their results lie: on a mesh, where a program runs for the first time."""
        if self.mesh is None:
            return False
        return self.checked or self.capture is not None or not self.mesh.transport.has_values

    def layout(self, axes: tuple[str, ...]) -> Layout:
        """The layout of a pattern here; only where there is a mesh."""
        assert self.mesh is not None and self.rules is not None
        if self.ledger is not None:
            self.ledger.patterns.add(axes)
        return layout_of(axes, self.rules, self.mesh.sizes)

    @property
    def key(self) -> Env:
        """These surroundings without what only watches: all that caches of programs compare, and nobody else lists."""
        return self._replace(ledger=None, taps=None, checked=False, line="", profiled=False)

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
        return record_function(span_name(op, pattern, self.phase, self.recomputed)) if self.profiled else _OFF

    def note(self, text: str) -> None:
        """Let a ledger, and that of a program which is being captured, say something once."""
        for kept in (self.ledger, self.capture):
            if kept is not None and text not in kept.notes:
                kept.notes.append(text)

    def message(self, collective: str, x: Tensor, dims: Dims, label: Label, how: str | Passing = "") -> Message:
        """The message of a collective here, of a tensor as it is sent."""
        assert self.mesh is not None
        ranks = self.mesh.sizes.size(dims)
        return Message(collective, dims, ranks, tuple(x.shape), x.dtype, how, *label, self.phase, self.recomputed)

    @property
    def transport(self) -> Transport:
        """What carries messages here: the mesh's own transport, or the graph of the program that is being captured."""
        assert self.mesh is not None
        return self.mesh.transport if self.capture is None else self.capture.transport(self.mesh)


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


_CURRENT: ContextVar[Env] = ContextVar("functitan", default=Env())  # noqa: B039 (an Env is immutable)


def current() -> Env:
    """The surroundings of the caller."""
    env = _CURRENT.get()
    return env._replace(line=user_line()) if env.checked else env


def within(name: str, fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, as a span of this name where a profile is on."""
    if not _CURRENT.get().profiled:
        return fn(*args)
    with record_function(name):
        return fn(*args)


@contextmanager
def using(env: Env) -> Iterator[Env]:
    """Run the body in these surroundings."""
    token = _CURRENT.set(env)
    try:
        yield env
    finally:
        _CURRENT.reset(token)


def spmd(
    fn: Callable[..., Any], *, mesh: Mesh | DeviceMesh | None, rules: AxisRules | None = None
) -> Callable[..., Any]:
    """A function that runs `fn` where named ops know the mesh and the rules.

    Tensors are local shards: `ft.shard` makes them from global values, `ft.init` from declarations. Without a mesh the
    function is `fn` as plain PyTorch. Raises `MeshError` and `RulesError` before anything runs.

    >>> import torch, functitan as ft
    >>> rules = ft.AxisRules({"batch": "dp", "embed": None})
    >>> def mean(mesh, x):
    ...     x = ft.shard(x, "batch embed", mesh=mesh, rules=rules)
    ...     return ft.spmd(lambda x: ft.reduce("batch embed ->", x, op="mean"), mesh=mesh, rules=rules)(x)
    >>> ft.simulate(dp=2)(mean)(torch.arange(8.0).view(4, 2))
    [tensor(3.5000), tensor(3.5000)]
    """
    check_function(fn, "ft.spmd")
    known = as_mesh(mesh)
    if rules is not None or known is not None:
        if not isinstance(rules, AxisRules):
            raise MeshError(report("ft.spmd", [f"rules is {rules!r}"], "give a table: rules=ft.AxisRules({...})"))
        if known is not None:
            check_rules(rules, known.sizes)

    @functools.wraps(fn)
    def inside(*args: Any, **kwargs: Any) -> Any:
        env = _CURRENT.get()
        outer = env.of_all_stages().mesh
        planned = outer is not None and not outer.transport.has_values and known is not None
        with using(env if planned else env.on(known, rules)):
            return fn(*args, **kwargs)

    return inside


@contextmanager
def record() -> Iterator[Ledger]:
    """Record the collectives that run in the body: a `Ledger`, to be held against `ft.explain`.

    On a virtual mesh opened inside the body, those of rank 0 are recorded.
    """
    ledger = Ledger("recorded")
    with using(current()._replace(ledger=ledger)):
        yield ledger


def as_mesh(mesh: Mesh | DeviceMesh | None) -> Mesh | None:
    """A rank's `Mesh` of what users call a mesh: a `DeviceMesh`, a virtual mesh, or `None`."""
    if mesh is None or isinstance(mesh, Mesh):
        return mesh
    if isinstance(mesh, DeviceMesh):
        return mesh_of(mesh)
    problem = f"{mesh!r} is a {type(mesh).__name__}"
    raise MeshError(
        report("mesh", [problem], "make one by ft.make_mesh(fsdp=2, tp=2), or run under ft.simulate(fsdp=2, tp=2)")
    )
