"""Adafactor, Muon and stored state: what each sends, where it lies, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from optimizers import DECLARED, MATRICES, OPTIMIZERS, PATTERNS, RULES, STORAGE, close, copied, steps, values

import functitan as ft
from functitan import optim, tree


def test_muon_is_close_to_torchs():
    """Torch's is bfloat16, of [outputs, inputs]; one bfloat16 rounding may turn a small singular value by much."""
    for shape in ((24, 16), (16, 24)):
        w, g = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        theirs = torch.nn.Parameter(w.T.clone())
        oracle, tx = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1), optim.muon(0.1)
        params, state = {"w": w}, tx.init({"w": w})
        for _ in range(5):
            theirs.grad = g.T.clone()
            oracle.step()
            updates, state = tx.update({"w": g}, state, params)
            params = optim.apply_updates(params, updates)
        moved = (params["w"] - w).norm()
        assert (params["w"] - theirs.detach().T).norm() < 0.02 * moved  # 2**-8 a rounding, some 20 of them


@pytest.mark.parametrize("steps", [5, 8])
def test_orthogonalized_matrices_have_singular_values_near_one(steps):
    x = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.linalg.svdvals(optim.orthogonalized(x, steps))
    assert s.min() > 0.6 and s.max() < 1.3  # the quintic does not converge to 1: Jordan's interval is 0.7 to 1.2
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert ((optim.orthogonalized(x, steps) * (u @ v)).sum((1, 2)) > 0.9 * s.sum(1)).all()  # x's own singular vectors


def test_axes_on_neither_side_count_matrices():
    declared = ft.Param("experts embed mlp", (3, 4, 5))
    g = torch.randn(declared.shape, dtype=torch.float64)
    tx = optim.scale_by_muon(matrices={declared.pattern: "embed -> mlp"}, dtype=None)
    updates, _ = tx.update(g, tx.init(g), g, patterns=declared)
    one = optim.scale_by_muon(dtype=None)
    singly = [one.update(part, one.init(part), part, patterns="embed mlp")[0] for part in g]
    close(updates, torch.stack(singly), 1e-12)


def sent(tx, sizes):
    """What one update sends, on every rank alike."""

    def rank(mesh):
        state = ft.TrainState.create(DECLARED, tx, ft.random.key(0), mesh=mesh, rules=RULES)
        update = lambda g, s, p: tx.update(g, s, p, patterns=PATTERNS)
        with ft.record() as ledger:
            ft.spmd(update, mesh=mesh, rules=RULES)(copied(state.params), state.opt_state, state.params)
        return list(ledger)

    ledger, *others = ft.simulate(**sizes)(rank)()
    assert all(other == ledger for other in others) and {entry.phase for entry in ledger} == {"update"}
    return ledger


@pytest.mark.parametrize(("size", "clip"), [(1e-9, 1.0), (1e-9, 1e3), (1e-20, 1.0)])
def test_adafactor_bounds_tiny_estimates_as_torch_does(size, clip):
    """The mean of rows by eps, the estimate by its square: in float64 eps is 2e-16, gradients are below its root.

    A clip that acts hides the scale of the estimate; one of 1000 does not act.
    """
    grads = size * torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params, theirs = torch.zeros(6, 5, dtype=torch.float64), torch.zeros(6, 5, dtype=torch.float64)
    tx, oracle = optim.adafactor(d=clip), torch.optim.Adafactor([theirs], d=clip)
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params, theirs.grad = optim.apply_updates(params, updates), g
        oracle.step()
    assert params.any()
    torch.testing.assert_close(params, theirs, rtol=1e-11, atol=0)  # float64, four steps


def test_adafactor_sends_statistics_and_never_a_matrix():
    ledger = sent(optim.adafactor(), {"fsdp": 2, "tp": 2})
    assert all(entry.bytes <= 16 * 4 for entry in ledger)  # at most a row or a column of a matrix of 8 x 16 float32
    norms = [entry.op for entry in ledger if entry.op in ("clip_by_block_rms", "scale_by_param_block_rms")]
    # each leaf's, in one all-reduce for each set of mesh dims: (fsdp, tp) of matrices, (fsdp) of scales
    assert sorted(norms) == ["clip_by_block_rms"] * 2 + ["scale_by_param_block_rms"] * 2


def test_muon_gathers_each_axis_of_a_matrix_once_in_bfloat16():
    tx = optim.masked(optim.muon(0.1, matrices=MATRICES), lambda path, leaf: path == "q")
    ledger = sent(tx, {"fsdp": 2, "tp": 2})
    assert [(e.collective, e.mesh_dims, e.dtype) for e in ledger] == [
        ("all_gather", ("fsdp",), torch.bfloat16),
        ("all_gather", ("tp",), torch.bfloat16),
    ]
    per_head = {"embed heads head_dim": "embed -> head_dim"}  # the heads stay where they are
    ledger = sent(
        optim.masked(optim.muon(0.1, matrices=per_head), lambda path, leaf: path == "q"), {"fsdp": 2, "tp": 2}
    )
    assert [(e.collective, e.mesh_dims) for e in ledger] == [("all_gather", ("fsdp",))]


def test_stored_state_costs_one_all_gather_for_each_weight():
    ledger = sent(optim.stored(optim.adamw(1e-2), rules=STORAGE), {"dp": 2, "fsdp": 2})
    assert {(e.collective, e.mesh_dims) for e in ledger} == {("all_gather", ("dp",))}
    assert sorted(e.pattern for e in ledger) == sorted(p for p in tree.leaves(PATTERNS) if p)


def test_stored_gradients_are_used_where_they_are():
    """ZeRO-2: gradients that arrive under the storage table are not moved."""
    inner, few = OPTIMIZERS["clipped"], {"dp": 2, "fsdp": 2}
    tx = optim.stored(inner, rules=STORAGE, gradients=STORAGE)
    expected = steps(inner, values(0), inner.init(values(0)), [values(1)])[0]

    def rank(mesh):
        params = ft.shard(values(0), PATTERNS, mesh=mesh, rules=RULES)
        declared = tree.map(lambda p: ft.Param(p.pattern, p.shape, dtype=torch.float64), DECLARED)
        state = ft.init(tx.init(declared), ft.random.key(0), mesh=mesh, rules=RULES)
        grads = ft.shard(values(1), PATTERNS, mesh=mesh, rules=STORAGE)
        params, _ = ft.spmd(lambda p, s, g: steps(tx, p, s, [g]), mesh=mesh, rules=RULES)(params, state, grads)
        return ft.unshard(params, PATTERNS, mesh=mesh, rules=RULES)

    for got in ft.simulate(**few)(rank)():
        close(got, expected, 1e-10)  # float64 sums in another order


def test_stored_state_takes_less_memory_on_each_rank():
    step = lambda state: state
    nbytes = {}
    for name, tx in {"adamw": optim.adamw(1e-3), "stored": optim.stored(optim.adamw(1e-3), rules=STORAGE)}.items():
        state = ft.TrainState.declare(DECLARED, tx, ft.random.key(0))
        nbytes[name] = ft.explain(step, state, mesh=dict(dp=4), rules=RULES).argument_bytes
    sharded = sum(4 * torch.Size(p.shape).numel() for p in tree.leaves(DECLARED) if "embed" in p.pattern)
    assert nbytes["adamw"] - nbytes["stored"] == 2 * sharded * 3 // 4  # both moments, of which a quarter stays


WIDE = {"w": torch.ones(2, 3, 4), "b": torch.ones(2)}
MISTAKES = {
    "adafactor": (
        lambda: optim.scale_by_factored_rms(0.8, -1.0),
        """scale_by_factored_rms:
  - beta2_decay is 0.8: it must be negative
  - eps is -1.0: it must not be negative
  Fix: usual are beta2_decay=-0.8, eps=None""",
    ),
    "params": (
        lambda: optim.scale_by_param_block_rms().update(WIDE, ()),
        """scale_by_param_block_rms:
  - params is None
  Fix: tx.update(updates, state, params)""",
    ),
    "threshold": (
        lambda: optim.clip_by_block_rms(0.0),
        """clip_by_block_rms:
  - threshold is 0.0
  Fix: give a positive number""",
    ),
    "state": (
        lambda: optim.adafactor().update(WIDE, optim.adafactor().init({"w": WIDE["w"][:1], "b": WIDE["b"]}), WIDE),
        """scale_by_factored_rms: the state:
  - w: row 'axis0 axis1' is (1, 3) float32, not (2, 3) in the dtype of the updates
  - w: column 'axis0 axis2' is (1, 4) float32, not (2, 4) in the dtype of the updates
  Fix: make it from declarations, which know how it lies: ft.init(tx.init(declarations), key, mesh=mesh, rules=rules), \
as ft.TrainState.create does""",
    ),
    "structure": (
        lambda: optim.adafactor().update({"w": WIDE["w"]}, optim.adafactor().init(WIDE), WIDE),
        """scale_by_factored_rms: the state:
  - nu has 1 leaves, of the updates 0 have one
  Fix: make it from declarations, which know how it lies: ft.init(tx.init(declarations), key, mesh=mesh, rules=rules), \
as ft.TrainState.create does""",
    ),
    "muon": (
        lambda: optim.muon(0.1, momentum=1.0, ns_steps=0),
        """scale_by_muon:
  - momentum is 1.0: it must lie in [0, 1)
  - ns_steps is 0: it must be at least 1
  Fix: usual are momentum=0.95, ns_steps=5""",
    ),
    "matrices": (
        lambda: optim.muon(0.1, matrices={"a b c": "a -> a d", "a b": "a b -> ", "x y": "x, y -> y"}),
        """scale_by_muon: matrices:
  - 'a b c': axis 'a' of 'a -> a d' stands twice
  - 'a b c': axis 'd' of 'a -> a d' is not in the pattern
  - 'a b': 'a b -> ' is not 'inputs -> outputs'
  - 'x y': 'x, y -> y' is not 'inputs -> outputs'
  - 'x y': axis 'y' of 'x, y -> y' stands twice
  Fix: write as in {'heads head_dim embed': 'heads head_dim -> embed'}""",
    ),
    "no matrices": (
        lambda: optim.muon(0.1).init({"q": DECLARED["q"], "w": DECLARED["out"], "gain": DECLARED["gain"]}),
        """scale_by_muon: leaves that are no matrices:
  - gain '' has 0 axes
  - q 'embed heads head_dim' has 3 axes
  Fix: give the leaves that are no matrices to another optimizer, by optim.multi_transform; say which axes of others \
are inputs and outputs: matrices={'heads head_dim embed': 'heads head_dim -> embed'} (ft.nn.attention.MATRICES)""",
    ),
    "own rules": (
        lambda: ft.TrainState.create({"w": ft.Param("embed", (8,), rules=RULES)}, optim.sgd(0.1), ft.random.key(0)),
        """ft.TrainState.create: the parameters:
  - w has rules of its own
  Fix: only optimizer state may be stored under another table than the program's: optim.stored(tx, rules=...)""",
    ),
}


@pytest.mark.parametrize(("mistake", "text"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(mistake, text):
    with pytest.raises(ft.FunctitanError) as error:
        mistake()
    assert str(error.value) == text


@pytest.mark.parametrize("name", ["adafactor", "muon", "stored", "block rms"])
def test_what_mixes_positions_needs_patterns_on_a_mesh(name):
    tx = OPTIMIZERS[name]

    def rank(mesh):
        return ft.spmd(lambda: tx.update(values(0), tx.init(values(0)), values(0)), mesh=mesh, rules=RULES)()

    with pytest.raises(ft.PatternError, match=r"(?s)without patterns:.*rule 'embed' shards over .*Fix: .*patterns=pat"):
        ft.simulate(fsdp=2)(rank)()


def test_a_state_made_from_shards_says_how_to_make_it():
    """The row of "embed vocab" lies over fsdp, which shards vocab in the leaf: shards do not tell."""

    def rank(mesh):
        tx, shards = optim.adafactor(), ft.shard(values(0), PATTERNS, mesh=mesh, rules=RULES)
        ft.spmd(lambda g: tx.update(g, tx.init(g), g, patterns=PATTERNS), mesh=mesh, rules=RULES)(shards)

    with pytest.raises(
        ft.FunctitanError, match=r"out: row 'embed' is \(8,\) float64, not \(4,\).*\n.*Fix: make it from"
    ):
        ft.simulate(fsdp=2)(rank)()
