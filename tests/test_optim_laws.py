"""A table of laws over all optimizers, without a mesh and on meshes."""

from __future__ import annotations

import functools

import pytest
import torch
from optimizers import (
    DECLARED,
    OPTIMIZERS,
    ORACLES,
    PATTERNS,
    RULES,
    close,
    copied,
    kinds,
    same_bits,
    steps,
    values,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import functitan as ft
from functitan import optim, tree

STEPS = 30
# float64, values near 1, a few hundred operations in another order; a Newton-Schulz iteration multiplies a difference
# by at most 3.4, so 5 of them by 500, in each of 30 steps
ROUNDING = {"muon": 1e-10, "muon plain": 1e-10}

every_optimizer = pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)


# --- structure, dtype and placement ----------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_step_keeps_structure_shapes_dtypes_and_devices(tx, dtype):
    params = values(0, dtype)
    before = tx.init(params)
    updates, after = tx.update(values(1, dtype), before, params, patterns=PATTERNS)
    assert kinds(updates) == kinds(optim.apply_updates(params, updates)) == kinds(params)
    assert kinds(after) == kinds(before)


@every_optimizer
def test_the_state_of_declarations_is_the_declaration_of_the_state(tx):
    params = ft.init(DECLARED, ft.random.key(0))
    declared, made = tx.init(DECLARED), tx.init(params)
    assert all(isinstance(leaf, ft.Param) for leaf in tree.leaves(declared))
    assert same_bits(ft.init(declared, ft.random.key(1)), made)
    assert not any(leaf.any() for leaf in tree.leaves(made))


def test_moments_have_the_patterns_of_their_parameters():
    state = optim.scale_by_adam().init(DECLARED)
    patterns = tree.map(lambda param: param.pattern, state)
    assert patterns.mu == patterns.nu == PATTERNS and patterns.count == ""
    assert state.count.dtype == torch.int64


def test_factored_moments_have_patterns_of_their_own():
    state = tree.map(lambda param: (param.pattern, param.shape), optim.scale_by_factored_rms().init(DECLARED))
    up, q, out = ("embed", (8,)), ("embed heads", (8, 2)), ("embed", (8,))
    assert state.row == {"layers": [{"up": up, "scale": None}] * 2, "q": q, "gain": None, "out": out}
    up, q, out = ("mlp", (4,)), ("embed head_dim", (8, 4)), ("vocab", (16,))
    assert state.column == {"layers": [{"up": up, "scale": None}] * 2, "q": q, "gain": None, "out": out}
    scale = ("embed", (8,))
    assert state.nu == {"layers": [{"up": None, "scale": scale}] * 2, "q": None, "gain": ("", ()), "out": None}


@every_optimizer
def test_donation_changes_no_bit_and_without_it_nothing_is_written(tx):
    params, grads = values(0, torch.float32), values(1, torch.float32)
    state = tx.update(values(2, torch.float32), tx.init(params), params, patterns=PATTERNS)[1]
    given = copied((grads, state, params))
    updates, after = tx.update(grads, state, params, patterns=PATTERNS)
    moved = optim.apply_updates(params, updates)
    assert same_bits((grads, state, params), given)
    updates, after = copied((updates, after))  # some are the gradients themselves, which are used up next
    donated, donated_after = tx.update(grads, state, params, patterns=PATTERNS, donate=True)
    assert same_bits((donated, donated_after), (updates, after))
    assert same_bits(optim.apply_updates(params, donated, donate=True), moved)


@every_optimizer
def test_donated_steps_keep_their_buffers(tx):
    params, grads = values(0), values(1)
    state = tx.init(params)
    places = {x.data_ptr() for x in tree.leaves((params, grads, state))}
    updates, state = tx.update(grads, state, params, patterns=PATTERNS, donate=True)
    params = optim.apply_updates(params, updates, donate=True)
    assert all(x.data_ptr() in places for x in tree.leaves((params, updates, state)) if x.dim())


@pytest.mark.parametrize("name", ["adamw", "nesterov", "lion", "adafactor", "muon"])
def test_gradients_that_share_memory_are_safe_to_donate(name):
    """Autograd gives one tensor as the gradient of two leaves, expanded tensors, and transposed ones."""
    single = {"muon": optim.muon(0.1)}  # muon of all four leaves
    tx, one = single.get(name, OPTIMIZERS[name]), torch.randn(4, 3, dtype=torch.float64)
    grads = {
        "a": one,
        "b": one,
        "c": torch.ones((), dtype=torch.float64).expand(4, 3),
        "d": torch.randn(3, 4, dtype=torch.float64).T,
    }
    params = {name: torch.randn(4, 3, dtype=torch.float64) for name in grads}
    params["d"] = torch.randn(3, 4, dtype=torch.float64).T
    expected = tx.update(copied(grads), tx.init(params), params)[0]
    assert same_bits(tx.update(grads, tx.init(params), params, donate=True)[0], expected)


@every_optimizer
def test_the_traced_step_is_the_eager_step(tx):
    """The graph is made on fake tensors, so nothing may depend on data; it does Adam's operations in another order."""
    params, grads = values(0), values(1)
    state = tx.update(values(2), tx.init(params), params, patterns=PATTERNS)[1]
    leaves, structure = tree.flatten((grads, state, params))

    def step(*flat):
        grads, state, params = tree.unflatten(structure, flat)
        updates, state = tx.update(grads, state, params, patterns=PATTERNS, donate=True)
        return tree.leaves((optim.apply_updates(params, updates), state))

    expected = step(*copied(leaves))
    graph = make_fx(step, tracing_mode="fake")(*leaves)
    assert "_fused_adamw_" not in graph.code  # its operands share memory: no compiler may see that
    assert "_local_scalar_dense" not in graph.code  # a number read from a tensor: no compiler can
    close(list(graph(*copied(leaves))), expected, 1e-12)


@every_optimizer
def test_a_step_runs_on_fake_tensors(tx):
    with FakeTensorMode() as mode:
        params, grads = (tree.map(lambda p: torch.empty(p.shape), DECLARED) for _ in range(2))
        updates, _ = tx.update(grads, tx.init(params), params, patterns=PATTERNS, donate=True)
        assert all(x.fake_mode is mode for x in tree.leaves(updates))


# --- the formula -----------------------------------------------------------------------------------------------------


def test_every_optimizer_has_an_oracle():
    assert ORACLES.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", ORACLES)
def test_thirty_steps_equal_torch_or_the_paper(name, donate):
    tx, params = OPTIMIZERS[name], values(0)
    theirs = values(0)
    xs = dict(zip(tree.paths(theirs), tree.leaves(theirs), strict=True))
    oracles = ORACLES[name](xs)
    params, _ = steps(tx, params, tx.init(params), map(values, range(1, STEPS + 1)), donate)
    for step in range(1, STEPS + 1):
        for x, g in zip(xs.values(), tree.leaves(values(step)), strict=True):
            x.grad = g
        for oracle in oracles:
            oracle.step()
    close(params, theirs, ROUNDING.get(name, 1e-12))


def test_schedules_count_steps():
    assert without_mesh("adamw schedule", 15)[1][-1].count == 15


# --- meshes ----------------------------------------------------------------------------------------------------------

MESHES = [{"fsdp": 2}, {"tp": 2}, {"fsdp": 2, "tp": 2}, {"dp": 2, "fsdp": 2}]
# float64: sums over leaves in another order, for adafactor's means and the global norm; muon gathers whole matrices, so
# it does the very same operations
MESH = 1e-10


def on_mesh(tx, mesh, count, donate=False):
    """Global parameters after `count` steps on a mesh; checks that the state keeps its structure and local shapes."""
    params = ft.shard(values(0), PATTERNS, mesh=mesh, rules=RULES)
    declared = tree.map(lambda p: ft.Param(p.pattern, p.shape, dtype=torch.float64), DECLARED)
    state = ft.init(tx.init(declared), ft.random.key(0), mesh=mesh, rules=RULES)
    before = kinds(state)
    grads = [ft.shard(values(i + 1), PATTERNS, mesh=mesh, rules=RULES) for i in range(count)]
    run = ft.spmd(lambda *args: steps(tx, *args, donate=donate), mesh=mesh, rules=RULES)
    params, state = run(params, state, grads)
    assert kinds(state) == before
    # the state's declarations say how it lies: its global value is that of no mesh
    whole = ft.unshard(state, tx.init(declared), mesh=mesh, rules=RULES)
    return ft.unshard(params, PATTERNS, mesh=mesh, rules=RULES), whole


@functools.cache
def without_mesh(name: str, count: int):
    tx, params = OPTIMIZERS[name], values(0)
    return steps(tx, params, tx.init(params), [values(i + 1) for i in range(count)])


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_on_a_mesh_are_steps_without_one(name, sizes):
    expected = without_mesh(name, 3)
    for got in ft.simulate(**sizes)(lambda mesh: on_mesh(OPTIMIZERS[name], mesh, 3, donate=True))():
        close(got, expected, MESH)


def on_two_processes() -> list:
    mesh = ft.make_mesh(fsdp=2)
    return [on_mesh(tx, mesh, 3) for tx in OPTIMIZERS.values()]


def test_steps_on_processes_are_steps_without():
    for results in ft.launch(on_two_processes, nprocs=2):
        for name, got in zip(OPTIMIZERS, results, strict=True):
            close(got, without_mesh(name, 3), MESH)


def quadratic(params, batch, key):
    """A loss of every leaf and the batch, so that gradients are sums over all ranks."""
    each = [
        ft.einsum(f"{pattern}, batch -> batch", (w - 1).square(), batch)
        for w, pattern in zip(tree.leaves(params), tree.leaves(PATTERNS), strict=True)
    ]
    return ft.reduce("batch ->", sum(each)), ft.count("batch", batch)


def test_explain_predicts_what_every_optimizer_sends_and_holds():
    for name, tx in OPTIMIZERS.items():
        sizes = {"dp": 2, "fsdp": 2} if name.startswith("stored") else {"fsdp": 2, "tp": 2}
        step = ft.train_step(quadratic, tx)

        def rank(mesh, tx=tx, step=step):
            state = ft.TrainState.create(DECLARED, tx, ft.random.key(0), mesh=mesh, rules=RULES)
            nbytes = sum(x.nbytes for x in tree.leaves(state)) + 8 // mesh.sizes.size(("dp", "fsdp")) * 4
            with ft.record() as ledger:
                step(state, ft.shard(torch.ones(8), "batch", mesh=mesh, rules=RULES))
            return list(ledger), nbytes

        state = ft.TrainState.declare(DECLARED, tx, ft.random.key(0))
        args = dict(mesh=sizes, rules=RULES, patterns=(None, "batch"))
        predicted = ft.explain(step, state, torch.ones(8), **args)
        for recorded, nbytes in ft.simulate(**sizes)(rank)():
            assert recorded == list(predicted), name
            assert predicted.argument_bytes == nbytes, name
