"""A second derivative through `ft.compile` raises, or is right: never 0 for what a region's backward has not."""

from __future__ import annotations

import pytest
import torch

import functitan as ft

X = torch.tensor([0.3, 0.7], dtype=torch.float64)
NAMES = "batch embed -> batch"
FUNCTIONS = {
    **{
        name: getattr(torch, name)
        for name in ("tanh", "sigmoid", "exp", "square", "sin", "log", "sqrt", "rsqrt", "relu")
    },
    "softmax": lambda x: torch.softmax(x, 0) * x,
    "silu": torch.nn.functional.silu,
    "cumprod": lambda x: torch.cumprod(x, 0),
    "divided": lambda x: 1 / x,
    "max": lambda x: ft.reduce(NAMES, x[None] * x[:, None] ** 2, op="max"),
    "logsumexp": lambda x: ft.reduce(NAMES, x[None] * x[:, None], op="logsumexp"),
    "einsum": lambda x: ft.einsum("embed, mlp -> embed mlp", x, x),
    "remat": ft.remat(lambda x: torch.tanh(x)),
    "constant": lambda x: torch.ones(2, dtype=torch.float64),
}
DERIVATIVES = {
    "hvp": lambda f: ft.hvp(f, (X,), (torch.ones_like(X),)),
    "grad of grad": lambda f: ft.grad(lambda x: ft.grad(f)(x).sum())(X),
    "autograd": lambda f: _twice(f),
}


def _twice(f):
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(g.sum(), x)[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_second_derivative_raises_or_is_right(name):
    fn = FUNCTIONS[name]
    block = ft.compile(fn, backend="graph")
    outside = lambda inner: lambda x: inner(x).sum() + (x**3).sum()
    for what, derivative in DERIVATIVES.items():
        try:
            found = derivative(outside(block))
        except ft.FunctitanError as error:
            assert "a second derivative through it is not supported" in str(error), what
            assert name != "constant"
        else:
            assert torch.allclose(found, derivative(outside(fn))), what
    assert torch.allclose(ft.grad(outside(block))(X), ft.grad(outside(fn))(X))


def test_a_mixed_derivative_raises():
    """The inner gradient is of the weight alone; the outer one of the other argument."""
    block = ft.compile(lambda w, x: torch.exp(w * x).sum(), backend="graph")
    inner = lambda x: ft.grad(block)(X, x).sum() + (x**2).sum()
    with pytest.raises(ft.FunctitanError, match="a second derivative through it"):
        ft.grad(inner)(X)


def test_what_the_derivative_does_not_pass_is_not_refused():
    """A compiled gradient beside what is differentiated twice."""
    block = ft.compile(lambda w: torch.tanh(w).sum(), backend="graph")
    found = ft.hvp(lambda x: (ft.grad(block)(X) * x**3).sum(), (X,), (torch.ones_like(X),))
    assert torch.allclose(found, 6 * X * (1 - torch.tanh(X) ** 2))
