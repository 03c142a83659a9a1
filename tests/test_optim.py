"""Masks, clipping and the global norm, schedules; the laws of all optimizers are in test_optim_laws."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizers import DECLARED, OPTIMIZERS, PATTERNS, RULES, values

import functitan as ft
from functitan import optim, tree

ROUNDING = 1e-12  # float64, values near 1, a few hundred operations in another order


# --- masks -----------------------------------------------------------------------------------------------------------


MASKS = {
    "none": (None, lambda path: True),
    "function of the path": (lambda path, leaf: path.endswith("scale"), lambda path: path.endswith("scale")),
    "matrices": (optim.decay_matrices, lambda path: path.endswith(("up", "out", "q"))),
    "prefix": ({"layers": True, "q": False, "gain": False, "out": False}, lambda path: path.startswith("layers")),
}


@pytest.mark.parametrize("patterns", [None, PATTERNS, DECLARED], ids=["tensors", "patterns", "declarations"])
@pytest.mark.parametrize(("mask", "chosen"), MASKS.values(), ids=MASKS)
def test_a_mask_chooses_the_leaves_that_decay(mask, chosen, patterns):
    params, grads = values(0), values(1)
    updates, _ = optim.add_decayed_weights(0.5, mask).update(grads, (), params, patterns=patterns)
    for path, u, g, p in zip(tree.paths(params), *map(tree.leaves, (updates, grads, params)), strict=True):
        assert torch.equal(u, torch.add(g, p, alpha=0.5) if chosen(path) else g), path


def test_a_mask_leaves_the_others_and_their_memory_alone():
    shared = torch.randn(3, dtype=torch.float64)
    grads, before = {"a": shared, "b": shared}, shared.clone()
    tx = optim.masked(optim.sgd(0.1), {"a": False, "b": True})
    updates, _ = tx.update(grads, tx.init(grads), donate=True)
    assert torch.equal(updates["a"], before) and torch.equal(updates["b"], -0.1 * before)
    assert tree.leaves(optim.masked(optim.adamw(0.1), {"a": False, "b": False}).init(grads)) == []


def test_each_label_has_the_state_of_its_leaves():
    params = values(0)
    state = OPTIMIZERS["multi"].init(params)
    assert tree.paths(state["sgd"]) == ["0.0.layers.0.scale", "0.0.layers.1.scale"]


# --- clipping and the global norm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clipping_equals_torch(max_norm, dtype):
    grads = values(1, dtype)
    theirs = [torch.nn.Parameter(torch.zeros_like(g)) for g in tree.leaves(grads)]
    for x, g in zip(theirs, tree.leaves(grads), strict=True):
        x.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    tx = optim.clip_by_global_norm(max_norm)
    clipped, state = tx.update(grads, tx.init(grads))
    few = {torch.float64: ROUNDING, torch.float32: 1e-6}[dtype]  # the norm's sum has another order
    torch.testing.assert_close(state.norm, norm, rtol=few, atol=0)
    for mine, x in zip(tree.leaves(clipped), theirs, strict=True):
        torch.testing.assert_close(mine, x.grad, rtol=few, atol=0)


def test_the_norm_of_bfloat16_is_taken_in_float32():
    grads = {"w": torch.full((70_000,), 0.01, dtype=torch.bfloat16)}  # a bfloat16 sum would stop growing
    norm = optim.global_norm(grads)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), grads["w"].double().norm(), rtol=1e-5, atol=0)


def test_the_norm_of_nothing_is_zero():
    assert optim.global_norm({}) == 0


MESHES = [{"fsdp": 2}, {"tp": 2}, {"dp": 2}, {"fsdp": 2, "tp": 2}, {"dp": 2, "fsdp": 2, "tp": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_on_a_mesh_is_clipping_without_one(sizes, max_norm):
    grads = values(1)
    tx = optim.clip_by_global_norm(max_norm)
    expected, state = tx.update(grads, tx.init(grads))

    def clipped(mesh):
        mine = ft.shard(grads, PATTERNS, mesh=mesh, rules=RULES)
        step = ft.spmd(functools.partial(tx.update, patterns=PATTERNS), mesh=mesh, rules=RULES)
        updates, its = step(mine, tx.init(mine))
        return ft.unshard(updates, PATTERNS, mesh=mesh, rules=RULES), its.norm

    for whole, norm in ft.simulate(**sizes)(clipped)():
        torch.testing.assert_close(norm, state.norm, rtol=ROUNDING, atol=0)
        for mine, x in zip(tree.leaves(whole), tree.leaves(expected), strict=True):
            torch.testing.assert_close(mine, x, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("sizes", "reduced"),
    [
        ({"dp": 2}, []),
        ({"fsdp": 2}, [("fsdp",)]),
        ({"tp": 2}, [("tp",)]),
        # "embed vocab" lies over (tp, fsdp) and "embed mlp" over (fsdp, tp): one set; "embed" over fsdp alone
        ({"dp": 2, "fsdp": 2, "tp": 2}, [("fsdp",), ("fsdp", "tp")]),
    ],
    ids=str,
)
def test_the_norm_takes_one_all_reduce_for_each_set_of_mesh_dims(sizes, reduced):
    grads = values(1)

    def norm(mesh):
        mine = ft.shard(grads, DECLARED, mesh=mesh, rules=RULES)
        tx = optim.clip_by_global_norm(1.0)
        return ft.spmd(lambda g: tx.update(g, tx.init(g), patterns=DECLARED), mesh=mesh, rules=RULES)(mine)

    with ft.record() as ledger:
        ft.simulate(**sizes)(norm)()
    assert sorted(entry.mesh_dims for entry in ledger) == reduced
    assert {(entry.collective, entry.op, entry.phase) for entry in ledger} <= {("all_reduce", "global_norm", "update")}


def test_the_norm_on_a_mesh_needs_patterns():
    def norm(mesh):
        return ft.spmd(optim.global_norm, mesh=mesh, rules=RULES)(values(1))

    with pytest.raises(ft.PatternError, match=r"(?s)rule 'embed' shards over \('fsdp',\).*Fix: .*patterns=patterns"):
        ft.simulate(fsdp=2)(norm)()
    assert len(ft.simulate(fsdp=1)(norm)()) == 1  # nothing is sharded


# --- schedules -------------------------------------------------------------------------------------------------------


def closed_cosine(t: float, peak: float, total: int, end: float) -> float:
    return end + (peak - end) * (1 + math.cos(math.pi * min(t / total, 1.0))) / 2


def closed_warmup(t: float, peak: float, warmup: int, total: int, end: float) -> float:
    return peak * t / warmup if t < warmup else closed_cosine(t - warmup, peak, total - warmup, end)


@given(st.integers(0, 60), st.floats(1e-5, 1.0), st.floats(0.0, 1.0), st.integers(0, 20), st.integers(21, 50))
def test_schedules_equal_their_closed_forms(step, peak, end, warmup, total):
    table = [
        (optim.constant(peak), peak),
        (optim.linear(peak, end, total), peak + (end - peak) * min(step / total, 1.0)),
        (optim.cosine(peak, total, end), closed_cosine(step, peak, total, end)),
        (optim.warmup_cosine(peak, warmup, total, end), closed_warmup(step, peak, warmup, total, end)),
    ]
    for schedule, expected in table:
        assert schedule(step) == pytest.approx(expected, rel=0, abs=1e-14)
        traced = schedule(torch.tensor(step))
        assert traced.shape == () and traced.item() == schedule(step)


@pytest.mark.parametrize("step", range(12))
def test_new_schedules_equal_their_closed_forms(step):
    wsd = 2.0 * step / 3 if step < 3 else 2.0 if step < 7 else 2.0 + (0.5 - 2.0) * min((step - 7) / 4, 1.0)
    steps = 3.0 * (0.5 if step >= 2 else 1.0) * (0.1 if step >= 9 else 1.0)
    table = [(optim.warmup_stable_decay(2.0, 3, 4, 4, 0.5), wsd), (optim.piecewise({2: 0.5, 9: 0.1}, 3.0), steps)]
    for schedule, expected in table:
        assert schedule(step) == pytest.approx(expected, rel=0, abs=1e-14)
        assert schedule(torch.tensor(step)).item() == schedule(step)


# --- errors ----------------------------------------------------------------------------------------------------------


W = {"w": torch.ones(2, 3), "b": torch.ones(2)}
MISTAKES = {
    "label": (lambda: optim.multi_transform({"adam": optim.identity()}, {"*": "adm"}), "did you mean 'adam'"),
    "unmatched": (
        lambda: optim.multi_transform({"a": optim.identity()}, {"layers.*": "a"}).init(DECLARED),
        r"(?s)gain: no glob matches it.*out: no glob matches it",
    ),
    "multi state": (
        lambda: OPTIMIZERS["multi"].update(values(0), ()),
        r"the state is tuple, not a dict of \['adamw', 'sgd'",
    ),
    "lion": (lambda: optim.lion(0.1, b1=1.0, b2=-1.0), r"(?s)b1 is 1.0.*b2 is -1.0"),
    "wsd": (lambda: optim.warmup_stable_decay(1.0, -1, 0, 0), r"(?s)warmup is -1.*decay is 0"),
    "piecewise": (lambda: optim.piecewise({-1: 0.5}, 1.0), r"step -1 is -1"),
    "clip": (lambda: optim.clip_by_global_norm(0.0), "max_norm is 0.0"),
    "adam": (lambda: optim.adamw(0.1, b1=1.0, eps=-1.0), r"(?s)b1 is 1.0: it must lie in \[0, 1\).*eps is -1.0"),
    "nesterov": (lambda: optim.sgd(0.1, nesterov=True), "nesterov=True without momentum"),
    "warmup": (lambda: optim.warmup_cosine(0.1, 10, 10), "warmup_steps is 10 and total_steps 10"),
    "chain": (lambda: optim.chain(optim.scale(1.0), 0.1), "1 is a float"),
    "state": (lambda: optim.adamw(0.1).update(W, (), W), "the state is a tuple of 0, not a tuple of 3"),
    "params": (lambda: optim.add_decayed_weights(0.1).update(W, ()), "params is None"),
    "mask": (lambda: optim.add_decayed_weights(0.1, {"w": 1, "b": True}).update(W, (), W), "w: 1"),
    "shape": (
        lambda: optim.apply_updates(W, {"w": torch.ones(3, 2), "b": torch.ones(2).double()}),
        r"(?s)b: updates \(2,\) float64, params \(2,\) float32.*w: updates \(3, 2\) float32, params \(2, 3\) float32",
    ),
    "structure": (
        lambda: optim.sgd(0.1, 0.9).update({"w": W["w"]}, optim.sgd(0.1, 0.9).init(W)),
        "b is only in momentum",
    ),
}


@pytest.mark.parametrize(("mistake", "text"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(mistake, text):
    with pytest.raises(ft.FunctitanError, match=text):
        mistake()
