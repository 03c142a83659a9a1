"""Laws of `ft.compile`: the function's own values and gradients, from one capture for all layers of the same shapes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import functitan as ft

LLAMA, GPT2 = ft.models.llama, ft.models.gpt2
RULES = LLAMA.RULES
CONFIG = LLAMA.DEBUG._replace(num_layers=2, vocab_size=128, embed=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp=96)
GPT2_CONFIG = GPT2.GPT2Config(128, 16, 32, 2, 4)
graph = functools.partial(ft.compile, backend="graph")


def module(w: dict, x: Tensor) -> Tensor:
    """The oracle: a block in plain torch."""
    h = functional.layer_norm(x, (4,), w["scale"])
    return x + functional.silu(h @ w["gate"]) * (h @ w["up"]) @ w["down"]


def block(w: dict, x: Tensor) -> Tensor:
    """The same in named ops."""
    h = ft.layer_norm("batch embed, embed", x, w["scale"])
    into = "batch embed, embed mlp, embed mlp -> batch mlp, batch mlp"
    gate, up = ft.einsum(into, h, w["gate"], w["up"])
    return x + ft.einsum("batch mlp, mlp embed -> batch embed", functional.silu(gate) * up, w["down"])


def operands(rows: int = 6) -> tuple[list[dict], Tensor]:
    """The weights of three layers, and their input."""
    make = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = lambda: {"scale": make(4), "gate": make(4, 8), "up": make(4, 8), "down": make(8, 4)}
    return [layer() for _ in range(3)], make(rows, 4)


def of_layers(fn):
    return lambda ws, x: (functools.reduce(lambda x, w: fn(w, x), ws, x) ** 2).sum()


def autograd(loss):
    def fn(ws, x):
        leaves = ft.tree.map(lambda leaf: leaf.detach().clone().requires_grad_(), (ws, x))
        value = loss(*leaves)
        value.backward()
        return value.detach(), ft.tree.map(lambda leaf: leaf.grad, leaves)

    return fn


def close(ours, theirs, tolerance: float = 1e-10) -> None:
    for x, y in zip(ft.tree.leaves(ours), ft.tree.leaves(theirs), strict=True):
        # float64: named ops and plain ones sum in another order: 1e-13 and a margin
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


TRANSFORMS = {
    "ft.value_and_grad": lambda loss: ft.value_and_grad(loss, (0, 1)),
    "backward": autograd,
    "torch.func": lambda loss: lambda *args: torch.func.grad_and_value(loss, (0, 1))(*args)[::-1],
    "vjp": lambda loss: (
        lambda *args: (
            (out := torch.func.vjp(loss, *args))[0],
            out[1](torch.ones((), dtype=torch.float64)),
        )
    ),
    "nested": lambda loss: (
        lambda *args: torch.func.grad_and_value(lambda *args: torch.func.vjp(loss, *args)[0], (0, 1))(*args)[::-1]
    ),
    "ft.jit": lambda loss: ft.jit(ft.value_and_grad(loss, (0, 1)), backend="graph"),
}


def test_one_capture_gives_every_layer_the_modules_values_and_gradients():
    calls = []

    def counted(w, x):
        calls.append(None)
        return block(w, x)

    compiled = graph(counted)
    expected = autograd(of_layers(module))(*operands())
    for transform in TRANSFORMS.values():
        close(transform(of_layers(compiled))(*operands()), expected)
    assert len(compiled.regions) == len(calls) == 1
    close(of_layers(compiled)(*operands()), expected[0])
    assert len(compiled.regions) == len(calls) == 2  # without a gradient
    with torch.no_grad():
        close(compiled(*(operands()[0][0], operands()[1])), module(operands()[0][0], operands()[1]))
    ft.value_and_grad(of_layers(compiled), (0, 1))(*operands(rows=5))
    assert len(compiled.regions) == len(calls) == 3  # another shape


def test_inductor_gives_the_modules_values_and_gradients_in_eager_and_inside_jit():
    compiled = ft.compile(block)
    expected, eager = autograd(of_layers(module))(*operands()), ft.value_and_grad(of_layers(compiled), (0, 1))
    captured = ft.jit(eager)
    for fn in (eager, TRANSFORMS["torch.func"](of_layers(compiled)), captured):
        close(fn(*operands()), expected)
    assert len(compiled.regions) == 1
    targets = [node.target for node in captured.graph(*operands()).graph.nodes if "region" in str(node.target)]
    assert len(targets) == 6 and len(set(targets)) == 2


def test_arguments_may_be_anything_and_results_trees():
    def fn(w, x, power, *, key, flags=None):
        noise = ft.dropout("batch embed", x, key, 0.25)
        return {"y": noise**power * w["scale"], "count": key.sum(), "same": x, "row": x[0], "static": (power, flags)}

    compiled = graph(fn)

    def total(fn):
        def loss(w, x):
            out = fn(w, x, 2, key=ft.random.key(3))
            assert out["static"] == (2, None) and not out["count"].requires_grad
            return (out["y"] * out["same"]).sum() + out["row"].sum()

        return loss

    (w, *_), x = operands()
    for grad in (ft.grad, torch.func.grad):
        for fn_of in (lambda g, fn: g(total(fn), 1), lambda g, fn: g(total(fn), (0, 1))):
            close(fn_of(grad, compiled)(w, x), fn_of(grad, fn)(w, x))
    first = compiled(w, x, 2, key=ft.random.key(3))
    assert first["same"] is not x and torch.equal(first["same"], x)
    close(compiled(w, x, 2.0, key=ft.random.key(3))["y"], first["y"])
    assert len({region.forward.op for region in compiled.regions}) == len(compiled.regions) == 4
    unused = ft.grad(lambda w, x: compiled(w, x, 2, key=ft.random.key(3))["same"].sum())(w, x)
    assert not any(leaf.any() for leaf in ft.tree.leaves(unused))


def test_other_wrappers_meet_it():
    (w, *_), x = operands()
    half = functools.partial(ft.precision, compute=torch.bfloat16)
    expected = ft.value_and_grad(of_layers(half(block)))([w], x)
    for fn in (graph(half(block)), half(graph(block))):
        close(ft.value_and_grad(of_layers(fn))([w], x), expected)
    twice = lambda fn: lambda w, x: fn(w, fn(w, x))
    close(ft.grad(of_layers(graph(twice(graph(block)))))([w], x), ft.grad(of_layers(twice(block)))([w], x))


# ------------------------------------------------------------------------------------------------ models and meshes


def loss_of(model, config, fn):
    def loss(params, batch):
        total, count = model.loss(params, batch, config, block=fn)
        return total / count

    return loss


def batch_of() -> dict[str, Tensor]:
    tokens = torch.randint(0, 128, (4, 17), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens[:, :-1].clone(), "labels": tokens[:, 1:].clone()}


def double(params):
    return ft.tree.map(lambda x: x.double(), params)


@pytest.mark.parametrize(("model", "config"), [(LLAMA, CONFIG), (GPT2, GPT2_CONFIG)], ids=["llama", "gpt2"])
def test_a_models_blocks_are_one_region(model, config):
    params = double(ft.init(model.params(config), ft.random.key(0)))
    compiled = graph(model.block)
    ours, theirs = (ft.value_and_grad(loss_of(model, config, fn))(params, batch_of()) for fn in (compiled, model.block))
    close(ours, theirs)
    assert len(compiled.regions) == 1


def test_microbatches_on_a_mesh_share_a_region():
    def run(mesh):
        compiled = graph(LLAMA.block)
        state = ft.TrainState.create(LLAMA.params(CONFIG), ft.optim.sgd(0.1), ft.random.key(0), mesh=mesh, rules=RULES)
        batch, found = ft.shard(batch_of(), "batch seq", mesh=mesh, rules=RULES), []
        for fn in (LLAMA.block, compiled):
            loss = lambda params, batch, key, fn=fn: LLAMA.loss(params, batch, CONFIG, block=fn)
            step = ft.train_step(loss, ft.optim.sgd(0.1), donate=False, accumulate=2)
            found.append(step(state, batch)[0].params)
        assert len(compiled.regions) == 1
        return found

    for theirs, ours in ft.simulate(fsdp=2)(run)():
        close(ours, theirs, 1e-6)  # float32


@pytest.mark.parametrize("sizes", [dict(fsdp=2), dict(tp=2), dict(fsdp=2, tp=2)], ids=str)
def test_a_region_gives_and_communicates_what_its_function_does_on_every_mesh(sizes):
    def run(mesh):
        params = double(ft.init(LLAMA.params(CONFIG), ft.random.key(0), mesh=mesh, rules=RULES))
        batch = ft.shard(batch_of(), "batch seq", mesh=mesh, rules=RULES)
        compiled, found = ft.compile(LLAMA.block, skip=["bucket_collectives"]), []
        plain, ours = (ft.value_and_grad(loss_of(LLAMA, CONFIG, fn)) for fn in (LLAMA.block, compiled))
        both = [plain, ours] if len(sizes) > 1 else [plain, ours, ft.jit(ours, skip=["bucket_collectives"])]
        for fn in both:
            with ft.record() as ledger:
                value = ft.spmd(fn, mesh=mesh, rules=RULES)(params, batch)
            found.append((value, list(ledger)))
        assert len(compiled.regions) == 1
        return found

    of_ranks = ft.simulate(**sizes)(run)()
    for (theirs, _), *ours in of_ranks:
        for value, _ in ours:
            close(value, theirs)
    plain, *recorded = (ledger for _, ledger in of_ranks[0])
    for ledger in recorded:
        sent = [str(entry._replace(hidden=False)) for entry in ledger]  # a graph hides some behind its products
        assert sorted(sent) == sorted(map(str, plain))
    declared = ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, dtype=torch.float64), LLAMA.params(CONFIG))

    def explained(wrap, *skip):
        step = wrap(ft.value_and_grad(loss_of(LLAMA, CONFIG, ft.compile(LLAMA.block, skip=skip))))
        return ft.explain(step, declared, batch_of(), mesh=sizes, rules=RULES, patterns=(None, "batch seq"))

    assert list(explained(lambda fn: fn, "bucket_collectives")) == recorded[0]
    bucketed = explained(ft.jit)
    assert bucketed.total_bytes() == sum(entry.bytes for entry in plain) and len(bucketed) < len(plain)


def on_gloo() -> tuple[bool, list]:
    """Whether there is one region, and the ledgers of plain blocks, of compiled ones, and of those inside `ft.jit`."""
    torch.set_num_threads(1)
    mesh = ft.make_mesh(fsdp=2)
    into, out = "batch embed, embed mlp -> batch mlp", "batch mlp, mlp embed -> batch embed"
    small = lambda w, x: x + ft.einsum(out, ft.einsum(into, x, w["up"]).tanh(), w["down"])
    ws, x = operands()
    ws = [{name: w[name] for name in ("up", "down")} for w in ws]
    ws = [ft.shard(w, {"up": "embed mlp", "down": "mlp embed"}, mesh=mesh, rules=RULES) for w in ws]
    x = ft.shard(x, "batch embed", mesh=mesh, rules=RULES)
    compiled, found, ledgers = ft.compile(small), [], []
    plain, ours = (ft.grad(of_layers(fn), (0, 1)) for fn in (small, compiled))
    for fn in (plain, ours, ft.jit(ours)):
        with ft.record() as ledger:
            found.append(ft.spmd(fn, mesh=mesh, rules=RULES)(ws, x))
        ledgers.append(list(ledger))
    for each in found[1:]:
        close(each, found[0])
    return len(compiled.regions) == 1, ledgers


def test_processes_communicate_inside_regions():
    for once, (plain, eager, captured) in ft.launch(on_gloo, nprocs=2):
        assert once
        sent = lambda ledger: sum(entry.bytes for entry in ledger)
        assert sent(eager) == sent(captured) == sent(plain) and len(eager) == len(captured) < len(plain)


# ------------------------------------------------------------------------------------------------ memory


def saved_bytes(fn) -> int:
    """What autograd holds for the backward of one block besides its arguments."""
    params = ft.tree.map(lambda x: x.requires_grad_(), ft.init(LLAMA.block_params(CONFIG), ft.random.key(0)))
    x = torch.randn(4, 16, 32, requires_grad=True)
    own = {leaf.untyped_storage()._cdata for leaf in (*ft.tree.leaves(params), x)}
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            held[storage._cdata] = storage.nbytes()
        return x

    fn(params, x, CONFIG)  # made here, if it is a region
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = fn(params, x, CONFIG)
    assert y.requires_grad
    return sum(held.values())


def test_a_region_saves_less_than_autograd_and_with_remat_inside_nothing():
    assert saved_bytes(graph(LLAMA.block)) < 0.6 * saved_bytes(LLAMA.block)  # half of it is made again
    assert saved_bytes(graph(ft.remat(LLAMA.block))) == 0


@pytest.mark.parametrize("wrap", [lambda fn: graph(ft.remat(fn)), lambda fn: ft.remat(graph(fn))])
def test_remat_inside_and_outside_gives_the_gradients_and_the_memory_of_remat(wrap):
    def peak(layers: int, block) -> int:
        config = CONFIG._replace(num_layers=layers)
        declared = LLAMA.params(config)
        embedding = declared.pop("embedding")
        loss = lambda embedding, params, batch: loss_of(LLAMA, config, block)({**params, "embedding": embedding}, batch)
        ledger = ft.explain(
            ft.grad(loss), embedding, declared, batch_of(), mesh=dict(fsdp=1), rules=RULES,
            patterns=(None, None, "batch seq"),
        )  # fmt: skip
        assert ledger.peak_bytes is not None and ledger.argument_bytes is not None
        return ledger.peak_bytes - ledger.argument_bytes - config.padded_vocab * config.embed * 4

    assert peak(12, wrap(LLAMA.block)) <= 1.5 * peak(2, wrap(LLAMA.block))
    (w, *_), x = operands()
    ours, theirs = (ft.value_and_grad(of_layers(fn)) for fn in (wrap(block), block))
    for fn in (ours, ft.jit(ours, backend="graph")):
        close(fn([w, w], x), theirs([w, w], x))


# ------------------------------------------------------------------------------------------------ errors


def branches(w, x):
    if x.sum() > 0:
        return x
    return -x


def writes(w, x):
    x.mul_(2)
    return x * w["scale"]


CLOSED = torch.ones(4, dtype=torch.float64)


def closes_over(w, x):
    return x * CLOSED


ERRORS = [
    (
        branches,
        "what runs next depends on a value that is not known while tracing, at ",
        "if x.sum() > 0:",
        "choose by torch.where, or leave .item() and if outside the captured function",
    ),
    (writes, "argument 1 is written to, at ", "x.mul_(2)", "write out of place"),
    (
        closes_over,
        "a tensor (4,) float64 that is no argument is used at ",
        "return x * CLOSED",
        "pass it as an argument: a graph would keep its value of now for ever",
    ),
]


@pytest.mark.parametrize(("fn", "problem", "line", "fix"), ERRORS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_no_graph_can_hold_is_an_error_that_names_the_line(fn, problem, line, fix):
    first, lines = fn.__code__.co_firstlineno, Path(__file__).read_text().splitlines()
    number = next(n for n, text in enumerate(lines, 1) if n > first and text.strip() == line)
    (w, *_), x = operands()
    for call in (lambda: graph(fn)(w, x), lambda: ft.grad(lambda x: graph(fn)(w, x).sum())(x)):
        with pytest.raises(ft.CaptureError) as caught:
            call()
        text = f"ft.compile of {fn.__qualname__}:\n  - {problem}{__file__}:{number}: {line}\n  Fix: {fix}"
        assert str(caught.value) == text


def scaled(w: Tensor, x: Tensor) -> Tensor:
    return (w * x).tanh()


def dual(f, w):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(w, w), w)


SECOND = "differentiate inside, as in ft.compile(ft.grad(fn)), or leave the function uncompiled there"
VMAP = "vmap inside: ft.compile(ft.vmap(fn, ...))"
UNSUPPORTED = {
    "a second derivative through it": (lambda f, w: ft.hvp(lambda w: f(w, w).sum(), (w,), (w,)), SECOND),
    "forward mode through it": (lambda f, w: ft.jvp(f, (w, w), (w, w)), SECOND),
    "forward mode through it ": (lambda f, w: dual(f, w), SECOND),
    "vmap around it": (lambda f, w: torch.func.vmap(f, (0, None))(w, w), VMAP),
    "vmap around its gradient": (lambda f, w: torch.func.jacrev(f)(w, w), VMAP),
}


@pytest.mark.parametrize("problem", UNSUPPORTED)
def test_what_it_cannot_do_is_an_error(problem):
    call, fix = UNSUPPORTED[problem]
    with pytest.raises(ft.FunctitanError) as caught:
        call(graph(scaled), torch.ones(3))
    assert str(caught.value) == f"ft.compile of scaled:\n  - {problem.strip()} is not supported\n  Fix: {fix}"


def test_a_differentiated_tensor_that_it_closes_over_is_an_error():
    with pytest.raises(ft.FunctitanError) as caught:
        ft.grad(lambda w: graph(lambda x: (w * x).sum())(torch.ones(3)))(torch.ones(3))
    name = "test_a_differentiated_tensor_that_it_closes_over_is_an_error.<locals>.<lambda>.<locals>.<lambda>"
    assert str(caught.value) == (
        f"ft.compile of {name}:\n"
        "  - it closes over 'w', a tensor (3,) that is differentiated and would get no gradient\n"
        "  Fix: pass it as an argument: ft.compile(lambda w, x: ...)(w, x)"
    )


def test_a_policy_around_it_is_an_error():
    remat = ft.remat(graph(scaled), policy=ft.remat_policies.dots_saveable)
    with pytest.raises(ft.FunctitanError) as caught:
        ft.grad(lambda w: remat(w, w).sum())(torch.ones(3))
    assert str(caught.value) == (
        "ft.compile of scaled:\n  - a policy of the ft.remat around it cannot choose among the ops inside it\n"
        "  Fix: rematerialize inside: ft.compile(ft.remat(fn, policy=...))"
    )


def test_unknown_options_are_an_error():
    with pytest.raises(ft.CaptureError, match=r"no pass is called 'overlp' \(did you mean 'overlap'\?\)"):
        ft.compile(scaled, skip=["overlp"])
    with pytest.raises(ft.CaptureError, match="backend is 'cuda': 'inductor' or 'graph'"):
        ft.compile(scaled, backend="cuda")
