"""What is frozen, or not reached by the loss, keeps its bits: no gradient, state, decay, norm, reduction or message."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import DECLARED, OPTIMIZERS, ORACLES
from torch import nn

import functitan as ft
from functitan import tree

KEY = ft.random.key(0)
RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "embed": "fsdp", "mlp": "tp", "rank": None})
ADAPTED = {
    "base": {
        "up": ft.Param("embed mlp", (8, 4)), "bias": ft.Param("mlp", (4,)), "down": ft.Param("mlp embed", (4, 8))
    },
    "lora": {"a": ft.Param("embed rank", (8, 2)), "b": ft.Param("rank mlp", (2, 4))},
    "idle": ft.Param("embed mlp", (8, 4)),
}  # fmt: skip
FROZEN = ft.trainable(ADAPTED, "lora.*", "idle")
TX = ft.optim.chain(ft.optim.clip_by_global_norm(0.05), ft.optim.adamw(1e-2, weight_decay=0.3))
X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


def by_path(values):
    return dict(zip(tree.paths(values), tree.leaves(values), strict=True))


def hidden(p, x):
    both = "batch embed, embed mlp -> batch mlp"
    adapter = ft.einsum("embed rank, rank mlp -> embed mlp", p["lora"]["a"], p["lora"]["b"])
    y = ft.einsum(both, x, p["base"]["up"]) + ft.einsum(both, x, adapter)
    return torch.tanh(y + ft.broadcast("mlp -> batch mlp", p["base"]["bias"]))


def error(p, h, x):
    y = ft.einsum("batch mlp, mlp embed -> batch embed", h, p["base"]["down"]) - x
    return ft.reduce("batch embed ->", y * y), ft.reduce("batch embed ->", torch.ones_like(y))


def loss(p, x, key):
    return error(p, hidden(p, x), x)


@cache
def in_torch(steps=3):
    """The values of `lora` after some steps of plain torch, and the norm of the last gradient."""
    p = {path: x.clone() for path, x in by_path(ft.init(ADAPTED, ft.random.split(KEY)[0])).items()}
    for path, x in p.items():
        x.requires_grad_(not path.startswith("base"))
    trained = [x for x in p.values() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.3)
    for _ in range(steps):
        h = torch.tanh(X @ (p["base.up"] + p["lora.a"] @ p["lora.b"]) + p["base.bias"])
        optimizer.zero_grad()
        ((h @ p["base.down"] - X) ** 2).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.05)
        optimizer.step()
    return {path: x.detach() for path, x in p.items()}, norm


def trained_as_in_torch(params, norm, places=1e-5):
    expected, theirs = in_torch()
    torch.testing.assert_close(norm, theirs, rtol=1e-5, atol=0)
    for path, x in by_path(params).items():
        if path.startswith("lora"):
            torch.testing.assert_close(x, expected[path], rtol=0, atol=places)
        else:
            assert torch.equal(x, expected[path]), path


# --- every optimizer -------------------------------------------------------------------------------------------------

STAY = {"layers.0.up", "layers.1.scale"}
DOUBLE = tree.map(lambda p: ft.Param(p.pattern, p.shape, dtype=torch.float64), DECLARED)
IN_TORCH = [  # whose oracles skip a parameter without a gradient
    "adamw", "adamw schedule", "sgd", "momentum", "nesterov", "clipped", "adafactor", "multi", "stored", "stored clip",
    "stored adafactor", "identity",
]  # fmt: skip


def quadratic(p, idle=()):
    """A loss whose gradient is `1 + p`, leaf by leaf."""
    return sum((x + 0.5 * x * x).sum() for path, x in by_path(p).items() if path not in idle), 1


def beside_torch(name, declared, idle=()):
    """The state after a step, after one more that does not reach `idle`, and the values of both in torch."""
    tx = OPTIMIZERS[name]
    state = ft.TrainState.create(declared, tx, KEY)
    trained = {path for path, leaf in by_path(declared).items() if leaf.trainable}
    theirs = {path: nn.Parameter(x.clone()) for path, x in by_path(state.params).items() if path in trained}
    with torch.no_grad():
        oracles = ORACLES[name](theirs)
    found = [state]
    for away in ((), idle):
        state, _ = ft.train_step(lambda p, x, key: quadratic(p, away), tx, donate=False)(state, X)  # noqa: B023
        found.append(state)
        for path, x in theirs.items():
            x.grad = None if path in away else 1 + x.detach()
        with torch.no_grad():
            for oracle in oracles:
                oracle.step()
    return found, theirs


def of_leaf(path, state):
    """What a state holds for a leaf, and the leaf."""
    own = {at: x for at, x in by_path(state.opt_state).items() if at.endswith("." + path)}
    return own | {path: by_path(state.params)[path]}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_the_others_as_torch_does_without_the_frozen(name):
    declared = ft.trainable(DOUBLE, *(set(by_path(DOUBLE)) - STAY))
    (first, *_, last), theirs = beside_torch(name, declared)
    for path, x in by_path(last.params).items():
        if path in STAY:
            assert x is by_path(first.params)[path] and list(of_leaf(path, last)) == [path]
        else:
            torch.testing.assert_close(x, theirs[path], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_leaves_what_a_step_does_not_reach_with_its_state(name):
    (_, second, last), theirs = beside_torch(name, DOUBLE, STAY) if name in IN_TORCH else (states(name), None)
    for path, x in by_path(last.params).items():
        if path in STAY:
            before, after = of_leaf(path, second), of_leaf(path, last)
            assert before.keys() == after.keys() and all(after[at] is before[at] for at in before)
        elif theirs is not None:
            torch.testing.assert_close(x, theirs[path], rtol=0, atol=1e-9)


def states(name):
    state, found = ft.TrainState.create(DOUBLE, OPTIMIZERS[name], KEY), []
    for away in ((), (), STAY):
        state, _ = ft.train_step(lambda p, x, key: quadratic(p, away), OPTIMIZERS[name], donate=False)(state, X)  # noqa: B023
        found.append(state)
    return found


@given(st.sets(st.sampled_from(sorted(by_path(ADAPTED))), max_size=5), st.booleans())
@settings(max_examples=25)
def test_any_set_of_frozen_leaves_keeps_its_bits_and_buffers(frozen, accumulates):
    declared = ft.trainable(ADAPTED, *(set(by_path(ADAPTED)) - frozen))
    state = ft.TrainState.create(declared, TX, KEY)
    before = {path: (x, x.clone()) for path, x in by_path(state.params).items()}
    state, metrics = ft.train_step(loss, TX, accumulate=2 if accumulates else None)(state, X)
    squares = 0
    leaves = {path: x.clone().requires_grad_(path not in frozen) for path, (_, x) in before.items()}
    total, count = loss(tree.unflatten(tree.flatten(ADAPTED)[1], leaves.values()), X, None)
    if total.requires_grad:
        (total / count).backward()
    for path, x in by_path(state.params).items():
        squares += 0 if leaves[path].grad is None else leaves[path].grad.square().sum()
        same = torch.equal(x, before[path][1])
        assert same == (path in frozen or path == "idle"), path
        assert not same or x is before[path][0]
    torch.testing.assert_close(metrics["grad_norm"], torch.as_tensor(squares).sqrt(), rtol=1e-4, atol=1e-6)


# --- every wrapper and mesh ------------------------------------------------------------------------------------------


def stage(part, apply):
    return ft.pipeline.Stage(part, apply)


def pipelined(mesh):
    first = stage(
        {"base": {k: ADAPTED["base"][k] for k in ("up", "bias")}, "lora": ADAPTED["lora"]},
        lambda p, _, x, key: (x, hidden(p, x)),
    )
    last = stage(
        {"base": {"down": ADAPTED["base"]["down"]}, "idle": ADAPTED["idle"]}, lambda p, xh, *_: error(p, xh[1], xh[0])
    )
    ranks = 1 if mesh is None else 2
    schedule = ft.pipeline.schedule("looped_bfs", num_stages=2, num_microbatches=2, num_ranks=ranks)
    stages = ft.trainable([first, last], "lora.*", "idle")
    declared = ft.pipeline.declarations(stages, schedule, 0 if mesh is None else ft.as_mesh(mesh).place)
    return declared, ft.train_step(None, TX, value_and_grad=ft.pipeline.value_and_grad(stages, schedule))


def remat(p, x, key):
    return error(p, ft.remat(hidden)(p, x), x)


def compiled(p, x, key):
    return error(p, ft.compile(hidden, backend="graph")(p, x), x)


HOW = {
    "plain": (lambda: ft.train_step(loss, TX), TX),
    "accumulate": (lambda: ft.train_step(loss, TX, accumulate=2), TX),
    "jit": (lambda: ft.jit(ft.train_step(loss, TX), donate=0, backend="graph"), TX),
    "jit accumulate": (lambda: ft.jit(ft.train_step(loss, TX, accumulate=2), donate=0, backend="graph"), TX),
    "remat": (lambda: ft.train_step(remat, TX), TX),
    "compile": (lambda: ft.train_step(compiled, TX), TX),
    "checked": (lambda: ft.train_step(loss, TX, check=True), TX),
    "skip": (lambda: ft.train_step(loss, TX, nonfinite="skip"), TX),
    "copies": (lambda: ft.train_step(loss, TX, donate=False), TX),
}
MESHES = {"one": None, "fsdp2": dict(fsdp=2), "fsdp2 tp2": dict(fsdp=2, tp=2)}


def after_three_steps(mesh, make, tx, declared=FROZEN):
    state = ft.TrainState.create(declared, tx, KEY, mesh=mesh, rules=RULES)
    assert not [path for path in by_path(state.opt_state) if "base" in path]
    x, step = ft.shard(X, "batch embed", mesh=mesh, rules=RULES), make()
    for _ in range(3):
        state, metrics = step(state, x)
    assert not any(x.count_nonzero() for path, x in by_path(state.opt_state).items() if path.endswith("idle"))
    return ft.unshard(state.params, ADAPTED, mesh=mesh, rules=RULES), metrics["grad_norm"]


CAPTURES = {"jit": ["one", "fsdp2"], "jit accumulate": ["one"], "compile": ["one"]}  # each takes a second


@pytest.mark.parametrize(("how", "mesh"), [(how, mesh) for how in HOW for mesh in CAPTURES.get(how, MESHES)])
def test_every_wrapper_trains_as_torch_does(how, mesh):
    make, tx = HOW[how]
    found = (
        [after_three_steps(None, make, tx)]
        if mesh == "one"
        else ft.simulate(**MESHES[mesh])(after_three_steps)(make, tx)
    )
    for params, norm in found:
        trained_as_in_torch(params, norm)


@pytest.mark.parametrize("accumulate", [None, 2])
def test_state_and_gradients_stored_otherwise(accumulate):
    zero = RULES.replace(embed=("dp", "fsdp"))
    tx = ft.optim.stored(TX, rules=zero, gradients=zero)
    make = lambda: ft.train_step(loss, tx, accumulate=accumulate, gradients=zero)
    for params, norm in ft.simulate(dp=2)(after_three_steps)(make, tx):
        trained_as_in_torch(params, norm)


@pytest.mark.parametrize("sizes", [None, dict(pp=2), dict(pp=2, fsdp=2)], ids=str)
def test_pipelines(sizes):
    def run(mesh):
        declared, step = pipelined(mesh)
        state = ft.TrainState.create(declared, TX, KEY, mesh=mesh, rules=RULES)
        x = ft.shard(X, "batch embed", mesh=mesh, rules=RULES)
        for _ in range(3):
            state, metrics = step(state, x)
        return ft.unshard(state.params, declared, mesh=mesh, rules=RULES), metrics["grad_norm"]

    for params, norm in [run(None)] if sizes is None else ft.simulate(**sizes)(run)():
        trained_as_in_torch(params, norm)


def test_a_stage_that_is_frozen_whole_and_a_clip_inside_a_group_end():
    """Its rank has no leaf in the group, and takes part in the group's norm all the same."""
    tx = ft.optim.multi_transform({"all": TX}, {"*": "all"})
    last = stage(
        {"w": ft.Param("embed mlp", (8, 4))},
        lambda p, x, *_: (
            ft.reduce("batch mlp ->", ft.einsum("batch embed, embed mlp -> batch mlp", x, p["w"]) ** 2),
            ft.count("batch embed", x),
        ),
    )
    first = stage({"u": ft.Param("embed mlp", (8, 4))}, lambda p, _, x, key: x)
    stages = ft.trainable([first, last], "w")
    schedule = ft.pipeline.schedule("gpipe", num_stages=2, num_microbatches=2, num_ranks=2)

    def run(mesh):
        declared = ft.pipeline.declarations(stages, schedule, ft.as_mesh(mesh).place)
        state = ft.TrainState.create(declared, tx, KEY, mesh=mesh, rules=RULES)
        before = tree.map(torch.clone, state.params)
        state, _ = ft.train_step(None, tx, value_and_grad=ft.pipeline.value_and_grad(stages, schedule))(state, X)
        return [torch.equal(x, y) for x, y in zip(tree.leaves(before), tree.leaves(state.params), strict=True)]

    assert ft.simulate(pp=2)(run)() == [[True], [False]]


# --- what is not sent, saved, or counted -----------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [None, 2])
def test_nothing_is_reduced_for_what_is_frozen_or_not_reached(accumulate):
    def run(mesh):
        state = ft.TrainState.create(FROZEN, TX, KEY, mesh=mesh, rules=RULES)
        x = ft.shard(X, "batch embed", mesh=mesh, rules=RULES)
        with ft.record() as ledger:
            ft.train_step(loss, TX, accumulate=accumulate, check=False)(state, x)
        predicted = ft.explain(
            ft.train_step(loss, TX, accumulate=accumulate, check=False), ft.TrainState.declare(FROZEN, TX, KEY),
            X, mesh=dict(fsdp=2), rules=RULES, patterns=(None, "batch embed"),
        )  # fmt: skip
        assert list(predicted) == list(ledger)
        return [(entry.collective, entry.bytes) for entry in ledger if entry.phase == "backward" and entry.bytes > 8]

    adapter = 8 * 4 * 4 if accumulate is None else 8 * 2 * 4  # bytes: a b in the weight's layout; of replicas, of a
    reduced = [("reduce_scatter", adapter // 2), ("all_reduce", 2 * 4 * 4)]  # the second is b's, which no rank cuts
    for found in ft.simulate(fsdp=2)(run)():
        assert sorted(kind for kind in found if kind[0] != "all_gather") == sorted(reduced)


def test_a_checkpoint_has_the_frozen_leaves_and_moves_to_another_mesh(tmp_path):
    def save(mesh):
        state = ft.TrainState.create(FROZEN, TX, KEY, mesh=mesh, rules=RULES)
        state, _ = ft.train_step(loss, TX)(state, ft.shard(X, "batch embed", mesh=mesh, rules=RULES))
        ft.checkpoint.save(str(tmp_path / "one"), state)

    ft.simulate(fsdp=2)(save)()
    state = ft.checkpoint.restore(str(tmp_path / "one"), ft.TrainState.declare(FROZEN, TX, KEY))
    for _ in range(2):
        state, metrics = ft.train_step(loss, TX)(state, X)
    trained_as_in_torch(state.params, metrics["grad_norm"])


def test_two_states_may_share_what_is_frozen():
    one = ft.TrainState.create(FROZEN, TX, KEY)
    other = ft.TrainState.create(FROZEN, TX, KEY)
    own = {name: other.params[name] for name in ("lora", "idle")}
    other = replace(other, params=one.params | own)
    one, _ = ft.train_step(loss, TX)(one, X)
    other, _ = ft.train_step(loss, TX)(other, X)
    assert one.params["base"]["up"] is other.params["base"]["up"]
    ft.testing.assert_trees_all_close(one.params, other.params, rtol=0, atol=0)


@pytest.mark.parametrize("zero", [None, "mean"])
def test_a_module_says_what_is_frozen_and_what_it_does_not_use_stays(zero):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.frozen = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.used(x))

    torch.manual_seed(0)
    model = Model()
    function, declared = ft.from_module(model, {"*.weight": "mlp embed", "*": "mlp"})
    tx = ft.optim.adamw(1e-1, weight_decay=0.1)

    def run(mesh):
        rules = RULES.replace(mlp=None)
        state = ft.TrainState.create(declared, tx, KEY, mesh=mesh, rules=rules)
        fn = lambda p, x, key: (
            ft.reduce("batch mlp ->", function(p, x) ** 2),
            ft.reduce("batch mlp ->", torch.ones(len(x), 4)),
        )
        for _ in range(2):
            state, _ = ft.train_step(fn, tx)(state, ft.shard(X, "batch embed", mesh=mesh, rules=rules))
        return by_path(ft.unshard(state.params, declared, mesh=mesh, rules=rules))

    found = ft.simulate(fsdp=2)(run)()[0] if zero else run(None)
    oracle = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1, weight_decay=0.1)
    for _ in range(2):
        oracle.zero_grad()
        (model(X) ** 2).mean().backward()
        oracle.step()
    for path, x in model.named_parameters():
        torch.testing.assert_close(found[path], x.detach(), rtol=0, atol=0 if "used" not in path else 1e-5)


def test_value_and_grad_gives_zeros_for_users():
    _, grads = ft.value_and_grad(lambda p: p["a"].sum())({"a": torch.ones(2), "b": torch.ones(3)})
    assert torch.equal(grads["b"], torch.zeros(3))
    (_, _), grads = ft.accumulate(lambda p, x, key: ((p["a"] * x).sum(), 1), 2)(
        {"a": torch.ones(()), "b": torch.ones(3)}, X
    )
    assert torch.equal(grads["b"], torch.zeros(3))


# --- what is closed over ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulate", "whole"), [(None, False), (1, True), (2, True), (1, False), (2, False)])
def test_a_frozen_base_that_is_closed_over_is_right_or_refused(accumulate, whole):
    """Replicas of ft.accumulate have what is closed over whole; elsewhere it lies as its pattern says."""
    declared, tx = {name: ADAPTED[name] for name in ("lora", "idle")}, ft.optim.sgd(1e-2)

    def run(mesh):
        base = ft.init(ADAPTED, KEY, mesh=None if whole else mesh, rules=RULES)["base"]
        state = ft.TrainState.create(declared, tx, KEY, mesh=mesh, rules=RULES)
        step = ft.train_step(lambda p, x, key: loss(p | {"base": base}, x, key), tx, accumulate=accumulate)
        state, metrics = step(state, ft.shard(X, "batch embed", mesh=mesh, rules=RULES))
        return metrics["loss"], ft.unshard(state.params, declared, mesh=mesh, rules=RULES)

    if accumulate is not None and not whole:
        with pytest.raises(ft.LayoutError, match=r"base\.up.*\n(.*\n)*.*ft\.trainable"):
            ft.simulate(fsdp=2)(run)()
        return
    for found in ft.simulate(fsdp=2)(run)():
        ft.testing.assert_trees_all_close(found, run(None), rtol=0, atol=1e-5)


def test_a_pipeline_refuses_a_stage_that_closes_over_shards():
    schedule = ft.pipeline.schedule("gpipe", num_stages=2, num_microbatches=2, num_ranks=2)

    def run(mesh):
        w = ft.init(ADAPTED["base"], KEY, mesh=mesh, rules=RULES)["up"]
        product = lambda x: ft.einsum("batch embed, embed mlp -> batch mlp", x, w)
        first = stage({"w": ft.Param("embed mlp", (8, 4))}, lambda p, _, x, key: x)
        stages = [first, stage({}, lambda p, x, *_: (ft.reduce("batch mlp ->", product(x)), 1))]
        declared = ft.pipeline.declarations(stages, schedule, ft.as_mesh(mesh).place)
        params, x = ft.init(declared, KEY, mesh=mesh, rules=RULES), ft.shard(X, "batch embed", mesh=mesh, rules=RULES)
        return ft.spmd(ft.pipeline.value_and_grad(stages, schedule), mesh=mesh, rules=RULES)(params, x)

    with pytest.raises(ft.LayoutError, match=r"w', a shard"):
        ft.simulate(pp=2, fsdp=2)(run)()
