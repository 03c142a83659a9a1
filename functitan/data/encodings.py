"""Encodings: text to tokens, by bytes or by tiktoken's ranks.

Invariant: a file of ranks has each rank from 0 on once. Its end of text is the token that was published with a file of
its size, or the one that the caller names: for a file as large as published ones it is not guessed.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any, NamedTuple

from tiktoken import Encoding, get_encoding, list_encoding_names

from functitan.errors import FunctitanError, nearest, report
from functitan.reading import path_text

END_OF_TEXT = "<|endoftext|>"


class FileEncoding(Encoding):
    """An encoding whose end of text may have any name: Llama 3 calls it <|end_of_text|>."""

    def __init__(self, name: str, *, end_of_text: int, **parts: Any) -> None:
        super().__init__(name, **parts)
        self._end_of_text = end_of_text

    @property
    def eot_token(self) -> int:
        """The token that ends a document."""
        return self._end_of_text

    def __getstate__(self) -> object:
        return {**super().__getstate__(), "end_of_text": self._end_of_text}  # type: ignore[dict-item]


def byte_encoding() -> Encoding:
    """The encoding of UTF-8 bytes: token i < 256 is the byte i, 256 is the end of text. Needs no file.

    >>> byte_encoding().encode("hé"), byte_encoding().n_vocab
    ([104, 195, 169], 257)
    """
    ranks = {bytes([i]): i for i in range(256)}  # the pattern only cuts the work into small pieces
    return Encoding("bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})


def encoding(
    name_or_path: str | os.PathLike,
    *,
    pattern: str | None = None,
    end_of_text: int | None = None,
    special_tokens: dict[str, int] | None = None,
) -> Encoding:
    """A tiktoken encoding.

    Arguments: `name_or_path`, "bytes", a name that tiktoken knows (it downloads the ranks at first use), or a file of
    ranks, such as Llama 3's; the others are for a file only: `pattern`, the regular expression that cuts text before
    merging, `end_of_text`, the token that ends a document, and `special_tokens`, the names and numbers of all that are
    not text. By default they are those published with the file that has as many ranks: r50k, p50k, cl100k, o200k, or
    Llama 3 (128000 ranks: 256 special tokens, the end of text is 128001). A smaller file is your own: its pattern is
    GPT-4's, its end of text the token after the last rank; a larger one that is unknown needs `end_of_text`.
    Raises FunctitanError for an unknown name, and for a file that can't be read as ranks of all bytes, by its lines.

    >>> encoding("bytes").n_vocab
    257
    """
    name, known = path_text("encoding", name_or_path), ["bytes", *list_encoding_names()]
    given = [end_of_text, special_tokens, pattern]
    what = f"encoding({name!r})"
    if name in known:
        if any(it is not None for it in given):
            fix = "give them for a file of ranks only"
            raise FunctitanError(report(what, ["a name has its own pattern, special tokens and end of text"], fix))
        return byte_encoding() if name == "bytes" else _named(what, name)
    numbers = special_tokens.values() if isinstance(special_tokens, dict) else ()
    ranks = _read(what, name, known, {number for number in numbers if type(number) is int})
    published = _PUBLISHED.get(len(ranks))
    if published is None and len(ranks) >= min(_PUBLISHED) and end_of_text is None and special_tokens is None:
        problem = f"nothing is published of a file with {len(ranks)} ranks: which token ends a document is not known"
        raise FunctitanError(report(what, [problem], "say it: end_of_text=, or special_tokens={name: number}"))
    published = published or _Published(_GPT4_PATTERN, {END_OF_TEXT: max(ranks.values()) + 1})
    special = published.special_tokens if special_tokens is None else special_tokens
    if special_tokens is None and end_of_text is not None and end_of_text not in special.values():
        special = {END_OF_TEXT: end_of_text}
    end, problems = _end(special, end_of_text), _problems(ranks, special, end_of_text, pattern)
    if end is None and not problems:
        problems.append(f"special_tokens has neither {END_OF_TEXT} nor {_LLAMA_END}: which token ends a document?")
    if problems or end is None:
        raise FunctitanError(report(what, problems, "give numbers that no rank has: end_of_text=, special_tokens="))
    pattern = published.pattern if pattern is None else pattern
    try:
        parts = dict(pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(special))
        return FileEncoding(Path(name).stem, end_of_text=end, **parts)
    except ValueError as error:  # of its regular expressions
        raise FunctitanError(report(what, [f"pattern {pattern!r}: {error}"], "give another pattern=")) from error


def has_end_of_text(encoding: Encoding) -> bool:
    """True if there is a token to put between documents."""
    return isinstance(encoding, FileEncoding) or END_OF_TEXT in encoding.special_tokens_set


class _Published(NamedTuple):
    """What was published with a file of ranks."""

    pattern: str
    special_tokens: dict[str, int]


def _named(what: str, name: str) -> Encoding:
    try:
        return get_encoding(name)
    except (OSError, ValueError) as error:  # no network, or other bytes than the published ones
        problem = f"its ranks can't be had: {type(error).__name__}: {str(error)[:200]}"
        fix = "download it once where there is a network, into the directory of TIKTOKEN_CACHE_DIR; or use 'bytes'"
        raise FunctitanError(report(what, [problem], fix)) from error


def _read(what: str, name: str, known: list[str], special: set[int]) -> dict[bytes, int]:
    fix = f"give a file, in which each line is a base64 token, a rank, or one of {known}"
    try:
        lines = Path(name).read_bytes().splitlines()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        problem = f"it is neither a name{nearest(name, known)} nor a file" if missing else str(error.strerror)
        raise FunctitanError(report(what, [problem], fix)) from error
    ranks: dict[bytes, int] = {}
    at: dict[int, int] = {}  # the line of each rank
    problems: list[str] = []
    most = len(lines) + len(special) + len(_HOLES)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = _line(line)
            if rank >= most:
                raise ValueError(f"rank {rank} is beyond what {len(lines)} lines can have")
            if token in ranks:
                raise ValueError(f"it has the token of line {at[ranks[token]]} again")
            if rank in at:
                raise ValueError(f"it has the rank {rank} of line {at[rank]} again")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        ranks[token], at[rank] = rank, number
    holes = special | (_HOLES if len(ranks) in _PUBLISHED else set())
    absent = [rank for rank in range(max(at, default=-1)) if rank not in at and rank not in holes]
    if not problems:
        problems = [f"rank {rank} is in no line, a later one is in line {at[max(at)]}" for rank in absent]
        missing = [i for i in range(256) if bytes([i]) not in ranks]
        if missing:
            problems.insert(0, f"{len(missing)} of the 256 bytes have no rank, the first is {missing[0]}")
    if problems:
        more = [f"and {len(problems) - _MOST} more"] if len(problems) > _MOST else []
        raise FunctitanError(report(what, problems[:_MOST] + more, fix))
    return ranks


def _line(line: bytes) -> tuple[bytes, int]:
    parts = line.split()
    if len(parts) != 2:
        raise ValueError(f"it has {len(parts)} parts, not a base64 token and a rank")
    if not parts[1].isdigit() or len(parts[1]) > 10:
        raise ValueError(f"{parts[1][:20].decode(errors='replace')!r} is no rank: a whole number of at least 0")
    try:
        token = base64.b64decode(parts[0], validate=True)
    except ValueError as error:
        raise ValueError(f"{parts[0][:20].decode(errors='replace')!r} is not base64: {error}") from error
    if not token:
        raise ValueError("it has an empty token")
    return token, int(parts[1])


def _end(special: object, end_of_text: int | None) -> int | None:
    if end_of_text is not None or not isinstance(special, dict):
        return end_of_text
    return special.get(END_OF_TEXT, special.get(_LLAMA_END))


def _problems(ranks: dict[bytes, int], special: object, end_of_text: object, pattern: object) -> list[str]:
    problems = [] if pattern is None or isinstance(pattern, str) else [f"pattern is a {type(pattern).__name__}"]
    if not isinstance(special, dict) or not all(isinstance(name, str) and name for name in special):
        return [*problems, "special_tokens is no dict from names to numbers"]
    used = set(ranks.values())
    limit = 2 * len(ranks)  # a number makes the vocabulary as large
    for name, number in special.items():
        said = "end_of_text" if number is end_of_text else f"the special token {name!r}"
        if type(number) is not int or not 0 <= number < limit:
            problems.append(f"{said} is {number!r}: it must be a whole number from 0 to {limit - 1}")
        elif number in used:
            problems.append(f"{said} is {number}, which another token has")
        else:
            used.add(number)
    if end_of_text is not None and end_of_text not in special.values():
        problems.append(f"end_of_text is {end_of_text!r}, which is none of special_tokens")
    return problems


_MOST = 20
_LLAMA_END = "<|end_of_text|>"
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_PATTERN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_ENDING}",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
_RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
_LLAMA = ["<|begin_of_text|>", _LLAMA_END, *_RESERVED[:4], "<|start_header_id|>", "<|end_header_id|>"]
_LLAMA += [_RESERVED[4], "<|eot_id|>", *_RESERVED[5:]]
_FIM = {f"<|fim_{part}|>": 100258 + i for i, part in enumerate(("prefix", "middle", "suffix"))}
_PROMPT = "<|endofprompt|>"
_HOLES = {50256}  # of p50k's ranks: the end of text
_PUBLISHED = {  # by the number of ranks
    50256: _Published(_GPT2_PATTERN, {END_OF_TEXT: 50256}),
    50280: _Published(_GPT2_PATTERN, {END_OF_TEXT: 50256}),
    100256: _Published(_GPT4_PATTERN, {END_OF_TEXT: 100257, **_FIM, _PROMPT: 100276}),
    128000: _Published(_GPT4_PATTERN, {name: 128000 + i for i, name in enumerate(_LLAMA)}),
    199998: _Published(_GPT4O_PATTERN, {END_OF_TEXT: 199999, _PROMPT: 200018}),
}
