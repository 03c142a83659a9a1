"""Attention over a sharded sequence is attention: every lowering, order and mask, against plain torch."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functitan as ft
from functitan.testing.sharded import assert_close

RULES = ft.AxisRules({"batch": "dp", "heads": "tp", "kv_heads": "tp", "seq": ("cp", "ep"), "head_dim": None})
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
    methods = ["ring", "all_gather", None]
    kv = tp * draw(st.integers(1, 2))
    if draw(st.booleans()):
        kv = tp * ranks
        methods.append("all_to_all")
        methods += [{"cp": "ring", "ep": "all_to_all"}] if "ep" in mesh else []
    length = 2 * ranks * draw(st.integers(1, 4))
    causal, window = draw(st.booleans()), draw(st.none() | st.integers(1, length))
    marks = draw(st.lists(st.sampled_from(["segments", "positions"]), unique=True))
    order = draw(st.sampled_from(["contiguous", "zigzag"]))
    mask = MASKS[draw(st.sampled_from(list(MASKS)))]
    sizes = 2, length, kv * draw(st.integers(1, 3)), kv, draw(st.sampled_from([2, 5]))
    return mesh, draw(st.sampled_from(methods)), order, sizes, dict(causal=causal, window=window, mask=mask), marks


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
    positions = torch.arange(length) - torch.searchsorted(segments, segments)  # anew in each segment
    return q, k, v, g, {name: dict(segments=segments, positions=positions)[name] for name in names}


@settings(max_examples=60)
@given(cases())
def test_every_lowering_is_unsharded_attention(case):
    mesh, method, order, sizes, options, names = case
    *tensors, marks = values(sizes, names)
    full = {"segments": None, "positions": None} | marks
    # float64 sums in another order
    assert_close(on_mesh(mesh, RULES, method, order, (*tensors, marks), options), expected(*tensors, options | full))
