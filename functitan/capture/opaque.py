"""A captured program that other captured programs call: one op stands for it there, whatever it holds.

Invariant: each call gives new tensors, which share no memory with its arguments or each other: a graph around it may
reuse every buffer.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from functitan.capture.compare import compare
from functitan.capture.compile import Run, compiled
from functitan.capture.kinds import base
from functitan.capture.nodes import Capture, emit
from functitan.capture.trace import Program, one_at_a_time, unseen
from functitan.sharding.env import Env
from functitan.sharding.program import Checks

_NAMESPACE = "functitan_regions"

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Opaque:
    """A captured program and how it runs, compiled when it first does. Opaque to pytrees."""

    program: Program
    backend: str

    @property
    def results(self) -> tuple[Tensor, ...]:
        """What it gives: fake."""
        return tuple(node.meta["val"] for node in _output(self.program).args[0])  # type: ignore[union-attr]

    @cached_property
    def run(self) -> Run:
        """A function of a list of inputs, which it empties."""
        with unseen():
            return compiled(self.program, (None,) * len(self.results), self.backend)

    def called(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Its results for these inputs."""
        return self.run(list(xs))

    @property
    def op(self) -> OpOverload:
        """The op that stands for it in a graph, as long as it lives."""
        return self._defined[1]

    # torch.library with its fake kernels as graph ops: tried on torch 2.13
    @cached_property
    def _defined(self) -> tuple[Any, OpOverload]:
        library, known, me = (
            torch.library.Library(_NAMESPACE, "FRAGMENT"),
            torch.ops.functitan_regions,
            weakref.ref(self),
        )
        shapes = [(x.shape, x.stride(), x.dtype, x.device) for x in self.results]

        def fake(xs: list[Tensor]) -> list[Tensor]:
            return [torch.empty_strided(shape, stride, dtype=dtype, device=d) for shape, stride, dtype, d in shapes]

        def run(xs: list[Tensor]) -> list[Tensor]:
            return me().called(xs)  # type: ignore[union-attr]  # the dispatcher keeps this function, not the program

        # a name by content, because compilers keep what they made of a graph, on disk, by the names of its ops
        digest = hashlib.sha256(f"{self.program.graph.graph} {shapes}".encode()).hexdigest()[:16]
        with one_at_a_time:
            count = 0
            while hasattr(known, name := f"r{digest}_{count}"):  # another rank's, or another backend's
                count += 1
            library.define(f"{name}(Tensor[] xs) -> Tensor[]")
            library.impl(name, run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=library)
            return library, getattr(known, name).default


def opaque(program: Program, backend: str) -> Opaque:
    """The program, to be called by others."""
    _renew_results(program)
    return Opaque(program, backend)


def call(callee: Opaque, xs: Sequence[Tensor], env: Env) -> tuple[Tensor, ...]:
    """Its results for these inputs; in a capture, by its op. Its collectives go into the ledger, and are compared."""
    env.entered(callee.program.entries())
    for note in callee.program.notes():
        env.note(note)
    if (capture := env.find(Capture)) is not None:
        capture.calls[callee.op] = callee
        for mesh in callee.program.meshes:
            capture.place(mesh)
        return tuple(callee.op(list(xs)))
    if env.find(Checks) is not None:
        compare(callee.program)
    return tuple(callee.called(xs))


def _output(program: Program) -> Node:
    return next(iter(reversed(program.graph.graph.nodes)))


# private: the key by which Inductor keeps a result's strides; tried on torch 2.13
def _renew_results(program: Program) -> None:
    """Copy results that are inputs, views of them, or share memory with results before them; and keep all strides."""
    output, seen, results = _output(program), set(), []
    with program.graph.graph.inserting_before(output):
        for node in output.args[0]:  # type: ignore[union-attr]
            source = base(node)
            shares = source.op == "placeholder" or source in seen
            seen.add(source)
            results.append(emit(program.graph.graph, aten.clone.default, node) if shares else node)
    output.args = (tuple(results),)
    output.meta["user_visible_output_idxs"] = list(range(len(results)))
    program.graph.recompile()
