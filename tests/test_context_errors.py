"""Bad input to context parallelism: each mistake is an error that names it, and what would work."""

from __future__ import annotations

import pytest
import torch
from test_context_parallel import KV, PATTERN, RULES, Q, values

import functitan as ft

TENSORS = values((2, 8, 4, 2, 4), [])[:3]


def attend(mesh, method=None, order="contiguous", **options):
    """One call on a virtual mesh; tensors among the options are `batch seq`."""

    def rank(own):
        put = lambda x, pattern: ft.shard(x, pattern, mesh=own, rules=RULES)
        q, k, v = (put(x, p) for x, p in zip(TENSORS, (Q, KV, KV), strict=True))
        given = {n: put(x, "batch seq") if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        run = ft.context_parallel(lambda q, k, v: ft.attention(PATTERN, q, k, v, **given), method=method, order=order)
        return ft.spmd(run, mesh=own, rules=RULES)(q, k, v)

    return ft.simulate(**mesh)(rank)()


seen: list = []
count = 0


def remembers(b, h, q_idx, kv_idx):
    global count
    count += 1
    return q_idx >= kv_idx


def writes(b, h, q_idx, kv_idx):
    q_idx += 1
    return q_idx >= kv_idx


def branches(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx if q_idx > 3 else kv_idx >= 0


def forgets(b, h, q_idx, kv_idx):
    seen.append(1)
    return (q_idx + len(seen)) % 2 == kv_idx % 2


MASKS = [
    (remembers, "it assigns to 'count', which is not its own"),
    (writes, "it writes into its indices"),
    (branches, "called with tensors of indices it fails: RuntimeError: Boolean value of Tensor"),
    (forgets, "called twice with the same indices it gave different results"),
    (lambda b, h, q, kv: torch.rand(q.shape) < 0.5, "it draws random numbers"),
    (
        lambda b, h, q, kv: q >= kv if b[0, 0, 0, 0] == 0 else q < kv,
        "it reads the value of a tensor, by .item() or an if",
    ),
    (lambda b, h, q, kv: q - kv, "it gave a tensor of int64, where a tensor of bool is wanted"),
    (lambda b, h, q, kv: True, "it gave a bool, where a tensor of bool is wanted"),
    (lambda q, kv: q >= kv, "called with tensors of indices it fails: TypeError"),
]


@pytest.mark.parametrize(("mask", "text"), MASKS, ids=[text for _, text in MASKS])
@pytest.mark.parametrize("mesh", [dict(cp=1), dict(cp=2)], ids=str)
def test_a_mask_function_that_is_not_pure_is_named(mask, text: str, mesh: dict):
    with pytest.raises(ft.PatternError, match="mask=:") as error:
        attend(mesh, mask=mask)
    assert text in str(error.value) and "write a pure function" in str(error.value)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (dict(mask=3), "mask is a int, not a function"),
        (dict(window=0), "window is 0: a number of positions, at least 1"),
    ],
)
def test_options_of_the_wrong_kind_are_named(given: dict, text: str):
    with pytest.raises(ft.PatternError, match=text):
        attend(dict(cp=2), **given)


def test_positions_must_be_in_the_order_of_the_tokens():
    positions = torch.arange(8).expand(2, 8).contiguous()
    with pytest.raises(ft.LayoutError, match="positions count the slots of this shard, but its tokens lie zigzag"):
        attend(dict(cp=2), order="zigzag", causal=True, positions=positions)


def test_positions_must_have_the_layout_of_the_tokens():
    x = TENSORS[0]
    with pytest.raises(ft.PatternError, match=r"axis 'seq' is 16 .* in positions, but 8"):
        ft.simulate(cp=2)(
            lambda own: ft.spmd(
                lambda q: ft.attention(f"{Q}, {Q}", q, q, q, positions=torch.arange(8).expand(2, 8)),
                mesh=own,
                rules=RULES,
            )(ft.shard(x, Q, mesh=own, rules=RULES))
        )()


def test_lengths_that_zigzag_cannot_split_are_listed():
    batch = {"labels": torch.zeros(2, 10), "tokens": torch.zeros(2, 12), "key": torch.zeros(2)}
    patterns = {"labels": "batch seq", "tokens": "batch seq", "key": None}
    with pytest.raises(ft.LayoutError) as error:
        ft.simulate(cp=2)(lambda mesh: ft.zigzag(batch, patterns, mesh=mesh))()
    assert "labels has 10 positions, which do not split into 4 equal blocks" in str(error.value)
    assert "tokens" not in str(error.value) and "8 or 12 would" in str(error.value)


def test_attention_over_a_sequence_that_zigzag_cannot_split_is_an_error():
    x = torch.zeros(1, 6, 2, 4)
    step = ft.context_parallel(lambda q: ft.attention(f"{Q}, {Q}", q, q, q, causal=True), order="zigzag")
    with pytest.raises(ft.LayoutError, match="6 positions, which do not split into 4 equal blocks"):
        ft.explain(step, x, mesh=dict(cp=2), rules=RULES, patterns=Q)


METHODS = [
    ("all_to_all", "2 kv heads on each rank are not divisible by 4"),
    ({"cp": "ring", "ep": "all_gather"}, "a ring and an all-gather do not stand beside each other"),
]


@pytest.mark.parametrize(("method", "text"), METHODS, ids=["heads", "kinds"])
def test_a_method_that_cannot_run_is_an_error(method, text: str):
    with pytest.raises(ft.LayoutError, match=text):
        attend(dict(cp=4) if isinstance(method, str) else dict(cp=2, ep=2), method=method)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(method="rings"), r"method 'rings' is none \(did you mean 'ring'\?\)"),
        (dict(order="zig"), r"order 'zig' is none"),
        (dict(method={"cp": "gather"}), "method 'gather' is none"),
    ],
)
def test_unknown_words_are_named(options: dict, text: str):
    with pytest.raises(ft.FunctitanError, match=text):
        ft.context_parallel(lambda x: x, **options)


def test_an_unknown_mesh_dim_is_named():
    with pytest.raises(ft.LayoutError, match="unknown mesh dim 'pc'"):
        ft.simulate(cp=2)(lambda mesh: ft.zigzag(torch.zeros(8), "seq", mesh=mesh, dims="pc"))()
