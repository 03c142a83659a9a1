"""What a rank is about to do, in words: one text for errors, and for checks that all ranks do the same.

Invariant: ranks of one program have equal texts, on every machine: a text holds nothing of one rank's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from functitan.axes import write_axes
from functitan.errors import report
from functitan.lines import is_users
from functitan.sharding.around import Around
from functitan.sharding.message import Message


def user_line() -> str:
    """The caller's line outside functitan and torch, as "folder/file.py:12"; empty if there is none on this thread."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if is_users(file):  # two parts of the path: machines may keep a program in different places
            return f"{os.sep.join(file.split(os.sep)[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class Checks(NamedTuple):
    """That ranks compare what they are about to do, and the user's line from which the op at work was called."""

    line: str = ""


def checks(line: str = "") -> Around:
    """The hooks that let ranks agree on each message before it is sent: see `ft.checked`."""

    def agree(message: Message, x: Any, env: Any, start: Callable[..., Any]) -> Any:
        if message.collective in ("send", "receive"):  # a stage sends, and another awaits: of two texts
            does = "sends" if message.collective == "send" else "awaits"
            env.pipeline.transport.agree(f"{does} {message}")
        else:
            text = f"runs {message.detailed} in {message.phase}"
            env.mesh.transport.agree(f"{text} at {line}" if line else text)
        return start(message, x)

    def tell_shapes(call: Any, tensors: tuple[Tensor, ...], run: Callable[..., Any]) -> Any:
        """Let ranks hold the shapes of the op's operands against each other, too.

        What is sent may have one shape where shards have several: a sum, of two rows here and of four there.
        """
        typed = getattr(call.static, "typed", None)
        if typed is None:
            return run(call, tensors)
        each = zip(typed.operands, tensors, strict=True)
        shapes = " and ".join(f"{write_axes(own.axes)!r} {list(x.shape)}" for own, x in each)
        env = call.env.without(Checks).inside(checks(with_shards(line, shapes)))
        return run(replace(call, env=env), tensors)

    called = lambda: checks(user_line())
    return Around(Checks(line), message=agree, op=tell_shapes, called=called, remembers=True)


def disagree(programs: Mapping[int, str]) -> str:
    """The error of ranks that part ways: what each of them does."""
    short = {rank: shorter(program) for rank, program in programs.items()}
    shown = short if len(set(short.values())) > 1 else programs  # shapes of shards, where nothing else differs
    lines = [f"rank {rank} {program}" for rank, program in sorted(shown.items())]
    return report("ranks of one group run different programs", lines, FIX)


def waited(rank: int, program: str, why: list[str]) -> str:
    """The error of a rank that others did not join."""
    return report(f"rank {rank} waited in {shorter(program)}", why, FIX)


def with_shards(line: str, shards: str) -> str:
    """A line of a program that tells the shards of an op's operands, too."""
    return f"{shorter(line) or 'an unknown line'}{_SHARDS}{shards}"


def shorter(program: str) -> str:
    """A program without the shards that its op was given.

    >>> shorter(with_shards("case.py:5", "'batch' [2]"))
    'case.py:5'
    """
    return program.partition(_SHARDS)[0]


_SHARDS = ", of shards "
FIX = "every rank runs the same ops in the same order"
