"""Hypothesis strategies for laws that hold however a program is spread: meshes, rules, sizes, patterns, schedules.

Invariant: whatever is drawn together fits together: sizes are divided by all mesh dims that their rule names. Use these
to state that a layer is the same function however it is sharded. Needs hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from functitan.axes import Axes, Signature, write_axes
from functitan.pipeline.actions import Action, StageRank, before, done_by
from functitan.pipeline.schedule import Schedule, from_actions
from functitan.sharding.rules import AxisRules

MESH_DIMS = ("dp", "fsdp", "cp", "tp")
MESH_SIZES = ((2,), (4,), (8,), (2, 2), (2, 4), (4, 2), (2, 2, 2))
MAX_ELEMENTS = 2**17  # of a tensor with every axis: examples stay fast
AXES = ("batch", "seq", "embed", "mlp", "heads")


@st.composite
def meshes(draw: DrawFn, dims: Sequence[str] = MESH_DIMS, max_ranks: int = 8) -> dict[str, int]:
    """Sizes of a virtual mesh, `{dim: size}`, with 2 to `max_ranks` ranks; for `ft.simulate(**sizes)`."""
    sizes = draw(st.sampled_from([s for s in MESH_SIZES if math.prod(s) <= max_ranks and len(s) <= len(dims)]))
    return dict(zip(draw(st.permutations(dims)), sizes, strict=False))


@st.composite
def rules_tables(draw: DrawFn, axes: Sequence[str], dims: Sequence[str] = MESH_DIMS) -> AxisRules:
    """A table for `axes` in any order, each mapped to any of the mesh dims in any order, or to `None`."""
    mapped = st.lists(st.sampled_from(list(dims)), unique=True, max_size=len(dims)).map(tuple)
    return AxisRules({axis: draw(mapped) for axis in draw(st.permutations(list(axes)))})


@st.composite
def axis_sizes(draw: DrawFn, rules: AxisRules, mesh: Mapping[str, int], largest: int = 3) -> dict[str, int]:
    """A global size for each axis of a table: 1 to `largest` times the number of ranks that its rule names."""
    shards = {axis: math.prod(mesh.get(dim, 1) for dim in dims) for axis, dims in rules.items()}
    sizes = {axis: n * draw(st.integers(1, largest)) for axis, n in shards.items()}
    return sizes if math.prod(sizes.values()) <= MAX_ELEMENTS else shards


def patterns(axes: Sequence[str] = AXES, min_axes: int = 0, max_axes: int = 3) -> SearchStrategy[str]:
    """The pattern of one tensor with some of `axes`, in any order."""
    return _some(axes, min_axes, max_axes).map(write_axes)


@st.composite
def signatures(draw: DrawFn, axes: Sequence[str] = AXES, max_operands: int = 3, max_results: int = 2) -> Signature:
    """What `ft.einsum` takes: results have any of their operands' axes, and others are summed.

    The last operands belong to one result each, those before them to every result.
    """
    results = draw(st.integers(1, max_results))
    operands = [draw(_some(axes, 0, 3)) for _ in range(draw(st.integers(results, max(results, max_operands))))]
    shared = operands[: len(operands) - results]
    known = [sorted({axis for operand in (*shared, own) for axis in operand}) for own in operands[len(shared) :]]
    return Signature(tuple(operands), tuple(draw(_some(mine, 0, 4)) for mine in known))


@st.composite
def pipeline_schedules(
    draw: DrawFn, max_ranks: int = 4, max_stages_per_rank: int = 2, max_microbatches: int = 4
) -> Schedule:
    """Any valid schedule: stages anywhere, B or I and W for each microbatch, and actions in any order that can run."""
    num_ranks, per_rank = draw(st.integers(1, max_ranks)), draw(st.integers(1, max_stages_per_rank))
    stage_rank = tuple(draw(st.permutations([rank for rank in range(num_ranks) for _ in range(per_rank)])))
    num_microbatches = draw(st.integers(1, max_microbatches))
    todo = [
        Action(kind, stage, m)
        for stage, m in product(range(len(stage_rank)), range(num_microbatches))
        for kind in draw(st.sampled_from(["FB", "FIW"]))
    ]
    return from_actions(_any_order(draw, todo, stage_rank), name="random")


def _any_order(draw: DrawFn, todo: list[Action], stage_rank: StageRank) -> list[list[Action]]:
    """Actions one by one, each drawn from those whose dependencies are done; so it can't wait forever."""
    done: set[Action] = set()
    orders: list[list[Action]] = [[] for _ in set(stage_rank)]
    alone = (0,) * len(stage_rank)  # on one rank no action waits for a message
    while todo:
        ready = [action for action in todo if done.issuperset(before(action, alone))]
        action = draw(st.sampled_from(ready))
        todo.remove(action)
        done.update(done_by(action))
        orders[stage_rank[action.stage]].append(action)
    return orders


def _some(axes: Sequence[str], least: int, most: int) -> SearchStrategy[Axes]:
    if not axes:
        return st.just(())
    return st.lists(st.sampled_from(list(axes)), unique=True, min_size=least, max_size=most).map(tuple)
