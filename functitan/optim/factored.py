"""Second moments as the outer product of row and column means.

Invariant: row and column means are reductions over named axes, and their declarations carry patterns of their own: with
an axis less, the others may lie otherwise than the leaf's do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan import tree
from functitan.axes import Axes, write_axes
from functitan.errors import FunctitanError, report
from functitan.ops.reduce import broadcast, reduce
from functitan.optim.kernels import owned, refuse_donation, transformed
from functitan.optim.numbers import telling
from functitan.optim.patterns import Leaf, leaves_of, named_axes
from functitan.optim.state import check_real, check_state, described, scalar_beside
from functitan.optim.transform import GradientTransformation, donating
from functitan.param import Param, zeros
from functitan.sharding.context import current, using


class FactoredState(NamedTuple):
    """`count` `[]` int64, the steps taken. `row` and `column`: of leaves of two or more axes the mean squares over the

    last axis and over the last but one; `nu`: of the other leaves the mean square of each element.
    """

    count: Any
    row: tree.Tree
    column: tree.Tree
    nu: tree.Tree


def scale_by_factored_rms(beta2_decay: float = -0.8, eps: float | None = None) -> GradientTransformation:
    """From gradients to `g / sqrt(max(row ⊗ column / mean(row), eps²))`; leaves of fewer than two axes keep `nu`.

    The means decay by `1 - t^beta2_decay` and have the parameters' dtypes. `eps` of `None` is the dtype's own. On a
    mesh each mean is a reduction over the mesh dims of its axis, and the state is made from declarations:
    `ft.init(tx.init(declarations), key, mesh=mesh, rules=rules)`, as `ft.TrainState.create` does.
    """
    problems = [f"beta2_decay is {beta2_decay}: it must be negative"] if beta2_decay >= 0 else []
    problems += [f"eps is {eps}: it must not be negative"] if eps is not None and eps < 0 else []
    if problems:
        raise FunctitanError(report("scale_by_factored_rms", problems, "usual are beta2_decay=-0.8, eps=None"))

    def init(params: tree.Tree) -> FactoredState:
        check_real("scale_by_factored_rms", params)
        leaves, structure = tree.flatten(params)
        made = [[_zeros(x, axes) for axes in _statistics(named_axes(x))] for x in leaves]
        parts = (tree.unflatten(structure, [statistics[k] for statistics in made]) for k in range(3))
        return FactoredState(scalar_beside(params, torch.int64), *parts)

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        check_state("scale_by_factored_rms", state, FactoredState)
        env = current()._replace(phase="update")
        known = leaves_of("scale_by_factored_rms", updates, patterns, env)
        leaves, structure = tree.flatten(updates)
        of_leaves = _aligned(known, leaves, state)
        pure = transformed(leaves, *(its.values() for its in of_leaves))
        if pure:
            refuse_donation(donate)
        else:
            of_leaves = [dict(zip(its, owned(list(its.values()), donate), strict=True)) for its in of_leaves]
            leaves = owned(leaves, donate)
        count = state.count + 1
        weight = count.to(torch.float64) ** beta2_decay
        directions, mine = [], []
        for leaf, g, its in zip(known, leaves, of_leaves, strict=True):
            floor = torch.finfo(g.dtype).eps if eps is None else eps
            with using(leaf.env):
                estimate, its = _moved(leaf, g.square(), weight.to(g.dtype), floor, pure, **its)
            mine.append(its)
            if pure:
                directions.append(g * estimate.clamp(min=floor * floor).rsqrt())
            else:
                directions.append(g.mul_(estimate.clamp_(min=floor * floor).rsqrt_()))
        parts = (tree.unflatten(structure, [its.get(name) for its in mine]) for name in _PARTS)
        return tree.unflatten(structure, directions), FactoredState(count, *parts)

    made = GradientTransformation(init, update)
    return telling(made) if eps is None or eps > 0 else made  # without eps a gradient of 0 is divided by 0


def _moved(
    leaf: Leaf,
    square: Tensor,
    weight: Tensor,
    eps: float,
    pure: bool,
    row: Tensor | None = None,
    column: Tensor | None = None,
    nu: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The estimate of `square` that a leaf's statistics give once moved towards it, a tensor of its own; and these.

    They are written in place unless `pure`.
    """
    lerp = torch.lerp if pure else Tensor.lerp_
    if row is None or column is None:
        assert nu is not None
        nu = lerp(nu, square, weight)
        return nu.clone(), {"nu": nu}
    whole, rows, columns = leaf.pattern, *(write_axes(axes) for axes in _statistics(leaf.axes)[:2] if axes is not None)
    rest = write_axes(leaf.axes[:-2])
    row = lerp(row, reduce(f"{whole} -> {rows}", square, op="mean"), weight)
    column = lerp(column, reduce(f"{whole} -> {columns}", square, op="mean"), weight)
    mean = reduce(f"{rows} -> {rest}", row, op="mean").clamp(min=eps)
    scaled = row / broadcast(f"{rest} -> {rows}", mean)
    estimate = broadcast(f"{rows} -> {whole}", scaled) * broadcast(f"{columns} -> {whole}", column)
    return estimate, {"row": row, "column": column}


def _statistics(axes: Axes) -> tuple[Axes | None, Axes | None, Axes | None]:
    """The axes of a leaf's row, column and nu; `None` is what it does not have."""
    return (None, None, axes) if len(axes) < 2 else (axes[:-1], (*axes[:-2], axes[-1]), None)


def _zeros(x: Param | Tensor, axes: Axes | None) -> Param | Tensor | None:
    """Zeros with some of the axes of `x`; their declaration for a declaration."""
    if axes is None:
        return None
    sizes = dict(zip(named_axes(x), x.shape, strict=True))
    shape = tuple(sizes[axis] for axis in axes)
    return replace(x, pattern=write_axes(axes), shape=shape, init=zeros) if isinstance(x, Param) else x.new_zeros(shape)


def _aligned(known: list[Leaf], leaves: list[Tensor], state: FactoredState) -> list[dict[str, Tensor]]:
    """Each leaf's statistics by name. Raises `FunctitanError` that lists each of another shape than its layout's."""
    found: list[dict[str, Tensor]] = [{} for _ in leaves]
    problems = []
    for k, name in enumerate(_PARTS):
        its = tree.leaves(getattr(state, name))
        wanted = [(i, axes) for i, leaf in enumerate(known) if (axes := _statistics(leaf.axes)[k]) is not None]
        if len(its) != len(wanted):
            problems.append(f"{name} has {len(its)} leaves, of the updates {len(wanted)} have one")
            continue
        for (i, axes), x in zip(wanted, its, strict=True):
            shape = known[i].shape_of(axes, tuple(leaves[i].shape))
            if tuple(x.shape) != shape or x.dtype != leaves[i].dtype:
                lies = f"{described(x)}, not {shape} in the dtype of the updates"
                problems.append(f"{known[i].path}: {name} {write_axes(axes)!r} is {lies}")
            found[i][name] = x
    if problems:
        raise FunctitanError(report("scale_by_factored_rms: the state", problems, _FIX_STATE))
    return found


_PARTS = ("row", "column", "nu")
_FIX_STATE = (
    "make it from declarations, which know how it lies: ft.init(tx.init(declarations), key, mesh=mesh, rules=rules), "
    "as ft.TrainState.create does"
)
