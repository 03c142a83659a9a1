"""A file is data: whatever its bytes are, reading it runs nothing, leads nowhere else, and ends in one clear error.

The oracle of `.metadata` is pickle itself, on files that torch's own tools wrote.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import pickletools
import shutil
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

import functitan as ft
from functitan import profiling
from functitan.checkpoint.dcp import entries_of, unpacked
from functitan.checkpoint.pickled import records
from functitan.errors import CheckpointError, FunctitanError
from functitan.models import llama
from functitan.reading import name_problem, parsed_json

CONFIG = llama.DEBUG._replace(vocab_size=50, num_layers=1, embed=16, mlp=16, num_heads=2, num_kv_heads=1, head_dim=8)
LIKE = {"w": torch.empty(2, 3), "step": 0}


class Runs:
    """What writes a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.code = f"open({str(mark)!r}, 'w').close()"

    def __reduce__(self):
        return exec, (self.code,)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint and a directory of weights, both as we write them."""
    root = tmp_path_factory.mktemp("whole")
    ft.checkpoint.save(root / "checkpoint", {"w": torch.ones(2, 3), "step": 7})
    params = ft.init(llama.params(CONFIG), ft.random.key(0))
    ft.checkpoint.to_huggingface(root / "weights", params, CONFIG)
    ft.checkpoint.to_huggingface(root / "parts", params, CONFIG, file_bytes=3000)
    return {path.name: path for path in root.iterdir()}


def seal(path: Path, items: Callable[[list[list]], list[list]] = lambda items: items, **files: Any) -> None:
    """Write the checksums that the files as they are now would have: whoever can write a file can write these."""
    content = json.loads((path / "checksums.json").read_bytes().partition(b"\n")[2])
    sizes = {name: (path / name).stat().st_size for name in content["files"]} | files
    found = []
    for name, start, length, crc in items(content["items"]):
        if len(name) < 256 and (path / name).is_file():
            data = (path / name).read_bytes()
            length = len(data) if name == ".metadata" else min(length, len(data) - start)
            length = max(length, 0)
            crc = zlib.crc32(data[start : start + length])
        found.append([name, start, length, crc])
    text = json.dumps({"files": sizes, "items": found}).encode()
    (path / "checksums.json").write_bytes(f"{zlib.crc32(text):08x}\n".encode() + text)


def checkpoint_file(name: str) -> Callable[[Path, bytes], Any]:
    def read(path: Path, data: bytes) -> Any:
        if name == "checksums.json":
            (path / name).write_bytes(f"{zlib.crc32(data):08x}\n".encode() + data)
        else:
            (path / name).write_bytes(data)
            seal(path)
        return ft.checkpoint.restore(path, LIKE)

    return read


def weights_file(name: str, frame: Callable[[bytes], bytes] = lambda data: data) -> Callable[[Path, bytes], Any]:
    def read(path: Path, data: bytes) -> Any:
        (path / name).write_bytes(frame(data))
        return ft.checkpoint.from_huggingface(path)

    return read


def alone(name: str, fn: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
    def read(path: Path, data: bytes) -> Any:
        (path / name).write_bytes(data)
        return fn(path / name)

    return read


def documents(name: str) -> Callable[[Path, bytes], Any]:
    def read(path: Path, data: bytes) -> Any:
        for file in path.iterdir():
            file.unlink()
        (path / name).write_bytes(data)
        return list(ft.data.huggingface_documents(str(path)))

    return read


INDEX = "model.safetensors.index.json"
READERS = {  # what is read: (a directory that it begins with, its file, how it is read)
    "metadata": ("checkpoint", ".metadata", checkpoint_file(".metadata")),
    "items": ("checkpoint", "__0_0.distcp", checkpoint_file("__0_0.distcp")),
    "checksums": ("checkpoint", "checksums.json", checkpoint_file("checksums.json")),
    "config": ("weights", "config.json", weights_file("config.json")),
    "weights": ("weights", "model.safetensors", weights_file("model.safetensors")),
    "header": (
        "weights",
        "model.safetensors",
        weights_file("model.safetensors", lambda data: struct.pack("<Q", len(data)) + data + bytes(64)),
    ),
    "index": ("parts", INDEX, weights_file(INDEX)),
    "ranks": ("weights", "config.json", alone("config.json", ft.data.encoding)),
    "schedule": ("weights", "x.csv", alone("x.csv", ft.pipeline.read_csv)),
    "trace": ("weights", "x.json", alone("x.json", profiling.read)),
    "zipped trace": ("weights", "x.json.gz", alone("x.json.gz", profiling.read)),
    "documents": ("weights", "x.json", documents("x.json")),
    "tables": ("weights", "x.parquet", documents("x.parquet")),
}


def payloads(mark: Path, whole: bytes) -> dict[str, bytes]:
    evil, tuples = Runs(mark), b"\x80\x04)" + b"\x85" * 30_000
    doubled = b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60))
    zipped = mark.with_suffix(".pt")
    torch.save(evil, zipped)
    return {
        **{f"a pickle that runs, protocol {p}": pickle.dumps(evil, p) for p in (0, 2, 5)},
        "a saved object that runs": zipped.read_bytes(),
        "garbage": bytes(range(256)) * 4,
        "nothing": b"",
        "its first half": whole[: len(whole) // 2],
        **{f"the JSON {text.decode()}": text for text in (b"[1]", b'"x"', b"1", b"null", b"{}", b"NaN")},
        "JSON without end": b"[" * 10**5,
        "dicts without end": b'{"a":' * 10**5,
        "a number without end": b"9" * 10**5,
        "a pickle without end": tuples,
        "a deep pickle": tuples + b".",
        "a deep key": b"\x80\x04}" + tuples[2:] + b"Ns.",
        "a key that takes for ever to hash": b"\x80\x04}()\x94" + doubled + b"tNs.",
        "a place beyond all memory": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "bytes beyond all memory": b"\x80\x05\x8e" + struct.pack("<Q", 2**60) + b"x.",
    }


def names_the_file(error: Exception, file: str, reader: str) -> bool:
    said = {"schedule": Path(file).stem, "documents": "huggingface_documents", "tables": "huggingface_documents"}
    empty = reader == "header" and "config.json, the files have weights of 0 layers" in str(error)
    return said.get(reader, file) in str(error) or empty


@pytest.mark.parametrize("reader", READERS)
def test_no_bytes_run_and_all_are_one_clear_error(wholes, tmp_path, reader: str):
    begin, file, read = READERS[reader]
    original = wholes[begin] / file
    mark, wrong = tmp_path / "mark", []
    cases = payloads(mark, original.read_bytes() if original.exists() else b'{"a": [')
    if reader in ("documents", "tables"):  # datasets' own parsers: the kinds, not each member
        cases = {name: cases[name] for name in ("garbage", "its first half", "JSON without end", *list(cases)[:1])}
    for number, (name, data) in enumerate(cases.items()):
        shutil.copytree(wholes[begin], path := tmp_path / str(number))
        try:
            read(path, data)
            wrong.append(f"{name}: accepted")
        except FunctitanError as error:
            if not names_the_file(error, file, reader) or "Fix: " not in str(error) or len(str(error)) > 5000:
                wrong.append(f"{name}: {str(error)[:300]}")
        except BaseException as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    assert not wrong and not mark.exists(), "\n".join(wrong)


def metadata(relative_path: Any = "__0_0.distcp", **changed: Any) -> Metadata:
    info = _StorageInfo(relative_path, 0, 10)
    fields = {
        "state_dict_metadata": {
            "w": TensorStorageMetadata(
                TensorProperties(torch.bfloat16),
                torch.Size([2, 3]),
                [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))],
            ),
            "step": BytesStorageMetadata(),
        },
        "planner_data": OrderedDict({"w": ("w",), "step": ("step", 0)}),
        "storage_data": {MetadataIndex("w", [0, 0], 0): info, MetadataIndex("step"): info},
        "storage_meta": StorageMeta(Path("/x"), "a", "b", ["c"]),
        "version": "1.0.0",
    }
    return Metadata(**(fields | changed))


def assert_as_pickle_reads(data: bytes) -> None:
    known, found = pickle.loads(data), entries_of(data)
    assert list(found) == list(known.state_dict_metadata)
    for path, what in known.state_dict_metadata.items():
        chunks = getattr(what, "chunks", [None])
        assert (found[path].shape, found[path].dtype) == (
            (what.size, what.properties.dtype) if hasattr(what, "size") else (None, None)
        )
        assert len(chunks) == len(found[path].items)
        for chunk, item in zip(chunks, found[path].items, strict=True):
            at = known.storage_data[MetadataIndex(path, None if chunk is None else chunk.offsets)]
            assert (item.offsets, item.file) == (None if chunk is None else chunk.offsets, at.relative_path)
            assert (item.start, item.length) == (at.offset, at.length)


@pytest.mark.parametrize("protocol", range(6))
def test_metadata_is_what_pickle_would_make(protocol: int):
    if protocol >= 2:
        assert_as_pickle_reads(pickle.dumps(metadata(), protocol))
        assert_as_pickle_reads(pickletools.optimize(pickle.dumps(metadata(), protocol)))
    else:  # older than DCP: its objects are made by copyreg
        with pytest.raises(ValueError, match=r"copyreg|copy_reg"):
            records(pickle.dumps(metadata(), protocol))


def test_metadata_of_torchs_own_tools(tmp_path):
    state = {"a": {"b": torch.arange(6.0).reshape(2, 3), "c": [torch.ones(2, dtype=torch.int8)]}, "n": 3, "s": "x"}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    assert_as_pickle_reads((tmp_path / ".metadata").read_bytes())


FORBIDDEN = [
    *(f"builtins.{name}" for name in ("exec", "eval", "getattr", "__import__", "open", "type", "object", "dict")),
    *("os.system", "posix.system", "subprocess.Popen", "functools.partial", "operator.attrgetter", "pathlib.Path"),
    *("torch.load", "torch.Tensor", "torch.ops", "torch.hub.load", "torch.serialization.load", "torch.classes"),
    *("copyreg._reconstructor", "copyreg.__newobj__", "numpy.load", "pickle.loads", "importlib.import_module"),
    *("torch.distributed.checkpoint.metadata.os", "torch.distributed.checkpoint.metadata.dataclass"),
    *("torch.distributed.checkpoint.filesystem.FileSystemReader", "functitan.checkpoint.dcp.unpacked"),
]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_class_that_is_not_dcps_is_refused_by_name(wholes, tmp_path, name: str):
    shutil.copytree(wholes["checkpoint"], path := tmp_path / "bad")
    module, _, attribute = name.rpartition(".")
    for number, called in enumerate((b")R.", b")\x81.", b".")):
        text = lambda value: b"\x8c" + bytes([len(value)]) + value.encode()
        data = b"\x80\x04" + text(module) + text(attribute) + b"\x93" + called
        if number == 2:
            data = b"c" + module.encode() + b"\n" + attribute.encode() + b"\n."
        (path / ".metadata").write_bytes(data)
        seal(path)
        with pytest.raises(CheckpointError) as error:
            ft.checkpoint.restore(path, LIKE)
        assert ".metadata" in str(error.value) and f"it names {name}, which is no part" in str(error.value)


def test_a_class_reached_through_dots_is_refused():
    module = b"torch.distributed.checkpoint.metadata"
    with pytest.raises(ValueError, match=r"metadata\.os\.system, which is no part"):
        records(b"\x80\x04\x8c%c%b\x8c\x09os.system\x93." % (len(module), module))


ELSEWHERE = ["../out", "/etc/hostname", "a/b", "..", ".", "", "~", "~root", "file:///x", "memory://x", "s3::x", "a\\b"]
ELSEWHERE += ["C:x", "x\0y", "x\n", "\x7f", "x" * 300]


@pytest.mark.parametrize("name", [*ELSEWHERE, 3, None, [], {}, b"x"], ids=repr)
def test_a_name_that_leads_elsewhere_is_no_name(name: Any):
    assert name_problem(name) is not None


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "model-00001-of-00002.safetensors", "a b", "..a", "ü"])
def test_a_plain_name_is_one(name: str):
    assert name_problem(name) is None


@pytest.mark.parametrize("name", ELSEWHERE, ids=repr)
def test_no_file_leads_out_of_the_directory(wholes, tmp_path, name: str):
    shutil.copytree(wholes["checkpoint"], path := tmp_path / "checkpoint")
    shutil.copytree(wholes["parts"], parts := tmp_path / "parts")
    shutil.copy(path / "__0_0.distcp", tmp_path / "out")  # it would be read, and be right
    data = (path / ".metadata").read_bytes()
    known: Any = pickle.loads(data)
    for info in known.storage_data.values():
        info.relative_path = name
    (path / ".metadata").write_bytes(pickle.dumps(known))
    seal(path, lambda items: [*items, *([name, *item[1:]] for item in items)])
    with pytest.raises(CheckpointError, match=r"\.metadata has"):
        ft.checkpoint.restore(path, LIKE)
    size = (tmp_path / "out").stat().st_size
    seal(path, lambda items: items, **{name: size})
    with pytest.raises(CheckpointError, match="is no plain name of a file in the same directory"):
        ft.checkpoint.restore(path, LIKE)
    index = json.loads((parts / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (parts / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{INDEX}(.|\n)*is no plain name"):
        ft.checkpoint.from_huggingface(parts)


def lengthen(known: Any) -> None:
    next(iter(known.storage_data.values())).length = 10**15


def move(known: Any) -> None:
    known.state_dict_metadata["w"].chunks[0].offsets = torch.Size([1, 0])


def shrink(known: Any) -> None:
    known.state_dict_metadata["w"].chunks[0].sizes = torch.Size([1, 3])


def lose(known: Any) -> None:
    known.storage_data.popitem()


def share(known: Any) -> None:
    known.state_dict_metadata["w"].chunks *= 10**5


def grow(known: Any) -> None:
    what = known.state_dict_metadata["w"]
    what.size = what.chunks[0].sizes = torch.Size([10**6, 10**9])


def swap(known: Any) -> None:
    (a, x), (b, y) = known.storage_data.items()
    known.storage_data = {a: y, b: x}


@pytest.mark.parametrize(
    "change", [lengthen, move, shrink, lose, share, grow, swap], ids=lambda change: change.__name__
)
def test_metadata_that_lies_is_one_clear_error(wholes, tmp_path, change: Callable[[Any], None]):
    shutil.copytree(wholes["checkpoint"], path := tmp_path / "bad")
    known = pickle.loads((path / ".metadata").read_bytes())
    change(known)
    (path / ".metadata").write_bytes(pickle.dumps(known))
    seal(path)
    for like in (LIKE, None):  # without `like`, the file alone says what is allocated
        with pytest.raises(CheckpointError, match=r"\.metadata|__0_0\.distcp"):
            ft.checkpoint.restore(path, like)


@pytest.mark.parametrize(
    "value",
    [torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64), 3, {"a": 1}, torch.ones(2, 3).to_sparse(), "x"]
    + [torch.empty(2, 3, device="meta"), torch.ones(1, 1).expand(2, 3).to(torch.int32)],
    ids=lambda value: str(value)[:20],
)
def test_an_item_that_holds_something_else_is_named(wholes, tmp_path, value: Any):
    shutil.copytree(wholes["checkpoint"], path := tmp_path / "bad")
    torch.save(value, path / "__0_0.distcp")
    data = (path / "__0_0.distcp").read_bytes()
    known: Any = pickle.loads((path / ".metadata").read_bytes())
    for info in known.storage_data.values():
        info.offset, info.length = 0, len(data)
    (path / ".metadata").write_bytes(pickle.dumps(known))
    seal(path, lambda items: [["__0_0.distcp", 0, len(data), 0], *(item for item in items if item[0] == ".metadata")])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: (w|step) at byte 0: it holds"):
        ft.checkpoint.restore(path, LIKE)


def test_an_item_that_is_compressed_is_refused(tmp_path):
    torch.save(torch.zeros(2, 3), tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "plain") as plain, zipfile.ZipFile(tmp_path / "small", "w", 8) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match="it is compressed"):
        unpacked((tmp_path / "small").read_bytes())


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"[" * 10**5, b"9" * 10**5, b'{"a": }'], ids=lambda d: str(d[:5]))
def test_json_that_cannot_be_read_is_a_value_error(data: bytes):
    with pytest.raises(ValueError):
        parsed_json(data)


def test_a_trace_that_is_no_gzip(tmp_path):
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b"{}")[:-3])
    with pytest.raises(FunctitanError, match=r"x\.json\.gz"):
        profiling.read(tmp_path / "x.json.gz")


def test_files_alone_are_not_run(tmp_path):
    """Data sets of files that only code can read are refused, and are not run."""
    for name, data in {"x.pkl": pickle.dumps(Runs(tmp_path / "mark")), "bad.py": b"open('mark', 'w')"}.items():
        (folder := tmp_path / name[:3]).mkdir()
        (folder / name.replace("bad", folder.name)).write_bytes(data)
        with pytest.raises(FunctitanError):
            ft.data.huggingface_documents(str(folder))
    assert not (tmp_path / "mark").exists() and not os.path.exists("mark")
