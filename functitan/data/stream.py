"""Token streams: documents -> tokens -> shuffled rows -> batches, with the position in the data as a value.

Invariant: `next_batch(cursor)` is a pure function. The same cursor gives bitwise the same batch, in any process and at
any time, and the cursor that comes back continues exactly where the batch ended. So to resume is to store four ints.

The tokens are endless: the documents of epoch 0, of epoch 1, ..., each with one end-of-text token. Cut into rows, one
after the other, each is an input once and a label once in an epoch; each window of rows is shuffled, so that a long
document does not fill whole batches. Batches hold global values: `ft.shard(batch, data.BATCH)` takes a rank's part.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from tiktoken import Encoding
from torch import Tensor

from functitan import threefry
from functitan.data.documents import Corpus, problems_of, readable, text_of
from functitan.data.encodings import END_OF_TEXT, has_end_of_text
from functitan.errors import FunctitanError, report

BATCH = {"tokens": "batch seq", "labels": "batch seq"}


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
    documents: Corpus, encoding: Encoding, seq_len: int, batch_size: int, *, seed: int = 0, shuffle: int | None = 4096
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

    >>> from functitan.data.encodings import byte_encoding
    >>> documents = Dataset.from_dict({"text": ["abc", "de"]})
    >>> stream = token_stream(documents, byte_encoding(), seq_len=4, batch_size=1, shuffle=0)
    >>> batch, cursor = stream.next_batch(Cursor())
    >>> batch["tokens"], batch["labels"], cursor
    (tensor([[ 97,  98,  99, 256]]), tensor([[ 98,  99, 256, 100]]), Cursor(epoch=0, document=1, offset=0, row=0))
    """
    window_size = shuffle or 1
    _check_stream(documents, encoding, seq_len=seq_len, batch_size=batch_size, shuffle=window_size)
    key = threefry.key(seed)
    lock = threading.Lock()  # ranks that are threads share a stream: one of them reads a window for all

    def permutation(n: int, *place: int | str) -> np.ndarray:
        if not shuffle or n == 1:
            return np.arange(n)
        return torch.argsort(threefry.bits(reduce(threefry.fold_in, place, key), (n,)), stable=True).cpu().numpy()

    is_stream = isinstance(documents, IterableDataset)
    row_at = _rows_of_stream(documents) if is_stream else _rows_in_order(documents, permutation)

    @lru_cache(maxsize=256)  # a rank that lags by a batch must not reopen a streaming dataset
    def tokens_at(epoch: int, document: int) -> np.ndarray:
        where = f"document {document} of epoch {epoch}"
        with readable("next_batch", where):
            row = row_at(epoch, document)
        if row is None:
            return np.empty(0, np.uint32)
        text = text_of("next_batch", row["text"], where)
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


def _rows_in_order(documents: Dataset, permutation: Callable[..., np.ndarray]) -> Callable[[int, int], dict | None]:
    order = lru_cache(maxsize=2)(partial(permutation, len(documents), "documents"))  # a window may meet two epochs
    return lambda epoch, index: documents[int(order(epoch)[index])] if index < len(documents) else None


def _rows_of_stream(documents: IterableDataset) -> Callable[[int, int], dict | None]:
    """Reads on where the last call ended, and opens the stream anew for any other place."""
    rows, place = iter(()), None

    def row_at(epoch: int, index: int) -> dict | None:
        nonlocal rows, place
        if place != (epoch, index):
            opened = documents.skip(index)
            opened.set_epoch(epoch)  # of this copy; a shuffled stream takes its order from it
            rows = iter(opened)
        place = None  # a read that fails leaves no place to go on from
        row = next(rows, None)
        place = (epoch, index + 1)
        return row

    return row_at


def _check_stream(documents: Corpus, encoding: Encoding, **sizes: int) -> None:
    problems = problems_of(documents)
    problems += [f"{n}={v!r} is not an int >= 1" for n, v in sizes.items() if type(v) is not int or v < 1]
    if not isinstance(encoding, Encoding):
        problems.append(f"encoding is a {type(encoding).__name__}, not a tiktoken Encoding as data.encoding makes it")
    elif not has_end_of_text(encoding):
        problems.append(f"the encoding {encoding.name!r} has no {END_OF_TEXT} to put between documents")
    if problems:
        fix = "write as in token_stream(stdlib_documents(), byte_encoding(), seq_len=256, batch_size=8)"
        raise FunctitanError(report("token_stream", problems, fix))


def _check_cursor(cursor: Sequence[int]) -> Cursor:
    try:
        checked = Cursor._make(map(operator.index, cursor))
    except TypeError:
        checked = Cursor(-1)
    if min(checked) < 0 or max(checked) >= 2**63:
        problem = f"{cursor!r} is not four ints >= 0 and below 2**63: epoch, document, offset, row"
        raise FunctitanError(report("next_batch", [problem], "start with Cursor(), go on with the cursor of a batch"))
    return checked


def _beyond_the_data(cursor: Cursor, what: str, size: str) -> FunctitanError:
    problem = f"{cursor} is beyond the data: that {what} has {size}"
    return FunctitanError(report("next_batch", [problem], "use a cursor of a stream made with the same arguments"))
