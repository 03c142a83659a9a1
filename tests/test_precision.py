"""Mixed precision: plain torch with explicit casts is the oracle, bit for bit; on meshes, its sums over ranks."""

from __future__ import annotations

import contextvars
import functools

import pytest
import torch
from torch.nn import functional

import functitan as ft
from functitan.models import llama
from functitan.testing.sharded import sharded

BF16, F32 = torch.bfloat16, torch.float32
TINY = llama.LlamaConfig(100, 32, 2, 4, 2, 8, 64, rope_theta=10000.0)
RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "mlp": "tp", "vocab": "tp", "embed": "fsdp", "out": None})
MATMUL = "batch embed, embed mlp -> batch mlp"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits_of(values: ft.tree.Tree) -> list[tuple]:
    return [(x.dtype, x.tolist()) for x in ft.tree.leaves(values)]


def low(x: torch.Tensor) -> torch.Tensor:
    return x.to(BF16)


IDS = torch.tensor([[3, 1, 3], [0, 2, 3]])
ATTENTION = "batch seq heads head_dim, batch seq kv_heads head_dim"
OPS = {
    "einsum": (
        lambda x, w: ft.einsum("b s e, e m -> b s m", x, w),
        lambda x, w: low(x) @ low(w),
        [(2, 3, 8), (8, 5)],
    ),
    "einsum of three results": (
        lambda x, w, v: torch.cat(ft.einsum("b e, e m, e n -> b m, b n", x, w, v), 1),
        lambda x, w, v: (lambda x: torch.cat([x @ low(w), x @ low(v)], 1))(low(x)),
        [(4, 8), (8, 5), (8, 3)],
    ),
    "take": (
        lambda t: ft.take("batch seq, vocab embed -> batch seq embed", IDS, t),
        lambda t: low(functional.embedding(IDS, t)),
        [(4, 8)],
    ),
    "broadcast": (
        lambda x, s: low(x) * ft.broadcast("e -> b e", s),
        lambda x, s: low(x) * low(s),
        [(4, 8), (8,)],
    ),
    "rms_norm": (
        lambda x, s: ft.rms_norm("b e, e", x, s),
        lambda x, s: low(functional.rms_norm(x, (8,), low(s).float(), 1e-5)),
        [(4, 8), (8,)],
    ),
    "attention": (
        lambda q, k, v: ft.attention(ATTENTION, q, k, v, causal=True),
        lambda q, k, v: functional.scaled_dot_product_attention(
            *(low(x).transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
        ).transpose(1, 2),
        [(2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_ops_are_plain_torch_with_explicit_casts(name):
    """Values and gradients, bitwise; the gradients of float32 operands are float32."""
    ours, oracle, shapes = OPS[name]
    xs = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    value, back = torch.func.vjp(ft.precision(ours), *xs)
    expected, oracle_back = torch.func.vjp(oracle, *xs)
    g = low(random(*value.shape, seed=9))
    assert bits_of(value) == bits_of(expected) and value.dtype == BF16
    assert bits_of(back(g)) == bits_of(oracle_back(g)) and {x.dtype for x in back(g)} == {F32}


def test_every_float_is_cast_and_integers_are_not():
    x, w = random(4, 8), random(8, 5)
    y = ft.precision(ft.einsum)(MATMUL, low(x), w.double())
    assert bits_of(y) == bits_of(low(x) @ low(w.double()))
    assert bits_of(ft.precision(ft.einsum, compute=F32)(MATMUL, low(x), w)) == bits_of(low(x).float() @ w)
    whole = torch.arange(3)
    assert bits_of(ft.precision(ft.einsum)("a, b -> a b", whole, whole)) == bits_of(torch.outer(whole, whole))


@pytest.mark.parametrize("op, oracle", [
    ("sum", lambda x: x.float().sum(1)), ("mean", lambda x: x.float().sum(1) / 300),
    ("logsumexp", lambda x: (x.float() - x.float().amax(1, True)).exp().sum(1).log() + x.float().amax(1)),
])  # fmt: skip
def test_sums_stay_in_float32(op, oracle):
    x = low(random(3, 300))
    assert bits_of(ft.precision(ft.reduce)("a b -> a", x, op=op)) == bits_of(oracle(x))
    assert ft.precision(ft.reduce)("a b -> a", x, op="max").dtype == BF16  # which is exact


def test_losses_stay_in_float32():
    logits, labels = random(6, 40), torch.arange(6)
    loss = ft.precision(ft.cross_entropy)("batch vocab, batch", low(logits), labels)
    assert bits_of(loss) == bits_of(functional.cross_entropy(low(logits).float(), labels, reduction="none"))
    assert bits_of(ft.precision(ft.cross_entropy)("batch vocab, batch", logits, labels)) == bits_of(
        functional.cross_entropy(logits, labels, reduction="none")
    )


def test_of_nested_wrappers_the_inner_wins():
    x, w = random(4, 8), random(8, 5)

    def both(x):
        return ft.precision(ft.einsum, compute=F32)(MATMUL, x, w), ft.einsum(MATMUL, x, w)

    high, rounded = ft.precision(both)(x)
    assert bits_of(high) == bits_of(x @ w) and bits_of(rounded) == bits_of(low(x) @ low(w))


def test_a_cotangent_is_not_rounded_as_by_a_cast_at_entry():
    """1001 needs ten bits: a row looked up so often has that gradient, while a cast of the table loses it."""
    ids = torch.zeros(1001, dtype=torch.int64)
    look_up = lambda table: ft.reduce("n e ->", ft.take("n, v e -> n e", ids, table))
    table = torch.ones(2, 1)
    assert ft.grad(ft.precision(look_up))(table)[0].item() == 1001
    assert ft.grad(lambda table: look_up(low(table)))(table)[0].item() != 1001


@pytest.mark.parametrize("reduce", [F32, BF16, {"fsdp": BF16}], ids=["float32", "bfloat16", "fsdp bfloat16"])
@pytest.mark.parametrize("mesh", [dict(fsdp=4), dict(dp=4)], ids=["fsdp", "dp"])
def test_sums_cross_ranks_in_their_dtype(mesh, reduce):
    """Each rank's gradient of the weight is a bfloat16 product; their sum, in rank order, is rounded only if asked."""
    x, w, g = random(8, 4), random(4, 4, seed=1), random(8, 4, seed=2)
    fn = ft.precision(lambda x, w: ft.einsum(MATMUL, x, w), reduce=reduce)
    pull = lambda x, w, g: torch.func.vjp(functools.partial(fn, x), w)[1](low(g))[0]
    grad = sharded(pull, ("batch embed", "embed mlp", "batch mlp"), "embed mlp", mesh=mesh, rules=RULES)(x, w, g)
    dtype = reduce if isinstance(reduce, torch.dtype) else reduce.get(*mesh, F32)
    parts = [(low(a).T @ low(b)).to(dtype) for a, b in zip(x.chunk(4), g.chunk(4), strict=True)]
    assert bits_of(grad) == bits_of(functools.reduce(torch.add, parts).float())


def data(config, batch: int, seq: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, config.vocab_size, (batch, seq + 1), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def mean_loss(params, batch):
    total, count = llama.loss(params, batch, TINY)
    return total / count


def gradients(mesh, fn):
    """(loss, gradients) of the tiny Llama, as global values."""
    params = ft.init(llama.params(TINY), ft.random.key(0), mesh=mesh, rules=llama.RULES)
    batch = ft.shard(data(TINY, 4, 16), "batch seq", mesh=mesh, rules=llama.RULES)
    loss, grads = ft.spmd(ft.value_and_grad(fn), mesh=mesh, rules=llama.RULES)(params, batch)
    return loss, ft.unshard(grads, llama.params(TINY), mesh=mesh, rules=llama.RULES)


@pytest.mark.parametrize("sizes", [None, dict(fsdp=2, tp=2)], ids=["no mesh", "fsdp2 tp2"])
def test_float32_changes_nothing(sizes):
    run = (lambda fn: gradients(None, fn)) if sizes is None else (lambda fn: ft.simulate(**sizes)(gradients)(fn)[0])
    assert bits_of(run(ft.precision(mean_loss, compute=F32))) == bits_of(run(mean_loss))


def test_a_mesh_of_one_rank_gives_the_same_bits():
    fn = ft.precision(mean_loss)
    (found,) = ft.simulate(fsdp=1, tp=1)(gradients)(fn)
    assert bits_of(found) == bits_of(gradients(None, fn))


def explained(fn):
    sizes = dict(dp=2, fsdp=2, tp=2)
    batch = data(TINY, 4, 16)
    args = llama.params(TINY), batch
    return list(ft.explain(ft.value_and_grad(fn), *args, mesh=sizes, rules=llama.RULES, patterns=(None, "batch seq")))


def test_gathers_move_half_the_bytes_and_reductions_are_float32():
    plain, ours = explained(mean_loss), explained(ft.precision(mean_loss))
    assert [e.collective for e in ours] == [e.collective for e in plain]
    for before, after in zip(plain, ours, strict=True):
        moves = after.collective in ("all_gather", "all_to_all") and after.op != "cross_entropy"
        if before.dtype == F32 and moves:
            assert after.dtype == BF16 and after.bytes * 2 == before.bytes
        else:
            assert (after.dtype, after.bytes) == (before.dtype, before.bytes)
    assert {e.dtype for e in ours if e.collective.startswith(("reduce", "all_reduce"))} == {F32}


def test_reduce_by_mesh_dim_changes_that_dim_alone():
    plain, ours = explained(ft.precision(mean_loss)), explained(ft.precision(mean_loss, reduce={"fsdp": BF16}))
    changed = 0
    for before, after in zip(plain, ours, strict=True):
        of_products = after.op in ("einsum", "take", "broadcast") and "reduce" in after.collective
        if of_products and after.mesh_dims == ("fsdp",):
            assert (after.dtype, after.bytes * 2) == (BF16, before.bytes)
            changed += 1
        else:
            assert after == before
    assert changed == 10


def test_explain_predicts_what_is_recorded():
    fn = ft.precision(mean_loss)
    with ft.record() as recorded:
        ft.simulate(fsdp=2, tp=2)(rank_gradients)(fn)
    args = llama.params(TINY), data(TINY, 4, 16)
    options = dict(mesh=dict(fsdp=2, tp=2), rules=llama.RULES, patterns=(None, "batch seq"))
    assert list(recorded) == list(ft.explain(ft.value_and_grad(fn), *args, **options))


def on_gloo(reduce):
    return bits_of(gradients(ft.make_mesh(fsdp=2), ft.precision(mean_loss, reduce=reduce)))


def test_two_processes_give_the_bits_of_two_threads():
    """Two ranks' sums have one order."""
    for reduce in (F32, BF16):
        found = ft.launch(on_gloo, reduce, nprocs=2)
        assert found == [
            bits_of(each) for each in ft.simulate(fsdp=2)(gradients)(ft.precision(mean_loss, reduce=reduce))
        ]


def rank_gradients(mesh, fn):
    params = ft.init(llama.params(TINY), ft.random.key(0), mesh=mesh, rules=llama.RULES)
    batch = ft.shard(data(TINY, 4, 16), "batch seq", mesh=mesh, rules=llama.RULES)
    return ft.spmd(ft.value_and_grad(fn), mesh=mesh, rules=llama.RULES)(params, batch)


def test_backward_keeps_the_precision_of_the_call():
    """As on another thread, where the context is empty."""

    def rank(mesh, x, w):
        x, w = ft.shard((x, w), ("batch embed", "embed mlp"), mesh=mesh, rules=RULES)
        fn = ft.spmd(ft.precision(lambda w: ft.einsum(MATMUL, x, w)), mesh=mesh, rules=RULES)
        value, back = torch.func.vjp(fn, w)
        return contextvars.Context().run(back, torch.ones_like(value))[0]

    with ft.record() as ledger:
        grads = ft.simulate(fsdp=2)(rank)(random(4, 4), random(4, 4))
    assert {x.dtype for x in grads} == {F32}
    assert [(e.collective, e.dtype) for e in ledger] == [("all_gather", BF16), ("reduce_scatter", F32)]


def test_per_example_gradients_and_hessian_vector_products():
    """Of a two-layer network on a mesh, beside the same in plain torch."""
    x, w, v = random(4, 8), random(8, 6, seed=1), random(6, 8, seed=2)
    loss = lambda w, v, x: ft.reduce(
        "batch out ->", ft.einsum("batch mlp, mlp out -> batch out", ft.einsum(MATMUL, x, w).tanh(), v)
    )
    oracle = lambda w, v, x: ((low(x) @ low(w)).tanh() @ low(v)).float().sum()
    one = lambda w, v, x: loss(w, v, x.unsqueeze(0))
    per_example = ft.vmap(ft.grad(ft.precision(one)), in_dims=(None, None, 0), axis="batch")
    expected = torch.stack([torch.func.grad(oracle)(w, v, row.unsqueeze(0)) for row in x])
    rules, patterns = RULES.replace(embed=None), ("embed mlp", "mlp out", "batch embed")
    on = functools.partial(sharded, mesh=dict(fsdp=2, tp=2), rules=rules)
    found = on(per_example, patterns, "batch embed mlp")(w, v, x)
    assert found.dtype == F32
    # a few roundings to 8 bits in another order; values are of order 1
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)

    second = lambda w, v, x, t: ft.hvp(lambda w: ft.precision(loss)(w, v, x), (w,), (t,))
    t = random(8, 6, seed=3)
    found = on(second, (*patterns, "embed mlp"), "embed mlp")(w, v, x, t)
    expected = torch.func.vjp(torch.func.grad(lambda w: oracle(w, v, x)), w)[1](t)[0]
    assert found.dtype == F32
    assert (found - expected).norm() < 0.03 * expected.norm()  # as above


STEPS = 20


def curve(mesh, batches, wrap) -> list[float]:
    config = llama.LlamaConfig(257, 64, 2, 4, 2, 16, 192)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-3))
    state = ft.TrainState.create(llama.params(config), tx, ft.random.key(0), mesh=mesh, rules=llama.RULES)
    step = ft.train_step(wrap(lambda params, batch, key: llama.loss(params, batch, config)), tx)
    losses = []
    for batch in batches:
        state, metrics = step(state, ft.shard(batch, "batch seq", mesh=mesh, rules=llama.RULES))
        losses.append(metrics["loss"].item())
    assert {x.dtype for x in ft.tree.leaves(state.params)} == {F32}
    return losses


def test_training_in_bfloat16_is_the_same_on_every_mesh():
    stream = ft.data.token_stream(ft.data.stdlib_documents(), ft.data.encoding("bytes"), 64, 4)
    batches, cursor = [], ft.data.Cursor()
    for _ in range(STEPS):
        batch, cursor = stream.next_batch(cursor)
        batches.append(batch)
    full, plain = curve(None, batches, lambda fn: fn), curve(None, batches, ft.precision)
    assert plain[-1] < 0.75 * plain[0]
    spread = lambda losses: max(abs(a - b) / b for a, b in zip(losses, plain, strict=True))
    # bfloat16 rounds each activation by up to 2**-9 = 2e-3, either way; seen is 7e-4
    assert spread(full) < 5e-3
    for sizes in (dict(fsdp=2), dict(tp=2), dict(fsdp=2, tp=2)):
        (losses, *others) = ft.simulate(**sizes)(curve)(batches, ft.precision)
        assert all(other == losses for other in others)
        assert spread(losses) < 5e-3  # other partial products are rounded; their sums are not. Seen are 7e-4


@pytest.mark.parametrize("options, text", [
    (dict(compute="bf16"), "  - compute is 'bf16'"),
    (dict(reduce={"tp": torch.int32}), "  - reduce['tp'] is torch.int32"),
])  # fmt: skip
def test_a_dtype_that_does_not_compute_is_an_error(options, text):
    with pytest.raises(ft.FunctitanError) as error:
        ft.precision(mean_loss, **options)
    fix = "  Fix: give torch.bfloat16, float16, float32 or float64; reduce= may be a dict of them by mesh dim"
    assert str(error.value) == f"ft.precision:\n{text}\n{fix}"


def test_an_unknown_mesh_dim_is_an_error():
    fn = ft.precision(lambda x: x, reduce={"fdsp": BF16})
    with pytest.raises(ft.FunctitanError) as error:
        ft.simulate(fsdp=2)(lambda mesh: ft.spmd(fn, mesh=mesh, rules=RULES)(torch.ones(2)))()
    assert str(error.value) == (
        "ft.precision:\n  - reduce: unknown mesh dim 'fdsp' (did you mean 'fsdp'?); this mesh has ['fsdp']\n"
        "  Fix: use the mesh's dims, or one dtype for all of them"
    )
