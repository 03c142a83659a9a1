"""Tracing: a function of tensors, run once on fake ones, becomes a functional graph of aten ops and collectives.

Invariant: the graph is pure, and every tensor that it reads is one of its inputs. What the function wrote into its inputs
comes as further results, and `Program.written` says whose they are.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import _disable_current_modes

from functitan.errors import CaptureError, report
from functitan.sharding.context import current, using
from functitan.sharding.ledger import Entry
from functitan.sharding.mesh import Mesh
from functitan.sharding.traced import Meshes, collective_of, is_collective


class Program(NamedTuple):
    """A captured function. Its graph has one placeholder for each input; it gives the results, then what was written."""

    graph: GraphModule
    meshes: tuple[Mesh, ...]
    inputs: tuple[Tensor, ...]  # fake
    written: tuple[int, ...]  # the inputs that the function wrote into

    def entries(self) -> list[Entry]:
        """What one run of it enters into a ledger."""
        return [collective_of(node).entry() for node in self.graph.graph.nodes if is_collective(node)]


_ONE_AT_A_TIME = threading.RLock()  # torch.fx patches the whole process while it traces; tracing waits for no rank


# private torch API: make_fx, FakeTensorMode, Inductor's table of decompositions; tried on torch 2.13
def trace(fn: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], what: str) -> Program:
    """Trace `fn` of flat tensors. Raises `CaptureError` with the user's line for what a graph cannot hold."""
    meshes = Meshes()
    mode = detect_fake_mode(inputs) or FakeTensorMode(allow_non_fake_inputs=True)  # those of ft.explain are fake
    table = select_decomp_table()

    def inside(*xs: Tensor) -> tuple[Tensor, ...]:
        with using(current()._replace(meshes=meshes, ledger=None, taps=None)):
            return fn(*xs)

    with _ONE_AT_A_TIME, _disable_current_modes(), mode:
        fakes = tuple(mode.from_tensor(x) if type(x) is Tensor else _twin(x) for x in inputs)
        try:
            mutating = make_fx(inside, decomposition_table=table, record_stack_traces=True)(*fakes)
            _check_constants(mutating, what)
            pure = torch.func.functionalize(_runner(mutating), remove="mutations_and_views")
            graph = make_fx(pure, decomposition_table=table)(*fakes)
        except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as error:
            raise CaptureError(_data_dependent(what, error)) from None
    written = _results_of_writes(graph)
    return Program(graph, tuple(meshes.known), fakes, written)


def _twin(x: Tensor) -> Tensor:
    """A fake tensor of its own, which the trace may mark as donated."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _runner(graph: GraphModule) -> Callable[..., Any]:
    """The graph as a function that keeps each node's stack trace and other notes."""
    def run(*xs: Tensor) -> Any:
        with torch.fx.traceback.preserve_node_meta():
            return torch.fx.Interpreter(graph).run(*xs)

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


def _check_constants(graph: GraphModule, what: str) -> None:
    """Tensors that the function closes over; those that it makes of numbers are lifted first, and are no inputs."""
    problems = []
    for node in graph.graph.nodes:
        if node.op == "get_attr" and any(user.target is not torch.ops.aten.lift_fresh_copy.default for user in node.users):
            value = getattr(graph, str(node.target))
            if isinstance(value, Tensor):
                lines = {_line_of(user) for user in node.users} - {""}
                where = f", used at {', '.join(sorted(lines))}" if lines else ""
                problems.append(f"a tensor {tuple(value.shape)} {value.dtype} that is no argument{where}")
    if problems:
        raise CaptureError(report(what, problems, "pass it as an argument: a captured value would never change again"))


def _line_of(node: Node) -> str:
    """The user's line of an op, from its stack trace."""
    lines = (node.meta.get("stack_trace") or "").splitlines()
    frames = [line.strip() for line in lines if line.strip().startswith("File ")]
    for frame in reversed(frames):
        file = frame.split('"')[1] if '"' in frame else ""
        if not _is_library(file):
            return f"{file}:{frame.split('line ')[1].split(',')[0]}"
    return ""


def line_of_error(error: BaseException) -> str:
    """The innermost line of a traceback that is neither torch's nor ours."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _is_library(frame.filename):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return ""


_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))


def _is_library(file: str) -> bool:
    return file.startswith(_LIBRARIES) or file.startswith("<")


def _data_dependent(what: str, error: BaseException) -> str:
    line = line_of_error(error)
    problem = f"at {line}: what runs next depends on a value that is not known while tracing"
    return report(what, [problem], "choose by torch.where, or leave .item() and if outside the captured function")
