"""Laws of rules, layouts and plans. The oracles: the collectives that people write by hand, and numpy's splits."""

from __future__ import annotations

import itertools
import timeit

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import contractions

import functitan as ft
from functitan.axes import parse_axes
from functitan.sharding.contraction import Contraction, terms_of
from functitan.sharding.layout import block_of, global_shape, layout_of, local_shape, shard_count
from functitan.sharding.mesh import Mesh, MeshSizes
from functitan.sharding.plan import Plan, plan
from functitan.testing.sharded import sharded
from functitan.testing.strategies import AXES, axis_sizes, meshes, rules_tables

RULES = ft.AxisRules(
    {
        "batch": ("dp", "fsdp"),
        "heads": "tp",
        "kv_heads": "tp",
        "mlp": "tp",
        "vocab": "tp",
        "seq": ("cp", "tp"),
        "embed": ("fsdp", "cp"),
        "head_dim": None,
    }
)
SIZES = {"batch": 8, "seq": 8, "embed": 16, "mlp": 32, "heads": 4, "kv_heads": 2, "head_dim": 4}


def recorded(fn, patterns, results, mesh) -> tuple[list, list]:
    """(collective, mesh dims, bytes) of forward and of backward, with every operand differentiated."""

    def with_gradients(*xs):
        outs, back = torch.func.vjp(fn, *xs)
        back(outs)
        return outs

    with ft.record() as ledger:
        values = [torch.randn([SIZES[axis] for axis in parse_axes(p)], dtype=torch.float64) for p in patterns]
        sharded(with_gradients, patterns, results, mesh=mesh, rules=RULES)(*values)
    forward, backward = (
        [(e.collective, e.mesh_dims, e.bytes) for e in ledger if e.phase == phase and e.op == "einsum"]
        for phase in ("forward", "backward")
    )
    return forward, backward


def mlp(x, up, down):
    h = ft.einsum("batch seq embed, embed mlp -> batch seq mlp", x, up)
    return ft.einsum("batch seq mlp, mlp embed -> batch seq embed", h, down)


MLP = ("batch seq embed", "embed mlp", "mlp embed"), "batch seq embed"
WEIGHT, X = 16 * 32 * 8, 8 * 8 * 16 * 8  # bytes of a whole weight, and of the whole residual stream


def gather(dims, size):
    return "all_gather", dims, size


def scatter(dims, size):
    return "reduce_scatter", dims, size


def every(dims, size):
    return "all_reduce", dims, size


FSDP, TP, DP = ("fsdp",), ("tp",), ("dp",)
FACTS = {  # what people write by hand; with n = 2 a gather and a scatter send half of what they gather
    "ZeRO-3": (
        {"fsdp": 2},
        [gather(FSDP, WEIGHT // 2)] * 2,
        [gather(FSDP, WEIGHT // 2), scatter(FSDP, WEIGHT // 2)] * 2,
    ),
    "HSDP": (
        {"dp": 2, "fsdp": 2},
        [gather(FSDP, WEIGHT // 2)] * 2,
        [gather(FSDP, WEIGHT // 2), scatter(FSDP, WEIGHT // 2), every(DP, WEIGHT // 2)] * 2,
    ),
    "Megatron TP + SP": (
        {"tp": 2},
        [gather(TP, X // 2), scatter(TP, X // 2)],
        [gather(TP, X // 2), scatter(TP, X // 2), gather(TP, X // 2)],
    ),
    "FSDP + CP": (
        {"fsdp": 2, "cp": 2},
        [gather(("fsdp", "cp"), WEIGHT * 3 // 4)] * 2,
        [gather(("fsdp", "cp"), WEIGHT * 3 // 4), scatter(("fsdp", "cp"), WEIGHT * 3 // 4)] * 2,
    ),
    "DDP": ({"dp": 2}, [], [every(DP, WEIGHT)] * 2),
}


@pytest.mark.parametrize("name", FACTS)
def test_mlp_gets_the_collectives_that_people_write_by_hand(name):
    mesh, forward, backward = FACTS[name]
    assert recorded(mlp, *MLP, mesh) == (forward, backward)


def test_mlp_in_2d_has_the_union_of_fsdp_and_tp():
    """Weights (also cut by tp) move over fsdp, activations (also cut by fsdp) over tp."""
    forward, backward = recorded(mlp, *MLP, {"fsdp": 2, "tp": 2})
    weight, x = WEIGHT // 4, X // 4
    assert sorted(forward) == sorted([gather(FSDP, weight)] * 2 + [gather(TP, x), scatter(TP, x)])
    moves = [gather(FSDP, weight), scatter(FSDP, weight)] * 2 + [gather(TP, x)] * 2 + [scatter(TP, x)]
    assert sorted(backward) == sorted(moves)


def test_several_results_gather_what_they_share_once():
    """q, k and v of one x: one gather; their cotangents are added before one reduce-scatter, x is regathered once."""

    def qkv(x, q, k, v):
        return ft.einsum(
            "batch seq embed, embed heads head_dim, embed kv_heads head_dim, embed kv_heads head_dim"
            " -> batch seq heads head_dim, batch seq kv_heads head_dim, batch seq kv_heads head_dim",
            x,
            q,
            k,
            v,
        )

    kv = "embed kv_heads head_dim"
    patterns = ("batch seq embed", "embed heads head_dim", kv, kv)
    results = tuple(p.replace("embed", "batch seq") for p in patterns[1:])
    forward, backward = recorded(qkv, patterns, results, {"tp": 2})
    assert forward == [gather(TP, X // 2)]
    assert sorted(backward) == [gather(TP, X // 2), scatter(TP, X // 2)]


def test_a_decode_step_does_not_gather_weights_to_save_a_latency():
    rules, mesh = RULES.replace(batch=None, seq=None), MeshSizes(("fsdp",), (4,))
    layouts = [layout_of(parse_axes(p), rules, mesh) for p in ("batch embed", "embed mlp", "batch mlp")]
    layouts[0] = layouts[0]._replace(dims=((), ()))  # one token, whole
    sizes = (("batch", 1), ("embed", 4096), ("mlp", 4096))
    chosen = plan(Contraction(tuple(layouts[:2]), (layouts[2],), terms_of(2, 1), sizes), mesh)
    (group,) = chosen.results[0]
    assert [step.kind for _, steps in chosen.moved for step in steps] == ["slice"]
    assert [step.kind for step in group.steps] == ["all_reduce"]


@given(drawn=contractions(), data=st.data())
def test_plans_do_not_depend_on_the_order_of_mesh_dims(drawn, data):
    contraction, mesh = drawn
    dims = data.draw(st.permutations(mesh.dims))
    assert plan(contraction, MeshSizes(tuple(dims), tuple(mesh.size(dim) for dim in dims))) == plan(contraction, mesh)


@given(drawn=contractions())
def test_a_term_moves_each_tensor_at_most_once_over_each_mesh_dim(drawn):
    contraction, mesh = drawn
    chosen: Plan = plan(contraction, mesh)
    for steps in [steps for _, steps in chosen.moved] + [group.steps for groups in chosen.results for group in groups]:
        sums = [dim for step in steps if step.kind in ("reduce_scatter", "all_reduce") for dim in step.dims]
        assert len(sums) == len(set(sums))
        assert sum(step.kind == "all_reduce" for step in steps) <= 1, "all-reduces merge over their mesh dims"
        kinds = [step.kind for step in steps]
        if "all_reduce" in kinds:
            assert "reduce_scatter" not in kinds[kinds.index("all_reduce") :], "a smaller tensor is all-reduced"


def test_a_plan_is_found_again_in_microseconds():
    mesh = MeshSizes(("fsdp", "tp"), (2, 2))
    x, w, y = (layout_of(parse_axes(p), RULES, mesh) for p in ("batch seq embed", "embed mlp", "batch seq mlp"))
    contraction = Contraction((x, w), (y,), terms_of(2, 1), tuple(SIZES.items()))
    assert plan(contraction, mesh) is plan(Contraction(*contraction), MeshSizes(*mesh))
    best = min(timeit.repeat(lambda: plan(contraction, mesh), number=100, repeat=20)) / 100
    assert best < 1e-4, f"{best * 1e6:.0f} us"  # 5 on a quiet machine


# --- layouts --------------------------------------------------------------------------------------------------------

tables = st.shared(rules_tables(AXES), key="table")


@given(mesh=meshes(), rules=tables, axes=st.lists(st.sampled_from(AXES), unique=True))
def test_an_axis_takes_the_mesh_dims_of_its_rule_that_no_earlier_rule_took(mesh, rules, axes):
    layout = layout_of(tuple(axes), rules, MeshSizes(tuple(mesh), tuple(mesh.values())))
    earlier: list[str] = []
    for axis in rules:
        if axis in axes:
            assert list(layout.of(axis)) == [dim for dim in rules[axis] if dim in mesh and dim not in earlier]
            earlier += layout.of(axis)
    assert len(earlier) == len(set(earlier))


@settings(max_examples=25)
@given(mesh=meshes(), rules=tables, axes=st.lists(st.sampled_from(AXES), unique=True, max_size=3), data=st.data())
def test_a_shard_is_what_numpy_cuts_out_mesh_dim_by_mesh_dim(mesh, rules, axes, data):
    """The oracle is a for-loop over mesh coordinates; an axis is cut by its outermost mesh dim first."""
    known = MeshSizes(tuple(mesh), tuple(mesh.values()))
    layout = layout_of(tuple(axes), rules, known)
    sizes = data.draw(axis_sizes(rules, mesh))
    shape = tuple(sizes[axis] for axis in axes)
    whole = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    seen = np.zeros(shape, dtype=int)
    for coordinate in itertools.product(*(range(n) for n in mesh.values())):
        at = dict(zip(mesh, coordinate, strict=True))
        expected = whole
        for i, axis in enumerate(axes):
            for dim in layout.of(axis):
                expected = np.split(expected, mesh[dim], axis=i)[at[dim]]
        block = block_of(layout, shape, Mesh(known, coordinate, None))
        np.testing.assert_array_equal(whole[block], expected)
        assert local_shape(layout, shape, known) == expected.shape
        assert global_shape(layout, expected.shape, known) == shape
        seen[block] += 1
    assert (seen == np.prod(known.sizes) // shard_count(layout, known)).all()


# --- rules ----------------------------------------------------------------------------------------------------------


@given(rules=tables)
def test_a_table_is_what_its_repr_evaluates_to(rules):
    again = eval(repr(rules), {"AxisRules": ft.AxisRules})
    assert again == rules and hash(again) == hash(rules) and list(again) == list(rules)


@given(rules=tables, dims=st.lists(st.sampled_from(["dp", "fsdp", "tp"]), unique=True).map(tuple))
def test_replace_keeps_the_order_and_puts_new_names_last(rules, dims):
    other = rules.replace(new=None, embed=dims)
    assert list(other) == [*rules, "new"]
    assert other["embed"] == dims and other["new"] == ()
    assert all(other[name] == rules[name] for name in rules if name != "embed")
    assert other.replace(embed=rules["embed"]).replace(new=None) == rules.replace(new=None)


def test_tables_of_another_order_are_other_tables():
    assert ft.AxisRules({"a": "dp", "b": "dp"}) != ft.AxisRules({"b": "dp", "a": "dp"})
    assert ft.AxisRules({"a": "dp"}) == ft.AxisRules({"a": ("dp",)})
