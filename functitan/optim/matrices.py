"""Weights seen as matrices: which axes are inputs, which are outputs, and which count matrices.

Invariant: a weight of two axes maps its first to its second; of any other, a table by pattern must say. What is added
to, or scales, what a matrix gives is none, however many axes it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from functitan.axes import Axes, parse_axes, parse_signature, write_axes
from functitan.errors import FunctitanError, report
from functitan.nn.attention import MATRICES

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
        if len(axes) > 1 and (reason := no_matrix(path, axes, table)):
            problems.append(f"{path or 'leaf'} {write_axes(axes)!r} {reason}")
            continue
        matrix = table.get(axes) or (Matrix((), axes[:1], axes[1:]) if len(axes) == 2 else None)
        if matrix is None:
            problems.append(f"{path or 'leaf'} {write_axes(axes)!r} has {len(axes)} axes")
        else:
            found.append(matrix)
    if problems:
        raise FunctitanError(report(f"{what}: leaves that are no matrices", problems, _FIX))
    return found


def no_matrix(path: str, axes: Axes, table: Mapping[Axes, Matrix]) -> str:
    """Why a leaf of several axes is no matrix all the same, or the empty string: biases, and scales of norms, are none.

    Known by the leaf's name, which has the word "bias" or "scale", or by axes that are all on one side of a matrix of
    the table or of attention, as "heads head_dim" are.

    >>> no_matrix("attention.q_bias", ("heads", "head_dim"), {})
    "is a bias, by its name 'q_bias'"
    >>> no_matrix("offset", ("heads", "head_dim"), {})
    "has axes of one side alone of 'embed heads head_dim', embed -> heads head_dim"
    """
    if axes in table:  # said to be one
        return ""
    name = path.rpartition(".")[2]
    word = next((word for word in ("bias", "scale") if word in name.lower().split("_")), None)
    if word is not None:
        return f"is a {word}, by its name {name!r}"
    for own, its in {**table, **_ATTENTION}.items():
        if any(set(axes) <= set(side) for side in (its.inputs, its.outputs)):
            sides = f"{write_axes(its.inputs)} -> {write_axes(its.outputs)}"
            return f"has axes of one side alone of {write_axes(own)!r}, {sides}"
    return ""


_ATTENTION = parse_matrices("attention", MATRICES)
_FIX = (
    "give the leaves that are no matrices to another optimizer, by optim.multi_transform; say which axes of others are "
    "inputs and outputs: matrices={'heads head_dim embed': 'heads head_dim -> embed'} (ft.nn.attention.MATRICES)"
)
