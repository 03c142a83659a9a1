"""Laws of token streams. The oracle is the concatenation of all documents, made by Python's own str.encode."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median

import numpy as np
import pytest
import tiktoken
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from functitan import data
from functitan.data import Cursor

TEXTS = st.lists(st.text(max_size=12), min_size=1, max_size=8)


def dataset(texts):
    return Dataset.from_dict({"text": list(texts)})


def streaming(texts, shards=1):
    def rows(shards):
        yield from ({"text": text} for shard in shards for text in shard)

    parts = [list(texts[i::shards]) for i in range(shards)]
    return IterableDataset.from_generator(rows, gen_kwargs={"shards": parts})


def concatenated(texts):
    return [token for text in texts for token in [*text.encode(), 256]]


def read(stream, cursor, batches):
    """The rows of some batches, each as its tokens and the label of the last one, and the cursor after them."""
    rows = []
    for _ in range(batches):
        batch, cursor = stream.next_batch(cursor)
        assert set(batch) == set(data.BATCH) and all(type(part) is int for part in cursor)
        for x in batch.values():
            assert x.dtype == torch.int64 and x.shape == (stream.batch_size, stream.seq_len) and x.is_contiguous()
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        rows += torch.cat([batch["tokens"], batch["labels"][:, -1:]], 1).tolist()
    return rows, cursor


def cut(epoch, seq_len, first, stop):
    """Rows `first` to `stop` of a text that repeats one epoch: the last token of a row is the first of the next."""
    return [[epoch[i % len(epoch)] for i in range(r * seq_len, (r + 1) * seq_len + 1)] for r in range(first, stop)]


# The order of rows


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.integers(1, 7), st.integers(1, 4), st.sampled_from([dataset, streaming]), st.sampled_from([0, None]))
def test_without_shuffle_a_stream_is_the_concatenation_of_the_documents(texts, seq_len, batch_size, kind, shuffle):
    stream = data.token_stream(kind(texts), data.byte_encoding(), seq_len, batch_size, shuffle=shuffle)
    epoch = concatenated(texts)
    batches = 2 * len(epoch) // (seq_len * batch_size) + 1
    rows, cursor = read(stream, Cursor(), batches)
    assert rows == cut(epoch, seq_len, 0, batches * batch_size)
    assert cursor.epoch == batches * batch_size * seq_len // len(epoch)


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.integers(1, 7), st.integers(1, 4), st.integers(1, 6), st.integers(0, 5))
def test_each_window_has_the_rows_of_its_part_of_the_text(texts, seq_len, batch_size, shuffle, seed):
    stream = data.token_stream(streaming(texts), data.byte_encoding(), seq_len, batch_size, seed=seed, shuffle=shuffle)
    epoch = concatenated(texts)  # a streaming dataset keeps its order of documents
    rows, _ = read(stream, Cursor(), 3 * len(epoch) // (seq_len * batch_size) + 1)
    start = 0
    while start < len(rows):
        # A window ends with its last row, or with the row that meets the end of the epoch.
        stop = min(start + shuffle, -(-(start * seq_len // len(epoch) + 1) * len(epoch) // seq_len))
        if stop <= len(rows):
            assert sorted(rows[start:stop]) == sorted(cut(epoch, seq_len, start, stop))
        start = stop


@pytest.mark.parametrize("shuffle", [0, 1, 3, 2048])
def test_each_epoch_has_each_token_once_as_input_and_once_as_label(shuffle):
    texts = ["abcdefg", "hijk", "lmnopqrstuv"]  # 25 tokens: no row of five is of two epochs
    stream = data.token_stream(dataset(texts), data.byte_encoding(), 5, 1, shuffle=shuffle)
    rows, _ = read(stream, Cursor(), 15)
    for epoch in (rows[:5], rows[5:10], rows[10:]):
        inputs, labels = (
            Counter(token for row in epoch for token in row[part]) for part in (slice(-1), slice(1, None))
        )
        assert inputs == Counter(concatenated(texts))
        # The first token is a label of the epoch before, and the last label is the next epoch's first token.
        assert (inputs - labels).total() <= 1


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.integers(1, 7), st.integers(1, 4), st.integers(0, 5))
def test_each_epoch_has_each_document_once_in_an_order_of_its_own(texts, seq_len, batch_size, seed):
    stream = data.token_stream(dataset(texts), data.byte_encoding(), seq_len, batch_size, seed=seed, shuffle=1)
    size = len(concatenated(texts))
    rows, _ = read(stream, Cursor(), 3 * size // (seq_len * batch_size) + 1)
    tokens = [token for row in rows for token in row[:-1]]
    for epoch in range(3):
        documents = bytes(min(t, 255) for t in tokens[epoch * size : (epoch + 1) * size]).split(b"\xff")[:-1]
        assert sorted(documents) == sorted(text.encode() for text in texts)  # UTF-8 has no byte 255


def test_epochs_and_seeds_differ_in_their_order_of_documents():
    texts = [chr(97 + i) for i in range(26)]
    orders = set()
    for seed in range(3):
        stream = data.token_stream(dataset(texts), data.byte_encoding(), 52, 1, seed=seed)
        for epoch in range(3):
            orders.add(tuple(stream.next_batch(Cursor(epoch))[0]["tokens"].flatten().tolist()))
    assert len(orders) == 9


def test_windows_epochs_and_seeds_differ_in_their_order_of_rows():
    text = "abcdefghijklmnopqrst" * 2  # of an epoch two windows have the same rows but for a label, one has one row
    orders = set()
    for seed in range(3):
        stream = data.token_stream(dataset([text]), data.byte_encoding(), 1, 41, seed=seed, shuffle=20)
        for row in np.reshape(read(stream, Cursor(), 3)[0], (3, 41, 2))[:, :40, 0].reshape(6, 20).tolist():
            assert sorted(row) == sorted(text[:20].encode())
            orders.add(tuple(row))
    assert len(orders) == 18


@pytest.mark.parametrize("shuffle, expected", [(0, 1), (1024, 8 * (1 - (7 / 8) ** 16))])
def test_a_batch_is_of_many_documents_even_where_documents_are_long(shuffle, expected):
    texts = [chr(97 + i) * (16 * 64 - 1) for i in range(8)]  # 64 rows each
    rows, _ = read(data.token_stream(dataset(texts), data.byte_encoding(), 16, 16, shuffle=shuffle), Cursor(), 32)
    different = [len({row[0] for row in rows[i : i + 16]}) for i in range(0, 512, 16)]
    # Sixteen draws of eight documents give 7.06 different ones; the mean of 32 batches has a deviation of 0.14.
    assert abs(np.mean(different) - expected) < 0.5


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.integers(0, 9), st.integers(1, 7), st.integers(1, 5), st.integers(1, 9), st.integers(0, 3))
def test_the_order_of_rows_does_not_depend_on_the_batch_size(texts, before, seq_len, batch_size, shuffle, seed):
    make = partial(data.token_stream, dataset(texts), data.byte_encoding(), seq_len, seed=seed, shuffle=shuffle)
    one, many = make(batch_size=1), make(batch_size=batch_size)
    _, cursor = read(one, Cursor(), before)
    assert read(many, cursor, 4) == read(one, cursor, 4 * batch_size)


# The cursor


@settings(max_examples=30, deadline=None)
@given(
    TEXTS,
    st.integers(0, 20),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(0, 9),
    st.sampled_from([dataset, streaming]),
)
def test_a_stored_cursor_continues_exactly(texts, before, seq_len, batch_size, shuffle, kind):
    def new_stream():
        return data.token_stream(kind(texts), data.byte_encoding(), seq_len, batch_size, seed=3, shuffle=shuffle)

    stream = new_stream()
    _, cursor = read(stream, Cursor(), before)
    expected = read(stream, cursor, 4)
    assert read(stream, cursor, 4) == expected  # the same value again, after the stream went on
    for stored in (json.loads(json.dumps(cursor)), pickle.loads(pickle.dumps(cursor)), map(torch.tensor, cursor)):
        assert read(new_stream(), tuple(stored), 4) == expected


@pytest.mark.parametrize("shuffle", [0, 4, 100])
def test_a_shuffled_streaming_dataset_resumes_in_every_epoch(shuffle):
    def new_stream():
        documents = streaming([f"<{i}>" for i in range(30)], shards=3).shuffle(seed=1, buffer_size=7)
        return data.token_stream(documents, data.byte_encoding(), 11, 2, shuffle=shuffle)

    rows, _ = read(new_stream(), Cursor(), 20)
    resumed, cursor = [], Cursor()
    for _ in range(20):
        part, cursor = read(new_stream(), cursor, 1)
        resumed += part
    assert resumed == rows
    if not shuffle:
        tokens = [token for row in rows for token in row[:-1]]
        size = len(concatenated([f"<{i}>" for i in range(30)]))
        assert tokens[:size] != tokens[size : 2 * size]
        assert sorted(tokens[:size]) == sorted(tokens[size : 2 * size])


@pytest.mark.parametrize("shuffle", [0, 7, 2048])
def test_threads_share_a_stream(shuffle):
    texts = [f"document {i}" for i in range(50)]
    make = partial(data.token_stream, streaming(texts), data.byte_encoding(), 16, 2, shuffle=shuffle)
    stream = make()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: read(stream, Cursor(), 30), range(4)))
    assert all(result == results[0] for result in [*results, read(make(), Cursor(), 30)])


def test_threads_that_meet_at_a_window_read_it_once():
    reads: list[int] = []

    def rows():
        for i in range(50):
            reads.append(i)
            yield {"text": f"document {i}"}

    documents = IterableDataset.from_generator(rows)
    stream = data.token_stream(documents, data.byte_encoding(), 16, 2, shuffle=20)
    reads.clear()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: read(stream, Cursor(), 10), range(4)))
    assert len(reads) == len(set(reads))


def test_a_failed_read_is_not_taken_for_the_end():
    failures: list[bool] = []

    def rows():
        for i in range(5):
            if i == 3 and failures and failures.pop():
                raise OSError("connection lost")
            yield {"text": str(i)}

    documents = IterableDataset.from_generator(rows)
    stream = data.token_stream(documents, data.byte_encoding(), 9, 1, shuffle=0)
    failures.append(True)
    with pytest.raises(OSError, match="connection lost"):
        stream.next_batch(Cursor())
    assert read(stream, Cursor(), 1)[0] == cut(concatenated("01234"), 9, 0, 1)


def test_tokens_labels_and_other_batches_share_no_storage():
    stream = data.token_stream(dataset(["abcdef"]), data.byte_encoding(), 3, 1)
    batch, _ = stream.next_batch(Cursor())
    expected = {name: x.clone() for name, x in batch.items()}
    batch["tokens"].zero_()
    assert torch.equal(batch["labels"], expected["labels"])
    batch["labels"].zero_()
    again, _ = stream.next_batch(Cursor())
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_text_that_looks_like_the_end_of_text_is_only_text():
    batch, _ = data.token_stream(dataset(["<|endoftext|>"]), data.byte_encoding(), 14, 1).next_batch((0, 0, 0, 0))
    assert batch["tokens"][0].tolist() == [*b"<|endoftext|>", 256]


# Documents and their split


def test_split_parts_the_documents_and_keeps_equal_texts_together():
    texts = [str(i % 700) for i in range(2100)]
    train, validation = data.split(dataset(texts), validation=0.2)
    kept = train["text"][:], validation["text"][:]
    assert set(kept[0]).isdisjoint(kept[1]) and sorted(kept[0] + kept[1]) == sorted(texts)
    # Binomial over 700 distinct texts: five standard deviations, 5 sqrt(700 * 0.2 * 0.8) = 53.
    assert abs(len(set(kept[1])) - 140) < 53
    lazily = data.split(streaming(texts), validation=0.2)
    assert tuple([row["text"] for row in side] for side in lazily) == kept


def test_stdlib_documents_are_the_same_in_another_process():
    code = "from functitan import data; d = data.stdlib_documents(); print(d['path'][:3], sum(map(len, d['text'])))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    documents = data.stdlib_documents()
    assert other.strip() == f"{documents['path'][:3]} {sum(map(len, documents['text']))}"
    assert documents["path"][:] == sorted(documents["path"])
    assert {"argparse.py", "json/decoder.py"} <= set(documents["path"])
    assert not any("test" in path.split("/")[:-1] or "site-packages" in path for path in documents["path"])


def test_batches_of_the_standard_library_cost_little():
    stream = data.token_stream(data.stdlib_documents(), data.byte_encoding(), 256, 8)
    cursor, seconds = Cursor(), []
    for _ in range(200):
        start = time.perf_counter()
        _, cursor = stream.next_batch(cursor)
        seconds.append(time.perf_counter() - start)
    assert seconds[0] < 1  # half a million tokens: 0.04 s on an idle machine
    assert median(seconds) < 1e-3  # 0.05 ms on an idle machine; the median, as others may use this one


@pytest.mark.parametrize("column", ["text", "body"])
def test_huggingface_documents_read_a_local_folder(tmp_path, column):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({column: t, "id": 1}) + "\n" for t in ("ab", "c")))
    documents = data.huggingface_documents(str(tmp_path), column=column)
    assert list(documents) == [{"text": "ab"}, {"text": "c"}]
    with pytest.raises(ValueError, match=rf"no column 'txet'.*: the columns are \['{column}', 'id'\]"):
        data.huggingface_documents(str(tmp_path), column="txet")


# Encodings


@given(st.text())
def test_byte_encoding_is_utf8(text):
    assert data.encoding("bytes").encode(text, disallowed_special=()) == list(text.encode())
    assert data.byte_encoding().decode(list(text.encode())) == text


def test_encoding_reads_a_file_of_ranks(tmp_path):
    ranks = [bytes([i]) for i in range(256)] + [b"ab", b"abc"]
    path = tmp_path / "small.tiktoken"
    path.write_text("\n".join(f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(ranks)))
    found = data.encoding(path)
    assert found.encode("abcab abx") == [257, 256, 32, 256, 120]
    assert (found.n_vocab, found.eot_token) == (259, 258)
    path.write_text("YQ== 0\n")
    with pytest.raises(ValueError, match="255 of the 256 bytes have no rank, the first is 0"):
        data.encoding(path)
    path.write_text("no ranks here\n")
    with pytest.raises(ValueError, match="each line is a base64 token, a rank"):
        data.encoding(path)


# Errors

DOCUMENTS = dataset(["abc", "de"])
STREAM = partial(data.token_stream, encoding=data.byte_encoding(), seq_len=4, batch_size=1)
NO_END = tiktoken.Encoding("x", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})


@pytest.mark.parametrize(
    "call, texts",
    [
        (lambda: STREAM(Dataset.from_dict({"text": []})), ["documents is empty"]),
        (lambda: STREAM(streaming([])), ["documents is empty"]),
        (lambda: STREAM(Dataset.from_dict({"body": ["a"]})), ["no column 'text': its columns are ['body']"]),
        (lambda: STREAM(["abc"]), ["documents is a list", "Dataset.from_dict"]),
        (
            lambda: STREAM(DOCUMENTS, encoding=NO_END, seq_len=0, batch_size=1.5),
            ["seq_len=0 is not", "batch_size=1.5 is not", "'x' has no <|endoftext|>", "Fix: write as in token_stream"],
        ),
        (lambda: STREAM(DOCUMENTS, shuffle=-1), ["shuffle=-1 is not an int >= 1"]),
        (lambda: STREAM(DOCUMENTS, seed=-1), ["seed"]),
        (lambda: data.encoding("cl100k_bas"), ["did you mean 'cl100k_base'", "'bytes'", "'o200k_base'"]),
        (lambda: data.split(DOCUMENTS, validation=1.0), ["validation=1.0 is not between 0 and 1"]),
        (lambda: data.split(DOCUMENTS, validation=1e-9), ["of 2 documents 2 are for training, 0 for validation"]),
        (
            lambda: STREAM(DOCUMENTS).next_batch((0, 2, 0, 0)),
            ["document=2, offset=0, row=0) is beyond", "has 0 tokens"],
        ),
        (
            lambda: STREAM(DOCUMENTS, shuffle=0).next_batch((0, 1, 3, 0)),
            ["that document has 3 tokens", "Fix: use a cursor"],
        ),
        (lambda: STREAM(DOCUMENTS).next_batch((0, 0, 0, 2)), ["row=2) is beyond the data: that window has 2 rows"]),
        (lambda: STREAM(streaming(["a"])).next_batch((1, 5, 0, 0)), ["epoch=1, document=5", "has 0 tokens"]),
        (lambda: STREAM(DOCUMENTS).next_batch((0, -1, 0, 0)), ["(0, -1, 0, 0) is not four ints >= 0", "Cursor()"]),
        (lambda: STREAM(DOCUMENTS).next_batch((0, 1, 2)), ["is not four ints"]),
        (lambda: STREAM(DOCUMENTS).next_batch((0, 0.5, 0, 0)), ["is not four ints"]),
    ],
)
def test_a_mistake_is_one_clear_error(call, texts):
    with pytest.raises(ValueError) as caught:
        call()
    for text in texts:
        assert text in str(caught.value)
