"""The contraction op: what einsum, sums, broadcasts and moves between layouts all are.

Invariant: its cotangents and tangents are contractions, planned by the same planner. It saves shards, never what it
gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.ops.arithmetic import Arithmetic, plain
from functitan.ops.function import Call, Hidden, Hiddens, Op, apply, hidden_axes, hide
from functitan.ops.local import add_product, product
from functitan.ops.schedule import Running, plain_sum, run_plan
from functitan.ops.types import Type, check_cotangents, resolve
from functitan.sharding.choice import FREE, Fixed
from functitan.sharding.contraction import Contraction, Term, cotangents, tangents
from functitan.sharding.env import Env
from functitan.sharding.message import Label
from functitan.sharding.plan import Plan, plan
from functitan.sharding.precision import cast
from functitan.sharding.sink import Sink

Dtypes = tuple[torch.dtype | None, ...]

Sizes = tuple[tuple[str, int], ...]  # (axis, global size)


class Static(NamedTuple):
    """The static data of a call: the contraction in types and in full layouts, its plan, its label, its reduction.

    `dtypes` are those of the operands; the products are of `compute`, the results of `made` (`None`: as they come).
    """

    typed: Contraction
    full: Contraction
    plan: Plan
    label: Label
    reduction: str
    fixed: Fixed
    dtypes: Dtypes
    compute: torch.dtype | None
    made: Dtypes
    arithmetic: Arithmetic


def contract(
    typed: Contraction,
    tensors: tuple[Tensor, ...],
    env: Env,
    label: Label,
    fixed: Fixed = FREE,
    reduction: str = "sum",
    compute: torch.dtype | None = None,
    made: Dtypes | None = None,
    arithmetic: Arithmetic | None = None,
) -> tuple[Tensor, ...]:
    """Run a contraction whose operands and results are `Type`s, on local shards; `typed.sizes` adds sizes to theirs.

    Operands are cast to `compute` where they lie and results to `made`; `None` leaves them as they are. `arithmetic`
    is that of the products, by default the plain one.
    """
    assert env.mesh is not None
    made = made or (None,) * len(typed.results)
    mesh = env.mesh.sizes
    full, hidden = resolve(typed, tensors, env, label)
    chosen = plan(full, mesh, fixed)
    seen = env.sees_every_op or sink_of(tensors, env) is not None
    simple = chosen.is_local and reduction == "sum" and arithmetic is None and not seen
    if simple and _transposes_locally(full, env, fixed):
        with env.span(*label):
            return _locals(typed, chosen, tensors, compute, made)
    dtypes = tuple(x.dtype for x in tensors)
    static = Static(typed, full, chosen, label, reduction, fixed, dtypes, compute, made, arithmetic or plain(compute))
    linear = all(len(term.operands) == 1 for term in typed.terms)
    return apply(Call(_LINEAR if linear else _PRODUCT, env, static, *hidden), *tensors)


def sink_of(tensors: Iterable[Any], env: Env) -> Sink | None:
    """The sink of these surroundings, if one of the operands is a weight whose gradient goes there.

    Plain torch ops would compute it at once.
    """
    sink = env.find(Sink) if env.lowering else None
    return sink if sink is not None and any(sink.number(x) is not None for x in tensors) else None


def move(now: Type, then: Type, x: Tensor, env: Env, label: Label, sizes: Sizes = ()) -> Tensor:
    """A tensor in another layout, its axes in another order; summed over those that `then` lacks.

    `sizes` gives the global sizes of the axes that only `then` has. Transpose: the move back.
    """
    return contract(Contraction((now,), (then,), (Term(0, (0,)),), sizes), (x,), env, label)[0]


def lift(own: Type, x: Tensor, hidden: Hiddens, env: Env, label: Label) -> Tensor:
    """The tensor with all these hidden axes, equal along those that it lacked, and where tensors that have them lie.

    So it may meet them in plain torch ops, and its cotangent is summed over all ranks that share it.
    """
    assert env.mesh is not None
    levels = {h.level for h in hidden_axes(x, env)}
    new = tuple(h for h in hidden if h.level not in levels)
    if not new:
        return x
    ones = tuple(hide(torch.ones((), dtype=x.dtype, device=x.device), (h,)) for h in new)
    operands = (own, *(Type(()) for _ in ones))
    return contract(Contraction(operands, (own,), (Term(0, tuple(range(len(operands)))),), ()), (x, *ones), env, label)[
        0
    ]


def _run(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    static: Static = call.static
    full, chosen, env, label = static.full, static.plan, call.env, static.label
    summed = env.rewritten(full, chosen, label) or plain_sum
    running = Running(full, chosen, tensors, static.arithmetic, static.reduction, env, label)
    return run_plan(running, static.made, summed)


def _vjp(call: Call, tensors: tuple[Tensor, ...], _: Any, grads: tuple[Tensor | None, ...], wanted: tuple[int, ...]):
    assert call.static.reduction == "sum", "a maximum is not linear: ops that use it give their own vjp"
    sink = call.env.find(Sink)
    numbers = {i: None if sink is None or not tensors else sink.number(tensors[i]) for i in wanted}
    now = tuple(i for i in wanted if numbers[i] is None)
    if sink is not None and (waiting := tuple(i for i in wanted if numbers[i] is not None)):
        places, typed, inputs, options = _transposed(call, tensors, grads, waiting)
        product = partial(_add_contracted, typed, inputs, call.transposed(), call.static.label, **options)
        sink.put(tuple(numbers[i] for i in places), product)  # type: ignore[misc]
    if not now:
        return (None,) * len(wanted)
    places, typed, inputs, options = _transposed(call, tensors, grads, now)
    outs = contract(typed, inputs, call.transposed(), call.static.label, **options)
    found = dict(zip(places, outs, strict=True))
    return tuple(found.get(i) for i in wanted)


def _transposed(
    call: Call, tensors: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: tuple[int, ...]
) -> tuple[list[int], Contraction, tuple[Tensor, ...], dict[str, Any]]:
    """Those of the operands `wanted` that have a cotangent, and the contraction that gives them, of what it uses."""
    static: Static = call.static
    given = tuple(i for i, g in enumerate(grads) if g is not None)
    typed = cotangents(static.typed._replace(sizes=static.full.sizes), wanted, given)
    typed, results, used = _used(typed)
    inputs = _values(static, tuple(map(_conjugate, tensors)), (grads[i] for i in given), used)
    n = len(static.typed.operands)
    roles = tuple(i if i < n else n + given[i - n] for i in used)
    full, _ = resolve(typed, inputs, call.env, static.label)
    places = [wanted[r] for r in results]
    check_cotangents(
        [
            (static.typed.operands[i].axes, static.full.operands[i], layout)
            for i, layout in zip(places, full.results, strict=True)
        ],
        static.label,
        call.env,
    )
    made = tuple(static.dtypes[i] for i in places)
    options = dict(fixed=static.fixed, compute=static.compute, made=made, arithmetic=static.arithmetic.backward(roles))
    return places, typed, inputs, options


def _add_contracted(
    typed: Contraction,
    tensors: tuple[Tensor, ...],
    env: Env,
    label: Label,
    totals: Sequence[Tensor],
    *,
    fixed: Fixed,
    compute: torch.dtype | None,
    made: Dtypes,
    arithmetic: Arithmetic | None,
) -> None:
    """Add the results of a contraction of plain tensors, which nothing differentiates, to these totals."""
    assert env.mesh is not None
    full, _ = resolve(typed, tensors, env, label)
    chosen = plan(full, env.mesh.sizes, fixed)
    single = all(len(groups) == 1 and len(groups[0].products) == 1 for groups in chosen.results)
    with torch.no_grad():
        if arithmetic is not None or not chosen.is_local or not single:
            results = contract(typed, tensors, env, label, fixed, compute=compute, made=made, arithmetic=arithmetic)
            for total, x in zip(totals, results, strict=True):
                total.add_(x)
            return
        with env.span(*label):
            for total, (group,), layout in zip(totals, chosen.results, full.results, strict=True):
                (item,) = group.products
                places = [chosen.moved[i][0] for i in item.moved]
                axes = tuple(full.operands[i].axes for i in places)
                values = tuple(cast(tensors[i], compute) for i in places)
                add_product(total, axes, layout.axes, values, item.broadcast)


def _jvp(call: Call, tensors: tuple[Tensor, ...], _: Any, given: tuple[Tensor | None, ...]):
    static: Static = call.static
    places = tuple(i for i, t in enumerate(given) if t is not None)
    typed = tangents(static.typed._replace(sizes=static.full.sizes), places)
    typed, results, used = _used(typed)
    inputs = _values(static, tensors, (given[i] for i in places), used)
    made = tuple(static.made[r] for r in results)
    outs = contract(typed, inputs, call.env, static.label, static.fixed, compute=static.compute, made=made)
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


def _values(static: Static, saved: tuple[Tensor, ...], more: Iterable[Any], used: list[int]) -> tuple[Tensor, ...]:
    """The operands that are used, of those saved (none are, where none will be used) and those that came later."""
    values = [*(saved or (None,) * len(static.typed.operands)), *more]
    return tuple(values[i] for i in used)


def _conjugate(x: Tensor) -> Tensor:
    """What an operand stands for in the transpose of its product: torch's cotangents are conjugate."""
    return x.conj() if x.is_complex() else x


def _used(typed: Contraction) -> tuple[Contraction, list[int], list[int]]:
    """The contraction without results that no term feeds and operands that no term uses; the places of those left."""
    results = sorted({term.result for term in typed.terms})
    operands = sorted({i for term in typed.terms for i in term.operands})
    terms = tuple(Term(results.index(t.result), tuple(operands.index(i) for i in t.operands)) for t in typed.terms)
    kept = tuple(typed.operands[i] for i in operands), tuple(typed.results[r] for r in results)
    return Contraction(*kept, terms, typed.sizes), results, operands


def _locals(
    typed: Contraction, chosen: Plan, tensors: tuple[Tensor, ...], compute: torch.dtype | None, made: Dtypes
) -> tuple[Tensor, ...]:
    values = tuple(cast(x, compute) for x in tensors)
    results = [_local(typed, chosen, r, values, made[r]) for r in reversed(range(len(typed.results)))]
    return tuple(reversed(results))  # so that autograd adds their cotangents in the order of `_run`


def _local(typed: Contraction, chosen: Plan, r: int, tensors: tuple[Tensor, ...], dtype: torch.dtype | None) -> Tensor:
    """One result from plain torch ops on what the caller sees: nothing moves, in forward or in backward."""
    parts = []
    for group in chosen.results[r]:
        for item in group.products:
            places = [chosen.moved[i][0] for i in item.moved]
            axes = tuple(typed.operands[i].axes for i in places)
            new = tuple((axis, size) for axis, size in item.broadcast if axis in typed.results[r].axes)
            parts.append(product(axes, typed.results[r].axes, tuple(tensors[i] for i in places), new))
    total = parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])
    return total if dtype is None else total.to(dtype)


def _transposes_locally(full: Contraction, env: Env, fixed: Fixed) -> bool:
    assert env.mesh is not None
    back = cotangents(full, tuple(range(len(full.operands))), tuple(range(len(full.results))))
    return plan(back, env.mesh.sizes, fixed).is_local
