"""The benchmark's two programs train alike, in tiny shapes, and its table says so where they do not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZES = dict(steps=4, pairs=2, batch=4, seq=16, vocab=128, embed=32, layers=2, heads=4, kv_heads=2, mlp=48)
TINY = [f"--{name.replace('_', '-')}={size}" for name, size in SIZES.items()]


def test_functitan_and_torchs_own_parallelism_have_the_same_losses():
    script = [sys.executable, str(BENCHMARKS / "step_peers.py"), *TINY]
    done = subprocess.run(script, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    _, *rows, shapes = done.stdout.splitlines()
    assert len(rows) == 3 and not any("INVALID" in row for row in rows)
    # float32 sums in other orders; losses near 5
    assert all(float(re.search(r"(\S+)$", row)[1]) < 1e-5 for row in rows)
    assert "embed 32" in shapes and "torch" in shapes


def test_a_row_whose_losses_differ_is_invalid(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from step_peers import table

    times = {"functitan": [0.2, 0.4], "peer": [0.1, 0.1]}
    row = lambda last: {"times": times, "losses": {"functitan": [5.0, last], "peer": [5.0, 4.0]}}
    _, same, other, _ = table({"a": row(4.0001), "b": row(4.001)}, {}).splitlines()
    assert same.split() == ["a", "300.0", "100.0", "3.000", "2.5e-05"]
    assert other.endswith("2.5e-04   INVALID: above 1e-4")
