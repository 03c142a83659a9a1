"""A run that is stopped, by a signal or by SIGKILL at any moment, goes on as if it had not been.

The oracle is an uninterrupted run: its losses, bitwise on the same mesh, and its batches, each once. The runs are
children of a server that has imported everything, which makes a restart cheap.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import functitan as ft
from functitan.checkpoint import Manager

KILLS = int(os.environ.get("FUNCTITAN_KILLS", "6"))  # of each kind
STEPS = 3 * KILLS  # an attempt makes one to four steps before it is killed
RULES = ft.AxisRules({"batch": "fsdp", "seq": None, "vocab": "tp", "embed": "fsdp"})
DECLARED = {"in": ft.Param("vocab embed", (128, 16)), "out": ft.Param("embed vocab", (16, 128))}
TX = ft.optim.adamw(3e-2)
STREAM = ft.data.token_stream(
    Dataset.from_dict({"text": [f"the {n}th line of a text" for n in range(40)]}),
    ft.data.byte_encoding(),
    seq_len=8,
    batch_size=4,
    shuffle=16,
)


def loss(params, batch, key):
    x = ft.take("batch seq, vocab embed -> batch seq embed", batch["tokens"] % 128, params["in"])
    x = ft.dropout("batch seq embed", x, key, 0.1)
    logits = ft.einsum("batch seq embed, embed vocab -> batch seq vocab", x, params["out"])
    losses = ft.cross_entropy("batch seq vocab, batch seq", logits, batch["labels"] % 128)
    return ft.reduce("batch seq ->", losses), ft.count("batch seq", losses)


STEP = ft.train_step(loss, TX, check=False)


def created(mesh: Any) -> dict[str, Any]:
    train = ft.TrainState.create(DECLARED, TX, ft.random.key(0), mesh=mesh, rules=RULES)
    return {"train": train, "cursor": ft.data.Cursor()}


def train(
    mesh: Any, folder: str, steps: int = STEPS, log: str | None = None, pause: float = 0.0, **options: Any
) -> list:
    """(step, loss, cursor) of the steps from the newest checkpoint on; `log` gets each at once."""
    rows = []
    options = {"every_steps": 1, "keep_last": 2, **options}
    with Manager(folder, **options) as manager:
        state = manager.restore(created(mesh)) or created(mesh)
        for n in range(int(state["train"].step), steps):
            batch, cursor = STREAM.next_batch(state["cursor"])
            shards = ft.shard(batch, ft.data.BATCH, mesh=mesh, rules=RULES)
            new, metrics = STEP(state["train"], shards)
            state = {"train": new, "cursor": cursor}
            rows.append([n, metrics["loss"].item(), list(cursor)])
            if log:
                with open(log, "a") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
            manager.step(n + 1, state)
            if manager.stopping:
                break
            time.sleep(pause)
    return rows


def child(folder: str, log: str, options: dict[str, Any], kill_at: int | None = None) -> None:
    """A run in a process of its own; with `kill_at`, it dies at that operation on the files of checkpoints."""
    torch.set_num_threads(1)
    count = 0

    def audit(event: str, args: tuple) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and folder in str(args[0]):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at is not None:
        sys.addaudithook(audit)
    train(None, folder, log=log, **options)


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["functitan", "functitan.data", "test_checkpoint_resume"])


def start(*args: Any) -> Any:
    process = SERVER.Process(target=child, args=args)
    process.start()
    return process


def rows_of(log: Path) -> list[list[Any]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("]")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[list[Any]]:
    torch.set_num_threads(1)
    return train(None, str(tmp_path_factory.mktemp("whole")), every_steps=STEPS)


def check_curve(log: Path, uninterrupted: list[list[Any]]) -> None:
    """Every step that ran, in any attempt, had the loss and the batch of the uninterrupted run; and all steps ran."""
    rows = rows_of(log)
    for n, value, cursor in rows:
        assert [n, value, cursor] == uninterrupted[n]
    assert {n for n, _, _ in rows} == set(range(STEPS))


@pytest.mark.parametrize("background", [False, True], ids=["blocking", "background"])
def test_a_run_killed_at_random_moments_has_the_whole_curve(tmp_path, uninterrupted, background: bool):
    chance, log, folder = random.Random(background), tmp_path / "log", str(tmp_path / "run")
    options, killed = {"background": background, "pause": 0.02}, 0
    for _ in range(KILLS):
        before, process = len(rows_of(log)), start(folder, str(log), options)
        while len(rows_of(log)) == before and process.is_alive():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed > KILLS // 2  # the others had come to the end
    last = start(folder, str(log), options)
    last.join(60)
    assert last.exitcode == 0
    check_curve(log, uninterrupted)


@pytest.mark.parametrize("background", [False, True], ids=["blocking", "background"])
def test_a_run_killed_at_any_operation_on_its_files_goes_on(tmp_path, uninterrupted, background: bool):
    """Each attempt dies at the next operation: opened, renamed, removed, for a save and a half."""
    chance, log, folder = random.Random(background), tmp_path / "log", str(tmp_path / "run")
    killed = 0
    for _ in range(KILLS):
        at = chance.randrange(1, 40)
        process = start(folder, str(log), {"background": background}, at)
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 0)
        killed += process.exitcode == -signal.SIGKILL
    assert killed > KILLS // 2
    last = start(folder, str(log), {"background": background})
    last.join(60)
    assert last.exitcode == 0
    check_curve(log, uninterrupted)


def test_sigterm_saves_and_leaves_cleanly(tmp_path, uninterrupted):
    log, folder = tmp_path / "log", str(tmp_path / "run")
    process = start(folder, str(log), {"every_steps": 1000, "pause": 0.2})
    while len(rows_of(log)) < 2:
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    assert process.exitcode == 0
    done = len(rows_of(log))
    assert done < STEPS and Manager(folder).steps() == [done]
    start(folder, str(log), {}).join(60)
    assert rows_of(log) == uninterrupted


@pytest.mark.parametrize("source, target", [({}, {"fsdp": 2}), ({"fsdp": 2}, {"tp": 2}), ({"tp": 2}, {})], ids=str)
def test_a_run_goes_on_on_another_mesh_with_each_sample_once(tmp_path, uninterrupted, source: dict, target: dict):
    on = lambda sizes, *args: ft.simulate(**sizes)(part)(*args) if sizes else [part(None, *args)]
    stop = lambda: False

    def part(mesh: Any, steps: int) -> list:
        return train(mesh, str(tmp_path / "run"), steps, stop=stop)

    rows = on(source, 5)[0] + on(target, STEPS)[0]
    assert [row[2] for row in rows] == [row[2] for row in uninterrupted]
    losses = [[row[1] for row in each] for each in (rows, uninterrupted)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)  # float32 sums in other orders


def test_same_mesh_resumes_bitwise(tmp_path):
    whole = ft.simulate(fsdp=2)(train)(str(tmp_path / "whole"), stop=lambda: False)
    parts = [ft.simulate(fsdp=2)(train)(str(tmp_path / "parts"), n, stop=lambda: False) for n in (3, 7, STEPS)]
    for rank, rows in enumerate(whole):
        assert [row for part in parts for row in part[rank]] == rows
