"""Documents: where text comes from.

Invariant: the same source gives the same documents in the same order on every machine; a source is a Hugging Face
dataset with a column "text".
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from functitan.errors import FunctitanError, nearest, report
from functitan.reading import path_text

Corpus = Dataset | IterableDataset

_NOT_TEXT_TO_LEARN = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


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
    Result: a dataset of the one column "text". Raises FunctitanError if there is no such column, and for files that
    can't be read.
    """
    what = f"huggingface_documents({path_text('huggingface_documents', path)!r})"
    with readable(what, "the data", RuntimeError, TypeError, LookupError, StopIteration):
        documents = load_dataset(path, name, split=split, streaming=streaming)
        columns = documents.column_names or list(next(iter(documents), {}))
    if column not in columns:
        problem = f"no column {column!r}{nearest(column, columns)}: the columns are {columns}"
        raise FunctitanError(report(what, [problem], "name the one with text: column="))
    documents = documents.select_columns([column])
    return documents if column == "text" else documents.rename_column(column, "text")


def split(documents: Corpus, validation: float = 0.05) -> tuple[Corpus, Corpus]:
    """(train, validation) documents, chosen by a hash of each text, so that equal texts are on the same side.

    Arguments: `documents` with a column "text"; `validation`, in (0, 1), the expected share of documents.
    Result: two datasets of the kind given, in the given order; a streaming one stays lazy.
    Raises FunctitanError for bad arguments, or if a side would be empty.

    >>> train, validation = split(Dataset.from_dict({"text": [str(i) for i in range(100)]}), validation=0.1)
    >>> len(train), len(validation)
    (91, 9)
    """
    problems = problems_of(documents)
    if not 0 < validation < 1:
        problems.append(f"validation={validation} is not between 0 and 1")
    if problems:
        raise FunctitanError(report("split", problems, "give a dataset with a column 'text', and a share like 0.05"))

    def is_validation(text: object) -> bool:
        text = text_of("split", text, "a document")
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") < validation * 2**64

    if isinstance(documents, IterableDataset):
        train = documents.filter(lambda row: not is_validation(row["text"]))
        return train, documents.filter(lambda row: is_validation(row["text"]))
    held = np.array([is_validation(text) for text in documents["text"]])
    if held.all() or not held.any():
        problem = f"of {held.size} documents {(~held).sum()} are for training, {held.sum()} for validation"
        raise FunctitanError(report("split", [problem], "give more documents, or another share"))
    return documents.select(np.flatnonzero(~held)), documents.select(np.flatnonzero(held))


def problems_of(documents: Corpus) -> list[str]:
    """What keeps a value from being a source of documents."""
    if not isinstance(documents, Dataset | IterableDataset):
        return [f"documents is a {type(documents).__name__}, not a dataset as Dataset.from_dict makes it"]
    with readable("the documents", "the first"):
        first = next(iter(documents), {})
    columns = documents.column_names or list(first)
    if columns and "text" not in columns:
        return [f"documents has no column 'text': its columns are {columns}"]
    if first and not isinstance(first["text"], str):
        return [f"documents has a column 'text' that holds no text: the first is {str(first['text'])[:60]!r}"]
    return [] if first else ["documents is empty"]


def text_of(what: str, text: object, where: str) -> str:
    """The text of a document. Raises FunctitanError for a null, a number, or whatever else a column can hold."""
    if isinstance(text, str):
        return text
    problem = f"{where} has {str(text)[:60]!r} in its column 'text', a {type(text).__name__}"
    raise FunctitanError(report(what, [problem], "leave it out: documents.filter(lambda row: row['text'] is not None)"))


@contextmanager
def readable(what: str, where: str, *others: type[Exception]) -> Iterator[None]:
    """Files that can't be read, as `FunctitanError`; who has no network gets the network's own error."""
    try:
        yield
    except FunctitanError:
        raise
    except (ValueError, RecursionError, FileNotFoundError, DatasetsError, *others) as error:
        problem = f"{where} can't be read: {type(error).__name__}: {str(error.__cause__ or error)[:300]}"
        raise FunctitanError(report(what, [problem], "look at the files: one is damaged, empty, or no data")) from error
