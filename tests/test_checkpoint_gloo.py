"""Checkpoints of real processes: 2 over gloo, one process, and a virtual mesh read each other's.

All that needs processes runs in one launch; the oracle is the tree of global values.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_checkpoint import MESHES, assert_same, created, declared, interrupted, on, resumed, trained, whole

import functitan as ft
from functitan.checkpoint import Manager
from functitan.errors import CheckpointError

SOURCES = {"alone": {}, "fsdp2": dict(fsdp=2), "tp2": dict(tp=2)}


def until_told(mesh: Any, folder: str) -> list[int]:
    """The steps of a run whose second process gets SIGTERM."""
    state = created(mesh)
    with Manager(folder, every_steps=1000) as manager:
        for n in range(1, 20):
            state, _ = trained(state, 1)
            if n == 3 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            manager.step(n, state)
            if manager.stopping:
                break
    return [n, *manager.steps()]


def failing(mesh: Any, folder: str) -> str:
    """The error of this process where the other one's file is damaged while both restore."""
    state = created(mesh)
    ft.checkpoint.save(f"{folder}/damaged", state)
    dist.barrier()
    if dist.get_rank() == 0:
        path = Path(folder, "damaged", "__1_0.distcp")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    dist.barrier()
    with pytest.raises(CheckpointError) as error:
        ft.checkpoint.restore(f"{folder}/damaged", state)
    return str(error.value)


def own(mesh: Any, folder: str) -> tuple[str, int]:
    """The error of a leaf that differs, and what came back of one that each process has of its own."""
    rank, options = dist.get_rank(), dict(mesh=mesh, rules=ft.AxisRules({}))
    with pytest.raises(CheckpointError) as error:
        ft.checkpoint.save(f"{folder}/own", {"loader": rank, "w": torch.full((3,), 1.0 + rank)}, **options)
    options["patterns"] = {"loader": ft.checkpoint.per_rank}
    ft.checkpoint.save(f"{folder}/own", {"loader": {"place": 10 + rank}}, **options)
    return str(error.value), ft.checkpoint.restore(f"{folder}/own", {"loader": {"place": 0}}, **options)["loader"][
        "place"
    ]


def pair(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    meshes = {"fsdp2": ft.make_mesh(fsdp=2), "tp2": ft.make_mesh(tp=2)}
    result: dict[str, Any] = {}
    for name, mesh in meshes.items():
        result[name] = interrupted(mesh, f"{folder}/gloo {name}")
        for source in SOURCES:
            result[name, source] = resumed(mesh, f"{folder}/{source}")
    mesh = meshes["fsdp2"]
    result["stopped"] = until_told(mesh, f"{folder}/stopped")
    with Manager(f"{folder}/background", every_steps=1) as manager:
        state = created(mesh)
        for n in range(1, 4):
            state, _ = trained(state, 1)
            manager.step(n, state)
    result["background"] = whole(state), manager.steps()
    result["failing"] = failing(mesh, folder)
    result["own"] = own(mesh, folder)
    return result


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """(folder, what this process saved in it, what each of the two did)."""
    folder = str(tmp_path_factory.mktemp("gloo"))
    here = {name: on(sizes, interrupted, f"{folder}/{name}")[0] for name, sizes in SOURCES.items()}
    return folder, here, ft.launch(pair, folder, nprocs=2, timeout=200)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", ["fsdp2", "tp2"])
def test_two_processes_restore_what_one_process_and_threads_saved(ran, source: str, target: str):
    _, here, processes = ran
    saved, losses = here[source]
    for result in processes:
        values, after = result[target, source]
        assert_same(values, saved)
        torch.testing.assert_close(after, losses, rtol=1e-4, atol=0)  # float32 sums in other orders


@pytest.mark.parametrize("source", ["fsdp2", "tp2"])
@pytest.mark.parametrize("target", range(len(MESHES)))
def test_one_process_and_threads_restore_what_two_processes_saved(ran, source: str, target: int):
    folder, _, processes = ran
    saved, losses = processes[0][source]
    for values, after in on(MESHES[target], resumed, f"{folder}/gloo {source}"):
        assert_same(values, saved)
        torch.testing.assert_close(after, losses, rtol=1e-4, atol=0)  # float32 sums in other orders


def test_all_processes_save_and_leave_when_one_is_told_to(ran):
    assert [result["stopped"] for result in ran[2]] == [[3, 3]] * 2


def test_processes_save_in_the_background(ran):
    folder, _, processes = ran
    values, steps = processes[0]["background"]
    assert steps == [1, 2, 3]
    assert_same(whole(ft.checkpoint.restore(f"{folder}/background/step_00000003", declared(None))), values)


def test_a_damaged_file_is_an_error_in_every_process(ran):
    for result in ran[2]:
        assert "__1_0.distcp is damaged" in result["failing"]


def test_processes_compare_before_they_save_and_keep_what_each_has(ran):
    (text, first), (other, second) = (result["own"] for result in ran[2])
    assert text == other and (first, second) == (10, 11)
    for path in ("loader", "w"):
        assert f"{path} (" in text and "differs: ranks 0 and 1, along fsdp" in text
