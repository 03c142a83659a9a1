"""Axes that vmaps hide: which tensors have them, and where they lie."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

import functitan as ft
from functitan.ops.move import constrain_like
from functitan.testing.sharded import assert_close, sharded


def test_a_result_is_batched_only_if_one_of_its_operands_is():
    """Of two results that share an operand, the one without the examples sends what it sends without a vmap."""
    rules = ft.AxisRules({"example": None, "embed": "tp", "mlp": None, "heads": None})
    product = lambda x, v, w: ft.einsum("embed, embed mlp, embed heads -> mlp, heads", x, v, w)
    args = torch.ones(4), torch.ones(3, 4, 5), torch.ones(4, 6)
    patterns = "embed", "example embed mlp", "embed heads"
    run = ft.vmap(product, (None, 0, None), axis="example")
    sent = ft.explain(run, *args, mesh=dict(tp=2), rules=rules, patterns=patterns)
    assert [(e.collective, e.bytes) for e in sent] == [("all_reduce", 3 * 5 * 4), ("all_reduce", 6 * 4)]


def test_other_axes_give_way_to_a_hidden_one():
    """Examples have the mesh dim of a sequence that, in a tensor without examples, is sharded."""
    rules = ft.AxisRules({"example": "dp", "seq": "dp", "heads": None})
    x, like = torch.arange(24.0).view(6, 4), torch.ones(4, 2)
    loss = lambda x, like: constrain_like("seq", x, "seq heads", like).square().sum()
    run = ft.vmap(ft.value_and_grad(loss), (0, None), axis="example")
    run = sharded(run, ("example seq", "seq heads"), ("example", "example seq"), mesh=dict(dp=2), rules=rules)
    value, gradient = run(x, like)
    assert torch.equal(value, x.square().sum(1)) and torch.equal(gradient, 2 * x)  # whole numbers


def test_gradients_that_nobody_wants_may_lie_otherwise_than_their_tensors():
    """Many cotangents of one loss take the mesh dim of the vocabulary: the gradient of x has none, the weight's has."""
    rules = ft.AxisRules({"example": "dp", "vocab": "dp", "batch": None, "embed": None})
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((2, 3), (3, 4), (6,)))
    labels = torch.tensor([3, 1])

    def pull(place, x, w, labels, g):
        loss = lambda y: ft.linear_cross_entropy("batch embed, embed vocab, batch ->", *((y, w), (x, y))[place], labels)
        return ft.vmap(lambda g: torch.func.vjp(loss, (x, w)[place])[1](g)[0], axis="example")(g)

    patterns, rows = ("batch embed", "embed vocab", "batch", "example"), "example batch embed"
    run = sharded(partial(pull, 0), patterns, rows, mesh=dict(dp=2), rules=rules)
    gradient = torch.func.grad(lambda x: F.cross_entropy(x @ w, labels, reduction="sum"))(x)
    assert_close(run(x, w, labels, g), g.view(6, 1, 1) * gradient)
    with pytest.raises(ft.LayoutError, match="operand 'embed vocab': axis 'vocab' lies over"):
        sharded(partial(pull, 1), patterns, rows, mesh=dict(dp=2), rules=rules)(x, w, labels, g)
