"""A donated state is never read for another: whatever reads it raises `DonatedError`, whoever took it over.

What shares memory with a state (views, arrays, metrics) keeps its values; what is interrupted is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import functitan as ft

RULES = ft.AxisRules({"batch": "dp", "embed": None, "mlp": None})
DECLARED = {"v": ft.Param("embed mlp", (4, 4)), "w": ft.Param("embed mlp", (4, 4))}
TX = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-2))
X = ft.random.normal(ft.random.key(1), (8, 4))


def loss(params, batch, key):
    product = lambda w: ft.einsum("batch embed, embed mlp -> batch mlp", batch, w)
    y = product(params["v"]) + product(params["w"])
    return ft.reduce("batch mlp ->", y * y), ft.reduce("batch mlp ->", torch.ones_like(y))


CAPTURED = ft.jit(ft.train_step(loss, TX), donate=0, backend="graph")


def create(tx=TX, mesh=None, declared=DECLARED):
    rules = None if mesh is None else RULES
    return ft.TrainState.create(declared, tx, ft.random.key(0), mesh=mesh, rules=rules)


def stepped(step):
    old = create()
    new, _ = step(old, X)
    return old, new


def pipelined():
    first = ft.pipeline.Stage({"v": DECLARED["v"]}, lambda p, x, batch, key: loss_of(batch, p["v"]))
    second = ft.pipeline.Stage({"w": DECLARED["w"]}, lambda p, x, batch, key: total(loss_of(x, p["w"])))
    loss_of = lambda x, w: ft.einsum("batch embed, embed mlp -> batch mlp", x, w)
    total = lambda y: (ft.reduce("batch mlp ->", y * y), ft.reduce("batch mlp ->", torch.ones_like(y)))
    both = ft.pipeline.value_and_grad(
        [first, second], ft.pipeline.schedule("gpipe", num_stages=2, num_microbatches=2, num_ranks=1)
    )
    return stepped(ft.train_step(None, TX, value_and_grad=both))


def zero_1(mesh):
    tx = ft.optim.stored(TX, rules=RULES.replace(embed="dp"))
    old = create(tx, mesh)
    new, _ = ft.train_step(loss, tx)(old, ft.shard(X, "batch embed", mesh=mesh, rules=RULES))
    return old, new


def own_loop():
    old = create()
    grads = ft.grad(lambda p: loss(p, X, None)[0])(old.params)
    updates, opt_state = TX.update(grads, old.opt_state, old.params, donate=True)
    params = ft.optim.apply_updates(old.params, updates, donate=True)
    return old, dataclasses.replace(old, params=params, opt_state=opt_state)


DONORS = {
    "a step": lambda: stepped(ft.train_step(loss, TX)),
    "a captured step": lambda: stepped(CAPTURED),
    "a captured step that does not donate": lambda: stepped(
        ft.jit(ft.train_step(loss, TX, donate=False), donate=(0,), backend="graph")
    ),
    "microbatches": lambda: stepped(ft.train_step(loss, TX, accumulate=2)),
    "a pipeline": pipelined,
    "a loop of one's own": own_loop,
}
READERS = {
    "arithmetic": lambda s: s.params["w"] * 0.9,
    "a comparison": lambda s: s.params["w"] == 0,
    "an index": lambda s: s.params["w"][0],
    "a shape": lambda s: s.params["w"].shape,
    "a number": lambda s: s.params["w"].sum().item(),
    "copy_": lambda s: torch.zeros(4, 4).copy_(s.params["w"]),
    "an op by name": lambda s: torch.ops.aten.add.Tensor(s.params["w"], 1),
    "a list of tensors": lambda s: torch._foreach_add([torch.ones(4, 4), s.params["w"]], 1.0),
    "stack": lambda s: torch.stack([torch.ones(4, 4), s.params["w"]]),
    "a module": lambda s: nn.functional.linear(X, s.params["w"]),
    "a named op": lambda s: ft.reduce("embed mlp ->", s.params["w"]),
    "tree.map": lambda s: ft.tree.map(lambda x: 0.9 * x, s.params),
    "checkpoint.save": lambda s: ft.checkpoint.save("memory://donated/state", s),
    "checkpoint.save of a part": lambda s: ft.checkpoint.save("memory://donated/part", {"best": s.params}),
    "Manager.step": lambda s: ft.checkpoint.Manager("memory://donated/m", every_steps=1, stop=bool).step(1, s),
    "shard": lambda s: ft.shard(s.params, DECLARED, mesh=None, rules=None),
    "unshard": lambda s: ft.unshard(s.params, DECLARED, mesh=None, rules=None),
    "grad": lambda s: ft.grad(lambda p: loss(p, X, None)[0])(s.params),
    "value_and_grad": lambda s: ft.value_and_grad(lambda p: loss(p, X, None)[0])(s.params),
    "jvp": lambda s: ft.jvp(torch.sum, (s.params["w"],), (torch.ones(4, 4),)),
    "vmap": lambda s: ft.vmap(lambda w: w.sum(), axis="embed")(s.params["w"]),
    "torch.vmap": lambda s: torch.vmap(torch.sum)(s.params["w"]),
    "remat": lambda s: ft.remat(torch.sum)(s.params["w"]),
    "jit": lambda s: ft.jit(torch.sum, backend="graph")(s.params["w"]),
    "pickle": lambda s: pickle.dumps(s.params["w"]),
    "torch.save": lambda s: torch.save(s.params, "/dev/null"),
    "deepcopy": lambda s: copy.deepcopy(s.params),
    "numpy": lambda s: s.params["w"].numpy(),
    "np.asarray": lambda s: np.asarray(s.params["w"]),
    "repr": lambda s: repr(s.params),
    "ft.explain": lambda s: ft.explain(ft.train_step(loss, TX), s, X, mesh=dict(dp=1), rules=RULES),
    "tx.update": lambda s: TX.update(s.params, s.opt_state, s.params),
    "apply_updates": lambda s: ft.optim.apply_updates(s.params, {"v": X[:4], "w": X[:4]}),
    "moments": lambda s: ft.tree.map(lambda x: x + 1, s.opt_state),
    "another step": lambda s: ft.train_step(loss, TX)(s, X),
}


@pytest.mark.parametrize("donor", DONORS)
def test_whatever_reads_a_donated_state_raises(donor):
    old, new = DONORS[donor]()
    readable = [name for name, read in READERS.items() if not _raises(read, old)]
    assert readable == []
    assert all(bool(leaf.isfinite().all()) for leaf in ft.tree.leaves(new.params))


def test_whatever_reads_a_state_that_was_donated_on_a_mesh_raises():
    def on_rank(mesh):
        old, _ = zero_1(mesh)
        read = ft.spmd(lambda name: _raises(READERS[name], old), mesh=mesh, rules=RULES)
        whole = lambda s: ft.unshard(s.params, DECLARED, mesh=mesh, rules=RULES)
        return [name for name in READERS if not read(name)], _raises(whole, old)

    assert ft.simulate(dp=2)(on_rank)() == [([], True)] * 2


def _raises(read, state):
    try:
        read(state)
    except ft.DonatedError as error:
        return "Fix: use the state that the step returned" in str(error)
    return False


def test_a_transform_of_torch_sees_no_newer_values():
    """It asks no class of a tensor: so that of memory which is written into has none."""
    old = create()
    before, view = old.params["v"].clone(), old.params["v"][0]
    ft.train_step(loss, TX)(old, X)
    assert torch.func.grad(lambda w: (w * w).sum())(old.params["w"]).isnan()
    assert torch.equal(torch.func.grad(lambda v: (v * v).sum())(old.params["v"]), 2 * before) and len(view) == 4


@pytest.mark.parametrize("donor", ["a step", "a captured step", "microbatches", "a loop of one's own"])
def test_buffers_are_updated_in_place(donor):
    kept = create()
    places = {x.data_ptr() for x in ft.tree.leaves((kept.params, kept.opt_state)) if x.dim()}
    step = {
        "a step": ft.train_step(loss, TX),
        "a captured step": CAPTURED,
        "microbatches": ft.train_step(loss, TX, accumulate=2),
        "a loop of one's own": lambda state, x: (_own_step(state, x), {}),
    }[donor]
    state = kept
    for _ in range(3):  # `kept` holds the first objects, but no memory
        state, _ = step(state, X)
        assert {x.data_ptr() for x in ft.tree.leaves((state.params, state.opt_state)) if x.dim()} == places


def _own_step(state, x):
    grads = ft.grad(lambda p: loss(p, x, None)[0])(state.params)
    updates, opt_state = TX.update(grads, state.opt_state, state.params, donate=True)
    params = ft.optim.apply_updates(state.params, updates, donate=True)
    return dataclasses.replace(state, params=params, opt_state=opt_state)


ALIASES = {
    "a view": lambda w: w[0],
    "a transposed view": lambda w: w.T,
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "an array": lambda w: w.numpy(),
    "a view of an array": lambda w: w.numpy()[1:],
    "dlpack": lambda w: np.from_dlpack(w),
    "a gradient's input": lambda w: w.detach().requires_grad_(),
}


def seen(other):
    return other if isinstance(other, np.ndarray) else other.detach().numpy()


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("alias", ALIASES)
def test_what_shares_memory_with_a_state_keeps_its_values(alias, jitted):
    state = create()
    step = CAPTURED if jitted else ft.train_step(loss, TX)
    other = ALIASES[alias](state.params["w"])
    before = seen(other).copy()
    expected, _ = ft.train_step(loss, TX, donate=False)(create(), X)
    state, _ = step(state, X)
    assert np.array_equal(seen(other), before)
    assert torch.allclose(state.params["w"], expected.params["w"], atol=1e-6)


def test_memory_of_others_is_not_written():
    array = np.ones((4, 4), np.float32)
    own = {"v": torch.from_numpy(array), "w": torch.from_numpy(array)}
    ft.train_step(loss, TX)(dataclasses.replace(create(), params=own), X)
    params = ft.optim.apply_updates({"v": torch.from_numpy(array)}, {"v": torch.ones(4, 4)}, donate=True)
    assert (array == 1).all() and (params["v"] == 2).all()


def test_views_among_the_results_of_a_captured_function_keep_their_values():
    jitted = ft.jit(lambda t: ({"w": t["w"] + 1, "v": t["w"].T}, t["w"][0]), donate=0, backend="graph")
    w = torch.arange(4.0).view(2, 2)
    new, row = jitted({"w": w.clone(), "v": torch.zeros(2, 2)})
    assert row.tolist() == [0, 1] and torch.equal(new["w"], w + 1) and torch.equal(new["v"], w.T)


@pytest.mark.parametrize("jitted", [False, True])
def test_metrics_of_a_step_are_those_of_that_step_however_late_they_are_read(jitted):
    def with_aux(params, batch, key):
        return loss(params, batch, key), {"w": params["w"], "row": params["w"][0]}

    step = ft.train_step(with_aux, TX)
    step = ft.jit(step, donate=0, backend="graph") if jitted else step
    state, before, found = create(), [], []
    for _ in range(3):
        before.append(state.params["w"].clone())
        state, metrics = step(state, X)
        found.append(metrics)
    for w, metrics in zip(before, found, strict=True):
        assert torch.equal(metrics["aux"]["w"], w) and torch.equal(metrics["aux"]["row"], w[0])
        assert metrics["grad_norm"].item() > 0


def test_inside_a_captured_function_a_donated_state_is_as_unreadable():
    step = ft.train_step(loss, TX)
    for late in (lambda s: s.params["w"] * 0.9, lambda s: s.params, lambda s: ft.reduce("embed mlp ->", s.params["w"])):
        with pytest.raises(ft.DonatedError, match=r"was donated to step \? of ft\.train_step"):
            ft.jit(lambda s, x, late=late: (step(s, x)[0], late(s)), donate=0, backend="graph")(create(), X)


# --- interruptions and errors ----------------------------------------------------------------------------------------


def pausing(error, hits=1):
    left = [error] * hits

    def update(updates, state, params=None, patterns=None, donate=False):
        if left:
            raise left.pop()
        return updates, state

    return ft.optim.GradientTransformation(lambda params: (), update)


@pytest.mark.parametrize("first", [ft.optim.scale_by_adam, ft.optim.scale_by_lion, ft.optim.scale_by_factored_rms])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ft.FunctitanError])
@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_a_state_whose_update_was_interrupted_is_as_before_or_refused(first, error, nonfinite):
    """Refused where the update writes at once; as before where it is judged first, as one of a user's own is."""
    tx = ft.optim.chain(first(), pausing(error("now")), ft.optim.scale_by_learning_rate(1e-2))
    state, twin, step = create(tx), create(tx), ft.train_step(loss, tx, nonfinite=nonfinite)
    with pytest.raises(error):
        step(state, X)
    expected, _ = step(twin, X)
    try:
        found, _ = step(state, X)
    except ft.DonatedError as refused:
        assert "params.w was donated to step 0 of ft.train_step" in str(refused)
    else:
        assert nonfinite == "raise"
        assert all(map(torch.equal, ft.tree.leaves(found), ft.tree.leaves(expected)))


def test_a_loop_of_ones_own_that_was_interrupted_is_refused():
    tx = ft.optim.chain(ft.optim.scale_by_adam(), pausing(KeyboardInterrupt()))
    state, grads = tx.init({"w": torch.ones(2)}), {"w": torch.ones(2)}
    with pytest.raises(KeyboardInterrupt):
        tx.update(grads, state, donate=True)
    with pytest.raises(ft.DonatedError):
        tx.update({"w": torch.ones(2)}, state)


def test_an_error_before_the_first_write_leaves_the_state_as_it_was():
    def fails(params, batch, key):
        raise ValueError("mine")

    inf = torch.full_like(X, torch.inf)
    for step, error, batch, tx in (
        (ft.train_step(fails, TX), ValueError, X, TX),
        (ft.train_step(loss, TX), ft.NonFiniteError, inf, TX),
        (CAPTURED, ft.NonFiniteError, inf, TX),
        (ft.train_step(loss, ft.optim.sgd(0.1)), ft.FunctitanError, X, TX),
        (
            ft.train_step(loss, ft.optim.chain(ft.optim.add_decayed_weights(0.1, {"other": True}))),
            ft.FunctitanError,
            X,
            ft.optim.chain(ft.optim.add_decayed_weights(0.1)),
        ),
    ):
        state = create(tx)
        with pytest.raises(error):
            step(state, batch)
        again, twin = (ft.train_step(loss, tx)(each, X)[0] for each in (state, create(tx)))
        assert all(map(torch.equal, ft.tree.leaves(again), ft.tree.leaves(twin)))


# --- leaves that share memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [lambda x: x, nn.Parameter])
@pytest.mark.parametrize("jitted", [False, True])
def test_parameters_that_overlap_are_both_named_before_anything_is_written(kind, jitted):
    flat = torch.arange(24.0)
    own = {"v": kind(flat[:16].view(4, 4)), "w": kind(flat[8:].view(4, 4))}
    if jitted:
        own = {name: x.detach() for name, x in own.items()}
    step = CAPTURED if jitted else ft.train_step(loss, TX)
    with pytest.raises(ft.DonatedError, match=r"params\.w and (0\.)?params\.v share a buffer"):
        step(dataclasses.replace(create(), params=own), X)
    assert torch.equal(flat, torch.arange(24.0))


@pytest.mark.parametrize("tx", [TX, ft.optim.lion(1e-2), ft.optim.sgd(0.1, momentum=0.9)])
def test_in_a_loop_of_ones_own_leaves_that_share_memory_move_as_without_donation(tx):
    flat = torch.arange(24.0)
    shapes = {
        "overlap": lambda: {"v": flat.clone()[:16].view(4, 4), "w": None},
        "tied": lambda: dict.fromkeys("vw", flat[:16].view(4, 4).clone()),
        "expanded": lambda: {"v": torch.ones(1, 4).expand(4, 4), "w": torch.ones(4, 4)},
    }
    for name, make in shapes.items():
        found = []
        for donate in (True, False):
            params = make()
            if name == "overlap":
                params["w"] = params["v"].as_strided((4, 4), (4, 1), 8)
            grads = ft.tree.map(lambda x: torch.full((4, 4), 0.5), params)
            updates, state = tx.update(grads, tx.init(params), params, donate=donate)
            found.append((ft.optim.apply_updates(params, updates, donate=donate), state))
        assert all(map(torch.equal, *map(ft.tree.leaves, found))), name
