"""Generation with a cache gives the logits of the whole sequence without one, and transformers' tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from test_llama import SCALED, TINY, huggingface

import functitan as ft
from functitan.errors import MeshError, PatternError
from functitan.models import llama
from functitan.models.generate import decode, generate, prefill
from functitan.testing.sharded import assert_close, on_ranks, sharded

RULES = llama.RULES.replace(batch=None, seq=None)
MESHES = [dict(fsdp=2), dict(tp=2), dict(fsdp=2, tp=2)]
PROMPT, NEW = 5, 4
DECLARED = ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, dtype=torch.float64), llama.params(SCALED))
TOKENS = torch.randint(0, SCALED.vocab_size, (3, PROMPT + NEW), generator=torch.Generator().manual_seed(0))


def by_parts(params: ft.tree.Tree, tokens: torch.Tensor, parts: list[int]) -> torch.Tensor:
    """The logits of all tokens, those of the first part in one go, of the others one part after the other."""
    first, *others = tokens.split(parts, 1)
    logits, cache = prefill(params, first, SCALED, tokens.shape[1])
    found = [logits]
    for part in others:
        logits, cache = decode(params, part, cache, SCALED)
        found.append(logits)
    assert cache.length == tokens.shape[1]
    return torch.cat(found, 1)


@pytest.mark.parametrize("parts", [[PROMPT] + [1] * NEW, [1, 3, 5]], ids=str)
def test_a_cache_does_not_change_the_logits(parts: list[int]):
    params = ft.init(DECLARED, ft.random.key(0))
    expected = llama.apply(params, TOKENS, SCALED)
    assert_close(by_parts(params, TOKENS, parts), expected)  # float64 sums of some dozen products in other orders


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_cache_does_not_change_the_logits_on_a_mesh(sizes: dict[str, int]):
    params = ft.init(DECLARED, ft.random.key(0))
    run = partial(by_parts, parts=[PROMPT] + [1] * NEW)
    of_mesh = sharded(run, (DECLARED, None), "batch seq vocab", mesh=sizes, rules=RULES)
    assert_close(of_mesh(params, TOKENS), llama.apply(params, TOKENS, SCALED))


def test_weights_stay_still_on_a_mesh():
    """A decode step moves activations of one token: far less than the weights that fsdp shards."""

    def program(mesh):
        params = ft.init(DECLARED, ft.random.key(0), mesh=mesh, rules=RULES)
        run = lambda fn, *args: ft.spmd(fn, mesh=mesh, rules=RULES)(*args)
        _, cache = run(lambda p: prefill(p, TOKENS[:1, :PROMPT], SCALED, PROMPT + 1), params)
        with ft.record() as ledger:
            run(lambda p: decode(p, TOKENS[:1, :1], cache, SCALED), params)
        return ledger.total_bytes()

    token = (SCALED.mlp + SCALED.embed) * 8  # bytes of the widest activations
    layers = SCALED.num_layers * sum(
        p.nbytes for p in ft.tree.leaves(ft.init(llama.block_params(SCALED), ft.random.key(0)))
    )
    for sent in ft.simulate(fsdp=2)(program)():
        assert 0 < sent < 10 * SCALED.num_layers * token < layers


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_tokens_are_those_of_transformers(tied: bool):
    config = SCALED._replace(tied=tied)
    params = ft.init(llama.params(config), ft.random.key(2))
    prompt = TOKENS[:, :PROMPT]
    found = generate(params, prompt, config, max_new_tokens=12, temperature=0.0)
    model = huggingface(config, params)
    theirs: Any = model.generate(  # type: ignore[misc]
        prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(found, theirs)


def test_samples_are_the_same_on_every_mesh():
    params = ft.init(DECLARED, ft.random.key(0))
    run = lambda params, prompt, seed=3: generate(params, prompt, SCALED, max_new_tokens=NEW, key=ft.random.key(seed))
    prompt = TOKENS[:, :PROMPT]
    expected = run(params, prompt)
    assert torch.equal(expected[:, :PROMPT], prompt) and not torch.equal(run(params, prompt, 4), expected)
    for sizes in MESHES:
        for found in on_ranks(run, (params, prompt), (DECLARED, None), None, mesh=sizes, rules=RULES):
            assert torch.equal(found, expected)


def test_sampled_frequencies_are_the_probabilities():
    params = ft.init(llama.params(TINY), ft.random.key(0))
    rows = 4096
    found = generate(
        params, TOKENS[:1, :1].expand(rows, 1), TINY, max_new_tokens=1, key=ft.random.key(4), temperature=0.3
    )
    logits = llama.apply(params, TOKENS[:1, :1], TINY)[0, 0, : TINY.vocab_size]
    expected = (logits / 0.3).softmax(-1)
    frequency = found[:, 1].bincount(minlength=TINY.vocab_size) / rows
    # five standard deviations of a frequency, at most 0.5 / sqrt(rows) each
    assert (frequency - expected).abs().max() < 5 * 0.5 / rows**0.5 and expected.max() > 0.05


@pytest.mark.parametrize("sizes", [{}, dict(fsdp=2), dict(tp=2), dict(dp=2, tp=2), dict(cp=2)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_to_more_keys_than_queries_is_torchs(sizes: dict[str, int], causal: bool):
    """Queries that stand at the end of the keys, wherever either lie."""
    q, k, v = (
        ft.random.normal(ft.random.key(i), (2, 8 if i else 2, 4 if i == 0 else 2, 8), dtype=torch.float64)
        for i in range(3)
    )
    at, places = torch.tensor([[6, 7], [2, 5]]), torch.arange(8).expand(2, 8)
    mask = (at[:, None, :, None] >= places[:, None, None, :]) if causal else None
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    rules = llama.RULES.replace(seq="cp", cache="tp" if causal else "fsdp", batch="fsdp" if causal else None)

    def program(q, k, v, at, places):
        pattern = "batch seq heads head_dim, batch cache kv_heads head_dim"
        return ft.attention(pattern, q, k, v, causal=causal, positions=at, key_positions=places)

    kv = "batch cache kv_heads head_dim"
    patterns = ("batch seq heads head_dim", kv, kv, "batch seq", "batch cache")
    of_mesh = sharded(program, patterns, patterns[0], mesh=sizes, rules=rules) if sizes else program
    assert_close(of_mesh(q, k, v, at, places), theirs, tolerance=1e-12)


def test_errors():
    params, prompt = ft.init(llama.params(TINY), ft.random.key(0)), TOKENS[:, :2]
    with pytest.raises(ValueError, match=r"max_new_tokens is 0(.|\n)*temperature is -1(.|\n)*Fix: write generate"):
        generate(params, prompt, TINY, max_new_tokens=0, temperature=-1)
    with pytest.raises(ValueError, match="there is no key"):
        generate(params, prompt, TINY, max_new_tokens=1)
    _, cache = prefill(params, prompt, TINY, 2)
    with pytest.raises(IndexError):
        decode(params, prompt[:, :1], cache, TINY)
    marks = torch.zeros(1, 2, dtype=torch.int64)
    x, pattern = torch.ones(1, 2, 2, 4), "batch seq heads head_dim, batch cache kv_heads head_dim"
    with pytest.raises(PatternError, match=r"segments are of queries alone(.|\n)*without positions of the queries"):
        ft.attention(pattern, x, x, x, causal=True, segments=marks, key_positions=marks)

    def cut(mesh):
        own = ft.init(llama.params(TINY), ft.random.key(0), mesh=mesh, rules=llama.RULES)
        with pytest.raises(
            MeshError, match=r"axis 'seq' is sharded by \('tp',\)(.|\n)*replace\(batch=None, seq=None\)"
        ):
            ft.spmd(lambda p: prefill(p, prompt, TINY, 4), mesh=mesh, rules=llama.RULES)(own)

    ft.simulate(tp=2)(cut)()
