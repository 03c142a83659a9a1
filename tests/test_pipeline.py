"""The laws of running pipelines: every schedule gives the gradients of plain accumulation, in the order that it says.

The oracle is `ft.accumulate` of the whole model without a mesh (tests/test_accumulate.py holds it against torch's own).
"""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipelines import (
    DECLARED,
    EXAMPLES,
    LAYERS,
    NAMES,
    RULES,
    batch,
    by_path,
    expected,
    layer,
    loss,
    run,
    schedule_of,
    stages,
)
from programs import named

import functitan as ft
from functitan.errors import CaptureError, CollectiveError, FunctitanError, MeshError
from functitan.pipeline import Stage, step
from functitan.testing import assert_trees_all_close
from functitan.testing.strategies import pipeline_schedules

MICROBATCHES = {2: (1, 2, 4), 4: (4, 8)}  # by the number of ranks


def agrees(found, microbatches: int, examples: int = EXAMPLES) -> None:
    """Every rank has the sums of the whole batch, and together they have every gradient."""
    sums, grads = expected(microbatches, examples)
    for its, own in found:
        assert_trees_all_close(its, sums)  # float64: 1e-10
        assert_trees_all_close(own, {path: grads[path] for path in own})
    assert {path for _, own in found for path in own} == set(grads)


def possible(name: str, ranks: int, per_rank: int, microbatches: int):
    """The schedule, or `None` where there is none of these numbers."""
    try:
        return schedule_of(name, ranks, per_rank, microbatches)
    except FunctitanError:
        return None


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_gives_the_gradients_of_accumulation(name, ranks):
    """With one and two stages per rank: a tied leaf, a mask and dropout in the stages, aux in the loss."""
    found = [
        (schedule, microbatches)
        for per_rank in (1, 2)
        for microbatches in MICROBATCHES[ranks]
        if (schedule := possible(name, ranks, per_rank, microbatches)) is not None
    ]
    assert found
    for schedule, microbatches in found:
        schedule.check()
        agrees(ft.simulate(pp=ranks)(run)(schedule), microbatches)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_valid_schedule_gives_the_gradients_of_accumulation(data):
    """Stages anywhere, backward whole or split for each microbatch, actions in any order that can run."""
    schedule = data.draw(pipeline_schedules())
    found = ft.simulate(pp=schedule.num_ranks)(run)(schedule, examples=12)
    agrees(found, schedule.num_microbatches, examples=12)


@pytest.mark.parametrize("gather", [True, False], ids=["gathered once", "gathered by ops"])
@pytest.mark.parametrize("sizes", [dict(pp=2, tp=2), dict(dp=2, pp=2), dict(pp=2, fsdp=2, tp=2)], ids=named)
def test_stages_are_sharded_like_any_program(sizes, gather):
    """Replicas have keys of their own: the oracle is accumulation on the same mesh without `pp`."""
    schedule = schedule_of("interleaved_zero_bubble", 2, 2, 4)
    found = ft.simulate(**sizes)(run)(schedule, gather=gather, layer=no_dropout)
    sums, grads = plain()
    for its, own in found:
        assert_trees_all_close(its, sums)  # float64: 1e-10
        assert_trees_all_close(own, {path: grads[path] for path in own})


def no_dropout(params, x, kept, key):
    return layer(params, x, kept, None)


@functools.cache
def plain():
    params = ft.init(DECLARED, ft.random.key(0))
    (value, (count, aux)), grads = ft.accumulate(functools.partial(loss, layer=no_dropout), 4, aux="sum")(
        params, batch(), None
    )
    return (value, count, aux), by_path(grads)


def test_a_stage_gathers_its_weights_once_and_reduces_once_a_step():
    schedule = schedule_of("1f1b", 2, 1, 4)
    with ft.record() as ledger:
        ft.simulate(pp=2, fsdp=2)(run)(schedule)
    weights = len(ft.tree.leaves(ft.pipeline.declarations(stages(2), schedule, 0)))
    of = lambda kind: [e for e in ledger if e.collective == kind and e.op == "accumulate" and e.mesh_dims == ("fsdp",)]
    assert len(of("all_gather")) == len(of("reduce_scatter")) == weights
    sent = [e for e in ledger if e.collective == "send" and e.op == "pipeline" and "input" in e.pattern]
    rows = 16 // 4 // 2  # of a microbatch, on one of two replicas
    assert [e.bytes for e in sent] == [rows * 8, 8 * rows * 8] * 4  # a mask, and float64 activations, of 8 each


def test_gradients_are_added_in_float32_if_asked():
    """1024 addends of 1.3 in bfloat16 stop at 512, where its numbers are 4 apart; in float32 none is lost."""
    declared = {"w": ft.Param("embed mlp", (4, 4), dtype=torch.bfloat16)}
    matmul = lambda w, x: ft.einsum("batch embed, embed mlp -> batch mlp", x, w)
    one = Stage(declared, lambda params, _, x, key: (ft.reduce("batch mlp ->", matmul(params["w"], x)), 1))
    x = torch.full((1024, 4), 1.3, dtype=torch.bfloat16)
    params, schedule = ft.init(declared, ft.random.key(0)), schedule_of("gpipe", 1, 1, 1024)
    of = lambda dtype: ft.pipeline.value_and_grad([one], schedule, dtype=dtype)(params, x)[1]["w"]
    assert of(torch.float32).dtype == torch.bfloat16
    exact = x[0, 0].double()
    assert (of(torch.float32).double() - exact).abs().max() < 2**-9 * exact
    assert (of(None).double() - exact).abs().max() > 0.1 * exact


# --- the two halves of a backward -----------------------------------------------------------------------------------


def halves(monkeypatch, wrap=lambda fn: fn, microbatches: int = 1):
    """{"F" | "I" | "W": shapes of the matmuls} of one stage of two layers, and its gradients."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: dict[str, list] = {"F": [], "I": [], "W": []}

    class Count(TorchDispatchMode):
        def __init__(self, into):
            super().__init__()
            self.into = into

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm_.default):
                self.into.append((tuple(args[0].shape), tuple(args[1].shape)))
            return func(*args, **(kwargs or {}))

    for name, kind in (("forward", "F"), ("backward", "I"), ("weight_half", "W")):
        plain = getattr(step, name)

        def counted(*args, plain=plain, kind=kind):
            with Count(found[kind]):
                return plain(*args)

        monkeypatch.setattr(step, name, counted)
    actions = [(kind, 0, m) for m in range(microbatches) for kind in "FIW"]
    schedule = ft.pipeline.from_actions([actions])
    _, grads = run(None, schedule, layer=wrap(layer))
    return found, grads


@pytest.mark.parametrize("wrap", [lambda fn: fn, ft.remat], ids=["plain", "remat"])
def test_the_weights_matmuls_run_in_the_second_half_alone(monkeypatch, wrap):
    """Three products each way for two weights a layer: forward, of the input, of the weight; none is computed twice."""
    found, grads = halves(monkeypatch, wrap)
    again = 2 * LAYERS if wrap is ft.remat else 0
    assert len(found["F"]) == 2 * LAYERS + 2
    assert len(found["I"]) == 2 * LAYERS + 1 + again  # the first product, of the table, has no input gradient
    assert len(found["W"]) == 2 * LAYERS + 2
    assert_trees_all_close(grads, expected(1)[1])  # float64: 1e-10


def test_what_waits_holds_operands_and_cotangents_alone():
    """After the first half of x -> tanh(x w) v, of its four activations the two products' operands and cotangents."""
    from functitan.pipeline.passes import backward, forward, weight_half
    from functitan.sharding.context import current

    rows, wide = 64, 256
    weights = [torch.randn(wide, wide) for _ in range(2)]
    sums = [torch.zeros_like(w) for w in weights]

    def fn(ws, xs):
        h = torch.tanh(ft.einsum("batch embed, embed mlp -> batch mlp", xs[0], ws[0]).sin())
        return [ft.einsum("batch embed, embed mlp -> batch mlp", h, ws[1]).cos()], None

    x = torch.randn(rows, wide)
    results, _, its = forward(fn, weights, sums, [x], current(), True)
    backward(its, [torch.ones_like(results[0])])
    assert len(its.sink) == 2 and all(not total.any() for total in sums)
    held = [x for _, product in its.sink._waiting for x in product.args[1]]
    assert sorted(tuple(t.shape) for t in held) == [(rows, wide)] * 4  # x and its product's cotangent, h and its
    weight_half(its)
    assert len(its.sink) == 0
    leaves = [w.clone().requires_grad_() for w in weights]
    torch.tanh((x @ leaves[0]).sin()).matmul(leaves[1]).cos().sum().backward()
    assert_trees_all_close(sums, [w.grad for w in leaves])


# --- time -----------------------------------------------------------------------------------------------------------

COSTS = dict(forward=2, input=3, weight=1)


class Clocks(threading.local):
    now: float = 0.0
    busy: float = 0.0


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble_h1", "zbv", "dualpipev"])
def test_the_bubble_on_a_virtual_clock_is_the_predicted_one(name, monkeypatch):
    """Ranks run for real; their clocks advance by costs, and a message sets its receiver's to its sender's at least."""
    clocks, per_rank = Clocks(), 2 if name in ("interleaved_1f1b", "zbv", "dualpipev") else 1
    schedule = schedule_of(name, 2, per_rank, 4)

    def spends(fn, cost):
        def timed(*args):
            spent = cost(args)
            clocks.now, clocks.busy = clocks.now + spent, clocks.busy + spent
            return fn(*args)

        return timed

    whole = lambda args: COSTS["input"] + COSTS["weight"] * (not args[0].sink._waits)
    monkeypatch.setattr(step, "forward", spends(step.forward, lambda args: COSTS["forward"]))
    monkeypatch.setattr(step, "backward", spends(step.backward, whole))
    monkeypatch.setattr(step, "weight_half", spends(step.weight_half, lambda args: COSTS["weight"]))
    ends: dict[int, tuple[float, float]] = {}
    stamps: dict[tuple, list[float]] = {}

    def rank(mesh):
        transport, me = mesh.transport, mesh.rank

        def post(message, x, to):
            if message.pattern.startswith(("input", "cotangent")):
                stamps.setdefault((me, to, message.pattern), []).append(clocks.now)
            return transport.post(message, x, to)

        def receive(message, device, source):
            pending = transport.receive(message, device, source)

            def wait():
                x = pending.wait()
                clocks.now = max([clocks.now, *stamps.get((source, me, message.pattern), [])])
                return x

            return pending._replace(wait=wait)

        clocks.now = clocks.busy = 0.0
        out = run(mesh._replace(transport=transport._replace(post=post, receive=receive)), schedule)
        ends[me] = clocks.now, clocks.busy
        return out

    agrees(ft.simulate(pp=2)(rank)(), 4)
    makespan = max(now for now, _ in ends.values())
    measured = 1 - sum(busy for _, busy in ends.values()) / (len(ends) * makespan)
    assert measured == pytest.approx(schedule.bubble_fraction(**COSTS), abs=1e-12)


def test_times_of_actions_are_measured():
    schedule = schedule_of("1f1b", 2, 1, 2)
    found: dict[int, list] = {}

    def rank(mesh):
        return run(mesh, schedule, times=found.setdefault(mesh.rank, []))

    ft.simulate(pp=2)(rank)()
    measured = tuple(tuple(found[r]) for r in range(2))
    assert [len(row) for row in measured] == [len(row) for row in schedule.actions]
    assert 0 < schedule.bubble_fraction(measured=measured) < 1


# --- errors ---------------------------------------------------------------------------------------------------------


def raised(kind, sizes, fn) -> str:
    with pytest.raises(kind) as error:
        ft.simulate(**sizes)(fn)()
    return str(error.value)


def test_microbatches_must_divide_the_batch():
    text = raised(FunctitanError, dict(pp=2), lambda mesh: run(mesh, schedule_of("1f1b", 2, 1, 3)))
    assert "ft.pipeline.value_and_grad: 3 microbatches" in text and "batch.x: 16 examples on this rank" in text


def test_the_mesh_has_as_many_ranks_as_the_schedule():
    text = raised(MeshError, dict(pp=2), lambda mesh: run(mesh, schedule_of("1f1b", 4, 1, 4)))
    assert "the schedule is for 4 ranks, the mesh has pp=2" in text


def test_stages_fit_the_schedule_and_each_other():
    schedule = schedule_of("1f1b", 2, 1, 2)
    with pytest.raises(FunctitanError, match="4 stages for a schedule of 2"):
        ft.pipeline.value_and_grad(stages(4), schedule)
    first, second = stages(2)
    other = second._replace(declarations={**second.declarations, "table": ft.Param("mlp embed", (2, 2))})
    with pytest.raises(FunctitanError, match=r"table is Param\('mlp embed', \(12, 8\).* in stage 0, and .* in stage 1"):
        ft.pipeline.declarations([first, other], schedule, 0)
    with pytest.raises(FunctitanError, match=r"stages\[0\] is a function"):
        ft.pipeline.value_and_grad([layer, second], schedule)


def test_parameters_are_those_of_the_place():
    schedule = schedule_of("1f1b", 2, 1, 2)

    def swapped(mesh):
        declared = ft.pipeline.declarations(stages(2), schedule, 1 - mesh.place)
        params = ft.init(declared, ft.random.key(0))
        return ft.spmd(ft.pipeline.value_and_grad(stages(2), schedule), mesh=mesh, rules=RULES)(params, batch())

    text = raised(FunctitanError, dict(pp=2), swapped)
    assert ".down is only in the declarations of place" in text


def test_a_pipeline_is_neither_captured_nor_differentiated():
    schedule = schedule_of("gpipe", 1, 1, 2)
    f, params = ft.pipeline.value_and_grad(stages(1), schedule), ft.init(stages(1)[0].declarations, ft.random.key(0))
    with pytest.raises(CaptureError, match="one graph cannot hold a pipeline"):
        ft.jit(f, donate=())(params, batch())
    with pytest.raises(FunctitanError, match="it is differentiated, or inside a transform"):
        ft.grad(lambda p: f(p, batch())[0][0])(params)


def test_a_pipeline_is_not_explained():
    schedule = schedule_of("1f1b", 2, 1, 2)
    f, declared = ft.pipeline.value_and_grad(stages(2), schedule), ft.pipeline.declarations(stages(2), schedule, 0)
    with pytest.raises(MeshError, match="explain runs one rank"):
        ft.explain(f, declared, batch(), mesh=dict(pp=2), rules=RULES)


def test_a_stage_that_gives_another_shape_than_before_the_run_is_named():
    first, second = stages(2)
    calls: list[int] = []

    def changing(params, x, batch, key):
        calls.append(0)
        edge = first.apply(params, x, batch, key)
        return edge if len(calls) == 1 else {**edge, "x": edge["x"].to(torch.float32)}

    its = [first._replace(apply=changing), second]
    schedule = ft.pipeline.from_actions(
        [[(k, s, m) for m in range(2) for k, s in (("F", 0), ("F", 1), ("B", 1), ("B", 0))]]
    )
    params = ft.init(ft.pipeline.declarations(its, schedule), ft.random.key(0))
    with pytest.raises(FunctitanError, match=r"the result of stage 0:\n.*float32\[8, 8\], not float64\[8, 8\]"):
        ft.pipeline.value_and_grad(its, schedule)(params, batch())


def test_a_stages_own_error_names_the_stage():
    bad = stages(2)[0]._replace(apply=lambda params, x, batch, key: params["nothing"])
    schedule = ft.pipeline.from_actions([[(k, s, 0) for k, s in (("F", 0), ("F", 1), ("B", 1), ("B", 0))]])
    its = [bad, stages(2)[1]]
    params = ft.init(ft.pipeline.declarations(its, schedule), ft.random.key(0))
    with pytest.raises(KeyError) as error:
        ft.pipeline.value_and_grad(its, schedule)(params, batch())
    assert "in stage 0 of 2" in error.value.__notes__[0]


def test_a_failing_rank_ends_the_others_with_an_error_that_names_it():
    fails = threading.Event()

    def failing(params, x, kept, key):
        if threading.current_thread().name == "rank 1" and fails.is_set():
            raise RuntimeError("out of luck")
        return layer(params, x, kept, key)

    texts: dict[int, str] = {}

    def rank(mesh):
        try:
            run(mesh, schedule_of("1f1b", 2, 1, 2))
            fails.set()
            return run(mesh, schedule_of("1f1b", 2, 1, 2), layer=failing)
        except CollectiveError as error:
            texts[mesh.rank] = str(error)
            raise

    assert "out of luck" in raised(RuntimeError, dict(pp=2), rank)
    assert "cotangent of stage 0, microbatch" in texts[0] and "rank 1 failed: RuntimeError: out of luck" in texts[0]


def test_train_step_takes_a_loss_or_a_function_of_gradients():
    f, tx = ft.pipeline.value_and_grad(stages(1), schedule_of("gpipe", 1, 1, 2)), ft.optim.sgd(0.1)
    with pytest.raises(FunctitanError, match="loss_fn is given too"):
        ft.train_step(loss, tx, value_and_grad=f)
    with pytest.raises(FunctitanError, match="accumulate and gradients belong to loss_fn"):
        ft.train_step(None, tx, accumulate=2, value_and_grad=f)


def test_a_bad_number_in_the_leaves_of_one_stage_is_raised_on_all_ranks():
    """Only the last stage's scale gets an infinite gradient; the other rank says that it is another's."""
    schedule = schedule_of("1f1b", 2, 1, 2)

    def blown(params, x, kept, key):
        scale = ft.broadcast("embed -> batch embed", params["scale"] - 1.0, batch=x.shape[0])
        return layer(params, x, kept, None) + torch.sqrt(scale.abs())  # of no effect, with an infinite derivative

    its = [stages(2)[0], stages(2, blown)[1]]

    def rank(mesh):
        tx = ft.optim.sgd(0.1)
        declared = ft.pipeline.declarations(its, schedule, mesh.place)
        state = ft.TrainState.create(declared, tx, ft.random.key(0), mesh=mesh, rules=RULES)
        gradients = ft.pipeline.value_and_grad(its, schedule)

        def finite_below(params, batch, key, scale=None):
            out, grads = gradients(params, batch, key, scale=scale)
            return out, ft.tree.map(lambda g: g.nan_to_num(0, 0, 0), grads) if mesh.place == 0 else grads

        with pytest.raises(ft.NonFiniteError) as error:
            ft.train_step(None, tx, value_and_grad=finite_below)(state, batch())
        return str(error.value)

    first, second = ft.simulate(pp=2)(rank)()
    assert "those of another pipeline stage, whose ranks name them" in first
    assert "gradients.layers.4.scale: " in second
