"""What states are made of: zeros beside each parameter, and counts of steps.

Invariant: the state of a tree of `Param` is a tree of `Param`, which says how each leaf of the state lies; of tensors,
of tensors with their dtype and device.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from functitan import tree
from functitan.errors import FunctitanError, report
from functitan.param import Param, zeros


def zeros_beside(params: tree.Tree) -> tree.Tree:
    """Zeros of each parameter's shape, dtype and device; declarations of them for declarations.

    >>> zeros_beside({"w": Param("embed mlp", (4, 8))})
    {'w': Param('embed mlp', (4, 8))}
    """
    return tree.map(_zeros, params)


def scalar_beside(params: tree.Tree, dtype: torch.dtype) -> Any:
    """One zero `[]`, placed like the parameters; its declaration for declarations.

    >>> scalar_beside({"w": torch.ones(2)}, torch.int64)
    tensor(0)
    """
    leaves = tree.leaves(params)
    if leaves and isinstance(leaves[0], Param):
        return Param("", (), zeros, dtype)
    return torch.zeros((), dtype=dtype, device=leaves[0].device if leaves else None)


def check_real(what: str, params: tree.Tree) -> None:
    """Raise `FunctitanError` that lists complex leaves: their squares, signs and orders are not those of numbers."""
    bad = [
        f"{path or 'the leaf'} is {str(leaf.dtype).removeprefix('torch.')}"
        for path, leaf in zip(tree.paths(params), tree.leaves(params), strict=True)
        if getattr(getattr(leaf, "dtype", None), "is_complex", False)
    ]
    if bad:
        fix = "keep such a leaf as real numbers (torch.view_as_complex of it in the loss), or train by ft.optim.sgd"
        raise FunctitanError(report(f"{what}: parameters that are complex", bad, fix))


def aligned(what: str, updates: tree.Tree, **others: tree.Tree) -> tuple[list[Tensor], ...]:
    """The leaves of trees of one structure. Raises `FunctitanError` that lists each leaf of another shape or dtype."""
    leaves, structure = tree.flatten(updates)
    found = [leaves]
    problems = []
    for name, other in others.items():
        its, its_structure = tree.flatten(other)
        found.append(its)
        if its_structure != structure:
            problems += tree.mismatches(updates, other, "updates", name)
            continue
        for i, (x, y) in enumerate(zip(leaves, its, strict=True)):
            if x.shape != y.shape or x.dtype != y.dtype:
                path = tree.paths(updates)[i] or "leaf"
                problems.append(f"{path}: updates {described(x)}, {name} {described(y)}")
    if problems:
        raise FunctitanError(report(what, problems, _FIX_ALIGN))
    return tuple(found)


def check_state(what: str, state: Any, kind: type) -> None:
    """Raise `FunctitanError` for the state of another transformation."""
    if not isinstance(state, kind):
        problem = f"the state is a {type(state).__name__}, not {kind.__name__}"
        raise FunctitanError(report(what, [problem], "give the state that tx.init(params) or tx.update made"))


def check_number(what: str, name: str, value: Any, low: float = 0.0, below: float = math.inf) -> None:
    """Raise `FunctitanError` unless a number lies in [low, below)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < below:
        raise FunctitanError(report(what, [f"{name} is {value!r}"], f"give a number in [{low:g}, {below:g})"))


def _zeros(leaf: Param | Tensor) -> Param | Tensor:
    if isinstance(leaf, Param):
        return replace(leaf, init=zeros)
    return torch.zeros_like(leaf, memory_format=torch.contiguous_format)


def described(x: Tensor) -> str:
    """Shape and dtype, for errors."""
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


_FIX_ALIGN = "give gradients of these parameters, in their dtypes, and the state that tx.init(params) made for them"
