"""Laws of the passes over captured programs: numbers stay, bytes stay, messages get fewer, memory stays bounded."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

import functitan as ft
from functitan.capture.passes import PASSES
from functitan.capture.passes.bucket import period
from functitan.sharding.traced import collective_of, is_collective

CONFIG = ft.models.llama.DEBUG._replace(num_layers=2, vocab_size=256, embed=64, mlp=128, head_dim=8)
RULES = ft.models.llama.RULES
TX = ft.optim.chain(ft.optim.clip_by_global_norm(0.05), ft.optim.adamw(1e-2, weight_decay=0.1))  # a clip that acts
MESHES = [dict(fsdp=2), dict(tp=2), dict(fsdp=2, tp=2), dict(dp=2, fsdp=2)]
ON = [(), *((name,) for name in PASSES), *combinations(PASSES, 2), tuple(PASSES)]


def loss(params, batch, key):
    return ft.models.llama.loss(params, batch, CONFIG)


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(0, 256, (8, 17), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def without(*on: str) -> list[str]:
    return [name for name in PASSES if name not in on]


def step_of(on: tuple[str, ...], config=CONFIG):
    of_config = lambda params, batch, key: ft.models.llama.loss(params, batch, config)
    return ft.jit(ft.train_step(of_config, TX), donate=0, skip=without(*on))


def after_two_steps(mesh, on: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Losses, norms and parameters on this rank."""
    step = step_of(on)
    state = ft.TrainState.create(ft.models.llama.params(CONFIG), TX, ft.random.key(0), mesh=mesh, rules=RULES)
    local = ft.shard(batch(), "batch seq", mesh=mesh, rules=RULES)
    found = []
    for _ in range(2):
        state, metrics = step(state, local)
        found += [metrics["loss"], metrics["grad_norm"]]
    return (*found, *ft.tree.leaves(state.params))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_pass_and_pair_of_passes_leaves_every_number_as_it_was(sizes):
    def all_of_them(mesh):
        return [after_two_steps(mesh, on) for on in ON]

    for plain, *others in ft.simulate(**sizes)(all_of_them)():
        for on, other in zip(ON[1:], others, strict=True):
            for x, y in zip(plain, other, strict=True):
                assert torch.equal(x, y), on  # bitwise: no pass here changes an order of summation
