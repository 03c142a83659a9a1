"""Laws of attention's backward by products: the gradients of the formula, causal or not, grouped, of any length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import functitan as ft
from functitan.capture.passes import attention

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
SHAPES = st.tuples(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 150), st.sampled_from([4, 6])
)


def draw(batch, kv_heads, group, rows, dim, dtype):
    make = torch.Generator().manual_seed(rows)
    sizes = [(batch, n, rows, dim) for n in (kv_heads * group, kv_heads * group, kv_heads, kv_heads)]
    return [torch.randn(size, generator=make, dtype=torch.float64).to(dtype) for size in sizes]


def by_autograd(g, q, k, v, causal, scale):
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    spread = lambda x: x.repeat_interleave(group, 1)
    scores = q @ spread(k).mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.autograd.grad(scores.softmax(-1) @ spread(v), (q, k, v), g.double())


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.booleans())
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)  # sums; 8 bits, some times
def test_products_give_the_gradients_of_attention(dtype, bound, shape, causal):
    g, q, k, v = draw(*shape, dtype)
    out, logsumexp = FUSED(q, k, v, 0.0, causal, scale=0.3)
    found = attention.by_products(g, q, k, v, out, logsumexp, causal, 0.3)
    for x, y in zip(found, by_autograd(g, q, k, v, causal, 0.3), strict=True):
        assert x.dtype == dtype and x.shape == y.shape
        assert (x.double() - y).norm() <= bound * max(y.norm(), g.double().norm())


def step(q, k, v):
    seen = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return (seen.float() ** 2).sum()


def targets(jitted, *args):
    return {str(node.target) for node in jitted.graph(*args).graph.nodes}


@pytest.mark.parametrize("backend", ["graph", "inductor"])
def test_a_captured_backward_in_bfloat16_runs_by_products(monkeypatch, backend):
    monkeypatch.setattr(attention, "_instructions", lambda: True)
    args = draw(2, 2, 2, 80, 8, torch.bfloat16)[1:]
    fn = ft.grad(step, argnums=(0, 1, 2))
    fused, products = (ft.jit(fn, backend=backend, skip=skip) for skip in (["unfuse_attention"], []))
    assert any("attention_for_cpu_backward" in name for name in targets(fused, *args))
    assert not any("attention_for_cpu_backward" in name for name in targets(products, *args))
    for x, y in zip(products(*args), fused(*args), strict=True):
        assert x.stride() == y.stride()
        assert (x - y).norm() <= 1e-2 * y.norm()  # each rounds to 8 bits in other places


@pytest.mark.parametrize("dtype, rows", [(torch.float32, 80), (torch.bfloat16, 600)])
def test_what_the_fused_kernel_does_well_stays_with_it(monkeypatch, dtype, rows):
    monkeypatch.setattr(attention, "_instructions", lambda: True)
    args = draw(1, 1, 1, rows, 8, dtype)[1:]
    assert any("attention_for_cpu_backward" in name for name in targets(ft.jit(ft.grad(step), backend="graph"), *args))
