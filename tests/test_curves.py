"""20 steps of every optimizer on real text have the same losses on every mesh: benchmarks/curves.py, smaller."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path

import pytest

from functitan.models import llama

CURVES = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "curves.py"))
SMALL = llama.LlamaConfig(257, 32, 1, 4, 2, 8, 64, rope_theta=10000.0)


@functools.cache
def text():
    return CURVES["text"](20, seq=16, batch=4)


@pytest.mark.parametrize("name", CURVES["OPTIMIZERS"])
def test_every_optimizer_has_one_curve(name):
    *meshes, with_dp = CURVES["MESHES"]
    plain, worst = CURVES["differences"](name, SMALL, text(), [with_dp] if name.startswith("stored") else meshes)
    assert plain[-1] < plain[0] - 0.3  # it learns, so its updates are seen in the losses
    assert max(worst) < CURVES["BOUNDS"][name]
