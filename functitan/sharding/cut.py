"""What a tensor remembers of how it was cut: a mark on the object, left by what makes shards, and by checked ops.

Invariant: a mark says what was true when it was left, and no value depends on it. It is a plain attribute, so the
result of any plain torch op has none; tensors that take over a value as it is, in the package, carry it on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from functitan.axes import write_axes
from functitan.errors import LayoutError, report
from functitan.sharding.layout import Layout
from functitan.sharding.mesh import MeshSizes
from functitan.sharding.rules import Dims

MARK = "_functitan_cut"
T = TypeVar("T", bound=Tensor)


class Cut(NamedTuple):
    """How a tensor lies on a mesh, and who said so: "ft.shard", "ft.init", the name of an op."""

    by: str
    layout: Layout  # of no axes for a tensor that came without a pattern: it is whole
    mesh: MeshSizes
    zigzag: tuple[int, ...] | None = None  # over how many ranks each axis lies so; `None`: who made it can't know

    @property
    def cuts(self) -> bool:
        """Whether ranks hold different parts of it."""
        return any(self.layout.dims)

    def __str__(self) -> str:
        """
        >>> str(Cut("ft.shard", Layout(("batch", "seq"), (("dp",), ())), MeshSizes(("dp",), (2,))))
        "made as 'batch seq' by ft.shard, 'batch' sharded over dp=2"
        """
        over = [
            f"{axis!r} sharded over {sized(dims, self.mesh)}"
            for axis, dims in zip(self.layout.axes, self.layout.dims, strict=True)
            if dims
        ]
        return ", ".join([f"made {self.pattern}by {self.by}", *over])

    @property
    def pattern(self) -> str:
        return f"as {write_axes(self.layout.axes)!r} " if self.layout.axes else ""

    def differences(self, layout: Layout, mesh: MeshSizes, zigzag: tuple[int, ...]) -> list[str]:
        """What a use in this layout takes for other than it was made.

        >>> made = Cut("rearrange", Layout(("batch", "(h w)"), (("dp",), ())), MeshSizes(("dp", "tp"), (2, 2)), (1, 1))
        >>> made.differences(Layout(("batch", "seq"), (("dp",), ("tp",))), made.mesh, (1, 1))
        ["'seq' is sharded over tp=2 here, '(h w)' was whole"]
        """
        given = self.layout if self.layout.axes else Layout(layout.axes, ((),) * len(layout.axes))
        if len(given.axes) != len(layout.axes):
            return []
        found = []
        for axis, dims, name, was in zip(*layout, *given, strict=True):
            here, there = sized(dims, mesh), sized(was, self.mesh)
            if here != there:
                text = f"sharded over {here} here" if dims else "whole here"
                found.append(f"{axis!r} is {text}, {name!r} was {f'sharded over {there}' if was else 'whole'}")
        for axis, ranks, name, was in zip(layout.axes, zigzag, given.axes, self.zigzag or zigzag, strict=True):
            if ranks != was:
                orders = (f"zigzag over {n} ranks" if n > 1 else "in the order of positions" for n in (ranks, was))
                found.append(f"{axis!r} lies {next(orders)} here, {name!r} lay {next(orders)}")
        return found


def sized(dims: Dims, mesh: MeshSizes) -> str:
    """Mesh dims with their sizes, as in "dp=2·fsdp=4"."""
    return "·".join(f"{dim}={mesh.size(dim)}" for dim in dims)


def mark_cut(x: T, by: str, layout: Layout | None, mesh: MeshSizes, zigzag: tuple[int, ...] | None = None) -> T:
    """`x`, with the mark that `by` made it in this layout (`None`: whole, without a pattern).

    >>> import torch
    >>> x = mark_cut(torch.ones(2), "ft.shard", Layout(("batch",), (("dp",),)), MeshSizes(("dp",), (2,)))
    >>> cut_of(x).cuts, cut_of(x + 0)
    (True, None)
    """
    axes, dims = ((), ()) if layout is None else layout
    setattr(x, MARK, (by, axes, dims, *mesh, zigzag))  # plain tuples: `torch.load` reads them with weights_only
    return x


def cut_of(x: Tensor) -> Cut | None:
    """The mark of a tensor, if it has one."""
    found = getattr(x, MARK, None)
    if found is None:
        return None
    by, axes, dims, names, sizes, zigzag = found
    return Cut(by, Layout(axes, dims), MeshSizes(names, sizes), zigzag)


def carry_cut(source: Tensor, x: T) -> T:
    """`x`, which has the value of `source`, with the mark of that."""
    found = getattr(source, MARK, None)
    if found is not None:
        setattr(x, MARK, found)
    return x


def refuse_shards(what: str, named: Iterable[tuple[str, Any]]) -> None:
    """Raise `LayoutError` for shards among these (name, tensor), where no mesh is known: they would pass as whole.

    >>> import torch
    >>> x = mark_cut(torch.ones(2), "ft.shard", Layout(("batch",), (("dp",),)), MeshSizes(("dp",), (2,)))
    >>> refuse_shards("reduce('batch ->')", [("x", x)])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    functitan.errors.LayoutError: reduce('batch ->'), called outside ft.spmd:
      - x is a shard, made as 'batch' by ft.shard, 'batch' sharded over dp=2
      Fix: call it in a function that ft.spmd(fn, mesh=mesh, rules=rules) wraps, ...
    """
    problems = [
        f"{name} is a shard, {cut}"
        for name, x in named
        if isinstance(x, Tensor) and (cut := cut_of(x)) is not None and cut.cuts
    ]
    if problems:
        raise LayoutError(report(f"{what}, called outside ft.spmd", problems, _FIX))


_FIX = (
    "call it in a function that ft.spmd(fn, mesh=mesh, rules=rules) wraps, "
    "or make tensors whole first: ft.unshard(x, pattern, mesh=mesh, rules=rules)"
)
