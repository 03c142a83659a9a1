"""Wrappers and passes, alone and in pairs, leave losses and gradients as they are: a part of the benchmark's table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import functitan as ft

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import combinations as table  # type: ignore[import-not-found]

ALONE = [(name,) for name in table.WRAPPERS if name not in table.INDUCTOR]  # which tests of ft.jit compile
ON_A_MESH = "remat names", "precision float32", "accumulate 2", "optim.stored", "checked", "compile"


def wrong(cells) -> dict:
    return {names: str(cell) for names, cell in cells.items() if not cell.right}


def test_every_wrapper_leaves_losses_and_gradients_unchanged():
    assert wrong(table.wrappers(None, ALONE)) == {}


def test_wrappers_of_each_kind_do_so_on_a_mesh():
    on_ranks = ft.simulate(fsdp=2)(lambda mesh: table.wrappers(mesh, [(name,) for name in ON_A_MESH]))()
    assert wrong(table.worst(on_ranks)) == {}


def test_passes_without_one_do_so_on_a_mesh(monkeypatch):  # tests/test_passes.py has each, and each pair
    monkeypatch.setattr(table, "OF_PASSES", table.CONFIG)  # one layer
    sets = [tuple(name for name in table.PASSES if name != out) for out in ("keep_gathered", "bucket_collectives")]
    assert wrong(table.worst(ft.simulate(fsdp=2)(lambda mesh: table.passes(mesh, sets))())) == {}


@pytest.mark.parametrize("value", [1.1, torch.nan])
def test_a_cell_that_differs_is_wrong(value):
    one = torch.ones(3)
    assert table.difference([one], [one]) == 0.0
    assert table.Cell(table.difference([one * value], [one]), 0.0, table.CLOSE).right is False
    assert "WRONG" in str(table.Cell(table.difference([one * value], [one]), 0.0, table.CLOSE))
    assert table.Cell(0.0, table.difference([one + 1e-7], [one]), 0.0).right is False
    assert table.Cell(0.0, table.difference([one + 1e-7], [one]), table.CLOSE).right
    assert table.worst([{(): table.Cell(0.0, 0.0, 1.0)}, {(): table.Cell(0.0, torch.nan, 1.0)}])[()].right is False
