"""One tile of attention and its gradient, by the kernels that give the logsumexp; and the merge of tiles.

Invariant: outputs and logsumexps of tiles are merged in float32 or better, and a row that sees no key has output 0 and
logsumexp -inf. The one home of torch's private fused kernels: those of CPU tried on torch 2.13, that of CUDA not yet,
where it serves half precision without a mask, and plain products the rest.

Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao, FlashAttention-2, 2023.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from functitan.ops.chunked_loss import high

_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_cuda = torch.ops.aten._scaled_dot_product_flash_attention.default  # as torch's own ring calls it
_cuda_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
_ROWS = 512  # of plain products at a time: scores of all rows of a full tile would be the whole matrix


def tile(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, seen: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """(output in the dtype of q, logsumexp in float32 or better) of queries [B, heads, rows, D], keys [B, kv, cols, D].

    `causal` is of a square tile; `seen` is bool, [B or 1, heads or 1, rows, cols].
    """
    if q.device.type != "cuda":
        out, lse = _cpu(q, k, v, 0.0, causal, attn_mask=_added(q, seen), scale=scale)
        return out, lse if seen is None else lse.masked_fill(~seen.any(-1), -math.inf)  # the kernel says 0
    if _fused(q, seen):
        k, v = (_repeated(x, q) for x in (k, v))
        return _cuda(q, k, v, 0.0, causal, scale=scale)[:2]
    parts = [_products(q[:, :, at], k, v, _visible(q, k, at, causal, seen), scale) for at in _chunks(q)]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, -2), torch.cat(lses, -1)


def tile_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    g: Tensor,
    causal: bool,
    seen: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one tile adds to the gradients of q, k, v; `out` and `lse` (0 where nothing is seen) are of all tiles."""
    if q.device.type != "cuda":
        return _cpu_backward(g, q, k, v, out, lse, 0.0, causal, attn_mask=_added(q, seen), scale=scale)
    if _fused(q, seen):
        keys, none = (_repeated(k, q), _repeated(v, q)), lse.new_zeros(2, dtype=torch.int64)
        rest = None, None, q.shape[-2], k.shape[-2], 0.0, causal, none, none
        dq, dk, dv = _cuda_backward(g, q, *keys, out, lse.contiguous(), *rest, scale=scale)
        dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
        return dq, dk, dv
    parts = []
    for at in _chunks(q):
        rows = q[:, :, at], out[:, :, at], lse[:, :, at], g[:, :, at]
        parts.append(_gradients(*rows, k, v, _visible(q, k, at, causal, seen), scale))
    dqs, dks, dvs = zip(*parts, strict=True)
    return torch.cat(dqs, -2), torch.stack(dks).sum(0), torch.stack(dvs).sum(0)


def merged(state: tuple[Tensor, Tensor] | None, q: Tensor, begin: int, part: tuple[Tensor, Tensor]):
    """What rows have seen so far, (output, logsumexp), with one more tile, whose first row is `begin`; in place."""
    out, lse = part
    if state is None:
        if out.shape == q.shape:
            return out, lse
        state = torch.zeros_like(q), torch.full(q.shape[:-1], -math.inf, dtype=high(q.dtype), device=q.device)
    whole, total = state[0].to(high(q.dtype)), state[1]
    at = slice(begin, begin + out.shape[-2])
    before = total[:, :, at]
    after = torch.logaddexp(before, lse)
    safe = after.masked_fill(after == -math.inf, 0.0)
    rows = whole[:, :, at]
    rows.mul_((before - safe).exp().unsqueeze(-1)).addcmul_(out.to(rows.dtype), (lse - safe).exp().unsqueeze(-1))
    before.copy_(after)
    return whole, total


def _added(q: Tensor, seen: Tensor | None) -> Tensor | None:
    """A mask as what is added to scores: the kernels want the dtype of q, and all of the batch."""
    if seen is None:
        return None
    return torch.where(seen, 0.0, -math.inf).to(q.dtype).expand(q.shape[0], -1, -1, -1)


def _fused(q: Tensor, seen: Tensor | None) -> bool:
    return seen is None and q.dtype in (torch.float16, torch.bfloat16)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _chunks(q: Tensor) -> list[slice]:
    return [slice(at, at + _ROWS) for at in range(0, q.shape[-2], _ROWS)]


def _visible(q: Tensor, k: Tensor, at: slice, causal: bool, seen: Tensor | None) -> Tensor | None:
    """What some rows of a tile see."""
    if causal:
        rows, columns = torch.arange(q.shape[-2], device=q.device)[at], torch.arange(k.shape[-2], device=q.device)
        return (rows.unsqueeze(-1) >= columns)[None, None]
    return None if seen is None else seen[:, :, at]


def _weighed(q: Tensor, k: Tensor, seen: Tensor | None, scale: float | None) -> tuple[Tensor, float]:
    """Scaled scores [B, kv, group, rows, cols] in float32 or better, -inf where hidden; and the scale."""
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    scores = (q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).transpose(-1, -2)).to(high(q.dtype)) * scale
    if seen is not None:
        seen = seen.expand(-1, q.shape[1], -1, -1).unflatten(1, (k.shape[1], -1))
        scores = scores.masked_fill(~seen, -math.inf)
    return scores, scale


def _products(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    scores, _ = _weighed(q, k, seen, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp()
    return (weights.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2), lse.flatten(1, 2)


def _gradients(
    q: Tensor, out: Tensor, lse: Tensor, g: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    scores, scale = _weighed(q, k, seen, scale)
    groups = (k.shape[1], -1)
    weights = (scores - lse.unflatten(1, groups).unsqueeze(-1)).exp()
    rows, of_out = q.unflatten(1, groups), g.unflatten(1, groups)
    inner = (g * out).sum(-1, keepdim=True, dtype=weights.dtype).unflatten(1, groups)
    of_scores = (weights * (of_out @ v.unsqueeze(2).transpose(-1, -2) - inner) * scale).to(q.dtype)
    dk = (of_scores.transpose(-1, -2) @ rows).sum(2)
    dv = (weights.to(g.dtype).transpose(-1, -2) @ of_out).sum(2)
    return (of_scores @ k.unsqueeze(2)).flatten(1, 2), dk, dv
