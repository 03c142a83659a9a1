"""On a CUDA device: the same losses as on the CPU, and backward on CUDA's own threads."""

from __future__ import annotations

import pytest
import torch

import functitan as ft
from functitan.models import llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CONFIG = llama.LlamaConfig(100, 64, 2, 4, 2, 16, 128)


def losses(mesh, device: str) -> list[float]:
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-3))
    key = ft.random.key(0).to(device)
    state = ft.TrainState.create(llama.params(CONFIG), tx, key, mesh=mesh, rules=llama.RULES)
    step = ft.train_step(lambda params, batch, key: llama.loss(params, batch, CONFIG), tx)
    tokens = torch.randint(0, CONFIG.vocab_size, (8, 33), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    batch = ft.shard(batch, ft.data.BATCH, mesh=mesh, rules=llama.RULES)
    found = []
    for _ in range(5):
        state, metrics = step(state, batch)
        found.append(metrics["loss"].item())
    return found


def test_cuda_has_the_losses_of_the_cpu():
    torch.testing.assert_close(losses(None, "cuda"), losses(None, "cpu"), rtol=1e-4, atol=0)  # float32, other kernels


def test_a_virtual_mesh_on_cuda_has_the_losses_of_the_cpu():
    expected = losses(None, "cpu")
    for found in ft.simulate(fsdp=2, tp=2)(losses)("cuda"):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
