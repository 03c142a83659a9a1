"""The asserts catch what is wrong, name it, and pass what is right."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functitan as ft
from functitan.models import llama
from functitan.testing import (
    assert_max_traces,
    assert_mesh_invariant,
    assert_tree_shapes,
    assert_trees_all_close,
    first_divergence,
)
from functitan.testing.strategies import meshes
from functitan.testing.variants import variants

RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "heads": "tp", "mlp": "tp", "seq": ("cp", "tp"), "embed": "fsdp"})
UP = "batch seq embed, embed mlp -> batch seq mlp"
DOWN = "batch seq mlp, mlp embed -> batch seq embed"
X, W, V = "batch seq embed", "embed mlp", "mlp embed"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values() -> tuple[torch.Tensor, ...]:
    return normal(8, 8, 8), normal(8, 16, seed=1), normal(16, 8, seed=2)


def mlp(x, w, v):
    return ft.einsum(DOWN, torch.tanh(ft.einsum(UP, x, w)), v)


def message(fn, *args, **options) -> str:
    with pytest.raises(AssertionError) as caught:
        fn(*args, **options)
    return str(caught.value)


# ---- trees


class Pair(NamedTuple):
    x: object
    y: object


def test_equal_trees_pass():
    tree = {"a": normal(2, 3), "b": [1, 2.5, None, "text"], "c": Pair(torch.tensor(3), torch.tensor(float("inf")))}
    assert_trees_all_close(tree, ft.tree.map(lambda x: x, tree), rtol=0.0, atol=0.0)


def test_every_leaf_that_differs_is_listed():
    x = torch.zeros(2, 3)
    y = x.clone()
    y[1, 2] = 0.5
    actual = {"a": x, "b": [y, 3], "c": x, "d": x.double(), "e": x[0], "f": "one", "g": torch.tensor(2**62 + 1)}
    expected = {"a": x, "b": [x, 4], "c": x + 7, "d": x, "e": x, "f": "two", "g": torch.tensor(2**62)}
    assert message(assert_trees_all_close, actual, expected).splitlines() == [
        "assert_trees_all_close:",
        "  - b.0: 1 of 6 values differ by more than 1e-05, most by 0.5 at [1, 2]: 0.5 is not 0.0",
        "  - b.1: 1 of 1 values differ by more than 5e-10, most by 1: 3.0 is not 4.0",
        "  - c: 6 of 6 values differ by more than 8e-05, most by 7 at [0, 0]: 0.0 is not 7.0",
        "  - d: float64[2, 3] is not float32[2, 3]",
        "  - e: float32[3] is not float32[2, 3]",
        "  - f: 'one' is not 'two'",
        # int64, beyond what float64 tells apart
        f"  - g: 1 of 1 values differ by more than 0, most by 1: {2**62 + 1} is not {2**62}",
    ]


def test_structures_differ_by_path():
    text = message(assert_trees_all_close, {"a": 1, "b": [2, 3]}, {"a": 1, "b": [2], "c": {"d": 4}})
    assert text.splitlines()[1:] == ["  - c.d: only in the expected tree", "  - b.1: only in the actual tree"]
    assert "containers differ: PyTreeSpec([*, *]" in message(assert_trees_all_close, [1, 2], (1, 2))
    assert "value: 1 of 1 values differ" in message(assert_trees_all_close, torch.tensor(1.0), torch.tensor(2.0))


def test_nan_equals_nothing_and_infinities_themselves():
    nan, inf = torch.tensor([0.0, float("nan")]), torch.tensor([0.0, float("inf")])
    assert_trees_all_close(inf, inf)
    for actual, expected in ((nan, nan), (nan, inf), (inf, -inf), (inf, torch.zeros(2)), (torch.zeros(2), inf)):
        assert "1 of 2 values differ by more than 1e-05, most by inf at [1]" in message(
            assert_trees_all_close, actual, expected
        )


@given(scale=st.floats(1e-3, 1e6), error=st.floats(0, 1e-3))
def test_tolerances_are_relative_to_the_largest_value(scale, error):
    """The oracle is the inequality itself."""
    x = torch.tensor([0.0, scale], dtype=torch.float64)
    y = x + torch.tensor([error, 0.0])
    gap, bound = y[0].item(), 1e-6 + 1e-7 * scale
    if gap <= bound:
        assert_trees_all_close(y, x, rtol=1e-7, atol=1e-6)
    else:
        assert "1 of 2" in message(assert_trees_all_close, y, x, rtol=1e-7, atol=1e-6)


def test_shapes_are_those_of_tuples_params_and_prefixes():
    config = llama.LlamaConfig(61, 16, 2, 4, 2, 4, 32)
    declared = llama.params(config)
    params = ft.init(declared, ft.random.key(0))
    assert_tree_shapes(params, declared)
    tree = {"a": torch.ones(2, 3), "b": [torch.ones(()), torch.ones(())], "c": Pair(torch.ones(4), (torch.ones(1),))}
    assert_tree_shapes(tree, {"a": (2, None), "b": (), "c": Pair((4,), ((1,),))})
    assert_tree_shapes(tree, None)
    text = message(assert_tree_shapes, tree, {"a": ft.Param("x y", (3, 2)), "b": (1,), "c": None})
    assert text.splitlines()[1:] == [
        "  - a: shape (2, 3) is not (3, 2), declared as Param('x y', (3, 2))",
        "  - b.0: shape () is not (1,)",
        "  - b.1: shape () is not (1,)",
    ]


def test_more_traces_than_allowed_raise():
    run = assert_max_traces(lambda x: x + 1, 2)
    assert [run(1), run(2)] == [2, 3]
    assert "<lambda> ran 3 times, at most 2 were expected\n  Fix: keep shapes" in message(run, 3)


# ---- every mesh


def test_named_programs_are_invariant_with_their_gradients():
    assert_mesh_invariant(mlp, values(), patterns=(X, W, V), out=X, rules=RULES)


@settings(max_examples=5)
@given(mesh=meshes())
def test_llama_is_invariant(mesh):
    """Attention, lookups, cross entropy; integer leaves, an unused one, one that is no tensor; scalar results."""
    config = llama.LlamaConfig(61, 8, 1, 8, 8, 8, 16)
    declared = ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, p.init, torch.float64), llama.params(config))
    params = ft.init(declared, ft.random.key(0))
    tokens = torch.randint(0, 61, (8, 8), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1)}

    def program(params, batch, unused, name):
        assert name == "a string"
        total, count = llama.loss(params, batch, config)
        return {"total": total, "count": count, "logits": llama.apply(params, batch["tokens"], config)}

    args = (params, batch, normal(8), "a string")
    patterns = (declared, "batch seq", "embed", None)
    out = {"total": None, "count": None, "logits": "batch seq vocab"}
    assert_mesh_invariant(program, args, patterns=patterns, out=out, rules=llama.RULES, meshes=[mesh])


def scaled(x, w, scale):
    return ft.einsum(UP, x * scale, w)


def test_a_plain_product_with_a_parameter_has_a_wrong_gradient():
    args, patterns = (*values()[:2], normal(8, seed=3)), (X, W, "embed")
    good = lambda x, w, scale: scaled(x, w, ft.broadcast("embed -> batch seq embed", scale))
    meshes = [dict(tp=2), dict(dp=2)]
    assert_mesh_invariant(good, args, patterns=patterns, out="batch seq mlp", rules=RULES, meshes=meshes)
    text = message(
        assert_mesh_invariant, scaled, args, patterns=patterns, out="batch seq mlp", rules=RULES, meshes=meshes
    )
    title, *lines, fix = text.splitlines()
    assert title == "assert_mesh_invariant:" and fix.startswith("  Fix: plain torch ops are elementwise")
    assert len(lines) == 4  # nothing else is wrong: neither the value, nor the gradients of x and w
    for mesh, (wrong, where) in zip(meshes, (lines[:2], lines[2:]), strict=True):
        assert wrong.startswith(f"  - mesh {mesh}: gradient of argument 2: 8 of 8 values differ by more than")
        assert where == (
            f"  - mesh {mesh}: no named op differs: it comes from plain torch ops on arguments before all named ops, "
            "or on the last results"
        )


def test_a_wrong_gradient_is_followed_to_the_op_before():
    """Where the parameter comes out of a named op, that op's backward is the first that differs."""
    program = lambda x, w, scale: scaled(x, w, ft.constrain("embed -> mlp", scale))
    rules = RULES.replace(mlp=None)
    args = (*values()[:2], normal(8, seed=3))
    options = dict(patterns=(X, W, "embed"), out="batch seq mlp", rules=rules, meshes=[dict(dp=2)])
    text = message(assert_mesh_invariant, program, args, **options)
    assert "first named op that differs is value" in text
    assert "constrain('embed -> mlp'), backward, result 'embed'" in text


def test_a_local_sum_of_a_sharded_axis_is_caught_and_named():
    wrong = lambda x, w: ft.reduce("embed ->", ft.einsum("embed mlp, mlp -> embed", w, x.sum((0, 1)) @ w))
    args = values()[:2]
    options = dict(patterns=(X, W), out="", rules=RULES.replace(mlp=None, embed=None))
    assert_mesh_invariant(wrong, args, meshes=[dict(tp=1)], **options)
    text = message(assert_mesh_invariant, wrong, args, meshes=[dict(dp=2)], **options)
    assert "mesh {'dp': 2}: value: 1 of 1 values differ" in text and "(rank 0)" in text
    first = "value 0, einsum('embed mlp, mlp -> embed'), forward, result 'embed': differs by"
    assert f"the first named op that differs is {first}" in text


def test_an_error_in_the_program_names_the_mesh():
    with pytest.raises(ft.LayoutError) as caught:
        assert_mesh_invariant(
            mlp, (normal(3, 8, 8), *values()[1:]), patterns=(X, W, V), out=X, rules=RULES, meshes=[dict(dp=2)]
        )
    assert "in assert_mesh_invariant, on mesh {'dp': 2}" in caught.value.__notes__


# ---- first divergence


def from_rank(dim: str, noise: float):
    """A plain op that is wrong on the later ranks of a mesh dim."""

    def wrong(x):
        from_mesh = ft.iota("replica", "replica", replica=8)
        return x + noise * float(from_mesh[0] > 0)

    return wrong, RULES.replace(replica=dim)


def test_the_first_op_is_named_with_its_axis_and_collectives():
    wrong, rules = from_rank("cp", 0.25)

    def program(x, w, v):
        return ft.einsum(DOWN, torch.tanh(wrong(ft.einsum(UP, x, w))), v)

    options = dict(patterns=(X, W, V), rules=rules)
    mesh = dict(fsdp=2, cp=2)
    assert first_divergence(mlp, values(), None, mesh, **options) is None
    assert first_divergence(program, values(), {}, dict(fsdp=2), **options) is None
    found = first_divergence(program, values(), None, mesh, **options)
    assert found is not None
    assert (found.index, found.phase, found.op, found.pattern, found.result, found.axis) == (
        1, "forward", "einsum", DOWN, X, "seq"
    )  # fmt: skip
    assert found.difference > 0.01
    assert [(e.collective, e.mesh_dims) for e in found.collectives] == [("all_gather", ("fsdp",))]
    assert str(found).startswith(f"value 1, einsum({DOWN!r}), forward, result {X!r}: differs by ")
    assert str(found).endswith(", in some shards of axis 'seq' (behind it: all_gather over fsdp)")
    # of two meshes neither of which is one rank
    other = first_divergence(program, values(), dict(tp=2), mesh, **options)
    assert other is not None and other[:4] == found[:4]


def test_a_divergence_of_the_gradient_is_in_backward():
    """Equal values, but one rank's cotangent is scaled."""
    _, rules = from_rank("dp", 0.0)

    def program(x, w, v):
        first = float(ft.iota("replica", "replica", replica=8)[0] > 0)
        hidden = ft.einsum(UP, x, w)
        return ft.einsum(DOWN, hidden + first * (hidden - hidden.detach()), v)

    grads = lambda x, w, v: ft.grad(lambda w: ft.reduce(f"{X} ->", program(x, w, v)))(w)
    found = first_divergence(grads, values(), None, dict(dp=2), patterns=(X, W, V), rules=rules)
    assert found is not None and (found.phase, found.op, found.pattern, found.result) == ("backward", "einsum", UP, W)
    assert found.axis is None and [e.collective for e in found.collectives] == ["all_reduce"]


def test_ranks_that_should_agree_and_do_not_are_found():
    """Only the second rank of `dp` is wrong, in a tensor that `dp` does not shard."""
    wrong, rules = from_rank("dp", 1.0)
    program = lambda w: ft.einsum("embed mlp -> mlp", wrong(w))
    found = first_divergence(program, (values()[1],), None, dict(dp=2), patterns=(W,), rules=rules)
    assert found is not None and found.index == 0 and found.axis is None
    assert found.difference == pytest.approx(8.0)  # one for each of the 8 that are summed


@pytest.mark.parametrize("mesh", [dict(fsdp=2, tp=2), dict(cp=2, tp=2)], ids=str)
def test_right_programs_have_no_divergence(mesh):
    """Moves that only one mesh needs, ranks' copies of a broadcast, and hidden axes do not count as one."""
    config = llama.LlamaConfig(61, 8, 2, 8, 4, 8, 16)
    declared = ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, p.init, torch.float64), llama.params(config))
    params = ft.init(declared, ft.random.key(0))
    tokens = torch.randint(0, 61, (8, 8), generator=torch.Generator().manual_seed(0))
    program = lambda params, tokens: ft.grad(
        lambda params: llama.loss(params, {"tokens": tokens, "labels": tokens}, config)[0]
    )(params)
    options = dict(patterns=(declared, "batch seq"), rules=llama.RULES)
    assert first_divergence(program, (params, tokens), None, mesh, **options) is None

    def per_example(x, w):
        one = lambda w, row: ft.reduce("seq mlp ->", ft.einsum("seq embed, embed mlp -> seq mlp", row, w).sin())
        return ft.vmap(ft.grad(one), (None, 0), axis="batch")(w, x)

    rules = RULES.replace(embed=None)
    assert first_divergence(per_example, values()[:2], None, mesh, patterns=(X, W), rules=rules) is None


def test_values_that_a_vmap_sees_are_compared():
    """The second half of `mlp` is wrong on the later ranks of tp; the hidden axis has its name."""
    wrong, rules = from_rank("tp", 1.0)
    rules = ft.AxisRules({"batch": "dp", **dict(rules.items())}).replace(embed=None)

    def per_example(x, w):
        one = lambda row: ft.reduce("seq mlp -> mlp", wrong(ft.einsum("seq embed, embed mlp -> seq mlp", row, w)))
        return ft.vmap(one, axis="batch")(x)

    found = first_divergence(per_example, values()[:2], None, dict(dp=2, tp=2), patterns=(X, W), rules=rules)
    assert found is not None and found[:6] == (1, "forward", "reduce", "seq mlp -> mlp", "batch mlp", "mlp")
    assert found.difference == pytest.approx(8.0)  # one for each of the 8 that are summed


@variants(rules=RULES, meshes=[dict(fsdp=2, tp=2), dict(cp=2)])
def test_variants_are_one_function(variant):
    x, w, v = values()
    expected = torch.einsum("bse,em->bsm", x, w).tanh() @ v
    assert_trees_all_close(variant(mlp, (X, W, V), X)(x, w, v), expected)


def test_variants_are_named_by_their_meshes():
    mark = variants(rules=RULES, meshes=[dict(fsdp=2, tp=2), dict(cp=2)]).mark
    assert mark.kwargs["ids"] == ["eager", "fsdp2-tp2", "cp2"] and mark.args[0] == "variant"


def test_testing_is_an_attribute_without_hypothesis_and_pytest():
    code = """
import sys
sys.modules.update(hypothesis=None, pytest=None)
import functitan as ft
ft.testing.assert_trees_all_close(1, 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
