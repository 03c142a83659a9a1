"""Two programs with their data, of which microbatches are made: a Llama on ragged text, and two matmuls."""

from __future__ import annotations

import functools

import torch

import functitan as ft
from functitan.models import llama

RULES = llama.RULES
CONFIG = llama.LlamaConfig(61, 16, 2, 4, 2, 4, 32, rope_theta=10000.0)
DECLARED = ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, p.init, torch.float64), llama.params(CONFIG))
WEIGHTS = len(ft.tree.leaves(DECLARED))
MATMULS = {"up": ft.Param("embed mlp", (8, 12)), "down": ft.Param("mlp embed", (12, 8))}


def named(sizes: dict[str, int]) -> str:
    return "-".join(f"{dim}{size}" for dim, size in sizes.items())


def loss(params, batch, key):
    return llama.loss(params, batch, CONFIG)


def matmuls(params, x, key):
    """A sum of squares over "batch embed", and as many examples."""
    h = ft.einsum("batch embed, embed mlp -> batch mlp", x, params["up"])
    y = ft.einsum("batch mlp, mlp embed -> batch embed", torch.tanh(h), params["down"])
    return ft.reduce("batch embed ->", y * y), ft.reduce("batch ->", torch.ones(x.shape[:1]))


@functools.cache
def text() -> dict[str, torch.Tensor]:
    """16 examples. A third of the labels is ignored, and all of the first five, which fill whole microbatches."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, CONFIG.vocab_size, (16, 17), generator=generator)
    labels = torch.where(torch.rand(16, 16, generator=generator) < 0.3, -100, tokens[:, 1:])
    labels[:5] = -100
    return {"tokens": tokens[:, :-1].contiguous(), "labels": labels}


def state_of(mesh, tx, rules=RULES):
    return ft.TrainState.create(DECLARED, tx, ft.random.key(0), mesh=mesh, rules=rules)
