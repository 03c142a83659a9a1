"""Where tokens lie zigzag, a named op that knows positions gives what one process gives, or says that it cannot."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functitan as ft
from functitan.models import generate, llama
from functitan.ops.move import where_whole

RULES = ft.AxisRules(
    {"batch": "dp", "seq": ("cp", "tp"), "free": None, "other": ("tp", "cp"), "embed": None, "pick": None, "h": None}
)
X = "batch seq embed"
OPS = {  # of x "batch seq embed" and indices "batch" of positions: the function, and the pattern of its result
    "select": (lambda x, at, n: ft.select(f"{X} -> batch embed", x, n), "batch embed"),
    "select of each": (lambda x, at, n: ft.select(f"{X}, batch -> batch embed", x, at), "batch embed"),
    "select from the end": (lambda x, at, n: ft.select(f"{X}, batch -> batch embed", x, -1 - at), "batch embed"),
    "take": (lambda x, at, n: ft.take(f"pick, {X} -> batch pick embed", torch.tensor([0, n]), x), "batch pick embed"),
    "iota": (lambda x, at, n: ft.iota(X, "seq", like=x), X),
    "iota of no tensor": (lambda x, at, n: x + ft.iota("seq", "seq", seq=n + 1).view(1, -1, 1), X),
    "constrain": (lambda x, at, n: ft.constrain(f"{X} -> batch free embed", x).cumsum(1), "batch free embed"),
    "constrain to shards": (lambda x, at, n: ft.constrain(f"{X} -> batch other embed", x), "batch other embed"),
    "constrain, and back": (lambda x, at, n: back(shifted(ft.constrain(f"{X} -> batch free embed", x))), X),
    "where_whole": (lambda x, at, n: where_whole(X, "seq", lambda x: x.cumsum(1), x), X),
    "rearrange": (lambda x, at, n: ft.rearrange("batch seq (h pick) -> seq batch h pick", x, h=1), "seq batch h pick"),
    "reduce": (lambda x, at, n: ft.reduce(f"{X} -> batch embed", x, op="logsumexp"), "batch embed"),
    "einsum": (lambda x, at, n: ft.einsum(f"{X}, {X} -> {X}", x, x), X),
}  # fmt: skip


def shifted(x):
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)


def back(x):
    return ft.constrain(f"batch free embed -> {X}", x)


@settings(max_examples=60)
@given(
    st.data(), st.sampled_from([dict(cp=2), dict(cp=4), dict(cp=2, tp=2), dict(dp=2, cp=2)]), st.sampled_from(list(OPS))
)
def test_an_op_gives_what_one_process_gives(data, mesh, name):
    (fn, pattern), dims = OPS[name], data.draw(st.sampled_from(["cp", ("cp", "tp")]))
    seq = data.draw(st.sampled_from([("cp", "tp"), "cp", None, ("tp", "cp")]))
    rules, length = RULES.replace(seq=seq), 8 * data.draw(st.integers(1, 2))
    x = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = torch.tensor([data.draw(st.integers(0, length - 1)) for _ in range(2)])
    run, n = lambda x, at: fn(x, at, length - 1), length - 1

    expected = run(x, at)

    def rank(own):
        put = lambda x, pattern: ft.shard(ft.zigzag(x, pattern, mesh=own, dims=dims), pattern, mesh=own, rules=rules)
        square = lambda x, at: ft.reduce(f"{pattern} ->", (y := fn(x, at, n)) * y * y)
        both = lambda x, at: (run(x, at), ft.grad(square)(x, at) if expected.is_floating_point() else x)
        program = ft.context_parallel(ft.checked(both), order="zigzag", dims=dims)
        found, grad = ft.spmd(program, mesh=own, rules=rules)(put(x, X), put(at, "batch"))
        whole = partial(ft.unshard, mesh=own, rules=rules)
        order = partial(ft.zigzag, mesh=own, dims=dims, inverse=True)
        return order(whole(found, pattern), pattern), order(whole(grad, X), X)

    y = x.clone().requires_grad_()
    grad = x
    if expected.is_floating_point():
        (grad,) = torch.autograd.grad((run(y, at) ** 3).sum(), y)
    for found, slope in ft.simulate(**mesh)(rank)():
        torch.testing.assert_close(found, expected)  # float64 sums in another order
        torch.testing.assert_close(slope, grad)


@pytest.mark.parametrize("call", ["unshard", "shard"])
def test_inside_shards_and_global_values_know_the_order(call):
    x = torch.arange(16.0).view(2, 8)

    def run(mesh):
        on = dict(mesh=mesh, rules=RULES)

        def inside(x):
            if call == "unshard":
                return ft.unshard(x, "batch seq", **on)
            more = ft.shard(torch.arange(16.0).view(2, 8), "batch seq", **on)
            return ft.constrain("batch seq -> batch free", x - more)

        given = ft.shard(ft.zigzag(x, "batch seq", mesh=mesh), "batch seq", **on)
        return ft.spmd(ft.checked(ft.context_parallel(inside, order="zigzag")), **on)(given)

    for found in ft.simulate(cp=2)(run)():
        assert torch.equal(found, x if call == "unshard" else torch.zeros(2, 8))


REFUSED = {
    "rearrange": lambda x, p, mesh: ft.rearrange("batch seq -> (batch seq)", x),
    "rearrange, outermost": lambda x, p, mesh: ft.rearrange("batch (seq h) -> batch seq h", x, h=1),
    "zigzag": lambda x, p, mesh: ft.zigzag(x, "batch seq", mesh=mesh),
    "generate": lambda x, p, mesh: generate.generate(p, x.long(), CONFIG, max_new_tokens=1, temperature=0),
}
CONFIG = llama.LlamaConfig(61, 8, 1, 2, 2, 4, 16)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_know_names_the_op_and_the_order(name):
    rules = llama.RULES.replace(batch=None, seq=None, h=None)

    def run(mesh):
        params = ft.init(llama.params(CONFIG), ft.random.key(0), mesh=mesh, rules=rules)
        call = ft.context_parallel(lambda x: REFUSED[name](x, params, mesh), order="zigzag")
        return ft.spmd(call, mesh=mesh, rules=rules)(torch.zeros(1, 4))

    with pytest.raises(ft.LayoutError, match=f"{name.partition(',')[0]}.*") as error:
        ft.simulate(cp=2)(run)()
    assert "zigzag" in str(error.value) and "Fix:" in str(error.value)


def test_a_parameter_with_an_axis_of_tokens_lies_in_the_order_of_positions():
    """A table of positions, added to tokens that lie zigzag: every rank would add the rows of others."""
    declared = {"table": ft.Param("seq embed", (8, 3))}

    def run(mesh, fix):
        params = ft.init(declared, ft.random.key(0), mesh=mesh, rules=RULES)

        def program(x, table):
            if fix:
                table = ft.take("seq, free embed -> seq embed", ft.iota("seq", "seq", seq=8), table)
            return x + ft.broadcast("seq embed -> batch seq embed", table)

        x = ft.shard(torch.zeros(2, 8, 3), X, mesh=mesh, rules=RULES)
        step = ft.context_parallel(ft.checked(program), order="zigzag")
        out = ft.spmd(step, mesh=mesh, rules=RULES)(x, params["table"])
        return ft.zigzag(ft.unshard(out, X, mesh=mesh, rules=RULES), X, mesh=mesh, inverse=True)

    with pytest.raises(
        ft.LayoutError, match="'seq' lies zigzag over 2 ranks here, 'seq' lay in the order of positions"
    ):
        ft.simulate(cp=2)(partial(run, fix=False))()
    declared = {"table": ft.Param("free embed", (8, 3))}
    table = ft.init(declared, ft.random.key(0))["table"]
    for found in ft.simulate(cp=2)(partial(run, fix=True))():
        assert torch.equal(found, table.expand(2, 8, 3))
