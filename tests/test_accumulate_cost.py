"""What `ft.accumulate` sends and holds: one gather and one reduction for each weight, one microbatch's activations."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from programs import CONFIG, DECLARED, MATMULS, RULES, WEIGHTS, loss, matmuls, named, state_of, text

import functitan as ft
from functitan.models import llama


def explained(k, sizes, fn=matmuls, declared=MATMULS, batch=None, rules=RULES, **options):
    batch = torch.empty(32, 8, device="meta") if batch is None else batch
    pattern = "batch embed" if fn is matmuls else "batch seq"
    step = ft.accumulate(fn, k, patterns=declared, **options)
    return ft.explain(step, declared, batch, None, mesh=sizes, rules=rules, patterns=(declared, pattern, None))


@pytest.mark.parametrize(
    "sizes, forward, backward",
    [
        (dict(fsdp=4), {("all_gather", ("fsdp",)): 1}, {("reduce_scatter", ("fsdp",)): 1}),
        (dict(dp=4), {}, {("all_reduce", ("dp",)): 1}),
        (
            dict(dp=2, fsdp=2),
            {("all_gather", ("fsdp",)): 1},
            {("reduce_scatter", ("fsdp",)): 1, ("all_reduce", ("dp",)): 1},
        ),
    ],
    ids=["fsdp4", "dp4", "dp2-fsdp2"],
)
def test_each_weight_is_gathered_once_and_reduced_once(sizes, forward, backward):
    ledger = explained(4, sizes)
    every = {
        (phase, *key): 2 * n for phase, of in (("forward", forward), ("backward", backward)) for key, n in of.items()
    }
    scalars = ("forward", "all_reduce", tuple(dim for dim in ("dp", "fsdp") if dim in sizes))
    assert Counter((e.phase, e.collective, e.mesh_dims) for e in ledger) == {**every, scalars: 1}
    for entry in ledger:
        if entry.pattern == "replica _scalars -> _scalars":
            assert entry.bytes < 16
        else:
            assert entry.pattern in [
                f"{left} -> {right}"
                for p in MATMULS.values()
                for left, right in ((p.pattern, f"replica {p.pattern}"), (f"replica {p.pattern}", p.pattern))
            ]
    n, whole = 4, 2 * 8 * 12 * 4
    if sizes == dict(fsdp=4):
        assert [e.bytes for e in ledger if e.collective != "all_reduce"] == [(n - 1) * whole // (2 * n)] * 4


def test_a_loop_of_plain_gradients_would_send_twelve_times_a_weight():
    grads = ft.grad(lambda params, x: matmuls(params, x, None)[0])
    one = ft.explain(grads, MATMULS, torch.empty(8, 8), mesh=dict(fsdp=4), rules=RULES, patterns=(None, "batch embed"))
    assert Counter(e.collective for e in one if e.op == "einsum") == {"all_gather": 3, "reduce_scatter": 2}  # no d/dx
    assert len([e for e in explained(4, dict(fsdp=4)) if e.collective != "all_reduce"]) == 4


@pytest.mark.parametrize("sizes", [dict(fsdp=2, tp=2), dict(tp=2), dict(fsdp=2, cp=2)], ids=named)
def test_other_mesh_dims_communicate_for_each_microbatch(sizes):
    """Activations over tp; over cp the weights that the table shards by it, too. Nothing of it goes over fsdp."""
    meta = ft.tree.map(lambda x: x.to("meta"), text())
    two, four = (explained(k, sizes, loss, DECLARED, meta) for k in (2, 4))
    inside, outside = ([e for e in four if (e.op == "accumulate") is own] for own in (False, True))
    times = lambda ledger: Counter((e.phase, e.collective, e.mesh_dims, e.op) for e in ledger if e.op != "accumulate")
    assert times(four) == Counter({key: 2 * n for key, n in times(two).items()})
    assert not any("fsdp" in e.mesh_dims for e in inside)
    assert outside == [e for e in two if e.op == "accumulate"]
    over_fsdp = Counter((e.phase, e.collective) for e in outside if e.mesh_dims == ("fsdp",))
    own = {("forward", "all_gather"): WEIGHTS, ("backward", "reduce_scatter"): WEIGHTS, ("forward", "all_reduce"): 1}
    assert over_fsdp == (own if "fsdp" in sizes else {})


@pytest.mark.parametrize("sizes", [dict(fsdp=2), dict(dp=2, fsdp=2), dict(fsdp=2, tp=2), dict(fsdp=2, cp=2)], ids=named)
def test_explain_predicts_what_is_recorded(sizes):
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(0.01), ft.optim.adamw(1e-2))
    step = ft.train_step(loss, tx, accumulate=2)

    def rank(mesh):
        state, batch = state_of(mesh, tx), ft.shard(text(), "batch seq", mesh=mesh, rules=RULES)
        with ft.record() as ledger:
            step(state, batch)
        return list(ledger)

    state = ft.TrainState.declare(DECLARED, tx, ft.random.key(0))
    predicted = ft.explain(step, state, text(), mesh=sizes, rules=RULES, patterns=(None, "batch seq"))
    assert {e.phase for e in predicted} == {"forward", "backward", "update"}
    for recorded in ft.simulate(**sizes)(rank)():
        assert recorded == list(predicted)


@pytest.mark.parametrize("sizes, copies", [(dict(fsdp=2), 2), (dict(dp=2), 1)], ids=["fsdp2", "dp2"])
def test_memory_is_that_of_one_microbatch_and_one_set_of_gradients(sizes, copies):
    """Peak = fixed + activations / k. Fixed are arguments, sums of gradients, and weights where they are gathered."""
    config = CONFIG._replace(embed=64, head_dim=16, mlp=128)
    tokens = torch.empty(64, 32, dtype=torch.int64, device="meta")
    meta, declared = {"tokens": tokens, "labels": tokens}, llama.params(config)
    fn = lambda params, batch, key: llama.loss(params, batch, config)
    of_k = {k: explained(k, sizes, fn, declared, meta) for k in (1, 2, 4)}
    peak = {k: ledger.peak_bytes for k, ledger in of_k.items()}
    activations = 2 * (peak[1] - peak[2])
    fixed = peak[1] - activations
    whole = sum(4 * math.prod(p.shape) for p in ft.tree.leaves(declared))
    assert peak[4] - fixed == pytest.approx(activations / 4, rel=0.01)  # a few tensors do not shrink with k
    assert activations > 10 * whole  # or the next line would show nothing
    assert fixed == pytest.approx(of_k[1].argument_bytes + copies * whole, rel=0.05)  # as above


def test_gradients_in_a_sharded_layout_take_no_all_reduce():
    """ZeRO-2: parameters are replicated and optimizer state is sharded, over both mesh dims in one collective."""
    program, storage = RULES.replace(embed=None), RULES.replace(embed=("fsdp", "dp"))
    for sizes, over in ((dict(fsdp=4), ("fsdp",)), (dict(dp=2, fsdp=2), ("fsdp", "dp"))):
        ledger = explained(4, sizes, rules=program, to_rules=storage)
        of_weights = [(e.collective, e.mesh_dims, e.phase) for e in ledger if e.bytes > 16]
        assert of_weights == [("reduce_scatter", over, "backward")] * 2


def test_wide_sums_are_reduced_wide():
    declared = ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, p.init, torch.bfloat16), MATMULS)
    batch = torch.empty(32, 8, device="meta", dtype=torch.bfloat16)
    ledger = explained(4, dict(fsdp=4), declared=declared, batch=batch, dtype=torch.float32)
    assert {e.dtype for e in ledger if e.collective == "all_gather"} == {torch.bfloat16}
    assert {e.dtype for e in ledger if e.collective == "reduce_scatter"} == {torch.float32}
