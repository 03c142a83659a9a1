"""Complex and half leaves: gradients are torch's on every mesh, in every wrapper; or the state is refused when made."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

import functitan as ft
from functitan.testing.sharded import on_ranks

RULES = ft.AxisRules({"batch": "dp", "heads": "tp", "mlp": "tp", "seq": None, "embed": "fsdp", "head_dim": None})
IDS = torch.tensor([[2, 0, 1], [3, 3, 0], [1, 2, 2], [0, 1, 3]])


def complexes(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


X, W, V, TABLE, SCALE = (
    complexes(4, 8),
    complexes(8, 4, seed=1),
    complexes(8, 4, seed=2),
    complexes(4, 8, seed=3),
    complexes(8, seed=4),
)
PATTERNS = ("batch embed", "embed mlp", "embed mlp", "mlp embed", "embed")


def einsum(x, w, v, table, scale):
    return ft.einsum("batch embed, embed mlp -> batch mlp", x, w)


def einsum_of_several(x, w, v, table, scale):
    a, b = ft.einsum("batch embed, embed mlp, embed mlp -> batch mlp, batch mlp", x, w, v)
    return a * b.conj()


def einsum_of_three(x, w, v, table, scale):
    return ft.einsum("batch embed, embed mlp, mlp embed -> batch mlp", x, w, table)


def elementwise(x, w, v, table, scale):
    return ft.einsum("embed mlp, embed mlp -> embed mlp", w, v).exp()


def conjugate_views(x, w, v, table, scale):
    return ft.einsum("batch embed, embed mlp -> batch mlp", x.conj(), w.conj().resolve_conj().conj().imag.to(w.dtype))


def broadcast(x, w, v, table, scale):
    return x * ft.broadcast("embed -> batch embed", scale)


def mean(x, w, v, table, scale):
    return ft.reduce("batch embed -> embed", x * x.sin(), op="mean") * scale


def constrain(x, w, v, table, scale):
    return ft.constrain("embed mlp -> embed seq", w.exp()).conj()


def take(x, w, v, table, scale):
    return ft.take("batch seq, mlp embed -> batch seq embed", ft.iota("batch seq", "seq", batch=4, seq=3), table)


def select(x, w, v, table, scale):
    return ft.select("batch embed -> batch", x * x.conj() * x, -1)


def dropout(x, w, v, table, scale):
    return ft.dropout("batch embed", x * x, ft.random.key(0), 0.5)


OPS = [
    einsum,
    einsum_of_several,
    einsum_of_three,
    elementwise,
    conjugate_views,
    broadcast,
    mean,
    constrain,
    take,
    select,
    dropout,
]
RESULTS = dict(
    elementwise="embed mlp",
    broadcast="batch embed",
    mean="embed",
    constrain="embed seq",
    take="batch seq embed",
    select="batch",
    dropout="batch embed",
)
MESHES = {
    "plain": None,
    "dp": dict(dp=2),
    "tp": dict(tp=2),
    "fsdp": dict(fsdp=2),
    "dp·fsdp·tp": dict(dp=2, fsdp=2, tp=2),
}


def loss_of(op, run=None):
    result = RESULTS.get(op.__name__, "batch mlp")
    return lambda *args: ft.reduce(f"{result} ->", (y := (run or op)(*args)).real ** 2 + y.imag.sin() + y.abs())


def autograd(op, args):
    """Torch's own gradients, of the op without a mesh, which is plain torch."""
    leaves = [x.clone().requires_grad_() for x in args]
    loss = loss_of(op)(*leaves)
    return [
        torch.zeros_like(x) if g is None else g.resolve_conj()
        for x, g in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True)
    ]


CALLS = [(op, "none", mesh) for op in OPS for mesh in MESHES]
CALLS += [(op, wrap, mesh) for op in OPS for wrap in ("remat", "torch.func") for mesh in ("plain", "fsdp")]
CALLS += [(op, wrap, mesh) for op in OPS[:2] for wrap in ("jit", "checked") for mesh in ("plain", "fsdp")]


@pytest.mark.parametrize("op, wrap, mesh", CALLS, ids=lambda x: getattr(x, "__name__", x))
def test_gradients_are_those_of_torch(op, wrap, mesh):
    args = (X, W, V, TABLE, SCALE)
    loss = loss_of(op, ft.remat(lambda *args: op(*args)) if wrap == "remat" else op)
    places = tuple(range(len(args)))
    grads = (
        (lambda *args: torch.func.grad(loss, argnums=places)(*args))
        if wrap == "torch.func"
        else ft.grad(loss, argnums=places)
    )
    grads = {"jit": partial(ft.jit, backend="graph"), "checked": ft.checked}.get(wrap, lambda fn: fn)(grads)
    expected = tuple(autograd(op, args))
    if MESHES[mesh] is None:
        found = [grads(*args)]
    else:
        found = on_ranks(grads, args, PATTERNS, PATTERNS, mesh=MESHES[mesh], rules=RULES)
    for its in found:
        torch.testing.assert_close(tuple(x.resolve_conj() for x in its), expected, rtol=1e-10, atol=1e-10)


def gradients(mesh):
    loss = loss_of(einsum)
    grad = ft.grad(lambda x, w: loss(x, w, None, None, None), argnums=(0, 1))
    shards = ft.shard((X, W), PATTERNS[:2], mesh=mesh, rules=RULES)
    return ft.unshard(ft.spmd(grad, mesh=mesh, rules=RULES)(*shards), PATTERNS[:2], mesh=mesh, rules=RULES)


def of_process():
    return gradients(ft.make_mesh(fsdp=2))


def test_complex_numbers_travel_between_processes():
    expected = tuple(autograd(einsum, (X, W, V, TABLE, SCALE))[:2])
    for found in ft.launch(of_process, nprocs=2):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mesh", [None, dict(dp=2), dict(fsdp=2, tp=2)], ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_accumulate_of_complex_parameters(mesh, k):
    def loss(params, x, key):
        y = ft.einsum("batch embed, embed mlp -> batch mlp", x, params["w"])
        total = ft.reduce("batch mlp ->", y.real**2 + y.imag.sin())
        return total, ft.reduce("batch mlp ->", torch.ones_like(y.real))

    def gradients(x, params):
        return ft.accumulate(loss, k, patterns={"w": "embed mlp"})(params, x)[1]

    leaf = W.clone().requires_grad_()
    y = X @ leaf
    ((y.real**2 + y.imag.sin()).sum() / y.numel()).backward()
    args, patterns = (X, {"w": W}), ("batch embed", {"w": "embed mlp"})
    found = (
        [gradients(*args)] if mesh is None else on_ranks(gradients, args, patterns, patterns[1], mesh=mesh, rules=RULES)
    )
    for its in found:
        torch.testing.assert_close(its["w"].resolve_conj(), leaf.grad)


def test_what_has_no_complex_meaning_is_refused():
    q, pattern = complexes(4, 2, 2), "seq heads head_dim"
    calls = [
        lambda: ft.attention(f"{pattern}, {pattern}", q, q, q),
        lambda: ft.reduce("batch embed -> batch", X, op="max"),
        lambda: ft.reduce("batch embed -> batch", X, op="logsumexp"),
        lambda: ft.cross_entropy("batch mlp, batch -> batch", W, torch.zeros(8).long()),
    ]
    for call in calls:
        with pytest.raises(ft.PatternError, match="floating-point numbers are wanted"):
            call()


OPTIMIZERS = {
    "sgd": ft.optim.sgd(0.1),
    "momentum": ft.optim.sgd(0.1, momentum=0.9),
    "nesterov": ft.optim.sgd(0.1, momentum=0.9, nesterov=True),
    "clip": ft.optim.chain(ft.optim.clip_by_global_norm(0.5), ft.optim.sgd(0.1)),
    "adamw": ft.optim.adamw(0.1),
    "lion": ft.optim.lion(0.1),
    "adafactor": ft.optim.adafactor(0.1),
    "muon": ft.optim.muon(0.1),
    "bfloat16_state": ft.optim.bfloat16_state(ft.optim.adamw(0.1)),
}
OF_TORCH = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=0.1),
}


def declared(dtype):
    def begin(key, param, block):
        made = W.to(param.dtype) if param.dtype.is_complex else W.real.to(param.dtype)
        return (made if block is None else made[block]).clone()

    return {"w": ft.Param("embed mlp", (8, 4), begin, dtype)}


def least_squares(params, x, key):
    y = ft.einsum("batch embed, embed mlp -> batch mlp", x, params["w"])
    size = y.real**2 + y.imag**2 if y.is_complex() else y.float() ** 2
    return ft.reduce("batch mlp ->", size), ft.reduce("batch mlp ->", torch.ones_like(size))


def trained(tx, dtype, mesh=None, capture=False, steps=3):
    rules = None if mesh is None else RULES
    state = ft.TrainState.create(declared(dtype), tx, ft.random.key(0), mesh=mesh, rules=rules)
    x = X.to(dtype) if dtype.is_complex else X.real.to(dtype)
    x = ft.shard(x, "batch embed", mesh=mesh, rules=rules)
    step = ft.train_step(least_squares, tx)
    step = ft.jit(step, donate=0, backend="graph") if capture else step
    for _ in range(steps):
        state, metrics = step(state, x)
    return ft.unshard(state.params["w"], "embed mlp", mesh=mesh, rules=rules), metrics["loss"]


def _on(tx, dtype, mesh):
    return trained(tx, dtype, mesh)


def by_torch(name, dtype, steps=3):
    leaf = declared(dtype)["w"].init(None, declared(dtype)["w"], None).requires_grad_()
    tx, x = OF_TORCH[name]([leaf]), X.to(dtype) if dtype.is_complex else X.real.to(dtype)
    for _ in range(steps):
        y = x @ leaf
        loss = (y.real**2 + y.imag**2 if dtype.is_complex else y.float() ** 2).mean()
        tx.zero_grad()
        loss.backward()
        tx.step()
    return leaf.detach()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_right_or_refuses_when_the_state_is_made(name, dtype):
    tx = OPTIMIZERS[name]
    if dtype.is_complex and name in ("adamw", "lion", "adafactor", "muon", "bfloat16_state"):
        with pytest.raises(ft.FunctitanError, match=r"(?s)parameters that are complex:.*w is complex64.*ft.optim.sgd"):
            ft.TrainState.create(declared(dtype), tx, ft.random.key(0))
        with pytest.raises(ft.FunctitanError, match="w is complex"):
            tx.init({"w": W})
        return
    if name == "bfloat16_state":
        with pytest.raises(ft.FunctitanError, match="no float32 leaf"):
            ft.TrainState.create(declared(dtype), tx, ft.random.key(0))
        return
    (plain, loss), (captured, _) = trained(tx, dtype), trained(tx, dtype, capture=True)
    close = (
        partial(torch.testing.assert_close, rtol=2e-2, atol=2e-2) if dtype.itemsize == 2 else torch.testing.assert_close
    )
    assert plain.isfinite().all() and loss.isfinite()
    close(captured, plain)
    for mesh in (dict(fsdp=2, tp=2),):
        for found, _ in ft.simulate(**mesh)(partial(_on, tx, dtype))():
            close(found, plain)
    if name in OF_TORCH:
        close(plain, by_torch(name, dtype))


@pytest.mark.parametrize("capture", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "momentum"])
def test_rows_without_gradient_stay_finite(name, dtype, capture):
    """Where squares and eps vanish in half precision, 0 / 0 was NaN."""
    tx = OPTIMIZERS[name]
    state = ft.TrainState.create({"w": ft.Param("mlp embed", (16, 4), dtype=dtype)}, tx, ft.random.key(0))

    def loss(params, ids, key):
        rows = ft.take("batch, mlp embed -> batch embed", ids, params["w"]).float() * 1e-3
        return ft.reduce("batch embed ->", rows), ft.reduce("batch embed ->", torch.ones_like(rows))

    step = ft.train_step(loss, tx)
    step = ft.jit(step, donate=0, backend="graph") if capture else step
    before = state.params["w"].clone()
    for _ in range(2):
        state, _ = step(state, torch.tensor([3, 3]))
    assert state.params["w"].isfinite().all()
    assert name == "momentum" or not torch.equal(state.params["w"][3], before[3])


# A state that was put together by hand.


def state_of(tx, mesh=None, rules=None):
    params = {"w": ft.Param("embed mlp", (8, 4)), "b": ft.Param("mlp", (4,), ft.param.zeros)}
    return ft.TrainState.create(params, tx, ft.random.key(0), mesh=mesh, rules=rules)


BF16, HALF = (lambda x: x.bfloat16() if x.is_floating_point() else x), (lambda x: x.half())
CHANGES = {
    "dtype": (lambda s: dict(params=ft.tree.map(BF16, s.params)), r"w is bfloat16\[8, 4\], and is declared float32"),
    "every leaf at once": (lambda s: dict(params=ft.tree.map(HALF, s.params)), r"(?s)b is float16.*w is float16"),
    "shape": (lambda s: dict(params={**s.params, "w": torch.ones(4, 8)}), r"params\.w is float32\[4, 8\]"),
    "missing": (lambda s: dict(params={"w": s.params["w"]}), r"b"),
    "more": (lambda s: dict(params={**s.params, "c": torch.ones(1)}), r"c"),
    "no tensor": (lambda s: dict(params={**s.params, "b": [0.0] * 4}), r"b"),
    "numpy": (lambda s: dict(params={**s.params, "b": s.params["b"].numpy()}), r"b is a ndarray"),
    "moments": (lambda s: dict(opt_state=ft.tree.map(BF16, s.opt_state)), r"opt_state.*b is bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("capture", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_state_that_is_not_as_declared_is_an_error_before_forward(name, capture):
    change, text = CHANGES[name]
    tx, calls = ft.optim.adamw(0.1), []

    def loss(params, x, key):
        calls.append(1)
        return least_squares(params, x, key)

    step = ft.train_step(loss, tx)
    step = ft.jit(step, donate=0, backend="graph") if capture else step
    state = state_of(tx)
    with pytest.raises(ft.FunctitanError, match=text):
        step(dataclasses.replace(state, **change(state)), torch.ones(4, 8))
    assert not calls and "w" in state.params
    step(state, torch.ones(4, 8))


def test_a_whole_value_in_place_of_a_shard_is_an_error():
    def run(mesh):
        tx = ft.optim.sgd(0.1)
        state = state_of(tx, mesh, RULES)
        whole = ft.unshard(state.params, {"w": "embed mlp", "b": "mlp"}, mesh=mesh, rules=RULES)
        x = ft.shard(torch.ones(4, 8), "batch embed", mesh=mesh, rules=RULES)
        ft.train_step(least_squares, tx)(dataclasses.replace(state, params=whole), x)

    with pytest.raises(ft.FunctitanError, match=r"params\.w is float32\[8, 4\], and is declared float32\[4, 4\]"):
        ft.simulate(fsdp=2)(run)()


def test_several_states_of_one_step_and_other_values_pass():
    tx = ft.optim.adamw(0.1)
    step = ft.train_step(least_squares, tx, donate=False)
    for state in (state_of(tx), state_of(tx), state_of(tx)) * 2:
        state, _ = step(dataclasses.replace(state, params=ft.tree.map(torch.ones_like, state.params)), torch.ones(4, 8))
        step(state, torch.ones(4, 8))
