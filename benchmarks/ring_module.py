"""The benchmarks' peer over a sharded sequence: torch's own experimental context parallelism, in FSDP2's Llama.

Invariant: the ring is torch's (`torch.distributed.tensor.experimental._context_parallel`, with its head-tail balance),
which has handlers for CUDA's kernels alone; on the CPU its two templates are given the CPU's kernel by hand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from llama_module import Llama, rotate
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention as ring  # tried on torch 2.13
from torch.nn.functional import cross_entropy

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = ring._templated_ring_attention(group, 2, FORWARD, q, k, v, is_causal=True)
        ctx.group = group
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        call = lambda query, key, value, out, logsumexp, is_causal, grad_out: BACKWARD(
            grad_out, query, key, value, out, logsumexp, 0.0, is_causal
        )
        grads = ring._templated_ring_attention_backward(
            ctx.group, 2, call, g.contiguous(), "grad_out", q, k, v, out, lse, True
        )
        return None, *grads[:3]


def with_ring(model: Llama, mesh: DeviceMesh) -> Llama:
    """The module with its attention over the sequence's shards, rotary angles of this rank's positions, and FSDP2."""
    group, rank, n = mesh.get_group(), mesh.get_local_rank(), mesh.size()

    def attend(self: nn.Module, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, _ = h.shape
        q, k, v = (f(h).view(batch, seq, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)  # float32 under autocast
        h = Ring.apply(group, q, k, v)
        return self.out(h.transpose(1, 2).reshape(batch, seq, -1))

    model.cos, model.sin = (own(x, 0, rank, n) for x in (model.cos, model.sin))
    for layer in model.layers:
        layer.attention.forward = attend.__get__(layer.attention)
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def own(x: Tensor, axis: int, rank: int, n: int) -> Tensor:
    """This rank's head and tail block of an axis."""
    blocks = x.chunk(2 * n, axis)
    return torch.cat([blocks[rank], blocks[2 * n - 1 - rank]], axis)


def loss_of(model: Llama, mesh: DeviceMesh, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss over this rank's positions, of a batch of whole sequences."""
    tokens, labels = (own(batch[name], 1, mesh.get_local_rank(), mesh.size()) for name in ("tokens", "labels"))
    return cross_entropy(model(tokens).flatten(0, 1).float(), labels.flatten())


def why_not_public(mesh: DeviceMesh) -> str:
    """What torch's public `context_parallel` answers on this device, or the empty string where it runs."""
    q = torch.randn(1, 2, 64, 16, device=mesh.device_type)
    whole = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    dist.broadcast(q, 0)
    try:
        with context_parallel(mesh, buffers=[q], buffer_seq_dims=[2]):
            out = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
    right = out.shape[2] == 32 and not torch.equal(out, own(whole, 2, mesh.get_local_rank(), mesh.size()))
    return "it runs, and attends to each rank's own shard alone" if right else ""
