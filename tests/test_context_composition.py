"""Context parallelism beside everything else: fsdp and tp, remat, precision, ft.jit, vmap, other derivatives, gloo."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch
from test_context_parallel import KV, PATTERN, RULES, Q, assert_close, expected, values

import functitan as ft
from functitan.models import llama

CONFIG = llama.LlamaConfig(61, 16, 1, 4, 2, 4, 32, rope_theta=10000.0)
DECLARED = ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, p.init, torch.float64), llama.params(CONFIG))
SIZES = (2, 16, 4, 2, 4)
OPTIONS = dict(causal=True, window=None, mask=None)
NOTHING = dict(segments=None, positions=None)


def text(seq: int = 16) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, CONFIG.vocab_size, (2, seq + 1), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[0] * 5 + [1] * (seq - 5), [0] * 12 + [1] * (seq - 12)])
    positions = torch.tensor([[*range(5), *range(seq - 5)], [*range(12), *range(seq - 12)]])
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "segments": segments, "positions": positions}


PLAIN = {name: x for name, x in text().items() if name in ("tokens", "labels")}


def gradients(mesh, batch, *, method=None, order="contiguous", wrap=lambda step: step, **options):
    """The loss and its gradients, whole, on a mesh or without one."""
    params = ft.init(DECLARED, ft.random.key(0), mesh=mesh, rules=llama.RULES)
    loss = lambda params, batch: llama.loss(params, batch, CONFIG, **options)[0]
    step = wrap(ft.value_and_grad(ft.context_parallel(loss, method=method, order=order)))
    batch = ft.zigzag(batch, "batch seq", mesh=mesh) if order == "zigzag" else batch
    batch = ft.shard(batch, "batch seq", mesh=mesh, rules=llama.RULES)
    value, grads = ft.spmd(step, mesh=mesh, rules=llama.RULES)(params, batch)
    return value, ft.unshard(grads, DECLARED, mesh=mesh, rules=llama.RULES)


WAYS = {"chunked loss": dict(chunk=5), "remat": dict(block=ft.remat(llama.block), chunk=4)}
CASES = [
    (dict(cp=2), "ring", "chunked loss"),
    (dict(cp=4), None, "remat"),
    (dict(cp=2, tp=2), "ring", "remat"),
    (dict(cp=2, tp=2), "all_gather", "chunked loss"),
    (dict(fsdp=2, cp=2), "all_to_all", "remat"),
    (dict(fsdp=2, cp=2), "ring", "remat"),
]


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize(("mesh", "method", "way"), CASES, ids=str)
def test_a_llama_has_the_loss_and_gradients_of_one_process(mesh: dict, method: str | None, way: str, packed: bool):
    batch = text() if packed else PLAIN
    plain = gradients(None, batch)
    for found in ft.simulate(**mesh)(gradients)(batch, method=method, order="zigzag", **WAYS[way]):
        assert_close(found, plain)  # float64 sums in another order


def test_a_captured_step_is_the_step():
    wrap = lambda step: ft.jit(step, backend="graph")
    found = ft.simulate(cp=2)(gradients)(text(), method="ring", order="zigzag", wrap=wrap)
    assert_close(found, [gradients(None, text())] * 2)


def test_bfloat16_keys_travel_as_they_are_and_gradients_in_float32():
    wrap = lambda step: ft.precision(step)
    with ft.record() as ledger:
        ranks = ft.simulate(cp=2)(gradients)(PLAIN, method="ring", order="zigzag", wrap=wrap)
    plain = gradients(None, PLAIN, wrap=wrap)
    for found in ranks:  # bfloat16 has 3 digits, and the merge of two tiles rounds once more
        ft.testing.assert_trees_all_close(found, plain, rtol=5e-2, atol=5e-2)
    sent = {(e.phase, e.dtype) for e in ledger if e.collective == "permute"}
    assert sent == {("forward", torch.bfloat16), ("backward", torch.bfloat16), ("backward", torch.float32)}


def test_a_vjp_runs_on_a_thread_without_context():
    q, k, v, g, _ = values(SIZES, [])

    def rank(mesh):
        q_, k_, v_, g_ = (
            ft.shard(x, p, mesh=mesh, rules=RULES) for x, p in zip((q, k, v, g), (Q, KV, KV, Q), strict=True)
        )
        attend = ft.context_parallel(lambda *xs: ft.attention(PATTERN, *xs, causal=True), method="ring")
        _, pull = ft.spmd(lambda *xs: torch.func.vjp(attend, *xs), mesh=mesh, rules=RULES)(q_, k_, v_)
        out: list = []
        thread = threading.Thread(target=contextvars.Context().run, args=(lambda: out.extend(pull(g_)),))
        thread.start()
        thread.join()
        return [ft.unshard(x, p, mesh=mesh, rules=RULES) for x, p in zip(out, (Q, KV, KV), strict=True)]

    for found in ft.simulate(cp=2)(rank)():
        assert_close(found, expected(q, k, v, g, OPTIONS | NOTHING)[1:])


def test_several_cotangents_are_pulled_back_at_once():
    q, k, v, g, _ = values(SIZES, [])

    def rank(mesh):
        tensors = zip((q, k, v, g), (Q, KV, KV, Q), strict=True)
        *own, g_ = (ft.shard(x, p, mesh=mesh, rules=RULES) for x, p in tensors)

        def pulled(*own):
            attend = ft.context_parallel(lambda *xs: ft.attention(PATTERN, *xs, causal=True), method="ring")
            _, pull = torch.func.vjp(attend, *own)
            return torch.func.vmap(pull)(torch.stack([g_, 2 * g_]))

        out = ft.spmd(pulled, mesh=mesh, rules=RULES)(*own)
        return [ft.unshard(x[1], p, mesh=mesh, rules=RULES) for x, p in zip(out, (Q, KV, KV), strict=True)]

    for found in ft.simulate(cp=2)(rank)():
        assert_close(found, expected(q, k, v, 2 * g, OPTIONS | NOTHING)[1:])


@pytest.mark.parametrize("method", ["ring", "all_to_all", None])
def test_per_example_gradients_are_a_loops(method: str | None):
    q, k, v, g, _ = values(SIZES, [])
    rows = "seq heads head_dim", "seq kv_heads head_dim", "seq kv_heads head_dim", "seq heads head_dim"

    def rank(mesh):
        own = [ft.shard(x, f"batch {p}", mesh=mesh, rules=RULES) for x, p in zip((q, k, v, g), rows, strict=True)]

        def loss(q, k, v, g):
            out = ft.attention(f"{rows[0]}, {rows[1]}", q, k, v, causal=True)
            return ft.reduce("seq heads head_dim ->", out * g)

        each = ft.vmap(ft.context_parallel(ft.grad(loss, argnums=(0, 1, 2)), method=method), axis="batch")
        out = ft.spmd(each, mesh=mesh, rules=RULES)(*own)
        return [ft.unshard(x, f"batch {p}", mesh=mesh, rules=RULES) for x, p in zip(out, rows[:3], strict=True)]

    for found in ft.simulate(dp=2, cp=2)(rank)():
        assert_close(found, expected(q, k, v, g, OPTIONS | NOTHING)[1:])


def test_a_second_derivative_gathers_keys_or_says_that_a_ring_has_none():
    q = torch.randn(1, 8, 2, 4, dtype=torch.float64)
    pattern = "batch seq heads head_dim"
    loss = lambda q: ft.reduce(
        f"{pattern} ->", ft.attention(f"{pattern}, {pattern}", q, q, q, causal=True, window=3) ** 2
    )
    product = lambda method: ft.context_parallel(lambda q: ft.hvp(loss, (q,), (q,)), method=method)
    arguments = dict(mesh=dict(cp=2), rules=RULES, patterns=pattern)
    ledger = ft.explain(product(None), q, **arguments)
    assert {e.collective for e in ledger if e.op == "attention"} == {"all_gather", "reduce_scatter"}
    assert "math backend" in str(ledger)
    with pytest.raises(ft.LayoutError, match="ring: it has one reverse derivative"):
        ft.explain(product("ring"), q, **arguments)
    (found,) = {0: ft.testing.sharded(product(None), (pattern,), pattern, mesh=dict(cp=2), rules=RULES)(q)}.values()
    assert_close(found, ft.hvp(loss, (q,), (q,)))


GLOO = [
    ("ring", True, False),
    ("ring", False, False),
    ("all_to_all", True, False),
    ("ring", True, True),
    ("ring", False, True),
]  # (method, zigzag, captured)


def _on_gloo() -> list:
    torch.set_num_threads(1)
    mesh = ft.make_mesh(cp=2)
    return [_attended(mesh, *way) for way in GLOO]


def _attended(mesh, method: str, zigzag: bool, captured: bool) -> tuple:
    """Gradients, and the bytes of each message in a ring; packed in eager, where data lies zigzag."""
    *tensors, marks = values(SIZES, [] if captured or not zigzag else ["segments"])
    patterns = (Q, KV, KV, Q, *["batch seq"] * len(marks))

    def loss(q, k, v, g, *segments):
        out = ft.attention(PATTERN, q, k, v, segments=segments[0] if segments else None, causal=True)
        return ft.reduce(f"{Q} ->", out * g)

    step = ft.context_parallel(ft.grad(loss, argnums=(0, 1, 2)), method=method, order="zigzag" if zigzag else None)
    step = ft.jit(step) if captured else step
    given = (*tensors, *marks.values())
    given = ft.zigzag(given, patterns, mesh=mesh) if zigzag else given
    with ft.record() as ledger:
        out = ft.spmd(step, mesh=mesh, rules=RULES)(*ft.shard(given, patterns, mesh=mesh, rules=RULES))
    out = ft.unshard(out, (Q, KV, KV), mesh=mesh, rules=RULES)
    out = ft.zigzag(out, (Q, KV, KV), mesh=mesh, inverse=True) if zigzag else out
    return out, [e.bytes for e in ledger if e.collective == "permute"]


def test_processes_have_the_gradients_of_one():
    batch, length, _, kv, dim = SIZES
    part = 2 * batch * (length // 2) * kv * dim * 8  # of keys and values
    for ways in ft.launch(_on_gloo, nprocs=2):
        for (method, zigzag, captured), (found, sent) in zip(GLOO, ways, strict=True):
            *tensors, marks = values(SIZES, [] if captured or not zigzag else ["segments"])
            assert_close(found, tuple(expected(*tensors, OPTIONS | NOTHING | marks)[1:]))
            assert sent == ([part] * 3 if method == "ring" else [])


def test_memory_of_a_rank_grows_with_its_part_of_the_sequence():
    loss = lambda params, batch: llama.loss(params, batch, CONFIG, chunk=64, block=ft.remat(llama.block))[0]
    step = ft.context_parallel(ft.value_and_grad(loss), method="ring", order="zigzag")

    def peak(seq: int, cp: int) -> int:
        batch = {name: torch.empty(1, seq, dtype=torch.int64, device="meta") for name in ("tokens", "labels")}
        ledger = ft.explain(step, DECLARED, batch, mesh=dict(cp=cp), rules=llama.RULES, patterns=(None, "batch seq"))
        assert ledger.peak_bytes is not None
        return ledger.peak_bytes

    assert peak(8192, 4) <= 1.02 * peak(4096, 2)  # less of the parameters, and two more messages on their way
    assert 1.7 * peak(4096, 2) <= peak(8192, 2) <= 2 * peak(4096, 2)


@pytest.mark.parametrize("wrap", [ft.jit, ft.compile])
def test_captured_ranks_send_alike_where_one_uses_nothing_that_comes(wrap):
    """Of contiguous tokens the first rank sees no key of another: eagerly it sends its own on all the same."""

    def run(mesh):
        q = ft.shard(torch.ones(1, 6, 2, 4, dtype=torch.float64).cumsum(1), Q, mesh=mesh, rules=RULES)
        attend = lambda q: ft.attention(f"{Q}, {Q}", q, q, q, causal=True)
        ring = ft.context_parallel(attend, method="ring")
        # of two, so that on the first rank two messages are equal: zeros
        loss = lambda fn: ft.grad(lambda q: ft.reduce(f"{Q} ->", fn(q) ** 2 + fn(2 * q)))
        ours = ft.jit(loss(ring), backend="graph") if wrap is ft.jit else loss(ft.compile(ring, backend="graph"))
        found = []
        for fn in (loss(ring), ours):
            with ft.record() as ledger:
                out = ft.spmd(fn, mesh=mesh, rules=RULES)(q)
            found.append((out, [entry[:4] for entry in ledger if entry.collective == "permute"]))
        return found

    for (plain, sent), (captured, again) in ft.simulate(cp=3)(run)():
        torch.testing.assert_close(captured, plain, rtol=1e-10, atol=1e-10)  # float64
        assert again == sent != []
