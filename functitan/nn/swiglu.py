"""The gated MLP: (silu(x gate) * (x up)) down. Shazeer, GLU Variants Improve Transformer, 2020."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from functitan import tree
from functitan.ops.einsum import einsum
from functitan.param import Param, fan_in


def params(embed: int, mlp: int) -> tree.Tree:
    """Two projections up and one down."""
    return {
        "gate": Param("embed mlp", (embed, mlp), fan_in("embed")),
        "up": Param("embed mlp", (embed, mlp), fan_in("embed")),
        "down": Param("mlp embed", (mlp, embed), fan_in("mlp")),
    }


def apply(params: tree.Tree, x: Tensor) -> Tensor:
    """`x` and the result: "batch seq embed"."""
    pattern = "batch seq embed, embed mlp, embed mlp -> batch seq mlp, batch seq mlp"
    gate, up = einsum(pattern, x, params["gate"], params["up"])
    return einsum("batch seq mlp, mlp embed -> batch seq embed", silu(gate) * up, params["down"])
