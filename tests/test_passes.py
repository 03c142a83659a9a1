"""Laws of the passes over captured programs: numbers stay, bytes stay, messages get fewer, memory stays bounded."""

from __future__ import annotations

import copy
import math
from functools import cache
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import functitan as ft
from functitan.capture import products
from functitan.capture.compile import compiled
from functitan.capture.nodes import is_collective, sent_by
from functitan.capture.passes.bucket import period
from functitan.capture.passes.table import PASSES, run_passes
from functitan.capture.trace import Program, trace
from functitan.sharding.collectives import all_reduce, reduce_scatter

CONFIG = ft.models.llama.DEBUG._replace(num_layers=2, vocab_size=64, embed=32, mlp=64, head_dim=8)
RULES = ft.models.llama.RULES
PAIRED = dict(fsdp=2, tp=2)  # where every kind of message travels
MESHES = [dict(fsdp=2), dict(tp=2), dict(fsdp=2, tp=2), dict(dp=2, fsdp=2)]
EXACT = [name for name in PASSES if name != "unfuse_attention"]  # which rounds otherwise, in bfloat16 alone
ALONE = [*((name,) for name in EXACT), tuple(PASSES)]
PAIRS = [*ALONE, *combinations(EXACT, 2)]


def loss(params, tokens, labels, config=CONFIG):
    return ft.models.llama.loss(params, {"tokens": tokens, "labels": labels}, config)  # sum, count


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def gradients_of_llama(mesh, config=CONFIG) -> tuple[Program, list[Tensor]]:
    """The captured loss and gradients, and what to run them on."""
    local = ft.shard(batch(), "batch seq", mesh=mesh, rules=RULES)
    params = ft.init(ft.models.llama.params(config), ft.random.key(0), mesh=mesh, rules=RULES)
    leaves, structure = ft.tree.flatten(params)
    fn = ft.spmd(ft.value_and_grad(loss, has_aux=True), mesh=mesh, rules=RULES)

    def flat(tokens, labels, *leaves):
        return tuple(ft.tree.leaves(fn(ft.tree.unflatten(structure, leaves), tokens, labels, config)))

    inputs = (local["tokens"], local["labels"], *leaves)
    return trace(flat, inputs), list(inputs)


def after(program: Program, names: tuple[str, ...]) -> Program:
    """What the passes make of a copy."""
    graph = GraphModule(program.graph, copy.deepcopy(program.graph.graph))
    return run_passes(program._replace(graph=graph), names)


def results(program: Program, inputs: list[Tensor]) -> list[Tensor]:
    count = len(list(program.graph.graph.nodes)[-1].args[0])
    return compiled(program, (None,) * count, "graph")(list(inputs))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_pass_and_pair_of_passes_leaves_losses_and_gradients_unchanged(sizes):
    def on_each_rank(mesh):
        program, inputs = gradients_of_llama(mesh, CONFIG._replace(num_layers=1))
        plain, sent = results(program, inputs), sum(entry.bytes for entry in program.entries())
        made = cache(lambda names: after(made(names[:-1]), names[-1:]) if names else program)  # passes run in order
        ran = {program.graph.code}  # the same code on the same inputs gives the same numbers
        for names in PAIRS if sizes == PAIRED else ALONE:
            changed = made(names)
            if changed.graph.code not in ran:
                ran.add(changed.graph.code)
                for x, y in zip(plain, results(changed, inputs), strict=True):
                    assert torch.equal(x, y), names  # bitwise: no order of summation changes
            if not {"merge_equal", "keep_gathered"} & {*names}:  # these gather less
                assert sum(entry.bytes for entry in changed.entries()) == sent

    ft.simulate(**sizes)(on_each_rank)()


def blocks_of(mesh, layers: int, names=tuple(PASSES)) -> list[tuple[str, str, tuple[str, ...]]]:
    program, _ = gradients_of_llama(mesh, CONFIG._replace(num_layers=layers))
    entries = after(program, tuple(name for name in names if name != "keep_gathered")).entries()
    return [(entry.phase, entry.collective, entry.mesh_dims) for entry in entries]


def test_a_block_takes_at_most_two_collectives_in_each_direction_of_fsdp():
    def more(mesh):  # of a further layer
        if mesh.rank:  # tracing waits for no other rank
            return None
        two, three = blocks_of(mesh, 2), blocks_of(mesh, 3)
        return [
            sum(phase == its[0] for its in three) - sum(phase == its[0] for its in two)
            for phase in ("forward", "backward")
        ]

    assert ft.simulate(fsdp=2)(more)()[0] == [2, 2]  # weights, norm scales; a gather and a reduce-scatter


def test_a_period_is_found_where_a_sequence_repeats_itself():
    assert period(list("E" + 3 * "nqkvodgu" + "nH")) == (8, 1, 26)
    assert period(list("Hdd" + 4 * "x")) == (1, 3, 7)
    assert period(list("abcd")) is None and period([]) is None
    assert period(list("Enqkvongudn")) is None  # one layer: its pairs of equal shapes are no blocks


def test_a_graph_without_collectives_is_untouched():
    program, _ = gradients_of_llama(None, CONFIG._replace(num_layers=1))
    computing = "merge_equal", "remove_dead", "keep_gathered", "compute_again"
    communicating = tuple(name for name in PASSES if name not in computing)
    changed = after(program, communicating)
    assert [str(node) for node in changed.graph.graph.nodes] == [str(node) for node in program.graph.graph.nodes]


def test_kept_gathers_are_one_for_each_weight():
    def gathers(mesh):
        program, inputs = gradients_of_llama(mesh, CONFIG._replace(num_layers=1))
        kept = after(program, ("merge_equal", "keep_gathered"))
        for x, y in zip(results(program, inputs), results(kept, inputs), strict=True):
            assert torch.equal(x, y)
        shards = [
            sent_by(node).x for node in kept.graph.graph.nodes if is_collective(node) and node.args[1] == "all_gather"
        ]
        assert len(set(shards)) == len(shards)
        return {entry.phase for entry in kept.entries() if entry.collective == "all_gather"}

    assert ft.simulate(fsdp=2)(gathers)() == [{"forward"}] * 2
    assert "keep_gathered" in ft.jit(loss, keep_gathered=True).passes
    assert "keep_gathered" not in ft.jit(loss).passes


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(2, 2).t()], ids=["as it is", "through views"])
def test_a_sum_of_reductions_is_the_reduction_of_a_sum(view):
    def fn(x, y, z):
        parts = [view(all_reduce(x, "dp")), view(all_reduce(y, "dp")), view(all_reduce(z, "dp"))]
        scattered = reduce_scatter(x, "dp") + reduce_scatter(y, "dp")
        return (parts[0] + parts[1]) + parts[2], scattered, all_reduce(x, "dp", "max") + all_reduce(y, "dp", "max")

    def on_each_rank(mesh):
        xs = torch.randn(3, 4, generator=torch.Generator().manual_seed(mesh.rank)).unbind()
        fn_ = ft.spmd(fn, mesh=mesh, rules=ft.AxisRules({}))
        jitted = ft.jit(fn_, skip=["bucket_collectives"])
        ft.testing.assert_trees_all_close(jitted(*xs), fn_(*xs), atol=1e-6, rtol=1e-6)  # another order of summation
        sent = [sent_by(node).message for node in jitted.graph(*xs).graph.nodes if is_collective(node)]
        return sorted(f"{message.collective} {message.how}" for message in sent)

    found = ft.simulate(dp=2)(on_each_rank)()[0]
    assert found == ["all_reduce max", "all_reduce max", "all_reduce sum", "reduce_scatter sum"]


@pytest.mark.parametrize(
    ("sizes", "sent"),
    [(dict(dp=2), ["reduce_scatter dp"]), (dict(dp=2, tp=2), ["reduce_scatter dp", "all_reduce tp"])],
    ids=str,
)
def test_only_the_part_of_a_sum_that_a_rank_takes_is_reduced(sizes, sent):
    rules = ft.AxisRules({"batch": ("dp", "tp"), "whole": None, "rows": None, "embed": "dp"})

    def fn(x):
        whole = ft.reduce("batch rows whole -> rows whole", x)
        return ft.constrain("rows whole -> rows embed", whole)

    def on_each_rank(mesh):
        x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(mesh.rank)).double()
        own = ft.shard(x, "batch rows whole", mesh=mesh, rules=rules)
        jitted = ft.jit(ft.spmd(fn, mesh=mesh, rules=rules))
        plain = ft.jit(ft.spmd(fn, mesh=mesh, rules=rules), skip=["scatter_reductions"])
        assert torch.equal(jitted(own), plain(own)) and torch.equal(
            jitted(own), ft.spmd(fn, mesh=mesh, rules=rules)(own)
        )
        sent = [sent_by(node).message for node in jitted.graph(own).graph.nodes if is_collective(node)]
        return [f"{message.collective} {' '.join(message.mesh_dims)}" for message in sent]

    assert ft.simulate(**sizes)(on_each_rank)()[0] == sent


def test_a_sum_that_something_else_needs_whole_is_reduced_whole():
    rules = ft.AxisRules({"batch": "dp", "whole": None, "embed": "dp"})

    def fn(x):
        whole = ft.reduce("batch whole -> whole", x)
        return whole * 2, ft.constrain("whole -> embed", whole)

    def on_each_rank(mesh):
        graph = ft.jit(ft.spmd(fn, mesh=mesh, rules=rules)).graph(torch.ones(1, 4))
        return [sent_by(node).message.collective for node in graph.graph.nodes if is_collective(node)]

    assert ft.simulate(dp=2)(on_each_rank)() == [["all_reduce"]] * 2


def gated(layers: int, rows: int = 64):
    """Gradients of gated MLPs, and their operands."""

    def fn(ws, x):
        for gate, up, down in ws:
            x = x + (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down
        return (x * x).sum()

    make = torch.Generator().manual_seed(0)
    sizes = (8, 32), (8, 32), (32, 8)
    return ft.grad(fn), (
        [[0.1 * torch.randn(n, generator=make) for n in sizes] for _ in range(layers)],
        torch.ones(rows, 8),
    )


def test_elementwise_values_are_made_again_where_they_are_read_far_away():
    fn, args = gated(6)
    peak = lambda *skip: ft.explain(ft.jit(fn, backend="graph", skip=skip), *args, mesh={}, rules=RULES).peak_bytes
    value = 4 * 64 * 32  # bytes of one silu; the last is alive in either case
    assert peak() <= peak("compute_again") - 5 * value
    plain, again = (ft.jit(fn, backend="graph", skip=skip)(*args) for skip in (["compute_again"], []))
    assert all(torch.equal(x, y) for x, y in zip(ft.tree.leaves(plain), ft.tree.leaves(again), strict=True))


def test_what_would_have_to_be_kept_for_it_is_not_made_again():
    def fn(x, w):  # the sum is read by a product, and by an op beyond it; its parts are not alive there
        y = x.tanh() + x.cos()
        return (y @ w).tanh() + y

    graph = ft.jit(fn, backend="graph").graph(torch.ones(4, 4), torch.ones(4, 4)).graph
    assert [node.target for node in graph.nodes].count(torch.ops.aten.cos.default) == 1


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 1), (64, 33, 48)], ids=str)
def test_products_by_onednn_are_products(shape, turned):
    n, k, m = shape
    make = torch.Generator().manual_seed(0)
    x, w = torch.randn(n, k, generator=make), torch.randn((m, k) if turned else (k, m), generator=make)
    w = w.t() if turned else w
    found = torch.ops.functitan.product(x, w)
    # float32: the rounding of k sums in an order of its own
    torch.testing.assert_close(found.double(), x.double() @ w.double(), atol=1e-5, rtol=1e-5)
    assert torch.ops.functitan.product(x.to("meta"), w.to("meta")).shape == found.shape


def test_only_products_that_onednn_does_faster_are_its_own(monkeypatch):
    monkeypatch.setattr(products, "_helps", lambda: True)
    fn, args = gated(1)
    graph = products.choose_products(ft.jit(fn, backend="graph").graph(*args))
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("functitan.product.default") == 4  # forward, and the cotangent of what `down` reads
    assert targets.count("aten.mm.default") == 3  # xᵀ g, of weights


def test_peak_memory_grows_by_little_more_than_a_block_for_each_pass():
    wide = CONFIG._replace(num_layers=3, vocab_size=64, embed=128, mlp=384)
    params = ft.models.llama.params(wide)
    of_wide = lambda params, tokens, labels: ft.value_and_grad(loss, has_aux=True)(params, tokens, labels, wide)

    def peak(*skip):
        jitted = ft.jit(of_wide, skip=skip)
        tokens, labels = batch().values()
        return ft.explain(
            jitted, params, tokens, labels, mesh=dict(fsdp=2), rules=RULES, patterns=(None, "batch seq", "batch seq")
        )

    plain, bucketed = peak("bucket_collectives", "overlap"), peak("overlap")
    both = peak()
    block = 4 * sum(math.prod(its.shape) for its in ft.tree.leaves(params["layers"][0]))
    assert bucketed.peak_bytes <= plain.peak_bytes + 1.5 * block, (
        plain,
        bucketed,
    )  # a block, and a weight taken out of it
    assert both.peak_bytes <= bucketed.peak_bytes + 1.5 * block  # one more under way
    assert both.total_bytes() == plain.total_bytes()
