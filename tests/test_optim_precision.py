"""Optimizer state in bfloat16 with stochastic rounding, and dynamic loss scaling beside torch.amp.GradScaler."""

from __future__ import annotations

import math

import pytest
import torch

import functitan as ft
from functitan.models import llama

BF16, F16 = torch.bfloat16, torch.float16
RULES = llama.RULES
TINY = llama.LlamaConfig(100, 32, 2, 4, 2, 8, 64, rope_theta=10000.0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def equal(a: ft.tree.Tree, b: ft.tree.Tree) -> bool:
    pairs = zip(ft.tree.leaves(a), ft.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def test_rounding_is_to_a_neighbour_and_its_mean_is_exact():
    x, draws = random(400) * 10.0 ** torch.arange(-20, 20).repeat(10), 1024
    bits = ft.random.bits(ft.random.key(0), (draws, 400))
    rounded = ft.optim.stochastic_round(x.expand(draws, -1).contiguous(), bits).double()
    nearest, exact = x.bfloat16().double(), x.double()
    ulp = 2.0 ** (exact.abs().log2().floor() - 7)  # of a bfloat16, which has 8 digits
    assert ((rounded - exact).abs() < ulp).all() and (rounded.amax(0) - rounded.amin(0) <= ulp).all()
    # the mean of `draws` values that differ by one ulp deviates by at most 0.5 / 32 ulp; 5 of these hold for 400 tries
    assert ((rounded.mean(0) - exact).abs() < 5 * 0.5 / math.sqrt(draws) * ulp).all()
    assert ((nearest - exact).abs() > 0.2 * ulp).any()


def test_what_bfloat16_holds_is_kept():
    x = torch.tensor([0.0, -0.0, 1.5, -3.0, torch.inf, -torch.inf, torch.nan, 2.0**-130])
    for bits in (0, 65535):
        rounded = ft.optim.stochastic_round(x, torch.full((8,), bits))
        torch.testing.assert_close(rounded, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_slow_average_moves():
    """nu of Adam with b2 = 0.999 moves by 1e-3 of what is missing: less than rounding to nearest needs."""
    params, steps = {"w": torch.zeros(1024)}, 300
    tx = ft.optim.bfloat16_state(ft.optim.scale_by_adam(0.9, 0.999))
    state, near = tx.init(params), torch.ones(1024, dtype=BF16)
    state = state._replace(inner=state.inner._replace(nu={"w": torch.ones(1024, dtype=BF16)}))
    for _ in range(steps):
        _, state = tx.update({"w": torch.full((1024,), 2.0)}, state)
        near = (near.float() * 0.999 + 4.0 * 0.001).bfloat16()
    expected = 4.0 - 3.0 * 0.999**steps
    nu = state.inner.nu["w"]
    assert nu.dtype == BF16 and abs(near[0].item() - expected) > 0.2 * expected
    # each of the 1024 averages walks by at most 0.004 (half an ulp) in 300 steps: 0.07; their mean by 0.002; 4 of these
    assert abs(nu.double().mean().item() - expected) < 0.008


def run(mesh, tx, wrap, steps: int = 3):
    """The state after some steps of the tiny Llama, as global values, and the losses."""
    tokens = torch.randint(0, 100, (4, 17), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    batch = ft.shard(batch, "batch seq", mesh=mesh, rules=llama.RULES)
    declared = llama.params(TINY)
    state = ft.TrainState.create(declared, tx, ft.random.key(0), mesh=mesh, rules=llama.RULES)
    step = ft.train_step(wrap(lambda params, batch, key: llama.loss(params, batch, TINY)), tx)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"].item())
    patterns = (declared, tx.init(declared))
    values = ft.unshard((state.params, state.opt_state), patterns, mesh=mesh, rules=llama.RULES)
    return *values, losses


def test_every_mesh_rounds_alike():
    """From one state and one gradient, the new state is the same bits wherever its shards lie."""
    declared = llama.params(TINY)
    tx = ft.optim.bfloat16_state(ft.optim.adamw(1e-3))
    grads = ft.init(declared, ft.random.key(1))

    def rank(mesh):
        params, own = ft.shard((ft.init(declared, ft.random.key(0)), grads), (declared,) * 2, mesh=mesh, rules=RULES)
        patterns = ft.tree.map(lambda param: param.pattern, declared)
        update = ft.spmd(lambda *args: tx.update(*args, patterns=patterns), mesh=mesh, rules=RULES)
        state = tx.init(params)
        for _ in range(2):
            updates, state = update(own, state, params)
        return ft.unshard((updates, state), (declared, tx.init(declared)), mesh=mesh, rules=RULES)

    expected = rank(None)
    for sizes in (dict(fsdp=2), dict(fsdp=2, tp=2)):
        assert all(equal(found, expected) for found in ft.simulate(**sizes)(rank)())


def test_state_takes_half_the_memory_and_is_declared_so():
    declared = llama.params(TINY)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.bfloat16_state(ft.optim.adamw(1e-3)))
    params = ft.init(declared, ft.random.key(0))
    made, said = tx.init(params), tx.init(declared)
    assert ft.tree.paths(made) == ft.tree.paths(said)
    assert [(x.dtype, tuple(x.shape)) for x in ft.tree.leaves(made)] == [
        (p.dtype, p.shape) for p in ft.tree.leaves(said)
    ]
    assert {x.dtype for x in ft.tree.leaves(made[1].inner) if x.dim()} == {BF16}
    assert made[0].norm.dtype == torch.float32


@pytest.mark.parametrize("wrap", [lambda tx: ft.optim.bfloat16_state(tx), lambda tx: ft.optim.dynamic_loss_scale(tx)])
def test_donating_changes_no_bits(wrap):
    tx, params = wrap(ft.optim.adamw(1e-2)), {"w": random(5, 3), "b": random(3)}
    found = []
    for donate in (False, True):
        state = tx.init(params)
        for i in range(3):
            grads = ft.tree.map(lambda x, i=i: x + i, params)
            updates, state = tx.update(grads, state, params, donate=donate)
        found.append((updates, state))
    assert equal(*found)


def test_training_with_bfloat16_state_follows_float32():
    tx = ft.optim.adamw(1e-3)
    *_, plain = run(None, tx, lambda fn: fn, 10)
    *_, losses = run(None, ft.optim.bfloat16_state(tx), lambda fn: fn, 10)
    assert plain[-1] < 0.95 * plain[0]
    # each moment is off by up to 2**-7, either way, so an update by as much; seen is 3e-5
    worst = max(abs(a - b) / b for a, b in zip(losses, plain, strict=True))
    assert worst < 5e-4


def scaler_oracle(params, grads, options):
    """torch.amp.GradScaler with SGD on one tensor: parameters and scale after each step."""
    w = torch.nn.Parameter(params.clone())
    optimizer, out = torch.optim.SGD([w], lr=0.5), []
    names = {"init_scale": "init_scale", "growth": "growth_factor", "backoff": "backoff_factor"}
    given = {names.get(k, "growth_interval"): v for k, v in options.items()}
    scaler = torch.amp.GradScaler("cpu", **given)
    for g in grads:
        scaler.scale((w * g).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        out.append((w.detach().clone(), scaler.get_scale()))
    return out


def test_loss_scale_is_gradscalers():
    options = dict(init_scale=2.0**10, growth=4.0, backoff=0.25, interval=3)
    w = random(4)
    grads = [random(4, seed=i) for i in range(12)]
    grads[2][1], grads[6][0], grads[7][3] = torch.inf, torch.nan, -torch.inf
    tx = ft.optim.dynamic_loss_scale(ft.optim.sgd(0.5), **options)
    state, params = tx.init(w), w
    for g, (expected, scale) in zip(grads, scaler_oracle(w, grads, options), strict=True):
        updates, state = tx.update(g * state.scale, state, params)
        params = ft.optim.apply_updates(params, updates)
        assert torch.equal(params, expected) and state.scale.item() == scale


def test_a_skipped_step_leaves_state_as_it_was():
    tx = ft.optim.dynamic_loss_scale(ft.optim.chain(ft.optim.clip_by_global_norm(0.1), ft.optim.adamw(0.1)))
    params = {"w": random(3)}
    _, state = tx.update({"w": torch.ones(3) * 2**16}, tx.init(params), params)
    updates, after = tx.update({"w": torch.tensor([1.0, torch.nan, 1.0])}, state, params)
    assert equal(updates, {"w": torch.zeros(3)}) and equal(after.inner, state.inner)
    assert (after.scale.item(), after.good_steps.item()) == (2.0**15, 0)


def test_every_rank_skips_when_one_must():
    rules = ft.AxisRules({"embed": "fsdp"})
    tx = ft.optim.dynamic_loss_scale(ft.optim.sgd(1.0))

    def rank(mesh):
        grads = torch.tensor([1.0, torch.inf]) if mesh.rank == 1 else torch.ones(2)
        update = ft.spmd(lambda g: tx.update(g, tx.init(g), patterns="embed"), mesh=mesh, rules=rules)
        updates, state = update(grads)
        return updates.tolist(), state.scale.item()

    assert ft.simulate(fsdp=2)(rank)() == [([0.0, 0.0], 2.0**15)] * 2


def test_training_in_float16_needs_the_scale():
    """A loss so small that float16 cotangents vanish; the scale, which cancels, brings them back."""
    x, declared = random(16, 8) * 1e-3, {"w": ft.Param("embed mlp", (8, 4)), "v": ft.Param("mlp out", (4, 1))}

    def loss(params, batch, key):
        h = ft.einsum("batch embed, embed mlp -> batch mlp", batch, params["w"])
        y = ft.einsum("batch mlp, mlp out -> batch out", h, params["v"])
        return ft.reduce("batch out ->", y) * 1e-6, 1.0

    def moved(tx, wrap) -> float:
        state = ft.TrainState.create(declared, tx, ft.random.key(0))
        before = state.params["w"].clone()
        state, metrics = ft.train_step(wrap(loss), tx)(state, x)
        assert ("loss_scale" in metrics) == isinstance(state.opt_state, ft.optim.LossScaleState)
        return (state.params["w"] - before).norm().item()

    half = lambda fn: ft.precision(fn, compute=F16)
    sgd = ft.optim.sgd(1e6)
    expected = moved(sgd, lambda fn: fn)
    assert moved(sgd, half) < 0.5 * expected
    assert abs(moved(ft.optim.dynamic_loss_scale(sgd), half) - expected) < 0.01 * expected  # float16 has 11 digits


def test_a_scale_of_two_changes_no_bits_of_float32_training():
    plain = ft.optim.chain(ft.optim.clip_by_global_norm(0.5), ft.optim.adamw(1e-3))
    params, state, losses = run(None, plain, lambda fn: fn)
    scaled, its, found = run(None, ft.optim.dynamic_loss_scale(plain), lambda fn: fn)
    assert losses == found and equal(params, scaled) and equal(state, its.inner)  # powers of two are exact


@pytest.mark.parametrize("make, text", [
    (
        lambda: ft.optim.dynamic_loss_scale(ft.optim.sgd(1.0), init_scale=0.5, backoff=2.0),
        "dynamic_loss_scale:\n  - init_scale is 0.5: it must be at least 1\n  - backoff is 2.0: it must lie in (0, 1]\n"
        "  Fix: usual are init_scale=2**16, growth=2, backoff=0.5, interval=2000",
    ),
    (
        lambda: ft.optim.bfloat16_state(ft.optim.sgd(1.0)).init({"w": torch.ones(2)}),
        "bfloat16_state:\n  - the transformation's state has no float32 leaf with an axis\n"
        "  Fix: wrap one that has moments, of float32 parameters",
    ),
])  # fmt: skip
def test_errors_say_what_to_do(make, text):
    with pytest.raises(ft.FunctitanError) as error:
        make()
    assert str(error.value) == text
