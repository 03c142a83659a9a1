"""What `ft.remat` computes again draws what forward drew, whoever draws, or raises: nothing differs silently."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import functitan as ft
from functitan import remat_policies as policies

GENERATOR, OWN = torch.Generator(), np.random.default_rng(3)


def scaled(draw):
    """A function whose gradient is what it drew."""
    return lambda w, x: torch.tanh(w * x) * draw(x) + torch.sin(w * draw(x))


DRAWS = {
    "rand": lambda x: torch.rand(x.shape),
    "randn": lambda x: torch.randn(x.shape),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint": lambda x: torch.randint(0, 100, x.shape).to(x.dtype),
    "randint_like": lambda x: torch.randint_like(x, 100),
    "randperm": lambda x: torch.randperm(x.numel()).view(x.shape).to(x.dtype),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.5),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "uniform_": lambda x: torch.empty_like(x).uniform_(),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.3),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "normal": lambda x: torch.normal(0.0, torch.ones_like(x)),
    "poisson": lambda x: torch.poisson(torch.full_like(x, 5.0)),
    "multinomial": lambda x: torch.multinomial(torch.ones(x.numel()), x.numel()).view(x.shape).to(x.dtype),
    "gamma": lambda x: torch.distributions.Gamma(torch.ones(x.shape), torch.ones(x.shape)).sample(),
    "dropout": lambda x: F.dropout(torch.ones_like(x)),
    "alpha_dropout": lambda x: F.alpha_dropout(torch.ones_like(x), training=True),
    "feature_dropout": lambda x: F.dropout1d(torch.ones_like(x), training=True),
    "rrelu": lambda x: F.rrelu(-torch.ones_like(x), training=True),
    "gumbel_softmax": lambda x: F.gumbel_softmax(torch.ones_like(x)),
    "attention": lambda x: F.scaled_dot_product_attention(*[x[None, None].detach()] * 3, dropout_p=0.5)[0, 0],
}
OTHERS = {
    "a torch.Generator in a global": lambda x: torch.rand(x.shape, generator=GENERATOR),
    "Python's random": lambda x: torch.full_like(x, random.random()),
    "numpy.random": lambda x: torch.from_numpy(np.random.rand(*x.shape)).to(x.dtype),
    "a generator of numpy": lambda x: torch.from_numpy(OWN.random(x.shape)).to(x.dtype),
}
W, X = torch.linspace(0.5, 1.5, 12).view(4, 3), torch.linspace(-1.0, 1.0, 12).view(4, 3)


def seeded(call):
    torch.manual_seed(5)
    GENERATOR.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    OWN.bit_generator.state = np.random.PCG64(5).state
    found = call()
    return found, torch.rand(3), torch.rand(3, generator=GENERATOR), random.random(), np.random.rand(), OWN.random()


def same(call, other):
    """The same results, and generators that go on alike."""
    (found, *after), (expected, *then) = seeded(call), seeded(other)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(after, then, rtol=0, atol=0)


def total(fn):
    return lambda w, x: fn(w, x).square().sum()


def twice(fn):
    return lambda w, x: fn(fn(w, x), x)


DERIVATIVES = {
    "grad": lambda fn: ft.grad(total(fn))(W, X),
    "torch.func": lambda fn: torch.func.grad(total(fn))(W, X),
    "backward": lambda fn: torch.autograd.grad(total(fn)(w := W.clone().requires_grad_(), X), w)[0],
    "hvp": lambda fn: ft.hvp(total(fn), (W, X), (X,)),
    "vjp twice": lambda fn: [pull(X)[0] for pull in [torch.func.vjp(lambda w: fn(w, X), W)[1]] for _ in range(2)],
}


@pytest.mark.parametrize("name", sorted({**DRAWS, **OTHERS}))
def test_each_draw_replays(name):
    fn = scaled({**DRAWS, **OTHERS}[name])
    same(lambda: DERIVATIVES["grad"](twice(ft.remat(fn))), lambda: DERIVATIVES["grad"](twice(fn)))


@pytest.mark.parametrize("derivative", sorted(DERIVATIVES))
@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable", "names", "budget", "offload", "nested"])
def test_under_every_policy_and_transform(derivative, policy):
    def fn(w, x):
        y = ft.einsum("a b, a b -> a b", w, x) * torch.rand_like(x)
        return ft.checkpoint_name(torch.tanh(y) + F.dropout(w), "kept") * torch.randn_like(y)

    wrap = {
        "names": lambda fn: ft.remat(fn, policy=policies.save_only_these_names("kept")),
        "budget": lambda fn: ft.remat(fn, policy=policies.budget(40)),
        "offload": lambda fn: ft.remat(fn, policy=policies.dots_saveable, offload=True),
        "nested": lambda fn: ft.remat(twice(ft.remat(fn))),
    }.get(policy) or (lambda fn: ft.remat(fn, policy=getattr(policies, policy)))
    of = DERIVATIVES[derivative]
    same(lambda: of(twice(wrap(fn))), lambda: of(twice(twice(fn) if policy == "nested" else fn)))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_under_vmap(randomness):
    fn = scaled(torch.rand_like)
    each = lambda fn: torch.func.vmap(torch.func.grad(total(fn)), randomness=randomness)(W, X)
    same(lambda: each(twice(ft.remat(fn))), lambda: each(twice(fn)))


def test_torch_checkpoint_agrees_for_a_module_with_dropout():
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3))
    function, params = ft.from_module(module)
    fn = lambda p: ft.remat(lambda p, x: function(p, x))(p, X).square().sum()

    def of_torch():
        checkpoint(module, X, use_reentrant=False).square().sum().backward()
        return module[0].weight.grad

    same(lambda: ft.grad(fn)(params)["0"]["weight"], of_torch)


def test_accumulate_and_steps():
    def loss(params, x, key, wrap=lambda fn: fn):
        y = wrap(scaled(torch.rand_like))(params["w"].expand(x.shape), x)
        return y.square().sum(), torch.ones(()).sum()

    wrapped = lambda p, x, key: loss(p, x, key, ft.remat)
    of = lambda fn: ft.accumulate(fn, 2)({"w": torch.ones(())}, X)
    same(lambda: of(wrapped), lambda: of(loss))


def test_a_draw_of_another_number_raises():
    calls = []

    def fn(w, x):
        calls.append(1)
        return w * sum(torch.rand(()) for _ in calls)

    with pytest.raises(ft.FunctitanError, match="its recomputation drew other numbers"):
        ft.grad(lambda w: ft.remat(fn)(w, X).sum())(W)


@pytest.mark.parametrize("name", sorted(DRAWS.keys() - {"gamma"}))  # which reads values: nothing captures it
@pytest.mark.parametrize("where", ["jit", "compile", "mesh"])
def test_where_states_cannot_be_put_back_a_draw_is_named(name, where):
    fn = ft.remat(scaled(DRAWS[name]))
    loss = lambda w, x: ft.grad(total(fn))(w, x)
    with pytest.raises(ft.FunctitanError, match=r"(?s)it draws random numbers by aten\..*Fix: draw by ft\.random"):
        if where == "jit":
            ft.jit(loss, backend="graph")(W, X)
        elif where == "compile":
            ft.grad(total(ft.compile(fn, backend="graph")))(W, X)
        else:
            rules = ft.AxisRules({"batch": "dp"})
            ft.simulate(dp=2)(lambda mesh: ft.spmd(loss, mesh=mesh, rules=rules)(W, X))()


@pytest.mark.parametrize("name", ["Python's random", "numpy.random", "a generator of numpy"])
def test_what_is_no_tensor_replays_in_a_capture_too(name):
    fn = scaled(OTHERS[name])
    of = lambda fn: ft.jit(lambda w, x: ft.grad(total(fn))(w, x), backend="graph")(W, X)
    same(lambda: of(ft.remat(fn)), lambda: of(fn))


@pytest.mark.parametrize("wrap", [ft.jit, ft.compile], ids=["jit", "compile"])
def test_a_captured_draw_without_recomputation_is_one_draw(wrap):
    """The gradient belongs to the numbers that forward drew, and every call draws others."""
    fn = lambda w: (torch.rand_like(w), torch.rand_like(w))
    loss = lambda w: (lambda drawn: ((drawn * w).sum(), drawn))(torch.rand_like(w))
    captured = wrap(lambda w: ft.value_and_grad(loss, has_aux=True)(w), backend="graph")
    (_, first), grads = captured(W)
    (_, second), _ = captured(W)
    assert torch.equal(first, grads) and not torch.equal(first, second)
    a, b = wrap(fn, backend="graph")(W)
    assert not torch.equal(a, b)


def test_a_compiled_region_that_draws_is_refused_where_it_would_run_again():
    block = ft.compile(scaled(torch.rand_like), backend="graph")
    with pytest.raises(ft.FunctitanError, match="it draws from torch's generator"):
        ft.grad(total(ft.remat(lambda w, x: block(w, x))))(W, X)
    with pytest.raises(ft.FunctitanError, match="it draws from torch's generator"):
        ft.jit(lambda w, x: block(w, x), backend="graph")(W, X)
    quiet = ft.compile(
        lambda w, x: F.scaled_dot_product_attention(w[None, None], x[None, None], x[None, None]), backend="graph"
    )
    ft.grad(total(ft.remat(lambda w, x: quiet(w, x)[0, 0])))(W, X)


def test_a_mesh_whose_threads_draw_elsewhere_is_not_refused():
    quiet = ft.remat(lambda w, x: torch.tanh(w * x))

    def run(mesh):
        for _ in range(20):
            torch.rand(100)
            found = ft.spmd(lambda: ft.grad(total(quiet))(W, X), mesh=mesh, rules=ft.AxisRules({"batch": "dp"}))()
        return found

    for found in ft.simulate(dp=4)(run)():
        torch.testing.assert_close(found, ft.grad(total(quiet))(W, X))
