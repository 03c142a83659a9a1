"""Laws of the optimizers, all of them against torch.optim and torch.nn.utils."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import functitan as ft
from functitan import optim, tree
from functitan.param import constant as filled

OPTIMIZERS = {
    "adamw": optim.adamw(1e-2, b2=0.95, weight_decay=0.1),
    "adamw matrices": optim.adamw(1e-2, mask=optim.decay_matrices),
    "adamw schedule": optim.adamw(optim.warmup_cosine(1e-2, 3, 10)),
    "sgd": optim.sgd(0.1),
    "momentum": optim.sgd(0.1, momentum=0.9),
    "nesterov": optim.sgd(0.1, momentum=0.9, nesterov=True),
    "clipped": optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(1e-2)),
    "lion": optim.lion(1e-2, weight_decay=0.1),
    "masked": optim.masked(optim.adamw(1e-2), optim.decay_matrices),
    "masked nothing": optim.masked(optim.adamw(1e-2), lambda path, leaf: False),
    "multi": optim.multi_transform(
        {"sgd": optim.sgd(0.1, momentum=0.9), "adamw": optim.adamw(1e-2)}, {"layers.*.scale": "sgd", "*": "adamw"}
    ),
    "identity": optim.chain(optim.identity(), optim.scale(-0.1)),
    "nothing": optim.chain(),
}
ORACLES = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    "adamw matrices": lambda ps: torch.optim.AdamW(
        [{"params": [p for p in ps if p.dim() >= 2]}, {"params": [p for p in ps if p.dim() < 2], "weight_decay": 0.0}],
        lr=1e-2,
    ),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "identity": lambda ps: torch.optim.SGD(ps, lr=0.1),
}
ROUNDING = 1e-12  # float64, values near 1, a few hundred operations in another order

PATTERNS = {
    "layers": [{"up": "embed mlp", "scale": "embed"}, {"up": "embed mlp", "scale": "embed"}],
    "gain": "",
    "out": "embed vocab",
}
DECLARED = {
    "layers": [{"up": ft.Param("embed mlp", (8, 4)), "scale": ft.Param("embed", (8,))} for _ in range(2)],
    "gain": ft.Param("", (), filled(1.0)),
    "out": ft.Param("embed vocab", (8, 16)),
}
RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "mlp": "tp", "vocab": ("tp", "fsdp"), "embed": "fsdp"})

every_optimizer = pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)


def values(seed: int, dtype: torch.dtype = torch.float64) -> tree.Tree:
    """A tree like DECLARED of normal values."""
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype), DECLARED)


def copied(value: tree.Tree) -> tree.Tree:
    return tree.map(torch.clone, value)


def same_bits(left: tree.Tree, right: tree.Tree) -> bool:
    pairs = zip(tree.leaves(left), tree.leaves(right), strict=True)
    return tree.paths(left) == tree.paths(right) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def kinds(value: tree.Tree) -> list:
    return [(path, tuple(x.shape), x.dtype) for path, x in zip(tree.paths(value), tree.leaves(value), strict=True)]


def run(tx: optim.GradientTransformation, steps: int, donate: bool = False, dtype: torch.dtype = torch.float64):
    params = values(0, dtype)
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(values(step + 1, dtype), state, params, donate=donate)
        params = optim.apply_updates(params, updates, donate=donate)
    return params, state


# --- every optimizer ------------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_step_keeps_structure_shapes_and_dtypes(tx, dtype):
    params = values(0, dtype)
    before = tx.init(params)
    updates, after = tx.update(values(1, dtype), before, params)
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


@every_optimizer
def test_donation_changes_no_bit_and_without_it_nothing_is_written(tx):
    params, grads = values(0, torch.float32), values(1, torch.float32)
    state = tx.update(values(2, torch.float32), tx.init(params), params)[1]
    given = copied((grads, state, params))
    updates, after = tx.update(grads, state, params)
    moved = optim.apply_updates(params, updates)
    assert same_bits((grads, state, params), given)
    donated, donated_after = tx.update(grads, state, params, donate=True)
    assert same_bits((donated, donated_after), (updates, after))
    assert same_bits(optim.apply_updates(params, donated, donate=True), moved)


@every_optimizer
def test_donated_steps_keep_their_buffers(tx):
    params, grads = values(0), values(1)
    state = tx.init(params)
    places = {x.data_ptr() for x in tree.leaves((params, grads, state))}
    updates, state = tx.update(grads, state, params, donate=True)
    params = optim.apply_updates(params, updates, donate=True)
    assert all(x.data_ptr() in places for x in tree.leaves((params, updates, state)) if x.dim())


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", ORACLES)
def test_twenty_steps_equal_torch_optim(name, donate):
    params, _ = run(OPTIMIZERS[name], 20, donate)
    theirs = tree.leaves(values(0))
    oracle = ORACLES[name](theirs)
    for step in range(20):
        for x, g in zip(theirs, tree.leaves(values(step + 1)), strict=True):
            x.grad = g
        oracle.step()
    for mine, x in zip(tree.leaves(params), theirs, strict=True):
        torch.testing.assert_close(mine, x, rtol=0, atol=ROUNDING)


def test_a_schedule_is_torchs_lr_lambda():
    schedule = optim.warmup_cosine(1e-2, 3, 10)
    params, state = run(OPTIMIZERS["adamw schedule"], 15)
    theirs = tree.leaves(values(0))
    oracle = torch.optim.AdamW(theirs, lr=1.0)
    clock = torch.optim.lr_scheduler.LambdaLR(oracle, schedule)
    for step in range(15):
        for x, g in zip(theirs, tree.leaves(values(step + 1)), strict=True):
            x.grad = g
        oracle.step()
        clock.step()
    for mine, x in zip(tree.leaves(params), theirs, strict=True):
        torch.testing.assert_close(mine, x, rtol=0, atol=ROUNDING)
    assert state[-1].count == 15


@every_optimizer
def test_the_traced_step_is_the_eager_step(tx):
    """The graph is made on fake tensors, so nothing may depend on data; it does Adam's operations in another order."""
    params, grads = values(0), values(1)
    state = tx.update(values(2), tx.init(params), params)[1]
    leaves, structure = tree.flatten((grads, state, params))

    def step(*flat):
        grads, state, params = tree.unflatten(structure, flat)
        updates, state = tx.update(grads, state, params, donate=True)
        return tree.leaves((optim.apply_updates(params, updates), state))

    expected = step(*copied(leaves))
    graph = make_fx(step, tracing_mode="fake")(*leaves)
    assert "_fused_adamw_" not in graph.code  # its operands share memory: no compiler may see that
    assert "_local_scalar_dense" not in graph.code  # a number read from a tensor: no compiler can
    for mine, x in zip(graph(*copied(leaves)), expected, strict=True):
        torch.testing.assert_close(mine, x, rtol=0, atol=ROUNDING)


@every_optimizer
def test_a_step_runs_on_fake_tensors(tx):
    with FakeTensorMode() as mode:
        params, grads = (tree.map(lambda p: torch.empty(p.shape), DECLARED) for _ in range(2))
        updates, _ = tx.update(grads, tx.init(params), params, donate=True)
        assert all(x.fake_mode is mode for x in tree.leaves(updates))


@pytest.mark.parametrize("tx", [OPTIMIZERS["adamw"], OPTIMIZERS["nesterov"]], ids=["adamw", "nesterov"])
def test_gradients_that_share_memory_are_safe_to_donate(tx):
    """Autograd gives one tensor as the gradient of two leaves, expanded tensors, and transposed ones."""
    one = torch.randn(4, 3, dtype=torch.float64)
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


# --- decay masks ----------------------------------------------------------------------------------------------------


MASKS = {
    "none": (None, lambda path: True),
    "function of the path": (lambda path, leaf: path.endswith("scale"), lambda path: path.endswith("scale")),
    "matrices": (optim.decay_matrices, lambda path: path.endswith(("up", "out"))),
    "prefix": ({"layers": True, "gain": False, "out": False}, lambda path: path.startswith("layers")),
}


@pytest.mark.parametrize("patterns", [None, PATTERNS, DECLARED], ids=["tensors", "patterns", "declarations"])
@pytest.mark.parametrize(("mask", "chosen"), MASKS.values(), ids=MASKS)
def test_a_mask_chooses_the_leaves_that_decay(mask, chosen, patterns):
    params, grads = values(0), values(1)
    updates, _ = optim.add_decayed_weights(0.5, mask).update(grads, (), params, patterns=patterns)
    for path, u, g, p in zip(tree.paths(params), *map(tree.leaves, (updates, grads, params)), strict=True):
        assert torch.equal(u, torch.add(g, p, alpha=0.5) if chosen(path) else g), path


# --- clipping and the global norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clipping_equals_torch(max_norm, dtype):
    grads = values(1, dtype)
    theirs = [torch.nn.Parameter(torch.zeros_like(g)) for g in tree.leaves(grads)]
    for x, g in zip(theirs, tree.leaves(grads), strict=True):
        x.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    tx = optim.clip_by_global_norm(max_norm)
    clipped, state = tx.update(grads, tx.init(grads))
    few = {torch.float64: ROUNDING, torch.float32: 1e-6}[dtype]  # the norm's sum has another order
    torch.testing.assert_close(state.norm, norm, rtol=few, atol=0)
    for mine, x in zip(tree.leaves(clipped), theirs, strict=True):
        torch.testing.assert_close(mine, x.grad, rtol=few, atol=0)


def test_the_norm_of_bfloat16_is_taken_in_float32():
    grads = {"w": torch.full((70_000,), 0.01, dtype=torch.bfloat16)}  # a bfloat16 sum would stop growing
    norm = optim.global_norm(grads)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), grads["w"].double().norm(), rtol=1e-5, atol=0)


def test_the_norm_of_nothing_is_zero():
    assert optim.global_norm({}) == 0


MESHES = [{"fsdp": 2}, {"tp": 2}, {"dp": 2}, {"fsdp": 2, "tp": 2}, {"dp": 2, "fsdp": 2, "tp": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_on_a_mesh_is_clipping_without_one(sizes, max_norm):
    grads = values(1)
    tx = optim.clip_by_global_norm(max_norm)
    expected, state = tx.update(grads, tx.init(grads))

    def clipped(mesh):
        mine = ft.shard(grads, PATTERNS, mesh=mesh, rules=RULES)
        step = ft.spmd(functools.partial(tx.update, patterns=PATTERNS), mesh=mesh, rules=RULES)
        updates, its = step(mine, tx.init(mine))
        return ft.unshard(updates, PATTERNS, mesh=mesh, rules=RULES), its.norm

    for whole, norm in ft.simulate(**sizes)(clipped)():
        torch.testing.assert_close(norm, state.norm, rtol=ROUNDING, atol=0)
        for mine, x in zip(tree.leaves(whole), tree.leaves(expected), strict=True):
            torch.testing.assert_close(mine, x, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("sizes", "reduced"),
    [
        ({"dp": 2}, []),
        ({"fsdp": 2}, [("fsdp",)]),
        ({"tp": 2}, [("tp",)]),
        # "embed vocab" lies over (tp, fsdp) and "embed mlp" over (fsdp, tp): one set; "embed" over fsdp alone
        ({"dp": 2, "fsdp": 2, "tp": 2}, [("fsdp",), ("fsdp", "tp")]),
    ],
    ids=str,
)
def test_the_norm_takes_one_all_reduce_for_each_set_of_mesh_dims(sizes, reduced):
    grads = values(1)

    def norm(mesh):
        mine = ft.shard(grads, DECLARED, mesh=mesh, rules=RULES)
        tx = optim.clip_by_global_norm(1.0)
        return ft.spmd(lambda g: tx.update(g, tx.init(g), patterns=DECLARED), mesh=mesh, rules=RULES)(mine)

    with ft.record() as ledger:
        ft.simulate(**sizes)(norm)()
    assert sorted(entry.mesh_dims for entry in ledger) == reduced
    assert {(entry.collective, entry.op, entry.phase) for entry in ledger} <= {("all_reduce", "global_norm", "update")}


def test_the_norm_on_a_mesh_needs_patterns():
    def norm(mesh):
        return ft.spmd(optim.global_norm, mesh=mesh, rules=RULES)(values(1))

    with pytest.raises(ft.PatternError, match=r"(?s)rule 'embed' shards over \('fsdp',\).*Fix: .*patterns=patterns"):
        ft.simulate(fsdp=2)(norm)()
    assert len(ft.simulate(fsdp=1)(norm)()) == 1  # nothing is sharded


# --- schedules ------------------------------------------------------------------------------------------------------


def closed_cosine(t: float, peak: float, total: int, end: float) -> float:
    return end + (peak - end) * (1 + math.cos(math.pi * min(t / total, 1.0))) / 2


def closed_warmup(t: float, peak: float, warmup: int, total: int, end: float) -> float:
    return peak * t / warmup if t < warmup else closed_cosine(t - warmup, peak, total - warmup, end)


@given(st.integers(0, 60), st.floats(1e-5, 1.0), st.floats(0.0, 1.0), st.integers(0, 20), st.integers(21, 50))
def test_schedules_equal_their_closed_forms(step, peak, end, warmup, total):
    table = [
        (optim.constant(peak), peak),
        (optim.linear(peak, end, total), peak + (end - peak) * min(step / total, 1.0)),
        (optim.cosine(peak, total, end), closed_cosine(step, peak, total, end)),
        (optim.warmup_cosine(peak, warmup, total, end), closed_warmup(step, peak, warmup, total, end)),
    ]
    for schedule, expected in table:
        assert schedule(step) == pytest.approx(expected, rel=0, abs=1e-14)
        traced = schedule(torch.tensor(step))
        assert traced.shape == () and traced.item() == schedule(step)


# --- errors ---------------------------------------------------------------------------------------------------------


W = {"w": torch.ones(2, 3), "b": torch.ones(2)}
MISTAKES = {
    "clip": (lambda: optim.clip_by_global_norm(0.0), "max_norm is 0.0"),
    "adam": (lambda: optim.adamw(0.1, b1=1.0, eps=-1.0), r"(?s)b1 is 1.0: it must lie in \[0, 1\).*eps is -1.0"),
    "nesterov": (lambda: optim.sgd(0.1, nesterov=True), "nesterov=True without momentum"),
    "warmup": (lambda: optim.warmup_cosine(0.1, 10, 10), "total_steps - warmup_steps is 0"),
    "chain": (lambda: optim.chain(optim.scale(1.0), 0.1), "1 is 0.1"),
    "state": (lambda: optim.adamw(0.1).update(W, (), W), r"the state is a tuple, not a tuple of 3"),
    "params": (lambda: optim.add_decayed_weights(0.1).update(W, ()), "params is None"),
    "mask": (lambda: optim.add_decayed_weights(0.1, {"w": 1, "b": True}).update(W, (), W), "w: 1"),
    "shape": (
        lambda: optim.apply_updates(W, {"w": torch.ones(3, 2), "b": torch.ones(2).double()}),
        r"(?s)b: updates \(2,\) float64, params \(2,\) float32.*w: updates \(3, 2\) float32, params \(2, 3\) float32",
    ),
    "structure": (
        lambda: optim.sgd(0.1, 0.9).update({"w": W["w"]}, optim.sgd(0.1, 0.9).init(W)),
        "different structures",
    ),
}


@pytest.mark.parametrize(("mistake", "text"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(mistake, text):
    with pytest.raises(ft.FunctitanError, match=text):
        mistake()
