"""Patterns: strings that name the axes of tensors, read once and cached.

Invariant: an `Axes` holds distinct names, in the order of the tensor's dimensions. A pattern is the type of a tensor;
nothing else about a tensor's layout is stored anywhere.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from functitan.errors import PatternError, report

Axes = tuple[str, ...]
MOST_CHARACTERS = 10_000
MOST_AXES = 64  # of one tensor: torch's own kernels have no more


class Signature(NamedTuple):
    """`"a b, b c -> a c"`: the axes of each operand and of each result."""

    operands: tuple[Axes, ...]
    results: tuple[Axes, ...]


@cache
def parse_axes(pattern: str) -> Axes:
    """The axes of one tensor.

    >>> parse_axes("batch seq embed")
    ('batch', 'seq', 'embed')
    >>> parse_axes("")
    ()
    """
    check_pattern(pattern)
    problems = _problems(pattern, tuple(pattern.split()))
    if problems:
        raise PatternError(report(f"pattern {pattern!r}", problems, _FIX))
    return tuple(pattern.split())


@cache
def parse_signature(pattern: str) -> Signature:
    """The axes of operands (before `->`) and results (after it), each list separated by commas.

    >>> parse_signature("b s, s e -> b e")
    Signature(operands=(('b', 's'), ('s', 'e')), results=(('b', 'e'),))
    """
    check_pattern(pattern)
    sides = pattern.split("->")
    if len(sides) != 2:
        raise PatternError(report(f"pattern {pattern!r}", [_ARROWS.format(len(sides) - 1)], _FIX_ARROW))
    tensors = [[tuple(axes.split()) for axes in side.split(",")] for side in sides]
    problems = [problem for side in tensors for axes in side for problem in _problems(" ".join(axes), axes)]
    if problems:
        raise PatternError(report(f"pattern {pattern!r}", problems, _FIX))
    return Signature(tuple(tensors[0]), tuple(tensors[1]))


@cache
def parse_operands(pattern: str) -> tuple[Axes, ...]:
    """The axes of each operand of an op whose result needs no pattern, separated by commas.

    >>> parse_operands("batch embed, embed")
    (('batch', 'embed'), ('embed',))
    """
    check_pattern(pattern)
    if "->" in pattern:
        raise PatternError(report(f"pattern {pattern!r}", [_NO_ARROW], "write the operands alone, 'operand, operand'"))
    operands = [tuple(axes.split()) for axes in pattern.split(",")]
    problems = [problem for axes in operands for problem in _problems(" ".join(axes), axes)]
    if problems:
        raise PatternError(report(f"pattern {pattern!r}", problems, _FIX))
    return tuple(operands)


def check_pattern(pattern: object, op: str = "ft.einsum") -> None:
    """Raise `PatternError` for what is no string, such as a tensor that stands before its pattern, or is too long.

    The fix shows the order of arguments of `op`.
    """
    if not isinstance(pattern, str):
        what = f"a value of type {type(pattern).__name__!r}"  # not its repr: it may be a big tensor
        raise PatternError(report(f"pattern that is {what}", ["a pattern is a string"], _FIX_STRING[op]))
    if len(pattern) > MOST_CHARACTERS:
        problem = f"it has {len(pattern)} characters, and a pattern at most {MOST_CHARACTERS}"
        raise PatternError(report(f"pattern {pattern[:40]!r}...", [problem], _FIX))


def write_axes(axes: Axes) -> str:
    """The pattern of `axes`: the inverse of `parse_axes`."""
    return " ".join(axes)


def write_signature(signature: Signature) -> str:
    """The pattern of a signature: the inverse of `parse_signature`.

    >>> write_signature(parse_signature("b s,s e->b e"))
    'b s, s e -> b e'
    """
    return " -> ".join(", ".join(map(write_axes, side)) for side in signature)


def _problems(pattern: str, axes: Axes) -> list[str]:
    if len(axes) > MOST_AXES:
        return [f"{pattern[:40]!r}... has {len(axes)} names, and a tensor at most {MOST_AXES} dimensions"]
    repeated = sorted({name for name in axes if axes.count(name) > 1})
    return [_NAME.format(name, pattern) for name in axes if not name.isidentifier() or name.startswith("_")] + [
        _REPEATED.format(name, pattern) for name in repeated
    ]


_NAME = "{0!r} in {1!r} is not an axis name: letters, digits and '_', beginning with a letter"
_REPEATED = "axis {0!r} stands twice in {1!r}: each axis of a tensor has a name of its own"
_ARROWS = "a pattern of an operation has one '->', this has {0}"
_NO_ARROW = "it has '->', but the pattern of this result follows from the operands"
_FIX = "name each axis once, with spaces between, as in 'batch seq embed'"
_FIX_ARROW = "write 'operand, operand -> result', as in 'batch embed, embed mlp -> batch mlp'"
_FIX_STRING = {
    op: f"write 'batch seq embed'; in ops it comes first, as in {op}({example})"
    for op, example in {
        "ft.einsum": "'a b, b c -> a c', x, w",
        "ft.rearrange": "'batch (heads head_dim) -> batch heads head_dim', x, heads=8",
        "ft.linear_cross_entropy": "'batch embed, vocab embed, batch', x, w, labels",
    }.items()
}
