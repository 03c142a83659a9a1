"""Attention over a sharded sequence is attention: every lowering, order and mask, against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functitan as ft
from functitan.attention import blockwise
from functitan.attention.route import route
from functitan.attention.tiles import tiles
from functitan.sharding.mesh import Mesh, MeshSizes, Transport
from functitan.sharding.sequence import positions_of, runs
from functitan.testing.sharded import assert_close

RULES = ft.AxisRules({"batch": "dp", "heads": "tp", "kv_heads": "tp", "seq": ("cp", "ep"), "head_dim": None})
# as Llama's: the residual stream is sharded over tp too, and so are keys, of which every rank needs each head
SPREAD = RULES.replace(kv_heads=None, seq=("cp", "ep", "tp"))
Q, KV, ROWS = "batch seq heads head_dim", "batch seq kv_heads head_dim", "batch seq"
PATTERN = f"{Q}, {KV}"
MESHES = [dict(cp=2), dict(cp=4), dict(cp=8), dict(cp=2, tp=2), dict(cp=4, tp=2), dict(dp=2, cp=2), dict(cp=2, ep=2)]
MASKS = {
    "none": None,
    "prefix": lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) | (kv_idx < 5),
    "by head and example": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % (h + b + 2) < 2,
    "nothing": lambda b, h, q_idx, kv_idx: q_idx < kv_idx - 1000,
}


def reference(q, k, v, causal, window, segments, positions, mask):
    """softmax(q k^T) v, position by position; a row that sees nothing gives 0."""
    (batch, n, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd, bkhd -> bhqk", q, k) * q.shape[-1] ** -0.5
    at = torch.arange(n).expand(batch, n) if positions is None else positions
    i, j = at[:, None, :, None], at[:, None, None, :]
    seen = torch.ones(batch, heads, n, n, dtype=torch.bool)
    if causal:
        seen = seen & (i >= j)
    if window is not None:
        seen = seen & (i - j < window) & (causal | (j - i < window))
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    if mask is not None:
        seen = seen & mask(torch.arange(batch).view(-1, 1, 1, 1), torch.arange(heads).view(1, -1, 1, 1), i, j)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk, bkhd -> bqhd", weights, v)


def on_mesh(mesh, rules, method, order, given, options):
    """The output and the gradients of sum(out * g), global and in the order of positions."""
    q, k, v, g, marks = given

    def run(own):
        put = lambda x, pattern: ft.shard(
            ft.zigzag(x, pattern, mesh=own) if order == "zigzag" else x, pattern, mesh=own, rules=rules
        )
        back = lambda x, pattern: ft.zigzag(
            ft.unshard(x, pattern, mesh=own, rules=rules), pattern, mesh=own, inverse=True
        ) if order == "zigzag" else ft.unshard(x, pattern, mesh=own, rules=rules)  # fmt: skip
        local = {name: put(x, ROWS) for name, x in marks.items()}

        def loss(q, k, v, g):
            out = ft.attention(PATTERN, q, k, v, **local, **options)
            return ft.reduce(f"{Q} ->", out * g), out

        step = ft.context_parallel(ft.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), method=method, order=order)
        (_, out), grads = ft.spmd(step, mesh=own, rules=rules)(put(q, Q), put(k, KV), put(v, KV), put(g, Q))
        return [back(x, pattern) for x, pattern in zip((out, *grads), (Q, Q, KV, KV), strict=True)]

    first, *others = ft.simulate(**mesh)(run)()
    for other in others:
        assert_close(other, first, tolerance=0.0)
    return first


def expected(q, k, v, g, options):
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = reference(q, k, v, **options)
    return [out.detach(), *torch.autograd.grad((out * g).sum(), (q, k, v))]


@st.composite
def cases(draw):
    mesh = draw(st.sampled_from(MESHES))
    ranks, tp = mesh.get("cp", 1) * mesh.get("ep", 1), mesh.get("tp", 1)
    methods, rules = ["ring", "all_gather", None], draw(st.sampled_from([RULES, SPREAD]))
    kv = tp * draw(st.integers(1, 2))
    if (rules is RULES or tp == 1) and draw(st.booleans()):
        kv = tp * ranks
        methods.append("all_to_all")
        methods += [{"cp": "ring", "ep": "all_to_all"}] if "ep" in mesh else []
    length = 2 * tp * ranks * draw(st.integers(1, 4))
    causal, window = draw(st.booleans()), draw(st.none() | st.integers(1, length))
    marks = draw(st.lists(st.sampled_from(["segments", "positions"]), unique=True))
    order = draw(st.sampled_from(["contiguous", "zigzag"]))
    mask = MASKS[draw(st.sampled_from(list(MASKS)))]
    sizes = 2, length, kv * draw(st.integers(1, 3)), kv, draw(st.sampled_from([2, 5]))
    return (
        mesh,
        rules,
        draw(st.sampled_from(methods)),
        order,
        sizes,
        dict(causal=causal, window=window, mask=mask),
        marks,
    )


def values(sizes, names, seed=0):
    batch, length, heads, kv, dim = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, length, heads, dim),
        (batch, length, kv, dim),
        (batch, length, kv, dim),
        (batch, length, heads, dim),
    )
    q, k, v, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    segments = torch.randint(0, 2, (batch, length), generator=generator).cumsum(-1) // 3
    positions = 2 * torch.arange(length).expand(batch, length)
    if "segments" in names:
        positions = torch.arange(length) - torch.searchsorted(segments, segments)  # anew in each segment
    return q, k, v, g, {name: dict(segments=segments, positions=positions)[name] for name in names}


@settings(max_examples=120)
@given(cases())
def test_every_lowering_is_unsharded_attention(case):
    mesh, rules, method, order, sizes, options, names = case
    *tensors, marks = values(sizes, names)
    full = {"segments": None, "positions": None} | marks
    # float64 sums in another order
    assert_close(on_mesh(mesh, rules, method, order, (*tensors, marks), options), expected(*tensors, options | full))


def ledgers(mesh, method, sizes, options, order="contiguous", dtype=torch.float64):
    """The predicted and the recorded ledger of value and gradients."""
    batch, length, heads, kv, dim = sizes
    q, k = torch.randn(batch, length, heads, dim, dtype=dtype), torch.randn(batch, length, kv, dim, dtype=dtype)
    loss = lambda q, k, v: ft.attention(PATTERN, q, k, v, **options).square().sum()
    step = ft.context_parallel(ft.grad(loss, argnums=(0, 1, 2)), method=method, order=order)
    predicted = ft.explain(step, q, k, k, mesh=mesh, rules=RULES, patterns=(Q, KV, KV))
    with ft.record() as recorded:
        ft.simulate(**mesh)(
            lambda own: ft.spmd(step, mesh=own, rules=RULES)(
                *(ft.shard(x, p, mesh=own, rules=RULES) for x, p in ((q, Q), (k, KV), (k, KV)))
            )
        )()
    found = [e for e in recorded if e.op == "attention"]
    assert found == list(predicted)
    return found


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("method", ["ring", "all_gather", "all_to_all"])
def test_bytes_are_the_methods_formula(method: str, n: int):
    sizes = batch, length, heads, kv, dim = 2, 64, 16, 8, 4
    shard = batch * length // n * dim * 8
    q, k = shard * heads, shard * kv
    found = ledgers(dict(cp=n), method, sizes, dict(causal=True))
    sent = {phase: sum(e.bytes for e in found if e.phase == phase) for phase in ("forward", "backward")}
    if method == "ring":
        assert sent == {"forward": 2 * (n - 1) * k, "backward": 4 * (n - 1) * k}
        assert [e.collective for e in found] == ["permute"] * 3 * (n - 1)
    elif method == "all_gather":
        assert sent == {"forward": 2 * (n - 1) * k, "backward": 2 * (n - 1) * k}
    else:
        assert sent == {"forward": 2 * (n - 1) * (q + k) // n, "backward": 2 * (n - 1) * (q + k) // n}
        assert {e.collective for e in found} == {"all_to_all"}


def sent_by_rank(n, options):
    """How many blocks of keys and values, or of their gradients, each rank of a ring of contiguous parts sends."""
    q = torch.randn(1, 8, 1, 2, dtype=torch.float64)
    loss = lambda q: ft.attention(f"{Q}, {Q}", q, q, q, **options).square().sum()
    step = ft.context_parallel(ft.grad(loss), method="ring")

    def rank(mesh):
        sent, start = [], mesh.transport.start

        def counted(message, x):
            sent.append(message.how.sends(n, mesh.rank))
            return start(message, x)

        mesh = mesh._replace(transport=mesh.transport._replace(start=counted))
        ft.spmd(step, mesh=mesh, rules=RULES)(q)
        return sum(sent)

    return ft.simulate(cp=n)(rank)()


@pytest.mark.parametrize("n", [2, 4, 8])
def test_keys_go_to_no_rank_that_sees_none_of_them(n: int):
    """Of contiguous parts rank r needs those of ranks below it; the last's gradients are at home from the beginning."""
    ways = 2  # of keys, forward and backward; gradients make each stop, but for the last rank's, which sends on all
    keys = [ways * (r + 1) if r < n - 1 else 0 for r in range(n)]
    gradients = [n - 2 + (r == n - 1) for r in range(n)]
    assert sent_by_rank(n, dict(causal=True)) == [k + g for k, g in zip(keys, gradients, strict=True)]
    near = [ways * (r < n - 1) + (r > 0) for r in range(n)]  # a window that reaches the part before
    assert sent_by_rank(n, dict(causal=True, window=8)) == near


@settings(max_examples=200)
@given(st.data())
def test_the_way_around_a_ring_brings_each_block_where_it_is_needed_and_each_gradient_home(data):
    ranks, size = data.draw(st.integers(1, 6)), 2 * data.draw(st.integers(1, 3))
    zigzag, causal = data.draw(st.sampled_from([1, ranks])), data.draw(st.booleans())
    window = data.draw(st.none() | st.integers(1, ranks * size))
    at = [positions_of(runs(ranks * size, zigzag, rank * size, size)) for rank in range(ranks)]
    i_j = [[at[rank][:, None] - at[block] for block in range(ranks)] for rank in range(ranks)]
    near = lambda d: (d >= 0) if causal else torch.ones_like(d, dtype=torch.bool)
    sees = lambda d: bool((near(d) & (window is None or (d < window) & (-d < window))).any())
    needed = {(rank, block) for rank in range(ranks) for block in range(ranks) if sees(i_j[rank][block])}

    there = {rank: rank for rank in range(ranks)}  # which block each rank has
    sums: dict[int, set[int]] = {}  # of the gradient that each has: the ranks that added to it
    used: set[tuple[int, int]] = set()
    for stop in route(ranks * size, ranks, zigzag, causal, window):
        assert all((rank - block) % ranks == stop.shift for rank, block in there.items())
        used |= {(rank, block) for rank, block in there.items() if (rank, block) in needed}
        added = {rank: {rank} for rank, block in there.items() if (rank, block) in needed and stop.shift}
        sums = {rank: sums.get(rank, set()) | added.get(rank, set()) for rank in {*sums, *added}}

        def moved(what, passing):
            reached = () if passing is None else [rank for rank in range(ranks) if passing.reaches(rank)]
            return {rank: what[(rank - passing.shift) % ranks] for rank in reached}  # a KeyError: there was none

        there, sums = moved(there, stop.keys), moved(sums, stop.gradients)
    assert not there and used | {(r, r) for r in range(ranks)} >= needed
    assert sums == {b: others for b in range(ranks) if (others := {r for r, c in needed if c == b and r != b})}


@pytest.mark.parametrize(("order", "shifts"), [("contiguous", 1), ("zigzag", 2)])
def test_blocks_that_a_window_hides_are_not_sent(order: str, shifts: int):
    """Of 8 ranks with 8 positions each, a window of 5 reaches the neighbours only."""
    found = ledgers(dict(cp=8), "ring", (1, 64, 2, 2, 4), dict(causal=True, window=5), order)
    assert len(found) == 3 * shifts
    whole = ledgers(dict(cp=8), "ring", (1, 64, 2, 2, 4), dict(causal=True, window=64), order)
    assert len(whole) == 3 * 7


@pytest.mark.parametrize("n", [2, 3, 8])
def test_runs_that_touch_are_one(n: int):
    held = [runs(6 * n, n, 6 * rank, 6) for rank in range(n)]
    assert held == [((3 * r, 3), (3 * (2 * n - 1 - r), 3)) if r < n - 1 else ((3 * r, 6),) for r in range(n)]


@pytest.mark.parametrize("n", [2, 3, 8, 64])
def test_zigzag_gives_every_rank_the_same_causal_work(n: int):
    size = 4096

    def work(order: int) -> list[float]:
        held = [runs(n * size, order, rank * size, size) for rank in range(n)]
        return [sum(t.work for keys in held for t in tiles(held[rank], keys, True, None)) for rank in range(n)]

    ratio = lambda found: max(found) / (sum(found) / n)
    assert ratio(work(n)) <= 1.05
    assert sum(work(n)) == sum(work(1)) == n * size * (n * size + 1) / 2  # nothing twice, and nothing hidden
    assert ratio(work(1)) >= 1.49  # the contiguous order: 2 - 1/n


@settings(max_examples=200)
@given(st.data())
def test_tiles_hold_each_seen_pair_once_and_no_hidden_one(data):
    ranks, block = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    length, causal = 2 * ranks * block, data.draw(st.booleans())
    window = data.draw(st.none() | st.integers(1, length))
    zigzag = data.draw(st.sampled_from([1, ranks]))

    def some():
        parts = data.draw(st.sampled_from([1, ranks, 2 * ranks]))
        return runs(length, zigzag, data.draw(st.integers(0, parts - 1)) * (length // parts), length // parts)

    rows, columns = some(), some()
    i, j = positions_of(rows)[:, None], positions_of(columns)
    seen = torch.ones(i.shape[0], j.shape[0], dtype=torch.bool)
    seen &= (i >= j) | (not causal)
    seen &= window is None or ((i - j < window) & ((j - i < window) | causal))
    count = torch.zeros_like(seen, dtype=torch.int64)
    for t in tiles(rows, columns, causal, window):
        there = seen[t.begin : t.end, t.left : t.right]
        if t.kind != "masked":  # the kernel applies no mask of ours
            assert torch.equal(there, torch.ones_like(there).tril() if t.kind == "causal" else torch.ones_like(there))
        count[t.begin : t.end, t.left : t.right] += 1
    assert count[seen].eq(1).all() and count.max() <= 1


def test_of_nested_wrappers_the_inner_one_wins_in_what_it_is_given():
    at = lambda: ft.iota("seq", "seq", seq=8)
    attend = lambda q: ft.attention(f"{Q}, {Q}", q, q, q, causal=True)
    inner = ft.context_parallel(lambda q: (at(), attend(q)), method="all_gather")
    outer = ft.context_parallel(inner, method="ring", order="zigzag")

    def rank(mesh):
        with ft.record() as ledger:
            places, _ = ft.spmd(outer, mesh=mesh, rules=RULES)(torch.ones(1, 4, 1, 2))
        return places.tolist(), {entry.collective for entry in ledger}

    assert ft.simulate(cp=2)(rank)() == [([0, 1, 6, 7], {"all_gather"}), ([2, 3, 4, 5], {"all_gather"})]


CHOICES = {
    "keys are few: they travel": ((1, 2**18, 32, 8, 128), dict(cp=8), {"permute"}),
    "keys are as many as queries": ((1, 2**16, 16, 16, 64), dict(cp=8), {"all_to_all"}),
    "ranks outnumber the kv heads, but not over the last mesh dim": (
        (1, 2**18, 8, 4, 64), dict(cp=4, ep=4), {"permute", "all_to_all"},
    ),
    "the fewest collectives, where bytes cost nothing": ((1, 64, 4, 4, 4), dict(cp=4), {"all_gather"}),
}  # fmt: skip


@pytest.mark.parametrize("why", CHOICES)
def test_the_cheapest_method_is_chosen(why: str):
    (batch, length, heads, kv, dim), mesh, kinds = CHOICES[why]
    shapes = (batch, length, heads, dim), *2 * [(batch, length, kv, dim)]
    given = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    attend = lambda q, k, v: ft.attention(PATTERN, q, k, v, causal=True)
    ledger = ft.explain(attend, *given, mesh=mesh, rules=RULES, patterns=(Q, KV, KV))
    assert {entry.collective for entry in ledger} == kinds


def test_the_next_block_travels_while_this_one_is_computed(monkeypatch):
    events: list[str] = []

    def start(message, x):
        assert message.collective == "permute"
        events.append("start")
        return lambda: events.append("wait") or x.clone()

    def logged(name, kernel):
        return lambda *given: events.append(name) or kernel(*given)

    monkeypatch.setattr(blockwise, "tile", logged("tile", blockwise.tile))
    monkeypatch.setattr(blockwise, "tile_gradients", logged("gradients", blockwise.tile_gradients))
    mesh = Mesh(MeshSizes(("cp",), (3,)), (1,), Transport(start, lambda *_: None))
    q = torch.randn(1, 4, 1, 2)
    attend = ft.context_parallel(lambda q: ft.attention(f"{Q}, {Q}", q, q, q).sum(), method="ring")
    ft.spmd(attend, mesh=mesh, rules=RULES)(q)
    assert events == ["start", "tile", "wait", "start", "tile", "wait", "tile"]
    events.clear()
    ft.spmd(ft.grad(attend), mesh=mesh, rules=RULES)(q)
    backward = events[7:]  # gradients start home after the second block, and are waited for after the third
    assert backward == [
        *("start", "gradients", "wait"),
        *("start", "gradients", "start", "wait"),
        *("gradients", "wait", "start", "wait"),
    ]
