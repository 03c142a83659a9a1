"""Laws of the planner: its choice is the best of all ways by the stated rule, and every process makes the same one."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from plans import contractions, ways

from functitan.sharding import mesh as mesh_module
from functitan.sharding.choice import FREE, Fixed, choose
from functitan.sharding.contraction import Contraction, Term, terms_of
from functitan.sharding.layout import Layout
from functitan.sharding.mesh import MeshSizes
from functitan.sharding.message import FORMULAS
from functitan.sharding.moves import Frames, Splits, Step, operand_steps, result_steps


def dims_of(contraction: Contraction) -> list[str]:
    return sorted(
        {dim for layout in (*contraction.operands, *contraction.results) for dims in layout.dims for dim in dims}
    )


def chosen_way(contraction: Contraction, mesh: MeshSizes, dim: str, fixed: Fixed = FREE) -> tuple[str | None, ...]:
    """The axis of each term that the planner splits over a mesh dim."""
    chosen = choose(contraction, mesh, fixed)
    return tuple(next((axis for axis, dims in splits.items() if dim in dims), None) for splits, _ in chosen)


def of_two_terms() -> tuple[Contraction, MeshSizes]:
    """Where each term's best leaves both with more to send than another way for the two."""
    layout = lambda pattern, dim="": Layout(
        tuple(pattern.split()), tuple(("dp",) if axis == dim else () for axis in pattern.split())
    )
    operands = layout("seq embed", "seq"), layout("batch", "batch"), layout("batch seq embed", "embed")
    terms, sizes = (Term(0, (0, 1)), Term(1, (0, 2))), (("batch", 8), ("seq", 4), ("embed", 4))
    return Contraction(operands, (layout(""), layout("")), terms, sizes), MeshSizes(("dp",), (4,))


@settings(max_examples=100)
@example(drawn=of_two_terms())
@given(drawn=contractions())
def test_each_mesh_dim_takes_the_best_of_all_ways_as_if_it_were_alone(drawn):
    contraction, mesh = drawn
    assume(len(contraction.terms) <= 2)
    for dim in dims_of(contraction):
        assert chosen_way(contraction, mesh, dim) == ways(contraction, mesh, dim)[0].axes


@settings(max_examples=100)
@given(drawn=contractions())
def test_terms_chosen_together_cost_no_more_than_terms_chosen_apart(drawn):
    contraction, mesh = drawn
    for dim in dims_of(contraction):
        known = {way.axes: way for way in ways(contraction, mesh, dim)}
        alone = [contraction._replace(terms=(term,)) for term in contraction.terms]
        apart = tuple(ways(one, mesh, dim)[0].axes[0] for one in alone)
        mine = known[chosen_way(contraction, mesh, dim)]
        assert apart not in known or mine[:2] <= known[apart][:2]


def sent(layout: Layout, steps: tuple[Step, ...], contraction: Contraction, mesh: MeshSizes) -> int:
    """The elements that one rank sends in these steps of a tensor that begins in this layout."""
    sizes = dict(contraction.sizes)
    local, total = math.prod(sizes[axis] for axis in layout.axes) // math.prod(map(mesh.size, layout.dims)), 0
    for kind, dims, *_ in steps:
        n = mesh.size(dims)
        total += 0 if kind == "slice" else FORMULAS[kind](local, n)
        local = {"all_gather": local * n, "slice": local // n, "reduce_scatter": local // n}.get(kind, local)
    return total


def elements(contraction: Contraction, term: Term, splits: Splits, frames: Frames, mesh: MeshSizes) -> int:
    """The elements that one rank sends for one term."""
    result = contraction.results[term.result]
    made = Layout(result.axes, tuple(splits.get(axis, ()) for axis in result.axes))
    of_result = sent(made, result_steps(result, splits, frames, mesh), contraction, mesh)
    operands = [contraction.operands[i] for i in term.operands]
    return of_result + sum(sent(x, operand_steps(x, splits, frames, mesh), contraction, mesh) for x in operands)


@settings(max_examples=100)
@given(drawn=contractions(one_table=True))
def test_no_other_order_of_an_axis_shards_sends_less(drawn):
    """Where two tensors lie in different orders, the costly one keeps its own; each axis is weighed alone."""
    contraction, mesh = drawn
    for term, (splits, frames) in zip(contraction.terms, choose(contraction, mesh, FREE), strict=True):
        layouts = [*(contraction.operands[i] for i in term.operands), contraction.results[term.result]]
        assert list(frames) == list(splits) and all(splits.values()), "an axis that is not split has no order"
        mine = elements(contraction, term, splits, frames, mesh)
        for axis, over in splits.items():
            orders = {layout.of(axis) for layout in layouts} | {over}
            if sum(bool(layout.of(axis)) for layout in layouts) > 2:
                continue  # three orders are weighed by what each alone would cost
            for order in orders:
                other = order + tuple(dim for dim in over if dim not in order)
                if dict(contraction.sizes)[axis] % mesh.size(other) == 0:
                    assert mine <= elements(contraction, term, splits, {**frames, axis: other}, mesh)


def test_a_choice_may_be_given_and_axes_barred():
    mesh = MeshSizes(("tp",), (4,))
    table, rows = Layout(("vocab", "embed"), (("tp",), ())), Layout(("batch", "embed"), ((), ("tp",)))
    ids = Layout(("batch",), ((),))
    contraction = Contraction((ids, table), (rows,), (Term(0, (0, 1)),), (("batch", 2), ("vocab", 16), ("embed", 4)))
    assert chosen_way(contraction, mesh, "tp") == ("vocab",)
    assert chosen_way(contraction, mesh, "tp", Fixed((("tp", "embed"),))) == ("embed",)
    assert chosen_way(contraction, mesh, "tp", Fixed((), ("vocab",))) == ("embed",)


@pytest.mark.parametrize(("mlp", "axis"), [(48, "batch"), (50, "embed")])
def test_a_way_that_sends_more_than_16_times_the_cheapest_is_dropped(mlp, axis):
    """A gather of the weight, 24 mlp elements, against an exchange of x and a reduce-scatter of y, 24 + mlp."""
    mesh, sizes = MeshSizes(("fsdp",), (2,)), (("batch", 2), ("embed", 48), ("mlp", mlp))
    x, w = Layout(("batch", "embed"), (("fsdp",), ())), Layout(("embed", "mlp"), (("fsdp",), ()))
    y = Layout(("batch", "mlp"), (("fsdp",), ()))
    assert chosen_way(Contraction((x, w), (y,), (Term(0, (0, 1)),), sizes), mesh, "fsdp") == (axis,)


TIES = {  # ways of one cost over tp=2, as (axis, size, whether it is sharded) of each tensor: what wins
    "work is split before it is repeated": ([[("k", 2, True)], []], "k"),  # or x is gathered
    "reductions before exchanges": ([[("k", 2, True), ("m", 2, False)], [("m", 2, True)]], "k"),  # or x is exchanged
    "an output axis before a contracted one": ([[("k", 4, True)], [("m", 2, True)], [("m", 2, False)]], "m"),
    "the order of the pattern": ([[("k", 2, True)], [("m", 2, True)], []], "k"),
}


@pytest.mark.parametrize("name", TIES)
def test_ties_go_to(name):
    tensors, axis = TIES[name]
    *operands, result = [
        Layout(tuple(a for a, _, _ in x), tuple(("tp",) if split else () for _, _, split in x)) for x in tensors
    ]
    sizes = {a: size for x in tensors for a, size, _ in x}
    contraction = Contraction(tuple(operands), (result,), terms_of(len(operands), 1), tuple(sizes.items()))
    mesh = MeshSizes(("tp",), (2,))
    first, second, *_ = ways(contraction, mesh, "tp")
    assert first[:2] == second[:2], "the same number of collectives, and of elements"
    assert chosen_way(contraction, mesh, "tp") == (axis,)


def test_an_axis_is_split_only_where_all_mesh_dims_that_may_split_it_divide_it():
    mesh, now, then = MeshSizes(("cp", "tp"), (2, 2)), Layout(("seq",), (("cp",),)), Layout(("seq",), (("tp",),))
    move = lambda size: Contraction((now,), (then,), (Term(0, (0,)),), (("seq", size),))
    assert choose(move(4), mesh, FREE) == [({"seq": ("cp", "tp")}, {"seq": ("cp", "tp")})]
    assert choose(move(2), mesh, FREE) == [({}, {})]
    # over tp a sum of more than x would be scattered, or x gathered: then the result's own part is free
    x, y = Layout(("seq", "k"), (("cp",), ("tp",))), Layout(("seq", "m"), (("tp",), ()))
    wide = Contraction((x,), (y,), (Term(0, (0,)),), (("seq", 2), ("k", 2), ("m", 4)))
    assert chosen_way(wide, mesh, "tp") == ways(wide, mesh, "tp")[0].axes == (None,)


def test_terms_share_what_others_pay_for():
    """The cotangents of f * x * y * g, x and y lying apart: with one of the two exchanged, nothing else moves."""
    mesh, x, y = MeshSizes(("dp",), (2,)), Layout(("a", "b"), (("dp",), ())), Layout(("a", "b"), ((), ("dp",)))
    one = Layout((), ())
    terms = Term(0, (1, 2, 3)), Term(1, (0, 2, 3)), Term(2, (0, 1, 3))
    contraction = Contraction((one, x, y, one), (one, x, y), terms, (("a", 2), ("b", 2)))
    assert chosen_way(contraction, mesh, "dp") == ways(contraction, mesh, "dp")[0].axes


def test_the_order_of_a_fixed_axis_divides_it():
    """Ids over cp and tp would like their own order, but with fsdp behind it that is 8 shards of 4 positions."""
    mesh, fixed = MeshSizes(("fsdp", "cp", "tp"), (2, 2, 2)), Fixed((("tp", "seq"), ("fsdp", "seq")))
    table, ids = Layout(("seq", "vocab"), (("tp", "fsdp"), ())), Layout(("seq", "batch"), (("cp", "tp"), ()))
    contraction = Contraction((ids, table), (ids,), (Term(0, (0, 1)),), (("seq", 4), ("vocab", 4), ("batch", 64)))
    ((_, frames),) = choose(contraction, mesh, fixed)
    assert frames == {"seq": ("tp", "fsdp")}


@pytest.mark.parametrize(("sharding", "size", "axis"), [((), 4, None), (("tp",), 8, "m")], ids=["reduced", "scattered"])
def test_a_sum_of_much_loses_to_a_gather_of_little(sharding, size, axis):
    """x[k] y[m] over tp=4: the gather of x sends 3 elements, the sum over k sends 6."""
    mesh, sizes = MeshSizes(("tp",), (4,)), (("k", 4), ("m", size))
    x, y, z = Layout(("k",), (("tp",),)), Layout(("m",), ((),)), Layout(("m",), (sharding,))
    contraction = Contraction((x, y), (z,), (Term(0, (0, 1)),), sizes)
    assert chosen_way(contraction, mesh, "tp") == ways(contraction, mesh, "tp")[0].axes == (axis,)


SAME_EVERYWHERE = """
import sys, types
functitan = types.ModuleType("functitan")  # the planner alone: neither torch nor the rest of the package
functitan.__path__ = [sys.argv[1]]
sys.modules["functitan"] = functitan
from functitan.axes import parse_axes
from functitan.sharding.contraction import Contraction, Term, cotangents, terms_of
from functitan.sharding.layout import Layout, layout_of
from functitan.sharding.mesh import MeshSizes
from functitan.sharding.plan import plan
from functitan.sharding.rules import AxisRules

rules = AxisRules({"batch": ("dp", "fsdp"), "mlp": "tp", "heads": "tp", "seq": ("cp", "tp"), "embed": ("fsdp", "cp")})
mesh = MeshSizes(("dp", "fsdp", "cp", "tp"), (2, 2, 2, 2))
sizes = (("batch", 16), ("seq", 16), ("embed", 16), ("mlp", 16), ("heads", 16))
for x, w, y in [
    ("batch seq embed", "embed mlp", "batch seq mlp"), ("batch seq mlp", "mlp embed", "batch seq embed"),
    ("seq embed", "embed", "seq"), ("batch seq embed", "embed", ""), ("embed seq", "mlp heads", "seq heads"),
]:
    x, w, y = (layout_of(parse_axes(p), rules, mesh) for p in (x, w, y))
    forward = Contraction((x, w), (y,), terms_of(2, 1), sizes)
    print(plan(forward, mesh), plan(cotangents(forward, (0, 1), (0,)), mesh))
seq = [Layout(("seq",), (dims,)) for dims in (("tp",), ("cp",), ("dp",))]  # each in an order of its own
print(plan(Contraction(tuple(seq[:2]), (seq[2],), terms_of(2, 1), sizes), mesh))
for a, b in [("batch", "seq"), ("mlp", "heads"), ("seq", "embed")]:  # ties
    x, y, z = Layout((a,), (("tp",),)), Layout((b,), (("tp",),)), Layout((), ())
    for count in (1, 2, 3):  # terms that tie apart and together
        print(plan(Contraction((x, y), (z,) * count, tuple(Term(i, (0, 1)) for i in range(count)), sizes), mesh))
assert "torch" not in sys.modules
"""


def test_every_process_makes_the_same_plan_whatever_its_hashes():
    package = Path(mesh_module.__file__).parents[1]
    run = lambda seed: subprocess.run(
        [sys.executable, "-c", SAME_EVERYWHERE, str(package)], env={"PYTHONHASHSEED": str(seed)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    first, *others = [run(seed) for seed in range(4)]
    assert first.returncode == 0, first.stderr
    assert first.stdout and all(other.stdout == first.stdout for other in others)
