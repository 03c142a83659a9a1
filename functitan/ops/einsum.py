"""`ft.einsum`: products of named tensors that work out their own communication.

Invariant: the value is the same on every mesh; without one, or where nothing has to move, it is a few plain torch ops.
"""

from __future__ import annotations

from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from functitan.axes import Axes, Signature, parse_signature, write_axes
from functitan.errors import PatternError, nearest, report
from functitan.ops.arithmetic import Arithmetic
from functitan.ops.autocast import autocast_is_on, in_precision
from functitan.ops.contraction import contract, sink_of
from functitan.ops.local import product
from functitan.ops.operands import Operand, check_operands
from functitan.ops.remembered import made
from functitan.ops.types import Type
from functitan.ops.weights import are_pairs, weighted
from functitan.sharding.context import current
from functitan.sharding.contraction import Contraction, terms_of
from functitan.sharding.cut import MARK
from functitan.sharding.env import Env
from functitan.sharding.message import Label
from functitan.sharding.precision import in_compute
from functitan.sharding.sink import Sink


def einsum(pattern: str, *tensors: Tensor) -> Any:
    """Products of tensors, summed over the axes that a result lacks: one tensor, or a tuple for several results.

    `"batch embed, embed mlp -> batch mlp"`: one result. With several results (a tuple comes back) the last operands
    belong to one result each and those before them to all: `"x, q, k -> xq, xk"` gathers `x` once, and adds the
    cotangents of `x` before one reduction. Tensors are local shards. Transpose: einsums of the permuted patterns.
    Under `torch.autocast` it computes as under `ft.precision` in autocast's dtype. Raises `PatternError` for a pattern
    that does not fit the tensors.

    >>> x, w, v = torch.ones(2, 3), torch.ones(3, 4), torch.ones(3, 5)
    >>> einsum("batch embed, embed mlp -> batch mlp", x, w).shape
    torch.Size([2, 4])
    >>> [y.shape[1] for y in einsum("batch embed, embed mlp, embed heads -> batch mlp, batch heads", x, w, v)]
    [4, 5]
    """
    signature, typed = _parse(pattern)
    env = current()
    arithmetic, sink = None, None
    if env.lowering:
        arithmetic = _arithmetic(pattern, signature, tensors, env)
        sink = sink_of(tensors, env)
    planned = sink is not None and not (env.precision is None and are_pairs(signature))
    if env.sees_every_op or arithmetic is not None or planned:  # all want the named op
        env = env.on_one_rank(tuple(axis for axes in signature.operands for axis in axes))
    if (env.mesh is not None or env.precision is not None) and autocast_is_on():  # else torch casts, and rightly
        return in_precision(einsum, next(iter(tensors), None), pattern, *tensors)
    if env.mesh is None:
        try:
            given = in_compute(tensors, env.precision)
            fits = _fits(signature.operands, tuple([(x.shape, x.dtype, x.device) for x in given]))
            for x in tensors:
                if MARK in x.__dict__:  # a shard, perhaps
                    fits = False
        except (AttributeError, RuntimeError):  # of what is no tensor, or a nested one, which has no shape
            given, fits = tensors, False
        if not fits:
            if autocast_is_on():  # torch has cast one operand, and not another
                return in_precision(einsum, next(iter(tensors), None), pattern, *tensors)
            _check(pattern, signature, given)
        try:
            if env.around:
                with env.span("einsum", pattern):
                    results = _products(signature, given, sink)
            else:
                results = _products(signature, given, sink)
        except RuntimeError:
            _check(pattern, signature, given)  # a sparse tensor, say
            raise
    else:
        _check(pattern, signature, tensors)
        compute = None if env.precision is None else env.precision.compute
        results = contract(typed, tensors, env, Label("einsum", pattern), compute=compute, arithmetic=arithmetic)
        if env.remembers:
            results = tuple(made("einsum", axes, x, env) for axes, x in zip(signature.results, results, strict=True))
    return results[0] if len(results) == 1 else results


def _arithmetic(pattern: str, signature: Signature, tensors: tuple[Any, ...], env: Env) -> Arithmetic | None:
    """The arithmetic that a lowering gives this einsum, if any does."""
    ranks = [x.dim() if isinstance(x, Tensor) else None for x in tensors]
    if ranks != [len(axes) for axes in signature.operands]:
        return None  # the check of every einsum says why
    given = (
        each.arithmetic(each.state, pattern, signature, tensors, env)
        for each in env.lowering
        if each.arithmetic is not None
    )
    return next((found for found in given if found is not None), None)


def _products(signature: Signature, tensors: tuple[Tensor, ...], sink: Sink | None = None) -> tuple[Tensor, ...]:
    multiply = product if sink is None else partial(weighted, sink=sink)
    if len(signature.results) == 1:
        return (multiply(signature.operands, signature.results[0], tensors),)
    terms = terms_of(len(tensors), len(signature.results))
    results = [
        multiply(tuple(signature.operands[i] for i in term.operands), result, tuple(tensors[i] for i in term.operands))
        for term, result in reversed(list(zip(terms, signature.results, strict=True)))
    ]
    return tuple(reversed(results))  # autograd adds the cotangent of what came last first; the named op: of the first


@cache
def _parse(pattern: str) -> tuple[Signature, Contraction]:
    signature = parse_signature(pattern)
    operands, results = signature
    if len(operands) < len(results):
        problem = f"{len(results)} results for {len(operands)} operands: the last operands belong to one result each"
        raise PatternError(report(f"einsum({pattern!r})", [problem], "give at least one operand for each result"))
    terms = terms_of(len(operands), len(results))
    problems = []
    for term, result in zip(terms, results, strict=True):
        known = {axis for i in term.operands for axis in operands[i]}
        problems += [
            f"result {write_axes(result)!r} has axis {axis!r}{nearest(axis, known)}, which none of its operands has"
            for axis in result
            if axis not in known
        ]
    if problems:
        raise PatternError(
            report(f"einsum({pattern!r})", problems, "ft.broadcast gives a tensor an axis that it lacks")
        )
    if problems := [problem for term in terms for problem in _misspelt([operands[i] for i in term.operands], results)]:
        fix = (
            "write a contracted axis alike in both operands; an axis of one operand alone is summed by ft.reduce first"
        )
        raise PatternError(report(f"einsum({pattern!r})", problems, fix))
    typed = Contraction(tuple(map(Type, operands)), tuple(map(Type, results)), terms, ())  # type: ignore[arg-type]
    return signature, typed


def _misspelt(operands: list[Axes], results: tuple[Axes, ...]) -> list[str]:
    """The axes of one operand alone, which no result has, that another operand may have under another spelling."""
    kept = {axis for result in results for axis in result}
    problems = []
    for i, axes in enumerate(operands):
        others = {axis for j, other in enumerate(operands) if j != i for axis in other}
        for axis in axes:
            if axis not in kept and axis not in others and (hint := nearest(axis, others - set(axes), 0.8)):
                problems.append(f"only operand {i} {write_axes(axes)!r} has axis {axis!r}{hint}, and no result has it")
    return problems


@lru_cache(maxsize=2**14)  # shapes are part of the key: lengths may vary without end
def _fits(operands: tuple[Axes, ...], given: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]) -> bool:
    """Whether tensors of these shapes, dtypes and devices are what the pattern says: one set of them once."""
    sizes: dict[str, int] = {}
    return (
        len(operands) == len(given)
        and isinstance(given[0][1], torch.dtype)  # numpy's arrays have their own
        and given[0][1] != torch.bool
        and len({kind[1:] for kind in given}) == 1
        and all(len(axes) == len(shape) for axes, (shape, _, _) in zip(operands, given, strict=True))
        and all(
            sizes.setdefault(axis, n) == n
            for axes, (shape, _, _) in zip(operands, given, strict=True)
            for axis, n in zip(axes, shape, strict=True)
        )
    )


def _check(pattern: str, signature: Signature, tensors: tuple[Any, ...]) -> None:
    what, operands = f"einsum({pattern!r})", signature.operands
    if len(operands) != len(tensors):
        problem = f"the pattern has {len(operands)} operands, the call {len(tensors)} tensors"
        raise PatternError(report(what, [problem], "give one tensor for each operand, in order"))
    named = [
        Operand(f"operand {i} {write_axes(axes)!r}", x, axes, "number")
        for i, (axes, x) in enumerate(zip(operands, tensors, strict=True))
    ]
    check_operands(what, *named, alike=True)
