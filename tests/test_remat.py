"""Laws of `ft.remat`: the function's own values and gradients, less memory, and a recomputation that stays."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import math
import threading

import pytest
import torch
from torch import Tensor

import functitan as ft

P, LLAMA = ft.remat_policies, ft.models.llama
POLICIES = {
    "nothing": P.nothing_saveable,
    "names": P.save_only_these_names("hidden"),
    "dots": P.dots_saveable,
    "budget": P.budget(3 * 8 * 8),  # one product of `layer`, of two
    "everything": P.everything_saveable,
}
RULES = LLAMA.RULES
CONFIG = LLAMA.DEBUG._replace(num_layers=2, vocab_size=128, embed=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp=96)


def layer(w: dict, x: Tensor, key: Tensor | None = None) -> Tensor:
    hidden = ft.checkpoint_name(ft.einsum("batch embed, embed mlp -> batch mlp", x, w["up"]), "hidden").tanh()
    if key is not None:
        hidden = ft.dropout("batch mlp", hidden, key, 0.5)
    return x + ft.einsum("batch mlp, mlp embed -> batch embed", hidden, w["down"])


def operands(dtype=torch.float64) -> tuple[dict, Tensor]:
    make = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return {"up": 0.4 * make(4, 8), "down": 0.4 * make(8, 4)}, make(3, 4)


def close(ours, theirs) -> None:
    for x, y in zip(ft.tree.leaves(ours), ft.tree.leaves(theirs), strict=True):
        # float64: named einsums and plain matmuls may sum in another order
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)


def equal(ours, theirs) -> None:
    for x, y in zip(ft.tree.leaves(ours), ft.tree.leaves(theirs), strict=True):
        assert torch.equal(x, y)


def plain_backward(loss):
    def fn(w, x):
        leaves = ft.tree.map(lambda leaf: leaf.detach().clone().requires_grad_(), (w, x))
        loss(*leaves).backward()
        return ft.tree.map(lambda leaf: leaf.grad, leaves)

    return fn


def of_sum(fn):
    return lambda w, x: (fn(w, fn(w, x)) ** 2).sum()


def of_row(fn):
    return lambda w, row: (fn(w, row[None]) ** 2).sum()


TRANSFORMS = {
    "value": lambda fn: fn,
    "ft.grad": lambda fn: ft.grad(of_sum(fn), (0, 1)),
    "torch.func.grad": lambda fn: torch.func.grad(of_sum(fn), (0, 1)),
    "vjp": lambda fn: lambda w, x: torch.func.vjp(fn, w, x)[1](torch.ones_like(x)),
    "vjp of one argument": lambda fn: lambda w, x: torch.func.vjp(lambda x: fn(w, x), x)[1](torch.ones_like(x)),
    "backward": lambda fn: plain_backward(of_sum(fn)),
    "jacrev": lambda fn: torch.func.jacrev(fn, (0, 1)),
    "hvp": lambda fn: lambda w, x: ft.hvp(of_sum(fn), (w, x), (w,)),
    "hessian": lambda fn: torch.func.jacrev(torch.func.grad(of_sum(fn), 1), 1),
    "grad of ft.hvp": lambda fn: ft.grad(lambda w, x: (ft.hvp(of_sum(fn), (w, x), (w,))["up"] ** 2).sum()),
    "vmap of grad": lambda fn: torch.func.vmap(torch.func.grad(of_row(fn)), (None, 0)),
    "ft.vmap of ft.grad": lambda fn: ft.vmap(ft.grad(of_row(fn)), (None, 0), axis="batch"),
    "grad of vmap": lambda fn: torch.func.grad(lambda w, x: torch.func.vmap(of_row(fn), (None, 0))(w, x).sum(), (0, 1)),
    "hvp of vmap": lambda fn: (
        lambda w, x: ft.hvp(lambda w, x: torch.func.vmap(of_row(fn), (None, 0))(w, x).sum(), (w, x), (w,))
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_remat_changes_no_value_and_no_derivative(policy):
    rematerialized = ft.remat(layer, policy=POLICIES[policy])
    for name, transform in TRANSFORMS.items():
        try:
            close(transform(rematerialized)(*operands()), transform(layer)(*operands()))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("policy", POLICIES)
def test_nested_remat_changes_no_derivative(policy):
    twice = lambda f: lambda w, x: f(w, f(w, x))
    nested = ft.remat(twice(ft.remat(layer, policy=POLICIES[policy])), policy=P.dots_saveable)
    for name in ("ft.grad", "torch.func.grad", "backward", "hvp", "vmap of grad"):
        close(TRANSFORMS[name](nested)(*operands()), TRANSFORMS[name](twice(layer))(*operands()))


def test_gradients_are_bitwise_where_the_same_kernels_run():
    plain, again = (TRANSFORMS["ft.grad"](fn)(*operands(torch.float32)) for fn in (layer, ft.remat(layer)))
    equal(again, plain)


def test_arguments_may_be_anything_and_results_trees():
    def fn(w, x, power, *, key, flags=None):
        noise = ft.dropout("batch embed", x, key, 0.25)
        return {"y": noise**power, "count": key.sum(), "same": x, "static": (power, flags)}

    def total(fn):
        def loss(w, x):
            out = fn(w, x, 2, key=ft.random.key(3))
            assert out["static"] == (2, None) and not out["count"].requires_grad
            return (out["y"] * out["same"]).sum()

        return loss

    for grad in (ft.grad, torch.func.grad):
        ours, theirs = grad(total(ft.remat(fn)), 1)(*operands()), grad(total(fn), 1)(*operands())
        equal(ours, theirs)
    unused = ft.grad(lambda w, x: ft.remat(fn)(w, x, 2, key=ft.random.key(3))["y"].sum())(*operands())
    assert not any(leaf.any() for leaf in ft.tree.leaves(unused))


def test_backward_runs_on_a_thread_with_an_empty_context():
    for policy in POLICIES.values():

        def pull(mesh, policy=policy):
            w, x = operands()
            fn = ft.spmd(ft.remat(layer, policy=policy), mesh=mesh, rules=RULES)
            w = ft.shard(w, {"up": "embed mlp", "down": "mlp embed"}, mesh=mesh, rules=RULES)
            _, back = torch.func.vjp(fn, w, ft.shard(x[:2], "batch embed", mesh=mesh, rules=RULES))
            found = []
            thread = threading.Thread(
                target=contextvars.Context().run, args=(lambda: found.append(back(torch.ones(1, 4).double())),)
            )
            thread.start()
            thread.join()
            return ft.unshard(found[0][0], {"up": "embed mlp", "down": "mlp embed"}, mesh=mesh, rules=RULES)

        w, x = operands()
        expected = torch.func.vjp(layer, w, x[:2])[1](torch.ones(2, 4).double())[0]
        for of_rank in ft.simulate(fsdp=2)(pull)():
            close(of_rank, expected)


# ------------------------------------------------------------------------------------------------ meshes


def llama_loss(block, config=CONFIG, rate: float = 0.0):
    def with_dropout(params, x, config, positions, segments, key=None):
        x = LLAMA.block(params, x, config, positions, segments)
        return ft.dropout("batch seq embed", x, key, rate) if rate else x

    wrapped = block(with_dropout)

    def loss(params, batch, key):
        keys = iter([ft.random.fold_in(key, i) for i in range(config.num_layers)])
        each = lambda *args: wrapped(*args, key=next(keys))
        total, count = LLAMA.loss(params, batch, config, block=each)
        return total / count

    return loss


def batch_of(rows: int = 4, length: int = 16) -> dict[str, Tensor]:
    tokens = torch.randint(0, 128, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens[:, :-1].clone(), "labels": tokens[:, 1:].clone()}


@pytest.mark.parametrize("sizes", [dict(fsdp=2), dict(tp=2), dict(fsdp=2, tp=2)], ids=str)
def test_remat_changes_nothing_on_any_mesh_and_its_randomness_replays(sizes):
    def run(mesh):
        params = ft.init(LLAMA.params(CONFIG), ft.random.key(0), mesh=mesh, rules=RULES)
        params = ft.tree.map(lambda x: x.double(), params)
        batch = ft.shard(batch_of(), "batch seq", mesh=mesh, rules=RULES)
        found = {}
        for name, policy in {None: None, "named": P.save_only_these_names("attn_out"), **POLICIES}.items():
            if name in ("names", "everything"):
                continue
            block = (lambda fn: fn) if policy is None else functools.partial(ft.remat, policy=policy)
            loss = llama_loss(block, rate=0.25)
            with ft.record() as ledger:
                value = ft.spmd(ft.value_and_grad(loss), mesh=mesh, rules=RULES)(params, batch, ft.random.key(1))
            found[name] = value, list(ledger)
        return found

    of_ranks = ft.simulate(**sizes)(run)()
    for found in of_ranks:
        expected, _ = found[None]
        for name in ("nothing", "named", "dots", "budget"):
            close(found[name][0], expected)
    found = of_ranks[0]
    declared, key = LLAMA.params(CONFIG), ft.random.key(1)
    double = ft.tree.map(lambda p: dataclasses.replace(p, dtype=torch.float64), declared)
    for name in ("nothing", "dots"):
        grad = ft.grad(llama_loss(functools.partial(ft.remat, policy=POLICIES[name]), rate=0.25))
        predicted = ft.explain(
            grad, double, batch_of(), key, mesh=sizes, rules=RULES, patterns=(None, "batch seq", None)
        )
        assert list(predicted) == found[name][1]
        again = [e for e in predicted if e.recomputed]
        assert {e.phase for e in again} <= {"backward"}
        first = [e._replace(phase="backward", recomputed=True) for e in found[name][1] if e.phase == "forward"]
        assert set(again) <= set(first)
    recomputed = {name: sum(e.recomputed for e in found[name][1]) for name in ("nothing", "dots")}
    assert 0 <= recomputed["dots"] < recomputed["nothing"]
    assert not any(e.recomputed for e in found[None][1])


def test_per_example_gradients_on_a_mesh():
    rules = RULES.replace(embed=None)

    def run(mesh):
        w, x = operands()
        x = ft.shard(torch.cat([x, x[:1]]), "batch embed", mesh=mesh, rules=rules)

        def each(fn):
            row = lambda w, x: ft.reduce(
                "embed ->", ft.einsum("embed, embed mlp -> mlp", x, fn(w["up"])).tanh().square() @ w["down"]
            )
            return ft.spmd(ft.vmap(ft.grad(row), (None, 0), axis="batch"), mesh=mesh, rules=rules)(w, x)

        scaled = lambda w: ft.einsum("embed mlp, embed mlp -> embed mlp", w, w)
        return each(ft.remat(scaled, policy=P.dots_saveable)), each(scaled)

    for ours, theirs in ft.simulate(dp=2)(run)():
        close(ours, theirs)


# ------------------------------------------------------------------------------------------------ memory


def explained(policy, layers: int, sizes=None):
    """The ledger of the embedding's gradient, so that gradients of layers do not hide what activations take."""
    config = CONFIG._replace(num_layers=layers)
    block = LLAMA.block if policy is None else ft.remat(LLAMA.block, policy=policy)

    def loss(embedding, params, batch):
        total, count = LLAMA.loss({**params, "embedding": embedding}, batch, config, block=block)
        return total / count

    declared = LLAMA.params(config)
    embedding = declared.pop("embedding")
    return ft.explain(
        ft.grad(loss), embedding, declared, batch_of(8, 32), mesh=sizes or dict(fsdp=1), rules=RULES,
        patterns=(None, None, "batch seq"),
    )  # fmt: skip


def activations(ledger) -> int:
    """Bytes at the peak besides the arguments and the one gradient, of the embedding, which a rank holds whole."""
    return ledger.peak_bytes - ledger.argument_bytes - CONFIG.padded_vocab * CONFIG.embed * 4


def test_peak_activation_memory_of_a_llama_barely_grows_with_depth():
    two, many = (activations(explained(P.nothing_saveable, n)) for n in (2, 12))
    assert many <= 1.5 * two
    assert activations(explained(None, 12)) > 4 * activations(explained(None, 2))


def test_policies_store_more_and_more():
    order = P.nothing_saveable, P.save_only_these_names("attn_out"), P.dots_saveable, P.everything_saveable
    peaks = [explained(policy, 4).peak_bytes for policy in order]
    assert peaks == sorted(peaks) and len(set(peaks)) == 4


ROWS, EMBED, MLP = 512, 8, 128


def wide(w: dict, x: Tensor) -> Tensor:
    hidden = ft.checkpoint_name(ft.einsum("batch embed, embed mlp -> batch mlp", x, w["up"]), "hidden").tanh()
    return x + ft.einsum("batch mlp, mlp embed -> batch embed", hidden.sin() * hidden, w["down"])


def stack(policy, layers: int):
    """The gradient of a stack's input, and its arguments."""
    block = wide if policy is None else ft.remat(wide, policy=policy)
    grad = ft.grad(lambda x, ws: (functools.reduce(lambda x, w: block(w, x), ws, x) ** 2).sum())
    ws = [{"up": torch.full((EMBED, MLP), 0.01), "down": torch.full((MLP, EMBED), 0.01)} for _ in range(layers)]
    return grad, (torch.ones(ROWS, EMBED), ws)


def test_the_recomputation_survives_the_passes_of_a_captured_step():
    def taken(policy, layers, **options):
        grad, args = stack(policy, layers)
        ledger = ft.explain(ft.jit(grad, backend="graph", **options), *args, mesh=dict(fsdp=1), rules=RULES)
        return ledger.peak_bytes - ledger.argument_bytes  # the gradient of x, the size of one x, is among them

    two, many = taken(P.nothing_saveable, 2), taken(P.nothing_saveable, 12)
    assert many <= 1.5 * two
    policies = P.nothing_saveable, P.save_only_these_names("hidden"), P.dots_saveable, None
    peaks = [taken(policy, 5, skip=["compute_again"]) for policy in policies]  # which makes again what None stores
    # dots store each block's result besides, which no backward reads: captured, it is not stored at all
    assert peaks[0] < peaks[1] <= peaks[2] < peaks[3]
    assert peaks[-1] > 1.5 * many


def test_the_recomputation_survives_inductor():
    def peak(policy, layers):
        grad, args = stack(policy, layers)
        compiled = ft.jit(grad)
        close32(compiled(*args), grad(*args))
        return most_allocated(lambda: compiled(*args))

    two, many, without = peak(P.nothing_saveable, 2), peak(P.nothing_saveable, 12), peak(None, 6)
    assert many <= 1.5 * two and without > 1.5 * many  # that of half the layers


def close32(x: Tensor, y: Tensor) -> None:
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)  # float32, fused kernels


def most_allocated(fn) -> int:
    """The most bytes that a call has allocated at once, by the allocator's own events."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fn()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def test_a_budget_is_kept_and_used():
    block = 3 * 8 * 8  # bytes of the first product of `layer`; the second has half of them
    stored = []

    def bytes_of(policy):
        rematerialized = ft.remat(layer, policy=policy)
        x, w = operands()[1], ft.tree.map(lambda leaf: leaf.requires_grad_(), operands()[0])
        node = rematerialized(w, x).grad_fn
        return sum(t.numel() * t.element_size() for t in node.saved_tensors[3:])  # after the arguments

    for limit in (0, block // 2 - 1, block // 2, block, block + block // 2, 10 * block):
        stored.append(bytes_of(P.budget(limit)))
        assert stored[-1] <= limit
    assert stored == [0, 0, block // 2, block // 2, block + block // 2, block + block // 2]  # the better ratio first
    assert bytes_of(P.dots_saveable) == stored[-1] and bytes_of(P.nothing_saveable) == 0


def test_a_budget_spares_collectives_first():
    free = explained(P.nothing_saveable, 1, sizes=dict(tp=2))
    rich = explained(P.budget(2**30), 1, sizes=dict(tp=2))
    again = [sum(e.recomputed for e in ledger if e.collective == "reduce_scatter") for ledger in (free, rich)]
    assert again[0] == 2 and again[1] == 0  # of the products that end attention and the MLP


@pytest.mark.parametrize("sizes", [dict(fsdp=2), dict(tp=2), dict(dp=2, tp=2)], ids=str)
def test_a_policy_is_told_the_work_of_one_rank(sizes):
    asked = []
    loss = of_sum(ft.remat(layer, policy=lambda made: asked.append((made.is_dot, made.flops))))
    params = {"up": ft.Param("embed mlp", (4, 8)), "down": ft.Param("mlp embed", (8, 4))}
    ft.explain(ft.grad(loss), params, ft.Param("batch embed", (8, 4)), mesh=sizes, rules=RULES)
    work = 2 * 8 * 4 * 8 // math.prod(sizes.values())  # each product, over all ranks, once
    assert {*asked} == {(True, work), (False, 0)}


def test_naming_an_op_spares_it():
    policy = P.save_only_these_names("y")
    fn = lambda w, x: ft.checkpoint_name(ft.einsum("batch embed, embed mlp -> batch mlp", x, w), "y").tanh()
    loss = lambda fn: lambda w, x: ft.reduce("batch mlp ->", fn(w, x))
    args = ft.Param("embed mlp", (8, 16)), ft.Param("batch embed", (4, 8))
    count = lambda fn: sum(
        e.recomputed for e in ft.explain(ft.grad(loss(fn), (0, 1)), *args, mesh=dict(fsdp=2), rules=RULES)
    )
    assert count(ft.remat(fn)) == 1 and count(ft.remat(fn, policy=policy)) == 0


def test_offload_changes_no_gradient():
    for name in ("nothing", "names", "dots"):
        moved = ft.remat(layer, policy=POLICIES[name], offload=True)
        for transform in ("ft.grad", "torch.func.grad", "hvp", "vmap of grad"):
            close(TRANSFORMS[transform](moved)(*operands()), TRANSFORMS[transform](layer)(*operands()))


def test_a_recomputation_is_marked_and_apart_and_passes_merge_within_it():
    grad, args = stack(P.nothing_saveable, 2)
    nodes = ft.jit(grad, backend="graph").graph(*args).graph.nodes
    tanh = [n.meta.get("custom", {}).get("recomputation") for n in nodes if n.target is torch.ops.aten.tanh.default]
    assert tanh == [None, None, 1, 2]
    up = lambda w, x: ft.einsum(DOWN, ft.einsum(UP, x, w).tanh(), w)
    loss = lambda w, x: ft.reduce("batch embed ->", ft.remat(up)(w, x).square())
    declared = ft.Param("embed mlp", (8, 16)), ft.Param("batch embed", (4, 8))
    explain = lambda fn: ft.explain(fn, *declared, mesh=dict(fsdp=2), rules=RULES)
    gathers = [[(e.phase, e.recomputed) for e in explain(fn) if e.collective == "all_gather"]
               for fn in (ft.grad(loss), ft.jit(ft.grad(loss)))]  # fmt: skip
    forward, again, backward = ("forward", False), ("backward", True), ("backward", False)
    assert gathers == [[forward, forward, again, again, backward], [forward, again]]


UP, DOWN = "batch embed, embed mlp -> batch mlp", "batch mlp, embed mlp -> batch embed"


# ------------------------------------------------------------------------------------------------ mistakes


def text_of(call) -> str:
    with pytest.raises(ft.FunctitanError) as caught:
        call()
    return str(caught.value)


def squared(x: Tensor) -> Tensor:
    return x**2


ALL = "nothing_saveable, everything_saveable, dots_saveable, save_only_these_names('attn_out'), budget(64 * 2**20)"


def test_mistakes_are_named():
    assert text_of(lambda: ft.remat(layer, policy="dots_savable")) == (
        "ft.remat of layer:\n"
        "  - policy is 'dots_savable' (did you mean 'dots_saveable'?)\n"
        f"  Fix: take one of ft.remat_policies: {ALL}"
    )
    assert text_of(lambda: ft.remat(layer, policy=P.budget)) == (
        "ft.remat of layer:\n"
        "  - policy is budget itself\n"
        "  Fix: call it: save_only_these_names('attn_out'), budget(64 * 2**20)"
    )
    assert text_of(lambda: P.budget(1e9)) == (
        "budget:\n"
        "  - bytes is 1000000000.0, not an int of at least 0\n"
        "  Fix: give what one call may store: budget(64 * 2**20)"
    )
    assert text_of(P.save_only_these_names) == (
        "save_only_these_names:\n  - the names are ()\n  Fix: give texts: save_only_these_names('attn_out', 'mlp_out')"
    )
    assert text_of(lambda: ft.checkpoint_name(torch.ones(1), 3)) == (
        "ft.checkpoint_name:\n  - the name is 3\n  Fix: give a text: checkpoint_name(x, 'attn_out')"
    )
    missing = ft.remat(layer, policy=P.save_only_these_names("hiden", "hidden"))
    assert text_of(lambda: TRANSFORMS["ft.grad"](missing)(*operands())) == (
        "ft.remat of layer:\n"
        "  - nothing in it has the checkpoint_name 'hiden' (did you mean 'hidden'?)\n"
        "  Fix: its names are ['hidden']"
    )
    assert text_of(lambda: torch.func.jvp(ft.remat(squared), (torch.ones(2),), (torch.ones(2),))) == (
        "ft.remat of squared:\n  - forward mode through it is not supported\n  Fix: take ft.hvp, or torch.func.jacrev"
    )


@pytest.mark.parametrize("grad", [ft.grad, torch.func.grad])
def test_a_differentiated_tensor_that_is_no_argument_is_an_error(grad):
    def loss(w):
        def inner(x):
            return (x * w["a"]).sum()

        return ft.remat(inner)(torch.ones(2))

    def twice(w):
        by_partial = functools.partial(lambda w, x: (x * w["a"]).sum(), w)
        return ft.remat(lambda x: by_partial(x))(w["a"])

    text = "closes over 'w.a', a tensor (2,) that is differentiated and would get no gradient"
    assert text in text_of(lambda: grad(lambda w: loss(w) + w["a"].sum())({"a": torch.ones(2)}))
    assert "closes over 'by_partial" in text_of(lambda: grad(twice)({"a": torch.ones(2)}))


WEIGHT = torch.ones(2, requires_grad=True)


def test_a_global_that_requires_grad_is_an_error():
    text = "a tensor that it reaches, but that is no argument, is differentiated and would get no gradient"
    assert text in text_of(lambda: ft.grad(ft.remat(lambda x: (x * WEIGHT).sum()))(torch.ones(2)))
