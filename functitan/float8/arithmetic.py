"""The arithmetic of `ft.float8`: operands are quantized on their shards, travel as bytes, and multiply scaled.

Invariant: a scale is that of the global axes it belongs to: maxima over sharded axes are maxima over ranks, one
all-reduce for those of an op that go over the same mesh dims. So every mesh quantizes alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.axes import Signature, write_axes
from functitan.errors import FunctitanError, LayoutError, report
from functitan.float8.quantized import (
    BACKWARD,
    FIX_BLOCKS,
    FORWARD,
    Quantized,
    dequantize,
    largest,
    move,
    narrow,
    quantize,
    quantize_blocks,
    scale_of,
    travel,
)
from functitan.float8.recipes import BLOCK, Float8, Matmul
from functitan.float8.scaled_mm import check_device, check_matrices, scaled_mm
from functitan.ops.arithmetic import Arithmetic, Value, plain
from functitan.ops.function import peeled
from functitan.ops.local import matrices, product
from functitan.ops.types import global_sizes
from functitan.sharding.contraction import Contraction, terms_of
from functitan.sharding.env import Env
from functitan.sharding.lowering import Lowering
from functitan.sharding.message import Label
from functitan.sharding.rules import Dims
from functitan.sharding.steps import send


class Use(NamedTuple):
    """How an operand of a product is quantized: the axes that share a scale, and that along which blocks lie."""

    shared: tuple[int, ...]
    block: int | None = None


class _Einsum(NamedTuple):
    """An einsum in float8: what it was told, its operands, the products' dtype, and its rows in a `Delayed` state."""

    told: Float8
    operands: int
    weights: tuple[int, ...]
    dtype: torch.dtype
    pattern: str
    rows: tuple[int, int]


def lowering(told: Float8) -> Lowering:
    """The lowering of a function inside `ft.float8`."""
    return Lowering(told, arithmetic=converted, mark=_mark, at=Float8.at)


def _mark(told: Float8) -> Any:
    return told.mark


def converted(
    told: Float8, pattern: str, signature: Signature, tensors: tuple[Tensor, ...], env: Env
) -> Arithmetic | None:
    """The arithmetic of an einsum inside `ft.float8`; `None` for one that stays as it is, which a ledger notes."""
    why = _why_not(pattern, signature, tensors, env, told)
    text = f"einsum({pattern!r})"
    emulated = ", emulated" if told.emulate or told.recipe.blocks else ""
    env.note(f"{text} in float8 ({told.name}{emulated})" if why is None else f"{text} not in float8: {why}")
    if why is not None:
        return None
    if not emulated:
        check_device(tensors[0].device, f"{text} in float8")
    n, r = len(signature.operands), len(signature.results)
    weights = tuple(range(n - r, n))
    dtype = tensors[0].dtype if env.precision is None else env.precision.compute
    rows = (0, 0) if told.delayed is None else told.delayed.take(n, r, env.mesh)
    its = _Einsum(told, n, weights, dtype, pattern, rows)
    return _arithmetic(its, tuple(range(n)))


def _why_not(pattern: str, signature: Signature, tensors: tuple[Tensor, ...], env: Env, told: Float8) -> str | None:
    terms = terms_of(len(signature.operands), len(signature.results))
    for term in terms:
        if len(term.operands) != 2:
            return "a product of two operands each is wanted"
        a, b = (set(signature.operands[i]) for i in term.operands)
        result = set(signature.results[term.result])
        if not (a & b - result and a - b and b - a) or (a ^ b) - result:
            return "it is no product of matrices"
    if not all(x.is_floating_point() for x in tensors):
        return "its operands hold no floating-point numbers"
    if told.filter is None:
        return None
    if isinstance(told.filter, frozenset):
        named = told.filter & {axis for axes in signature.operands for axis in axes}
        return f"the filter names {write_axes(tuple(sorted(named)))}" if named else None
    sizes: dict[str, int] = {}
    for axes, x in zip(signature.operands, tensors, strict=True):
        sizes |= global_sizes(axes, x, env, Label("einsum", pattern))
    return None if told.filter(_matmul(pattern, signature, sizes)) else "the filter says so"


def _matmul(pattern: str, signature: Signature, sizes: dict[str, int]) -> Matmul:
    a, b = (signature.operands[i] for i in terms_of(len(signature.operands), len(signature.results))[0].operands)
    result, counts = signature.results[0], {"m": 1, "k": 1, "n": 1}
    for axis in {*a, *b}:
        counts["k" if axis not in result else "n" if axis not in a else "m"] *= sizes[axis]
    return Matmul(pattern, frozenset(sizes), **counts)


def _arithmetic(its: _Einsum, roles: tuple[int, ...]) -> Arithmetic:
    """That of an einsum, or of its vjp, whose operand i is the einsum's operand, or result's cotangent, `roles[i]`."""
    usual, recipe, forward = plain(its.dtype), its.told.recipe, max(roles) < its.operands

    def use(full: Contraction, operands: tuple[int, ...], result: int, which: int) -> Use | None:
        of_weight = not forward and not any(roles[i] in its.weights for i in operands)
        if recipe.exact_weight_gradient and of_weight:
            return None
        axes, kept = full.operands[operands[which]].axes, full.results[result].axes
        if recipe.blocks:
            return Use((), axes.index(_block_axis(full, operands, result, its.pattern)))
        return Use(tuple(i for i, axis in enumerate(axes) if not recipe.rows or axis not in kept))

    def pack(
        tensors: tuple[Tensor, ...], wanted: Sequence[tuple[int, Any]], full: Contraction, env: Env, label: Label
    ) -> list[Value]:
        scales = _scales(its, roles, tensors, wanted, full, env, label)
        values: list[Value] = []
        for (place, how), scale in zip(wanted, scales, strict=True):
            x, dtype = tensors[place], _dtype(its, roles[place])
            if how is None:
                values.append(x)
            elif how.block is not None:
                _check_shard(x, how.block, label)
                data, exponents = quantize_blocks(x, how.block, dtype)
                values.append(Quantized(data, exponents, how.shared, how.block, its.dtype))
            else:
                assert scale is not None
                values.append(Quantized(quantize(x, scale, dtype), scale, how.shared, None, its.dtype))
        return values

    def multiply(axes: Any, result: Any, values: tuple[Value, ...], new: Any) -> Tensor:
        if not isinstance(values[0], Quantized):
            return usual.product(axes, result, values, new)
        assert not new and len(values) == 2
        if its.told.emulate or recipe.blocks:
            return _emulated(axes, result, *values)
        return _by_kernel(axes, result, *values, f"einsum({its.pattern!r}) in float8", forward)

    either = lambda exact, ours: lambda x, *args: (ours if isinstance(x, Quantized) else exact)(x, *args)
    return Arithmetic(
        use=use,
        pack=pack,
        move=either(usual.move, move),
        arrive=lambda x: x if isinstance(x, Quantized) else usual.arrive(x),
        narrow=either(usual.narrow, narrow),
        travel=either(usual.travel, travel),
        product=multiply,
        # what is differentiated more than once, or forwards, runs in high precision: rounding counts as the identity
        backward=lambda roles: _arithmetic(its, roles) if forward else None,
    )


def _scales(
    its: _Einsum,
    roles: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    wanted: Sequence[tuple[int, Any]],
    full: Contraction,
    env: Env,
    label: Label,
) -> list[Tensor | None]:
    """A scale for each value, `None` where it has none of its own."""
    dtypes = [_dtype(its, roles[place]) for place, _ in wanted]
    scales: list[Tensor | None] = [None] * len(wanted)
    maxima: dict[int, Tensor] = {}
    for i, (place, how) in enumerate(wanted):
        x, role = tensors[place], roles[place]
        if how is None or how.block is not None:
            continue
        if its.told.recipe.source == "given":
            scales[i] = x.new_full((1,) * x.dim(), _given(its, role), dtype=torch.float32)
            continue
        found = largest(x, how.shared)
        known = None if its.told.delayed is None else _known(its, role, found)
        if known is None:
            maxima[i] = found
        else:  # of zeros alone nothing is known, and 1 is as good a scale as any
            known = known.view((1,) * x.dim())
            scales[i] = torch.where(known > 0, scale_of(known, dtypes[i]), 1.0)
    over = {i: {d for a in wanted[i][1].shared for d in full.operands[wanted[i][0]].dims[a]} for i in maxima}
    if not its.told.recipe.rows:  # single numbers go together
        over = dict.fromkeys(maxima, frozenset[str]().union(*over.values()))
    for i, found in _over_ranks(maxima, over, env, label).items():
        scales[i] = scale_of(found, dtypes[i])
    return scales


def _over_ranks(maxima: dict[int, Tensor], over: dict[int, Any], env: Env, label: Label) -> dict[int, Tensor]:
    """The largest over ranks: one all-reduce for all that go over the same mesh dims."""
    assert env.mesh is not None
    groups: dict[Dims, list[int]] = {}
    for i, dims in over.items():
        groups.setdefault(tuple(d for d in env.mesh.sizes.dims if d in dims), []).append(i)
    found = dict(maxima)
    for dims, group in groups.items():
        if env.mesh.sizes.size(dims) > 1:
            flat = send("all_reduce", torch.cat([maxima[i].flatten() for i in group]), dims, env, label, "max")
            parts = flat.split([maxima[i].numel() for i in group])
            found |= {i: part.view(maxima[i].shape) for i, part in zip(group, parts, strict=True)}
    return found


def _dtype(its: _Einsum, role: int) -> torch.dtype:
    return FORWARD if role < its.operands else BACKWARD


def _known(its: _Einsum, role: int, found: Tensor) -> Tensor | None:
    """What the state knows of an operand or cotangent; the maximum found now is entered."""
    assert its.told.delayed is not None
    which, place = (0, role) if role < its.operands else (1, role - its.operands)
    known = its.told.delayed.of(which, its.rows[which] + place, found)
    return None if known is None else peeled(known)


def _given(its: _Einsum, role: int) -> float:
    scales = dict(its.told.scales)
    x, weight, cotangent = scales[its.pattern] if its.pattern in scales else scales[""]
    return cotangent if role >= its.operands else weight if role in its.weights else x


def _emulated(axes: Any, result: Any, a: Quantized, b: Quantized) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.block is not None:
        return product(axes, result, (dequantize(a, wide), dequantize(b, wide))).to(a.dtype)
    z = product(axes, result, (a.data.to(wide), b.data.to(wide)))
    scales = product(axes, result, (a.scale.to(wide), b.scale.to(wide)))  # a sum over axes of size 1
    return (z * scales).to(a.dtype)


def _by_kernel(axes: Any, result: Any, a: Quantized, b: Quantized, what: str, forward: bool) -> Tensor:
    left, right, fold = matrices(*axes, result)
    x, y = left(a.data), right(b.data)
    check_matrices(x, y, what)
    return fold(scaled_mm(x, y, left(a.scale), right(b.scale), a.dtype, forward), a.data, b.data)


def _block_axis(full: Contraction, operands: tuple[int, ...], result: int, pattern: str) -> str:
    """The last of the axes summed whose global size blocks divide."""
    sizes, kept = dict(full.sizes), full.results[result].axes
    summed = [axis for axis in full.operands[operands[0]].axes if axis not in kept]
    fitting = [axis for axis in summed if sizes[axis] % BLOCK == 0]
    if not fitting:
        problem = f"it sums over {', '.join(f'{axis!r} of size {sizes[axis]}' for axis in summed)}"
        raise FunctitanError(report(f"einsum({pattern!r}) in mxfp8", [problem], FIX_BLOCKS))
    return fitting[-1]


def _check_shard(x: Tensor, axis: int, label: Label) -> None:
    if x.shape[axis] % BLOCK:
        problem = f"dimension {axis} of a shard {tuple(x.shape)} holds no whole blocks"
        raise LayoutError(report(f"{label.op}({label.pattern!r}) in mxfp8", [problem], FIX_BLOCKS))
