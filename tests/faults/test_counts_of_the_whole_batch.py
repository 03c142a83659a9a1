"""A count is of the whole batch: loss = sum / count for any weights, masks, meshes, microbatches, and pipelines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functitan as ft
from functitan.pipeline import Stage

RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "embed": "fsdp", "mlp": "tp"})
DECLARED = {"w": ft.Param("embed mlp", (8, 4), dtype=torch.float64)}
PATTERNS = {"x": "batch embed", "y": "batch mlp", "m": "batch mlp"}
DATA = {
    "x": torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "y": torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
}
WAYS = {  # how the step computes: its options
    "plain": {},
    "two microbatches": {"accumulate": 2},
    "one replica": {"accumulate": 1},
}
MESHES = [{}, dict(dp=2), dict(fsdp=2), dict(dp=2, tp=2)]


def weighted(params, batch, key):
    error = ft.einsum("batch embed, embed mlp -> batch mlp", batch["x"], params["w"]) - batch["y"]
    return ft.reduce("batch mlp ->", batch["m"] * error * error), ft.reduce("batch mlp ->", batch["m"])


def oracle(weights):
    """Loss and gradient in plain torch, of one process."""
    w = ft.init(DECLARED, ft.random.split(ft.random.key(0))[0])["w"].requires_grad_()
    loss = (weights * (DATA["x"] @ w - DATA["y"]) ** 2).sum() / weights.sum()
    return loss.item(), torch.autograd.grad(loss, w)[0]


def stepped(sizes, weights, loss=weighted, rate=1.0, jit=False, **options):
    """(loss, count, the parameters' change) of each rank of a mesh, or of one process."""
    tx = ft.optim.sgd(rate)

    def rank(mesh):
        state = ft.TrainState.create(DECLARED, tx, ft.random.key(0), mesh=mesh, rules=RULES)
        before = state.params["w"].clone()
        step = ft.train_step(loss, tx, donate=False, **options)
        step = ft.jit(step, backend="graph") if jit else step
        batch = ft.shard({**DATA, "m": weights}, PATTERNS, mesh=mesh, rules=RULES)
        new, metrics = step(state, batch)
        moved = ft.unshard({"w": before - new.params["w"]}, DECLARED, mesh=mesh, rules=RULES)["w"]
        return metrics["loss"].item(), metrics["count"].item(), moved

    return ft.simulate(**sizes)(rank)() if sizes else [rank(None)]


def check(results, weights):
    loss, grad = oracle(weights)
    for mean, count, moved in results:
        assert mean == pytest.approx(loss, rel=1e-9) and count == pytest.approx(weights.sum().item())
        torch.testing.assert_close(moved, grad, rtol=1e-9, atol=1e-12)  # float64, with a rate of 1


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_weighted_mean_is_that_of_its_weights_also_where_they_sum_to_little(way, sizes):
    for total in (0.25, 2.0**-30):
        weights = torch.full((8, 4), total / 32, dtype=torch.float64)
        check(stepped(sizes, weights, **WAYS[way]), weights)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(0, 2, width=32), min_size=32, max_size=32), st.integers(-40, 20), st.sampled_from([*WAYS]))
def test_any_weights_on_one_process_and_on_a_mesh(values, power, way):
    weights = torch.tensor(values, dtype=torch.float64).view(8, 4) * 2.0**power
    if weights.sum() > 2.0**-60:
        for sizes in ({}, dict(dp=2, tp=2)):
            check(stepped(sizes, weights, **WAYS[way]), weights)


def test_a_captured_step_counts_alike():
    weights = torch.full((8, 4), 2.0**-7, dtype=torch.float64)
    check(stepped({}, weights, jit=True, accumulate=2), weights)


@pytest.mark.parametrize("sizes", [{}, dict(dp=2, tp=2)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_that_counts_gives_zeros(way, sizes):
    """The loss, the gradient and the metric; also where the sum is not 0, as of weights that cancel."""
    cancelling = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8, 2)
    for weights in (torch.zeros(8, 4, dtype=torch.float64), cancelling):
        for loss, count, moved in stepped(sizes, weights, **WAYS[way]):
            assert loss == 0 and count == 0 and not moved.any()


def test_a_pipeline_divides_by_the_same_count():
    stages = [
        Stage(DECLARED, lambda p, x, b, key: ft.einsum("batch embed, embed mlp -> batch mlp", b["x"], p["w"])),
        Stage({}, lambda p, x, b, key: (ft.reduce("batch mlp ->", b["m"] * (x - b["y"]) ** 2), counted(b["m"]))),
    ]
    counted = lambda m: ft.reduce("batch mlp ->", m)
    schedule = ft.pipeline.schedule("1f1b", num_stages=2, num_microbatches=2, num_ranks=2)

    def rank(mesh, weights):
        declared = ft.pipeline.declarations(stages, schedule, mesh.place)
        params = ft.init(declared, ft.random.split(ft.random.key(0))[0], mesh=mesh, rules=RULES)
        batch = ft.shard({**DATA, "m": weights}, PATTERNS, mesh=mesh, rules=RULES)
        run = ft.spmd(ft.pipeline.value_and_grad(stages, schedule), mesh=mesh, rules=RULES)
        (loss, (count, _)), grads = run(params, batch)
        return loss.item(), count.item(), ft.unshard(grads, declared, mesh=mesh, rules=RULES).get("w")

    for total in (32.0, 2.0**-7, 0.0):
        weights = torch.full((8, 4), total / 32, dtype=torch.float64)
        for loss, count, grad in ft.simulate(pp=2, dp=2)(rank)(weights):
            expected = oracle(weights) if total else (0.0, torch.zeros(8, 4, dtype=torch.float64))
            assert loss == pytest.approx(expected[0]) and count == pytest.approx(total)
            if grad is not None:
                torch.testing.assert_close(grad, expected[1], rtol=1e-9, atol=1e-12)


def test_a_pipeline_refuses_a_number_before_anything_is_sent():
    stage = Stage(DECLARED, lambda p, x, b, key: (p["w"].sum() * b["x"].sum(), 8))
    schedule = ft.pipeline.schedule("gpipe", num_stages=1, num_microbatches=2, num_ranks=1)
    run = ft.pipeline.value_and_grad([stage], schedule)
    assert run(ft.init(DECLARED, ft.random.key(0)), DATA)[0][1][0] == 16

    def rank(mesh):
        with ft.record() as ledger, pytest.raises(ft.FunctitanError, match="the count is the number 8"):
            ft.spmd(run, mesh=mesh, rules=RULES)(ft.init(DECLARED, ft.random.key(0), mesh=mesh, rules=RULES), DATA)
        return len(ledger)

    assert ft.simulate(tp=2)(rank)() == [0, 0]


NUMBERS = {"int": 32, "float": 32.0, "weight": 2.0**-7, "zero": 0}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_number_of_python_counts_without_a_mesh_and_is_refused_on_one(way, number):
    loss = lambda params, batch, key: (weighted(params, batch, key)[0], number)
    ones, k = torch.ones(8, 4, dtype=torch.float64), WAYS[way].get("accumulate", 1)
    ((mean, count, _),) = stepped({}, ones, loss, **WAYS[way])
    assert count == k * number and mean == pytest.approx(oracle(ones)[0] * 32 / (k * number) if number else 0)
    with pytest.raises(ft.FunctitanError, match=r"(?s)the count is the number.*ft\.count\('batch mlp', y\)"):
        stepped(dict(dp=2), ones, loss, **WAYS[way])


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_tensor_counts_as_it_is_and_a_local_one_that_differs_is_named(sizes):
    ones = torch.ones(8, 4, dtype=torch.float64)
    of_all = lambda params, batch, key: (weighted(params, batch, key)[0], ft.count("batch mlp", batch["m"]))
    for way in WAYS.values():
        check(stepped(sizes, ones, of_all, **way), ones)
    if "dp" in sizes:
        mask = torch.ones(8, 4, dtype=torch.float64)
        mask[0] = 0
        local = lambda params, batch, key: (weighted(params, batch, key)[0], batch["m"].sum())
        with pytest.raises(ft.ReplicationError, match="count: float64"):
            stepped(sizes, mask, local)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("bad", [-3.0, torch.nan, torch.inf])
@pytest.mark.parametrize("sizes", [{}, dict(dp=2)], ids=str)
def test_a_count_that_is_none_is_what_nonfinite_says(sizes, bad, policy):
    loss = lambda params, batch, key: (weighted(params, batch, key)[0], torch.tensor(bad))
    ones = torch.ones(8, 4, dtype=torch.float64)
    if policy == "skip":
        assert all(not moved.any() for *_, moved in stepped(sizes, ones, loss, nonfinite=policy))
        return
    names = {-3.0: "count: -3, less than 0", torch.inf: "count: infinity"}
    with pytest.raises(ft.NonFiniteError, match=names.get(bad, "count: NaN")):
        stepped(sizes, ones, loss, nonfinite=policy)


@pytest.mark.parametrize("sizes", [dict(fsdp=2), dict(dp=2, tp=2), dict(dp=2, fsdp=2, tp=2)], ids=str)
def test_ft_count_is_the_sum_of_ones_under_every_transform(sizes):
    x = torch.zeros(8, 4)
    ones = lambda pattern, x: ft.reduce(f"{pattern} ->", torch.ones_like(x))
    both = lambda pattern, x: (ft.count(pattern, x), ones(pattern, x))

    def rank(mesh):
        y = ft.shard(x, "batch mlp", mesh=mesh, rules=RULES)
        inside = lambda fn, *args: ft.spmd(fn, mesh=mesh, rules=RULES)(*args)
        with ft.record() as ledger:
            inside(lambda y: ft.count("batch mlp", y), y)
        assert not len(ledger)
        found = [inside(both, "batch mlp", y), inside(ft.vmap(lambda row: both("mlp", row), axis="batch"), y)]
        loss = lambda p, b, key: ((b.sum() * 0 + p["w"].sum() * 0, ones("batch mlp", b)), both("batch mlp", b))
        declared = {"w": ft.Param("embed", (8,))}
        params = ft.init(declared, ft.random.key(0), mesh=mesh, rules=RULES)
        run = ft.accumulate(loss, 2, patterns=declared, aux="sum")
        (_, (count, beside)), _ = inside(run, params, y)
        return [*found, beside, (count, torch.tensor(32))]

    for found in ft.simulate(**sizes)(rank)():
        assert all(torch.equal(count.double(), total.double()) for count, total in found)


def test_a_count_of_many_tokens_fits_beside_a_sum_in_float16():
    loss = lambda params, batch, key: (params["w"].sum().half(), torch.tensor(100_000.0))
    state = ft.TrainState.create({"w": ft.Param("embed", (4,), ft.param.ones)}, ft.optim.sgd(0.1), ft.random.key(0))
    metrics = ft.train_step(loss, ft.optim.sgd(0.1))(state, None)[1]
    assert metrics["count"] == 100_000 and metrics["loss"].item() == pytest.approx(4e-5)
