"""RMSNorm with a learned scale."""

from __future__ import annotations

from torch import Tensor

from functitan import tree
from functitan.ops.norm import rms_norm
from functitan.param import Param, ones


def params(size: int) -> tree.Tree:
    """The scale, one for each position of `embed`."""
    return {"scale": Param("embed", (size,), ones)}


def apply(params: tree.Tree, x: Tensor, *, eps: float = 1e-5) -> Tensor:
    """`x`: "batch seq embed"; see `ft.rms_norm`."""
    return rms_norm("batch seq embed, embed", x, params["scale"], eps=eps)
