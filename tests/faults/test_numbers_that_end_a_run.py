"""Numbers that would end a run quietly: a schedule's NaN, a division by an eps of 0, a loss scale of 0 or infinity."""

from __future__ import annotations

import itertools

import pytest
import torch

import functitan as ft
from functitan import optim

RULES = ft.AxisRules({"batch": "dp", "embed": None, "mlp": "dp"})
DECLARED = {"w": ft.Param("embed mlp", (4, 6))}
X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
BAD = {"NaN": torch.nan, "infinity": torch.inf, "too much": 1e300}
OPTIMIZERS = {
    "adamw": lambda rate: optim.adamw(rate, weight_decay=0.1),
    "sgd": optim.sgd,
    "momentum": lambda rate: optim.sgd(rate, momentum=0.9),
    "lion": optim.lion,
    "adafactor": optim.adafactor,
    "muon": optim.muon,
    "clipped": lambda rate: optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate)),
    "scaled by a schedule": lambda rate: optim.chain(optim.scale_by_adam(), optim.scale(rate)),
    "masked": lambda rate: optim.masked(optim.adamw(rate), {"w": True}),
    "multi": lambda rate: optim.multi_transform({"a": optim.lion(rate)}, {"*": "a"}),
    "bfloat16_state": lambda rate: optim.bfloat16_state(optim.adamw(rate)),
    "stored": lambda rate: optim.stored(optim.adamw(rate), rules=RULES),
    "loss scale": lambda rate: optim.dynamic_loss_scale(optim.adamw(rate), init_scale=1.0),
    "a user's own": lambda rate: optim.chain(optim.scale_by_adam(), _own(rate)),
}


def _own(rate):
    """A transformation that tells nothing of what it multiplies by."""
    theirs = optim.scale(rate)
    return optim.GradientTransformation(theirs.init, lambda *args, **kwargs: theirs.update(*args, **kwargs))


def loss(params, batch, key):
    y = ft.einsum("batch embed, embed mlp -> batch mlp", batch, params["w"])
    return ft.reduce("batch mlp ->", y * y), ft.count("batch mlp", y)


def second_step(tx, policy="raise", donate=True, jit=False, batch=X, mesh=None):
    """What the second step gives: its error or metrics, whether the state is as before, whether all goes on."""
    state = ft.TrainState.create(DECLARED, tx, ft.random.key(0), mesh=mesh, rules=RULES)
    step = ft.train_step(loss, tx, donate=donate and not jit, nonfinite=policy)
    step = ft.jit(step, donate=0 if donate else (), backend="graph") if jit else step
    local = lambda x: ft.shard(x, "batch embed", mesh=mesh, rules=RULES)
    state, _ = step(state, local(X))
    before = [x.clone() for x in ft.tree.leaves((state.params, state.opt_state))]
    try:
        state, said = step(state, local(batch))
    except ft.NonFiniteError as error:
        said = str(error)
    after = ft.tree.leaves((state.params, state.opt_state))
    scaled = isinstance(state.opt_state, optim.LossScaleState)  # whose scale moves, and the count of its steps
    same = [torch.equal(x, y) for x, y in zip(before, after, strict=True) if not scaled or x.dim()]
    return said, all(same), all(x.isfinite().all() for x in ft.tree.leaves(state.params))


def after_one(value):
    """A schedule: 0.01 in its first step, then `value`."""
    return lambda step: torch.where(step >= 1, torch.full_like(step, value, dtype=torch.float64), 0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_that_is_none_changes_nothing(name):
    for value, policy, donate in itertools.product(BAD, ("raise", "skip"), (True, False)):
        said, same, finite = second_step(OPTIMIZERS[name](after_one(BAD[value])), policy, donate)
        assert same and finite
        if policy == "skip":
            assert said["skipped"] == 1
        else:
            told = "the update's" if name == "a user's own" else "a factor|the learning rate"
            assert any(word in said for word in told.split("|")) and "step 1 of ft.train_step" in said


@pytest.mark.parametrize(
    ("name", "policy"), [("sgd", "raise"), ("lion", "skip"), ("loss scale", "raise"), ("a user's own", "raise")]
)
def test_nor_does_it_in_a_captured_step(name, policy):
    said, same, finite = second_step(OPTIMIZERS[name](after_one(torch.nan)), policy, jit=True)
    assert same and finite and (said["skipped"] == 1 if policy == "skip" else "the state is as before" in said)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_none_is_seen_where_a_sign_or_a_clip_hides_it(name):
    said, same, finite = second_step(OPTIMIZERS[name](0.01), batch=torch.full((4, 4), torch.nan))
    assert "gradients.w: NaN" in said and same and finite


def test_every_rank_decides_alike():
    for name in ("adamw", "loss scale", "a user's own"):
        ranks = ft.simulate(dp=2)(lambda mesh, tx: second_step(tx, mesh=mesh))(OPTIMIZERS[name](after_one(torch.nan)))
        assert all(same and finite and isinstance(said, str) for said, same, finite in ranks)


@pytest.mark.parametrize("make", [optim.adamw, optim.adafactor], ids=["adamw", "adafactor"])
def test_an_eps_of_zero_divides_by_zero_under_the_policy(make):
    tx = make(0.01, eps=0.0) if make is optim.adamw else make(0.01, eps=(0.0, 1e-3))
    state = ft.TrainState.create(DECLARED, tx, ft.random.key(0))
    before = state.params["w"].clone()
    for donate in (True, False):
        with pytest.raises(ft.NonFiniteError, match="the update's"):
            ft.train_step(loss, tx, donate=donate)(state, torch.zeros(4, 4))
        assert torch.equal(state.params["w"], before)


def test_the_flag_costs_one_all_reduce_whatever_is_seen():
    for name in ("adamw", "a user's own"):

        def rank(mesh, tx):
            state = ft.TrainState.create(DECLARED, tx, ft.random.key(0), mesh=mesh, rules=RULES)
            with ft.record() as ledger:
                ft.train_step(loss, tx)(state, ft.shard(X, "batch embed", mesh=mesh, rules=RULES))
            return [entry.op for entry in ledger].count("nonfinite")

        assert ft.simulate(dp=2)(rank)(OPTIMIZERS[name](0.01))[0] == 1


# --- loss scales ----------------------------------------------------------------------------------------------------


def scales(grad, number, **options):
    """The scales of a loss scale that meets `grad` in every step, and its last update."""
    tx = optim.dynamic_loss_scale(optim.sgd(0.1), **options)
    params, found = {"w": torch.ones(2)}, []
    state = tx.init(params)
    for _ in range(number):
        _, state = tx.update({"w": torch.full((2,), grad)}, state, params)
        found.append(state.scale.item())
    return found, tx, state


@pytest.mark.parametrize("floor", [1.0, 2.0**-20, 8.0])
def test_a_loss_scale_ends_at_its_floor_and_is_of_use_there(floor):
    found, tx, state = scales(torch.nan, 200, init_scale=2.0**16, min_scale=floor)
    assert found[-1] == floor
    updates, state = tx.update({"w": torch.full((2,), 1.0) * state.scale}, state, {"w": torch.ones(2)})
    torch.testing.assert_close(updates["w"], torch.full((2,), -0.1))


@pytest.mark.parametrize(("ceiling", "jit"), [(2.0**126, False), (2.0**20, True)])
def test_a_loss_scale_ends_at_its_ceiling_and_is_of_use_there(ceiling, jit):
    tx = optim.dynamic_loss_scale(optim.sgd(0.1), 2.0**18, interval=1, max_scale=ceiling)
    params = {"w": torch.ones(2)}
    update = lambda grads, state: tx.update(grads, state, params)
    update = ft.jit(lambda grads, state, params: tx.update(grads, state, params), backend="graph") if jit else update
    state = tx.init(params)
    for _ in range(120):
        grads = {"w": torch.full((2,), 2.0**-120) * state.scale}
        updates, state = update(grads, state, params) if jit else update(grads, state)
    assert state.scale == ceiling and int(state.good_steps) > 0
    torch.testing.assert_close(updates["w"], torch.full((2,), -0.1 * 2.0**-120), rtol=1e-6, atol=0)


@pytest.mark.parametrize("jit", [False, True])
def test_gradients_that_no_scale_helps_raise_at_the_floor(jit):
    tx = optim.dynamic_loss_scale(optim.adamw(0.1), init_scale=4.0)
    state = ft.TrainState.create(DECLARED, tx, ft.random.key(0))
    step = ft.train_step(loss, tx, donate=not jit)
    step = ft.jit(step, donate=0, backend="graph") if jit else step
    before, bad = state.params["w"].clone(), torch.full((4, 4), torch.inf)
    for _ in range(2):  # to 2, to 1
        state, _ = step(state, bad)
    with pytest.raises(ft.NonFiniteError, match=r"the smallest loss scale|no smaller loss scale can help"):
        step(state, bad)
    assert torch.equal(state.params["w"], before) and state.opt_state.scale == 1
    state, metrics = step(state, X)  # it goes on with a better batch
    assert metrics["loss_scale"] == 1 and not torch.equal(state.params["w"], before)


@pytest.mark.parametrize(("policy", "expected"), [("skip", [1, 1, 1, 0]), ("ignore", [None] * 4)])
def test_other_policies_go_on(policy, expected):
    tx = optim.dynamic_loss_scale(optim.sgd(0.1), init_scale=2.0)
    state = ft.TrainState.create(DECLARED, tx, ft.random.key(0))
    step, found = ft.train_step(loss, tx, nonfinite=policy), []
    for batch in (X * torch.inf, X * torch.inf, X * torch.inf, X):
        state, metrics = step(state, batch)
        found.append(int(metrics["skipped"]) if "skipped" in metrics else None)
    assert found == expected and state.opt_state.scale == 1 and state.params["w"].isfinite().all()
