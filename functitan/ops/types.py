"""Types: what an op is told of a tensor, and the full layouts that follow from it where the op is called.

Invariant: a layout is decided from all axes of a tensor, those that the caller's pattern shows and those that vmaps
hide. The axes of one op have one global size each.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from functitan.axes import Axes, write_axes
from functitan.errors import LayoutError, PatternError, RulesError, report
from functitan.ops.function import Hidden, Hiddens, hidden_axes
from functitan.sharding.contraction import Contraction, Term
from functitan.sharding.env import Env, nowhere
from functitan.sharding.layout import FIX_RULE, FIX_SIZES, Layout, divisibility, layout_of
from functitan.sharding.ledger import Ledger, entering
from functitan.sharding.mesh import MeshSizes
from functitan.sharding.message import Label
from functitan.sharding.rules import AxisRules, unknown_names

Shapes = tuple[tuple[int, ...], ...]


class Type(NamedTuple):
    """What an op is told of a tensor: the axes the caller sees, and where their layout comes from.

    The rules in force give the layout of `lookup` (by default `axes` itself; other names move a tensor by renaming), or
    of the table `rules`; `layout` instead gives it outright.
    """

    axes: Axes
    lookup: Axes | None = None
    rules: AxisRules | None = None
    layout: Layout | None = None

    def resolve(self, hidden: Hiddens, env: Env) -> Layout:
        """The full layout, hidden axes first. Inside an `ft.vmap` over an axis, what a pattern shows of it is whole."""
        full = tuple(h.axis for h in hidden) + self.axes
        if self.layout is not None:  # a hidden axis lies alike in all tensors, so the others give way to it
            over = env.layout(tuple(h.name or h.axis for h in hidden)).dims
            taken = {dim for dims in over for dim in dims}
            kept = (tuple(d for d in self.layout.of(axis) if d not in taken) for axis in self.axes)
            return Layout(full, (*over, *kept))
        assert env.mesh is not None
        names = tuple(h.name or h.axis for h in hidden) + self.names(env)
        layout = env.layout(names) if self.rules is None else layout_of(names, self.rules, env.mesh.sizes)
        return Layout(full, layout.dims)

    def shown(self, hidden: Hidden | None, env: Env) -> Type:
        """The type where a hidden axis shows: `hidden` in this tensor, `None` in others. The layout stays."""
        if hidden is None:
            return self._replace(lookup=self.names(env))
        layout = None if self.layout is None else self.resolve((hidden,), env)
        names = (hidden.name or hidden.axis, *self.names(env))
        return Type((hidden.axis, *self.axes), names, self.rules, layout)

    def names(self, env: Env) -> Axes:
        """The names to look up for the axes that the caller sees."""
        taken = {name for _, name in env.vmap_axes}
        return tuple(
            f"_{name}" if name in taken else name for name in (self.axes if self.lookup is None else self.lookup)
        )


def layout_here(axes: Axes, x: Tensor, env: Env) -> Layout:
    """The full layout of a tensor with these visible axes."""
    return Type(axes).resolve(hidden_axes(x, env, frozenset(axes)), env)


def global_sizes(axes: Axes, x: Tensor, env: Env, label: Label) -> dict[str, int]:
    """The global size of each visible axis of a tensor, of which `x` is this rank's shard."""
    if env.mesh is None:
        return dict(zip(axes, x.shape, strict=True))
    own = (Type(axes),)
    sizes = dict(resolve(Contraction(own, own, (Term(0, (0,)),), ()), (x,), env, label)[0].sizes)  # type: ignore[arg-type]
    return {axis: sizes[axis] for axis in axes}


def resolve(
    typed: Contraction, tensors: tuple[Tensor, ...], env: Env, label: Label
) -> tuple[Contraction, tuple[Any, Any]]:
    """The contraction in full layouts with the size of each axis, and the hidden axes of operands and of results."""
    assert env.mesh is not None
    shown = frozenset(axis for t in (*typed.operands, *typed.results) for axis in t.axes)
    hidden = tuple(hidden_axes(x, env, shown) for x in tensors)
    shapes = tuple(tuple(x.shape) for x in tensors)
    contraction, of_each, patterns = _known(typed, hidden, shapes, env.mesh.sizes, env.rules, env.vmap_axes, label)
    env.ask(patterns)
    return contraction, of_each


@lru_cache(maxsize=2**14)  # shapes are part of the key: lengths may vary without end
def _known(
    typed: Contraction,
    hidden: tuple[Hiddens, ...],
    shapes: Shapes,
    mesh: MeshSizes,
    rules: AxisRules,
    vmap_axes: tuple[tuple[int, str], ...],
    label: Label,
) -> tuple[Contraction, tuple[Any, Any], frozenset[Axes]]:
    """The same, of all that an `Env` says of layouts; and the patterns that are looked up for it."""
    seen = Ledger()
    env = Env(nowhere(mesh), rules, vmap_axes=vmap_axes, around=(entering(seen),))
    found = _resolved(typed, hidden, shapes, env, label)
    return (*found, frozenset(seen.patterns))


def _resolved(
    typed: Contraction, hidden: tuple[Hiddens, ...], shapes: Shapes, env: Env, label: Label
) -> tuple[Contraction, tuple[Any, Any]]:
    of_results: list[Hiddens] = []
    for r in range(len(typed.results)):
        found = {h for term in typed.terms if term.result == r for i in term.operands for h in hidden[i]}
        of_results.append(tuple(sorted(found)))
    try:
        operands = tuple(t.resolve(own, env) for t, own in zip(typed.operands, hidden, strict=True))
        results = tuple(t.resolve(own, env) for t, own in zip(typed.results, of_results, strict=True))
    except RulesError:
        _check_names(typed, env, label)  # which names every tensor at fault
        raise
    full = [tuple(h.size for h in own) + shape for shape, own in zip(shapes, hidden, strict=True)]
    sizes = _global_sizes(operands, full, dict(typed.sizes), env, label)
    _check_divides(results, sizes, env, label)
    return Contraction(operands, results, typed.terms, tuple(sizes.items())), (hidden, tuple(of_results))


def check_cotangents(operands: list[tuple[Axes, Layout, Layout]], label: Label, env: Env) -> None:
    """A cotangent must lie as its operand does; a hidden axis that takes the operand's mesh dim forbids it.

    `operands` gives the visible axes, the operand's layout, and that of its cotangent.
    """
    each = " and ".join(repr(name) for _, name in env.vmap_axes)
    problems = [
        f"operand {write_axes(axes)!r}: axis {axis!r} lies over {own.of(axis)}, but in its gradient for each {each} "
        f"over {layout.of(axis)}"
        for axes, own, layout in operands
        for axis in axes
        if own.of(axis) != layout.of(axis)
    ]
    if problems:
        raise LayoutError(report(f"vmap of the gradient of {label.op}({label.pattern!r})", problems, _FIX_VMAP))


def _check_names(typed: Contraction, env: Env, label: Label) -> None:
    """Raise `RulesError` that lists every axis without a rule, of all operands and results."""
    assert env.rules is not None
    asked = {t.names(env): t.rules or env.rules for t in (*typed.operands, *typed.results) if t.layout is None}
    problems = [problem for names, rules in asked.items() for problem in unknown_names(names, rules)]
    if problems:
        raise RulesError(report(f"{label.op}({label.pattern!r})", problems, FIX_RULE))


def _check_divides(results: tuple[Layout, ...], sizes: dict[str, int], env: Env, label: Label) -> None:
    assert env.mesh is not None
    mesh, problems = env.mesh.sizes, []
    for layout in results:
        if any(
            dims and sizes.get(axis, 0) % mesh.size(dims) for axis, dims in zip(layout.axes, layout.dims, strict=True)
        ):
            problems += divisibility(layout, tuple(sizes[axis] for axis in layout.axes), mesh, "result")
    if problems:
        raise LayoutError(report(f"{label.op}({label.pattern!r})", problems, FIX_SIZES))


def _global_sizes(
    operands: tuple[Layout, ...], shapes: list[tuple[int, ...]], known: dict[str, int], env: Env, label: Label
) -> dict[str, int]:
    assert env.mesh is not None
    sizes: dict[str, int] = {}
    problems = []
    for i, (layout, shape) in enumerate(zip(operands, shapes, strict=True)):
        if len(layout.axes) != len(shape):
            problems.append(
                f"operand {i} {write_axes(layout.axes)!r} has {len(layout.axes)} names, "
                f"its tensor {len(shape)} dimensions: {shape}"
            )
            continue
        for axis, size, dims in zip(layout.axes, shape, layout.dims, strict=True):
            whole = size * env.mesh.sizes.size(dims)
            if sizes.setdefault(axis, whole) != whole:
                problems.append(
                    f"axis {axis!r} is {whole} in operand {i} {write_axes(layout.axes)!r} "
                    f"(a shard of {size} over {dims or 'no mesh dim'}) but {sizes[axis]} in an earlier one"
                )
    if problems:
        raise PatternError(report(f"{label.op}({label.pattern!r})", problems, _FIX_SIZES))
    return {**known, **sizes}


_FIX_SIZES = "tensors are local shards: make them with ft.shard or ft.init, and give each axis one size"
_FIX_VMAP = (
    "reshard the parameters first, so that the hidden axis can have the mesh dim: "
    "params = ft.reshard(params, patterns, to_rules=rules.replace(embed=None)), "
    "then differentiate inside ft.spmd(..., rules=those rules)"
)
