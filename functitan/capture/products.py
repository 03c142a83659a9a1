"""Products of matrices on CPUs that are not Intel's: by oneDNN, where torch would ask MKL.

Invariant: only float32 products whose first factor lies row by row, on the CPU; the sums are the same, in another
order. MKL leaves other makers' cores at half of their vector width: on an AMD EPYC (Zen 4) oneDNN takes 0.85 to 0.93 of
its time for `x w` and `g wᵀ`, and 1.0 to 1.6 for `xᵀ g`, which stays as it is.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

aten = torch.ops.aten

# torch.library.Library as graph ops, and oneDNN's linear (private): tried on torch 2.13
_LIBRARY = torch.library.Library("functitan", "FRAGMENT")
_LIBRARY.define("product(Tensor x, Tensor w) -> Tensor")
_LIBRARY.impl("product", lambda x, w: x.new_empty(x.shape[0], w.shape[1]), "Meta")


def _product(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w.t(), None, "none", [], "")


_LIBRARY.impl("product", _product, "CPU")


def choose_products(graph: GraphModule) -> GraphModule:
    """The graph with those products that oneDNN does faster here."""
    if not _helps():
        return graph
    for node in graph.graph.nodes:
        if node.target is aten.mm.default:
            x, w = (arg.meta["val"] for arg in node.args)
            if x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() and 1 in w.stride():
                node.target = torch.ops.functitan.product.default
    graph.recompile()
    return graph


@cache
def _helps() -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
