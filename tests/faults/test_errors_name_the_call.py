"""Errors say which call, which operand, and the fix, whatever stands in the place of a pattern or a tensor."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functitan as ft
from functitan.errors import PatternError

X, IDS = torch.randn(2, 4), torch.tensor([0, 1])
HEADS = torch.randn(1, 3, 2, 4)
PAIR = "batch seq heads head_dim, batch seq kv_heads head_dim"

# every named op: its pattern, and the tensors that it takes
OPS = {
    "einsum": ("batch embed, embed mlp -> batch mlp", (X, X.T)),
    "reduce": ("batch embed -> batch", (X,)),
    "broadcast": ("embed -> batch embed", (X[0],)),
    "constrain": ("batch embed -> batch width", (X,)),
    "rearrange": ("batch embed -> embed batch", (X,)),
    "take": ("batch, vocab embed -> batch embed", (IDS, X)),
    "sizes": ("batch embed", (X,)),
    "rms_norm": ("batch embed, embed", (X, X[0])),
    "layer_norm": ("batch embed, embed", (X, X[0])),
    "cross_entropy": ("batch vocab, batch", (X, IDS)),
    "linear_cross_entropy": ("batch embed, vocab embed, batch", (X, X, IDS)),
    "attention": (PAIR, (HEADS, HEADS, HEADS)),
}


def op_of(name):
    return getattr(ft, name, None) or getattr(ft.nn, name)


@pytest.mark.parametrize("name", OPS)
def test_the_good_call_runs(name):
    pattern, tensors = OPS[name]
    op_of(name)(pattern, *tensors)


@pytest.mark.parametrize("name", OPS)
def test_what_is_no_pattern_is_named_by_its_type_and_not_printed(name):
    pattern, tensors = OPS[name]
    big = torch.full((100, 100), 0.123)
    for bad in (big, None, 7, b"a b", ("a", "b")):
        with pytest.raises(PatternError) as error:
            op_of(name)(bad, pattern, *tensors[1:])
        assert str(error.value).startswith(f"pattern that is a value of type {type(bad).__name__!r}")
        assert "0.123" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name", OPS)
def test_what_is_no_dense_tensor_is_a_pattern_error(name):
    pattern, tensors = OPS[name]
    for place, tensor in enumerate(tensors):
        sparse = [] if name == "rearrange" else [tensor.to_sparse()]  # which permutes any tensor
        for bad in (None, [1, 2], "text", tensor.numpy(), *sparse):
            given_ = [bad if i == place else x for i, x in enumerate(tensors)]
            with pytest.raises(PatternError) as error:
                op_of(name)(pattern, *given_)
            assert repr(pattern) in str(error.value) and "0." not in str(error.value)


@given(st.lists(st.sampled_from(["a", "b", "2", "a-b", "embed"]), min_size=65, max_size=3000))
def test_errors_of_long_patterns_come_at_once_and_are_short(names):
    pattern = " ".join(names)
    for call in (
        lambda: ft.einsum(f"{pattern} -> ", X),
        lambda: ft.einsum(f"batch embed -> {pattern}", X),
        lambda: ft.reduce(f"{pattern} -> ", X),
        lambda: ft.Param(pattern, (2,)),
    ):
        start = time.monotonic()
        with pytest.raises(PatternError) as error:
            call()
        assert time.monotonic() - start < 1.0 and len(str(error.value)) < 15_000


@pytest.mark.parametrize(
    "pattern",
    [
        "batch embed, embd mlp -> batch mlp",
        "batch embed, embde mlp -> batch mlp",
        "batch Embed, embed mlp -> batch mlp",
        "batch seq embed, embeds heads -> batch seq heads",
        "batch embed, embed mlp, emebd heads -> batch mlp, batch heads",
    ],
)
def test_a_misspelt_contracted_axis_is_named(pattern):
    operands = pattern.split("->")[0].split(",")
    with pytest.raises(PatternError, match=r"did you mean 'embeds?'|did you mean 'embe?d?e?'|did you mean 'Embed'"):
        ft.einsum(pattern, *(torch.ones([2] * len(axes.split())) for axes in operands))


def test_sums_of_one_operand_alone_are_as_ever():
    torch.testing.assert_close(ft.einsum("a b, c d -> a d", X, X), torch.einsum("ab,cd->ad", X, X))
    heads = ft.einsum("batch heads, kv_heads embed -> batch heads embed", X, X)
    torch.testing.assert_close(heads, torch.einsum("ah,ke->ahe", X, X))


@pytest.mark.parametrize("index", [-5, 4, 9])
def test_an_index_out_of_range_names_op_and_axis(index):
    ids = torch.tensor([0, index])
    with pytest.raises(PatternError, match=rf"take\(.*\n.*axis 'vocab' of size 4: {index}"):
        ft.take("batch, vocab embed -> batch embed", ids, X.T)
    with pytest.raises(PatternError, match=r"select(.|\n)*axis 'embed' of size 4"):
        ft.select("batch embed, batch -> batch", X, ids)
    rules = ft.AxisRules({"batch": None, "embed": "tp"})

    def rank(mesh):
        x = ft.shard(X, "batch embed", mesh=mesh, rules=rules)
        return ft.spmd(lambda x: ft.select("batch embed, batch -> batch", x, ids), mesh=mesh, rules=rules)(x)

    with pytest.raises(PatternError, match=r"select(.|\n)*axis 'embed' of size 4"):
        ft.simulate(tp=2)(rank)()


def test_the_line_of_a_tensor_that_is_no_argument_is_named_in_a_donating_step():
    """The trace marks its inputs as donated: another run, which finds the line, has inputs of its own."""
    base, tx = torch.ones(2, 4), ft.optim.sgd(0.1)

    def loss(p, x, key):
        y = ft.einsum("batch embed, embed mlp -> batch mlp", x, p["w"] + base)
        return ft.reduce("batch mlp ->", y * y), ft.reduce("batch mlp ->", torch.ones_like(y))

    state = ft.TrainState.create({"w": ft.Param("embed mlp", (2, 4))}, tx, ft.random.key(0))
    with pytest.raises(
        ft.CaptureError, match=r"a tensor \(2, 4\) float32 that is no argument .*errors_name_the_call.py"
    ):
        ft.jit(ft.train_step(loss, tx), donate=0, backend="graph")(state, torch.ones(4, 2))
