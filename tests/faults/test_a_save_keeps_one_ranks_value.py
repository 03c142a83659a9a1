"""A save keeps one value for all ranks only where all have it; what each rank has of its own comes back to it.

The table is over kinds of leaf, what `patterns=` says of them, and meshes; the oracle is what each rank had.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import functitan as ft
from functitan.checkpoint import Manager, per_rank
from functitan.errors import CheckpointError, FunctitanError

RULES = ft.AxisRules({"embed": "fsdp", "mlp": None})
DECLARED = {"w": ft.Param("embed mlp", (8, 4)), "scale": ft.Param("mlp", (4,))}
MESHES = [dict(dp=2), dict(fsdp=2), dict(dp=2, fsdp=2)]
OWN: dict[str, Callable[[Any], Any]] = {  # what differs from rank to rank
    "shards": lambda mesh: torch.full((4, 4), float(mesh.rank)),
    "last bit": lambda mesh: torch.ones(3).view(torch.int32).add_(mesh.rank).view(torch.float32),
    "sign of zero": lambda mesh: torch.zeros(3) * (-1.0 if mesh.rank else 1.0),
    "two signs": lambda mesh: torch.tensor([1.0, 1.0]) * (-1.0 if mesh.rank else 1.0),
    "order": lambda mesh: torch.arange(4).roll(mesh.rank),
    "far apart": lambda mesh: torch.arange(2**18 + 3).eq(2**18 + mesh.rank % 2),
    "bfloat16": lambda mesh: torch.full((5,), 1.0 + mesh.rank, dtype=torch.bfloat16)[1:],
    "complex": lambda mesh: torch.tensor([1 + 1j]).conj() if mesh.rank else torch.tensor([1 + 1j]),
    "key": lambda mesh: ft.random.key(mesh.rank),
    "int": lambda mesh: mesh.rank,
    "big int": lambda mesh: 2**70 + mesh.rank,
    "str": lambda mesh: f"file {mesh.rank}",
    "bool or int": lambda mesh: True if mesh.rank else 1,
    "float": lambda mesh: float("nan") if mesh.rank else 0.5,
    "loader": lambda mesh: {"epoch": 1, "place": [10 * mesh.rank, 7]},
    "shape": lambda mesh: torch.ones(2 + mesh.rank),
    "dtype": lambda mesh: torch.ones(2, dtype=torch.float64 if mesh.rank else torch.float32),
    "tree": lambda mesh: {"a": 1, "b": [torch.ones(2)] * mesh.rank},
}
EQUAL = {
    name: (lambda mesh, value=value: value(mesh._replace(coordinate=(0,) * len(mesh.coordinate))))
    for name, value in OWN.items()
}


def same(one: Any, other: Any) -> bool:
    """True for trees of one structure, dtypes and bits."""
    bits = lambda x: (
        x.dtype,
        x.shape,
        x.resolve_conj().numpy(force=True).tobytes() if x.dtype != torch.bfloat16 else x.tolist(),
    )
    plain = lambda x: bits(x) if isinstance(x, torch.Tensor) else (type(x), repr(x))
    return ft.tree.flatten(one)[1] == ft.tree.flatten(other)[1] and [*map(plain, ft.tree.leaves(one))] == [
        *map(plain, ft.tree.leaves(other))
    ]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_what_is_not_equal_on_all_ranks_is_refused_or_kept_for_each(tmp_path, sizes: dict[str, int]):
    """Not declared and different: one error on every rank, and nothing is written. Said to be each rank's own: kept."""

    def run(mesh, name: str, kinds: dict[str, Callable[[Any], Any]], pattern: Any):
        tree = {"step": 3, "x": {kind: value(mesh) for kind, value in kinds.items()}}
        options = {"patterns": {"step": None, "x": pattern}, "mesh": mesh, "rules": RULES}
        try:
            ft.checkpoint.save(tmp_path / name, tree, **options)
        except CheckpointError as error:
            return str(error)
        back = ft.checkpoint.restore(tmp_path / name, tree, **options)
        return [kind for kind in kinds if not same(back["x"][kind], tree["x"][kind])]

    on = ft.simulate(timeout=30, **sizes)(run)
    errors = on("differ", OWN, None)
    assert len(set(errors)) == 1 and not os.listdir(tmp_path)
    for kind in OWN:
        assert f"\n  - x.{kind}" in errors[0]
    assert "step" not in errors[0] and "patterns={'ema': ft.checkpoint.per_rank}" in errors[0]
    assert on("own", OWN, per_rank) == on("equal", EQUAL, None) == [[]] * len(errors)


@pytest.mark.parametrize("kind", OWN)
def test_one_leaf_alone_is_found(tmp_path, kind: str):
    def run(mesh):
        with pytest.raises(CheckpointError, match="\n  - x") as error:
            ft.checkpoint.save(tmp_path / "saved", {"x": OWN[kind](mesh)}, mesh=mesh, rules=RULES)
        return str(error.value)

    assert len(set(ft.simulate(dp=2)(run)())) == 1


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_an_average_of_the_weights_beside_a_train_state(tmp_path, sizes: dict[str, int]):
    """Its shards come back by their pattern. Without it they are refused where ranks have other ones, by path."""

    def run(mesh, name: str, patterns: Any):
        state = ft.TrainState.create(DECLARED, ft.optim.sgd(0.1), ft.random.key(0), mesh=mesh, rules=RULES)
        tree = {"train": state, "ema": ft.tree.map(lambda x: x.clone() * 0.5, state.params)}
        try:
            ft.checkpoint.save(tmp_path / name, tree, patterns=patterns)
        except CheckpointError as error:
            return str(error)
        return same(ft.checkpoint.restore(tmp_path / name, tree, patterns=patterns)["ema"], tree["ema"])

    on = ft.simulate(**sizes)(run)
    assert all(got is True for got in on("declared", {"train": None, "ema": DECLARED}))
    assert all(got is True for got in on("own", {"train": None, "ema": per_rank}))
    for got in on("neither", None):
        assert got is True if "fsdp" not in sizes else ("ema.w ((4, 4) float32, no pattern) differs" in got)
        assert got is True or "ema.scale" not in got


def test_replicas_by_their_pattern_that_differ(tmp_path):
    """The classic slip, a key of each rank's own for the weights. They may differ by rounding, as on accelerators."""

    def run(mesh, name: str, change: float):
        params = ft.init(DECLARED, ft.random.key(0), mesh=mesh, rules=RULES)
        params["w"] = params["w"] * (1 + mesh.index(("dp",)) * change)
        try:
            ft.checkpoint.save(tmp_path / name, params, patterns=DECLARED, mesh=mesh, rules=RULES)
        except CheckpointError as error:
            return str(error)

    on = ft.simulate(dp=2, fsdp=2)(run)
    assert on("rounded", 1e-7) == on("same", 0.0) == [None] * 4
    for text in on("other", 0.1):
        assert "w ((8, 4) float32, 'embed mlp') differs: ranks 0 and 2, along dp" in text
        assert "start them from one key" in text and "scale" not in text


def test_a_rank_that_fails_or_has_another_tree_leaves_no_other_waiting(tmp_path):
    def run(mesh):
        tree = {"a.b": 1, "a": {"b": 2}} if mesh.rank else {"a": {"b": 2}}
        with pytest.raises(FunctitanError):
            ft.checkpoint.save(tmp_path / "saved", tree, mesh=mesh, rules=RULES)
        return True

    assert ft.simulate(timeout=30, dp=2)(run)() == [True, True]
    assert not os.listdir(tmp_path)


def test_a_manager_keeps_what_each_rank_has_and_refuses_what_differs(tmp_path):
    def run(mesh):
        like = {"loader": 0, "w": torch.zeros(2)}
        options = dict(mesh=mesh, rules=RULES, patterns={"loader": per_rank, "w": None}, every_steps=1)
        manager = Manager(tmp_path, **options)
        manager.step(1, {"loader": mesh.rank, "w": torch.ones(2)})
        manager.wait()
        with pytest.raises(CheckpointError, match=r"w .* differs"):
            manager.step(2, {"loader": mesh.rank, "w": torch.full((2,), float(mesh.rank))})
        return Manager(tmp_path, **options).restore(like)["loader"], manager.steps()

    assert ft.simulate(dp=2)(run)() == [(0, [1]), (1, [1])]


def test_a_whole_train_state_of_each_rank_trains_on_alone(tmp_path):
    def run(mesh):
        state = ft.TrainState.create(DECLARED, ft.optim.sgd(0.1), ft.random.key(mesh.rank))
        options = dict(mesh=mesh, rules=RULES, patterns=per_rank)
        ft.checkpoint.save(tmp_path / "saved", state, **options)
        back = ft.checkpoint.restore(tmp_path / "saved", state, **options)
        return back.mesh is None and same(back, state)

    assert ft.simulate(dp=2)(run)() == [True, True]


def saved_by(ranks: int, path: Path, pattern: Any) -> None:
    def run(mesh):
        own = mesh.rank if pattern is per_rank else 7
        options = dict(mesh=mesh, rules=RULES, patterns={"loader": pattern, "step": None})
        ft.checkpoint.save(path, {"loader": {"place": own}, "step": 3}, **options)

    ft.simulate(dp=ranks)(run)()


def test_another_number_of_ranks_another_pattern_or_no_pattern_is_told(tmp_path):
    saved_by(2, tmp_path / "own", per_rank)
    saved_by(2, tmp_path / "shared", None)
    like = {"loader": {"place": 0}, "step": 0}
    own = {"loader": per_rank, "step": None}
    with pytest.raises(
        CheckpointError, match=r"loader.place is each rank's own, of 2 ranks, and here are 1(.|\n)*None"
    ):
        ft.checkpoint.restore(tmp_path / "own", like, patterns=own)
    with pytest.raises(CheckpointError, match=r"loader.place is each rank's own, of 2 ranks, and here it is asked for"):
        ft.checkpoint.restore(tmp_path / "own", like)
    with pytest.raises(CheckpointError, match=r"loader.place is one value of all ranks in the checkpoint"):
        ft.checkpoint.restore(tmp_path / "shared", like, patterns=own)
    with pytest.raises(CheckpointError, match=r"loader.place a scalar is only in the checkpoint"):
        ft.checkpoint.restore(tmp_path / "own", {"step": 0})
    assert ft.checkpoint.restore(tmp_path / "own", {"step": 0}, partial=True) == {"step": 3}


def test_what_only_the_checkpoint_knows_comes_back_by_name(tmp_path):
    saved_by(2, tmp_path / "own", per_rank)
    places = {f"loader.place[rank {rank} of 2]": rank for rank in range(2)}
    assert ft.checkpoint.restore(tmp_path / "own", None) == {**places, "step": 3}
    ft.checkpoint.save(tmp_path / "grown", {"history": [5, 6], "w": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"history\.1 a scalar is only in the checkpoint"):
        ft.checkpoint.restore(tmp_path / "grown", {"history": [0], "w": torch.ones(2)})
    back = ft.checkpoint.restore(tmp_path / "grown", None)
    assert same(back, {"history.0": 5, "history.1": 6, "w": torch.ones(2)})


def test_a_leaf_of_one_pipeline_stage_that_no_rank_would_write_is_told(tmp_path):
    def run(mesh):
        tree = {"step": 1, "x": torch.ones(2)} if mesh.place else {"step": 1}
        with pytest.raises(CheckpointError, match="x is not on the stage whose ranks write it: ranks 0 and 1") as error:
            ft.checkpoint.save(tmp_path / "saved", tree, mesh=mesh, rules=RULES)
        ft.checkpoint.save(tmp_path / "saved", {"step": 1}, mesh=mesh, rules=RULES)
        with pytest.raises(CheckpointError, match=r"step .* differs: ranks 0 and 1, along pp"):
            ft.checkpoint.save(tmp_path / "other", {"step": mesh.rank}, mesh=mesh, rules=RULES)
        return str(error.value)

    assert len(set(ft.simulate(pp=2)(run)())) == 1


class Colour(enum.IntEnum):
    RED = 1


class Name(str):
    pass


@pytest.mark.parametrize(
    "leaf",
    [b"bytes", numpy.float64(0.5), numpy.ones(2), Colour.RED, Name("x"), 1j, object(), torch.eye(2).to_sparse()]
    + [torch.empty(2, device="meta"), ft.Param("mlp", (4,))],
    ids=lambda leaf: type(leaf).__name__,
)
def test_a_leaf_that_would_not_come_back_is_refused(tmp_path, leaf: Any):
    with pytest.raises(FunctitanError, match="x is "):
        ft.checkpoint.save(tmp_path / "saved", {"x": leaf})
    assert not os.listdir(tmp_path)
    assert leaf is not None


def test_opaque_leaves_come_back(tmp_path):
    tree = {"none": None, "int": -(2**200), "text": "\ud800\0'", "float": float("-inf"), "bool": False, "empty": {}}
    ft.checkpoint.save(tmp_path / "saved", tree)
    assert ft.checkpoint.restore(tmp_path / "saved", tree) == tree
