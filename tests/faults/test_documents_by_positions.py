"""Packed documents that positions alone tell apart attend as each would alone, on every mesh and in every order."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_context_parallel import PATTERN, RULES, expected, on_mesh, values

import functitan as ft
from functitan.models import gpt2, llama
from functitan.testing.sharded import assert_close

WIDE = dict(dtype=torch.float64)
LLAMA = llama.LlamaConfig(61, 16, 1, 4, 4, 4, 32)
GPT2 = gpt2.GPT2Config(61, 16, 16, 1, 4)
MODELS = {"llama": (llama, LLAMA), "gpt2": (gpt2, GPT2)}
POSITIONS = torch.tensor(
    [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5], [3, 4, 6, 9, 1, 2, 3, 5, 0, 1, 2, 3, 4, 5, 6, 7]]
)


def documents(positions):
    """The number of each token's document, counted one token after the other."""
    rows = []
    for row in positions.tolist():
        numbers = [0]
        for before, now in pairwise(row):
            numbers.append(numbers[-1] + (now <= before))
        rows.append(numbers)
    return torch.tensor(rows)


def doubled(declared):
    return ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, p.init, torch.float64), declared)


def rules_of(model):
    return model.RULES if hasattr(model, "RULES") else llama.RULES.replace(positions=None)


@settings(max_examples=15)
@given(st.data(), st.sampled_from([dict(cp=2), dict(cp=4), dict(cp=2, tp=2), dict(dp=2, cp=2)]))
def test_attention_is_that_of_each_document(data, mesh):
    length = 8 * mesh["cp"]
    steps = st.sampled_from([1, 1, 1, 1, 2, 5, 0, -1, -3, None])  # mostly one more; gaps, and starts of documents
    rows = [[data.draw(st.integers(0, 3))] for _ in range(2)]
    for row in rows:
        for step in data.draw(st.lists(steps, min_size=length - 1, max_size=length - 1)):
            row.append(0 if step is None else max(0, row[-1] + step))
    positions, order = torch.tensor(rows), data.draw(st.sampled_from(["contiguous", "zigzag"]))
    method = data.draw(st.sampled_from(["ring", "all_gather", "all_to_all", None]))
    window = data.draw(st.none() | st.integers(1, length))
    options = dict(causal=True, window=window, mask=None)
    *tensors, _ = values((2, length, 8, 8, 2), ())
    # float64 sums in another order
    found = on_mesh(mesh, RULES, method, order, (*tensors, {"positions": positions}), options)
    marks = dict(positions=positions, segments=documents(positions))
    wanted = expected(*tensors, options | marks)
    assert_close(found, wanted)
    plain = ft.attention(PATTERN, *tensors[:3], positions=positions, causal=True, window=window)
    assert_close(plain, wanted[0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrap", [lambda f: f, ft.jit, ft.remat], ids=["eager", "jit", "remat"])
def test_a_model_gives_each_document_what_it_gives_it_alone(name, wrap):
    model, config = MODELS[name]
    params = ft.init(doubled(model.params(config)), ft.random.key(0))
    tokens = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    wrap = partial(ft.jit, backend="graph") if wrap is ft.jit else wrap
    found = wrap(lambda p, t, at: model.apply(p, t, config, positions=at))(params, tokens, POSITIONS)[..., :61]
    for row, number in enumerate(documents(POSITIONS)):
        for at in number.unique():
            own = number == at
            alone = model.apply(params, tokens[row : row + 1, own], config, positions=POSITIONS[row : row + 1, own])
            assert_close(found[row, own], alone[0, :, :61])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("mesh", "order"), [(dict(cp=2), "zigzag"), (dict(fsdp=2, cp=2), "contiguous")], ids=str)
def test_loss_and_gradients_obey_the_marks_of_a_batch_as_stages_do(name, mesh, order):
    model, config = MODELS[name]
    declared = doubled(model.params(config))
    tokens = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "positions": POSITIONS}

    def gradients(own, batch):
        on = dict(mesh=own, rules=rules_of(model))
        params = ft.init(declared, ft.random.key(0), **on)
        ordered = ft.zigzag(batch, "batch seq", mesh=own) if order == "zigzag" else batch
        loss = ft.context_parallel(lambda p, b: model.loss(p, b, config)[0], order=order)
        step = ft.spmd(ft.checked(ft.value_and_grad(loss)), **on)
        value, grads = step(params, ft.shard(ordered, "batch seq", **on))
        return value, ft.unshard(grads, declared, **on)

    plain = gradients(None, batch)
    segments = documents(POSITIONS)
    assert_close(gradients(None, batch | {"segments": segments}), plain)
    logits = model.apply(ft.init(declared, ft.random.key(0)), tokens, config, positions=POSITIONS, segments=segments)
    total = torch.nn.functional.cross_entropy(
        logits[..., :61].flatten(0, 1), batch["labels"].flatten(), reduction="sum"
    )
    assert_close(plain[0], total)
    (stage,) = model.stages(config, [range(1)])
    params = ft.init(doubled(stage.declarations), ft.random.key(0))
    params["layers"] = list(params["layers"].values())
    assert_close(
        stage.apply(params | {"layers": {0: params["layers"][0]}}, None, batch, None)[0],
        model.loss(params, batch, config)[0],
    )
    for found in ft.simulate(**mesh)(gradients)(batch):
        assert_close(found, plain)


def test_llama_gives_what_transformers_gives(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    oracle = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).double().eval()
    oracle.save_pretrained(tmp_path)
    params, config = ft.checkpoint.from_huggingface(tmp_path)
    tokens = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(7), torch.arange(9)]).expand(2, 16)
    wanted = oracle(tokens, position_ids=positions, use_cache=False).logits
    found = llama.apply(params, tokens, config, positions=positions)[..., :61]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)  # transformers rotates in float32


def test_explicit_segments_and_keys_with_places_of_their_own_compare_positions():
    q = k = v = torch.randn(1, 4, 1, 2, generator=torch.Generator().manual_seed(0), **WIDE)
    turned = torch.tensor([[2, 0, 3, 1]])  # tokens in another order, of one document
    order = turned[0].argsort()
    wanted = ft.attention(PATTERN, q[:, order], k[:, order], v[:, order], causal=True)[:, turned[0]]
    zero = torch.zeros_like(turned)
    assert_close(ft.attention(PATTERN, q, k, v, causal=True, positions=turned, segments=zero), wanted)
    assert_close(ft.attention(PATTERN, q, k, v, causal=True, positions=turned, key_positions=turned), wanted)
