"""Laws of `ft.profile`: a trace has the program's names and the ledger's collectives; its parts sum to the whole."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functitan as ft
from functitan import profiling
from functitan.breakdown import Breakdown, Span, breakdown, part_of
from functitan.sharding import context

CONFIG = ft.models.llama.DEBUG._replace(num_layers=1, vocab_size=64, embed=32, mlp=64, head_dim=8)
RULES = ft.models.llama.RULES
TX = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-2))
EINSUM = "batch seq embed, embed mlp, embed mlp -> batch seq mlp, batch seq mlp"

NAMES = {  # name, category: part
    ("all_gather[fsdp] einsum a b", "user_annotation"): "communication",
    ("_c10d_functional::wait_tensor", "cpu_op"): "communication",
    ("update", "user_annotation"): "optimizer",
    ("aten::mm", "cpu_op"): "compute",
    ("ft.jit of step", "user_annotation"): "compute",
    ("forward", "user_annotation"): None,
    ("einsum a b", "user_annotation"): None,
    ("autograd::engine::evaluate_function: MmBackward0", "cpu_op"): None,
}
ON_DEVICE = {
    ("ncclDevKernel_AllGather", "kernel"): "communication",
    ("sm90_gemm", "kernel"): "compute",
    ("update", "gpu_user_annotation"): "optimizer",
    ("all_gather[fsdp] einsum a b", "gpu_user_annotation"): None,
}


def loss(params, batch, key):
    return ft.models.llama.loss(params, batch, CONFIG)


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def start(mesh=None):
    state = ft.TrainState.create(ft.models.llama.params(CONFIG), TX, ft.random.key(0), mesh=mesh, rules=RULES)
    return state, ft.shard(batch(), "batch seq", mesh=mesh, rules=RULES)


def names(found, start: str = "") -> list[str]:
    return [span.name for span in found.spans if span.category == "user_annotation" and span.name.startswith(start)]


def collectives(found) -> list[str]:
    return [span.name for span in found.spans if "[" in span.name and span.category == "user_annotation"]


def assert_whole(parts: Breakdown) -> None:
    assert parts.total == pytest.approx(sum(parts[1:]))
    assert min(parts) >= -1e-9  # a difference of sums of seconds


def spans_of(kinds):
    one = st.tuples(st.sampled_from(sorted(kinds)), st.integers(0, 60), st.integers(0, 12))
    return st.lists(one.map(lambda x: Span(x[0][0], x[1], x[1] + x[2], x[0][1])), max_size=25)


@settings(deadline=None)
@given(st.one_of(spans_of(NAMES), spans_of(ON_DEVICE)), st.integers(0, 20), st.integers(20, 80), st.integers(1, 3))
def test_a_breakdown_counts_each_moment_once(spans, first, last, count):
    """Against the time line drawn moment by moment, of a second each."""
    line = {part: numpy.zeros(100, bool) for part in ("communication", "optimizer", "compute")}
    for span in spans:
        part = {**NAMES, **ON_DEVICE}[span.name, span.category]
        assert part_of(span) == part
        if part is not None:
            line[part][int(span.start) : int(span.end)] = True
    seen = slice(first, last)
    sent, updated, worked = (line[part][seen] for part in ("communication", "optimizer", "compute"))
    if any(span.category == "kernel" and max(span.start, first) < min(span.end, last) for span in spans):
        sent = sent & ~worked
    updated = updated & ~sent
    worked = worked & ~sent & ~updated
    parts = breakdown(spans, (first, last), count)
    expected = [last - first, worked.sum(), sent.sum(), updated.sum(), (~(worked | sent | updated)).sum()]
    assert parts == pytest.approx([n / count for n in expected])  # quotients of whole numbers
    assert_whole(parts)


def test_a_breakdown_prints_as_a_table_and_gives_the_mfu():
    parts = Breakdown(0.02, 0.01, 0.004, 0.002, 0.004)
    lines = str(parts).splitlines()
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == [
        "compute",
        "exposed communication",
        "optimizer (phase update)",
        "other",
        "total",
    ]
    assert "10.000 │  50.0%" in str(parts)
    assert parts.mfu(flops=1e9, peak=1e11) == pytest.approx(0.5)
    with pytest.raises(ft.FunctitanError, match="peak 0"):
        parts.mfu(1e9, 0)


def test_the_trace_of_a_step_has_its_phases_and_ops(tmp_path):
    step = ft.train_step(loss, TX)
    plain, profiled = step(*start())[1], []
    state, local = start()
    with ft.profile(tmp_path / "new" / "trace.json.gz", steps=2) as found:
        for _ in range(2):
            state, metrics = step(state, local)
            profiled.append(metrics)
    assert torch.equal(profiled[0]["loss"], plain["loss"])
    with gzip.open(found.path) as file:
        written = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"train_step", "forward", "backward", "update", "aten::mm", f"einsum {EINSUM}"} <= written
    assert names(found, "train_step") == ["train_step"] * 2
    for op in ("rms_norm", "take", "attention", "cross_entropy"):
        assert names(found, op), op
    assert [name for name in names(found) if name in ("forward", "backward", "update")] == [
        "forward",
        "backward",
        "update",
    ] * 2
    parts = found.breakdown
    assert_whole(parts)
    assert parts.compute > 0 and parts.optimizer > 0 and parts.communication == 0
    assert parts.total * 2 >= sum(span.end - span.start for span in found.spans if span.name == "train_step")


@pytest.mark.parametrize(("jitted", "sizes"), [(False, dict(fsdp=2, tp=2)), (True, dict(fsdp=2))])
def test_the_collectives_of_a_trace_are_the_ledgers_in_its_order(jitted, sizes, tmp_path):
    """Of rank 0; no collective of a capture is taken for one that ran."""
    step = ft.train_step(loss if jitted else ft.remat(loss), TX, check=False)
    step = ft.jit(step, donate=0) if jitted else step
    with ft.record() as ledger, ft.profile(tmp_path / "trace.json") as found:
        ft.simulate(**sizes)(lambda mesh: step(*start(mesh)))()
    assert collectives(found) == [entry.name for entry in ledger]
    assert_whole(found.breakdown)
    assert found.breakdown.communication > 0
    written = {event.get("name") for event in json.loads(found.path.read_text())["traceEvents"]}
    assert {f"rank {rank}" for rank in range(2)} <= written
    if jitted:
        assert names(found, "ft.jit of ") == ["ft.jit of train_step.<locals>.step"]
    else:
        assert f"all_gather[fsdp] einsum {EINSUM} (backward) again" in names(found)
        assert f"einsum {EINSUM} (backward)" in names(found)
        assert found.breakdown.optimizer > 0


def test_a_profile_captures_nothing_anew(tmp_path):
    traced = []

    def double(x):
        traced.append(1)
        return x * 2

    jitted = ft.jit(double, backend="graph")
    jitted(torch.ones(2))
    with ft.profile(tmp_path / "trace.json") as found:
        jitted(torch.ones(2))
    assert len(traced) == 1
    assert "aten::mul" in [span.name for span in found.spans] and len(names(found, "ft.jit of ")) == 1


def on_gloo(folder: str):
    """Collectives of an eager and of a compiled step, with what the ledger has, and the breakdowns."""
    mesh = ft.make_mesh(fsdp=2, timeout=120)
    rules = ft.AxisRules({"batch": "fsdp", "embed": "fsdp", "mlp": None})

    def square(params, x):
        y = ft.einsum("batch embed, embed mlp -> batch mlp", x, params)
        return ft.reduce("batch mlp ->", y * y)

    eager = ft.spmd(ft.value_and_grad(square), mesh=mesh, rules=rules)
    args = torch.randn(128, 64), torch.randn(64, 256)  # parts of a whole
    report = []
    for fn in (eager, ft.jit(eager)):
        fn(*args)
        path = Path(folder) / f"{mesh.get_rank()}.json"
        with ft.record() as ledger, ft.profile(path) as found:
            fn(*args)
        sent = [span.name for span in found.spans if part_of(span) == "communication"]
        report.append((sent, [entry.name for entry in ledger], found.breakdown))
    return report


def test_collectives_of_processes_are_in_the_trace_eager_and_compiled(tmp_path):
    for eager, compiled in ft.launch(on_gloo, str(tmp_path), nprocs=2, timeout=300):
        sent, entries, parts = eager
        assert [name for name in sent if "[" in name] == entries and len(entries) == 3
        assert "_c10d_functional::wait_tensor" in sent
        assert_whole(parts)
        assert parts.communication > 0
        sent, entries, parts = compiled
        of_graph = "_c10d_functional::"
        ops = [name.removeprefix(of_graph) for name in sent if name.startswith(of_graph)]
        waits = [name for name in ops if name == "wait_tensor"]
        assert [name.split("_into")[0].rstrip("_") for name in ops if name != "wait_tensor"] == [
            "all_gather",
            "all_reduce",
            "all_to_all_single",  # how a reduce-scatter runs on gloo
        ] and len(waits) == len(entries)
        assert_whole(parts)
        assert parts.communication > 0 and parts.compute > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json"]


def test_without_a_profile_no_span_is_made(monkeypatch):
    assert context.current().around == ()
    monkeypatch.setattr(torch.profiler, "record_function", None)  # a call of it would fail
    monkeypatch.setattr(profiling, "record_function", None)
    step = ft.train_step(loss, TX)
    ft.simulate(fsdp=2)(lambda mesh: step(*start(mesh)))()
    step(*start())


def test_what_a_profile_cannot_do_is_an_error(tmp_path):
    with pytest.raises(ft.FunctitanError, match="steps is 0"), ft.profile(tmp_path / "x", steps=0):
        pass
    with ft.profile(tmp_path / "trace.json") as found:
        with pytest.raises(ft.FunctitanError, match="another one is running"), ft.profile(tmp_path / "y"):
            pass
        with pytest.raises(ft.FunctitanError, match="its body has not ended"):
            _ = found.breakdown
    assert_whole(found.breakdown)
    with pytest.raises(ZeroDivisionError), ft.profile(tmp_path / "failed.json"):
        _ = 1 / 0
    assert not (tmp_path / "failed.json").exists()
    with ft.profile(tmp_path / "trace.json"):  # the failed one has ended
        pass
