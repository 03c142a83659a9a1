"""`ft.float8` on meshes: the same rounding as without one, half of bfloat16's bytes, ledgers that agree."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functitan as ft
from functitan.models import llama
from functitan.testing import strategies
from functitan.testing.sharded import assert_close, sharded

RULES = llama.RULES
CONFIG = llama.LlamaConfig(100, 64, 1, 4, 2, 32, 64, rope_theta=10000.0)
DECLARED = ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, p.init, torch.float64), llama.params(CONFIG))
PATTERNS = ft.tree.map(lambda p: p.pattern, DECLARED)
TOKENS = torch.randint(0, 100, (4, 65), generator=torch.Generator().manual_seed(0))
BATCH = {"tokens": TOKENS[:, :-1].contiguous(), "labels": TOKENS[:, 1:].contiguous()}
STATELESS = ["tensorwise", "rowwise", "rowwise_with_gw_hp", "mxfp8"]
RECIPES = [*STATELESS, "static", "delayed"]
AXES = ("batch", "seq", "embed", "mlp")
MATMUL = "batch seq embed, embed mlp -> batch seq mlp"
EVERYWHERE = [dict(fsdp=2), dict(tp=2), dict(fsdp=2, tp=2), dict(dp=2, cp=2)]


def wrapped(recipe: str, fn):
    if recipe == "delayed":
        return lambda *args: ft.float8(fn, recipe=recipe, emulate=True)(*args, None)[0]
    options = {"scales": (0.02, 0.02, 0.1)} if recipe == "static" else {}
    return ft.float8(fn, recipe=recipe, emulate=True, **options)


def products(x, w, g):
    value, back = torch.func.vjp(lambda x, w: ft.einsum(MATMUL, x, w), x, w)
    return (value, *back(g))


@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=5, deadline=None)
@given(st.data())
def test_every_mesh_rounds_alike(recipe, data):
    """In float64, whose sums of float8 products differ by their last bits alone: one rounding apart would be 6%."""
    mesh = data.draw(strategies.meshes(max_ranks=4))
    rules = data.draw(strategies.rules_tables(AXES))
    sizes = data.draw(strategies.axis_sizes(rules, mesh, largest=1 if recipe == "mxfp8" else 2))
    if recipe == "mxfp8":
        sizes = {axis: n if axis == "batch" else 32 * n for axis, n in sizes.items()}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    patterns = "batch seq embed", "embed mlp", "batch seq mlp"
    x, w, g = (
        torch.randn([sizes[a] for a in pattern.split()], generator=generator, dtype=torch.float64)
        for pattern in patterns
    )
    fn = wrapped(recipe, products)
    assert_close(sharded(fn, patterns, (patterns[2], *patterns[:2]), mesh=mesh, rules=rules)(x, w, g), fn(x, w, g))


def losses(mesh, recipe: str, emulate: bool = True) -> list:
    """The logits of one forward, then the losses of two steps."""
    tx = ft.optim.sgd(0.1)
    state = ft.TrainState.create(DECLARED, tx, ft.random.key(0), mesh=mesh, rules=RULES)
    batch = ft.shard(BATCH, ft.data.BATCH, mesh=mesh, rules=RULES)
    logits = wrapped(recipe, ft.spmd(lambda p, t: llama.apply(p, t, CONFIG), mesh=mesh, rules=RULES))
    found = [ft.unshard(logits(state.params, batch["tokens"]), "batch seq vocab", mesh=mesh, rules=RULES)]
    step = ft.train_step(lambda params, batch, key: llama.loss(params, batch, CONFIG), tx, donate=False, check=False)
    memory = None
    for _ in range(2):
        if recipe == "delayed":
            (state, metrics), memory = ft.float8(step, recipe=recipe, emulate=emulate)(state, batch, memory)
        else:
            state, metrics = wrapped(recipe, step)(state, batch)
        found.append(metrics["loss"])
    return found + ([memory.operands, memory.cotangents] if memory else [])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_llama_has_the_losses_of_no_mesh(recipe):
    """Bit for bit the logits where no sum is split; elsewhere the issue's 1e-3, of sums in another order."""
    expected = losses(None, recipe)
    for sizes in EVERYWHERE if recipe == "tensorwise" else EVERYWHERE[2:3]:
        for found in ft.simulate(**sizes)(losses)(recipe):
            assert_close(found, expected, tolerance=1e-3)
    for found in ft.simulate(fsdp=2)(losses)(recipe):
        assert torch.equal(found[0], expected[0])


# --- what is sent ---------------------------------------------------------------------------------------------------


def step(fn, recipe: str | None):
    fn = ft.precision(fn)
    return ft.value_and_grad(fn if recipe is None else ft.float8(fn, recipe=recipe, emulate=True))


def gradients(recipe: str | None, mesh: dict[str, int]):
    """The ledger of a step's gradients."""
    fn = step(lambda p, batch: llama.loss(p, batch, CONFIG)[0], recipe)
    return ft.explain(fn, llama.params(CONFIG), BATCH, mesh=mesh, rules=RULES, patterns=(None, ft.data.BATCH))


def gathered(ledger, dim: str) -> int:
    return sum(e.bytes for e in ledger if e.collective == "all_gather" and e.op == "einsum" and e.mesh_dims == (dim,))


@pytest.mark.parametrize("recipe", STATELESS)
def test_weights_are_gathered_in_half_the_bytes_of_bfloat16(recipe):
    """By block, 1 byte of scale goes with 32; the weight's scales by row are along fsdp in half of the products."""
    plain, ours = (gathered(gradients(r, dict(fsdp=2)), "fsdp") for r in (None, recipe))
    assert plain / 2 <= ours <= plain / 2 * {"tensorwise": 1, "mxfp8": 1 + 1 / 32}.get(recipe, 1.05)


def test_activations_are_gathered_in_half_the_bytes_of_bfloat16():
    plain, ours = (gathered(gradients(r, dict(tp=2)), "tp") for r in (None, "tensorwise"))
    assert plain > 0 and ours == plain / 2


def test_the_maxima_of_one_op_travel_together():
    ledger = [
        e
        for e in gradients("tensorwise", dict(fsdp=2, tp=2))
        if e.collective == "all_reduce" and e.dtype == torch.float32
    ]
    maxima = [e for e in ledger if e.op == "einsum" and e.bytes <= 7 * 4 * 2]
    einsums = 4 * CONFIG.num_layers + 1
    assert len(maxima) == 2 * einsums  # forward and backward
    assert {e.phase for e in maxima} == {"forward", "backward"}


@pytest.mark.parametrize("recipe", STATELESS)
def test_recorded_is_predicted(recipe):
    def run(mesh):
        params = ft.init(llama.params(CONFIG), ft.random.key(0), mesh=mesh, rules=RULES)
        batch = ft.shard(BATCH, ft.data.BATCH, mesh=mesh, rules=RULES)
        fn = step(lambda p, batch: llama.loss(p, batch, CONFIG)[0], recipe)
        with ft.record() as ledger:
            ft.spmd(fn, mesh=mesh, rules=RULES)(params, batch)
        return ledger

    predicted = gradients(recipe, dict(fsdp=2, tp=2))
    recorded = ft.simulate(fsdp=2, tp=2)(run)()[0]
    assert list(recorded) == list(predicted) and recorded.notes == [n for n in predicted.notes if "rules" not in n]


def test_a_delayed_step_takes_one_collective_for_all_maxima():
    fn = lambda p, batch: llama.loss(p, batch, CONFIG)[0]
    delayed = ft.float8(ft.value_and_grad(ft.precision(fn)), recipe="delayed", emulate=True)
    einsums = 4 * CONFIG.num_layers + 1
    operands, cotangents = 2 * einsums + 3 * CONFIG.num_layers, einsums + 3 * CONFIG.num_layers
    state = type(delayed_state())(torch.ones(operands, 4), torch.ones(cotangents, 4))
    args = llama.params(CONFIG), BATCH, state
    ledger = ft.explain(delayed, *args, mesh=dict(fsdp=2, tp=2), rules=RULES, patterns=(None, ft.data.BATCH, None))
    (entry,) = [e for e in ledger if e.op == "float8"]
    assert (entry.collective, entry.bytes) == ("all_reduce", 2 * 3 * 4 * (operands + cotangents) // 4)
    assert not [e for e in ledger if e.collective == "all_reduce" and e.op == "einsum" and e.bytes <= 7 * 4 * 2]


def delayed_state():
    return ft.float8(lambda: None, recipe="delayed")(None)[1]


# --- with others ----------------------------------------------------------------------------------------------------


def test_ranks_that_are_checked_agree():
    def run(mesh):
        x, w = torch.ones(4, 8), torch.ones(8, 4)
        args = ft.shard((x, w), ("batch embed", "embed mlp"), mesh=mesh, rules=RULES)
        fn = ft.float8(lambda x, w: ft.einsum("batch embed, embed mlp -> batch mlp", x, w), emulate=True)
        return ft.spmd(ft.checked(fn), mesh=mesh, rules=RULES)(*args)

    for y in ft.simulate(fsdp=2, tp=2)(run)():
        torch.testing.assert_close(y, torch.full_like(y, 8.0))  # scales of 1/448 are rounded to float32


def on_processes() -> tuple[list[float], list[float]]:
    """Losses of two steps on processes; and by how much the gradients of a compiled matmul differ from eager ones."""
    torch.set_num_threads(1)
    mesh = ft.make_mesh(fsdp=int(os.environ["WORLD_SIZE"]))
    found = [x.item() for x in losses(mesh, "tensorwise")[1:]]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 16), (16, 4))]
    x, w = ft.shard(tuple(values), ("batch embed", "embed mlp"), mesh=mesh, rules=RULES)
    square = lambda w, x: ft.reduce("batch mlp ->", ft.einsum("batch embed, embed mlp -> batch mlp", x, w) ** 2)
    fn = ft.spmd(ft.float8(ft.grad(square), emulate=True), mesh=mesh, rules=RULES)
    return found, [
        (ft.jit(fn, backend=backend)(w, x) - fn(w, x)).abs().max().item() for backend in ("graph", "inductor")
    ]


def test_processes_have_the_losses_of_threads():
    """Gathers of bytes over gloo, in eager and in a captured step; by 1e-9, of float64 sums in another order."""
    expected = [x.item() for x in losses(None, "tensorwise")[1:]]
    for found, differences in ft.launch(on_processes, nprocs=2):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        assert max(differences) < 1e-9
