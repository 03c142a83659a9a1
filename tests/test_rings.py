"""Which moves of a plan become rings: the ledger of one product, its note of what stays, and its value on the mesh."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import functitan as ft
from functitan.testing.sharded import assert_close, sharded

PATTERN = "a b, b c -> a c"
A, B = torch.randn(16, 8, dtype=torch.float64), torch.randn(8, 16, dtype=torch.float64)
PART = A.numel() * 8 // 4  # bytes of a quarter of an operand


class Case(NamedTuple):
    """A product on a mesh, and what its ledger has: (collective, mesh dims, bytes), hidden ones as "ring"."""

    rules: dict
    mesh: dict
    dims: tuple[str, ...]
    ledger: list
    why: str = ""


FOUR, SQUARE = dict(tp=4), dict(cp=2, tp=2)
RINGS = {
    "rows gathered": Case(dict(a="tp", b=None, c="tp"), FOUR, ("tp",), [("ring", ("tp",), PART)] * 3),
    "columns gathered": Case(dict(a=("cp", "tp"), b=None, c="tp"), SQUARE, ("tp",), [("ring", ("tp",), 2 * PART)]),
    "partial sums scattered": Case(dict(b="tp", a="tp", c=None), FOUR, ("tp",), [("ring", ("tp",), 2 * PART)] * 3),
    "one message over two dims": Case(
        dict(a=("cp", "tp"), b=None, c=("cp", "tp")), SQUARE, ("cp", "tp"), [("ring", ("cp", "tp"), PART)] * 3
    ),
    "one message over two dims, of which one is asked for": Case(
        dict(a=("cp", "tp"), b=None, c=("cp", "tp")), SQUARE, ("tp",), [],
        "it is one message with cp: name them in dims= too",
    ),
    "partial sums over two dims, of which one is asked for": Case(
        dict(b=("tp", "cp"), a=("cp", "tp"), c=None), SQUARE, ("tp",), [],
        "it is one message with cp: name them in dims= too",
    ),
    "two gathers of one operand": Case(
        dict(a=("cp", "tp"), b="tp", c="cp"), SQUARE, ("cp", "tp"),
        [("all_gather", ("cp",), PART), ("ring", ("tp",), 2 * PART)], "its product has a ring already",
    ),
    "two gathers of one operand, of which one is asked for": Case(
        dict(a=("cp", "tp"), b="tp", c="cp"), SQUARE, ("tp",),
        [("all_gather", ("cp",), PART), ("ring", ("tp",), 2 * PART)],
    ),
    "gathers of both operands": Case(
        dict(a=("cp", "tp"), b="cp", c="tp"), SQUARE, ("cp", "tp"),
        [("all_gather", ("tp",), PART), ("ring", ("cp",), 2 * PART)], "its product has a ring already",
    ),
    "a gather, and then partial sums scattered": Case(
        dict(b="tp", a=("cp", "tp"), c="cp"), SQUARE, ("cp", "tp"),
        [("ring", ("cp",), PART), ("reduce_scatter", ("tp",), 2 * PART)], "its product has a ring already",
    ),
    "sums that every rank wants": Case(
        dict(a="tp", b="cp", c="tp"), SQUARE, ("cp", "tp"),
        [("ring", ("tp",), PART), ("all_reduce", ("cp",), 4 * PART)], "no part is wanted before the others",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RINGS)
def test_a_move_beside_a_product_is_a_ring_or_says_why_not(name):
    case = RINGS[name]
    rules, patterns = ft.AxisRules(case.rules), ("a b", "b c")
    product = ft.async_tp(lambda a, b: ft.einsum(PATTERN, a, b), dims=case.dims)
    try:
        ledger = ft.explain(product, A, B, mesh=case.mesh, rules=rules, patterns=patterns)
    except ft.MeshError as error:
        assert not case.ledger and case.why in str(error)
        return
    found = [("ring" if e.hidden else e.collective, e.mesh_dims, e.bytes) for e in ledger]
    assert found == case.ledger
    left = [note for note in ledger.notes if note.startswith("async_tp: ")]
    assert len(left) == bool(case.why) and all(note.endswith(case.why) for note in left)
    assert_close(sharded(product, patterns, "a c", mesh=case.mesh, rules=rules)(A, B), A @ B)  # float64
