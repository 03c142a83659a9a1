"""An nn.Module in a functitan loop trains as in plain PyTorch, on every mesh. The oracle is torch's own autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import functitan as ft
from functitan.errors import FunctitanError, PatternError

RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "mlp": "tp", "embed": "fsdp", "seq": None, "vocab": None})
PATTERNS = {
    "embedding.weight": "vocab embed",
    "layers.*.up.weight": "mlp embed",
    "layers.*.up.bias": "mlp",
    "layers.*.down.weight": "embed mlp",
    "*": "embed",
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """With a tied weight, and a buffer that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.out(x) * self.scale


@pytest.fixture
def module() -> Model:
    torch.manual_seed(0)
    return Model()


def batch() -> dict[str, torch.Tensor]:
    rows = torch.randint(0, 12, (4, 6), generator=torch.Generator().manual_seed(1))
    return {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


def test_function_and_gradients_are_the_modules(module):
    function, params = ft.from_module(module)
    assert set(ft.tree.paths(params)) == {name for name, _ in module.named_parameters()}
    tokens = batch()["tokens"]
    assert torch.equal(function(params, tokens), module(tokens))
    grads = ft.grad(lambda params: function(params, tokens).square().sum())(params)
    module(tokens).square().sum().backward()
    named = dict(module.named_parameters())
    for path, grad in zip(ft.tree.paths(grads), ft.tree.leaves(grads), strict=True):
        torch.testing.assert_close(grad, named[path].grad)
    per_row = torch.func.vmap(torch.func.grad(lambda p, row: function(p, row).sum()), (None, 0))(params, tokens)
    assert per_row["embedding"]["weight"].shape == (4, 12, 8)


@pytest.mark.parametrize("sizes", [{}, dict(fsdp=2), dict(tp=2), dict(dp=2, fsdp=2), dict(fsdp=2, tp=2)], ids=str)
def test_it_trains_on_every_mesh_as_in_plain_torch(module, sizes: dict[str, int]):
    function, declared = ft.from_module(module, PATTERNS)

    def loss(params, batch, key):
        logits = function(params, batch["tokens"])
        losses = ft.cross_entropy("batch seq vocab, batch seq", logits, batch["labels"])
        return ft.reduce("batch seq ->", losses), ft.count("batch seq", losses)

    tx = ft.optim.adamw(1e-2, weight_decay=0.0)
    step = ft.train_step(loss, tx)

    def train(mesh: Any) -> list[float]:
        state = ft.TrainState.create(
            declared, ft.optim.adamw(1e-2, weight_decay=0.0), ft.random.key(0), mesh=mesh, rules=RULES
        )
        if mesh is not None and "fsdp" in mesh.shape:
            assert state.params["layers"]["0"]["norm"]["weight"].shape == (4,)
        local, losses = ft.shard(batch(), "batch seq", mesh=mesh, rules=RULES), []
        for _ in range(4):
            state, metrics = step(state, local)
            losses.append(metrics["loss"].item())
        return losses

    found = ft.simulate(**sizes)(train)() if sizes else [train(None)]
    plain, expected = copy.deepcopy(module), []
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(4):
        value = functional.cross_entropy(plain(batch()["tokens"]).flatten(0, 1), batch()["labels"].flatten())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        expected.append(value.item())
    for losses in found:
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)  # float32 sums in other orders


def test_the_module_is_left_alone(module):
    before = {name: x.clone() for name, x in module.state_dict().items()}
    function, declared = ft.from_module(module, PATTERNS)
    params = ft.init(declared, ft.random.key(0))
    ft.tree.map(lambda x: x.add_(1), params)
    function(params, batch()["tokens"])
    for name, x in module.state_dict().items():
        assert torch.equal(x, before[name])


def test_every_bad_glob_is_named(module):
    with pytest.raises(PatternError) as error:
        ft.from_module(module, {"*.weight": "mlp embed", "layers.*.nrom.bias": "embed"})
    for line in (
        "layers.0.norm.weight (8,): '*.weight' gives it 'mlp embed'",
        "no glob matches layers.1.up.bias (16,)",
        "'layers.*.nrom.bias' is the first match of nothing",
    ):
        assert line in str(error.value)


def test_other_params_are_errors_and_written_buffers_are_told():
    function, params = ft.from_module(nn.BatchNorm1d(2))
    with pytest.warns(UserWarning, match=r"wrote to its buffer num_batches_tracked(.|\n)*module.eval()"):
        function(params, torch.randn(3, 2))
    with pytest.raises(FunctitanError, match="there is no bias"):
        function({"weight": params["weight"]}, torch.randn(3, 2))
    function, params = ft.from_module(nn.BatchNorm1d(2).eval())
    assert function(params, torch.randn(3, 2)).shape == (3, 2)


def test_a_mesh_asks_for_patterns():
    function, params = ft.from_module(nn.Linear(2, 2))
    with pytest.raises(FunctitanError, match="on a mesh its parameters need axes"):
        ft.simulate(dp=2)(lambda mesh: ft.spmd(function, mesh=mesh, rules=RULES)(params, torch.ones(1, 2)))()
