"""A run that goes back, starts again, prunes, and shares its directory with other files.

The oracle is a model of the directory, written as a list of saves; nothing that no manager wrote ever goes.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.distributed import checkpoint as dcp

import functitan as ft
from functitan.checkpoint import Manager, history
from functitan.checkpoint.files import sealed
from functitan.errors import CheckpointError, FunctitanError


def state_at(step: int, value: float = 0.0) -> dict[str, Any]:
    return {"w": torch.full((3,), float(value or step)), "step": step}


def manager(folder: Any, **options: Any) -> Manager:
    return Manager(folder, **{"every_steps": 1, "background": False, **options})


def run(managed: Manager, steps: range, sign: float = 1.0) -> None:
    for n in steps:
        managed.step(n, state_at(n, sign * n))
    managed.wait()


def newest(folder: Any) -> float:
    return manager(folder).restore(state_at(0))["w"][0].item()


class Directory(RuleBasedStateMachine):
    """Saves, ways back, restarts, and strangers' files, in any order. The model is `saves`, in the order of writing."""

    @initialize(keep_last=st.sampled_from([None, 1, 2, 3]), keep_every=st.sampled_from([None, 4]), url=st.booleans())
    def begin(self, keep_last: int | None, keep_every: int | None, url: bool) -> None:
        self.folder = ("memory:/" if url else "") + tempfile.mkdtemp()
        self.options = {"keep_last": keep_last, "keep_every": keep_every}
        self.saves: list[tuple[int, float, bool]] = []  # step, value, whether the run has left it behind
        self.strangers: dict[str, bytes] = {}
        self.value, self.at = 0.0, 0
        self.manager = manager(self.folder, **self.options)
        self.manager.restore(state_at(0))

    @rule(step=st.integers(1, 5))
    def save(self, step: int) -> None:
        self.at, self.value = self.at + step, self.value + 1
        self.manager.step(self.at, state_at(self.at, self.value))
        left = [(step, value, left or step >= self.at) for step, value, left in self.saves]
        left = [(step, value, left) for step, value, left in left if not (left and step <= self.at)]
        last, every = self.options["keep_last"], self.options["keep_every"]
        kept = [*left, (self.at, self.value, False)]
        for one in sorted(kept, key=lambda one: not one[2])[: -last if last else 0]:
            if every is None or one[0] % every:
                kept.remove(one)
        self.saves = kept

    @rule()
    def restart(self) -> None:
        self.manager = manager(self.folder, **self.options)
        back = self.manager.restore(state_at(0))
        self.at = 0 if back is None else back["step"]

    @precondition(lambda self: self.saves)
    @rule(data=st.data(), restart=st.booleans())
    def go_back(self, data: st.DataObject, restart: bool) -> None:
        step, value, _ = data.draw(st.sampled_from(self.saves))
        if restart:
            self.manager = manager(self.folder, **self.options)
        back = self.manager.restore(state_at(0), step=step)
        assert back["step"] == step and back["w"][0].item() == value
        self.at = step

    @rule(name=st.sampled_from(["step_100", "step_1000/x", ".step_2.partial/x", "step_00000900/.metadata", "notes"]))
    def stranger(self, name: str) -> None:
        fs, path = fsspec.core.url_to_fs(f"{self.folder}/{name}")
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        if not fs.exists(path):
            fs.pipe_file(path, b"other")
        self.strangers[path] = b"other"

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "saves"):
            return
        fs, _ = fsspec.core.url_to_fs(self.folder)
        assert all(fs.cat_file(path) == data for path, data in self.strangers.items())
        assert manager(self.folder).steps() == sorted({step for step, _, _ in self.saves})
        if self.saves:
            assert newest(self.folder) == self.saves[-1][1]


Directory.TestCase.settings = settings(max_examples=12, stateful_step_count=12)
TestDirectory = Directory.TestCase


@pytest.mark.parametrize(
    "every, options", [(2, {}), (1, {"keep_last": 2}), (3, {"keep_every": 2}), (2, {"background": True})]
)
def test_a_run_goes_back_and_on(tmp_path, every: int, options: dict[str, int]):
    run(manager(tmp_path, every_steps=2, **options), range(1, 7))
    again = manager(tmp_path, every_steps=every, **options)
    steps = again.steps()
    start = again.restore(state_at(0), step=steps[0])["step"]
    for n in range(start + 1, 7):
        again.step(n, state_at(n, -n))
        again.wait()
        assert n % every or newest(tmp_path) == -n
    assert newest(tmp_path) == -6.0


def test_another_interval_after_going_back_does_not_lose_what_was_written_last(tmp_path):
    run(manager(tmp_path, every_steps=10, keep_last=2), range(10, 31))
    again = manager(tmp_path, every_steps=3, keep_last=1)
    again.restore(state_at(0), step=20)
    for n in range(21, 28):
        again.step(n, state_at(n, -n))
        assert n % 3 or (again.steps() == [n] and newest(tmp_path) == -n)


def test_a_look_at_an_earlier_checkpoint_is_no_way_back(tmp_path):
    managed = manager(tmp_path, every_steps=2)
    run(managed, range(1, 7))
    managed.restore(state_at(0), step=2)
    run(managed, range(7, 9))
    assert managed.steps() == [2, 4, 6, 8] and newest(tmp_path) == 8.0


def test_the_old_one_is_there_until_the_new_one_is_whole(tmp_path, monkeypatch):
    run(manager(tmp_path), range(1, 5))
    again = manager(tmp_path)
    again.restore(state_at(0), step=2)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left"):
        again.step(3, state_at(3, -3))
    monkeypatch.undo()
    assert again.steps() == [1, 2, 3, 4] and newest(tmp_path) == 4.0
    assert again.restore(state_at(0), step=3)["w"][0] == 3.0


def test_only_what_managers_wrote_is_ever_removed(tmp_path):
    """A checkpoint by `ft.checkpoint.save` or torch, of another tool, or of a name that only looks alike."""
    ft.checkpoint.save(tmp_path / "step_100", state_at(100))
    ft.checkpoint.save(tmp_path / "step_00000001", state_at(1, 11))
    dcp.save({"x": torch.ones(2)}, checkpoint_id=str(tmp_path / "step_00000002"), no_dist=True)
    for name in ("step_1000", "step_000000003", "step_00000004", ".step_00000005.partial", "step_00000006.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.bin").write_bytes(b"weights")
    (tmp_path / "step_00000007").write_bytes(b"a file")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    managed = manager(tmp_path, keep_last=1)
    run(managed, range(1, 10))
    assert managed.steps() == [1, 9] and newest(tmp_path) == 9.0
    assert {path: path.read_bytes() for path in before} == before
    assert managed.restore(state_at(0), step=1)["w"][0] == 11.0


def test_a_checkpoint_from_before_there_were_marks_is_gone_on_from(tmp_path):
    ft.checkpoint.save(tmp_path / "step_00000006", state_at(6))
    managed = manager(tmp_path, keep_last=1)
    assert managed.restore(state_at(0))["step"] == 6
    run(managed, range(7, 9))
    assert managed.steps() == [6, 8] and newest(tmp_path) == 8.0


def test_what_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    managed = manager(tmp_path, keep_last=1)
    run(managed, range(1, 2))
    real = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: real(a, b) if "partial" in str(a) else denied(a))
    with pytest.warns(UserWarning, match=r"removing old checkpoints(.|\n)*denied(.|\n)*the run goes on"):
        run(managed, range(2, 4))
    monkeypatch.undo()
    assert newest(tmp_path) == 3.0
    with warnings.catch_warnings(action="error"):
        run(managed, range(4, 5))
    assert managed.steps() == [4]


def denied(path: Any) -> None:
    raise PermissionError(13, "denied", str(path))


def test_another_run_in_the_directory_is_told_before_it_trains(tmp_path):
    run(manager(tmp_path, every_steps=2), range(1, 7))
    other = manager(tmp_path, every_steps=100)
    with pytest.raises(CheckpointError, match=rf"another run: 3 steps up to 6, the last by process {os.getpid()}"):
        other.step(1, state_at(1))
    assert manager(tmp_path).steps() == [2, 4, 6]


@pytest.mark.parametrize("sizes", [{}, {"dp": 2}], ids=str)
def test_two_managers_at_once_are_told_on_every_rank(tmp_path, sizes: dict[str, int]):
    def both(mesh):
        options = dict(mesh=mesh, rules=ft.AxisRules({}))
        one, two = manager(tmp_path, **options), manager(tmp_path, **options)
        for each in (one, two):
            assert each.restore(state_at(0)) is None
        one.step(1, state_at(1))
        with pytest.raises(CheckpointError) as error:
            two.step(2, state_at(2))
        one.step(2, state_at(2))
        return str(error.value)

    texts = ft.simulate(**sizes)(both)() if sizes else [both(None)]
    assert "step_00000001 was saved meanwhile by process" in texts[0] and len(texts) == len(sizes) + 1
    assert manager(tmp_path).steps() == [1, 2]


@pytest.mark.parametrize("step", [-1, 1.0, True, "4", None, torch.tensor(4)], ids=repr)
def test_a_step_is_a_whole_number(tmp_path, step: Any):
    managed = manager(tmp_path)
    calls = [lambda: managed.step(step, {}), lambda: managed.save(step, {})]
    for call in calls if step is None else [*calls, lambda: managed.restore({}, step=step)]:
        with pytest.raises(FunctitanError, match="a whole number of at least 0"):
            call()


def test_a_damaged_mark_is_told_where_the_order_is_asked_for(tmp_path):
    run(manager(tmp_path), range(1, 4))
    for damage in (b"", b"00000000\n[1]", sealed([-1, "", ""]), sealed({"order": 4})):
        (tmp_path / "step_00000003" / "manager.json").write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"step_00000003/manager.json is damaged(.|\n)*of \[1, 2, 3\]"):
            manager(tmp_path).restore(state_at(0))
    again = manager(tmp_path, keep_last=1)
    assert again.restore(state_at(0), step=3)["w"][0] == 3.0
    run(again, range(4, 5))
    assert again.steps() == [3, 4]  # what has no readable mark is not removed


def test_what_is_overtaken_and_what_is_kept():
    saved = [history.Saved(str(n), step, n) for n, step in enumerate([2, 4, 6, 8, 4, 5])]
    assert [one.name for one in history.overtaken(saved)] == ["3", "2", "1"]
    assert [one.name for one in history.removable(saved, None, None)] == ["1"]
    assert sorted(one.name for one in history.removable(saved, 2, None)) == ["0", "1", "2", "3"]
    assert sorted(one.name for one in history.removable(saved, 2, 8)) == ["0", "1", "2"]
