"""`ft.accumulate`: k microbatches are one big batch, on every mesh, and what else it promises.

The oracle of gradients is `Tensor.backward` of the whole batch without a mesh; that of parameters, torch.optim.
"""

from __future__ import annotations

import functools
import math
from collections import Counter

import pytest
import torch
from programs import CONFIG, DECLARED, MATMULS, RULES, loss, matmuls, named, state_of, text

import functitan as ft
from functitan.models import llama
from functitan.ops.replica import one_replica
from functitan.sharding.context import current
from functitan.testing import assert_trees_all_close, first_divergence
from functitan.testing.sharded import on_ranks

STEPS, RATE = 5, 1e-2
MESHES = [
    dict(dp=2), dict(fsdp=2), dict(fsdp=4), dict(dp=2, fsdp=2), dict(fsdp=2, tp=2), dict(tp=2), dict(fsdp=2, cp=2)
]  # fmt: skip


@functools.cache
def expected():
    """Of the whole batch: mean loss, count and gradients, and the parameters after steps of AdamW."""
    leaves, structure = ft.tree.flatten(state_of(None, ft.optim.sgd(1.0)).params)
    leaves = [x.clone().requires_grad_() for x in leaves]
    optimizer, found = torch.optim.AdamW(leaves, RATE, weight_decay=0.1), []
    for _ in range(STEPS):
        total, count = loss(ft.tree.unflatten(structure, leaves), text(), None)
        optimizer.zero_grad()
        (total / count).backward()
        found.append(((total / count).detach(), count, ft.tree.unflatten(structure, [x.grad.clone() for x in leaves])))
        optimizer.step()
    return *found[0], ft.tree.unflatten(structure, [x.detach() for x in leaves])


def microbatches(mesh, k: int):
    """The same of k microbatches, as global values."""
    tx = ft.optim.adamw(RATE, weight_decay=0.1)
    state, batch = state_of(mesh, tx), ft.shard(text(), "batch seq", mesh=mesh, rules=RULES)
    mean = ft.accumulate(loss, k, patterns=DECLARED)
    (value, (count, _)), grads = ft.spmd(mean, mesh=mesh, rules=RULES)(state.params, batch)
    step = ft.train_step(loss, tx, accumulate=k)
    for _ in range(STEPS):
        state, _ = step(state, batch)
    grads, params = ft.unshard((grads, state.params), (DECLARED, DECLARED), mesh=mesh, rules=RULES)
    return value, count, grads, params


def on_gloo(k: int, **sizes: int):
    return microbatches(ft.make_mesh(**sizes), k)


@pytest.mark.parametrize("k", [1, 8])
def test_microbatches_are_one_big_batch_without_a_mesh(k):
    assert_trees_all_close(microbatches(None, k), expected())  # float64: 1e-10


@pytest.mark.parametrize("sizes", MESHES, ids=named)
def test_microbatches_are_one_big_batch_on_virtual_meshes(sizes):
    for found in ft.simulate(**sizes)(microbatches)(4):
        assert_trees_all_close(found, expected())  # float64: 1e-10


def test_microbatches_are_one_big_batch_on_gloo():
    for found in ft.launch(functools.partial(on_gloo, fsdp=2), 4, nprocs=2):
        assert_trees_all_close(found, expected())  # float64: 1e-10


def by_definition(params, batch, k, loss):
    """By public ops alone: weights broadcast to `replica`, microbatches under `ft.vmap`, sums reduced at the end."""
    copies = ft.tree.map(lambda p, x: ft.broadcast(f"{p.pattern} -> replica {p.pattern}", x), DECLARED, params)
    size, sums = batch["tokens"].shape[0] // k, None
    for i in range(k):
        part = ft.tree.map(lambda x: x[i * size : (i + 1) * size].unsqueeze(0), batch)  # noqa: B023
        of_replica = ft.vmap(lambda params, part: loss(params, part, None), axis="replica")

        def total(copies):
            value, count = of_replica(copies, part)  # noqa: B023
            return value.sum(), (value, count)

        (_, scalars), grads = ft.value_and_grad(total, has_aux=True)(copies)
        sums = (scalars, grads) if sums is None else ft.tree.map(torch.add, sums, (scalars, grads))
    (value, count), grads = sums
    value, count = ft.reduce("replica ->", value), ft.reduce("replica ->", count)
    reduce = lambda p, g: ft.reduce(f"replica {p.pattern} -> {p.pattern}", g) / count
    return value / count, count, ft.tree.map(reduce, DECLARED, grads)


@pytest.mark.parametrize("sizes", [dict(fsdp=2, tp=2), dict(fsdp=2, cp=2)], ids=named)
def test_accumulate_is_a_vmap_over_the_replica_axis(sizes):
    """Values, and the collectives: a replica's own program has those of the vmap, and so have broadcast and sum."""
    params = state_of(None, ft.optim.sgd(1.0)).params
    ledgers, found = [], []
    for rules, fn in (
        (RULES, lambda p, b: ft.accumulate(loss, 2, patterns=DECLARED)(p, b)),
        (ft.AxisRules({"replica": RULES["batch"], **dict(RULES.items())}), lambda p, b: by_definition(p, b, 2, loss)),
    ):
        with ft.record() as ledger:
            out = on_ranks(fn, (params, text()), (DECLARED, "batch seq"), None, mesh=sizes, rules=rules)
        ledgers.append(ledger)
        found.append(out)
    for ((value, (count, _)), grads), defined in zip(*found, strict=True):
        assert_trees_all_close((value, count, grads), defined)  # float64: 1e-10
    of_weights = lambda ledger: Counter((e.collective, e.mesh_dims, e.bytes, e.dtype) for e in ledger if e.bytes > 16)
    assert of_weights(ledgers[0]) == of_weights(ledgers[1])


def test_gradients_come_in_the_layout_of_another_table():
    """ZeRO-2: parameters replicated, optimizer state sharded."""
    program, storage = RULES.replace(embed=None), RULES.replace(embed=("fsdp", "dp"))
    run = ft.accumulate(loss, 2, patterns=DECLARED, to_rules=storage)

    def rank(mesh):
        params = state_of(mesh, ft.optim.sgd(1.0), program).params
        batch = ft.shard(text(), "batch seq", mesh=mesh, rules=program)
        _, grads = ft.spmd(run, mesh=mesh, rules=program)(params, batch)
        assert all(4 * x.numel() == math.prod(p.shape) for p, x in zip(leaves, ft.tree.leaves(grads), strict=True))
        return ft.unshard(grads, DECLARED, mesh=mesh, rules=storage)

    leaves = ft.tree.leaves(DECLARED)
    for sizes in (dict(fsdp=4), dict(dp=2, fsdp=2)):
        for grads in ft.simulate(**sizes)(rank)():
            assert_trees_all_close(grads, expected()[2])  # float64: 1e-10


def test_a_count_of_zero_gives_zeros():
    batch = {**text(), "labels": torch.full((16, 16), -100)}
    (mean, (count, _)), grads = ft.accumulate(loss, 4)(ft.init(DECLARED, ft.random.key(0)), batch)
    assert mean == 0 and count == 0 and not any(g.any() for g in ft.tree.leaves(grads))


def dropped(params, x, key):
    """Dropout of a batch, and the key as scalars to be summed."""
    x = ft.dropout("batch embed", x, key, 0.5)
    (total, count) = matmuls(params, x, None)
    return (total, count), {"word": key[1], "keys": 1, "kept": ft.reduce("batch embed ->", (x != 0).double())}


def test_randomness_depends_on_the_size_of_microbatches_alone():
    """Every replica and microbatch has a key of its own, and the same examples have the same masks on every mesh."""
    x = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    declared = ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, p.init, torch.float64), MATMULS)
    params, key = ft.init(declared, ft.random.key(0)), ft.random.key(7)
    whole = ft.accumulate(dropped, 8)(params, x, key)
    words = [int(ft.random.fold_in(key, i)[1]) for i in range(8)]
    assert len(set(words)) == 8
    assert whole[0][1][1]["word"] == sum(words) and whole[0][1][1]["keys"] == 8
    for sizes, k in ((dict(dp=2), 4), (dict(fsdp=4), 2), (dict(dp=2, fsdp=2), 2), (dict(fsdp=2, tp=2), 4)):
        run = ft.accumulate(dropped, k, patterns=declared)
        results = ((None, (None, None)), declared)
        for found in on_ranks(run, (params, x, key), (declared, "batch embed", None), results, mesh=sizes, rules=RULES):
            assert_trees_all_close(found, whole)  # float64: 1e-10; another mask would change it in the first digit
        other = on_ranks(
            ft.accumulate(dropped, 2 * k, patterns=declared),
            (params, x, key), (declared, "batch embed", None), results, mesh=sizes, rules=RULES,
        )  # fmt: skip
        assert not torch.equal(other[0][0][1][1]["kept"], whole[0][1][1]["kept"])


def test_aux_is_summed():
    def hits(params, batch, key):
        logits = llama.apply(params, batch["tokens"], CONFIG)
        right = (logits.argmax(-1) == batch["labels"]).double()
        return loss(params, batch, key), {"hits": ft.reduce("batch seq ->", right), "calls": 1, "none": None}

    params = ft.init(DECLARED, ft.random.key(0))
    whole = hits(params, text(), None)[1]["hits"]
    patterns, results = (DECLARED, "batch seq"), ((None, (None, None)), DECLARED)
    run = ft.accumulate(hits, 4, patterns=DECLARED, aux={"hits": "sum", "calls": None, "none": None})
    for (_, (_, aux)), _ in on_ranks(run, (params, text()), patterns, results, mesh=dict(fsdp=2), rules=RULES):
        assert aux["hits"] == whole and aux["calls"] == 8 and aux["none"] is None


def test_sums_may_be_wider_than_parameters():
    """float32 sums of bfloat16 gradients: one rounding at the end."""
    declared = ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, p.init, torch.bfloat16), MATMULS)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    params = ft.init(declared, ft.random.key(0))
    parts = [ft.grad(lambda p, x: matmuls(p, x, None)[0])(params, part) for part in x.split(1)]
    exact = ft.tree.map(lambda *gs: sum(g.double() for g in gs) / 64, *parts)
    _, wide = ft.accumulate(matmuls, 64, dtype=torch.float32)(params, x)
    assert_trees_all_close(wide, ft.tree.map(lambda g: g.bfloat16(), exact), rtol=2**-8, atol=0)  # one rounding
    _, narrow = ft.accumulate(matmuls, 64)(params, x)
    error = lambda grads: max((g - e).abs().max() for g, e in zip(*map(ft.tree.leaves, (grads, exact)), strict=True))
    assert error(narrow) > 2 * error(wide)


@pytest.mark.parametrize("sizes", [None, dict(fsdp=2)], ids=["one process", "fsdp2"])
def test_accumulated_gradients_have_derivatives(sizes):
    """A Hessian-vector product as the gradient of <accumulated gradient, v>."""
    params, v = (ft.init(DECLARED, ft.random.key(i)) for i in range(2))
    mean = lambda params: torch.div(*loss(params, text(), None))
    expected = ft.hvp(mean, (params,), (v,))

    def along(params, v, batch):
        _, grads = ft.accumulate(loss, 2, patterns=DECLARED)(params, batch)
        products = ft.tree.map(lambda p, g, v: ft.einsum(f"{p.pattern}, {p.pattern} ->", g, v), DECLARED, grads, v)
        return sum(ft.tree.leaves(products))

    if sizes is None:
        assert_trees_all_close(ft.grad(along)(params, v, text()), expected, rtol=1e-9, atol=1e-9)  # second derivatives
        return
    patterns = (DECLARED, DECLARED, "batch seq")
    for found in on_ranks(ft.grad(along), (params, v, text()), patterns, DECLARED, mesh=sizes, rules=RULES):
        assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-9)


def test_what_a_replica_makes_is_its_own():
    """Tensors that the function makes itself lie like its batch: a plain torch.ones counts this replica's examples."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    params = ft.init(MATMULS, ft.random.key(0))
    results = ((None, (None, None)), MATMULS)
    run = ft.accumulate(matmuls, 2, patterns=MATMULS)  # its count is made by torch.ones
    for (_, (count, _)), _ in on_ranks(
        run, (params, x), (MATMULS, "batch embed"), results, mesh=dict(fsdp=4), rules=RULES
    ):
        assert count == 16


def test_one_replica_sees_the_rest_of_the_mesh():
    rules = ft.AxisRules({"batch": ("dp", "data"), "embed": ("data", "tp"), "mlp": "tp"})

    def rank(mesh):
        def inside():
            env = one_replica(("dp", "data"))
            assert env.mesh is not None and env.mesh.shape == {"tp": 2}
            assert env.mesh.rank == mesh.index(("tp",))
            assert env.rules == ft.AxisRules({"batch": None, "embed": "tp", "mlp": "tp"})
            assert one_replica(()).mesh == current().mesh
            alone = one_replica(("dp", "data", "tp"))
            return alone.mesh is None and alone.rules is None  # plain torch

        return ft.spmd(inside, mesh=mesh, rules=rules)()

    assert all(ft.simulate(dp=2, data=2, tp=2)(rank)())


def test_the_first_divergence_outside_of_replicas_is_found():
    """Inside, one replica's values are compared with none; a wrong gradient shows where replicas are merged."""
    x, params = torch.randn(16, 8, dtype=torch.float64), ft.init(MATMULS, ft.random.key(0))
    params = ft.tree.map(lambda p: p.double(), params)

    def local(params, x, key):
        total, count = matmuls(params, x, key)
        return total + (params["up"] ** 2).sum(), count  # no sum over examples: it grows with the number of replicas

    for fn, meshes in ((matmuls, (None, dict(fsdp=2, tp=2))), (local, (dict(dp=2), dict(dp=4)))):
        run = ft.accumulate(fn, 2, patterns=MATMULS)
        found = first_divergence(run, (params, x), *meshes, patterns=(MATMULS, "batch embed"), rules=RULES)
        assert (found is None) if fn is matmuls else (found is not None and found.op == "accumulate"), found
