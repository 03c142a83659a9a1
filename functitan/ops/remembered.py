"""What ops remember while they are checked, captured or explained: how results lie, against how they are taken.

Invariant: only what is known is compared, layouts and orders of tokens and no names: a tensor without a memory, as any
plain torch op gives one, passes. Nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor

from functitan.axes import Axes, write_axes
from functitan.errors import LayoutError, RulesError, report
from functitan.ops.types import layout_here
from functitan.sharding.cut import cut_of, mark_cut
from functitan.sharding.env import Env
from functitan.sharding.layout import Layout

Groups = tuple[Axes, ...]  # the axes of each dimension of a tensor, outermost first
T = TypeVar("T", bound=Tensor)


def made(by: str, axes: Axes, x: T, env: Env, names: Axes | None = None, groups: Groups | None = None) -> T:
    """`x`, a named op's result, which remembers how it lies, where ops do (`Env.remembers`).

    `names` are those to look the layout up by, where they are others; `groups` are the axes of each dimension, where
    some have several.
    """
    if env.mesh is not None and env.remembers:
        shown = _each(names or axes) if groups is None else groups
        mark_cut(x, by, _lies(names or axes, shown, x, env), env.mesh.sizes, _zigzag(shown, env))
    return x


def check_layouts(what: str, operands: Iterable[tuple[str, Any, Axes, Groups | None]], env: Env) -> None:
    """Raise `LayoutError` for tensors that were made in another layout, or order, than their axes have here.

    Of each come the name, itself, its axes, and these as groups, where a dimension has several.
    """
    assert env.mesh is not None
    problems, pairs = [], []
    for name, x, axes, several in operands:
        groups = _each(axes) if several is None else several
        cut = cut_of(x) if isinstance(x, Tensor) and x.dim() == len(groups) else None
        if cut is None:
            continue
        try:
            layout = _lies(axes, groups, x, env)
        except RulesError:
            continue  # the op itself lists every axis without a rule
        used = write_axes(layout.axes)
        for text in cut.differences(layout, env.mesh.sizes, _zigzag(groups, env)):
            problems.append(f"{name} was made {cut.pattern}by {cut.by} and is used as {used!r}: {text}")
            was = " ".join("_".join(axis.strip("()").split()) for axis in cut.layout.axes)
            pairs.append((was or used, used))
    if problems:
        fix = _FIX_MADE if pairs[0][0] == pairs[0][1] else _FIX_NAME.format(*pairs[0])
        raise LayoutError(report(what, problems, fix))


def _each(axes: Axes) -> Groups:
    return tuple((axis,) for axis in axes)


def _lies(axes: Axes, groups: Groups, x: Tensor, env: Env) -> Layout:
    """The layout of what the caller sees of a tensor: a dimension of several axes lies as its outermost."""
    full = layout_here(axes, x, env)
    texts = (group[0] if len(group) == 1 else f"({write_axes(group)})" if group else "1" for group in groups)
    return Layout(tuple(texts), tuple(full.of(group[0]) if group else () for group in groups))


def _zigzag(groups: Groups, env: Env) -> tuple[int, ...]:
    assert env.mesh is not None
    return tuple(env.sequence.ranks(group[0], env.mesh.sizes) if len(group) == 1 else 1 for group in groups)


_FIX_NAME = (
    "an axis keeps its name from op to op; ft.constrain renames it and moves the tensor: "
    "ft.constrain('{} -> {}', x), where the rules say how each name lies"
)
_FIX_MADE = (
    "make it as it is used: give ft.shard its pattern, move it by ft.reshard from other rules, and look a table of "
    "positions up by ft.take(pattern, ft.iota('seq', 'seq', seq=n), table) where tokens lie zigzag"
)
