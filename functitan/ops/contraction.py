"""The contraction op: what einsum, sums, broadcasts and moves between layouts all are.

Invariant: its cotangents and tangents are contractions, planned by the same planner. It saves shards, never what it
gathered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from functitan.axes import Axes, write_axes
from functitan.errors import LayoutError, PatternError, report
from functitan.ops.function import Call, Hidden, Hiddens, Op, apply, hidden_axes, ones_of
from functitan.ops.local import product
from functitan.sharding.collectives import Label, run_step
from functitan.sharding.context import Env
from functitan.sharding.layout import Layout, layout_of
from functitan.sharding.choice import Fixed
from functitan.sharding.contraction import Contraction, Term, cotangents, tangents
from functitan.sharding.plan import Plan, plan
from functitan.sharding.rules import AxisRules


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
        if self.layout is not None:  # a hidden axis lies alike in all tensors, so others give way to one that is new
            new = tuple(h for h in hidden if h.axis not in self.layout.axes)
            over = dict(zip((h.axis for h in new), env.layout(tuple(h.name or h.axis for h in new)).dims, strict=True))
            left = lambda axis: tuple(dim for dim in self.layout.of(axis) if not any(dim in dims for dims in over.values()))
            return Layout(full, tuple(over[axis] if axis in over else left(axis) for axis in full))
        assert env.mesh is not None
        names = tuple(h.name or h.axis for h in hidden) + self._names(env)
        layout = env.layout(names) if self.rules is None else layout_of(names, self.rules, env.mesh.sizes)
        return Layout(full, layout.dims)

    def shown(self, hidden: Hidden | None, env: Env) -> Type:
        """The type where a hidden axis shows: `hidden` in this tensor, `None` in others. The layout stays."""
        axes, names = ((), ()) if hidden is None else ((hidden.axis,), (hidden.name or hidden.axis,))
        return self._replace(axes=axes + self.axes, lookup=names + self._names(env))

    def _names(self, env: Env) -> Axes:
        taken = {name for _, name in env.vmap_axes}
        return tuple(f"_{name}" if name in taken else name for name in (self.axes if self.lookup is None else self.lookup))


def layout_here(axes: Axes, x: Tensor, env: Env) -> Layout:
    """The full layout of a tensor with these visible axes."""
    return Type(axes).resolve(hidden_axes(x, env, frozenset(axes)), env)


def lift(own: Type, x: Tensor, hidden: Hiddens, env: Env, label: Label) -> Tensor:
    """The tensor with all these hidden axes, equal along those that it lacked, and where tensors that have them lie.

    So it may meet them in plain torch ops, and its cotangent is summed over all ranks that share it.
    """
    assert env.mesh is not None
    levels = {h.level for h in hidden_axes(x, env)}
    ones = tuple(ones_of(h, x) for h in hidden if h.level not in levels)
    if not ones:
        return x
    operands = (own, *(Type(()) for _ in ones))
    return contract(Contraction(operands, (own,), (Term(0, tuple(range(len(operands)))),), ()), (x, *ones), env, label)[0]


class Static(NamedTuple):
    """The static data of a call: the contraction in types and in full layouts, its plan, its label, its reduction."""

    typed: Contraction
    full: Contraction
    plan: Plan
    label: Label
    reduction: str
    fixed: Fixed
    dtypes: tuple[Any, ...]


def contract(
    typed: Contraction, tensors: tuple[Tensor, ...], env: Env, label: Label,
    fixed: Fixed = Fixed(), reduction: str = "sum",
) -> tuple[Tensor, ...]:
    """Run a contraction whose operands and results are `Type`s, on local shards; `typed.sizes` adds sizes to theirs."""
    assert env.mesh is not None
    full, hidden = resolve(typed, tensors, env, label)
    chosen = plan(full, env.mesh.sizes, fixed)
    if chosen.is_local and reduction == "sum" and _transposes_locally(full, env, fixed):
        return tuple(_local(typed, chosen, r, tensors) for r in range(len(typed.results)))
    static = Static(typed, full, chosen, label, reduction, fixed, tuple(x.dtype for x in tensors))
    linear = all(len(term.operands) == 1 for term in typed.terms)
    return apply(Call(_LINEAR if linear else _PRODUCT, env, static, *hidden), *tensors)


def resolve(typed: Contraction, tensors: tuple[Tensor, ...], env: Env, label: Label) -> tuple[Contraction, tuple[Any, Any]]:
    """The contraction in full layouts with the global size of each axis, and the hidden axes of operands and results."""
    assert env.mesh is not None
    shown = frozenset(axis for t in (*typed.operands, *typed.results) for axis in t.axes)
    hidden = [hidden_axes(x, env, shown) for x in tensors]
    operands = tuple(t.resolve(own, env) for t, own in zip(typed.operands, hidden, strict=True))
    of_results: list[Hiddens] = []
    for r in range(len(typed.results)):
        found = {h for term in typed.terms if term.result == r for i in term.operands for h in hidden[i]}
        of_results.append(tuple(sorted(found)))
    results = tuple(t.resolve(own, env) for t, own in zip(typed.results, of_results, strict=True))
    shapes = [tuple(h.size for h in own) + tuple(x.shape) for x, own in zip(tensors, hidden, strict=True)]
    sizes = _global_sizes(operands, shapes, dict(typed.sizes), env, label)
    return Contraction(operands, results, typed.terms, tuple(sizes.items())), (tuple(hidden), tuple(of_results))


def _run(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    static: Static = call.static
    moved: dict[int, Tensor] = {}

    def operand(index: int) -> Tensor:
        if index not in moved:
            place, steps = static.plan.moved[index]
            moved[index] = tensors[place]
            for step in steps:
                moved[index] = run_step(moved[index], step, call.env, static.label)
        return moved[index]

    results = []
    for groups, layout in zip(static.plan.results, static.full.results, strict=True):
        total = None
        for group in groups:
            part = None
            for item in group.products:
                axes = tuple(static.full.operands[static.plan.moved[i][0]].axes for i in item.moved)
                values = tuple(operand(i) for i in item.moved)
                value = product(axes, layout.axes, values, item.broadcast) if static.reduction == "sum" else _maximum(axes[0], layout.axes, values[0])
                part = value if part is None else part + value
            for step in group.steps:
                part = run_step(part, step, call.env, static.label, static.reduction)
            total = part if total is None else total + part
        results.append(total)
    return tuple(results)


def _vjp(call: Call, tensors: tuple[Tensor, ...], _: Any, grads: tuple[Tensor | None, ...], wanted: tuple[int, ...]):
    static: Static = call.static
    assert static.reduction == "sum", "a maximum is not linear: ops that use it give their own vjp"
    given = tuple(i for i, g in enumerate(grads) if g is not None)
    typed = cotangents(static.typed._replace(sizes=static.full.sizes), wanted, given)
    typed, results, used = _used(typed)
    saved = tensors or (None,) * len(static.typed.operands)
    values = [*saved, *(grads[i] for i in given)]
    inputs = tuple(values[i] for i in used)
    full, _ = resolve(typed, inputs, call.env, static.label)
    places = [wanted[r] for r in results]
    check_cotangents(
        [(static.typed.operands[i].axes, static.full.operands[i], layout) for i, layout in zip(places, full.results, strict=True)],
        static.label,
        call.env,
    )
    outs = contract(typed, inputs, call.transposed(), static.label, static.fixed)
    found = dict(zip(results, outs, strict=True))
    return tuple(found[r].to(static.dtypes[i]) if r in found else None for r, i in enumerate(wanted))


def _jvp(call: Call, tensors: tuple[Tensor, ...], _: Any, given: tuple[Tensor | None, ...]):
    static: Static = call.static
    places = tuple(i for i, t in enumerate(given) if t is not None)
    typed = tangents(static.typed._replace(sizes=static.full.sizes), places)
    saved = tensors or (None,) * len(static.typed.operands)
    values = [*saved, *(given[i] for i in places)]
    typed, results, used = _used(typed)
    outs = contract(typed, tuple(values[i] for i in used), call.env, static.label, static.fixed)
    found = dict(zip(results, outs, strict=True))
    return tuple(found.get(r) for r in range(len(static.typed.results)))


def _show(call: Call, hidden: Hidden, operands: tuple[bool, ...], results: tuple[bool, ...]) -> Static:
    typed: Contraction = call.static.typed
    shown = [
        tuple(t.shown(hidden if here else None, call.env) for t, here in zip(types, which, strict=True))
        for types, which in ((typed.operands, operands), (typed.results, results))
    ]
    return call.static._replace(typed=typed._replace(operands=shown[0], results=shown[1]))


_PRODUCT = Op("contraction", _run, _vjp, _jvp, _show)
_LINEAR = _PRODUCT._replace(saves_operands=False)  # the transpose of a linear map needs no operand


def _used(typed: Contraction) -> tuple[Contraction, list[int], list[int]]:
    """The contraction without results that no term feeds and operands that no term uses; the places of those left."""
    results = sorted({term.result for term in typed.terms})
    operands = sorted({i for term in typed.terms for i in term.operands})
    terms = tuple(Term(results.index(t.result), tuple(operands.index(i) for i in t.operands)) for t in typed.terms)
    kept = tuple(typed.operands[i] for i in operands), tuple(typed.results[r] for r in results)
    return Contraction(*kept, terms, typed.sizes), results, operands


def _local(typed: Contraction, chosen: Plan, r: int, tensors: tuple[Tensor, ...]) -> Tensor:
    """One result from plain torch ops on what the caller sees: nothing moves, in forward or in backward."""
    parts = []
    for group in chosen.results[r]:
        for item in group.products:
            places = [chosen.moved[i][0] for i in item.moved]
            axes = tuple(typed.operands[i].axes for i in places)
            new = tuple((axis, size) for axis, size in item.broadcast if axis in typed.results[r].axes)
            parts.append(product(axes, typed.results[r].axes, tuple(tensors[i] for i in places), new))
    return parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])


def _transposes_locally(full: Contraction, env: Env, fixed: Fixed) -> bool:
    assert env.mesh is not None
    back = cotangents(full, tuple(range(len(full.operands))), tuple(range(len(full.results))))
    return plan(back, env.mesh.sizes, fixed).is_local


def _maximum(axes: Axes, result: Axes, x: Tensor) -> Tensor:
    kept = tuple(axis for axis in axes if axis in result)
    places = [i for i, axis in enumerate(axes) if axis not in result]
    return product((kept,), result, (x.amax(places) if places else x,))


def _global_sizes(
    operands: tuple[Layout, ...], shapes: list[tuple[int, ...]], known: dict[str, int], env: Env, label: Label
) -> dict[str, int]:
    assert env.mesh is not None
    sizes: dict[str, int] = {}
    problems = []
    for i, (layout, shape) in enumerate(zip(operands, shapes, strict=True)):
        if len(layout.axes) != len(shape):
            problems.append(f"operand {i} {write_axes(layout.axes)!r} has {len(layout.axes)} names, its tensor {len(shape)} dimensions: {shape}")
            continue
        for axis, size, dims in zip(layout.axes, shape, layout.dims, strict=True):
            whole = size * env.mesh.sizes.size(dims)
            if sizes.setdefault(axis, whole) != whole:
                problems.append(
                    f"axis {axis!r} is {whole} in operand {i} {write_axes(layout.axes)!r} (a shard of {size} over {dims or 'no mesh dim'}) "
                    f"but {sizes[axis]} in an earlier one"
                )
    if problems:
        raise PatternError(report(f"{label.op}({label.pattern!r})", problems, _FIX_SIZES))
    return {**known, **sizes}


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


_FIX_SIZES = "tensors are local shards: make them with ft.shard or ft.init, and give each axis one size"
_FIX_VMAP = (
    "reshard the parameters first, so that the hidden axis can have the mesh dim: params = ft.reshard(params, patterns, "
    "to_rules=rules.replace(embed=None)), then differentiate inside ft.spmd(..., rules=those rules)"
)
