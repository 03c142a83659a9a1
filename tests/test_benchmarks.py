"""The benchmarks' programs train alike, in tiny shapes, and their table says so where they do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--model=tiny", "--steps=5", "--batch=4", "--seq=16", "--no-memory", "--clip=0.1"]  # a clip that acts


def test_functitan_and_its_eager_peers_have_the_same_losses():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "step.py"), *TINY], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    names = [row[0].strip() for row in rows]
    assert names[:2] == ["functitan eager", "nn.Module, eager"] and len(names) == 6
    # float32 sums in other orders; losses near 5
    assert all(float(row[-1]) < 1e-5 for row in rows)
    assert "embed=32" in done.stdout and "torch" in done.stdout


def test_a_row_whose_losses_differ_is_invalid(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from contest import Group, Row, Sizes, table
    from peers import TINY as config

    group, sizes = Group("a group", None, (), limit=0.9), Sizes(config, 4, 16, 2, 1.0)
    peer = Row("peer", False, [0.1, 0.1], [5.0, 4.0])
    same, other = (Row(name, True, [0.2, 0.4], [5.0, last]) for name, last in (("a", 4.0001), ("b", 4.001)))
    text = table(group, [same, other, peer], sizes)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows[0] == ["a", "300.0", "3.000", "213", "", "", "2.5e-05"]
    assert rows[1][-1] == "2.5e-04  INVALID: above 0.0001" and rows[2][2] == "1.000"
    assert "best of functitan is 3.000 of peer, the best peer (at most 0.90)" in text
