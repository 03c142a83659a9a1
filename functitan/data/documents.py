"""Documents and encodings: where text comes from, and how it becomes tokens.

Invariant: the same source gives the same documents in the same order on every machine; a source is a Hugging Face
dataset with a column "text".
"""

from __future__ import annotations

import base64
import os
import sysconfig
from hashlib import blake2b
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset, load_dataset
from tiktoken import Encoding, get_encoding, list_encoding_names

from functitan.errors import FunctitanError, nearest, report

END_OF_TEXT = "<|endoftext|>"
Corpus = Dataset | IterableDataset

_GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
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
    Result: a dataset of the one column "text". Raises FunctitanError if there is no such column.
    """
    documents = load_dataset(path, name, split=split, streaming=streaming)
    columns = documents.column_names or list(next(iter(documents), {}))
    if column not in columns:
        problem = f"no column {column!r}{nearest(column, columns)}: the columns are {columns}"
        raise FunctitanError(report(f"huggingface_documents({path!r})", [problem], "name the one with text: column="))
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


def problems_of(documents: Corpus) -> list[str]:
    """What keeps a value from being a source of documents."""
    if not isinstance(documents, Dataset | IterableDataset):
        return [f"documents is a {type(documents).__name__}, not a dataset as Dataset.from_dict makes it"]
    columns = documents.column_names or list(next(iter(documents), {}))
    if columns and "text" not in columns:
        return [f"documents has no column 'text': its columns are {columns}"]
    return [] if next(iter(documents), None) else ["documents is empty"]
