"""A checkpoint is the same on every mesh: saved on one, restored on any other, read by torch's own tools.

The oracle is the tree of global values, by `ft.unshard`, and an uninterrupted run.
"""

from __future__ import annotations

import itertools
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import functitan as ft
from functitan.checkpoint.dcp import unpacked
from functitan.models import llama

CONFIG = llama.LlamaConfig(100, 16, 1, 4, 2, 4, 32)
DECLARED = llama.params(CONFIG)
TX = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-2))
STEP = ft.train_step(lambda params, batch, key: llama.loss(params, batch, CONFIG), TX, check=False)
MESHES = [{}, dict(fsdp=2), dict(tp=2), dict(dp=2, fsdp=2), dict(fsdp=2, tp=2)]
BEFORE, AFTER = 2, 2  # steps before the save, and after it


def on(sizes: dict[str, int], fn: Any, *args: Any) -> list[Any]:
    """The result of each rank of a virtual mesh; of one process without a mesh."""
    return ft.simulate(**sizes)(fn)(*args) if sizes else [fn(None, *args)]


def batch_at(cursor: int) -> dict[str, torch.Tensor]:
    rows = torch.randint(0, CONFIG.vocab_size, (4, 9), generator=torch.Generator().manual_seed(cursor))
    return {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


def created(mesh: Any) -> dict[str, Any]:
    return {"train": ft.TrainState.create(DECLARED, TX, ft.random.key(0), mesh=mesh, rules=llama.RULES), "cursor": 0}


def declared(mesh: Any, rules: ft.AxisRules = llama.RULES) -> dict[str, Any]:
    state = ft.TrainState.declare(DECLARED, TX, ft.random.key(1), mesh=mesh, rules=rules)
    return {"train": state, "cursor": 0}


def trained(state: dict[str, Any], steps: int) -> tuple[dict[str, Any], list[float]]:
    losses, train, cursor = [], state["train"], state["cursor"]
    for _ in range(steps):
        batch = ft.shard(batch_at(cursor), "batch seq", mesh=train.mesh, rules=llama.RULES)
        train, metrics = STEP(train, batch)
        losses.append(metrics["loss"].item())
        cursor += 1
    return {"train": train, "cursor": cursor}, losses


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """{path: global value}, copied: a step donates."""
    train = state["train"]
    parts, patterns = (train.params, train.opt_state), (train.declarations, train.opt_declarations)
    params, opt = ft.unshard(parts, patterns, mesh=train.mesh, rules=train.rules)
    every = {"train": {"params": params, "opt_state": opt, "step": train.step, "key": train.key}}
    every["cursor"] = state["cursor"]
    copied = [x.clone() if isinstance(x, torch.Tensor) else x for x in ft.tree.leaves(every)]
    return dict(zip(ft.tree.paths(every), copied, strict=True))


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        assert type(actual[path]) is type(value), path
        if isinstance(value, torch.Tensor):
            assert actual[path].dtype == value.dtype and torch.equal(actual[path], value), path
        else:
            assert actual[path] == value, path


def interrupted(mesh: Any, path: str) -> tuple[dict[str, Any], list[float]]:
    """Train, save and train on: the global values that were saved, and the losses after it."""
    state, _ = trained(created(mesh), BEFORE)
    ft.checkpoint.save(path, state)
    saved = whole(state)
    return saved, trained(state, AFTER)[1]


def resumed(mesh: Any, path: str) -> tuple[dict[str, Any], list[float]]:
    state = ft.checkpoint.restore(path, declared(mesh))
    return whole(state), trained(state, AFTER)[1]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Any:
    """For each mesh, made when asked for: (path, global values, losses of the run that went on)."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def made(number: int) -> tuple[str, dict[str, Any], list[float]]:
        path = str(folder / str(number))
        return path, *on(MESHES[number], interrupted, path)[0]

    return made


@pytest.mark.parametrize("source, target", list(itertools.product(range(len(MESHES)), repeat=2)))
def test_every_mesh_restores_what_any_other_saved(checkpoints, source: int, target: int):
    path, saved, losses = checkpoints(source)
    for values, after in on(MESHES[target], resumed, path):
        assert_same(values, saved)
        if source == target:
            assert after == losses
        else:
            torch.testing.assert_close(after, losses, rtol=1e-4, atol=0)  # float32 sums in other orders


@pytest.mark.parametrize("number", [0, 4])
def test_torchs_own_tools_read_the_same_tensors(checkpoints, number: int, tmp_path):
    path, saved, _ = checkpoints(number)
    dcp_to_torch_save(path, tmp_path / "all.pt")
    assert_same(torch.load(tmp_path / "all.pt", weights_only=False), saved)


def test_each_block_is_written_once_and_all_ranks_write(checkpoints):
    path, saved, _ = checkpoints(3)  # dp 2, fsdp 2: every shard is on two ranks
    sizes = [file.stat().st_size for file in sorted(Path(path).glob("*.distcp"))]
    assert len(sizes) == 4 and max(sizes) < 1.5 * min(sizes)
    tensors = sum(x.nbytes for x in saved.values() if isinstance(x, torch.Tensor))
    items = 2 * len(saved)
    assert tensors < sum(sizes) < tensors + items * 2000  # an item of torch.save has 1 to 2 KB around the bytes


def test_a_checkpoint_restores_under_another_table(checkpoints):
    path, saved, _ = checkpoints(1)
    rules = llama.RULES.replace(embed=None, mlp="fsdp")

    def restored(mesh):
        state = ft.checkpoint.restore(path, declared(mesh, rules))
        assert state["train"].params["layers"][0]["mlp"]["gate"].shape == (16, 16)
        return whole(state)

    for values in ft.simulate(fsdp=2)(restored)():
        assert_same(values, saved)


def test_optimizer_state_under_a_table_of_its_own(tmp_path):
    table = ft.AxisRules({"batch": "dp", "embed": None, "mlp": None})
    tx = ft.optim.stored(ft.optim.adamw(1e-2), rules=table.replace(embed="dp"))
    leaves = {"w": ft.Param("embed mlp", (8, 4))}
    path = str(tmp_path / "zero")

    def saved(mesh):
        state = ft.TrainState.create(leaves, tx, ft.random.key(0), mesh=mesh, rules=table)
        assert state.opt_state[0].mu["w"].shape == (4, 4)
        mu = torch.full((4, 4), float(mesh.rank))
        state = ft.tree.map(lambda x: mu if x is state.opt_state[0].mu["w"] else x, state)
        ft.checkpoint.save(path, state)
        return ft.checkpoint.restore(path, state).opt_state[0].mu["w"]

    for rank, mu in enumerate(ft.simulate(dp=2)(saved)()):
        assert torch.equal(mu, torch.full((4, 4), float(rank)))
    alone = ft.checkpoint.restore(path, ft.TrainState.declare(leaves, tx, ft.random.key(0)))
    assert torch.equal(alone.opt_state[0].mu["w"], torch.arange(2.0).repeat_interleave(4)[:, None].expand(8, 4))


def test_plain_trees_with_patterns_and_every_dtype(tmp_path):
    rules = ft.AxisRules({"rows": ("dp", "fsdp"), "columns": None})
    values = {
        str(dtype): torch.arange(32).view(8, 4).to(dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64)
    }
    rest = {
        "name": "run",
        "lr": 0.1,
        "done": False,
        "step": 3,
        "empty": torch.zeros(0, 3),
        "view": torch.arange(6)[::2],
    }

    def moved(mesh):
        shards = ft.shard(values, "rows columns", mesh=mesh, rules=rules)
        patterns = {"x": "rows columns", "rest": None}
        options = dict(patterns=patterns, mesh=mesh, rules=rules)
        ft.checkpoint.save(str(tmp_path / "plain"), {"x": shards, "rest": rest}, **options)
        return shards, ft.checkpoint.restore(str(tmp_path / "plain"), {"x": shards, "rest": rest}, **options)

    for shards, back in ft.simulate(dp=2, fsdp=2)(moved)():
        bits = lambda x: {k: v.view(torch.uint8) if v.dtype == torch.float8_e4m3fn else v for k, v in x.items()}
        assert_same(bits(back["x"]), bits(shards))
        assert_same(back["rest"], rest)


def test_a_fsspec_url_holds_a_checkpoint_too():
    url = "memory://checkpoints/first"

    def moved(mesh):
        state = created(mesh)
        ft.checkpoint.save(url, state)
        return whole(ft.checkpoint.restore(url, declared(mesh))), whole(state)

    for back, state in ft.simulate(fsdp=2)(moved)():
        assert_same(back, state)


def test_a_part_of_a_checkpoint(checkpoints):
    path, saved, _ = checkpoints(2)
    like = {"train": {"params": {"embedding": DECLARED["embedding"]}}}
    (back,) = ft.tree.leaves(ft.checkpoint.restore(path, like, partial=True))
    assert torch.equal(back, saved["train.params.embedding"])


def test_a_rank_holds_no_more_of_a_tensor_than_its_part_and_one_item(tmp_path, monkeypatch):
    """Saved whole by one process, restored on four ranks: what a rank takes from the files, item by item."""
    monkeypatch.setattr("functitan.checkpoint.dcp.ITEM_BYTES", 1024)
    declared, rules = {"w": ft.Param("embed mlp", (64, 64))}, ft.AxisRules({"embed": "fsdp", "mlp": "tp"})
    w = torch.randn(64, 64)
    ft.checkpoint.save(tmp_path / "whole", {"w": w})
    taken: dict[str, list[int]] = {}

    def counted(data: bytes) -> torch.Tensor:
        x = unpacked(data)
        taken.setdefault(threading.current_thread().name, []).append(x.nbytes)
        return x

    monkeypatch.setattr(sys.modules["functitan.checkpoint.restore"], "unpacked", counted)

    def restored(mesh):
        return ft.checkpoint.restore(tmp_path / "whole", declared, mesh=mesh, rules=rules)["w"]

    for rank, part in enumerate(ft.simulate(fsdp=4)(restored)()):
        assert torch.equal(part, w.chunk(4)[rank])
        assert max(taken[f"rank {rank}"]) <= 1024 and sum(taken[f"rank {rank}"]) == part.nbytes
