"""The mutation script finds its sites and its laws, and kills a mutant: the proof itself runs by `make mutation`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from mutants import modules, mutants
from mutation import LAWS, SAME, TESTS, laws_of

MUTANTS = {mutant.id: mutant for module in modules() for mutant in mutants(module)}


def test_every_mutant_is_a_program_of_its_own():
    for mutant in MUTANTS.values():
        plain = Path(TESTS.parent, "functitan", *mutant.module.split(".")).with_suffix(".py").read_text()
        assert mutant.source != plain, mutant.id
        ast.parse(mutant.source)


def test_collectives_transposes_and_rule_steps_have_mutants():
    for part in (
        'steps.run_step: send("all_gather", x, step.dims, env, label) -> x',  # a collective is removed
        "steps.run_step: \"all_to_all\" -> 'all_gather'",  # swapped
        "distributed._transport.started: message.mesh_dims -> message.mesh_dims[::-1]",  # retargeted
        "collectives._Linear.transpose: -shift -> shift",  # a transpose
        "layout.layout_of: mesh.size(dim) > 1 and dim not in taken -> (mesh.size(dim) > 1)",  # a rule step
    ):
        assert any(part in label for label in MUTANTS), part


def test_every_module_has_laws_and_every_listed_mutant_exists():
    wanted = {law.split()[0] for mutant in MUTANTS.values() for law in laws_of(mutant.module)}
    assert all((TESTS / file).exists() for file in wanted | {law.split()[0] for laws in LAWS.values() for law in laws})
    assert set(SAME) <= set(MUTANTS)


def test_a_mutant_is_killed_by_a_law_that_passes_without_it():
    done = subprocess.run(
        [sys.executable, str(TESTS / "mutation.py"), "--only", "ops.dropout", "--jobs", "1"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "survived" in done.stdout.splitlines()[1] and "no mutant" in done.stdout.splitlines()[1]
    assert "killed" in done.stdout.splitlines()[2]
