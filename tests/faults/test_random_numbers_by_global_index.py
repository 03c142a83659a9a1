"""A draw with a pattern is bitwise the slice of what one process draws, on every mesh; a plain one on a mesh raises."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functitan as ft
from functitan.testing.sharded import on_ranks
from functitan.testing.strategies import axis_sizes, meshes, rules_tables

DRAWS = {
    "bits": ft.random.bits,
    "uniform": lambda key, shape=None, **kw: ft.random.uniform(key, shape, low=-1.0, high=2.0, **kw),
    "normal": ft.random.normal,
    "normal_float64": lambda key, shape=None, **kw: ft.random.normal(key, shape, dtype=torch.float64, **kw),
    "bernoulli": lambda key, shape=None, **kw: ft.random.bernoulli(key, 0.3, shape, **kw),
    "randint": lambda key, shape=None, **kw: ft.random.randint(key, shape, -3, 1000, **kw),
}
NORMAL, X, ALL = ft.random.normal, torch.ones(2), slice(0, 2)
KEY, RULES = ft.random.key(7), ft.AxisRules({"batch": "dp", "seq": "cp", "embed": None, "mlp": None})


def same_on_every_rank(found, whole):
    assert all(torch.equal(x, whole) and x.dtype == whole.dtype for x in found)


@settings(max_examples=40)
@given(st.data(), meshes(), rules_tables(("batch", "seq", "embed")), st.sampled_from(sorted(DRAWS)))
def test_on_every_mesh_a_draw_is_the_slice_of_one_process(data, mesh, rules, name):
    sizes = data.draw(axis_sizes(rules, mesh))
    axes = data.draw(st.permutations(sorted(sizes)))[: data.draw(st.integers(0, 3))]
    shape, pattern, draw = [sizes[axis] for axis in axes], " ".join(axes), DRAWS[name]
    whole = draw(KEY, shape)
    assert torch.equal(draw(KEY, shape, pattern=pattern), whole)
    by_shape = lambda _: draw(KEY, shape, pattern=pattern)
    by_like = lambda x: draw(KEY, pattern=pattern, like=x)
    for fn in (by_shape, by_like):
        same_on_every_rank(on_ranks(fn, (torch.ones(shape),), (pattern,), pattern, mesh=mesh, rules=rules), whole)


@settings(max_examples=20)
@given(st.data(), st.sampled_from([dict(cp=2), dict(cp=4), dict(cp=2, tp=2), dict(dp=2, cp=2)]), st.booleans())
def test_in_a_zigzag_order_a_draw_is_that_of_each_token(data, mesh, by_tp):
    dims = ("cp", "tp") if by_tp else "cp"
    rules = RULES.replace(seq=data.draw(st.sampled_from([dims, ("cp",), ("cp", "tp"), ("tp", "cp")])))
    length = 4 * math.prod(mesh.values()) * data.draw(st.integers(1, 2))
    pattern, shape = data.draw(st.sampled_from([("batch seq embed", (2, length, 3)), ("seq", (length,))]))

    def run(own):
        @partial(ft.context_parallel, order="zigzag", dims=dims)
        def drawn(x):
            kept = ft.dropout(pattern, torch.ones_like(x), KEY, 0.5)
            return ft.random.normal(KEY, shape, pattern=pattern), ft.random.bits(KEY, pattern=pattern, like=x), kept

        x = ft.shard(torch.ones(shape), pattern, mesh=own, rules=rules)
        found = ft.unshard(ft.spmd(drawn, mesh=own, rules=rules)(x), pattern, mesh=own, rules=rules)
        return ft.zigzag(found, pattern, mesh=own, dims=dims, inverse=True)

    if not set(mesh) >= set(dims if by_tp else ("cp",)):
        return
    for normal, bits, kept in ft.simulate(**mesh)(run)():
        assert torch.equal(normal, ft.random.normal(KEY, shape))
        assert torch.equal(bits, ft.random.bits(KEY, shape))
        assert torch.equal(kept, ft.dropout(pattern, torch.ones(shape), KEY, 0.5))


def noisy_loss(params, x, key):
    noise = ft.random.normal(key, pattern="batch embed", like=x)
    y = ft.einsum("batch embed, embed mlp -> batch mlp", x + noise, params["w"])
    return ft.reduce("batch mlp ->", y * y), ft.reduce("batch mlp ->", torch.ones_like(y))


def step(mesh, rules, wrap=lambda fn: fn, **options):
    declared, tx = {"w": ft.Param("embed mlp", (8, 4))}, ft.optim.sgd(0.1)
    state = ft.TrainState.create(declared, tx, ft.random.key(0), mesh=mesh, rules=rules if mesh else None)
    data = ft.random.normal(KEY, (8, 8))
    batch = ft.shard(data, "batch embed", mesh=mesh, rules=rules) if mesh else data
    return wrap(ft.train_step(noisy_loss, tx, **options))(state, batch)[1]["loss"].item()


@pytest.mark.parametrize("mesh", [dict(dp=2), dict(dp=4), dict(fsdp=2, tp=2)], ids=str)
def test_a_loss_that_draws_noise_has_the_value_of_one_process(mesh):
    rules = ft.AxisRules({"batch": ("dp", "fsdp"), "mlp": "tp", "embed": "tp"})
    want = [step(None, rules)] * math.prod(mesh.values())
    assert ft.simulate(**mesh)(partial(step, rules=rules))() == pytest.approx(want, rel=1e-5)


def test_a_captured_loss_draws_the_same_noise():
    captured = partial(step, rules=RULES, wrap=partial(ft.jit, donate=0, backend="graph"))
    assert ft.simulate(dp=2)(captured)() == pytest.approx([step(None, RULES)] * 2, rel=1e-5)


def test_replicas_and_microbatches_draw_alike_whoever_computes_them():
    want = step(None, RULES, accumulate=4)
    for mesh, k in ((dict(dp=2), 2), (dict(dp=4), 1), (dict(dp=2, cp=2), 2)):
        rules = RULES.replace(mlp="cp")
        found = ft.simulate(**mesh)(lambda own, k=k: step(own, rules, accumulate=k))()  # noqa: B023
        assert found == pytest.approx([want] * len(found), rel=1e-5)


@pytest.mark.parametrize(
    "wrap", [ft.remat, ft.precision, lambda fn: ft.checked(fn), lambda fn: ft.vmap(fn, axis="mlp")]
)
def test_wrappers_do_not_change_what_is_drawn(wrap):
    fn = lambda x: x + ft.random.normal(KEY, pattern="batch embed", like=x)
    batched = wrap(fn) is not None and "vmap" in getattr(wrap(fn), "__qualname__", "")
    x, pattern = (torch.zeros(3, 4, 2), "mlp batch embed") if batched else (torch.zeros(4, 2), "batch embed")
    found = on_ranks(wrap(fn), (x,), (pattern,), pattern, mesh=dict(dp=2), rules=RULES)
    same_on_every_rank(found, ft.random.normal(KEY, (4, 2)).expand(x.shape))


@pytest.mark.parametrize("keys", ["split", "one"])
@pytest.mark.parametrize("meets", ["plain torch", "a named op"])
def test_over_a_hidden_axis_that_the_mesh_shards(keys, meets):
    """The axis "sample" takes dp, so that the batch beside it is whole: each sample has the numbers of its key."""
    rules = ft.AxisRules({"sample": "dp", "batch": "dp", "embed": None})
    x, given = torch.arange(8.0).view(4, 2), ft.random.split(KEY, 6)

    def of_key(key, x):
        noise = ft.random.normal(key, pattern="batch embed", like=x)
        kept = ft.dropout("batch embed", x, key, 0.5)
        y = (
            kept + noise
            if meets == "plain torch"
            else ft.einsum("batch embed, batch embed -> batch embed", noise, kept)
        )
        return ft.reduce("batch embed -> batch", y)

    each, places = (given, (0, None)) if keys == "split" else (x.expand(6, 4, 2), (None, 0))
    args = (each, x) if keys == "split" else (KEY, each)
    patterns = ("sample two", "batch embed") if keys == "split" else (None, "sample batch embed")
    fn = ft.vmap(of_key, places, axis="sample")
    want = torch.func.vmap(of_key, places)(*args)
    found = on_ranks(fn, args, patterns, "sample batch", mesh=dict(dp=2), rules=rules.replace(two=None))
    for y in found:
        torch.testing.assert_close(y, want)


def test_keys_initializers_and_draws_outside_of_the_mesh_stay():
    own = {
        "w": ft.Param(
            "batch embed", (4, 6), init=lambda key, param, block: ft.random.normal(key, param.shape, block=block)
        )
    }

    def inside(mesh):
        key = ft.random.fold_in(ft.random.split(ft.random.key(3))[0], "noise")
        made = ft.init(own, key, mesh=mesh, rules=RULES)
        whole = ft.init(own, key)["w"]
        block = ft.random.normal(key, (4, 6), block=(slice(0, 2), slice(None)))
        plain = ft.spmd(lambda: ft.random.normal(key, (4, 6)), mesh=None)()
        alone = ft.random.normal(key, (), pattern="")
        return ft.unshard(made, "batch embed", mesh=mesh, rules=RULES)["w"], whole, plain, block, alone

    for made, whole, plain, block, alone in ft.simulate(dp=2)(lambda m: ft.spmd(inside, mesh=m, rules=RULES)(m))():
        assert torch.equal(made, whole) and block.shape == (2, 6) and alone.shape == ()
        assert plain.shape == (4, 6)


@pytest.mark.parametrize("name", sorted(DRAWS))
def test_a_plain_draw_on_a_mesh_names_the_fix(name):
    def run(mesh, fn):
        return ft.spmd(lambda: fn(), mesh=mesh, rules=RULES)()

    with pytest.raises(
        ft.FunctitanError, match=r"(?s)shape \[4, 8\] has no pattern, on a mesh \(dp=2\).*pattern=.*like=x"
    ):
        ft.simulate(dp=2)(run)(lambda: DRAWS[name](KEY, (4, 8)))
    assert ft.simulate(dp=1)(run)(lambda: DRAWS[name](KEY, (4, 8)))[0].shape == (4, 8)


@pytest.mark.parametrize(
    "call, kind, text",
    [
        (lambda: ft.random.normal(KEY), ft.FunctitanError, "neither shape nor like"),
        (lambda: NORMAL(KEY, (2,), like=X, pattern="batch"), ft.FunctitanError, "both shape and like"),
        (lambda: NORMAL(KEY, like=X), ft.FunctitanError, "like is given without a pattern"),
        (lambda: ft.random.bits(KEY, (2,), pattern="batch", block=[ALL]), ft.FunctitanError, "both pattern and block"),
        (lambda: ft.random.bits(KEY, (2,), pattern="batch seq"), ft.PatternError, "names 2 axes"),
        (lambda: ft.random.bits(KEY, pattern="batch", like=torch.ones(2, 2)), ft.PatternError, "names 1 axes"),
        (lambda: ft.random.bits(KEY, pattern="batch", like=3), ft.PatternError, "is no tensor"),
        (lambda: NORMAL(KEY, pattern="batch", like=X.long()), ft.FunctitanError, "dtype=torch.int64"),
        (lambda: ft.random.bits(KEY, (3,), pattern="batch"), ft.LayoutError, "not divisible by 2"),
        (lambda: ft.random.bits(KEY, (4,), pattern="heads"), ft.RulesError, "heads"),
        (lambda: ft.random.randint(KEY, (4,), 3, 3, pattern="batch"), ft.FunctitanError, "low < high"),
        (lambda: ft.random.randint(KEY, (4,), 0, 2**33, pattern="batch"), ft.FunctitanError, "at most 2"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_named_draw_is_one_clear_error(call, kind, text):
    with pytest.raises(kind, match=text):
        ft.simulate(dp=2)(lambda mesh: ft.spmd(call, mesh=mesh, rules=RULES)())()


def test_randint_is_uniform_over_its_range():
    found = ft.random.randint(KEY, (70000,), -3, 4)
    counts = torch.bincount(found + 3, minlength=7).double()
    assert counts.numel() == 7 and ((counts - 10000) ** 2 / 10000).sum() < 22.5  # chi squared, 6 degrees, p = 0.001
    wide = ft.random.randint(KEY, (1000,), -(2**31), 2**31)
    assert wide.min() < -(2**30) and wide.max() > 2**30
