"""What stages hand to each other: trees of named shapes, found by running every stage on fake tensors.

Invariant: all ranks find the same edges, from declarations and the shapes of a microbatch alone, so nobody has to send
a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from functitan import tree
from functitan.axes import parse_axes
from functitan.errors import FunctitanError, report
from functitan.param import Param
from functitan.pipeline.stages import Stage
from functitan.remat.memo import Memo
from functitan.sharding.context import using
from functitan.sharding.env import Env
from functitan.sharding.layout import local_shape
from functitan.sharding.shapes import shapes_only
from functitan.sharding.sink import Sink
from functitan.transforms.flat import Form, join, split
from functitan.transforms.microbatches import Sums, added


class Spec(NamedTuple):
    """A tensor of one rank without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class Edge(NamedTuple):
    """What a stage gives to the next for each microbatch: its tensors, and the rest of the tree."""

    specs: tuple[Spec, ...]
    form: Form

    def joined(self, tensors: Sequence[Tensor]) -> tree.Tree:
        """The tree with these tensors."""
        return join(self.form, tensors)

    def floats(self) -> list[int]:
        """The numbers of the tensors that have a cotangent."""
        return [i for i, spec in enumerate(self.specs) if spec.dtype.is_floating_point or spec.dtype.is_complex]


NOTHING = Edge((), Form(tree.flatten(None)[1], ()))  # before the first stage


class Edges(NamedTuple):
    """`into[s]` goes into stage s; `sums` are those of one microbatch, of which the last stage makes them."""

    into: tuple[Edge, ...]
    sums: tuple[tuple[Spec, ...], Any]  # of the leaves, and the structure


def edges_of(stages: Sequence[Stage], part: Any, key: Tensor | None, env: Env, sums_of: Callable[..., Any]) -> Edges:
    """The edges between stages, for microbatches like `part`, in the surroundings of one replica's own program.

    `sums_of` makes the sums of a microbatch of what the last stage gives.
    Raises what a stage raises, with its number as a note.
    """
    mesh = env.mesh
    if mesh is not None:
        mesh = mesh._replace(transport=shapes_only())
    quiet = env.key.without(Sink, Memo)._replace(mesh=mesh, pipeline=None)
    found = [NOTHING]
    device = next((x.device for x in tree.leaves(part) if isinstance(x, Tensor)), torch.device("cpu"))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), using(quiet):
        fake = tree.map(_like, (part, key))
        x = None
        for number, stage in enumerate(stages):
            params = tree.map(lambda leaf: torch.empty(_shape(leaf, quiet), dtype=leaf.dtype, device=device), stage[0])
            try:
                x = stage.apply(params, x, *fake)
                if number < len(stages) - 1:
                    found.append(described(x))
                    x = found[-1].joined([spec.zeros() for spec in found[-1].specs])
                else:
                    leaves, structure = tree.flatten(added(None, *sums_of(x)))
            except Exception as error:
                error.add_note(f"in stage {number} of {len(stages)}, run on fake tensors to find what it gives")
                raise
    return Edges(tuple(found), (tuple(map(_spec, leaves)), structure))


def described(value: tree.Tree) -> Edge:
    """The edge that a stage's result is."""
    tensors, form = split(value)
    return Edge(tuple(map(_spec, tensors)), form)


def check_edge(value: tree.Tree, edge: Edge, stage: int) -> list[Tensor]:
    """The tensors of a stage's result. Raises `FunctitanError` if it is not what was found before the run."""
    tensors, form = split(value)
    found = tuple(map(_spec, tensors))
    if found == edge.specs and form == edge.form:
        return tensors
    problems = [
        f"output {i} is {a}, not {b}" for i, (a, b) in enumerate(zip(found, edge.specs, strict=False)) if a != b
    ]
    problems = problems or [f"it has {len(found)} tensors and static values {form.leaves}, not those of its first run"]
    fix = "what a stage gives may depend on shapes alone: the next stage has made room for it"
    raise FunctitanError(report(f"ft.pipeline: the result of stage {stage}", problems, fix))


def zero_sums(edges: Edges) -> Sums:
    """Sums of no microbatch: what a rank without the last stage has."""
    specs, structure = edges.sums
    return tree.unflatten(structure, [spec.zeros() for spec in specs])


def _shape(leaf: Param, env: Env) -> tuple[int, ...]:
    return (
        leaf.shape
        if env.mesh is None
        else local_shape(env.layout(parse_axes(leaf.pattern)), leaf.shape, env.mesh.sizes)
    )


def _spec(x: Tensor) -> Spec:
    return Spec(tuple(x.shape), x.dtype, x.device)


def _like(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x
