"""What a run reports: speed, the share of the hardware's peak that it uses, and memory.

Invariant: floating-point operations are counted from the declarations alone, by the usual formula for transformers.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable

import torch

from functitan import tree


def num_params(declarations: tree.Tree) -> int:
    """Number of parameters.

    >>> import functitan as ft
    >>> num_params({"w": ft.Param("embed mlp", (2, 3))})
    6
    """
    return sum(math.prod(param.shape) for param in tree.leaves(declarations))


def flops_per_token(declarations: tree.Tree, num_layers: int, num_heads: int, head_dim: int, seq: int) -> float:
    """Operations per token of forward and backward: 6 for each parameter of a matmul, and attention's own.

    6 N + 12 layers · heads · head_dim · seq, where N leaves out lookup tables and biases (PaLM, appendix B, 2022).
    """
    leaves = zip(tree.paths(declarations), tree.leaves(declarations), strict=True)
    named = ((path.split(".")[-1], p) for path, p in leaves if len(p.shape) > 1)
    matmul = sum(math.prod(p.shape) for name, p in named if name != "embedding" and not name.endswith("bias"))
    if "unembedding" not in tree.paths(declarations) and "embedding" in tree.paths(declarations):
        matmul += math.prod(declarations["embedding"].shape)  # tied: the table is the output's matrix too
    return 6 * matmul + 12 * num_layers * num_heads * head_dim * seq


def measure_peak_flops(
    size: int = 1024, dtype: torch.dtype = torch.float32, device: str = "cpu", seconds: float = 0.3
) -> float:
    """Operations per second of a plain matmul on this device: what MFU is measured against."""
    x = torch.randn(size, size, dtype=dtype, device=device)
    best = _timed(lambda: x @ x, device)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, _timed(lambda: x @ x, device))
    return 2 * size**3 / best


def memory_bytes() -> int:
    """Peak memory of this process: of its CUDA device where it uses one, else the resident set."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _timed(fn: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    fn()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start
