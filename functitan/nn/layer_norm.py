"""LayerNorm with a learned scale and bias."""

from __future__ import annotations

from torch import Tensor

from functitan import tree
from functitan.ops.norm import layer_norm
from functitan.param import Param, ones, zeros


def params(size: int) -> tree.Tree:
    """Scale and bias, one of each for each position of `embed`."""
    return {"scale": Param("embed", (size,), ones), "bias": Param("embed", (size,), zeros)}


def apply(params: tree.Tree, x: Tensor, *, eps: float = 1e-5) -> Tensor:
    """`x`: "batch seq embed"; see `ft.layer_norm`."""
    return layer_norm("batch seq embed, embed", x, params["scale"], params["bias"], eps=eps)
