"""A program is captured once: who watches makes none, nor do equal declarations; values that would are told."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import UserDict
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functitan as ft
from functitan.capture import jit as of_steps
from functitan.capture import regional as of_regions
from functitan.capture.nodes import Capture, capturing
from functitan.capture.statics import same
from functitan.ops import types
from functitan.sharding.around import Around
from functitan.sharding.context import current, using
from functitan.sharding.env import Env
from functitan.sharding.ledger import Ledger, entering
from functitan.sharding.program import checks

RULES = ft.AxisRules({"batch": "dp", "seq": "tp", "embed": None, "mlp": "tp"})
TX = ft.optim.sgd(0.1, momentum=0.9)
X = torch.ones(4, 8)


class Holder:
    """What a user may hold a batch in."""

    def __init__(self, x):
        self.x = x


def declared():
    return {"w": ft.Param("embed mlp", (8, 4), ft.param.normal(0.1))}


def loss(params, batch, key):
    y = ft.einsum("batch embed, embed mlp -> batch mlp", batch["x"], params["w"])
    return ft.reduce("batch mlp ->", y * y), ft.reduce("batch mlp ->", torch.ones_like(y))


def create():
    return ft.TrainState.create(declared(), TX, ft.random.key(0))


def profiled(call, folder):
    with ft.profile(folder / "trace.json"):
        return call()


def recorded(call, folder):
    with ft.record():
        return call()


def checked_twice(call, folder):
    ft.checked(call)()
    return ft.checked(call)()


WATCHERS = {
    "nothing": lambda call, folder: call(),
    "ft.profile": profiled,
    "ft.record": recorded,
    "ft.checked, from two lines": checked_twice,
    "both": lambda call, folder: recorded(lambda: profiled(lambda: ft.checked(call)(), folder), folder),
}


@pytest.fixture
def traced(monkeypatch):
    """The names of what is traced."""
    found = []

    def counting(known):
        return lambda *args, **kwargs: found.append(args) or known(*args, **kwargs)

    monkeypatch.setattr(of_steps, "trace", counting(of_steps.trace))
    monkeypatch.setattr(of_regions, "trace_halves", counting(of_regions.trace_halves))
    return found


def captured_step():
    step = ft.jit(ft.train_step(loss, TX, donate=False), backend="graph")
    return lambda: step(create(), {"x": X})  # another state each time, of equal declarations


def captured_step_that_donates():
    step = ft.jit(ft.train_step(loss, TX), donate=0, backend="graph")
    return lambda: step(create(), {"x": X})


def region():
    block = ft.compile(lambda w, x: ft.einsum("batch embed, embed mlp -> batch mlp", x, w), backend="graph")
    return lambda: ft.grad(lambda w: block(w, X).sum())(torch.ones(8, 4))


@pytest.mark.parametrize("make", [captured_step, captured_step_that_donates, region])
def test_who_watches_captures_nothing_anew(make, traced, tmp_path):
    call, counts = make(), {}
    for name, watch in WATCHERS.items():
        watch(call, tmp_path)
        counts[name] = len(traced)
    assert set(counts.values()) == {1}


def test_what_watches_is_no_part_of_the_key():
    env = Env(phase="update", recomputed=True)
    watched = env.inside(entering(Ledger())).inside(checks("a.py:1")).inside(Around(object(), span=nullcontext))
    assert watched != watched.key == env.key == env
    assert env.inside(capturing(Capture())).key != env.key
    kept = {"mesh", "rules", "phase", "recomputed", "vmap_axes", "precision", "lowering", "sequence"}
    assert all(env._replace(**{name: "another"}).key != env.key for name in kept)


def _send_rounded(message, x, env, start):
    wait = start(message._replace(dtype=torch.bfloat16), x.bfloat16())
    return lambda: wait().to(x.dtype)


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial(ft.jit, backend="graph"),
                                  functools.partial(ft.compile, backend="graph"), ft.remat], ids=range(4))  # fmt: skip
@pytest.mark.parametrize("first", [False, True])
def test_a_wing_that_changes_messages_has_programs_of_its_own(wrap, first):
    """The hook is at work inside what is captured, and only where it is around, whichever is captured first."""
    rounded = Around("rounded", message=_send_rounded, changes_programs=True)

    def on_rank(mesh):
        fn = wrap(lambda x: ft.reduce("batch ->", x))

        def run(x, is_rounded):
            with using(current().inside(rounded) if is_rounded else current()):
                return fn(x).item()

        x = ft.shard(torch.tensor([1 + 2**-12, 0.0]), "batch", mesh=mesh, rules=RULES)
        run = ft.spmd(run, mesh=mesh, rules=RULES)
        return [run(x, first), run(x, not first)]

    found = [1.0, 1 + 2**-12] if first else [1 + 2**-12, 1.0]
    assert ft.simulate(dp=2)(on_rank)() == [found] * 2


def test_a_step_that_was_captured_outside_of_a_check_is_compared_at_the_first_checked_call():
    def on_rank(mesh):
        op = "sum" if mesh.rank == 0 else "max"
        jitted = ft.jit(lambda x: ft.reduce("batch ->", x, op=op) if x.dtype == torch.float32 else x, backend="graph")
        jitted.graph(torch.ones(2))  # captured, and not run
        return ft.spmd(ft.checked(jitted), mesh=mesh, rules=RULES)(torch.ones(2))

    with pytest.raises(ft.CollectiveError):
        ft.simulate(dp=2)(on_rank)()


@pytest.mark.parametrize("wrap", [lambda f: f, ft.async_tp], ids=["plain", "async_tp"])
def test_a_ledger_leaves_layouts_known(wrap, monkeypatch):
    """And it has the same patterns, whether they were looked up before or not."""
    resolved, known = [], types._resolved
    monkeypatch.setattr(types, "_resolved", lambda *args: resolved.append(1) or known(*args))
    size = 24 if wrap is ft.async_tp else 40  # of its own: layouts are known by shapes

    def on_rank(mesh):
        f = wrap(lambda x, w: ft.einsum("seq embed, embed mlp -> seq mlp", x, w))
        run = ft.spmd(lambda x, w: ft.grad(lambda w: f(x, w).sum())(w), mesh=mesh, rules=RULES)
        run(torch.ones(size, 8), torch.ones(8, 2))
        mesh.transport.agree("has made the first call")
        count, patterns = len(resolved), []
        for _ in range(2):
            with ft.record() as ledger:
                run(torch.ones(size, 8), torch.ones(8, 2))
            patterns.append(ledger.patterns)
        return patterns, count

    for patterns, count in ft.simulate(tp=2)(on_rank)():
        assert patterns[0] == patterns[1] and ("seq", "embed") in patterns[0]
        assert count == len(resolved) > 0


# --- values that are no tensors --------------------------------------------------------------------------------------

ARRAYS = {
    "an array": ({"ids": np.arange(3)}, "1.ids is a ndarray of shape (3,), not a tensor"),
    "an object with tensors": ({"batch": Holder(torch.ones(2))}, "1.batch is a Holder, which holds tensors or arrays"),
    "a mapping that is no tree": (
        {"batch": UserDict({"x": X})},
        "1.batch is a UserDict, which holds tensors or arrays",
    ),
}


@pytest.mark.parametrize("wrap", [ft.jit, ft.compile])
@pytest.mark.parametrize("given, problem", ARRAYS.values(), ids=ARRAYS)
def test_what_cannot_be_compared_is_refused_before_anything_is_captured(wrap, given, problem, traced):
    f = wrap(lambda x, others: x * 2, backend="graph")
    for _ in range(2):
        with pytest.raises(ft.CaptureError) as caught:
            f(X, given)
        assert problem in str(caught.value) and "torch.as_tensor(x)" in str(caught.value)
    assert not traced


@pytest.mark.parametrize("wrap", [ft.jit, ft.compile])
@pytest.mark.parametrize(
    "value", [float("nan"), np.float32("nan"), 1.5, True, "a", torch.float32, (1, "b"), np.int64(3)]
)
def test_a_value_that_stays_is_one_program(wrap, value, traced):
    f = wrap(lambda x, others: x * 2, backend="graph")
    for _ in range(3):
        f(X, {"value": copy.copy(value) if value == value else type(value)("nan")})
    assert len(traced) == 1


@pytest.mark.parametrize("wrap", [ft.jit, ft.compile])
def test_a_number_that_changes_in_each_call_is_told_once(wrap):
    f = wrap(lambda x, others: x * others["rate"], backend="graph")
    with warnings.catch_warnings(record=True) as words:
        warnings.simplefilter("always")
        for n in range(12):
            f(X, {"rate": 0.5 * n, "flag": n % 2 == 0, "name": "a"})
    (word,) = [w for w in words if "values" in str(w.message)]
    text = str(word.message)
    assert "1.rate had 8 values, the last 3.5: 8 programs" in text and "torch.tensor(x)" in text and "flag" not in text


@given(
    st.one_of(st.floats(), st.integers(), st.booleans(), st.text(), st.none()), st.one_of(st.floats(), st.integers())
)
def test_a_program_serves_a_value_if_and_only_if_it_is_that_value_to_the_bit(x, y):
    assert same(x, copy.deepcopy(x))
    assert same(x, y) == (type(x) is type(y) and repr(x) == repr(y))
