"""`ft.explain`: the ledger of a program that does not run, and the table that people read."""

from __future__ import annotations

import pytest
import torch

import functitan as ft

RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "mlp": "tp", "seq": "tp", "embed": "fsdp", "head_dim": None})
UP = "batch seq embed, embed mlp -> batch seq mlp"
DOWN = "batch seq mlp, mlp embed -> batch seq embed"
X, W, V = ft.Param("batch seq embed", (8, 16, 64)), ft.Param("embed mlp", (64, 128)), ft.Param("mlp embed", (128, 64))


def mlp(x, w, v):
    return ft.einsum(DOWN, ft.einsum(UP, x, w), v)


def loss(x, w, v):
    return ft.reduce("batch seq embed ->", mlp(x, w, v))


def test_bytes_follow_the_formulas():
    n = 4
    whole = {p.pattern: torch.Size(p.shape).numel() * 4 for p in (X, W, V)}  # float32
    ledger = ft.explain(mlp, X, W, V, mesh=dict(fsdp=n), rules=RULES)
    assert [e.bytes for e in ledger] == [(n - 1) * whole["embed mlp"] // n, (n - 1) * whole["mlp embed"] // n]
    ledger = ft.explain(mlp, X, W, V, mesh=dict(tp=n), rules=RULES)
    activation = (n - 1) * whole["batch seq embed"] // n
    assert [(e.collective, e.bytes) for e in ledger] == [("all_gather", activation), ("reduce_scatter", activation)]
    total = ft.explain(lambda x: ft.reduce("batch seq embed ->", x), X, mesh=dict(dp=n), rules=RULES)
    assert [(e.collective, e.bytes) for e in total] == [("all_reduce", 2 * (n - 1) * 4 // n)]
    turned = RULES.replace(mlp="fsdp")
    moved = ft.explain(lambda x: ft.constrain("batch embed -> embed batch", x), ft.Param("batch embed", (8, 8)),
                       mesh=dict(fsdp=n), rules=turned.replace(batch=None, embed="fsdp"))  # fmt: skip
    assert [(e.collective, e.bytes) for e in moved] == [("all_to_all", (n - 1) * (8 * 8 * 4 // n) // n)]
    ring = ft.explain(lambda x: ft.sharding.collectives.permute(x, "dp"), X, mesh=dict(dp=n), rules=RULES)
    assert [(e.collective, e.bytes) for e in ring] == [("permute", whole["batch seq embed"] // n)]


def test_totals_count_each_mesh_dim():
    ledger = ft.explain(ft.grad(loss, (0, 1, 2)), X, W, V, mesh=dict(fsdp=2, tp=2), rules=RULES)
    assert ledger.total_bytes() == sum(e.bytes for e in ledger)
    assert ledger.total_bytes("tp") == sum(e.bytes for e in ledger if "tp" in e.mesh_dims)
    assert ledger.total_bytes("cp") == 0
    assert {e.phase for e in ledger} == {"forward", "backward"} and not any(e.recomputed for e in ledger)


def test_arguments_of_every_kind_give_one_ledger():
    expected = list(ft.explain(mlp, X, W, V, mesh=dict(fsdp=2), rules=RULES))
    tensors = [torch.empty(p.shape, device="meta") for p in (X, W, V)]
    patterns = tuple(p.pattern for p in (X, W, V))
    assert list(ft.explain(mlp, *tensors, mesh=dict(fsdp=2), rules=RULES, patterns=patterns)) == expected
    assert list(ft.explain(mlp, *tensors, mesh=dict(fsdp=2), rules=RULES, patterns=(X, W, V))) == expected
    assert list(ft.explain(mlp, X, W, V, mesh=ft.make_mesh(fsdp=1), rules=RULES)) == []


def test_peak_memory_counts_arguments_gathers_and_results():
    ledger = ft.explain(lambda x, w: ft.einsum(UP, x, w), X, W, mesh=dict(fsdp=2), rules=RULES)
    shards = (8 * 16 * 64 // 2 + 64 * 128 // 2) * 4
    assert ledger.argument_bytes == shards
    # the gathered weight and the result, and nothing else, at the same time
    assert ledger.peak_bytes == shards + 64 * 128 * 4 + 8 // 2 * 16 * 128 * 4


def test_the_table_reads():
    ledger = ft.explain(ft.grad(loss, (0, 1, 2)), X, W, V, mesh=dict(fsdp=2), rules=RULES)
    assert str(ledger).splitlines()[:7] == [
        "one call on {'fsdp': 2}, rank 0",
        "phase     collective      over      each  dtype    times  op      pattern",
        "-------------------------------------------------------------------------------------------------------------",
        "forward   all_gather      fsdp  16.0 KiB  float32      1  einsum  batch seq embed, embed mlp -> batch seq mlp",
        "forward   all_gather      fsdp  16.0 KiB  float32      1  einsum  batch seq mlp, mlp embed -> batch seq embed",
        "forward   all_reduce      fsdp       4 B  float32      1  reduce  batch seq embed ->",
        "backward  all_gather      fsdp  16.0 KiB  float32      1  einsum  batch seq mlp, mlp embed -> batch seq embed",
    ]
    assert "7 collectives, 96.0 KiB sent by each rank (fsdp 96.0 KiB)" in str(ledger)
    assert "note: rules that nothing used: head_dim" in str(ledger)
    assert repr(ledger) == "<Ledger of 7 collectives, 96.0 KiB>"


def test_rules_that_never_win_are_noted():
    rules = RULES.replace(mlp="fsdp", embed="fsdp", batch=None)
    ledger = ft.explain(lambda w: ft.reduce("embed mlp ->", w), W, mesh=dict(fsdp=2), rules=rules)
    assert "rules that never won a mesh dim: embed" in str(ledger)


def test_higher_derivatives_through_attention_are_noted():
    q = ft.Param("batch seq heads head_dim", (2, 8, 4, 8))
    rules = RULES.replace(heads="tp")

    def attend(q):
        pattern = "batch seq heads head_dim, batch seq heads head_dim"
        return ft.reduce("batch seq heads head_dim ->", ft.attention(pattern, q, q, q, causal=True))

    first = ft.explain(ft.grad(attend), q, mesh=dict(tp=2), rules=rules)
    second = ft.explain(lambda q: ft.hvp(attend, (q,), (q,)), q, mesh=dict(tp=2), rules=rules)
    assert "math backend" not in str(first) and "attention runs on SDPA's math backend" in str(second)


@pytest.mark.parametrize(
    "options, text",
    [
        (
            dict(mesh=dict(fsdp=3), rules=RULES),
            r"argument 0 \('batch seq embed', shape \(8, 16, 64\)\): axis 'batch' of size 8 "
            r"is not divisible by 3 \(fsdp=3\); 6 or 9 would be",
        ),
        (dict(mesh=dict(fsdp=2)), r"rules is None(.|\n)*give a table"),
        (dict(mesh=None, rules=RULES), r"mesh is None(.|\n)*mesh=dict\(fsdp=64, tp=8\)"),
        (dict(mesh=dict(fsdp=0), rules=RULES), r"mesh dim 'fsdp' has size 0"),
        (dict(mesh=dict(tp=2), rules=RULES.replace(mlp="fdsp")), r"unknown mesh dim 'fdsp' \(did you mean 'fsdp'\?\)"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_the_run(options, text):
    def never(*args):
        raise AssertionError("the program ran")

    with pytest.raises(ft.FunctitanError, match=text):
        ft.explain(never, X, W, V, **options)
