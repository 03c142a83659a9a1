"""Laws of `ft.async_tp`: the values, gradients and bytes of the plain program, with transfers beside the matmuls."""

from __future__ import annotations

from collections import Counter

import cases
import programs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functitan as ft
from functitan.axes import write_axes
from functitan.testing import strategies
from functitan.testing.sharded import assert_close, sharded

RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "mlp": "tp", "seq": ("cp", "tp"), "embed": ("fsdp", "cp"), "head": None})
UP = "batch seq embed, embed mlp, embed mlp -> batch seq mlp, batch seq mlp"
DOWN = "batch seq mlp, mlp embed -> batch seq embed"
PATTERNS = {"gate": "embed mlp", "up": "embed mlp", "down": "mlp embed"}, "batch seq embed"
MESHES = [dict(tp=2), dict(tp=4), dict(fsdp=2, tp=2), dict(cp=2, tp=2), dict(dp=2, fsdp=2, tp=2)]


def mlp(params, x):
    gate, up = ft.einsum(UP, x, params["gate"], params["up"])
    return ft.einsum(DOWN, torch.tanh(gate) * up, params["down"])


def gradient(fn):
    """(loss, gradients) of a sum of squares."""

    def loss(params, x):
        y = fn(params, x)
        return ft.reduce("batch seq embed ->", y * y)

    return ft.value_and_grad(loss, argnums=(0, 1))


def example(dtype=torch.float64, batch=4, seq=16, embed=8, mlp=16):
    make = lambda seed, *shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    params = {"gate": make(1, embed, mlp), "up": make(2, embed, mlp), "down": make(3, mlp, embed)}
    return params, make(4, batch, seq, embed)


def plain_torch(params, x):
    """The oracle: (loss, gradients) by autograd."""
    params, x = ft.tree.map(lambda y: y.clone().requires_grad_(), params), x.clone().requires_grad_()
    y = (torch.tanh(x @ params["gate"]) * (x @ params["up"])) @ params["down"]
    loss = (y * y).sum()
    loss.backward()
    return loss.detach(), (ft.tree.map(lambda y: y.grad, params), x.grad)


def on_mesh(fn, mesh, args):
    return sharded(fn, PATTERNS, (None, PATTERNS), mesh=mesh, rules=RULES)(*args)


def predicted(fn, mesh, args=None, rules=RULES):
    return ft.explain(fn, *(args or example()), mesh=mesh, rules=rules, patterns=PATTERNS)


# float64 sums of up to 2**10 products, in the order of the ring: 1e-10 of the magnitude leaves three digits


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("mesh", MESHES, ids=programs.named)
def test_values_and_gradients_are_those_of_plain_torch(mesh, pieces):
    fn = gradient(ft.async_tp(mlp, pieces=pieces))
    assert_close(on_mesh(fn, mesh, example()), plain_torch(*example()))


WRAPPED = {
    "remat inside": lambda fn: ft.async_tp(ft.remat(fn)),
    "remat outside": lambda fn: ft.remat(ft.async_tp(fn)),
    "all stored": lambda fn: ft.remat(ft.async_tp(fn), policy=ft.remat_policies.dots_saveable),
    "compiled region": lambda fn: ft.async_tp(ft.compile(fn, backend="graph")),
    "float64 precision": lambda fn: ft.precision(ft.async_tp(fn), compute=torch.float64, reduce=torch.float64),
    "checked": lambda fn: ft.checked(ft.async_tp(fn)),
    "fsdp's gathers too": lambda fn: ft.async_tp(fn, dims=("tp", "fsdp")),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_it_composes_with_other_wrappers(name):
    found = on_mesh(gradient(WRAPPED[name](mlp)), dict(fsdp=2, tp=2), example())
    assert_close(found, plain_torch(*example()))


@pytest.mark.parametrize("wrap", [lambda fn: ft.jit(gradient(ft.async_tp(fn))), lambda fn: gradient(ft.async_tp(fn))])
@pytest.mark.parametrize("mesh", MESHES[1:3], ids=programs.named)
def test_what_runs_is_what_explain_predicts_and_sends_the_bytes_of_the_plain_program(wrap, mesh):
    def rank(own):
        args = ft.shard(example(), PATTERNS, mesh=own, rules=RULES)
        with ft.record() as ledger:
            ft.spmd(wrap(mlp), mesh=own, rules=RULES)(*args)
        return list(ledger)

    ledger, plain = predicted(wrap(mlp), mesh), predicted(gradient(mlp), mesh)
    assert ft.simulate(**mesh)(rank)()[0] == list(ledger)
    assert ledger.total_bytes("tp") == plain.total_bytes("tp") and ledger.total_bytes() == plain.total_bytes()
    of_tp = [entry for entry in ledger if entry.mesh_dims == ("tp",) and entry.op == "einsum"]
    assert {(entry.collective, entry.hidden) for entry in of_tp} == {("permute", True)}
    n = mesh["tp"] - 1  # forward: x, the result; backward: its cotangent, x again, the cotangent of x
    assert Counter(entry.phase for entry in of_tp) == {"forward": 2 * n, "backward": 3 * n}
    assert not any(entry.hidden for entry in plain)


def test_a_captured_step_has_the_losses_of_the_plain_one():
    """Llama with attention, norms and a loss, under ft.train_step."""

    def losses(mesh, wrap):
        step = ft.train_step(wrap(programs.loss), ft.optim.adamw(1e-2))
        step = ft.jit(step, donate=0) if wrap is not plain else step
        state = programs.state_of(mesh, ft.optim.adamw(1e-2))
        batch = ft.shard(programs.text(), "batch seq", mesh=mesh, rules=programs.RULES)
        found = []
        for _ in range(2):
            state, metrics = step(state, batch)
            found.append(metrics["loss"].double())
        return torch.stack(found)

    plain = lambda loss: loss
    found, expected = (ft.simulate(fsdp=2, tp=2)(losses)(wrap)[0] for wrap in (ft.async_tp, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_bfloat16_sums_parts_in_float32():
    """A ring of 4 adds up what one matmul would: errors of a few units in the last of bfloat16's 8 bits."""
    args = example(torch.float32, seq=64, mlp=32)
    both = [on_mesh(gradient(ft.precision(wrap(mlp))), dict(tp=4), args) for wrap in (ft.async_tp, lambda fn: fn)]
    expected = plain_torch(*args)
    for found in both:
        for x, y in zip(ft.tree.leaves(found), ft.tree.leaves(expected), strict=True):
            assert (x - y).norm() <= 2**-6 * y.norm()


@settings(max_examples=40)
@given(st.data())
def test_any_einsum_on_any_mesh(data):
    """Over every mesh dim, with pieces; where nothing can be pipelined, the error says so, and plain torch is right."""
    mesh = data.draw(strategies.meshes())
    axes = ("batch", "seq", "embed", "mlp")
    rules = data.draw(strategies.rules_tables(axes))
    sizes = data.draw(strategies.axis_sizes(rules, mesh))
    signature = data.draw(strategies.signatures(axes))
    pattern = ", ".join(map(write_axes, signature.operands)) + " -> " + ", ".join(map(write_axes, signature.results))
    pieces = data.draw(st.integers(1, 3))
    plain = lambda *xs: _tuple(ft.einsum(pattern, *xs))

    def pipelined(*xs):
        try:
            return _tuple(ft.async_tp(lambda *xs: ft.einsum(pattern, *xs), dims=tuple(mesh), pieces=pieces)(*xs))
        except ft.MeshError:
            return plain(*xs)

    results = tuple(map(write_axes, signature.results))
    args = tuple(cases.Arg(write_axes(axes)) for axes in signature.operands)
    case = cases.Case(pipelined, plain, args, results, sizes, mesh, rules)
    cases.check(case, data.draw(st.integers(0, 9)))
    cases.check(cases.vjp_of(case), 0)


def _tuple(found):
    return found if isinstance(found, tuple) else (found,)


OUT = "batch seq mlp, mlp embed -> batch embed"
NOT_PIPELINED = {  # what runs beside a pipelined einsum, and what the ledger says of it
    "all_reduce": (lambda y, w: ft.einsum(OUT, y, w), "no part is wanted before the others"),
    "no matmul": (lambda y, w: ft.reduce("mlp embed -> embed", w), "it comes after no matmul"),
    "a move": (lambda y, w: ft.constrain("mlp embed -> head embed", w), "it comes after no matmul"),
    "lookup": (
        lambda y, w: ft.take("line, mlp embed -> line embed", torch.zeros(1, dtype=torch.int64), w),
        "it comes after no matmul",
    ),
}


@pytest.mark.parametrize("name", NOT_PIPELINED)
def test_explain_says_what_is_not_pipelined_and_why(name):
    beside, why = NOT_PIPELINED[name]

    def fn(params, x):
        gate, _ = ft.einsum(UP, x, params["gate"], params["up"])
        return beside(gate, params["down"])

    notes = predicted(ft.async_tp(fn), dict(fsdp=2, tp=2), rules=RULES.replace(line=None)).notes
    found = [note for note in notes if note.startswith("async_tp: ") and note.endswith(why)]
    assert found and all(" over tp of " in note and " is not pipelined: " in note for note in found), notes


def test_the_table_shows_what_is_hidden():
    text = str(predicted(ft.async_tp(mlp), dict(tp=4)))
    assert "forward  permute (hidden)  tp" in text
    assert "6 of them, 6.0 KiB, travel while something is computed (hidden)" in text


def test_without_a_mesh_nothing_travels():
    assert_close(gradient(ft.async_tp(mlp))(*example()), plain_torch(*example()))


@pytest.mark.parametrize(
    ("mesh", "dims", "problem", "fix"),
    [
        (dict(fsdp=2), "tp", "has one rank along 'tp': nothing travels there", "call fn as it is on this mesh"),
        (dict(tp=2), "tq", "unknown mesh dim 'tq' (did you mean 'tp'?)", "name a dim of the mesh"),
        (dict(tp=2), ("tp", "fsdp"), "one rank along 'fsdp'", "ft.async_tp(fn, dims='fsdp')"),
    ],
)
def test_a_mesh_without_the_dim_is_an_error(mesh, dims, problem, fix):
    with pytest.raises(ft.MeshError) as error:
        predicted(ft.async_tp(mlp, dims=dims), mesh)
    assert problem in str(error.value) and fix in str(error.value)


def test_a_function_with_nothing_to_pipeline_is_an_error_that_says_why():
    with pytest.raises(ft.MeshError) as error:
        predicted(ft.async_tp(mlp), dict(fsdp=2, tp=2), rules=RULES.replace(seq="cp"))
    lines = str(error.value).splitlines()
    assert lines[0] == "ft.async_tp of mlp:"
    assert lines[1].endswith("no gather before a matmul, and no reduce-scatter after one, runs over tp in its forward")
    assert "all_reduce over tp of einsum" in lines[2] and "no part is wanted before the others" in lines[2]
    assert "rules.replace(seq='tp')" in lines[-1]
    with pytest.raises(ft.MeshError, match="runs over tp in its forward"):
        predicted(ft.async_tp(lambda params, x: x * 2), dict(tp=2))
    merged = RULES.replace(batch=None, embed=None, seq=("fsdp", "tp"), mlp=("fsdp", "tp"))
    with pytest.raises(ft.MeshError, match="is not pipelined: it is one message with fsdp: name them in dims= too"):
        predicted(ft.async_tp(mlp), dict(fsdp=2, tp=2), rules=merged)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(dims=()), "dims is empty"),
        (dict(dims=(2,)), "dims has 2, which is no name"),
        (dict(pieces=0), "pieces is 0: a whole number of at least 1"),
        (dict(pieces=1.5), "pieces is 1.5"),
    ],
)
def test_bad_options_are_errors(options, problem):
    with pytest.raises(ft.MeshError, match="Fix: write as in") as error:
        ft.async_tp(mlp, **options)
    assert problem in str(error.value)
    with pytest.raises(ft.FunctitanError, match="it wraps a function"):
        ft.async_tp(None)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp", "mxfp8"])
def test_float8_multiplies_the_same_numbers(recipe):
    """The parts that travel are quantized as the whole is; captured, on fsdp and tp, too."""
    args, mesh = example(torch.float32, seq=128, embed=64, mlp=128), dict(fsdp=2, tp=2)
    low = ft.float8(mlp, recipe=recipe, emulate=True)
    value, grads = on_mesh(gradient(low), mesh, args)
    found = on_mesh(gradient(ft.async_tp(low)), mesh, args)
    assert torch.equal(found[0], value)  # the sums of two ranks have one order
    for x, y in zip(*map(ft.tree.leaves, (found[1], grads)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())  # float32 in another order
    assert {e.dtype for e in predicted(ft.async_tp(low), mesh, args) if e.hidden} >= {torch.uint8}


def test_float8_on_fsdp_and_tp_is_captured():
    args, mesh = example(torch.float32, seq=128, embed=64, mlp=128), dict(fsdp=2, tp=2)
    fn = gradient(ft.async_tp(ft.float8(mlp, recipe="rowwise", emulate=True)))
    eager, captured = on_mesh(fn, mesh, args), on_mesh(ft.jit(fn), mesh, args)
    for x, y in zip(*map(ft.tree.leaves, (captured, eager)), strict=True):
        # a captured tanh differs in its last bit, which moves a few numbers to the next of float8
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3 * y.abs().max().item())
