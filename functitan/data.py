"""Token streams: documents -> tokens -> shuffled rows -> batches, with the position in the data as a value.

Invariant: `next_batch(cursor)` is a pure function. The same cursor gives bitwise the same batch, in any process and at
any time, and the cursor that comes back continues exactly where the batch ended. So to resume is to store four ints.

The tokens are endless: the documents of epoch 0, of epoch 1, ..., each with one end-of-text token. Cut into rows, one
after the other, each is an input once and a label once in an epoch; each window of rows is shuffled, so that a long
document does not fill whole batches. Batches hold global values: `ft.shard(batch, data.BATCH)` takes a rank's part.
"""

from __future__ import annotations

import base64
import operator
import os
import sysconfig
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset, load_dataset
from tiktoken import Encoding, get_encoding, list_encoding_names
from torch import Tensor

from functitan import random
from functitan.errors import FunctitanError, nearest, report

BATCH = {"tokens": "batch seq", "labels": "batch seq"}
END_OF_TEXT = "<|endoftext|>"
Corpus = Dataset | IterableDataset

_GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_NOT_TEXT_TO_LEARN = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Cursor(NamedTuple):
    """The next row to read: number `row` of the window that starts at this offset, of this document of the epoch."""

    epoch: int = 0
    document: int = 0
    offset: int = 0
    row: int = 0


class TokenStream(NamedTuple):
    """An endless stream of batches; `next_batch` maps a cursor to (batch, next cursor)."""

    next_batch: Callable[[Sequence[int]], tuple[dict[str, Tensor], Cursor]]
    encoding: Encoding
    seq_len: int
    batch_size: int


def token_stream(
    documents: Corpus, encoding: Encoding, seq_len: int, batch_size: int, *, seed: int = 0, shuffle: int | None = 2048
) -> TokenStream:
    """Batches of packed documents.

    Arguments: `documents`, a Hugging Face dataset with a column "text"; `encoding`, which has an end-of-text token;
    `seed`, for a new order of the documents in each epoch and of the rows in each window; `shuffle`, the rows of a
    window, of which the last in an epoch has fewer (0 or None: documents and rows as they come). A streaming dataset
    keeps its own order of documents, which its `.shuffle(seed=, buffer_size=)` can change.
    Result: a stream whose batches are {"tokens", "labels"}, int64 of shape (batch_size, seq_len), patterns `BATCH`.
    `next_batch` takes a `Cursor` or any four ints, as JSON gives them. The order of rows does not depend on batch_size,
    so a cursor serves any; the other arguments must be those it was made with.
    Raises FunctitanError for bad arguments, and in `next_batch` for a cursor beyond the data.

    >>> documents = Dataset.from_dict({"text": ["abc", "de"]})
    >>> stream = token_stream(documents, byte_encoding(), seq_len=4, batch_size=1, shuffle=0)
    >>> batch, cursor = stream.next_batch(Cursor())
    >>> batch["tokens"], batch["labels"], cursor
    (tensor([[ 97,  98,  99, 256]]), tensor([[ 98,  99, 256, 100]]), Cursor(epoch=0, document=1, offset=0, row=0))
    """
    window_size = shuffle or 1
    _check_stream(documents, encoding, seq_len=seq_len, batch_size=batch_size, shuffle=window_size)
    key = random.key(seed)
    lock = threading.Lock()  # ranks that are threads share a stream: one of them reads a window for all

    def permutation(n: int, *place: int | str) -> np.ndarray:
        if not shuffle or n == 1:
            return np.arange(n)
        return torch.argsort(random.bits(reduce(random.fold_in, place, key), (n,)), stable=True).cpu().numpy()

    is_stream = isinstance(documents, IterableDataset)
    text_at = _texts_of_stream(documents) if is_stream else _texts_in_order(documents, permutation)

    @lru_cache(maxsize=256)  # a rank that lags by a batch must not reopen a streaming dataset
    def tokens_at(epoch: int, document: int) -> np.ndarray:
        if (text := text_at(epoch, document)) is None:
            return np.empty(0, np.uint32)
        return np.append(encoding.encode_to_numpy(text, disallowed_special=()), np.uint32(encoding.eot_token))

    @lru_cache(maxsize=2)  # a batch may meet two
    def window_at(start: Cursor) -> tuple[np.ndarray, Cursor]:
        """The rows in their new order, each with the label of its last token, and the start of the next window."""
        epoch, document, offset, _ = end = start
        pieces: list[np.ndarray] = []
        missing = window_size * seq_len + 1  # the last token is a label only: the next window starts with it
        while missing:
            end, tokens = Cursor(epoch, document, offset), tokens_at(epoch, document)
            if offset >= len(tokens):
                raise _beyond_the_data(end, "document", f"{len(tokens)} tokens")
            pieces.append(tokens[offset : offset + missing])
            missing -= len(pieces[-1])
            document, offset = document + 1, 0
            if missing and not len(tokens_at(epoch, document)):  # the epoch ends, and with the row begun the window
                epoch, document, missing = epoch + 1, 0, (missing - 1) % seq_len + 1
        rows = np.lib.stride_tricks.sliding_window_view(np.concatenate(pieces), seq_len + 1)[::seq_len]
        return rows[permutation(len(rows), "rows", *start)], end._replace(offset=end.offset + len(pieces[-1]) - 1)

    def next_batch(cursor: Sequence[int]) -> tuple[dict[str, Tensor], Cursor]:
        at = _check_cursor(cursor)
        parts: list[np.ndarray] = []
        while missing := batch_size - sum(map(len, parts)):
            with lock:
                window, end = window_at(at._replace(row=0))
            if at.row >= len(window):
                raise _beyond_the_data(at, "window", f"{len(window)} rows")
            parts.append(window[at.row : at.row + missing])
            row = at.row + len(parts[-1])
            at = at._replace(row=row) if row < len(window) else end
        rows = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        # Copies: a batch may be donated, and one storage for two tensors must not be.
        return {"tokens": rows[:, :-1].clone(), "labels": rows[:, 1:].clone()}, at

    return TokenStream(next_batch, encoding, seq_len, batch_size)


def split(documents: Corpus, validation: float = 0.05) -> tuple[Corpus, Corpus]:
    """(train, validation) documents, chosen by a hash of each text, so that equal texts are on the same side.

    Arguments: `documents` with a column "text"; `validation`, in (0, 1), the expected share of documents.
    Result: two datasets of the kind given, in the given order; a streaming one stays lazy.
    Raises FunctitanError for bad arguments, or if a side would be empty.

    >>> train, validation = split(Dataset.from_dict({"text": [str(i) for i in range(100)]}), validation=0.1)
    >>> len(train), len(validation)
    (91, 9)
    """
    problems = _problems_of(documents)
    if not 0 < validation < 1:
        problems.append(f"validation={validation} is not between 0 and 1")
    if problems:
        raise FunctitanError(report("split", problems, "give a dataset with a column 'text', and a share like 0.05"))

    def is_validation(text: str) -> bool:
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") < validation * 2**64

    if isinstance(documents, IterableDataset):
        train = documents.filter(lambda row: not is_validation(row["text"]))
        return train, documents.filter(lambda row: is_validation(row["text"]))
    held = np.array([is_validation(text) for text in documents["text"]])
    if held.all() or not held.any():
        problem = f"of {held.size} documents {(~held).sum()} are for training, {held.sum()} for validation"
        raise FunctitanError(report("split", [problem], "give more documents, or another share"))
    return documents.select(np.flatnonzero(~held)), documents.select(np.flatnonzero(held))


def byte_encoding() -> Encoding:
    """The encoding of UTF-8 bytes: token i < 256 is the byte i, 256 is the end of text. Needs no file.

    >>> byte_encoding().encode("hé"), byte_encoding().n_vocab
    ([104, 195, 169], 257)
    """
    ranks = {bytes([i]): i for i in range(256)}  # the pattern only cuts the work into small pieces
    return Encoding("bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})


def encoding(name_or_path: str | os.PathLike, *, pattern: str = _GPT4_PATTERN) -> Encoding:
    """A tiktoken encoding.

    Arguments: `name_or_path`, "bytes", a name that tiktoken knows (it downloads the ranks at first use) or a
    `.tiktoken` file of ranks, such as Llama 3's, whose end of text becomes the token after the last rank;
    `pattern`, the regular expression that cuts text before merging, for a file only (default: GPT-4's and Llama 3's).
    Raises FunctitanError for an unknown name and for a file that can't be read as ranks of all bytes.

    >>> encoding("bytes").n_vocab
    257
    """
    name, known = str(name_or_path), ["bytes", *list_encoding_names()]
    if name in known:
        return byte_encoding() if name == "bytes" else get_encoding(name)
    try:
        lines = [line.split() for line in Path(name).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        missing = [i for i in range(256) if bytes([i]) not in ranks]
        problem = f"{len(missing)} of the 256 bytes have no rank, the first is {missing[0]}" if missing else ""
    except OSError:
        problem = f"it is neither a name{nearest(name, known)} nor a file"
    except ValueError as error:
        problem = str(error)
    if problem:
        fix = f"give a file, in which each line is a base64 token, a rank, or one of {known}"
        raise FunctitanError(report(f"encoding({name!r})", [problem], fix))
    end = {END_OF_TEXT: max(ranks.values()) + 1}
    return Encoding(Path(name).stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=end)


def stdlib_documents() -> Dataset:
    """The sources of Python's standard library without its tests, sorted by path: about 12 MB of text on any machine.

    Result: columns "path" (relative) and "text". Raises FunctitanError where Python came without sources.

    >>> "path" in stdlib_documents().column_names
    True
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_TEXT_TO_LEARN]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise FunctitanError(report("stdlib_documents", [f"no .py file in {root}"], "use huggingface_documents"))
    text = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8", errors="replace") for path in found}
    return Dataset.from_dict({"path": sorted(text), "text": [text[path] for path in sorted(text)]})


def huggingface_documents(
    path: str, name: str | None = None, split: str = "train", *, column: str = "text", streaming: bool = True
) -> Corpus:
    """Documents of a Hugging Face dataset, or of a folder of JSON, Parquet or text files.

    Arguments: `path`, `name` and `split` as for `datasets.load_dataset`; `column`, the one that holds the text;
    `streaming`, whether to read as needed instead of downloading first.
    Result: a dataset of the one column "text". Raises FunctitanError if there is no such column.
    """
    documents = load_dataset(path, name, split=split, streaming=streaming)
    columns = documents.column_names or list(next(iter(documents), {}))
    if column not in columns:
        problem = f"no column {column!r}{nearest(column, columns)}: the columns are {columns}"
        raise FunctitanError(report(f"huggingface_documents({path!r})", [problem], "name the one with text: column="))
    documents = documents.select_columns([column])
    return documents if column == "text" else documents.rename_column(column, "text")


def _texts_in_order(documents: Dataset, permutation: Callable[..., np.ndarray]) -> Callable[[int, int], str | None]:
    order = lru_cache(maxsize=2)(partial(permutation, len(documents), "documents"))  # a window may meet two epochs
    return lambda epoch, index: documents[int(order(epoch)[index])]["text"] if index < len(documents) else None


def _texts_of_stream(documents: IterableDataset) -> Callable[[int, int], str | None]:
    """Reads on where the last call ended, and opens the stream anew for any other place."""
    rows, place = iter(()), None

    def text_at(epoch: int, index: int) -> str | None:
        nonlocal rows, place
        if place != (epoch, index):
            opened = documents.skip(index)
            opened.set_epoch(epoch)  # of this copy; a shuffled stream takes its order from it
            rows = iter(opened)
        place = None  # a read that fails leaves no place to go on from
        row = next(rows, None)
        place = (epoch, index + 1)
        return None if row is None else row["text"]

    return text_at


def _check_stream(documents: Corpus, encoding: Encoding, **sizes: int) -> None:
    problems = _problems_of(documents)
    problems += [f"{n}={v!r} is not an int >= 1" for n, v in sizes.items() if type(v) is not int or v < 1]
    if END_OF_TEXT not in encoding.special_tokens_set:
        problems.append(f"the encoding {encoding.name!r} has no {END_OF_TEXT} to put between documents")
    if problems:
        fix = "write as in token_stream(stdlib_documents(), byte_encoding(), seq_len=256, batch_size=8)"
        raise FunctitanError(report("token_stream", problems, fix))


def _problems_of(documents: Corpus) -> list[str]:
    if not isinstance(documents, Dataset | IterableDataset):
        return [f"documents is a {type(documents).__name__}, not a dataset as Dataset.from_dict makes it"]
    columns = documents.column_names or list(next(iter(documents), {}))
    if columns and "text" not in columns:
        return [f"documents has no column 'text': its columns are {columns}"]
    return [] if next(iter(documents), None) else ["documents is empty"]


def _check_cursor(cursor: Sequence[int]) -> Cursor:
    try:
        checked = Cursor._make(map(operator.index, cursor))
    except TypeError:
        checked = Cursor(-1)
    if min(checked) < 0:
        problem = f"{cursor!r} is not four ints >= 0: epoch, document, offset, row"
        raise FunctitanError(report("next_batch", [problem], "start with Cursor(), go on with the cursor of a batch"))
    return checked


def _beyond_the_data(cursor: Cursor, what: str, size: str) -> FunctitanError:
    problem = f"{cursor} is beyond the data: that {what} has {size}"
    return FunctitanError(report("next_batch", [problem], "use a cursor of a stream made with the same arguments"))
