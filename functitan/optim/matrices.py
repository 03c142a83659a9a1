"""Weights seen as matrices: which axes are inputs, which are outputs, and which count matrices.

Invariant: a weight of two axes maps its first to its second; of any other, a table by pattern must say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from functitan.axes import Axes, parse_axes, parse_signature, write_axes
from functitan.errors import FunctitanError, report

Matrices = Mapping[str, str]  # pattern -> "inputs -> outputs"


class Matrix(NamedTuple):
    """Which axes of a weight are inputs (columns) and outputs (rows); there is a matrix for each place along `rest`."""

    rest: Axes
    inputs: Axes
    outputs: Axes


def parse_matrices(what: str, matrices: Matrices) -> dict[Axes, Matrix]:
    """The table by axes. Raises `FunctitanError` that lists every entry that does not fit its pattern.

    >>> parse_matrices("muon", {"experts embed mlp": "embed -> mlp"})
    {('experts', 'embed', 'mlp'): Matrix(rest=('experts',), inputs=('embed',), outputs=('mlp',))}
    """
    table, problems = {}, []
    for pattern, text in matrices.items():
        axes, (operands, results) = parse_axes(pattern), parse_signature(text)
        inputs, outputs = operands[0], results[0]
        named = [axis for side in (*operands, *results) for axis in side]
        if len(operands) + len(results) > 2 or not inputs or not outputs:
            problems.append(f"{pattern!r}: {text!r} is not 'inputs -> outputs'")
        problems += [
            f"{pattern!r}: axis {axis!r} of {text!r} {'is not in the pattern' if axis not in axes else 'stands twice'}"
            for axis in dict.fromkeys(named)
            if axis not in axes or named.count(axis) > 1
        ]
        table[axes] = Matrix(tuple(axis for axis in axes if axis not in named), inputs, outputs)
    if problems:
        raise FunctitanError(
            report(f"{what}: matrices", problems, "write as in {'heads head_dim embed': 'heads head_dim -> embed'}")
        )
    return table


def as_matrices(what: str, table: dict[Axes, Matrix], leaves: Iterable[tuple[str, Axes]]) -> list[Matrix]:
    """How each leaf, a path and axes, is a matrix. Raises `FunctitanError` that lists every leaf that is none."""
    found, problems = [], []
    for path, axes in leaves:
        matrix = table.get(axes) or (Matrix((), axes[:1], axes[1:]) if len(axes) == 2 else None)
        if matrix is None:
            problems.append(f"{path or 'leaf'} {write_axes(axes)!r} has {len(axes)} axes")
        else:
            found.append(matrix)
    if problems:
        raise FunctitanError(report(f"{what}: leaves that are no matrices", problems, _FIX))
    return found


_FIX = (
    "give the leaves that are no matrices to another optimizer, by optim.multi_transform; say which axes of others are "
    "inputs and outputs: matrices={'heads head_dim embed': 'heads head_dim -> embed'} (ft.nn.attention.MATRICES)"
)
