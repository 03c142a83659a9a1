"""What a manager finds in its directory: which checkpoints are its own, and in what order they were written.

Invariant: a checkpoint is a manager's by its name and by the mark inside. What lacks one of them is never removed.
"""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from typing import NamedTuple

from functitan.checkpoint.files import CHECKSUMS, HIDDEN, Place, is_complete, read, sealed, unsealed

MARK = "manager.json"
DAMAGED = -2


class Saved(NamedTuple):
    """A complete checkpoint. `order` counts the saves into the directory; -1: it has no mark; -2: that is damaged."""

    name: str
    step: int
    order: int = -1
    session: str = ""  # of the manager that wrote it
    by: str = ""

    @property
    def own(self) -> bool:
        """True if a manager wrote it."""
        return self.order >= 0


def mark_of(saved: Saved) -> dict[str, bytes]:
    """The file inside a checkpoint that marks it."""
    return {MARK: sealed([saved.order, saved.session, saved.by])}


def found(place: Place) -> list[Saved]:
    """The complete checkpoints that have a manager's names, in the order they were written; first those without a mark.

    Another tool's "step_100" has no such name: steps have eight digits, or more where they need them.
    """
    names = [(name, step) for name in _names(place) if (step := _step_of(name)) is not None]
    every = [Saved(name, step, *_mark(place.child(name))) for name, step in names]
    return sorted((one for one in every if is_complete(place.child(one.name))), key=lambda one: (one.order, one.step))


def free_name(place: Place, step: int) -> str:
    """A name for a checkpoint of this step that nothing has yet: one that is replaced stays until the new one is whole.

    >>> from functitan.checkpoint.files import locate
    >>> free_name(locate("memory://nothing"), 120)
    'step_00000120'
    """
    there, name, number = _names(place), f"step_{step:08d}", 2
    while name in there or any(one.startswith(f".{name}{HIDDEN}") for one in there):
        name, number = f"step_{step:08d}-{number}", number + 1
    return name


def overtaken(saved: list[Saved]) -> list[Saved]:
    """The checkpoints of a history that was left: the run went back, and wrote one of an earlier step, or the same.

    >>> [one.name for one in overtaken([Saved("a", 2, 0), Saved("b", 4, 1), Saved("c", 6, 2), Saved("d", 4, 3)])]
    ['c', 'b']
    """
    low, left = math.inf, []
    for one in reversed(saved):
        if one.step >= low:
            left.append(one)
        low = min(low, one.step)
    return left


def removable(saved: list[Saved], keep_last: int | None, keep_every: int | None) -> list[Saved]:
    """What a manager need not keep any more, now that the last of `saved` is whole.

    That is what the run has left behind and met again or passed; and with `keep_last` all but so many, first what the
    run left behind, then the oldest, without those whose step is a multiple of `keep_every`.
    """
    own = [one for one in saved if one.own]
    left = overtaken(own)
    gone = [one for one in left if one.step <= own[-1].step]
    ranked = sorted((one for one in own if one not in gone), key=lambda one: one not in left)
    old = ranked[: max(0, len(ranked) - keep_last)] if keep_last is not None else []
    return gone + [one for one in old if keep_every is None or one.step % keep_every]


def leftovers(place: Place) -> list[str]:
    """The names of what killed runs have left of checkpoints that a manager wrote, or removed.

    Hidden directories of its names that hold a checkpoint's files alone; and where nothing is hidden, marked ones.
    """
    names = []
    for name in _names(place):
        hidden = re.fullmatch(rf"\.(.*){re.escape(HIDDEN)}(\..*)?", name)
        if _step_of(hidden[1] if hidden else name) is None:
            continue
        inside = _names(place.child(name))
        if all(map(_FILES.fullmatch, inside)) if hidden else MARK in inside and CHECKSUMS not in inside:
            names.append(name)
    return names


def _names(place: Place) -> list[str]:
    with suppress(FileNotFoundError, NotADirectoryError):
        place.fs.invalidate_cache()
        return sorted(os.path.basename(path.rstrip("/")) for path in place.fs.ls(place.path, detail=False))
    return []


def _step_of(name: str) -> int | None:
    match = re.fullmatch(r"step_(\d{8}|[1-9]\d{8,})(-\d+)?", name, re.ASCII)
    return None if match is None else int(match[1])


def _mark(place: Place) -> tuple:
    with suppress(FileNotFoundError, NotADirectoryError):
        match unsealed(read(place, MARK)):
            case [int(order), str(session), str(by)] if order >= 0:
                return order, session, by
        return (DAMAGED,)
    return ()


_FILES = re.compile(rf"__writing|__\d+_0\.distcp|__\d+\.json|\.metadata|{CHECKSUMS}|{MARK}|\..+\.new")
