"""The benchmarks' peer: a hand-written Llama as an `nn.Module`, and functitan's weights in it.

Invariant: the same function as `functitan.models.llama` for an untied config whose vocabulary needs no padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import functitan as ft
from functitan.models.llama import LlamaConfig


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.q = nn.Linear(c.embed, c.num_heads * c.head_dim, bias=False)
        self.k = nn.Linear(c.embed, c.num_kv_heads * c.head_dim, bias=False)
        self.v = nn.Linear(c.embed, c.num_kv_heads * c.head_dim, bias=False)
        self.out = nn.Linear(c.num_heads * c.head_dim, c.embed, bias=False)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, _ = h.shape
        q, k, v = (f(h).view(batch, seq, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        h = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(h.transpose(1, 2).reshape(batch, seq, -1))


class Mlp(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(c.embed, c.mlp, bias=False), nn.Linear(c.embed, c.mlp, bias=False)
        self.down = nn.Linear(c.mlp, c.embed, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(h)) * self.up(h))


class Block(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(c.embed, c.norm_eps), nn.RMSNorm(c.embed, c.norm_eps)
        self.attention, self.mlp = Attention(c), Mlp(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    def __init__(self, c: LlamaConfig, seq: int) -> None:
        super().__init__()
        self.c = c
        self.embedding = nn.Embedding(c.vocab_size, c.embed)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.norm = nn.RMSNorm(c.embed, c.norm_eps)
        self.unembedding = nn.Linear(c.embed, c.vocab_size, bias=False)
        freqs = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
        angles = torch.outer(torch.arange(seq), freqs)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.unembedding(self.norm(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def loaded(c: LlamaConfig, seq: int, params: ft.tree.Tree) -> Llama:
    """A module with functitan's whole parameters: its matrices are [in, out], nn.Linear's [out, in]."""
    model = Llama(c, seq)
    matrix = lambda x, rows: x.reshape(rows, -1).T
    with torch.no_grad():
        model.embedding.weight.copy_(params["embedding"])
        model.unembedding.weight.copy_(params["unembedding"].T)
        model.norm.weight.copy_(params["norm"]["scale"])
        for layer, p in zip(model.layers, params["layers"], strict=True):
            layer.attention_norm.weight.copy_(p["attention_norm"]["scale"])
            layer.mlp_norm.weight.copy_(p["mlp_norm"]["scale"])
            for name in ("q", "k", "v"):
                getattr(layer.attention, name).weight.copy_(matrix(p["attention"][name], c.embed))
            layer.attention.out.weight.copy_(matrix(p["attention"]["out"], c.num_heads * c.head_dim))
            for name in ("gate", "up", "down"):
                getattr(layer.mlp, name).weight.copy_(p["mlp"][name].T)
    return model


def batches(c: LlamaConfig, count: int, batch: int, seq: int) -> list[dict[str, Tensor]]:
    """Random tokens and the labels that follow, global, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, c.vocab_size, (count, batch, seq + 1), generator=generator)
    return [{"tokens": t[:, :-1].contiguous(), "labels": t[:, 1:].contiguous()} for t in tokens]
