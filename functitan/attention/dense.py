"""Attention by one call of torch's SDPA: without a mesh, for keys with places of their own, for every derivative.

Invariant: no flag of the process is set, which threads of a virtual mesh would leave set; where a fused kernel lacks a
derivative the math backend is called outright, and `explain` says so.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from functitan.ops.function import needs_higher_derivatives
from functitan.sharding.env import Env
from functitan.sharding.message import Label

# The only backend with a second derivative and forward mode. Private: tried on torch 2.13.
_math = torch.ops.aten._scaled_dot_product_attention_math
_MATH = "attention runs on SDPA's math backend: the fused kernels have neither a second derivative nor forward mode"


def dense(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: float | None, env: Env, label: Label
) -> Tensor:
    """softmax(q k^T scale) v of [*batch, seq, heads, D]; `seen` is bool, [B or 1, heads or 1, queries, keys]."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    if seen is not None:
        seen = seen.squeeze(0) if seen.shape[0] == 1 else seen.reshape(*q.shape[:-3], *seen.shape[1:])
    grouped = q.shape[-3] != k.shape[-3]
    with env.span(*label):
        if not needs_higher_derivatives(env):
            out = scaled_dot_product_attention(q, k, v, seen, 0.0, causal, scale=scale, enable_gqa=grouped)
            return out.transpose(-3, -2)
        env.note(_MATH)
        added = None if seen is None else torch.where(seen, 0.0, -torch.inf).to(q.dtype)
        return _math(q, k, v, added, 0.0, causal, scale=scale, enable_gqa=grouped)[0].transpose(-3, -2)
