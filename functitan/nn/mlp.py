"""The MLP with biases: gelu(x up + up_bias) down + down_bias. Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.

Invariant: gelu is elementwise, so plain torch; a bias meets an activation by `ft.broadcast`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu

from functitan import tree
from functitan.ops.einsum import einsum
from functitan.ops.reduce import broadcast
from functitan.param import Initializer, Param, fan_in, zeros


def params(embed: int, mlp: int, *, init: Initializer | None = None, out_init: Initializer | None = None) -> tree.Tree:
    """A projection up (`init`) and one down (`out_init`), by default by fan-in, and their biases."""
    return {
        "up": Param("embed mlp", (embed, mlp), init or fan_in("embed")),
        "up_bias": Param("mlp", (mlp,), zeros),
        "down": Param("mlp embed", (mlp, embed), out_init or fan_in("mlp")),
        "down_bias": Param("embed", (embed,), zeros),
    }


def apply(params: tree.Tree, x: Tensor) -> Tensor:
    """`x` and the result: "batch seq embed". gelu is its tanh approximation, as in GPT-2."""
    up = einsum("batch seq embed, embed mlp -> batch seq mlp", x, params["up"])
    hidden = gelu(up + broadcast("mlp -> batch seq mlp", params["up_bias"]), approximate="tanh")
    down = einsum("batch seq mlp, mlp embed -> batch seq embed", hidden, params["down"])
    return down + broadcast("embed -> batch seq embed", params["down_bias"])
