"""Layers are the same function under every rules table and mesh: none assumes that an axis is whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functitan as ft
from functitan.models import gpt2, llama
from functitan.nn import attention, layer_norm, mlp, position_embedding, rms_norm, rope, swiglu
from functitan.testing.sharded import assert_close, sharded
from functitan.testing.strategies import meshes, rules_tables

AXES = ("batch", "seq", "positions", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab")
# every size but the grouped heads' is divided by 8, the largest product of mesh dims
CONFIG = llama.LlamaConfig(100, 16, 1, 8, 8, 8, 16, rope_theta=100.0)
GPT2 = gpt2.GPT2Config(100, 16, 64, 1, 8)
X = "batch seq embed"


def layers() -> dict:
    """name -> (declarations, function of (params, x), pattern of x)"""
    c = CONFIG
    rotate = lambda _, x: rope.apply("batch seq heads head_dim", x, theta=100.0)
    return {
        "layer_norm": (layer_norm.params(c.embed), layer_norm.apply, X),
        "position_embedding": (position_embedding.params(16, c.embed), position_embedding.apply, X),
        "given positions": (position_embedding.params(16, c.embed), reversed_positions, X),
        "mlp": (mlp.params(c.embed, c.mlp), mlp.apply, X),
        "biased attention": (
            attention.params(c.embed, c.num_heads, c.num_kv_heads, c.head_dim, bias=True),
            lambda params, x: attention.apply(params, x, theta=None),
            X,
        ),
        "rms_norm": (rms_norm.params(c.embed), rms_norm.apply, X),
        "rope": ({}, rotate, "batch seq heads head_dim"),
        "swiglu": (swiglu.params(c.embed, c.mlp), swiglu.apply, X),
        "attention": (attention.params(c.embed, c.num_heads, c.num_kv_heads, c.head_dim), attention.apply, X),
        "grouped attention": (attention.params(c.embed, c.num_heads, 2, c.head_dim), attention.apply, X),
        "llama block": (llama.block_params(c), lambda params, x: llama.block(params, x, c), X),
    }


def reversed_positions(params: ft.tree.Tree, x: torch.Tensor) -> torch.Tensor:
    """Learned positions, the last row first."""
    at = ft.iota("batch seq", "seq", **{axis: ft.sizes(X, x)[axis] for axis in ("batch", "seq")})
    return position_embedding.apply(params, x, positions=15 - at)


def doubled(declared: ft.tree.Tree) -> ft.tree.Tree:
    return ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, dtype=torch.float64), declared)


@pytest.mark.parametrize("name", layers())
@settings(max_examples=8)
@given(mesh=meshes(), rules=rules_tables(AXES), seed=st.integers(0, 99))
def test_layers_are_the_same_function_under_every_table(name, mesh, rules, seed):
    declared, fn, pattern = layers()[name]
    if name == "grouped attention":
        rules = rules.replace(kv_heads=None)  # two kv heads are fewer than the ranks
    declared = doubled(declared)
    params = ft.init(declared, ft.random.key(seed))
    shape = [{"embed": CONFIG.embed}.get(axis, 8) for axis in pattern.split()]
    x, y = (ft.random.normal(key, shape, dtype=torch.float64) for key in ft.random.split(ft.random.key(seed + 1)))

    def program(params, x, y):
        out = fn(params, x)
        loss = lambda params, x: ft.reduce(f"{pattern} ->", fn(params, x) * y)
        return out, ft.grad(loss, argnums=(0, 1))(params, x)

    of_mesh = sharded(program, (declared, pattern, pattern), (pattern, (declared, pattern)), mesh=mesh, rules=rules)
    # float64 sums of some hundred products in other orders
    assert_close(of_mesh(params, x, y), program(params, x, y), tolerance=1e-10)


@pytest.mark.parametrize(
    "model, config", [(llama, CONFIG), (llama, CONFIG._replace(tied=True)), (gpt2, GPT2)], ids=["llama", "tied", "gpt2"]
)
@settings(max_examples=3)
@given(mesh=meshes(), rules=rules_tables(AXES))
def test_losses_are_the_same_function_under_every_table(model, config, mesh, rules):
    declared = doubled(model.params(config))
    params = ft.init(declared, ft.random.key(0))
    tokens = torch.randint(0, config.vocab_size, (8, 9), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}

    def program(params, batch):
        return ft.value_and_grad(lambda params: model.loss(params, batch, config), has_aux=True)(params)

    of_mesh = sharded(program, (declared, "batch seq"), ((None, None), declared), mesh=mesh, rules=rules)
    assert_close(of_mesh(params, batch), program(params, batch), tolerance=1e-10)


def test_dropout_masks_are_the_same_bits_on_every_mesh():
    x, key = torch.ones(8, 16), ft.random.key(5)
    expected = ft.dropout("batch embed", x, key, 0.3)
    assert abs(expected.count_nonzero().item() / 128 - 0.7) < 0.2 and set(expected.unique().tolist()) <= {
        0.0,
        (x / 0.7)[0, 0].item(),
    }
    for mesh in (dict(dp=2), dict(tp=4), dict(dp=2, tp=2)):
        rules = ft.AxisRules({"batch": "dp", "embed": "tp"})
        run = sharded(
            lambda x: ft.dropout("batch embed", x, key, 0.3), ("batch embed",), "batch embed", mesh=mesh, rules=rules
        )
        assert torch.equal(run(x), expected)


def test_positions_and_segments_separate_packed_documents():
    """Two documents packed into one row attend as each would alone."""
    declared = doubled(llama.params(CONFIG))
    params = ft.init(declared, ft.random.key(0))
    tokens = torch.randint(0, CONFIG.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0))
    alone = torch.cat([llama.apply(params, part, CONFIG) for part in tokens.split(8, 1)], 1)
    marks = torch.arange(16).expand(8, 16)

    def packed(params, tokens, positions, segments):
        return llama.apply(params, tokens, CONFIG, positions=positions, segments=segments)

    together = packed(params, tokens, marks % 8, marks // 8)
    real = slice(0, CONFIG.vocab_size)
    assert_close(together[..., real], alone[..., real])
    for mesh in (dict(fsdp=2, tp=2), dict(cp=2), dict(cp=2, tp=2)):
        run = sharded(
            packed, (declared, "batch seq", "batch seq", "batch seq"), "batch seq vocab", mesh=mesh, rules=llama.RULES
        )
        assert_close(run(params, tokens, marks % 8, marks // 8)[..., real], alone[..., real])
