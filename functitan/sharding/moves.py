"""Moves between layouts inside one operation, as steps on framed axes.

Invariant: inside a plan an axis is seen as (one sub-axis for each mesh dim of its *frame*, rest), so every step
gathers, scatters or exchanges whole sub-axes, whose sizes are those of the mesh dims. A contiguous shard over dims D
is such a view exactly where D begins the frame; any other shard is gathered first. Frames never leave the operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from functitan.sharding.layout import Layout
from functitan.sharding.mesh import MeshSizes
from functitan.sharding.rules import Dims

Splits = Mapping[str, Dims]  # axis -> the mesh dims that split it in the local work
Frames = Mapping[str, Dims]  # axis -> the order of its sub-axes, outermost first


class View(NamedTuple):
    """One axis as sub-axes: its position, the size of each sub-axis, and which of them this step moves."""

    axis: int
    sizes: tuple[int, ...]  # local: 1 where split (the moved ones: as they are when whole)
    moved: tuple[int, ...]  # positions in `sizes`, in the order of the step's mesh dims


class Step(NamedTuple):
    """One move of a tensor over mesh dims: `source` sub-axes become whole, `target` sub-axes become split."""

    kind: str  # slice, all_gather, reduce_scatter, all_reduce, all_to_all
    dims: Dims
    source: View | None = None
    target: View | None = None


def operand_steps(layout: Layout, splits: Splits, frames: Frames, mesh: MeshSizes) -> tuple[Step, ...]:
    """The steps that bring an operand from its layout to the split of the local work."""
    wanted = Layout(layout.axes, tuple(splits.get(axis, ()) for axis in layout.axes))
    own, inner = _orders(layout, frames)
    return _steps(layout, wanted, own, {**own, **{axis: frames[axis] for axis in inner}}, set(), mesh)


def result_steps(layout: Layout, splits: Splits, frames: Frames, mesh: MeshSizes) -> tuple[Step, ...]:
    """The steps that bring a local product, a sum over the split axes that it lacks, to the result's layout."""
    made = Layout(layout.axes, tuple(splits.get(axis, ()) for axis in layout.axes))
    sums = {dim for axis, dims in splits.items() if axis not in layout.axes for dim in dims}
    own, inner = _orders(layout, frames)
    return _steps(made, layout, {**own, **{axis: frames[axis] for axis in inner}}, own, sums, mesh)


def _orders(layout: Layout, frames: Frames) -> tuple[Frames, list[str]]:
    """The order of each axis's shards outside the local work (the frame where it begins so), and the framed axes."""
    own = dict(zip(layout.axes, layout.dims, strict=True))
    inner = [axis for axis in layout.axes if axis in frames]
    return {**own, **{axis: frames[axis] for axis in inner if frames[axis][: len(own[axis])] == own[axis]}}, inner


def _steps(
    now: Layout, then: Layout, before: Frames, after: Frames, left: set[str], mesh: MeshSizes
) -> tuple[Step, ...]:
    """From one split to another, `left` to be summed over. An axis whose orders differ is gathered, and sliced anew."""
    axes = now.axes
    at_odds = {axis for axis in axes if before[axis] != after[axis]}
    split = {axis: set(now.of(axis)) for axis in axes}
    sharded = {dim for dims in now.dims for dim in dims}
    steps: list[Step] = []

    def view(axis: str, dims: Dims, frame: Dims) -> View:
        sizes = tuple(mesh.size(d) if d in dims or d not in split[axis] else 1 for d in frame)
        return View(axes.index(axis), sizes, tuple(frame.index(d) for d in dims))

    def scatter(kind: str, axis: str, dims: Dims, frame: Dims) -> None:
        if dims:
            steps.append(Step(kind, dims, target=view(axis, dims, frame)))
            split[axis] |= set(dims)

    def wanted(axis: str, dims: set[str]) -> Dims:
        return () if axis in at_odds else tuple(d for d in after[axis] if d in then.of(axis) and d in dims)

    for axis in axes:  # what is whole is sliced for free, and first: all that follows moves less
        scatter("slice", axis, wanted(axis, set(after[axis]) - sharded - left), after[axis])
    for axis in axes:
        dims = wanted(axis, left)
        scatter("reduce_scatter", axis, dims, after[axis])
        left = left - set(dims)
    if left:
        steps.append(Step("all_reduce", tuple(sorted(left))))
    for source in axes:
        for target in axes:
            leaving = {d for d in split[source] if d not in then.of(source)}
            dims = wanted(target, leaving)
            if dims:
                views = view(source, dims, before[source]), view(target, dims, after[target])
                steps.append(Step("all_to_all", dims, *views))
                split[source] -= set(dims)
                split[target] |= set(dims)
    for axis in axes:
        dims = tuple(d for d in before[axis] if d in split[axis] and (axis in at_odds or d not in then.of(axis)))
        if dims:
            steps.append(Step("all_gather", dims, source=view(axis, dims, before[axis])))
            split[axis] -= set(dims)
    for axis in axes:
        if axis in at_odds:
            scatter("slice", axis, tuple(d for d in after[axis] if d in then.of(axis)), after[axis])
    return tuple(steps)
