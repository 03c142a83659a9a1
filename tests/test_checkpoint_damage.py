"""What is wrong with a checkpoint is one clear error on every rank, and the checkpoint before it still loads."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import functitan as ft
import functitan.checkpoint.write
from functitan.checkpoint.files import locate, remove
from functitan.errors import CheckpointError

RULES = ft.AxisRules({"embed": "fsdp", "mlp": None})
DECLARED = {"a": ft.Param("embed mlp", (8, 16)), "b": {"c": ft.Param("embed", (8,))}}


def save(path: Path | str, declared: Any = DECLARED, fsdp: int = 2) -> None:
    def saved(mesh):
        params = ft.init(declared, ft.random.key(0), mesh=mesh, rules=RULES)
        state = {"params": params, "step": 3}
        ft.checkpoint.save(path, state, patterns={"params": declared, "step": None}, mesh=mesh, rules=RULES)

    ft.simulate(fsdp=fsdp)(saved)()


def restore(path: Path | str, declared: Any = DECLARED) -> Any:
    """On one process, and on two ranks, of which each must raise."""
    like = {"params": declared, "step": 0}
    errors = []

    def restored(mesh):
        try:
            return ft.checkpoint.restore(path, like, mesh=mesh, rules=RULES)
        except CheckpointError as error:
            errors.append(error)
            raise

    try:
        ft.simulate(fsdp=2)(restored)()
    finally:
        assert len(errors) in (0, 2)
    return ft.checkpoint.restore(path, like)


def assert_whole(state: Any) -> None:
    expected = ft.init(DECLARED, ft.random.key(0))
    assert torch.equal(state["params"]["a"], expected["a"]) and torch.equal(
        state["params"]["b"]["c"], expected["b"]["c"]
    )
    assert state["step"] == 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "first"
    save(path)
    return path


FILES = ["__0_0.distcp", "__1_0.distcp", ".metadata", "checksums.json"]


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_found(whole, tmp_path, name: str):
    shutil.copytree(whole, bad := tmp_path / "second")
    data = (whole / name).read_bytes()
    for at in {0, len(data) - 1, *range(7, len(data), len(data) // 5)}:
        (bad / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CheckpointError, match=rf"{name} is damaged(.|\n)*Fix: restore an earlier checkpoint"):
            ft.checkpoint.restore(bad, {"params": DECLARED, "step": 0})
    with pytest.raises(CheckpointError):
        restore(bad)
    assert_whole(restore(whole))


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_with_its_sizes(whole, tmp_path, name: str):
    shutil.copytree(whole, bad := tmp_path / "second")
    size = (bad / name).stat().st_size
    os.truncate(bad / name, size - 1)
    text = f"{name} has {size - 1} bytes, {size} were written" if name != FILES[3] else "damaged"
    with pytest.raises(CheckpointError, match=text):
        restore(bad)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(whole, tmp_path, name: str):
    shutil.copytree(whole, bad := tmp_path / "second")
    (bad / name).unlink()
    text = f"{name} is missing" if name != FILES[3] else "there is no complete checkpoint"
    with pytest.raises(CheckpointError, match=text):
        restore(bad)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="there is no complete checkpoint"):
        restore(tmp_path / "nothing")


def test_another_model_is_told_leaf_by_leaf(whole):
    other = {"a": ft.Param("embed mlp", (8, 32)), "d": ft.Param("embed", (8,), dtype=torch.float64)}
    with pytest.raises(CheckpointError) as error:
        restore(whole, other)
    for line in (
        "params.a is (8, 32) float32, in the checkpoint (8, 16) float32",
        "params.d (8,) float64 is not in the checkpoint",
        "params.b.c (8,) float32 is only in the checkpoint",
    ):
        assert line in str(error.value)


def test_a_scalar_is_not_a_tensor(whole):
    with pytest.raises(CheckpointError, match=r"step is \(\) float32, in the checkpoint a scalar"):
        ft.checkpoint.restore(whole, {"params": DECLARED, "step": torch.zeros(())})


def test_a_checkpoint_is_not_overwritten(whole):
    with pytest.raises(CheckpointError, match="it is there already"):
        save(whole)
    assert_whole(restore(whole))


def test_a_leaf_that_no_checkpoint_holds(tmp_path):
    with pytest.raises(ValueError, match=r"a\.0 is a object"):
        ft.checkpoint.save(tmp_path / "first", {"a": [object()]})


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_file_that_cannot_grow(whole, tmp_path, ranks: int):
    """The kernel's own error, in the middle of a shard: of a limit on sizes of files, as of a full disk."""
    shutil.copytree(whole, tmp_path / "first")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"a": ft.Param("embed mlp", (8, 2**14))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"File too large(.|\n)*nothing of it is left"):
            save(tmp_path / "second", big, ranks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["first"]
    assert_whole(restore(tmp_path / "first"))
    save(tmp_path / "second", big, ranks)  # now there is room


HELD = {"before its file": "writing", "within its file": "pack", "before its record": "write"}


@pytest.mark.parametrize("fails", [(0,), (0, 1)], ids=["one fails", "both fail"])
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("root", ["", "memory://"], ids=["local", "memory"])
def test_a_failed_save_leaves_nothing_of_a_slow_rank(monkeypatch, tmp_path, root: str, held: str, fails):
    """Rank 1 goes on while rank 0 removes: after the list of what to remove is made, before it is empty."""
    removing, done = threading.Event(), threading.Event()
    path = f"{root}{tmp_path}/second"
    rank = lambda: int(threading.current_thread().name.removeprefix("rank "))

    def slowed(name: str) -> Callable[..., Any]:
        real = getattr(functitan.checkpoint.write, name)

        def fn(*args: Any, **options: Any) -> Any:
            record = name != "write" or args[1] == "__1.json"
            if rank() == 1 and name == HELD[held] and record:
                assert removing.wait(30)
            if name == "pack" and rank() in fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        return fn

    def interrupted(real: Callable[..., Any]) -> Callable[..., Any]:
        def fn(*args: Any, **options: Any) -> Any:
            first = real(*args, **options) if root else None
            if rank() == 0 and (options.get("recursive") if root else not removing.is_set()):
                removing.set()
                assert done.wait(30)
            return first if root else real(*args, **options)

        return fn

    def saved(mesh):
        params = ft.init(DECLARED, ft.random.key(0), mesh=mesh, rules=RULES)
        try:
            with pytest.raises(CheckpointError, match=r"No space left|another rank failed"):
                ft.checkpoint.save(path, params, patterns=DECLARED, mesh=mesh, rules=RULES, timeout=30)
        finally:
            if mesh.rank == 1:
                done.set()

    for name in ("writing", "pack", "write"):
        monkeypatch.setattr(functitan.checkpoint.write, name, slowed(name))
    home, name = (MemoryFileSystem, "expand_path") if root else (os, "rmdir")
    monkeypatch.setattr(home, name, interrupted(getattr(home, name)))
    ft.simulate(fsdp=2)(saved)()
    monkeypatch.undo()
    assert removing.is_set() and not os.listdir(tmp_path)
    assert not root or not MemoryFileSystem().find(str(tmp_path))


def test_a_file_that_the_kernel_adds_late_is_removed(monkeypatch, tmp_path):
    (tmp_path / "first").mkdir()
    real, late = os.rmdir, iter([b"late"])

    def rmdir(*args: Any, **options: Any) -> None:
        for data in late:
            next(tmp_path.iterdir()).joinpath("file").write_bytes(data)
        real(*args, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    remove(locate(tmp_path / "first"))
    assert not os.listdir(tmp_path)


def test_what_a_killed_run_was_removing_is_removed(tmp_path):
    (tmp_path / ".second.partial.0123").mkdir()
    (tmp_path / ".second.partial").mkdir()
    save(tmp_path / "second")
    assert os.listdir(tmp_path) == ["second"]


class FullDisk(MemoryFileSystem):
    """A disk without room from the n-th file on."""

    protocol = "full"
    store: dict[str, Any] = {}  # noqa: RUF012 (as its parent's)
    pseudo_dirs = [""]  # noqa: RUF012
    room = itertools.repeat(True)

    def _open(self, path, mode="rb", **options):
        if mode != "rb" and not next(self.room):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return super()._open(path, mode, **options)


@pytest.mark.parametrize("files", range(7))
def test_a_full_disk(monkeypatch, files: int):
    """Whichever file finds no room (a mark, two shards, two records, metadata, checksums), none is left."""
    fsspec.register_implementation("full", FullDisk, clobber=True)
    first, second = f"full://{files}/first", f"full://{files}/second"
    save(first)
    monkeypatch.setattr(FullDisk, "room", itertools.chain([True] * files, itertools.repeat(False)))
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(second)
    monkeypatch.undo()
    assert not FullDisk().exists(f"{files}/second")
    assert_whole(restore(first))
    save(second)
    assert_whole(restore(second))
