"""When a manager saves, what it keeps, and that training goes on meanwhile."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import functitan as ft
from functitan.checkpoint import Manager
from functitan.errors import CheckpointError, FunctitanError


def state_at(step: int) -> dict[str, Any]:
    return {"w": torch.full((3,), float(step)), "step": step}


def run(manager: Manager, steps: range) -> list[dict[str, float]]:
    return [manager.step(n, state_at(n)) for n in steps]


@pytest.mark.parametrize("background", [False, True], ids=["blocking", "background"])
@pytest.mark.parametrize("url", ["{}", "memory:/{}"], ids=["local", "memory"])
def test_it_keeps_the_last_and_every_nth(tmp_path, url: str, background: bool):
    options = dict(every_steps=2, keep_last=2, keep_every=6, background=background)
    with Manager(url.format(tmp_path / "run"), **options) as manager:
        assert manager.restore(state_at(0)) is None
        run(manager, range(1, 16))
    assert manager.steps() == [6, 12, 14]
    assert manager.restore(state_at(0))["step"] == 14
    assert manager.restore(state_at(0), step=6)["step"] == 6


def test_it_saves_by_time(tmp_path):
    with Manager(tmp_path, every_seconds=0.05, background=False) as manager:
        run(manager, range(1, 4))
        time.sleep(0.06)
        run(manager, range(4, 5))
    assert 4 in manager.steps() and len(manager.steps()) < 4


def test_all_ranks_save_and_stop_when_one_of_them_must(tmp_path):
    asked = threading.Event()

    def train(mesh):
        with Manager(tmp_path, mesh=mesh, rules=ft.AxisRules({}), stop=lambda: mesh.rank == 1 and asked.is_set()) as m:
            for n in range(1, 10):
                if n == 5 and mesh.rank == 1:
                    asked.set()
                m.step(n, state_at(n))
                if m.stopping:
                    return n

    assert ft.simulate(dp=2)(train)() == [5, 5]
    assert Manager(tmp_path).steps() == [5]


def test_what_a_killed_run_has_left_is_invisible_and_removed(tmp_path):
    whole = Manager(tmp_path, every_steps=1, background=False)
    run(whole, range(1, 2))
    (tmp_path / ".step_00000007.partial").mkdir()
    (tmp_path / ".step_00000007.partial" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "step_00000008").mkdir()  # as on a file system without renames
    (tmp_path / "step_00000008" / ".metadata").write_bytes(b"half")
    shutil.copy(tmp_path / "step_00000001" / "manager.json", tmp_path / "step_00000008")  # what a manager writes first
    again = Manager(tmp_path, every_steps=1, background=False)
    assert again.steps() == [1] and again.restore(state_at(0))["step"] == 1
    run(again, range(2, 3))
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002"]


def test_the_checkpoint_before_a_damaged_one_still_loads(tmp_path):
    manager = Manager(tmp_path, every_steps=1, background=False)
    run(manager, range(1, 3))
    path = tmp_path / "step_00000002" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="step_00000002"):
        manager.restore(state_at(0))
    assert manager.restore(state_at(0), step=1)["step"] == 1


class Slow(MemoryFileSystem):
    """A disk that writes when it may."""

    protocol = "slow"
    store: dict[str, Any] = {}  # noqa: RUF012 (as its parent's)
    pseudo_dirs = [""]  # noqa: RUF012
    may = threading.Event()

    def _open(self, path, mode="rb", **options):
        if mode != "rb" and path.endswith("distcp"):
            assert self.may.wait(30)
        return super()._open(path, mode, **options)


def test_training_goes_on_while_a_copy_is_written_and_the_wait_is_a_metric():
    fsspec.register_implementation("slow", Slow, clobber=True)
    x = torch.zeros(4)
    with Manager("slow://run", every_steps=2) as manager:
        assert manager.step(1, {"x": x}).keys() == {"checkpoint_wait", "checkpoint_seconds"}
        Slow.may.clear()
        first = manager.step(2, {"x": x})  # returns, though nothing can be written
        assert first["checkpoint_wait"] < 0.1
        x += 1  # the step donates its state
        assert manager.steps() == []
        threading.Timer(0.3, Slow.may.set).start()
        second = manager.step(4, {"x": x})
        assert 0.2 < second["checkpoint_wait"] <= second["checkpoint_seconds"]
    saved = [manager.restore({"x": x}, step=n)["x"] for n in manager.steps()]
    assert torch.equal(torch.stack(saved), torch.tensor([[0.0] * 4, [1.0] * 4]))


def test_an_error_in_the_background_is_raised_by_the_next_save(tmp_path, monkeypatch):
    manager = Manager(tmp_path / "run", every_steps=1)
    manager.step(1, state_at(1))
    manager.wait()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    manager.step(2, state_at(2))
    with pytest.raises(CheckpointError, match="No space left on device"):
        manager.step(3, state_at(3))
    monkeypatch.undo()
    assert manager.steps() == [1] and os.listdir(tmp_path / "run") == ["step_00000001"]
    manager.step(4, state_at(4))
    manager.wait()
    assert manager.steps() == [1, 4]


def test_bad_intervals_are_named(tmp_path):
    with pytest.raises(FunctitanError, match=r"every_steps is 0(.|\n)*keep_last is 1.5(.|\n)*every_seconds is -1"):
        Manager(tmp_path, every_steps=0, keep_last=1.5, every_seconds=-1)


def test_a_rank_that_is_a_thread_is_told_how_to_stop(tmp_path):
    def train(mesh):
        with Manager(tmp_path):
            pass

    with pytest.raises(FunctitanError, match=r"around ft[.]simulate"):
        ft.simulate(dp=2)(train)()


def test_staged_buffers_are_used_again(tmp_path: Path):
    manager = Manager(tmp_path, every_steps=1)
    places = []
    for n in range(1, 4):
        manager.step(n, state_at(n))
        places.append(manager._buffers["w"].data_ptr())
        manager.wait()
    assert len(set(places)) == 1
