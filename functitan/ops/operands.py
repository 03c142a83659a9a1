"""What named ops are given, checked: tensors of their pattern's rank, one size for each axis, the dtype they need.

Invariant: a check allocates and sends nothing, and one error lists every failure of a call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.axes import Axes, write_axes
from functitan.errors import PatternError, RulesError, report
from functitan.ops.function import has_derivative
from functitan.ops.remembered import check_layouts
from functitan.ops.types import layout_here
from functitan.sharding.context import current
from functitan.sharding.cut import MARK, refuse_shards
from functitan.sharding.env import Env
from functitan.sharding.layout import whole


class Operand(NamedTuple):
    """One tensor of a call: its name in errors, itself, its axes, and what it holds.

    That is "any", "number" (no bool), "inexact" (real or complex), "float", "int" or "int64".
    """

    name: str
    x: Any
    axes: Axes
    kind: str = "any"


def check_operands(what: str, *operands: Operand, alike: bool = False) -> None:
    """Raise `PatternError` for operands that are no tensors, or whose rank, dtype or sizes the call cannot have.

    Raises `LayoutError` for shards of `ft.shard`, `ft.init` and their like where there is no mesh; and, while ops are
    checked, for tensors that were made in another layout than their axes have here.
    With `alike` those that hold no integers share one device and, unless `ft.precision` casts them, one dtype. On a
    mesh sizes are compared as global ones.

    >>> import torch
    >>> check_operands("take", Operand("indices", torch.ones(2), ("batch", "seq"), "int"))
    Traceback (most recent call last):
    functitan.errors.PatternError: take:
      - pattern 'batch seq' names 2 axes, the tensor has 1: (2,)
      - indices: dtype float32, where integers are wanted
      Fix: name each dimension of the tensor once, in order; cast by x.long()
    """
    env = current()
    if env.mesh is not None and env.remembers:
        check_layouts(what, [(name, x, axes, None) for name, x, axes, _ in operands], env)
    if _fits(operands, alike, env):
        return
    if env.mesh is None:
        refuse_shards(what, [operand[:2] for operand in operands])
    found = [problem for operand in operands for problem in _alone(operand, len(operands) > 1)]
    tensors = [operand for operand in operands if isinstance(operand.x, Tensor) and not operand.x.is_nested]
    same = [operand for operand in tensors if operand.kind not in _INTEGERS]
    for of in (_dtype, _device) if alike else ():
        if len({_dtype_used(operand.x) if of is _dtype else of(operand.x) for operand in same}) > 1:
            kinds = ", ".join(f"{operand.name}: {of(operand.x)}" for operand in same)
            found.append((kinds, f"cast by x.to(...), so that all have one {of.__name__.strip('_')}"))
    found += _sizes_differ(tuple(operand for operand in tensors if operand.x.dim() == len(operand.axes)))
    if found:
        problems, fixes = zip(*found, strict=True)
        raise PatternError(report(what, problems, "; ".join(dict.fromkeys(fixes))))


def _fits(operands: tuple[Operand, ...], alike: bool, env: Env) -> bool:
    """The usual case, quickly: without a mesh, and nothing to complain about."""
    on_mesh = env.mesh is not None
    if on_mesh and len(operands) > 1:
        return False
    sizes: dict[str, int] = {}
    kinds = set()
    for _, x, axes, kind in operands:
        if (
            not isinstance(x, Tensor)
            or x.is_nested
            or x.layout != torch.strided
            or x.dim() != len(axes)
            or not _holds(x, kind)
        ):
            return False
        if not on_mesh and MARK in x.__dict__:
            return False
        if alike and kind not in _INTEGERS:
            kinds.add((_dtype_used(x), x.device))
        for axis, size in zip(axes, x.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                return False
    return not alike or len(kinds) == 1


def _alone(operand: Operand, several: bool) -> list[tuple[str, str]]:
    name, x, axes, kind = operand
    if not isinstance(x, Tensor):
        return [(f"{name}: a value of type {type(x).__name__!r} is no tensor", _FIX_TENSOR)]
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        return [(f"{name}: the tensor is {kind}, and named ops take dense ones", _FIX_DENSE)]
    found = []
    if x.dim() != len(axes):
        text = f"pattern {write_axes(axes)!r} names {len(axes)} axes, the tensor has {x.dim()}: {tuple(x.shape)}"
        found.append((f"{name}: {text}" if several else text, _FIX_RANK))
    if not _holds(x, kind):
        found.append((f"{name}: dtype {_dtype(x)}, where {_KINDS[kind][0]} are wanted", _KINDS[kind][1]))
    return found


def _holds(x: Tensor, kind: str) -> bool:
    if kind == "inexact":
        return has_derivative(x)
    if kind in ("any", "number"):
        return kind == "any" or x.dtype != torch.bool
    return x.is_floating_point() if kind == "float" else x.dtype in _INTEGERS[kind]


def _sizes_differ(operands: tuple[Operand, ...]) -> list[tuple[str, str]]:
    env = current()
    first: dict[str, tuple[int, str]] = {}
    found = []
    for name, x, axes, _ in operands:
        try:
            layout = whole(axes) if env.mesh is None else layout_here(axes, x, env)
        except RulesError:
            return []  # the op itself lists every axis without a rule
        for axis, local in zip(axes, x.shape, strict=True):
            dims = layout.of(axis)
            size = local * env.mesh.sizes.size(dims) if env.mesh is not None else local
            shown = f"{size} (shards of {local} over {'·'.join(dims)})" if dims else f"{size}"
            was, where = first.setdefault(axis, (size, f"{shown} in {name}"))
            if was != size:
                found.append(
                    (f"axis {axis!r} is {shown} in {name}, but {where}", _FIX_SHARDS if env.mesh else _FIX_SIZES)
                )
    return found


def _dtype_used(x: Tensor) -> torch.dtype:
    """The dtype that the op will see."""
    precision = current().precision
    return precision.compute if precision is not None and x.is_floating_point() else x.dtype


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _device(x: Tensor) -> str:
    return str(x.device)


_FIX_DENSE = "give x.to_dense(), or a padded tensor"
_FIX_TENSOR = "give tensors: torch.as_tensor(x)"
_FIX_RANK = "name each dimension of the tensor once, in order"
_KINDS = {  # what is wanted, and the fix
    "number": ("numbers", "cast by x.float()"),
    "inexact": ("floating-point numbers", "cast by x.float()"),
    "float": ("floating-point numbers", "cast by x.float()"),
    "int": ("integers", "cast by x.long()"),
    "int64": ("64-bit integers", "cast by x.long()"),
}
_INTEGERS = {"int": (torch.int64, torch.int32), "int64": (torch.int64,)}
_FIX_SIZES = "give each axis one size, in every operand"
_FIX_SHARDS = "give each axis one global size; tensors are local shards, as ft.shard and ft.init make them"
