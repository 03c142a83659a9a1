"""Which lines of a stack are the user's, and not a library's.

Invariant: a line counts as the user's unless functitan, torch, or a notebook's own machinery has the file.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib.util import find_spec

_HERE = os.path.dirname(__file__)
_TORCH = find_spec("torch")  # which imports nothing: a planner without tensors needs no torch
_LIBRARIES = tuple(os.path.join(path, "") for path in (_HERE, *((_TORCH and _TORCH.submodule_search_locations) or ())))


def is_users(file: str) -> bool:
    """True for the file of a user's program, also a notebook's cell; false for a library's, or generated code.

    >>> is_users("/home/me/train.py"), is_users(__file__), is_users("<string>")
    (True, False, False)
    """
    return not file.startswith((*_LIBRARIES, "<"))


def in_notebook(error: BaseException) -> list[str]:
    """The lines that a notebook shows of an error: the user's own calls, then the error's text.

    IPython asks an error for them by the method `_render_traceback_`.
    """
    shell = tuple(os.path.dirname(m.__file__ or "?") for name in _SHELLS if (m := sys.modules.get(name)) is not None)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(shell)]
    own = [frame for frame in frames if is_users(frame.filename)]
    left_out = f"({len(frames) - len(own)} lines inside libraries are left out: %tb shows the user's; a script, all)"
    calls = [line.rstrip("\n") for line in traceback.format_list(own)]
    text = "".join(traceback.format_exception_only(error)).rstrip("\n")
    return ["Traceback (most recent call last):", *calls, *([left_out] if len(frames) > len(own) else []), text]


_SHELLS = ("IPython", "ipykernel")
