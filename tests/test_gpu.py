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


def symmetric(dtype) -> tuple:
    """(value, gradients) of two matmuls by fused ops over SymmetricMemory, and those of plain TP."""
    mesh = ft.make_mesh(tp=2, device_type="cuda", backend="gloo", timeout=120)  # NCCL refuses two ranks on one device
    rules = ft.AxisRules({"seq": "tp", "mlp": "tp", "embed": None})
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in ((64, 32), (32, 128), (128, 32))]
    patterns = ("seq embed", "embed mlp", "mlp embed")

    def loss(x, up, down):
        h = torch.tanh(ft.einsum("seq embed, embed mlp -> seq mlp", x, up))
        y = ft.einsum("seq mlp, mlp embed -> seq embed", h, down)
        return ft.reduce("seq embed ->", y * y)

    local = ft.shard(tuple(args), patterns, mesh=mesh, rules=rules)
    run = lambda fn: ft.spmd(ft.value_and_grad(fn, argnums=(0, 1, 2)), mesh=mesh, rules=rules)(*local)
    with torch.profiler.profile() as trace:
        found = run(ft.async_tp(loss))
    names = {event.name for event in trace.events()}
    assert {"fused_all_gather_matmul", "fused_matmul_reduce_scatter"} <= names
    return ft.tree.map(lambda x: x.cpu(), (found, run(loss)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_ops_over_symmetric_memory_give_what_plain_tp_does(dtype, monkeypatch):
    """Two ranks on one device."""
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 5e-2}[dtype]  # TF32 and another order; 8 bits
    for found, expected in ft.launch(symmetric, dtype, nprocs=2, timeout=300):
        for x, y in zip(ft.tree.leaves(found), ft.tree.leaves(expected), strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * y.abs().max().item())
