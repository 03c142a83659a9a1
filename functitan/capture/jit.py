"""`ft.jit`: a whole step captured as one graph, improved by passes, compiled, and called like the function.

Invariant: the captured step gives what the function gives. A graph serves exactly what it was made for (structure,
shapes, strides, dtypes, static values, mesh, rules); all else makes another, and what no graph can hold is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards  # private: tried on torch 2.13
from torch.fx import GraphModule

from functitan import tree
from functitan.capture.compare import compare
from functitan.capture.compile import compiled
from functitan.capture.passes.table import chosen_passes, run_passes
from functitan.capture.statics import all_same, check_statics, warn_of_values
from functitan.capture.trace import Program, trace
from functitan.errors import CaptureError, report
from functitan.float8.wrapper import FIX_DELAYED, outside
from functitan.ops.autocast import FIX_AUTOCAST, autocast_is_on
from functitan.ops.function import transforms_active
from functitan.sharding.context import current, within
from functitan.sharding.env import Env
from functitan.sharding.message import Message
from functitan.sharding.program import Checks
from functitan.transforms.donate import check_donated, give_back, take
from functitan.transforms.flat import Form, join, of_tensors, split


def jit(
    fn: Callable[..., Any],
    *,
    donate: int | Sequence[int] = (),
    keep_gathered: bool = False,
    skip: Sequence[str] = (),
    backend: str = "inductor",
) -> Jitted:
    """`fn` as one captured and compiled graph: forward, backward, optimizer and every collective in it.

    Made at the first call, and again for other structures, shapes, dtypes, or values of leaves that are no tensors: a
    number that changes in each call is a warning after a few programs; give it as a tensor. `donate` names arguments
    whose buffers the results may take over: a state is updated in place, without a second copy, and whatever reads the
    old one raises `DonatedError` (see `ft.train_step`). With `keep_gathered` a weight that forward gathered stays whole
    until backward has used it: less communication, at the memory of ZeRO-2 instead of ZeRO-3. `skip` turns passes off
    by name; `jitted.passes` are those that run, `jitted.graph(*args)` is what they made. `backend` is "inductor", or
    "graph" for the graph's plain ops (as always on a virtual mesh and under `ft.explain`). Inside another `ft.jit` it
    is part of that one.

    Raises `CaptureError`, with the line, for what a graph cannot hold: control flow that depends on values, a tensor
    that is no argument, an array or what holds one, an argument written to that was not donated; and inside
    torch.func transforms.

    >>> import torch
    >>> double = jit(lambda tree: {"y": tree["x"] * 2}, backend="graph")
    >>> double({"x": torch.ones(2)})
    {'y': tensor([2., 2.])}
    """
    names = chosen_passes("ft.jit", skip, backend, ("keep_gathered",) if keep_gathered else ())
    places = (donate,) if isinstance(donate, int) else tuple(donate)
    return Jitted(fn, places, names, backend)


@dataclass(frozen=True)
class Jitted:
    """A function that runs as a graph: what `jit` gives."""

    fn: Callable[..., Any]
    donate: tuple[int, ...]
    passes: tuple[str, ...]  # those that run, in order
    backend: str
    _known: list[_Compiled] = field(default_factory=list, repr=False)  # the one used last comes first
    _lock: Any = field(default_factory=threading.Lock, repr=False)  # threads of a virtual mesh share it

    @property
    def what(self) -> str:
        """What errors and traces call it."""
        return f"ft.jit of {getattr(self.fn, '__qualname__', self.fn)}"

    def __call__(self, *args: Any) -> Any:
        env = current()
        if env.is_captured:  # a part of a larger capture
            return self.fn(*args)
        if autocast_is_on():
            problem = "it is called under torch.autocast, which a graph does not hold"
            raise CaptureError(report(self.what, [problem], FIX_AUTOCAST))
        leaves, structure = tree.flatten(args)
        found = self._find(args, leaves, structure, env)
        env.entered(found.entries)
        for note in found.program.notes():
            env.note(note)
        compared = found.program.compared or env.find(Checks) is not None
        if found.unseen and compared:  # not in `graph`, which one rank may ask for
            compare(found.unseen.pop())
        return within(self.what, _call, found, args, leaves)

    def graph(self, *args: Any) -> GraphModule:
        """The graph, after the passes, that a call with these arguments runs."""
        leaves, structure = tree.flatten(args)
        return self._find(args, leaves, structure, current()).program.graph

    def _find(self, args: Any, leaves: list[Any], structure: Any, env: Env) -> _Compiled:
        where = env.key
        found = next((one for one in tuple(self._known) if one.fits(leaves, structure, where)), None)
        if found is None:
            check_statics(self.what, lambda i: tree.paths(args)[i], leaves)
            found = _capture(self, args, leaves, structure, where)
            others = [one.statics for one in self._known if one.alike(found)]
            warn_of_values(self.what, lambda i: tree.paths(args)[found.fixed[i]], found.statics, others)
        with self._lock:
            if not self._known or self._known[0] is not found:
                self._known[:] = [found, *(one for one in self._known if one is not found)]
        return found


class _Compiled(NamedTuple):
    program: Program
    run: Callable[[list[Tensor]], list[Any]]
    entries: list[Message]
    # what it was made for
    structure: Any
    places: tuple[int, ...]  # of the tensors among the leaves
    guards: Any
    fixed: tuple[int, ...]  # of the leaves that are no tensors
    statics: tuple[Any, ...]  # those
    env: Env
    # how to call it
    donates: tuple[int, ...]  # arguments
    donated: tuple[int, ...]  # their inputs
    homes: tuple[int | None, ...]  # for each result the input whose buffer it takes over
    result: Form
    unseen: list[Program]  # what ranks are to compare at the first call

    def fits(self, leaves: list[Any], structure: Any, env: Env) -> bool:
        if structure != self.structure or env != self.env:
            return False
        statics = [leaves[i] for i in self.fixed]
        return all_same(statics, self.statics) and self.guards([leaves[i] for i in self.places])

    def alike(self, other: _Compiled) -> bool:
        """True if only values, or shapes, tell the two apart."""
        return (self.structure, self.fixed, self.env) == (other.structure, other.fixed, other.env)


def _capture(jitted: Jitted, args: Any, leaves: list[Any], structure: Any, env: Env) -> _Compiled:
    what = jitted.what
    check_donated(args, "ft.jit", jitted.donate, leaves)
    places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    tensors = tuple(leaves[i] for i in places)
    _check(jitted, args, tensors, what)
    owners = [n for n, arg in enumerate(args) for _ in tree.leaves(arg)]
    donated = tuple(i for i, place in enumerate(places) if owners[place] in jitted.donate)
    paths = tree.paths(args)
    flat, result = of_tensors(lambda given: _not_donated(jitted.fn(*given), what), split(args)[1])
    program = trace(flat, tensors, frozenset(donated), what, [paths[i] for i in places])
    program, homes = _at_home(program, donated)
    program = run_passes(program, jitted.passes)
    run = compiled(program, homes, jitted.backend)
    fixed = tuple(i for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
    statics = tuple(leaves[i] for i in fixed)
    guards = _guards(tensors)
    made_for = structure, places, guards, fixed, statics, env
    return _Compiled(program, run, program.entries(), *made_for, jitted.donate, donated, homes, result[0], [program])


def _not_donated(out: Any, what: str) -> Any:
    check_donated(out, f"the result of {what}")
    return out


def _call(found: _Compiled, args: Any, leaves: list[Any]) -> Any:
    tensors = [leaves[i] for i in found.places]
    given = [tensors[i] for i in found.donated]
    check = lambda: check_donated(args, "ft.jit", found.donates, leaves)
    if given and len(set(map(id, tensors))) < len(tensors):
        check()
    own = take(given, _BY, check)
    for i, x in zip(found.donated, own, strict=True):
        tensors[i] = x
    values = found.run(list(tensors))
    for error in reversed(found.program.failures):
        flag = values.pop()
        if type(flag) is Tensor and flag.item():  # ft.explain's have no value
            give_back(given, own)
            raise error()
    values = [x if home is None else tensors[home] for x, home in zip(values, found.homes, strict=True)]
    return join(found.result, values)


def _at_home(program: Program, donated: Sequence[int]) -> tuple[Program, tuple[int | None, ...]]:
    """For each result a donated buffer of its shape, where there is one; what was written in place stays there."""
    nodes = list(program.graph.graph.nodes)
    placeholders, output = [node for node in nodes if node.op == "placeholder"], nodes[-1]
    count = len(output.args[0]) - len(program.written)
    results, writes = output.args[0][:count], dict(zip(program.written, output.args[0][count:], strict=True))
    homes: list[int | None] = [None] * (count - len(program.failures))
    free = dict.fromkeys(donated)
    for fits in (
        lambda i, node: writes.get(i) is node or placeholders[i] is node,
        lambda i, node: node.op != "placeholder" and _alike(placeholders[i].meta["val"], node.meta["val"]),
    ):
        for r, node in enumerate(results[: len(homes)]):
            if homes[r] is None:
                home = homes[r] = next((i for i in free if fits(i, node)), None)
                if home is not None:
                    free.pop(home)
    output.args = (tuple(results),)
    program.graph.recompile()
    return program._replace(written=()), tuple(homes)


def _alike(x: Tensor, y: Tensor) -> bool:
    return (x.shape, x.dtype, x.device, x.stride()) == (y.shape, y.dtype, y.device, y.stride())


def _guards(tensors: Sequence[Tensor]) -> Callable[[list[Tensor]], bool]:
    """Whether other tensors have these tensors' shapes, strides, dtypes, devices and kinds: one call, 0.1 us each."""
    if not tensors:
        return lambda others: True
    sizes: Any = [list(x.shape) for x in tensors]  # torch's stub says list[int]
    strides: Any = [list(x.stride()) for x in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return lambda others: len(others) == len(tensors) and guards.check(*others)


def _check(jitted: Jitted, args: Any, tensors: Sequence[Tensor], what: str) -> None:
    problems = [f"donate names argument {n}, but there are {len(args)}" for n in jitted.donate if n >= len(args)]
    if transforms_active() or any(x.requires_grad for x in tensors):
        problems.append("it is called inside a torch.func transform, or with tensors that require grad")
    if not problems and (problem := outside(current())):
        raise CaptureError(report(what, [problem], FIX_DELAYED.format("jit")))
    if problems:
        raise CaptureError(report(what, problems, "transform inside, ft.jit(ft.grad(fn)), or detach() the tensors"))


_BY = "a call of ft.jit", None  # who took a tensor over
