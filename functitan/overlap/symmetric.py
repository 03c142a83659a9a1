"""Matmuls fused with their transfers over SymmetricMemory, on CUDA. The only user of `torch.ops.symm_mem`.

Invariant: a fused op sends what the ring would send, and is entered into the ledger as the ring's messages. Written
from the source of torch 2.13 (`torch.distributed._symmetric_memory`, private), and tried there on CPU by its fallbacks
alone: on devices by the tests marked `gpu`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory  # private; it defines the ops

from functitan.sharding.mesh import Mesh
from functitan.sharding.rules import Dims

assert symmetric_memory  # imported for what it defines


def fits(x: Tensor, mesh: Mesh) -> bool:
    """Whether the fused ops have a kernel: of processes, on CUDA."""
    return x.is_cuda and x.is_floating_point() and mesh.transport.group is not None


def gather_matmul(x: Tensor, axis: int, weights: Sequence[Tensor], mesh: Mesh, dims: Dims) -> list[Tensor]:
    """`x` ([..., K]) gathered along an axis, not the last, over the group; its products with weights [K, N]."""
    assert mesh.transport.group is not None
    group = mesh.transport.group(dims)[0]
    return torch.ops.symm_mem.fused_all_gather_matmul(x, list(weights), axis, group, return_A=False)[1]


def matmul_scatter(x: Tensor, weight: Tensor, axis: int, mesh: Mesh, dims: Dims) -> Tensor:
    """This rank's part, along an axis of x ([..., K]) that is not the last, of the sum over the group of x @ weight."""
    assert mesh.transport.group is not None
    return torch.ops.symm_mem.fused_matmul_reduce_scatter(x, weight, "sum", axis, mesh.transport.group(dims)[0])
