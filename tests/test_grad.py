"""`ft.grad` and its kin mean what torch.func's mean, nested in any way, and the eager one keeps no graph."""

from __future__ import annotations

import pytest
import torch

import functitan as ft
from functitan.testing.sharded import sharded

PATTERN = "batch seq heads head_dim, batch seq heads head_dim"


def attend(x: torch.Tensor) -> torch.Tensor:
    """A scalar through a fused kernel that has no second derivative of its own."""
    return (ft.attention(PATTERN, x, x, x, causal=True) ** 2).sum()


def plain(x: torch.Tensor) -> torch.Tensor:
    q = x.transpose(1, 2)
    scores = (q @ q.transpose(-1, -2)) / x.shape[-1] ** 0.5
    scores = scores.masked_fill(~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), float("-inf"))
    return ((scores.softmax(-1) @ q) ** 2).sum()


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # float64


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_gradients_nest_in_every_way(x):
    second = torch.func.grad(lambda x: torch.func.grad(plain)(x).pow(2).sum())(x)
    ours = ft.grad(attend)
    close(ours(x), torch.func.grad(plain)(x))
    close(ft.grad(lambda x: ours(x).pow(2).sum())(x), second)
    close(torch.func.grad(lambda x: ours(x).pow(2).sum())(x), second)
    close(ft.grad(lambda x: torch.func.grad(attend)(x).pow(2).sum())(x), second)
    leaf = x.clone().requires_grad_()
    ours(leaf).pow(2).sum().backward()
    close(leaf.grad, second)


def test_a_gradient_sees_what_an_inner_one_closes_over():
    w, v = torch.tensor(3.0), torch.tensor(2.0)
    got = ft.grad(lambda w: ft.grad(lambda v: w * v**2)(v))(w)  # d/dw of 2 w v
    close(got, torch.tensor(4.0))


def test_forward_mode_and_hessians_equal_torchs(x):
    v = torch.ones_like(x)
    close(ft.jvp(attend, (x,), (v,))[1], torch.func.jvp(plain, (x,), (v,))[1])
    expected = torch.func.jvp(torch.func.grad(plain), (x,), (v,))[1]
    close(ft.hvp(attend, (x,), (v,)), expected)


def test_gradients_keep_structure_argnums_and_aux():
    params = {"a": [torch.tensor(2.0), None], "b": torch.tensor(3.0)}

    def fn(scale, params):
        return scale * params["a"][0] * params["b"], {"seen": params["b"], "name": "x"}

    (value, aux), (of_scale, grads) = ft.value_and_grad(fn, argnums=(0, 1), has_aux=True)(torch.tensor(5.0), params)
    assert (value.item(), aux["seen"].item(), aux["name"]) == (30.0, 3.0, "x")
    assert (of_scale.item(), grads["a"][0].item(), grads["a"][1], grads["b"].item()) == (6.0, 15.0, None, 10.0)
    assert not value.requires_grad and not aux["seen"].requires_grad and not grads["b"].requires_grad


def test_unused_leaves_have_zero_gradients():
    grads = ft.grad(lambda p: p["a"] ** 2)({"a": torch.tensor(1.0), "b": torch.ones(3)})
    assert torch.equal(grads["b"], torch.zeros(3))


def test_frozen_operands_cost_no_collective():
    rules = ft.AxisRules({"batch": "fsdp", "embed": "fsdp", "mlp": None})
    fn = lambda x, w: ft.reduce("batch mlp ->", ft.einsum("batch embed, embed mlp -> batch mlp", x, w))
    args = ft.Param("batch embed", (4, 8)), ft.Param("embed mlp", (8, 6))
    both = ft.explain(ft.grad(fn, argnums=(0, 1)), *args, mesh=dict(fsdp=2), rules=rules)
    frozen = ft.explain(ft.grad(fn), *args, mesh=dict(fsdp=2), rules=rules)
    backward = lambda ledger: [e.collective for e in ledger if e.phase == "backward"]
    assert backward(both) == ["all_gather", "reduce_scatter"] and backward(frozen) == ["all_gather"]


def test_what_only_unused_results_need_costs_no_collective():
    """Its own op, whose cotangents are all missing, sends nothing; and its gradient is zero."""
    rules = ft.AxisRules({"batch": "fsdp", "embed": "fsdp", "whole": None, "mlp": None})
    product = "batch whole, whole mlp, whole mlp -> batch mlp, batch mlp"

    def loss(v, w, x):
        v, w = (ft.take("whole, embed mlp -> whole mlp", torch.arange(8), w) for w in (v, w))
        return ft.reduce("batch mlp ->", ft.einsum(product, x, v, w)[1].square())

    args = torch.arange(16.0).view(8, 2), torch.arange(16.0).view(8, 2), torch.arange(32.0).view(4, 8)
    patterns = "embed mlp", "embed mlp", "batch whole"
    run = sharded(ft.grad(loss, argnums=(0, 1)), patterns, patterns[:2], mesh=dict(fsdp=2), rules=rules)
    of_v, of_w = run(*args)
    assert not of_v.any() and torch.equal(of_w, ft.grad(loss, argnums=1)(*args))  # whole numbers
    sent = ft.explain(ft.grad(loss, argnums=(0, 1)), *args, mesh=dict(fsdp=2), rules=rules, patterns=patterns)
    assert [e.collective for e in sent if e.phase == "backward"] == ["all_reduce"]


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: ft.grad(lambda x: x)(torch.ones(2)), r"the function gives float32\[2\](.|\n)*return a scalar"),
        (
            lambda: ft.grad(lambda p: p["n"])({"n": torch.tensor(1)}),
            r"argument 0\.n: int64\[\] has no derivative",
        ),
        (lambda: ft.grad(lambda p: p["n"])({"n": 1.0}), "argument 0.n: a value of type 'float' has no derivative"),
        (lambda: ft.jvp(torch.sin, (torch.ones(1),), ()), "0 tangents for 1 differentiated arguments"),
        (lambda: ft.vmap(torch.sin, (None,), axis="batch")(torch.ones(1)), "every in_dims is None"),
        (lambda: ft.vmap(torch.sin, axis="batch seq"), "is not one axis name"),
    ],
)
def test_mistakes_are_named(call, text):
    with pytest.raises(ft.FunctitanError, match=text):
        call()
