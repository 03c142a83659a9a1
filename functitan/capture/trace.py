"""Tracing: a function of tensors, run once on fake ones, becomes a functional graph of aten ops and collectives.

Invariant: the graph is pure, and every tensor that it reads is one of its inputs. What the function wrote into its
inputs comes as further results, and `Program.written` says whose they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import GraphModule, Interpreter, Node, traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from functitan.capture.blame import line_of_error, lines_of_strangers, lines_of_writes
from functitan.capture.nodes import Capture, capturing, is_collective, message_of
from functitan.errors import CaptureError, report
from functitan.sharding.context import current, using
from functitan.sharding.cut import carry_cut
from functitan.sharding.mesh import Mesh
from functitan.sharding.message import Message
from functitan.sharding.program import Checks


class Program(NamedTuple):
    """A captured function. Its graph has one placeholder for each input; it gives results, flags, what was written."""

    graph: GraphModule
    meshes: tuple[Mesh, ...]
    inputs: tuple[Tensor, ...]  # fake
    written: tuple[int, ...]  # the inputs that the function wrote into
    failures: tuple[Callable[[], Exception], ...]  # what to raise where a flag, one of the last results, is true
    calls: Mapping[Any, Any]  # for each op that stands for another captured program: that one (`opaque.Opaque`)
    remarks: tuple[str, ...] = ()  # of its ops, for a ledger
    compared: bool = False  # whether ranks are to compare their collectives before the first run

    def entries(self) -> list[Message]:
        """What one run of it enters into a ledger."""
        found: list[Message] = []
        for node in self.graph.graph.nodes:
            if is_collective(node):
                found.append(message_of(node))
            elif node.target in self.calls:
                found += self.calls[node.target].program.entries()
        return found

    def notes(self) -> list[str]:
        """What a ledger of it should say besides."""
        kinds = {entry.collective for entry in self.entries()}
        exchanges = any(mesh.transport.exchanges for mesh in self.meshes)
        return [*self.remarks, *([_EXCHANGED] if exchanges and "reduce_scatter" in kinds else [])]


Fakes = Callable[[], tuple[Tensor, ...]]  # new ones at each call

unseen = _disable_current_modes  # modes of a caller (ft.explain's memory) see nothing of what is done to graphs
one_at_a_time = threading.RLock()  # torch.fx patches the whole process while it traces; tracing waits for no rank


# private torch API: make_fx, FakeTensorMode, Inductor's table of decompositions; tried on torch 2.13
def trace(
    fn: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    donated: frozenset[int] = frozenset(),
    what: str = "trace",
    names: Sequence[str] = (),
    fix: str = "donate it: ft.jit(fn, donate=...), or write out of place",
) -> Program:
    """Trace `fn` of flat tensors, called `names` in errors; it may write into those `donated`.

    Raises `CaptureError` with the user's line for what a graph cannot hold; `fix` is the one for an input written to.
    """
    from torch._inductor.decomposition import select_decomp_table  # two seconds to import

    capture = Capture()
    mode = detect_fake_mode(inputs) or FakeTensorMode(allow_non_fake_inputs=True)  # those of ft.explain are fake
    table = select_decomp_table()

    def inside(*xs: Tensor) -> tuple[Tensor, ...]:
        with using(current().key.inside(capturing(capture))):
            results = fn(*xs)
        return (*results, *(flag for flag, _ in capture.failures))

    def again() -> tuple[Tensor, ...]:  # for each run others: the function may donate its inputs
        return tuple(carry_cut(x, _twin(x)) for x in inputs)

    with one_at_a_time, unseen(), mode:
        fakes = tuple(mode.from_tensor(x) if type(x) is Tensor else _twin(x) for x in inputs)
        try:
            with traceback.preserve_node_meta():  # marks of what remat computes again
                mutating = make_fx(inside, decomposition_table=table)(*again())
            _check_constants(mutating, inside, again, what)
            pure = torch.func.functionalize(_runner(mutating), remove="mutations")
            graph = make_fx(pure, decomposition_table=table)(*fakes)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise CaptureError(_data_dependent(what, error)) from None
        written = _results_of_writes(graph)
        _check_writes(set(written) - donated, inside, again, what, names, fix)
    failures = tuple(error for _, error in capture.failures)
    meshes, calls, remarks = tuple(capture.meshes), dict(capture.calls), tuple(capture.notes)
    compared = capture.compared or current().find(Checks) is not None
    return Program(graph, meshes, fakes, written, failures, calls, remarks, compared)


def _twin(x: Tensor) -> Tensor:
    """A fake tensor of its own."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _runner(graph: GraphModule) -> Callable[..., Any]:
    """The graph as a function that keeps each node's stack trace and other notes."""

    def run(*xs: Tensor) -> Any:
        with traceback.preserve_node_meta():
            return Interpreter(graph).run(*xs)

    return run


def _results_of_writes(graph: GraphModule) -> tuple[int, ...]:
    """Turn the final copies into inputs into further results; the numbers of those inputs."""
    nodes = list(graph.graph.nodes)
    places = {node: i for i, node in enumerate(n for n in nodes if n.op == "placeholder")}
    written: dict[int, Node] = {}
    for node in nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.copy_.default and node.args[0] in places:
            written[places[node.args[0]]] = node.args[1]
            node.replace_all_uses_with(node.args[1])
            graph.graph.erase_node(node)
    output = nodes[-1]
    output.args = ((*output.args[0], *written.values()),)
    graph.recompile()
    return tuple(written)


def _check_writes(
    bad: set[int], fn: Callable[..., Any], fakes: Fakes, what: str, names: Sequence[str], fix: str
) -> None:
    if bad:
        lines = lines_of_writes(fn, fakes())
        problems = [f"argument {names[i] if names else i} is written to, at {lines.get(i, '')}" for i in sorted(bad)]
        raise CaptureError(report(what, problems, fix))


def _check_constants(graph: GraphModule, fn: Callable[..., Any], fakes: Fakes, what: str) -> None:
    """Refuse tensors that the function closes over; those that it makes of numbers are lifted first."""
    lift = torch.ops.aten.lift_fresh_copy.default
    nodes = [node for node in graph.graph.nodes if node.op == "get_attr"]
    if any(
        isinstance(getattr(graph, str(n.target)), Tensor) and any(u.target is not lift for u in n.users) for n in nodes
    ):
        problems = [
            f"a tensor {text} that is no argument is used at {line}"
            for text, line in lines_of_strangers(fn, fakes()).items()
        ]
        raise CaptureError(
            report(what, problems, "pass it as an argument: a graph would keep its value of now for ever")
        )


def _data_dependent(what: str, error: BaseException) -> str:
    problem = f"what runs next depends on a value that is not known while tracing, at {line_of_error(error)}"
    return report(what, [problem], "choose by torch.where, or leave .item() and if outside the captured function")


_EXCHANGED = "on gloo a reduce-scatter runs as an all-to-all of the same bytes, and a sum"
