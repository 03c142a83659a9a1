"""Self-attention with grouped queries and rotary positions.

Invariant: queries, keys and values are one op, so their input is gathered once and its cotangents are reduced once.
"""

from __future__ import annotations

from torch import Tensor

from functitan import tree
from functitan.nn import rope
from functitan.ops.attention import attention
from functitan.ops.einsum import einsum
from functitan.param import Param, fan_in


def params(embed: int, heads: int, kv_heads: int, head_dim: int) -> tree.Tree:
    """Projections to queries, keys and values, and back."""
    return {
        "q": Param("embed heads head_dim", (embed, heads, head_dim), fan_in("embed")),
        "k": Param("embed kv_heads head_dim", (embed, kv_heads, head_dim), fan_in("embed")),
        "v": Param("embed kv_heads head_dim", (embed, kv_heads, head_dim), fan_in("embed")),
        "out": Param("heads head_dim embed", (heads, head_dim, embed), fan_in("heads", "head_dim")),
    }


def apply(
    params: tree.Tree,
    x: Tensor,
    *,
    theta: float = 10000.0,
    scaling: rope.RopeScaling | None = None,
    causal: bool = True,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """`x` and the result: "batch seq embed"; `positions` and `segments`: "batch seq"."""
    q, k, v = einsum(
        "batch seq embed, embed heads head_dim, embed kv_heads head_dim, embed kv_heads head_dim"
        " -> batch seq heads head_dim, batch seq kv_heads head_dim, batch seq kv_heads head_dim",
        x, params["q"], params["k"], params["v"],
    )  # fmt: skip
    q = rope.apply("batch seq heads head_dim", q, theta=theta, scaling=scaling, positions=positions)
    k = rope.apply("batch seq kv_heads head_dim", k, theta=theta, scaling=scaling, positions=positions)
    pattern = "batch seq heads head_dim, batch seq kv_heads head_dim"
    out = attention(pattern, q, k, v, causal=causal, positions=positions, segments=segments)
    return einsum("batch seq heads head_dim, heads head_dim embed -> batch seq embed", out, params["out"])
