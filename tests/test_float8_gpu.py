"""On a CUDA device with float8 kernels (sm89 or later): they have the emulated numbers, in eager and compiled."""

from __future__ import annotations

import pytest
import torch

import functitan as ft
from functitan.models import llama

HAS_KERNELS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_KERNELS, reason="needs CUDA sm89 or later")]
MATMUL = "batch embed, embed mlp -> batch mlp"
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
CONFIG = llama.LLAMA_8B._replace(num_layers=1)


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", RECIPES)
def test_kernels_have_the_emulated_numbers(recipe, dtype):
    x, w, g = (random(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(256, 512), (512, 384), (256, 384)]))

    def products(emulate: bool):
        fn = ft.float8(lambda x, w: ft.einsum(MATMUL, x, w), recipe=recipe, emulate=emulate)
        value, back = torch.func.vjp(fn, x, w)
        return (value, *back(g))

    for kernel, emulated in zip(products(False), products(True), strict=True):
        assert kernel.dtype == dtype
        # tensor cores sum in some 14 bits; bfloat16 has 8: a share of the largest sum
        assert (kernel.float() - emulated.float()).abs().max() < 1e-2 * emulated.float().abs().max()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_block_of_the_8b_has_the_gradients_of_bfloat16(recipe):
    """To 10% of their norm: e5m2 alone rounds by up to 12%."""
    params = ft.init(llama.block_params(CONFIG), ft.random.key(0).to("cuda"))
    x = random(1, 1024, CONFIG.embed, seed=1, dtype=torch.bfloat16)

    def loss(params, x):
        return ft.reduce("batch seq embed ->", llama.block(params, x, CONFIG).float() ** 2)

    plain = ft.grad(ft.precision(loss))
    ours = ft.float8(plain, recipe=recipe)
    expected = ft.tree.leaves(plain(params, x))
    for found in (ours(params, x), ft.jit(ours)(params, x)):
        for a, b in zip(ft.tree.leaves(found), expected, strict=True):
            assert (a - b).norm() < 0.1 * b.norm()
