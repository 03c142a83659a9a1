"""Errors that only a running program shows: ranks that part ways, layouts that a derivative cannot have."""

from __future__ import annotations

import time
from textwrap import dedent

import pytest
import torch

import functitan as ft

RULES = ft.AxisRules(
    {
        "batch": ("dp", "fsdp"),
        "seq": "cp",
        "embed": "fsdp",
        "mlp": "tp",
    }
)


def ones(*shape):
    return torch.ones(shape)


def inside(fn, rules=RULES, **mesh):
    """`fn()` on every rank of a virtual mesh."""
    return lambda: ft.simulate(**(mesh or {"fsdp": 2}))(lambda mesh: ft.spmd(fn, mesh=mesh, rules=rules)())()


def test_per_example_gradients_of_what_the_examples_mesh_dim_shards_tell_to_reshard():
    """The weight's embed lies over fsdp, where its gradient for each example has the batch."""
    loss = lambda w, x: ft.reduce("mlp ->", ft.einsum("embed, embed mlp -> mlp", x, w))
    per_example = ft.vmap(ft.grad(loss), (None, 0), axis="batch")
    with ft.record() as ledger, pytest.raises(ft.LayoutError) as error:
        inside(lambda: per_example(ones(2, 8), ones(2, 4)))()
    assert str(error.value) == dedent("""\
        vmap of the gradient of einsum('embed, embed mlp -> mlp'):
          - operand 'embed mlp': axis 'embed' lies over ('fsdp',), but in its gradient for each 'batch' over ()
          Fix: reshard the parameters first, so that the hidden axis can have the mesh dim: \
params = ft.reshard(params, patterns, to_rules=rules.replace(embed=None)), \
then differentiate inside ft.spmd(..., rules=those rules)""")
    assert all(entry.phase == "forward" for entry in ledger), "a gradient was sent"


# --- ranks that part ways on a virtual mesh: an error at once, instead of a hang -------------------------------------


def part_ways(of_rank_1, timeout=60.0):
    """Rank 0 sums over the batch while rank 1 does something else; the error, and that it came at once."""

    def program(mesh):
        own = (lambda: ft.reduce("batch -> ", ones(2))) if mesh.rank == 0 else of_rank_1
        return ft.spmd(own, mesh=mesh, rules=RULES)()

    start = time.monotonic()
    with pytest.raises(Exception) as error:
        ft.simulate(fsdp=2, timeout=timeout)(program)()
    assert time.monotonic() - start < 30, "a rank waited for its timeout"
    return error.value


def test_ranks_that_run_different_programs_are_told_what_each_runs():
    error = part_ways(lambda: ft.reduce("batch seq -> ", ones(2, 3)))
    assert isinstance(error, ft.CollectiveError)
    assert str(error) == dedent("""\
        ranks of one group run different programs:
          - rank 0 runs all_reduce over fsdp of float32[] for 'reduce' 'batch -> '
          - rank 1 runs all_reduce over fsdp of float32[] for 'reduce' 'batch seq -> '
          Fix: every rank runs the same ops in the same order""")


def test_a_failing_ranks_own_error_is_raised_with_its_place():
    def fail():
        raise KeyError("lost")

    error = part_ways(fail)
    assert isinstance(error, KeyError) and error.args == ("lost",)
    assert error.__notes__ == ["on virtual rank 1, coordinate {'fsdp': 1}"]


def test_a_rank_that_leaves_early_is_named():
    error = part_ways(lambda: None)
    assert isinstance(error, ft.CollectiveError)
    assert str(error) == dedent("""\
        rank 0 waited in all_reduce over fsdp of float32[] for 'reduce' 'batch -> ':
          - rank 1 left without joining
          Fix: every rank runs the same ops in the same order""")


def test_a_rank_that_does_not_come_is_named_after_the_timeout():
    error = part_ways(lambda: time.sleep(1.0), timeout=0.2)
    assert isinstance(error, ft.CollectiveError)
    assert str(error).splitlines()[1] == "  - ranks [1] did not join within 0.2 s"
