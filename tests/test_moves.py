"""Laws of moves: any layout becomes any other, by few steps, and each step moves as little as it can."""

from __future__ import annotations

import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plans import contractions

import functitan as ft
from functitan.axes import parse_axes
from functitan.ops.contraction import contract
from functitan.ops.types import Type
from functitan.sharding.context import current
from functitan.sharding.contraction import Contraction, Term
from functitan.sharding.layout import Layout, block_of
from functitan.sharding.mesh import MeshSizes
from functitan.sharding.message import Label
from functitan.sharding.moves import operand_steps
from functitan.sharding.plan import plan
from functitan.sharding.steps import run_step
from functitan.testing.sharded import assert_close
from functitan.testing.strategies import AXES, axis_sizes, meshes, rules_tables

TWO = AXES[:2]  # two axes meet most of what several would


@settings(max_examples=60)
@given(mesh=meshes(), tables=st.tuples(rules_tables(TWO), rules_tables(TWO)), data=st.data())
def test_any_layout_becomes_any_other(mesh, tables, data):
    """The oracle of both layouts is `ft.shard`, whose own is numpy (tests/test_plan.py)."""
    sizes = [data.draw(axis_sizes(rules, mesh)) for rules in tables]
    pattern = data.draw(st.sampled_from(["batch", "seq batch"]))
    shape = [math.lcm(*(own[axis] for own in sizes)) for axis in parse_axes(pattern)]
    x = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)

    def rank(mesh):
        before, after = (ft.shard(x, pattern, mesh=mesh, rules=rules) for rules in tables)
        move = ft.spmd(lambda x: ft.reshard(x, pattern, to_rules=tables[1]), mesh=mesh, rules=tables[0])
        moved, back = torch.func.vjp(move, before)
        return moved, after, back(moved)[0], before

    for moved, after, back, before in ft.simulate(**mesh)(rank)():
        assert_close((moved, back), (after, before), tolerance=0.0)


X, Y, ONE = Layout(("batch",), (("dp",),)), Layout(("batch",), (("fsdp", "dp"),)), Layout((), ())
COUSINS = Contraction((ONE, X, Y), (ONE, X), (Term(0, (1, 2)), Term(1, (0, 2))), (("batch", 4),))
A, B = Layout(("batch",), (("fsdp",),)), Layout(("batch", "seq"), (("fsdp", "dp"), ()))
C, D = Layout(("mlp", "seq", "heads"), (("fsdp",), (), ())), Layout(("mlp",), (("fsdp",),))
E = Layout(("batch", "seq"), (("fsdp",), ("dp",)))
OUTER, CROSSING = (
    Contraction((x, B, C), (D,), (Term(0, (0, 1, 2)),), (("batch", 4), ("seq", 4), ("mlp", 4), ("heads", 4)))
    for x in (A, E)
)


@settings(max_examples=200)
@given(drawn=contractions())
@example(drawn=(COUSINS, MeshSizes(("dp", "fsdp"), (2, 2))))  # an inner shard moves while the outer one is whole
@example(drawn=(OUTER, MeshSizes(("dp", "fsdp"), (2, 2))))  # an inner shard is sliced before the outer one is gathered
@example(drawn=(CROSSING, MeshSizes(("dp", "fsdp"), (2, 2))))  # and exchanged before
def test_a_contraction_of_any_layouts_is_the_einsum(drawn):
    """Each tensor's shard is what `block_of` cuts out, whose oracle is numpy (tests/test_plan.py)."""
    (operands, results, terms, _), known = drawn
    size = math.prod(known.sizes)  # of every axis: each layout divides it
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn([size] * len(x.axes), generator=generator, dtype=torch.float64) for x in operands]
    expected = [torch.zeros([size] * len(y.axes), dtype=torch.float64) for y in results]
    for result, used in terms:
        axes = results[result].axes
        wide = [((axis,), torch.ones(size, dtype=torch.float64)) for axis in axes]  # axes that no operand has
        sides, xs = zip(*((operands[i].axes, tensors[i]) for i in used), *wide, strict=True)
        letters = [",".join("".join(chr(97 + AXES.index(a)) for a in own) for own in side) for side in (sides, [axes])]
        expected[result] += torch.einsum("->".join(letters), *xs)
    types = [tuple(Type(layout.axes, layout=layout) for layout in side) for side in (operands, results)]
    typed = Contraction(*types, terms, tuple((axis, size) for axis in AXES))

    def rank(mesh):
        cut = lambda xs, side: [x[block_of(own, tuple(x.shape), mesh)] for x, own in zip(xs, side, strict=True)]
        run = ft.spmd(lambda *xs: contract(typed, xs, current(), Label("test", "")), mesh=mesh, rules=ft.AxisRules({}))
        return list(run(*cut(tensors, operands))), cut(expected, results)

    for actual, wanted in ft.simulate(**dict(zip(known.dims, known.sizes, strict=True)))(rank)():
        assert_close(actual, wanted)


@settings(max_examples=100)
@given(drawn=contractions())
def test_steps_are_in_the_order_in_which_they_move_least(drawn):
    """What is whole is sliced before anything moves, and a sum is scattered before the rest of it is reduced."""
    contraction, mesh = drawn
    chosen = plan(contraction, mesh)
    for steps in [steps for _, steps in chosen.moved] + [group.steps for groups in chosen.results for group in groups]:
        kinds = [step.kind for step in steps]
        for first, second in (
            ("reduce_scatter", "all_reduce"),
            ("all_reduce", "all_to_all"),
            ("all_to_all", "all_gather"),
        ):
            if first in kinds and second in kinds:
                assert kinds.index(second) > max(i for i, kind in enumerate(kinds) if kind == first)
        moves = [step for step in steps if step.kind != "slice"]
        assert len({(step.kind, step.source, step.target) for step in moves}) == len(moves)


@settings(max_examples=60)
@given(data=st.data())
def test_an_operand_is_brought_to_any_split_of_any_frame(data):
    """The oracle: the axis seen as a sub-axis for each mesh dim of the frame; a split one keeps one place."""
    mesh = data.draw(meshes())
    dims = tuple(mesh)
    own = tuple(data.draw(st.permutations(data.draw(st.lists(st.sampled_from(dims), unique=True)))))
    frame = tuple(data.draw(st.permutations(dims)))
    split = tuple(d for d in frame if data.draw(st.booleans()))
    sizes = MeshSizes(dims, tuple(mesh.values()))
    layout, x = Layout(("batch",), (own,)), torch.arange(2.0 * math.prod(mesh.values()))
    steps = operand_steps(layout, {"batch": split}, {"batch": frame}, sizes)

    def rank(mesh):
        shard = x[block_of(layout, tuple(x.shape), mesh)]
        for step in steps:
            shard = run_step(shard, step, current()._replace(mesh=mesh), Label("test", ""))
        at = [mesh.index((d,)) if d in split else slice(None) for d in frame]
        return shard, x.view([sizes.size(d) for d in frame] + [-1])[tuple(at)].flatten()

    for actual, wanted in ft.simulate(**mesh)(rank)():
        assert torch.equal(actual, wanted)
