"""The kinds of error functitan raises, and the one way they are written.

Invariant: an error lists every failure of a call at once, then what would work; it is raised before anything is
allocated or sent.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from functitan.lines import in_notebook


class FunctitanError(ValueError):
    """A user's mistake; every error kind below is one, and so is a plain `ValueError` to who catches it."""

    _render_traceback_ = in_notebook


class PatternError(FunctitanError):
    """A pattern that cannot be read, or that does not describe the tensors it came with."""


class RulesError(FunctitanError):
    """A rules table that does not answer a name, or names what no mesh can have."""


class LayoutError(FunctitanError):
    """A size that its mesh dims do not divide, or tensors whose layouts cannot meet."""


class MeshError(FunctitanError):
    """A mesh that cannot be made, or an operation that this mesh cannot carry."""


class ScheduleError(FunctitanError):
    """A pipeline schedule that can't run, or that can't be made; or a model that can't be cut so."""


class DonatedError(FunctitanError):
    """A value used after it was donated to a step."""


class ReplicationError(FunctitanError):
    """A value that passes as equal on several ranks, and is not: an op lacks its name."""


class NonFiniteError(FunctitanError, FloatingPointError):
    """NaN or infinity in the loss or the gradients of a step; the state is as before the step."""


class CaptureError(FunctitanError):
    """A function that cannot be captured as a graph, or not with the meaning it has."""


class CheckpointError(FunctitanError):
    """A checkpoint that cannot be written, is not whole, or is not of this state."""


class CollectiveError(RuntimeError):
    """A collective that another rank did not join: it failed, left, or ran a different program."""

    _render_traceback_ = in_notebook


class PeerCheckpointError(CheckpointError, CollectiveError):
    """A checkpoint that another rank failed to write or to read; that rank's own error says why."""


def report(what: str, problems: Iterable[str], fix: str = "") -> str:
    """One error text: what was called, every problem on a line of its own, then the fix.

    >>> print(report("einsum('a -> b')", ["axis 'b' is in no operand"], "drop it"))
    einsum('a -> b'):
      - axis 'b' is in no operand
      Fix: drop it
    """
    lines = [f"{_clipped(what)}:", *(f"  - {_clipped(problem)}" for problem in problems)]
    return "\n".join(lines + ([f"  Fix: {fix}"] if fix else []))


def _clipped(text: str) -> str:
    """`text`, of which a reader can take in the beginning if it is very long: a pattern of a thousand names, say."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


_LONGEST = 2000


def check_function(fn: object, what: str) -> None:
    """Raise `FunctitanError` if a wrapper of functions is given something else."""
    if not callable(fn):
        problem = f"it wraps a function, not a value of type {type(fn).__name__!r}"
        raise FunctitanError(report(what, [problem], f"write {what}(fn, ...), and call what it returns"))


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """` (did you mean 'x'?)` where a known name is close, else the empty string; `cutoff` 1 is the same name.

    >>> nearest("fdsp", ["dp", "fsdp"])
    " (did you mean 'fsdp'?)"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]!r}?)" if close else ""
