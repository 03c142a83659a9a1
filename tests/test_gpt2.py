"""GPT-2 against Hugging Face's, on every mesh, its collectives against Megatron's, and the published sizes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

import functitan as ft
from functitan.models import gpt2
from functitan.models.language import next_token_loss
from functitan.testing import assert_mesh_invariant, assert_trees_all_close

TINY = gpt2.GPT2Config(100, 32, 32, 2, 4)
MESHES = [dict(fsdp=2), dict(tp=2), dict(fsdp=2, tp=2), dict(fsdp=2, cp=2)]


def declarations(init: bool = False) -> ft.tree.Tree:
    """Of TINY in float64; without `init` every leaf begins random, so that no bias is zero and no scale one."""
    return ft.tree.map(
        lambda p: ft.Param(p.pattern, p.shape, *([p.init] if init else []), dtype=torch.float64), gpt2.params(TINY)
    )


def batch_of(config: gpt2.GPT2Config) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, config.vocab_size, (4, 17), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def huggingface(config: gpt2.GPT2Config) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        HFConfig(
            vocab_size=config.vocab_size,
            n_positions=config.context,
            n_embd=config.embed,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def as_huggingface(tree: ft.tree.Tree, config: gpt2.GPT2Config) -> dict[str, torch.Tensor]:
    """Parameters or their gradients under the names and in the shapes of transformers."""
    named = {
        "transformer.wte.weight": tree["embedding"][: config.vocab_size],
        "transformer.wpe.weight": tree["positions"]["embedding"],
        "transformer.ln_f.weight": tree["norm"]["scale"],
        "transformer.ln_f.bias": tree["norm"]["bias"],
    }
    for i, layer in enumerate(tree["layers"]):
        attention, mlp, at = layer["attention"], layer["mlp"], f"transformer.h.{i}."
        for ours, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            named[f"{at}{theirs}.weight"], named[f"{at}{theirs}.bias"] = layer[ours]["scale"], layer[ours]["bias"]
        named[at + "attn.c_attn.weight"] = torch.cat([attention[n].flatten(1) for n in "qkv"], 1)
        named[at + "attn.c_attn.bias"] = torch.cat([attention[f"{n}_bias"].flatten() for n in "qkv"])
        named[at + "attn.c_proj.weight"] = attention["out"].flatten(0, 1)
        named[at + "attn.c_proj.bias"] = attention["out_bias"]
        named[at + "mlp.c_fc.weight"], named[at + "mlp.c_fc.bias"] = mlp["up"], mlp["up_bias"]
        named[at + "mlp.c_proj.weight"], named[at + "mlp.c_proj.bias"] = mlp["down"], mlp["down_bias"]
    return named


def test_gpt2_equals_huggingface():
    params, batch = ft.init(declarations(), ft.random.key(0)), batch_of(TINY)
    model = huggingface(TINY).double()
    missing, unexpected = model.load_state_dict(as_huggingface(params, TINY), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied

    def mean(params):
        total, count = gpt2.loss(params, batch, TINY)
        return total / count

    loss, grads = ft.value_and_grad(mean)(params)
    logits, theirs = gpt2.apply(params, batch["tokens"], TINY), model(batch["tokens"]).logits
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), batch["labels"].flatten())
    expected.backward()
    assert torch.isinf(logits[..., TINY.vocab_size :]).all()
    assert not grads["embedding"][TINY.vocab_size :].any()
    # float64 on both sides, other orders of summation
    close = dict(rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(logits[..., : TINY.vocab_size], theirs, **close)
    torch.testing.assert_close(loss, expected, **close)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert_trees_all_close(as_huggingface(grads, TINY), gradients, **close)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_gpt2_is_the_same_function_on_every_mesh(mesh):
    declared, batch = declarations(), batch_of(TINY)

    def program(params, batch):
        logits = gpt2.apply(params, batch["tokens"], TINY)
        total, count = next_token_loss(logits, batch["labels"])
        return {"logits": logits.clamp(min=-1e3), "total": total, "count": count}  # no -inf minus -inf

    assert_mesh_invariant(
        program, (ft.init(declared, ft.random.key(0)), batch), patterns=(declared, "batch seq"),
        out={"logits": "batch seq vocab", "total": None, "count": None}, rules=gpt2.RULES, meshes=[mesh],
        rtol=1e-10, atol=1e-10,  # float64 sums in other orders
    )  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES[2:], ids=str)
def test_five_steps_on_a_mesh_are_those_of_one_process(mesh):
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(0.1), ft.optim.adamw(1e-2))
    step = ft.train_step(lambda params, batch, key: gpt2.loss(params, batch, TINY), tx)

    def train(mesh):
        state = ft.TrainState.create(declarations(init=True), tx, ft.random.key(0), mesh=mesh, rules=gpt2.RULES)
        batch, losses = ft.shard(batch_of(TINY), "batch seq", mesh=mesh, rules=gpt2.RULES), []
        for _ in range(5):
            state, metrics = step(state, batch)
            losses.append(metrics["loss"].item())
        return losses, ft.unshard(state.params, declarations(), mesh=mesh, rules=gpt2.RULES)

    losses, params = train(None)
    assert losses[-1] < losses[0]
    for found in ft.simulate(**mesh)(train)():
        # float64, but adam divides by the root of second moments near zero: 1e-10 apart grows to 1e-8
        assert_trees_all_close(found, (losses, params), rtol=1e-7, atol=1e-8)


def test_block_on_tp_has_megatrons_collectives():
    x = ft.Param("batch seq embed", (2, 16, TINY.embed))
    fn = lambda p, x: ft.reduce("batch seq embed ->", gpt2.block(p, x, TINY))
    ledger = ft.explain(ft.grad(fn, argnums=(0, 1)), gpt2.block_params(TINY), x, mesh=dict(tp=2), rules=gpt2.RULES)
    count = Counter((e.phase, e.collective) for e in ledger if e.op in ("einsum", "attention"))
    assert count == {
        ("forward", "all_gather"): 2, ("forward", "reduce_scatter"): 2,
        ("backward", "all_gather"): 4, ("backward", "reduce_scatter"): 2,
    }  # fmt: skip
    # what is left: scale and bias of two norms and the biases of two outputs, and the sum that ends the function
    rest = [e for e in ledger if e.op not in ("einsum", "attention")]
    assert Counter((e.phase, e.collective, e.op) for e in rest) == {
        ("backward", "all_reduce", "broadcast"): 6, ("forward", "all_reduce", "reduce"): 1,
    }  # fmt: skip


def test_positions_on_fsdp_move_as_rows_of_the_table_and_not_as_activations():
    seq = 16
    params, x = gpt2.params(TINY)["positions"], ft.Param("batch seq embed", (8, seq, TINY.embed))
    fn = lambda p, x: ft.reduce("batch seq embed ->", ft.nn.position_embedding.apply(p, x))
    ledger = ft.explain(ft.grad(fn), params, x, mesh=dict(fsdp=2), rules=gpt2.RULES)
    rows = seq * TINY.embed * 4 // 2  # float32, half of it sent
    assert [(e.collective, e.bytes) for e in ledger if e.op != "reduce"] == [
        ("all_gather", rows), ("reduce_scatter", rows)
    ]  # fmt: skip


def test_initial_values_are_those_of_huggingface():
    config = TINY._replace(embed=128)
    torch.manual_seed(0)
    theirs = huggingface(config).state_dict()
    for name, ours in as_huggingface(ft.init(gpt2.params(config), ft.random.key(0)), config).items():
        # standard deviations of at least 4096 values each: 5% is more than four standard errors
        torch.testing.assert_close(ours.std(), theirs[name].std(), rtol=0.05, atol=0, msg=name)
        torch.testing.assert_close(ours.mean(), theirs[name].mean(), rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize(
    "name, count",
    [("gpt2", 124439808), ("gpt2-medium", 354823168), ("gpt2-large", 774030080), ("gpt2-xl", 1557611200)],
)
def test_published_sizes(name, count):
    config = gpt2.CONFIGS[name]
    padding = (config.padded_vocab - config.vocab_size) * config.embed
    assert ft.metrics.num_params(gpt2.params(config)) - padding == count


def test_flops_count_matrices_once_and_neither_positions_nor_biases():
    matrices = 12 * TINY.num_layers * TINY.embed**2 + TINY.padded_vocab * TINY.embed
    attention = 12 * TINY.num_layers * TINY.embed * 16
    found = ft.metrics.flops_per_token(gpt2.params(TINY), TINY.num_layers, TINY.num_heads, TINY.head_dim, 16)
    assert found == 6 * matrices + attention


@pytest.mark.parametrize("mesh", [None, dict(tp=2)], ids=str)
def test_a_sequence_beyond_the_context_is_an_error(mesh):
    config = TINY._replace(context=8)
    tokens = torch.zeros(1, 16, dtype=torch.int64)

    def rank(mesh):
        params = ft.init(gpt2.params(config), ft.random.key(0), mesh=mesh, rules=gpt2.RULES)
        local = ft.shard(tokens, "batch seq", mesh=mesh, rules=gpt2.RULES)
        ft.spmd(gpt2.apply, mesh=mesh, rules=gpt2.RULES)(params, local, config)

    with pytest.raises(ft.PatternError) as error:
        rank(None) if mesh is None else ft.simulate(**mesh)(rank)()
    assert str(error.value) == (
        "position_embedding.apply:\n  - a sequence of 16 tokens, a table of 8 positions\n"
        "  Fix: cut the sequence, or give a longer context"
    )


def test_layer_norm_keeps_its_digits_far_from_zero():
    """A mean 1000 times the deviation, in float32, with the axis sharded: E[x^2] - mean^2 would lose all of them."""
    x = 1000 + torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.layer_norm(x.double(), (64,)).float()
    scale, rules = torch.ones(64), ft.AxisRules({"embed": "tp", "batch": "tp"})
    run = ft.testing.sharded(
        lambda x, scale: ft.layer_norm("batch embed, embed", x, scale),
        ("batch embed", "embed"), "batch embed", mesh=dict(tp=4), rules=rules,
    )  # fmt: skip
    # float32 of magnitude 1000 has an ulp of 6e-5, and so has the mean
    torch.testing.assert_close(run(x, scale), expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_of_low_precision_has_float32_statistics(dtype):
    x = (3 + torch.randn(8, 512, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = torch.nn.functional.layer_norm(x.double(), (512,))
    scale, rules = torch.ones(512), ft.AxisRules({"embed": "tp", "batch": "fsdp"})
    norm = lambda x, scale: ft.layer_norm("batch embed, embed", x, scale)
    runs = [norm] + [
        ft.testing.sharded(norm, ("batch embed", "embed"), "batch embed", mesh=mesh, rules=rules)
        for mesh in (dict(tp=2), dict(fsdp=2))
    ]
    for run in runs:
        out = run(x, scale)
        assert out.dtype == dtype
        # one rounding of the result: half an ulp of up to 4, with room for the second at the scale
        assert (out.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "pattern, text",
    [
        (
            "a b",
            "layer_norm('a b'):\n  - 1 patterns: one of x, one of the scale\n"
            "  Fix: write 'batch seq embed, embed'",
        ),
        (
            "a b, c",
            "layer_norm('a b, c'):\n  - scale 'c' must be one axis of 'a b'\n  Fix: write 'batch seq embed, embed'",
        ),
        (
            "a b c, c",
            "layer_norm('a b c, c'):\n  - x: pattern 'a b c' names 3 axes, the tensor has 2: (2, 4)\n"
            "  - bias: pattern 'c' names 1 axes, the tensor has 2: (1, 4)\n"
            "  Fix: name each dimension of the tensor once, in order",
        ),
        (
            "a b, b",
            "layer_norm('a b, b'):\n  - bias: pattern 'b' names 1 axes, the tensor has 2: (1, 4)\n"
            "  Fix: name each dimension of the tensor once, in order",
        ),
    ],
)  # fmt: skip
def test_layer_norm_names_what_is_wrong(pattern, text):
    with pytest.raises(ft.PatternError) as error:
        ft.layer_norm(pattern, torch.ones(2, 4), torch.ones(4), torch.ones(1, 4))
    assert str(error.value) == text


def test_iota_of_a_size_that_nothing_divides_is_an_error():
    rank = lambda mesh: ft.spmd(ft.iota, mesh=mesh, rules=ft.AxisRules({"seq": "tp"}))("seq", "seq", seq=3)
    with pytest.raises(ft.LayoutError) as error:
        ft.simulate(tp=2)(rank)()
    problem = "axis 'seq' of size 3 is not divisible by 2 (tp=2); 2 or 4 would be"
    assert f"iota('seq', 'seq'):\n  - result ('seq', shape (3,)): {problem}" in str(error.value)
