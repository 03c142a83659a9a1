"""What files say, read as plain values: JSON, and the names of other files.

Invariant: what a file says is never run, and names no file outside its own directory; what can't be read is a
`ValueError`, whatever its bytes are.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from functitan.errors import FunctitanError, report


def parsed_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises `ValueError` for any other bytes, also for nesting without end.

    >>> parsed_json(b'{"a": [1]}')
    {'a': [1]}
    """
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8: byte {error.start} is {data[error.start]:#x}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("it is no JSON that can be read: it nests too deep") from error


def name_problem(name: object) -> str | None:
    """Why a name that a file gives is not that of a file beside it; `None` for a plain name.

    >>> name_problem("model.safetensors"), name_problem("../x")
    (None, "'../x' is no plain name of a file in the same directory")
    """
    if isinstance(name, str) and name not in (".", "..") and _PLAIN.fullmatch(name):
        return None
    said = repr(name[:80]) if isinstance(name, str) else f"a {type(name).__name__}"
    return f"{said} is no plain name of a file in the same directory"


def path_text(what: str, path: object) -> str:
    """A path or URL that a user gives, as text. Raises `FunctitanError` for a value that names no file."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if isinstance(text, str) and text and "\0" not in text:
        return text
    said = f"{path!r}" if path is None or isinstance(path, (str, bytes, int, float)) else f"a {type(path).__name__}"
    raise FunctitanError(report(what, [f"{said} is no path"], "give that of a file or a directory, as 'runs/first'"))


_PLAIN = re.compile(r"(?!~)[^/\\:\x00-\x1f\x7f]{1,255}")  # a colon begins the rest of a URL, or a drive's path
