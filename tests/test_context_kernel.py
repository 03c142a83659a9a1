"""One tile of attention: the CPU's fused kernel and the plain products that other devices take give the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from functitan.attention import kernel
from functitan.testing.sharded import assert_close


@pytest.mark.parametrize("mask", ["full", "causal", "masked"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_products_are_the_fused_kernel(mask: str, kv_heads: int, monkeypatch):
    monkeypatch.setattr(kernel, "_ROWS", 4)  # so that rows are cut here, too
    q, g = torch.randn(2, 2, 4, 10, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, 10, 8, dtype=torch.float64)
    seen = torch.rand(2, 1, 10, 10) < 0.5 if mask == "masked" else None
    if seen is not None:
        seen[:, :, 3] = False  # a row that sees nothing
    out, lse = kernel.tile(q, k, v, mask == "causal", seen, None)
    parts = [
        kernel._products(q[:, :, at], k, v, kernel._visible(q, k, at, mask == "causal", seen), None)
        for at in kernel._chunks(q)
    ]
    assert_close([torch.cat([p[0] for p in parts], -2), torch.cat([p[1] for p in parts], -1)], [out, lse])
    given = out, lse.masked_fill(lse == -torch.inf, 0.0), g
    fused = kernel.tile_gradients(q, k, v, *given, mask == "causal", seen, None)
    grads = [
        kernel._gradients(
            q[:, :, at], *(x[:, :, at] for x in given), k, v, kernel._visible(q, k, at, mask == "causal", seen), None
        )
        for at in kernel._chunks(q)
    ]
    own = torch.cat([p[0] for p in grads], -2), sum(p[1] for p in grads), sum(p[2] for p in grads)
    assert_close(own, tuple(fused))


def test_flex_attention_does_not_train_on_the_cpu():
    """Why masks have tiles of their own there. When this fails, FlexAttention can serve the CPU as well."""
    q = torch.randn(1, 1, 16, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(q, q, q)
