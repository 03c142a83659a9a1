"""An optimizer's update is a function: every derivative of it is right, under every transform, and no input changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import functitan as ft
from functitan import optim, tree
from tests.optimizers import DECLARED, OPTIMIZERS, PATTERNS, RULES, close, values

SMALL = optim.chain(optim.clip_by_global_norm(0.1), optim.sgd(0.1, momentum=0.9))
EVERY = {
    **OPTIMIZERS,
    "loss scale": optim.dynamic_loss_scale(SMALL, init_scale=4.0),
    "schedules": optim.chain(optim.scale(optim.piecewise({1: 0.5}, 0.3)), optim.sgd(optim.cosine(1.0, 9))),
    "no decay": optim.chain(optim.add_decayed_weights(0.3, {"layers": True, "q": False, "gain": True, "out": False})),
}
PARAMS, TARGET, PROBE = values(0), values(1), values(2)
DOUBLED = tree.map(lambda param: replace(param, dtype=torch.float64), DECLARED)


def fit(params, s):
    pairs = zip(tree.leaves(params), tree.leaves(TARGET), strict=True)
    return sum(((x - s * y) ** 4).sum() for x, y in pairs) / 100


def after(tx, start=PARAMS, steps=2):
    """Of a number `s`, a probe of the parameters after steps that fit them to `s` times a target: MAML."""

    def learned(s):
        params, state = start, tx.init(start)
        for _ in range(steps):
            updates, state = tx.update(ft.grad(fit)(params, s), state, params, patterns=PATTERNS)
            params = optim.apply_updates(params, updates)
        return sum((x * y).sum() for x, y in zip(tree.leaves(params), tree.leaves(PROBE), strict=True))

    return learned


@pytest.mark.parametrize("name", EVERY)
def test_every_transform_of_steps_equals_finite_differences(name):
    one, two, s = after(EVERY[name], steps=1), after(EVERY[name]), torch.tensor(1.3, dtype=torch.float64)
    both, raw = torch.stack([s, s + 1]), s.clone().requires_grad_()
    found = {
        one: {
            "torch.func.grad": torch.func.grad(one)(s),
            "torch.autograd": torch.autograd.grad(one(raw) + 0 * raw, raw)[0],
            "ft.vmap": ft.vmap(ft.grad(one), axis="task")(both)[0],
        },
        two: {
            "ft.value_and_grad": ft.value_and_grad(two)(s)[1],
            "torch.func.vmap": torch.func.vmap(torch.func.grad(two))(both)[0],
            "torch.func.jvp": torch.func.jvp(two, (s,), (torch.ones_like(s),))[1],
        },
    }
    for fn, derivatives in found.items():
        number = (fn(s + 1e-5) - fn(s - 1e-5)) / 2e-5
        assert fn is one or name == "lion" or abs(number) > 1e-3  # a sign's derivative is 0, and so is a first rate
        for how, derivative in derivatives.items():
            assert abs(derivative - number) < 1e-5 * max(1, abs(number)), how


@pytest.mark.parametrize("name", EVERY)
def test_the_fast_kernels_give_the_formulas_values(name):
    """Those run where no transform does: in float64 the same to the last digits, donated or not."""
    tx, grads = EVERY[name], [values(i) for i in (3, 4, 5)]

    def run(start, donate=False):
        params, state = start, tx.init(start)
        for g in grads:
            g = tree.map(torch.clone, g)
            updates, state = tx.update(g, state, params, patterns=PATTERNS, donate=donate)
            params = optim.apply_updates(params, updates)
        return tree.leaves((params, state))

    formula = [x[0] for x in torch.func.vmap(run)(tree.map(lambda x: x[None], PARAMS))]
    close(run(PARAMS), formula, 1e-12)
    close(run(PARAMS, donate=True), formula, 1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_donated_memory_is_refused_where_a_graph_needs_it(name):
    tx = EVERY[name]

    def learned(s):
        grads = ft.grad(fit)(PARAMS, s)
        updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, patterns=PATTERNS, donate=True)
        params = optim.apply_updates(tree.map(torch.clone, PARAMS), updates, donate=True)
        return sum(x.sum() for x in tree.leaves(params))

    for transform in (ft.grad, torch.func.grad, lambda fn: lambda s: torch.func.vmap(fn)(s[None])):
        with pytest.raises(ft.FunctitanError, match="donate=True overwrites"):
            transform(learned)(torch.tensor(1.3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["clipped", "adafactor", "muon", "stored clip"])
def test_meta_gradients_are_the_same_on_a_mesh(name):
    """Norms, means and numbers that scale what is sharded: their gradients are summed over the ranks."""
    tx = EVERY[name]

    def meta(params, target):
        def distance(params):
            pairs = zip(tree.leaves(params), tree.leaves(target), tree.leaves(PATTERNS), strict=True)
            return sum(ft.reduce(f"{its} ->", (x - y) ** 4) if its else (x - y) ** 4 for x, y, its in pairs)

        mesh, rules = ft.sharding.context.current()[:2]  # adafactor's statistics lie by patterns of their own
        state = ft.init(tx.init(DOUBLED), ft.random.key(0), mesh=mesh, rules=rules)
        updates, state = tx.update(ft.grad(distance)(params), state, params, patterns=PATTERNS)
        return distance(optim.apply_updates(params, updates))

    ft.testing.assert_mesh_invariant(
        meta, (PARAMS, TARGET), patterns=(PATTERNS, PATTERNS), out="", rules=RULES, meshes=({"fsdp": 2, "tp": 2},),
        rtol=1e-9, atol=1e-9,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "clipped", "adafactor", "block rms", "muon", "momentum"])
def test_leaves_without_gradient_have_a_finite_derivative(name):
    """Roots have no derivative at 0, and norms, moments and their quotients have one."""
    start = {"w": torch.ones(3, 4, dtype=torch.float64), "unused": torch.zeros(2, 2, dtype=torch.float64)}
    tx = optim.muon(0.02, dtype=None) if name == "muon" else EVERY[name]

    def learned(s):
        params, state = start, tx.init(start)
        for _ in range(2):
            grads = ft.grad(lambda p: ((p["w"] - s * torch.arange(4)) ** 4)[1:].sum() + 0 * p["unused"].sum())(params)
            updates, state = tx.update(grads, state, params)
            params = optim.apply_updates(params, updates)
        return sum(x.sin().sum() for x in params.values())

    s = torch.tensor(1.3, dtype=torch.float64)
    number = (learned(s + 1e-6) - learned(s - 1e-6)) / 2e-6
    assert abs(ft.grad(learned)(s) - number) < 1e-6 * max(1, abs(number))


def test_a_learning_rate_is_learned():
    rate, s = torch.tensor(0.1, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
    fn = lambda rate: after(optim.adamw(lambda step: rate * 0.9**step))(s)
    number = (fn(rate + 1e-6) - fn(rate - 1e-6)) / 2e-6
    assert abs(ft.grad(fn)(rate) - number) < 1e-6 * abs(number)


def test_rounding_passes_derivatives_on():
    """A state in bfloat16 is rounded at random, with the mean as it was: so the derivative is that without rounding."""
    start = tree.map(lambda x: x.float(), PARAMS)
    single = lambda tx: ft.grad(after(tx, start))(torch.tensor(1.3))
    found, expected = (single(tx) for tx in (optim.bfloat16_state(optim.adamw(1e-2)), optim.adamw(1e-2)))
    assert abs(found - expected) < 1e-2 * abs(expected)
    x = torch.tensor([1.0, 1.00390625, torch.inf])
    bits = torch.tensor([65535, 32768, 1])
    straight = lambda x: optim.stochastic_round(x, bits).float()
    assert torch.equal(torch.func.vjp(straight, x)[0], straight(x))
    assert torch.func.vjp(straight, x)[1](torch.ones(3))[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tx", [optim.adamw(1e-2), optim.adamw(1e-2, eps=1e-8, b2=0.95)])
def test_low_precision_moments_are_moved_in_float32(dtype, tx):
    """In a captured step, and under a transform, as in the fused kernel: rows without gradient stay as they are."""
    params = {"w": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)}
    grads = {"w": torch.zeros(4, 3, dtype=dtype).index_fill(0, torch.tensor([1]), 0.5)}
    fused = tx.update(grads, tx.init(params), params)
    captured = ft.jit(lambda g, p: tx.update(g, tx.init(p), p), backend="graph")(grads, params)
    batched = [tree.map(lambda x: x[None], t) for t in (grads, params)]
    formula = torch.func.vmap(lambda g, p: tx.update(g, tx.init(p), p))(*batched)
    for found in (captured, tree.map(lambda x: x[0], formula)):
        assert all(bool(x.isfinite().all()) for x in tree.leaves(found))
        for x, y in zip(tree.leaves(found), tree.leaves(fused), strict=True):
            torch.testing.assert_close(x, y, rtol=torch.finfo(dtype).eps, atol=1e-7)


# ------------------------------------------------------------------------------------------------ through train steps


TX = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.1))
DOUBLE = {"w": ft.Param("embed mlp", (4, 6), dtype=torch.float64), "b": ft.Param("mlp", (6,), dtype=torch.float64)}
X = torch.arange(16.0, dtype=torch.float64).view(4, 4).sin()


def loss(params, batch, key):
    y = ft.einsum("batch embed, embed mlp -> batch mlp", batch, params["w"])
    y = y + ft.einsum("batch, mlp -> batch mlp", torch.ones_like(batch[:, 0]), params["b"])
    return ft.reduce("batch mlp ->", y**2), ft.reduce("batch embed ->", torch.ones_like(batch))


def stepped(mesh=None, donate=False, **options):
    """Of a number, the loss of the second step from parameters that it scales."""
    step = ft.train_step(loss, TX, donate=donate, check=False, **options)
    state = ft.TrainState.create(DOUBLE, TX, ft.random.key(0), mesh=mesh, rules=RULES)
    batch = X if mesh is None else ft.shard(X, "batch embed", mesh=mesh, rules=RULES)

    def fn(s):
        params = {
            "w": state.params["w"] * ft.broadcast("-> embed mlp", s, embed=4, mlp=6),
            "b": state.params["b"] + ft.broadcast("-> mlp", s, mlp=6),
        }
        at = replace(state, params=params)
        for _ in range(2):
            at, metrics = step(at, batch)
        return metrics["loss"] + ft.reduce("embed mlp ->", at.params["w"])

    return ft.spmd(fn, mesh=mesh, rules=RULES)


S = torch.tensor(1.2, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"nonfinite": "skip"}], ids=str)
def test_train_steps_are_differentiable(options):
    fn = stepped(**options)
    number = (fn(S + 1e-5) - fn(S - 1e-5)) / 2e-5
    raw = S.clone().requires_grad_()
    found = [ft.grad(fn)(S), torch.func.grad(fn)(S), torch.autograd.grad(fn(raw), raw)[0]]
    mesh = ft.simulate(fsdp=2, tp=2)
    found.append(mesh(lambda mesh: ft.spmd(ft.grad(stepped(mesh, **options)), mesh=mesh, rules=RULES)(S))()[0])
    if "nonfinite" in options:
        found.append(torch.func.vmap(torch.func.grad(fn))(torch.stack([S, S * 2]))[0])
    for derivative in found:
        assert abs(derivative - number) < 1e-6


def test_a_donating_step_refuses_to_be_differentiated():
    for transform in (ft.grad, torch.func.grad):
        with pytest.raises(ft.FunctitanError, match="make the step with donate=False"):
            transform(stepped(donate=True))(S)


def test_looking_for_derivatives_does_not_read_a_donated_state():
    """The error lists the leaves, as where nothing is differentiated."""
    step, state = ft.train_step(loss, TX), ft.TrainState.create(DOUBLE, TX, ft.random.key(0))
    step(state, X)
    with pytest.raises(ft.DonatedError, match=r"params\.w was donated to step 0 of ft.train_step"):
        step(state, X)


def test_a_step_under_vmap_cannot_raise_for_one_of_its_values():
    with pytest.raises(ft.FunctitanError, match="choose 'skip' or 'ignore'"):
        torch.func.vmap(stepped())(torch.stack([S, S]))


def test_gradients_depend_on_arguments_whose_gradients_are_not_taken():
    """`ft.grad` by one argument, in plain autograd by another."""
    w, x = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0], requires_grad=True)
    (mixed,) = torch.autograd.grad(ft.grad(lambda w, x: (w**2 * x).sum())(w, x).sum(), x)
    (named,) = torch.autograd.grad(ft.grad(lambda w, *, x: (w**2 * x).sum())(w, x=x).sum(), x)
    assert mixed.tolist() == named.tolist() == [2.0, 4.0]
