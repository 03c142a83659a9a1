"""`ft.jit`: a whole step captured as one graph, improved by passes, compiled, and called like the function.

Invariant: the captured step gives what the function gives. Whatever its graph was made for (structure, shapes, dtypes,
static values, mesh, rules) is its key; anything else makes another graph, and what no graph can hold is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from functitan import tree
from functitan.capture.compile import compiled
from functitan.capture.passes import PASSES, run_passes
from functitan.capture.trace import Program, trace
from functitan.errors import CaptureError, nearest, report
from functitan.ops.function import transforms_active
from functitan.sharding.context import Env, current
from functitan.transforms.donate import check_donated, mark_donated


@dataclass(frozen=True)
class Jitted:
    """A function that runs as a graph; see `jit`."""

    fn: Callable[..., Any]
    donate: tuple[int, ...]
    passes: tuple[str, ...]  # those that run, in order
    backend: str
    _known: dict[Any, _Compiled] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __call__(self, *args: Any) -> Any:
        env = current()
        if env.meshes is not None:  # a part of a larger capture
            return self.fn(*args)
        leaves, structure = tree.flatten(args)
        run = self._find(args, leaves, structure, env)
        return run(args, leaves)

    def graph(self, *args: Any) -> GraphModule:
        """The graph, after the passes, that a call with these arguments runs."""
        leaves, structure = tree.flatten(args)
        return self._find(args, leaves, structure, current()).program.graph

    def _find(self, args: Any, leaves: list[Any], structure: Any, env: Env) -> _Compiled:
        key = (structure, tuple(map(_signature, leaves)), env._replace(ledger=None, taps=None))
        found = self._known.get(key)
        if found is None:
            _check(leaves, self.fn, args)
            found = self._known[key] = self._compile(args, leaves, structure)
        return found

    def _compile(self, args: Any, leaves: list[Any], structure: Any) -> _Compiled:
        what = f"ft.jit of {getattr(self.fn, '__qualname__', self.fn)}"
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        shape: list[Any] = []

        def flat(*xs: Tensor) -> tuple[Tensor, ...]:
            given = list(leaves)
            for place, x in zip(places, xs, strict=True):
                given[place] = x
            found, out_structure = tree.flatten(self.fn(*tree.unflatten(structure, given)))
            shape[:] = [out_structure, [None if isinstance(x, Tensor) else x for x in found]]
            return tuple(x for x in found if isinstance(x, Tensor))

        program = trace(flat, tuple(leaves[i] for i in places), what)
        sizes = [len(tree.leaves(arg)) for arg in args]
        donated = [i for n, size in enumerate(sizes) for i in range(sum(sizes[:n]), sum(sizes[:n]) + size) if n in self.donate]
        inputs = tuple(n for n, place in enumerate(places) if place in donated)
        program, homes = _donated(program, inputs, what, [tree.paths(args)[i] for i in places])
        program = run_passes(program, self.passes)
        return _Compiled(program, compiled(program, homes, self.backend), tuple(places), homes, tuple(donated), tuple(shape))


def jit(
    fn: Callable[..., Any], *, donate: int | Sequence[int] = (), skip: Sequence[str] = (), backend: str = "inductor"
) -> Jitted:
    """`fn` as one captured and compiled graph: forward, backward, optimizer and every collective in it.

    Made at the first call, and again for other structures, shapes, dtypes, or values of leaves that are no tensors.
    `donate` names arguments whose buffers the results may take over: a state is updated in place, without a second
    copy, and the old one raises `DonatedError` when used again. `skip` turns passes off by name; `jitted.passes` are
    those that run, `jitted.graph(*args)` is what they made. `backend` is "inductor", or "graph" for the graph's plain
    ops (as always on a virtual mesh). Raises `CaptureError`, with the line, for what a graph cannot hold: control flow
    that depends on values, a tensor that is no argument, an argument written to that was not donated.

    >>> double = jit(lambda tree: {"y": tree["x"] * 2}, backend="graph")
    >>> double({"x": torch.ones(2)})
    {'y': tensor([2., 2.])}
    """
    problems = [f"no pass is called {name!r}{nearest(name, PASSES)}" for name in skip if name not in PASSES]
    if backend not in ("inductor", "graph"):
        problems.append(f"backend is {backend!r}: 'inductor' or 'graph'")
    if problems:
        raise CaptureError(report("ft.jit", problems, f"the passes are {list(PASSES)}"))
    places = (donate,) if isinstance(donate, int) else tuple(donate)
    return Jitted(fn, places, tuple(name for name in PASSES if name not in skip), backend)


class _Compiled(NamedTuple):
    program: Program
    run: Callable[[list[Tensor]], list[Tensor | None]]
    places: tuple[int, ...]  # of the tensors among the leaves
    homes: tuple[int | None, ...]  # for each result the input whose buffer it takes over
    donated: tuple[int, ...]  # leaves
    shape: tuple[Any, ...]  # structure of the result, and its leaves that are no tensors

    def __call__(self, args: Any, leaves: list[Any]) -> Any:
        if self.donated:
            check_donated([leaves[i] for i in self.donated], "ft.jit: a donated argument")
        tensors = [leaves[i] for i in self.places]
        env = current()
        if env.ledger is not None:
            env.ledger.entries += self.program.entries()
        given = iter(self.run(list(tensors)))
        results = []
        for home in self.homes:
            value = next(given)
            results.append(value if home is None else tensors[home].detach())
        if self.donated:
            mark_donated([leaves[i] for i in self.donated], "a call of ft.jit")
        structure, others = self.shape
        values = iter(results)
        return tree.unflatten(structure, [next(values) if other is None else other for other in others])


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride(), leaf.requires_grad
    return type(leaf), leaf


def _donated(program: Program, donated: tuple[int, ...], what: str, paths: list[str]) -> tuple[Program, tuple[int | None, ...]]:
    """Give each result a donated buffer of its shape where there is one; refuse writes into what was not donated."""
    bad = [f"argument {paths[i]} is written to" for i in program.written if i not in donated]
    if bad:
        raise CaptureError(report(what, bad, "donate it: ft.jit(fn, donate=...), or write out of place"))
    nodes = list(program.graph.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    output = nodes[-1]
    count = len(output.args[0]) - len(program.written)
    results, writes = output.args[0][:count], dict(zip(program.written, output.args[0][count:], strict=True))
    homes: list[int | None] = [None] * count
    free = set(donated)
    for r, node in enumerate(results):  # what was written in place stays in its place
        home = next((i for i in free if writes.get(i) is node or placeholders[i] is node), None)
        if home is not None:
            homes[r] = home
            free.discard(home)
    for r, node in enumerate(results):
        if homes[r] is None and node.op != "placeholder":
            home = next((i for i in sorted(free) if _alike(placeholders[i].meta["val"], node.meta["val"])), None)
            homes[r] = home
            free.discard(home)
    output.args = (tuple(results),)
    program.graph.recompile()
    return program._replace(written=()), tuple(homes)


def _alike(x: Tensor, y: Tensor) -> bool:
    return (x.shape, x.dtype, x.device, x.stride()) == (y.shape, y.dtype, y.device, y.stride())


def _check(leaves: list[Any], fn: Any, args: Any) -> None:
    if transforms_active() or any(isinstance(x, Tensor) and x.requires_grad for x in leaves):
        problem = "it is called inside a torch.func transform, or with tensors that require grad"
        fix = "transform inside: ft.jit(ft.grad(fn)); or detach() the tensors"
        raise CaptureError(report(f"ft.jit of {getattr(fn, '__qualname__', fn)}", [problem], fix))
