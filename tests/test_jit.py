"""Laws of `ft.jit`: a captured step gives what the step gives, sends what it sends, and takes over what is donated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import functitan as ft
from functitan.capture.nodes import is_collective, sent_by

CONFIG = ft.models.llama.DEBUG._replace(num_layers=1, vocab_size=256, embed=64, mlp=128, head_dim=8)
RULES = ft.models.llama.RULES
TX = ft.optim.chain(ft.optim.clip_by_global_norm(0.05), ft.optim.adamw(1e-2, weight_decay=0.1))  # a clip that acts
MESHES = [dict(fsdp=2, tp=2), dict(dp=2, fsdp=2)]  # graphs of a virtual mesh are one for each rank, and slow


def loss(params, batch, key):
    return ft.models.llama.loss(params, batch, CONFIG)


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(0, 256, (8, 33), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}  # two views of one storage, which nobody donates


def losses(step, mesh=None, count: int = 4) -> list[float]:
    state = ft.TrainState.create(ft.models.llama.params(CONFIG), TX, ft.random.key(0), mesh=mesh, rules=RULES)
    local = ft.shard(batch(), "batch seq", mesh=mesh, rules=RULES)
    found = []
    for _ in range(count):
        state, metrics = step(state, local)
        found.append(metrics["loss"].item())
    return found


@pytest.mark.parametrize("donate", [False, True])
def test_a_captured_step_gives_the_losses_of_the_step(donate):
    plain = losses(ft.train_step(loss, TX))
    graph = losses(ft.jit(ft.train_step(loss, TX, donate=donate), donate=0, backend="graph"))
    # the optimizer's kernels are decomposed, and the loss has its own gradient: another rounding
    assert graph == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_captured_step_communicates_and_gives_what_the_step_does_on_every_mesh(sizes):
    def both(mesh):
        step = ft.jit(ft.train_step(loss, TX), donate=0)
        plain = losses(ft.train_step(loss, TX), mesh, 2)
        with ft.record() as ledger:
            captured = losses(step, mesh, 2)
        return plain, captured, list(ledger)

    found = ft.simulate(**sizes)(both)()
    for plain, captured, _ in found:
        assert captured == pytest.approx(plain, abs=1e-5)  # float32, another order of the norm's sum
    declared = ft.TrainState.declare(ft.models.llama.params(CONFIG), TX, ft.random.key(0))
    explain = lambda step: ft.explain(step, declared, batch(), mesh=sizes, rules=RULES, patterns=(None, "batch seq"))
    eager, captured = explain(ft.train_step(loss, TX)), explain(ft.jit(ft.train_step(loss, TX), donate=0))
    unbucketed = explain(ft.jit(ft.train_step(loss, TX), donate=0, skip=["bucket_collectives"]))
    sent = lambda ledger: sorted(str(entry._replace(hidden=False)) for entry in ledger)
    assert sent(unbucketed) == sent(eager) and not any(entry.hidden for entry in eager)
    assert captured.total_bytes() == eager.total_bytes() and len(captured) <= len(eager)
    assert found[0][2] == 2 * list(captured)  # two steps


def test_inductor_gives_the_losses_of_the_step():
    small = CONFIG._replace(num_layers=1)
    of_small = lambda params, batch, key: ft.models.llama.loss(params, batch, small)
    state = lambda: ft.TrainState.create(ft.models.llama.params(small), TX, ft.random.key(0))
    eager, captured = ft.train_step(of_small, TX), ft.jit(ft.train_step(of_small, TX), donate=0)
    first, second = state(), state()
    buffer = second.params["embedding"].data_ptr()
    for _ in range(3):
        (first, ours), (second, theirs) = eager(first, batch()), captured(second, batch())
        assert theirs["loss"].item() == pytest.approx(ours["loss"].item(), abs=1e-5)  # float32, fused kernels
    assert second.params["embedding"].data_ptr() == buffer
    ft.testing.assert_trees_all_close(second.params, first.params, atol=1e-4, rtol=1e-4)


def test_one_graph_for_each_structure_shape_dtype_and_static_value():
    traced = []

    def fn(tree, power):
        traced.append(power)
        return ft.tree.map(lambda x: x**power, tree)

    jitted, x = ft.jit(fn, backend="graph"), torch.full((2,), 3.0)
    assert jitted({"a": x}, 2)["a"].tolist() == [9, 9]
    first = len(traced)
    assert jitted({"a": x + 1}, 2)["a"].tolist() == [16, 16]
    assert len(traced) == first
    for args in (({"a": x}, 3), ({"b": x}, 2), ({"a": x.double()}, 2), ({"a": torch.ones(3)}, 2), ({"a": x}, 2.0)):
        count = len(traced)
        ft.testing.assert_trees_all_close(jitted(*args), fn(*args))
        assert len(traced) > count + 1
        count = len(traced)
        jitted(*args)
        assert len(traced) == count
    assert jitted({"a": x}, 2)["a"].tolist() == [9, 9]


def test_a_jitted_function_inside_another_is_part_of_it():
    inner = ft.jit(lambda x: x * 2)
    outer = ft.jit(lambda x: inner(x) + inner(x), backend="graph")
    assert outer(torch.ones(2)).tolist() == [4, 4]
    assert [n.target for n in outer.graph(torch.ones(2)).graph.nodes].count(torch.ops.aten.mul.Tensor) == 1


def test_passes_can_be_switched_off_by_name():
    fn = lambda x: (x * 2) + (x * 2)
    assert "merge_equal" in ft.jit(fn).passes
    off = ft.jit(fn, skip=["merge_equal"], backend="graph")
    assert "merge_equal" not in off.passes
    muls = [n.target for n in off.graph(torch.ones(2)).graph.nodes].count(torch.ops.aten.mul.Tensor)
    assert muls == 2
    with pytest.raises(ft.CaptureError, match=r"no pass is called 'merge_eqal' \(did you mean 'merge_equal'\?\)"):
        ft.jit(fn, skip=["merge_eqal"])


def test_forward_and_backward_gathers_stay_apart():
    rules = ft.AxisRules({"batch": "fsdp", "embed": "fsdp", "mlp": None})

    def fn(w, x):
        y = ft.einsum("batch embed, embed mlp -> batch mlp", x, w)
        y = ft.einsum("batch mlp, embed mlp -> batch embed", y, w)
        return ft.reduce("batch embed ->", y**2)

    def count(mesh):
        args = (torch.randn(32, 4), torch.randn(2, 64))
        jitted = ft.jit(ft.spmd(ft.grad(fn), mesh=mesh, rules=rules))
        sent = [sent_by(node).message for node in jitted.graph(*args).graph.nodes if is_collective(node)]
        return sorted(message.phase for message in sent if message.collective == "all_gather")

    # two equal gathers of one weight merge in each direction, not across
    assert ft.simulate(fsdp=2)(count)() == [["backward", "forward"]] * 2


def closed_over(x):
    return x * CLOSED


def branches(x):
    if x.sum() > 0:
        return x
    return -x


def asks_for_a_number(x):
    return x * x.max().item()


def has_an_unknown_shape(x):
    return x[x > 0]


def writes(x):
    x.mul_(2)
    return x + 1


def writes_through_a_view(x):
    x[0] = 5.0
    return x.sum()


CLOSED = torch.ones(3)
_DEPENDS = "what runs next depends on a value that is not known while tracing, at "
_LEAVE = "choose by torch.where, or leave .item() and if outside the captured function"
_DONATE = "donate it: ft.jit(fn, donate=...), or write out of place"
ERRORS = [
    (
        closed_over,
        "a tensor (3,) float32 that is no argument is used at ",
        "return x * CLOSED",
        "pass it as an argument: a graph would keep its value of now for ever",
    ),
    (branches, _DEPENDS, "if x.sum() > 0:", _LEAVE),
    (asks_for_a_number, _DEPENDS, "return x * x.max().item()", _LEAVE),
    (has_an_unknown_shape, _DEPENDS, "return x[x > 0]", _LEAVE),
    (writes, "argument 0 is written to, at ", "x.mul_(2)", _DONATE),
    (writes_through_a_view, "argument 0 is written to, at ", "x[0] = 5.0", _DONATE),
]


@pytest.mark.parametrize(("fn", "problem", "line", "fix"), ERRORS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_no_graph_can_hold_is_an_error_that_names_the_line(fn, problem, line, fix):
    x = torch.ones(3)
    with pytest.raises(ft.CaptureError) as caught:
        ft.jit(fn, backend="graph")(x)
    first = fn.__code__.co_firstlineno
    number = next(
        n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if n > first and text.strip() == line
    )
    assert str(caught.value) == f"ft.jit of {fn.__qualname__}:\n  - {problem}{__file__}:{number}: {line}\n  Fix: {fix}"
    assert x.tolist() == [1, 1, 1]


def test_a_donated_argument_is_written_in_place_and_refused_afterwards():
    jitted = ft.jit(lambda tree, y: {"w": tree["w"] + y}, donate=0, backend="graph")
    old = {"w": torch.ones(2)}
    place = old["w"].data_ptr()
    new = jitted(old, torch.ones(2))
    assert new["w"].tolist() == [2, 2] and new["w"].data_ptr() == place
    with pytest.raises(ft.DonatedError) as caught:
        jitted(old, torch.ones(2))
    assert str(caught.value) == (
        "ft.jit:\n  - 0.w was donated to a call of ft.jit: its buffer holds newer values now\n"
        "  Fix: use the state that the step returned, clone what you keep, or make the step with donate=False"
    )
    shared = torch.ones(3)
    with pytest.raises(ft.DonatedError, match=r"1 and 0\.w share a buffer: a donated buffer stands once"):
        jitted({"w": shared[:2]}, shared[1:])
    assert shared.tolist() == [1, 1, 1]


def test_differentiating_through_it_is_an_error():
    jitted = ft.jit(lambda x: (x * x).sum(), backend="graph")
    for call in (lambda: torch.func.grad(jitted)(torch.ones(3)), lambda: jitted(torch.ones(3, requires_grad=True))):
        with pytest.raises(ft.CaptureError) as caught:
            call()
        assert "it is called inside a torch.func transform, or with tensors that require grad" in str(caught.value)
        assert "Fix: transform inside, ft.jit(ft.grad(fn)), or detach() the tensors" in str(caught.value)


def test_nan_in_a_captured_step_raises_and_leaves_the_state_valid():
    def square(params, batch, key):
        return ft.reduce("batch ->", (params["w"] * batch) ** 2), ft.count("batch", batch)

    tx = ft.optim.adamw(0.1)
    state = ft.TrainState.create({"w": ft.Param("batch", (4,))}, tx, ft.random.key(0))
    step = ft.jit(ft.train_step(square, tx), donate=0, backend="graph")
    state, _ = step(state, torch.ones(4))
    before = state.params["w"].clone()
    with pytest.raises(ft.NonFiniteError, match="the loss or a gradient is not finite"):
        step(state, torch.tensor([1.0, torch.nan, 1.0, 1.0]))
    assert torch.equal(state.params["w"], before)
    state, _ = step(state, torch.ones(4))
    assert int(state.step) == 2 and not torch.equal(state.params["w"], before)
