"""Llama against Hugging Face's, its collectives against Megatron's and FSDP's, and the published sizes."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

import functitan as ft
from functitan.models import llama
from functitan.nn.rope import RopeScaling

TINY = llama.LlamaConfig(100, 32, 2, 4, 2, 8, 64, rope_theta=10000.0)
SCALED = TINY._replace(
    rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=16)
)


def huggingface(config: llama.LlamaConfig, params: ft.tree.Tree) -> LlamaForCausalLM:
    """The same model in transformers, with the same weights."""
    scaling = config.rope_scaling
    rope: dict = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None:
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor}
        rope |= {"high_freq_factor": scaling.high_freq_factor}
        rope |= {"original_max_position_embeddings": scaling.original_context}
    model = LlamaForCausalLM(
        HFConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embed,
            intermediate_size=config.mlp,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tied,
            max_position_embeddings=64,
        )
    )
    weights = {
        "model.embed_tokens.weight": params["embedding"][: config.vocab_size],
        "model.norm.weight": params["norm"]["scale"],
    }
    if not config.tied:
        weights["lm_head.weight"] = params["unembedding"][:, : config.vocab_size].T
    for i, p in enumerate(params["layers"]):
        at = f"model.layers.{i}."
        weights[at + "input_layernorm.weight"] = p["attention_norm"]["scale"]
        weights[at + "post_attention_layernorm.weight"] = p["mlp_norm"]["scale"]
        for name in ("q", "k", "v"):
            weights[at + f"self_attn.{name}_proj.weight"] = p["attention"][name].flatten(1).T
        weights[at + "self_attn.o_proj.weight"] = p["attention"]["out"].flatten(0, 1).T
        for name in ("gate", "up", "down"):
            weights[at + f"mlp.{name}_proj.weight"] = p["mlp"][name].T
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("config", [TINY, SCALED, TINY._replace(tied=True)], ids=["plain", "llama 3.1 rope", "tied"])
def test_llama_equals_huggingface(config):
    params = ft.init(llama.params(config), ft.random.key(0))
    model = huggingface(config, params)
    tokens = torch.randint(0, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}

    logits = llama.apply(params, batch["tokens"], config)
    theirs = model(batch["tokens"]).logits
    # float32 on both sides, other orders of summation
    torch.testing.assert_close(logits[..., : config.vocab_size], theirs, rtol=1e-4, atol=1e-4)
    assert torch.isinf(logits[..., config.vocab_size :]).all()

    def mean(params):
        total, count = llama.loss(params, batch, config)
        return total / count

    loss, grads = ft.value_and_grad(mean)(params)
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), batch["labels"].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-4)
    named = dict(model.named_parameters())
    pairs = [
        (grads["embedding"][: config.vocab_size], named["model.embed_tokens.weight"]),
        (grads["norm"]["scale"], named["model.norm.weight"]),
    ]
    for i, g in enumerate(grads["layers"]):
        at = f"model.layers.{i}."
        pairs.append((g["attention_norm"]["scale"], named[at + "input_layernorm.weight"]))
        pairs += [(g["attention"][n].flatten(1).T, named[at + f"self_attn.{n}_proj.weight"]) for n in ("q", "k", "v")]
        pairs.append((g["attention"]["out"].flatten(0, 1).T, named[at + "self_attn.o_proj.weight"]))
        pairs += [(g["mlp"][n].T, named[at + f"mlp.{n}_proj.weight"]) for n in ("gate", "up", "down")]
    for ours, weight in pairs:
        torch.testing.assert_close(ours, weight.grad, rtol=1e-4, atol=1e-4)


def test_block_on_tp_has_megatrons_collectives():
    config = TINY
    x = ft.Param("batch seq embed", (2, 16, config.embed))
    fn = lambda p, x: ft.reduce("batch seq embed ->", llama.block(p, x, config))
    ledger = ft.explain(ft.grad(fn, argnums=(0, 1)), llama.block_params(config), x, mesh=dict(tp=2), rules=llama.RULES)
    count = Counter((e.phase, e.collective) for e in ledger if e.op in ("einsum", "attention"))
    assert count == {
        ("forward", "all_gather"): 2, ("forward", "reduce_scatter"): 2,
        ("backward", "all_gather"): 4, ("backward", "reduce_scatter"): 2,
    }  # fmt: skip
    # what is left: the scales of the two norms, and the sum that ends the function
    rest = [e for e in ledger if e.op not in ("einsum", "attention")]
    assert Counter((e.phase, e.collective, e.op) for e in rest) == {
        ("backward", "all_reduce", "broadcast"): 2, ("forward", "all_reduce", "reduce"): 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, billions", [("1B", 1.236), ("3B", 3.213), ("8B", 8.030), ("70B", 70.55), ("405B", 405.85)]
)
def test_published_sizes(name, billions):
    # Meta's own counts; a tied table counts once, a vocabulary of 128256 needs no padding
    assert math.isclose(ft.metrics.num_params(llama.params(llama.CONFIGS[name])) / 1e9, billions, rel_tol=1e-3)
    assert llama.CONFIGS[name].padded_vocab == 128256


def test_explain_of_8b_is_fast_and_follows_the_published_formulas():
    """ZeRO-3: each matrix is gathered twice over fsdp, its gradient scattered once. Megatron with sequence parallelism:
    four gathers and four scatters of a block's activations over tp, and two regathers for weight gradients."""
    config, fsdp, tp, batch, seq = llama.LLAMA_8B, 64, 8, 64, 8192
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-3))
    state = ft.TrainState.declare(llama.params(config), tx, ft.random.key(0))
    tokens = torch.empty(batch, seq, dtype=torch.int64, device="meta")
    step = ft.train_step(lambda p, b, key: llama.loss(p, b, config), tx)
    start = time.perf_counter()
    ledger = ft.explain(
        step,
        state,
        {"tokens": tokens, "labels": tokens},
        mesh=dict(fsdp=fsdp, tp=tp),
        rules=llama.RULES,
        patterns=(None, "batch seq"),
    )
    seconds = time.perf_counter() - start

    matrices = [p for p in ft.tree.leaves(llama.params(config)) if len(p.shape) > 1 and p.pattern != "vocab embed"]
    whole = sum(math.prod(p.shape) for p in matrices) * 4 // tp  # bytes of what one fsdp group shares, float32
    over = lambda dims, collective, phase: sum(
        e.bytes
        for e in ledger
        if e.mesh_dims == dims and e.collective == collective and e.phase == phase and e.op == "einsum"
    )
    for collective, phase in (("all_gather", "forward"), ("all_gather", "backward"), ("reduce_scatter", "backward")):
        assert over(("fsdp",), collective, phase) == whole * (fsdp - 1) // fsdp, (collective, phase)

    activation = (batch // fsdp) * seq * config.embed * 4 * (tp - 1) // tp
    blocks = config.num_layers
    assert over(("tp",), "all_gather", "forward") == (2 * blocks + 1) * activation  # + 1: the output layer
    assert over(("tp",), "reduce_scatter", "forward") == 2 * blocks * activation
    assert over(("tp",), "all_gather", "backward") == (4 * blocks + 1) * activation
    assert over(("tp",), "reduce_scatter", "backward") == (2 * blocks + 1) * activation

    shards = ft.metrics.num_params(llama.params(config)) * 3 * 4 / (fsdp * tp)  # parameters and two moments, float32
    assert math.isclose(ledger.argument_bytes, shards, rel_tol=0.01)  # norms' scales are not sharded by tp
    assert seconds < 10
    table = str(ledger)
    assert max(map(len, table.splitlines())) < 180 and "peak memory" in table
