"""Values beside a loss are merged as they are declared, alike everywhere; what all examples share is not cut."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import functitan as ft
from functitan.pipeline import Stage

RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "embed": "fsdp", "mlp": "tp"})
DECLARED = {"w": ft.Param("embed mlp", (8, 4), dtype=torch.float64)}
X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WAYS = {"sum": "sum", "hits": None, "mean": "mean", "each": None, "last": "last", "any": None, "rate": "last"}


def beside(x):
    """A value of each kind; sums, means and numbers of what the loss sees."""
    return {
        "sum": ft.reduce("batch embed ->", x),
        "hits": ft.reduce("batch embed ->", (x > 0).long()),
        "mean": ft.reduce("batch embed ->", x, op="mean"),
        "each": ft.reduce("batch embed -> embed", x, op="mean"),
        "last": ft.reduce("batch embed ->", x),
        "any": ft.reduce("batch embed ->", (x > 2).long()) > 0,
        "rate": 0.5,
    }


def loss(params, batch, key):
    y = ft.einsum("batch embed, embed mlp -> batch mlp", batch, params["w"])
    return (ft.reduce("batch mlp ->", y * y), ft.count("batch mlp", y)), beside(batch)


def expected(microbatches):
    """In plain torch, of a batch in this many parts."""
    parts = X.chunk(microbatches)
    return {
        "sum": X.sum(),
        "hits": (X > 0).sum(),
        "mean": X.mean(),
        "each": X.mean(0),
        "last": parts[-1].sum(),
        "any": torch.tensor(sum((part > 2).any().item() for part in parts)),
        "rate": torch.tensor(0.5),
    }


def of_step(mesh, k, jit=False, loss=loss, **options):
    tx = ft.optim.sgd(0.1)
    state = ft.TrainState.create(DECLARED, tx, ft.random.key(0), mesh=mesh, rules=RULES)
    step = ft.train_step(loss, tx, accumulate=k, donate=False, check=True, **{"aux": WAYS, **options})
    step = ft.jit(step, backend="graph") if jit else step
    return step(state, ft.shard(X, "batch embed", mesh=mesh, rules=RULES))[1]["aux"]


def same(found, number):
    for name, value in expected(number).items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, check_dtype=name != "rate")


@pytest.mark.parametrize("k", [None, 2, 4])
@pytest.mark.parametrize("sizes", [{}, dict(dp=2), dict(dp=2, tp=2), dict(tp=2)], ids=str)
def test_they_are_the_same_in_one_process_on_every_mesh_and_in_microbatches(sizes, k):
    replicas = 1 if k is None else sizes.get("dp", 1)
    for found in ft.simulate(**sizes)(of_step)(k) if sizes else [of_step(None, k)]:
        same(found, replicas * (k or 1))


@pytest.mark.parametrize("k", [1, 2])
def test_under_fsdp_replicas_have_whole_ones(k):
    for found in ft.simulate(fsdp=2)(of_step)(k):
        same(found, 2 * k)


def test_a_captured_step_has_them():
    same(of_step(None, 2, jit=True), 2)


@pytest.mark.parametrize("sizes", [dict(pp=2), dict(pp=2, dp=2), dict(pp=2, fsdp=2)], ids=str)
def test_a_pipeline_has_them(sizes):
    stages = [
        Stage(DECLARED, lambda p, x, b, key: ft.einsum("batch embed, embed mlp -> batch mlp", b["x"], p["w"])),
        Stage({}, lambda p, x, b, key: ((ft.reduce("batch mlp ->", x * x), ft.count("batch mlp", x)), last(b))),
    ]
    last = lambda b: {**beside(b["x"]), "shared": b["shared"] * 2}
    schedule = ft.pipeline.schedule("1f1b", num_stages=2, num_microbatches=2, num_ranks=2)
    patterns = {"x": "batch embed", "shared": "embed"}
    run = ft.pipeline.value_and_grad(stages, schedule, aux={**WAYS, "shared": "last"}, batch_patterns=patterns)

    def rank(mesh):
        declared = ft.pipeline.declarations(stages, schedule, mesh.place)
        params = ft.init(declared, ft.random.key(0), mesh=mesh, rules=RULES)
        batch = ft.shard({"x": X, "shared": X[0]}, patterns, mesh=mesh, rules=RULES)
        return ft.spmd(run, mesh=mesh, rules=RULES)(params, batch)[0][1][1]

    for found in ft.simulate(**sizes)(rank)():
        same(found, 4 if len(sizes) == 2 else 2)
        torch.testing.assert_close(found["shared"], X[0] * 2)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_tree_of_values_merges_as_it_says(data):
    """A tree of random shapes and dtypes, against sums and means over parts in plain torch."""
    k = data.draw(st.sampled_from([1, 2, 4]))
    count = data.draw(st.integers(1, 3))
    shapes = [data.draw(st.sampled_from([(), (3,), (2, 2)])) for _ in range(count)]
    dtypes = [data.draw(st.sampled_from([torch.float64, torch.int64, torch.bool])) for _ in range(count)]
    ways = [data.draw(st.sampled_from(["mean", "sum", "last", None])) for _ in range(count)]
    of = lambda x: [(x.sum() + torch.arange(9.0)[: torch.Size(s).numel()].view(s)).to(d) for s, d in shapes_and(dtypes)]
    shapes_and = lambda dtypes: zip(shapes, dtypes, strict=True)
    fn = lambda params, x, key: ((params["w"].sum() * x.sum(), 1), of(x))
    (_, (_, found)), _ = ft.accumulate(fn, k, aux=ways)({"w": torch.ones(2, dtype=torch.float64)}, X.round())
    parts = [of(part) for part in X.round().chunk(k)]
    for i, (value, way) in enumerate(zip(found, ways, strict=True)):
        all_of = torch.stack([part[i] for part in parts]).double()
        way = way or ("mean" if dtypes[i].is_floating_point else "sum")
        want = {"mean": all_of.mean(0), "sum": all_of.sum(0), "last": all_of[-1]}[way]
        torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-12)  # a mean of whole numbers is float32


@pytest.mark.parametrize("local", [lambda x: x.mean(), lambda x: x.mean(0)], ids=["scalar", "vector"])
def test_one_that_each_rank_has_of_its_own_is_named(local):
    own = lambda params, batch, key: (loss(params, batch, key)[0], {"mean": local(batch)})
    with pytest.raises(ft.ReplicationError, match=r"(?s)aux.mean: float64.*differs along dp.*ft\.reduce"):
        ft.simulate(dp=2)(of_step)(None, loss=own, aux=None)
    for found in ft.simulate(dp=2)(of_step)(2, loss=own, aux=None):  # merged over replicas it is the whole one
        torch.testing.assert_close(found["mean"], local(X))


# --- leaves of a batch that all examples share -------------------------------------------------------------------


def normalized(params, batch, key):
    """Running statistics of as many channels as there may be examples."""
    y = ft.einsum("batch embed, embed mlp -> batch mlp", batch["x"], params["w"])
    stats = 0.9 * batch["stats"] + 0.1 * ft.reduce("batch mlp -> mlp", y, "mean").detach()
    return (ft.reduce("batch mlp ->", y * y), ft.count("batch mlp", y)), stats


@pytest.mark.parametrize("k", [None, 1, 2])
@pytest.mark.parametrize("channels", [8, 4])
@pytest.mark.parametrize("sizes", [{}, dict(dp=2, fsdp=2)], ids=str)
def test_running_statistics_go_through_a_step(sizes, channels, k):
    declared = {"w": ft.Param("embed mlp", (8, channels), dtype=torch.float64)}
    patterns, rules = {"x": "batch embed", "stats": "mlp"}, RULES.replace(mlp=None)
    batch = {"x": X, "stats": torch.linspace(0, 1, channels, dtype=torch.float64)}
    tx = ft.optim.sgd(0.1)
    step = ft.train_step(normalized, tx, accumulate=k, batch_patterns=patterns, check=True)

    def rank(mesh):
        state = ft.TrainState.create(declared, tx, ft.random.key(0), mesh=mesh, rules=rules)
        whole = ft.unshard(state.params, declared, mesh=mesh, rules=rules)["w"].clone()
        return step(state, ft.shard(batch, patterns, mesh=mesh, rules=rules))[1]["aux"], whole

    for found, w in ft.simulate(**sizes)(rank)() if sizes else [rank(None)]:
        torch.testing.assert_close(found, 0.9 * batch["stats"] + 0.1 * (X @ w).mean(0), rtol=1e-10, atol=1e-12)


def test_a_shared_leaf_that_is_sharded_over_the_replicas_is_whole_in_each():
    """And a batch axis may stand anywhere."""
    fn = lambda p, b, key: ((p["w"].sum() * b["x"].sum(), torch.ones(())), {"s": b["s"], "x": b["x"].shape[0]})
    patterns = {"x": "embed batch", "s": "embed"}
    run = ft.accumulate(fn, 2, patterns="mlp", aux="last", batch_patterns=patterns)

    def rank(mesh):
        batch = ft.shard({"x": X, "s": X[0]}, patterns, mesh=mesh, rules=RULES.replace(mlp=None))
        params = {"w": torch.ones(2, dtype=torch.float64)}
        return ft.spmd(run, mesh=mesh, rules=RULES.replace(mlp=None))(params, batch)[0][1][1]

    for found in ft.simulate(fsdp=2)(rank)():
        assert torch.equal(found["s"], X[0]) and found["x"] == 8


def test_an_error_of_a_microbatch_says_what_was_cut():
    with pytest.raises(RuntimeError) as error:
        ft.accumulate(normalized, 2)({"w": torch.ones(8, 8)}, {"x": torch.ones(8, 8), "stats": torch.zeros(8)})
    assert any("cuts stats, x of the batch" in note and "batch_patterns" in note for note in error.value.__notes__)


# --- modules that keep statistics -----------------------------------------------------------------------------------


class Counting(nn.Module):
    """A buffer that is replaced, and one that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        self.calls = self.calls + 1
        self.seen += x.sum(0)
        return x * self.calls


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm1d(2), Counting], ids=["batch norm", "replaced"])
def test_buffers_are_state(make):
    torch.manual_seed(0)
    theirs, x = make(), torch.randn(3, 4, 2)
    function, params, buffers = ft.from_module(theirs, buffers=True)
    first = ft.tree.map(torch.clone, buffers)
    for rows in x:
        out, buffers = function(params, buffers, rows)
        torch.testing.assert_close(out, theirs(rows))
        torch.testing.assert_close(buffers, dict(theirs.named_buffers()))
    again, _ = function(params, first, x[0])
    torch.testing.assert_close(again, function(params, first, x[0])[0])  # what is given stays as it is
    assert first["calls"] == 0 if "calls" in first else first["num_batches_tracked"] == 0


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm1d(2), Counting], ids=["batch norm", "replaced"])
def test_without_them_a_module_in_train_mode_computes_and_says_once_what_is_lost(make):
    module = make()
    function, params = ft.from_module(module)
    x = torch.randn(4, 2)
    with pytest.warns(UserWarning, match=r"(?s)which is lost.*buffers=True"):
        out = function(params, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(function(params, x), out)
        still = ft.from_module(nn.BatchNorm1d(2).eval())
        still[0](still[1], x)
    torch.testing.assert_close(out, make()(x))


def test_statistics_are_trained_beside_the_loss():
    """Buffers go in with the batch and come out as aux: as in plain torch."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).double()
    function, declared, buffers = ft.from_module(
        module, {"0.weight": "mlp embed", "0.bias": "mlp", "1.*": "mlp"}, buffers=True
    )

    def of_batch(params, batch, key):
        y, after = function(params, batch["buffers"], batch["x"])
        return (ft.reduce("batch mlp ->", (y - 1) ** 2), ft.count("batch mlp", y)), after

    tx, torchs = ft.optim.sgd(0.1), torch.optim.SGD(module.parameters(), 0.1)
    state = ft.TrainState.create(declared, tx, ft.random.key(0))
    step = ft.train_step(of_batch, tx, aux="last", batch_patterns={"x": "batch embed", "buffers": None})
    for _ in range(3):
        state, metrics = step(state, {"x": X, "buffers": buffers})
        buffers = metrics["aux"]
        torchs.zero_grad()
        ((module(X) - 1) ** 2).mean().backward()
        torchs.step()
    torch.testing.assert_close(buffers["1"]["running_mean"], module[1].running_mean)
    torch.testing.assert_close(state.params["0"]["weight"], module[0].weight.detach())
    assert buffers["1"]["num_batches_tracked"] == 3


@pytest.mark.parametrize("with_buffers", [False, True])
def test_on_a_mesh_that_shards_the_rows_statistics_are_refused(with_buffers):
    made = ft.from_module(nn.BatchNorm1d(4), {"*": "mlp"}, buffers=with_buffers)

    def rank(mesh):
        params = ft.init(made[1], ft.random.key(0), mesh=mesh, rules=RULES)
        x = ft.shard(torch.randn(4, 4), "batch embed", mesh=mesh, rules=RULES.replace(embed=None))
        return ft.spmd(made[0], mesh=mesh, rules=RULES)(params, *made[2:], x)

    with pytest.raises(ft.FunctitanError, match="from the rows of this rank alone"):
        ft.simulate(dp=2)(rank)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ft.simulate(tp=2)(rank)()  # all have the same rows
