"""From a pattern, a rules table and a mesh to the one layout that the pattern has.

Invariant: each mesh dim stands at most once in a layout, and mesh dims of size 1 never do; the shards of an axis are
contiguous, ordered by its mesh dims, outermost first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from functitan.axes import Axes, parse_axes, write_axes
from functitan.errors import FunctitanError, LayoutError, PatternError, RulesError, report
from functitan.sharding.mesh import Mesh, MeshSizes
from functitan.sharding.rules import AxisRules, Dims, check_rules, unknown_names

if TYPE_CHECKING:
    from functitan.param import Param  # the planner runs without torch


class Layout(NamedTuple):
    """The mesh dims that shard each axis of a tensor, outermost first; `()` is a whole axis."""

    axes: Axes
    dims: tuple[Dims, ...]

    def of(self, axis: str) -> Dims:
        """The mesh dims of one axis; `()` where the tensor does not have it."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else ()

    def axis_of(self, dim: str) -> str | None:
        """The axis that a mesh dim shards, if any."""
        return next((axis for axis, dims in zip(self.axes, self.dims, strict=True) if dim in dims), None)


@cache
def layout_of(axes: Axes, rules: AxisRules, mesh: MeshSizes) -> Layout:
    """The layout that the table gives to a pattern.

    Walk the rules in order; a rule whose axis is in the pattern takes, left to right, those of its mesh dims that the
    mesh has and that no earlier rule has taken. Raises `RulesError` for axes without a rule.

    >>> rules = AxisRules({"batch": ("dp", "fsdp"), "mlp": "tp", "seq": "tp", "embed": "fsdp"})
    >>> layout_of(("embed", "mlp"), rules, MeshSizes(("fsdp", "tp"), (4, 2)))
    Layout(axes=('embed', 'mlp'), dims=(('fsdp',), ('tp',)))
    >>> layout_of(("batch", "seq", "embed"), rules, MeshSizes(("fsdp", "tp"), (4, 2)))
    Layout(axes=('batch', 'seq', 'embed'), dims=(('fsdp',), ('tp',), ()))
    """
    check_rules(rules, mesh)
    problems = unknown_names(axes, rules)
    if problems:
        raise RulesError(report(f"pattern {write_axes(axes)!r}", problems, FIX_RULE))
    taken: set[str] = set()
    won: dict[str, Dims] = {}
    for name, dims in rules.items():
        if name in axes:
            won[name] = tuple(dim for dim in dims if mesh.size(dim) > 1 and dim not in taken)
            taken.update(won[name])
    return Layout(axes, tuple(won.get(axis, ()) for axis in axes))


def whole(axes: Axes) -> Layout:
    """The layout in which every axis is whole."""
    return Layout(axes, ((),) * len(axes))


def axes_of(pattern: str | Param | None) -> Axes | None:
    """The axes of a pattern, a `Param` or `None` (no pattern: equal on every rank)."""
    return None if pattern is None else parse_axes(getattr(pattern, "pattern", pattern))


def table_of(pattern: str | Param | None, rules: Any) -> Any:
    """The table that a tensor lies under: its declaration's own, or else `rules`."""
    own = getattr(pattern, "rules", None)
    return rules if own is None else own


def check_rank(axes: Axes, shape: tuple[int, ...], what: str) -> None:
    """Raise `PatternError` if a tensor has not one dimension for each name."""
    if len(axes) != len(shape):
        problem = f"pattern {write_axes(axes)!r} names {len(axes)} axes, the tensor has {len(shape)}: {tuple(shape)}"
        raise PatternError(report(what, [problem], _FIX_RANK))


def check_leaves(
    what: str,
    leaves: Iterable[tuple[str, str | Param | None, tuple[int, ...]]],
    rules: AxisRules,
    mesh: MeshSizes,
    shapes_are_local: bool = False,
) -> list[Layout | None]:
    """The layout of each leaf of a tree, given as (path, pattern, shape); `None` for one without a pattern.

    A declaration in place of a pattern lies under the table of its own, if it has one.
    Raises `PatternError`, `RulesError` or `LayoutError`, which lists every leaf with a pattern of the wrong rank, with
    an axis that has no rule, or, of global shapes, with a size that its mesh dims do not divide.
    """
    check_rules(rules, mesh)
    found: list[tuple[type[FunctitanError], str, str]] = []
    layouts: list[Layout | None] = []
    for path, given, shape in leaves:
        axes, table, layout, where = axes_of(given), table_of(given, rules), None, path or "tensor"
        if axes is not None and len(axes) != len(shape):
            names = f"pattern {write_axes(axes)!r} names {len(axes)} axes, the tensor has {len(shape)}: {shape}"
            found.append((PatternError, f"{where}: {names}", _FIX_RANK))
        elif axes is not None and (unknown := unknown_names(axes, table)):
            found += [(RulesError, f"{where}: {line}", FIX_RULE) for line in unknown]
        elif axes is not None:
            layout = layout_of(axes, table, mesh)
            bad = [] if shapes_are_local else divisibility(layout, shape, mesh, path)
            found += [(LayoutError, line, FIX_SIZES) for line in bad]
        layouts.append(layout)
    if found:
        kinds, problems, fixes = zip(*found, strict=True)
        raise kinds[0](report(what, problems, "; ".join(dict.fromkeys(fixes))))
    return layouts


def divisibility(layout: Layout, shape: tuple[int, ...], mesh: MeshSizes, path: str = "") -> list[str]:
    """A complaint for each axis of a global shape that its mesh dims do not divide."""
    complaints = []
    for axis, size, dims in zip(layout.axes, shape, layout.dims, strict=True):
        n = mesh.size(dims)
        if size % n:
            over = "·".join(f"{dim}={mesh.size(dim)}" for dim in dims)
            where = f"{path or 'tensor'} ({write_axes(layout.axes)!r}, shape {tuple(shape)})"
            works = f"{size // n * n} or {(size // n + 1) * n}" if size > n else f"{n}"
            complaints.append(
                f"{where}: axis {axis!r} of size {size} is not divisible by {n} ({over}); {works} would be"
            )
    return complaints


def local_shape(layout: Layout, shape: tuple[int, ...], mesh: MeshSizes, path: str = "") -> tuple[int, ...]:
    """The shape of one rank's shard of a global shape; raises `LayoutError` if a mesh dim does not divide an axis."""
    check_rank(layout.axes, shape, path or "tensor")
    problems = divisibility(layout, shape, mesh, path)
    if problems:
        raise LayoutError(report("sharding", problems, FIX_SIZES))
    return tuple(size // mesh.size(dims) for size, dims in zip(shape, layout.dims, strict=True))


def global_shape(layout: Layout, shape: tuple[int, ...], mesh: MeshSizes) -> tuple[int, ...]:
    """The global shape of which `shape` is one rank's shard."""
    return tuple(size * mesh.size(dims) for size, dims in zip(shape, layout.dims, strict=True))


def block_of(layout: Layout, shape: tuple[int, ...], mesh: Mesh) -> tuple[slice, ...]:
    """The part of a global shape that this rank holds, one slice for each axis."""
    local = local_shape(layout, shape, mesh.sizes)
    starts = (mesh.index(dims) * size for dims, size in zip(layout.dims, local, strict=True))
    return tuple(slice(start, start + size) for start, size in zip(starts, local, strict=True))


def shard_count(layout: Layout, mesh: MeshSizes) -> int:
    """Number of distinct shards of a tensor in this layout."""
    return math.prod(mesh.size(dims) for dims in layout.dims)


FIX_RULE = "add the axis to the rules; None keeps it whole, as in rules.replace(head_dim=None)"
FIX_SIZES = "change the sizes, the mesh, or the rules of those axes (None keeps an axis whole)"
_FIX_RANK = "name each dimension of the tensor once, in order"
