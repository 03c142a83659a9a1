"""Self-attention with grouped queries; rotary positions and biases where a model has them.

Invariant: queries, keys and values are one op, so their input is gathered once and its cotangents are reduced once.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from functitan import tree
from functitan.attention.op import attention
from functitan.nn import rope
from functitan.ops.einsum import einsum
from functitan.ops.reduce import broadcast
from functitan.param import Initializer, Param, fan_in, zeros
from functitan.remat.checkpoint_name import checkpoint_name

MATRICES = {  # what each projection maps, for optimizers of matrices: `optim.muon`
    "embed heads head_dim": "embed -> heads head_dim",
    "embed kv_heads head_dim": "embed -> kv_heads head_dim",
    "heads head_dim embed": "heads head_dim -> embed",
}


def params(
    embed: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    bias: bool = False,
    init: Initializer | None = None,
    out_init: Initializer | None = None,
) -> tree.Tree:
    """Projections to queries, keys and values (`init`), and back (`out_init`); by default both begin by fan-in."""
    init, out_init = init or fan_in("embed"), out_init or fan_in("heads", "head_dim")
    declared = {
        "q": Param("embed heads head_dim", (embed, heads, head_dim), init),
        "k": Param("embed kv_heads head_dim", (embed, kv_heads, head_dim), init),
        "v": Param("embed kv_heads head_dim", (embed, kv_heads, head_dim), init),
        "out": Param("heads head_dim embed", (heads, head_dim, embed), out_init),
    }
    if bias:
        declared |= {
            "q_bias": Param("heads head_dim", (heads, head_dim), zeros),
            "k_bias": Param("kv_heads head_dim", (kv_heads, head_dim), zeros),
            "v_bias": Param("kv_heads head_dim", (kv_heads, head_dim), zeros),
            "out_bias": Param("embed", (embed,), zeros),
        }
    return declared


def apply(
    params: tree.Tree,
    x: Tensor,
    *,
    theta: float | None = 10000.0,
    scaling: rope.RopeScaling | None = None,
    causal: bool = True,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    attend: Callable[..., Tensor] = attention,
) -> Tensor:
    """`x` and the result: "batch seq embed"; `positions` and `segments`: "batch seq", as `ft.attention` takes them.

    `attend` replaces `ft.attention`, where keys and values come from a cache too. Without `theta` nothing is rotated:
    positions then come with `x`. What the heads give is named "attn_out".
    """
    q, k, v = einsum(
        "batch seq embed, embed heads head_dim, embed kv_heads head_dim, embed kv_heads head_dim"
        " -> batch seq heads head_dim, batch seq kv_heads head_dim, batch seq kv_heads head_dim",
        x, params["q"], params["k"], params["v"],
    )  # fmt: skip
    if "q_bias" in params:
        of_kv = "kv_heads head_dim -> batch seq kv_heads head_dim"
        q = q + broadcast("heads head_dim -> batch seq heads head_dim", params["q_bias"])
        k, v = k + broadcast(of_kv, params["k_bias"]), v + broadcast(of_kv, params["v_bias"])
    if theta is not None:
        q = rope.apply("batch seq heads head_dim", q, theta=theta, scaling=scaling, positions=positions)
        k = rope.apply("batch seq kv_heads head_dim", k, theta=theta, scaling=scaling, positions=positions)
    pattern = "batch seq heads head_dim, batch seq kv_heads head_dim"
    out = attend(pattern, q, k, v, causal=causal, positions=positions, segments=segments)
    out = checkpoint_name(out, "attn_out")
    out = einsum("batch seq heads head_dim, heads head_dim embed -> batch seq embed", out, params["out"])
    return out + broadcast("embed -> batch seq embed", params["out_bias"]) if "out_bias" in params else out
