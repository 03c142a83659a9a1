"""Laws of Lion, of transformations of some leaves, and of the optimizers on meshes; the table is in test_optim."""

from __future__ import annotations

import pytest
import torch
from test_optim import DECLARED, OPTIMIZERS, PATTERNS, ROUNDING, RULES, run, values

import functitan as ft
from functitan import optim, tree


def lion_by_the_paper(x, grads):
    """Chen et al., algorithm 2."""
    m = torch.zeros_like(x)
    for g in grads:
        c = 0.9 * m + 0.1 * g
        x = x - 1e-2 * (c.sign() + 0.1 * x)
        m = 0.99 * m + 0.01 * g
    return x


@pytest.mark.parametrize("donate", [False, True])
def test_twenty_steps_of_lion_equal_the_paper(donate):
    params, _ = run(OPTIMIZERS["lion"], 20, donate)
    grads = zip(*[tree.leaves(values(step + 1)) for step in range(20)], strict=True)
    for mine, x, gs in zip(tree.leaves(params), tree.leaves(values(0)), grads, strict=True):
        torch.testing.assert_close(mine, lion_by_the_paper(x, gs), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("donate", [False, True])
def test_each_label_has_its_torch_optimizer(donate):
    params, state = run(OPTIMIZERS["multi"], 20, donate)
    theirs = values(0)
    paths, leaves = tree.paths(theirs), tree.leaves(theirs)
    scales = [x for path, x in zip(paths, leaves, strict=True) if path.endswith("scale")]
    others = [x for path, x in zip(paths, leaves, strict=True) if not path.endswith("scale")]
    oracles = [torch.optim.SGD(scales, lr=0.1, momentum=0.9), torch.optim.AdamW(others, lr=1e-2)]
    for step in range(20):
        for x, g in zip(leaves, tree.leaves(values(step + 1)), strict=True):
            x.grad = g
        for oracle in oracles:
            oracle.step()
    for mine, x in zip(tree.leaves(params), leaves, strict=True):
        torch.testing.assert_close(mine, x, rtol=0, atol=ROUNDING)
    assert tree.paths(state["sgd"]) == ["0.0.layers.0.scale", "0.0.layers.1.scale"]


def test_a_mask_leaves_the_others_and_their_memory_alone():
    shared = torch.randn(3, dtype=torch.float64)
    grads, before = {"a": shared, "b": shared}, shared.clone()
    tx = optim.masked(optim.sgd(0.1), {"a": False, "b": True})
    updates, _ = tx.update(grads, tx.init(grads), donate=True)
    assert torch.equal(updates["a"], before) and torch.equal(updates["b"], -0.1 * before)
    assert tree.leaves(optim.masked(optim.adamw(0.1), {"a": False, "b": False}).init(grads)) == []


@pytest.mark.parametrize("sizes", [{"fsdp": 2}, {"tp": 2}, {"fsdp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("name", ["lion", "masked", "multi"])
def test_steps_on_a_mesh_are_steps_without_one(name, sizes):
    tx = OPTIMIZERS[name]
    expected, _ = run(tx, 3)

    def train(mesh):
        def steps(params, *grads):
            state = tx.init(params)
            for g in grads:
                updates, state = tx.update(g, state, params, patterns=PATTERNS)
                params = optim.apply_updates(params, updates)
            return params

        mine = [ft.shard(values(i), PATTERNS, mesh=mesh, rules=RULES) for i in range(4)]
        return ft.unshard(ft.spmd(steps, mesh=mesh, rules=RULES)(*mine), PATTERNS, mesh=mesh, rules=RULES)

    for whole in ft.simulate(**sizes)(train)():
        for mine, x in zip(tree.leaves(whole), tree.leaves(expected), strict=True):
            torch.testing.assert_close(mine, x, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("step", range(12))
def test_new_schedules_equal_their_closed_forms(step):
    wsd = 2.0 * step / 3 if step < 3 else 2.0 if step < 7 else 2.0 + (0.5 - 2.0) * min((step - 7) / 4, 1.0)
    steps = 3.0 * (0.5 if step >= 2 else 1.0) * (0.1 if step >= 9 else 1.0)
    table = [(optim.warmup_stable_decay(2.0, 3, 4, 4, 0.5), wsd), (optim.piecewise({2: 0.5, 9: 0.1}, 3.0), steps)]
    for schedule, expected in table:
        assert schedule(step) == pytest.approx(expected, rel=0, abs=1e-14)
        assert schedule(torch.tensor(step)).item() == schedule(step)


MISTAKES = {
    "label": (lambda: optim.multi_transform({"adam": optim.identity()}, {"*": "adm"}), "did you mean 'adam'"),
    "unmatched": (
        lambda: optim.multi_transform({"a": optim.identity()}, {"layers.*": "a"}).init(DECLARED),
        r"(?s)gain: no glob matches it.*out: no glob matches it",
    ),
    "state": (lambda: OPTIMIZERS["multi"].update(values(0), ()), r"the state is tuple, not a dict of \['adamw', 'sgd'"),
    "lion": (lambda: optim.lion(0.1, b1=1.0, b2=-1.0), r"(?s)b1 is 1.0.*b2 is -1.0"),
    "wsd": (lambda: optim.warmup_stable_decay(1.0, -1, 0, 0), r"(?s)warmup \+ 1 is 0.*decay is 0"),
    "piecewise": (lambda: optim.piecewise({-1: 0.5}, 1.0), r"step -1 \+ 1 is 0"),
}


@pytest.mark.parametrize(("mistake", "text"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(mistake, text):
    with pytest.raises(ft.FunctitanError, match=text):
        mistake()
