"""NaN and infinity in loss or gradients: every rank raises, skips, or ignores them, as the policy says."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import functitan as ft
from functitan.optim import finite

ONE = ft.param.constant(1.0)
LEAVES = {name: ft.Param(axis, (4,), ONE) for name, axis in {"a": "head", "b": "embed", "c": "embed"}.items()}
FSDP = ft.AxisRules({"embed": "fsdp", "head": None})
GOOD = [[1.0, 1, 1, 1]] * 3
BAD = {  # (the batch, the loss of sum sqrt(parameters * batch), the values that are not finite)
    "a gradient of the last rank": (
        [[1.0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]],
        "loss 11: 1 of 4 values are not finite",
        ["gradients.b: NaN"],
    ),
    "the loss and two gradients": (
        [[1.0, 1, 1, 1], [1, torch.inf, 1, 0], [torch.inf, 1, 1, 1]],
        "loss inf: 3 of 4 values are not finite",
        ["loss: infinity", "gradients.b: NaN", "gradients.c: NaN"],
    ),
}


def roots(params, batch, key):
    parts = [ft.reduce(f"{LEAVES[name].pattern} ->", (params[name] * batch[name]).sqrt()) for name in LEAVES]
    return parts[0] + parts[1] + parts[2], torch.ones(())


def steps(batches, sizes, nonfinite, donate=True, seen=lambda state, metrics: None):
    """Steps of `roots`, one for each batch; the last parameters of each rank, whole, and all "skipped"."""
    tx = ft.optim.adamw(0.1)
    step = ft.train_step(roots, tx, donate=donate, nonfinite=nonfinite)
    patterns = {name: param.pattern for name, param in LEAVES.items()}

    def rank(mesh):
        state = ft.TrainState.create(LEAVES, tx, ft.random.key(0), mesh=mesh, rules=FSDP)
        skipped = []
        for rows in batches:
            batch = {name: torch.tensor(row) for name, row in zip(LEAVES, rows, strict=True)}
            local = ft.shard(batch, patterns, mesh=mesh, rules=FSDP)
            try:
                state, metrics = step(state, local)
                skipped.append(metrics.get("skipped", torch.tensor(-1)).item())
            except ft.NonFiniteError as error:
                skipped.append(str(error))
        assert int(state.step) == sum(not isinstance(x, str) for x in skipped)
        return torch.cat(list(ft.unshard(state.params, patterns, mesh=mesh, rules=FSDP).values())), skipped

    return ft.simulate(**sizes)(rank)() if sizes else [rank(None)]


@pytest.mark.parametrize("sizes", [{}, dict(fsdp=2), dict(dp=2, fsdp=2)], ids=str)
@pytest.mark.parametrize("case", BAD)
def test_raise_names_the_bad_leaves_on_every_rank_and_leaves_the_state_valid(case, sizes):
    batch, loss, lines = BAD[case]
    (expected, _) = steps([GOOD, GOOD], {}, "raise")[0]
    text = ft.errors.report(
        f"step 0 of ft.train_step, {loss}",
        lines,
        "the state is as before this step: lower the learning rate or clip, look at the batch; "
        "nonfinite='skip' leaves such steps out, 'ignore' takes them",
    )
    for params, outcomes in steps([batch, GOOD, GOOD], sizes, "raise"):
        assert outcomes == [text, -1, -1]
        assert torch.equal(params, expected)


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("sizes", [{}, dict(dp=2, fsdp=2)], ids=str)
def test_skip_passes_the_state_through_and_counts_the_step(sizes, donate):
    (expected, _) = steps([GOOD, GOOD], {}, "raise")[0]  # no randomness: the step's number does not matter
    for params, skipped in steps([GOOD, *(batch for batch, _, _ in BAD.values()), GOOD], sizes, "skip", donate):
        assert skipped == [0, 1, 1, 0]
        assert torch.equal(params, expected)


def test_ignore_takes_the_step():
    (batch, _, _) = BAD["a gradient of the last rank"]
    for params, skipped in steps([batch], dict(fsdp=2), "ignore"):
        assert skipped == [-1] and params.isnan().sum() == 1


@pytest.mark.parametrize("policy", ["raise", "skip", "ignore"])
def test_explain_predicts_the_flag(policy):
    tx = ft.optim.sgd(0.1)
    step = ft.train_step(roots, tx, nonfinite=policy)
    batch = {name: torch.ones(4) for name in LEAVES}
    patterns = {name: param.pattern for name, param in LEAVES.items()}

    def rank(mesh):
        state = ft.TrainState.create(LEAVES, tx, ft.random.key(0), mesh=mesh, rules=FSDP)
        with ft.record() as ledger:
            step(state, ft.shard(batch, patterns, mesh=mesh, rules=FSDP))
        return list(ledger)

    state = ft.TrainState.declare(LEAVES, tx, ft.random.key(0))
    predicted = ft.explain(step, state, batch, mesh=dict(dp=2, fsdp=2), rules=FSDP, patterns=(None, patterns))
    assert all(recorded == list(predicted) for recorded in ft.simulate(dp=2, fsdp=2)(rank)())
    flags = [(e.collective, e.mesh_dims, e.bytes, e.phase) for e in predicted if e.op == "nonfinite"]
    assert flags == (
        [] if policy == "ignore" else [("all_reduce", ("dp", "fsdp"), 6, "update")]
    )  # 2 * 3 / 4 of 4 bytes


def test_a_traced_step_chooses_without_a_branch():
    """On fake tensors nothing can be read: `skip` must come out as torch.where, with the old state untouched."""

    def guard(loss, old):
        grown = lambda donate: {"w": old["w"] + 1} if not donate else pytest.fail("donated what it still needs")
        return finite.guarded("skip", loss, {"w": loss}, 0, old, grown, True)[0]["w"]

    traced = make_fx(guard, tracing_mode="fake")(torch.ones(()), {"w": torch.zeros(2)})
    assert traced(torch.ones(()), {"w": torch.zeros(2)}).tolist() == [1, 1]
    assert traced(torch.tensor(torch.nan), {"w": torch.zeros(2)}).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, None])
def test_one_bad_element_anywhere_is_found_and_the_largest_number_is_finite(dtype, bad):
    largest = torch.finfo(dtype).max
    for n, place in [(1, 0), (7, 6), (64, 0), (1000, 501), (100_003, 99_999)]:
        x = torch.full((n,), largest, dtype=dtype)
        x[place] = -largest if bad is None else bad
        assert finite.any_nonfinite([torch.ones(3), x, torch.zeros(0)]).item() == (bad is not None)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(check="once"), "ft.train_step:\n  - check is 'once'\n  Fix: choose True, False or 'first'"),
        (
            dict(nonfinite="warn"),
            "ft.train_step:\n  - nonfinite is 'warn'\n  Fix: choose 'raise', 'skip' or 'ignore'",
        ),
    ],
)
def test_options_that_do_not_exist(options, text):
    with pytest.raises(ft.FunctitanError) as error:
        ft.train_step(roots, ft.optim.sgd(0.1), **options)
    assert str(error.value) == text
