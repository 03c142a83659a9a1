"""Unfuse attention: its backward by matrix products, where the CPU's fused kernel is slow: short, in bfloat16.

Invariant: only causal or full attention without a mask on the CPU, of up to 512 positions, where bfloat16 products have
instructions of their own. Scores and probabilities are float32, and rounded where they enter a product, as the fused
kernel does. On an AMD EPYC (Zen 4) it takes 0.40 to 0.55 of its time up to 512 positions, and 1.0 to 1.5 for 1024.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from functitan.capture.opaque import Opaque, opaque
from functitan.capture.trace import Program, trace

aten = torch.ops.aten

_ROWS, _LONGEST = 64, 512
# private: the fused kernel's backward; tried on torch 2.13
_FUSED = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def unfuse_attention(program: Program) -> Program:
    """The program with those backward passes of attention that products do faster here as a program of products."""
    known: dict[Any, Opaque] = {}
    for node in program.graph.graph.nodes:
        if node.target is _FUSED and _helps(node):
            *tensors, _, causal = node.args
            scale = node.kwargs.get("scale") or tensors[1].meta["val"].shape[-1] ** -0.5
            given = tuple(x.meta["val"] for x in tensors)
            key = (causal, scale, *((x.shape, x.stride()) for x in given))
            if key not in known:
                fn = partial(by_products, causal=causal, scale=scale)
                known[key] = opaque(trace(fn, given, what="attention's backward"), "inductor")
            callee = known[key]
            node.target, node.args, node.kwargs = callee.op, (tensors,), {}
            node.meta["val"] = list(callee.results)
    return program._replace(calls={**program.calls, **{callee.op: callee for callee in known.values()}})


def by_products(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangents of q [batch, heads, seq, head_dim], k and v [batch, kv_heads, seq, head_dim].

    With P = exp(q kᵀ scale - logsumexp), dS = P * (g vᵀ - Σ g out): dv = Pᵀ g, dq = dS k scale, dk = dSᵀ q scale. Rows
    are taken in blocks, each with the columns that it sees. Dao et al., FlashAttention, 2022, appendix B.
    """
    batch, heads, rows, dim = q.shape
    kv_heads, columns = k.shape[1:3]
    group, size = heads // kv_heads, batch * kv_heads
    q, g, out = (x.reshape(size, group, rows, dim) for x in (q, g, out))
    keys, values = (x.reshape(size, columns, dim) for x in (k, v))
    logsumexp = logsumexp.reshape(size, group, rows, 1)
    shared = (out.float() * g.float()).sum(-1, keepdim=True)
    dq, dk, dv = [], [], []
    for first in range(0, rows, _ROWS):
        last = min(first + _ROWS, rows)
        end = last if causal else columns
        of = lambda x, first=first, last=last: x[:, :, first:last]
        flat = lambda x: x.reshape(size, -1, x.shape[-1])
        full = lambda x, n=last - first, end=end: x.reshape(size, group, n, end)
        own, given = flat(of(q)), flat(of(g))
        scores = full(torch.bmm(own.float() * scale, keys[:, :end].float().mT))
        p = torch.exp(scores - of(logsumexp))
        if causal:
            p = torch.where(torch.arange(first, last).unsqueeze(-1) >= torch.arange(end), p, 0.0)
        ds = flat((p * (full(torch.bmm(given, values[:, :end].mT)).float() - of(shared))).to(q.dtype))
        dq.append(torch.bmm(ds, keys[:, :end]).reshape(size, group, -1, dim))
        dk.append(torch.bmm(ds.mT, own))
        dv.append(torch.bmm(flat(p.to(q.dtype)).mT, given))
    laid = lambda x, n: x.reshape(batch, n, -1, dim).transpose(1, 2).contiguous().transpose(1, 2)
    dq = laid(torch.cat(dq, 2) * scale, heads)
    return dq, laid((_added(dk) * scale).to(q.dtype), kv_heads), laid(_added(dv).to(q.dtype), kv_heads)


def _added(parts: list[Tensor]) -> Tensor:
    """The float32 sum of [size, columns, dim], where a later part has all columns of those before it."""
    starts = [0, *(x.shape[1] for x in parts)]
    rows = [
        sum(x[:, start:end].float() for x in parts if x.shape[1] >= end)
        for start, end in pairwise(starts)
        if end > start
    ]
    return torch.cat(rows, 1)  # type: ignore[arg-type]


def _helps(node: Node) -> bool:
    args: Any = node.args
    q, k = args[1].meta["val"], args[2].meta["val"]
    plain = node.kwargs.get("attn_mask") is None and q.shape[2] == k.shape[2] and args[6] == 0
    short = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= _LONGEST
    return plain and short and _instructions()


@cache
def _instructions() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
