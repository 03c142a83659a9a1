"""The README's programs run as they stand, as a script and as a notebook's cell."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
*PROGRAMS, LOOP = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_run_as_scripts(program, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plain, meshed, *table = done.stdout.splitlines()
    for loss in eval(meshed):
        assert abs(loss - float(plain)) < 1e-4 * float(plain)
    assert any("reduce_scatter" in line and "backward" in line for line in table)


def test_programs_run_as_cells():
    for program in PROGRAMS:
        exec(compile(program, "<cell>", "exec"), {"__name__": "__main__"})


def test_the_loop_of_ones_own_is_the_example():
    """CI runs the example against the installed wheel, counts its lines, and asserts that its loss falls."""
    assert (Path(__file__).parents[1] / "examples/own_loop.py").read_text() == LOOP
    ran: dict = {}
    exec(compile(LOOP, "<cell>", "exec"), ran)
    assert ran["value"] < 1e-2 * ran["x"].square().sum()
