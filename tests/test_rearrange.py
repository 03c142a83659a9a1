"""`ft.rearrange` is einops' on the global tensor, and refuses to mix positions of a sharded axis."""

from __future__ import annotations

import math
from textwrap import dedent

import einops
import pytest
import torch
from cases import Arg, Case, check
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import LAWS, surroundings

import functitan as ft
from functitan.axes import write_axes
from functitan.testing import assert_mesh_invariant
from functitan.testing.strategies import AXES

RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "heads": "tp", "mlp": "tp", "seq": ("cp", "tp"), "head_dim": None})
HEADS = "batch seq (heads head_dim) -> batch heads seq head_dim"


@st.composite
def groups(draw, axes):
    """Axes in any order, some of them in parentheses, with a few `()`: one group for each dimension of a tensor."""
    axes, found = draw(st.permutations(axes)), []
    while axes:
        size = draw(st.integers(1, min(3, len(axes))))
        found += [tuple(axes[:size]), *draw(st.sampled_from([[], [()]]))]
        axes = axes[size:]
    return found


def written(found):
    one = lambda group: f"({write_axes(group)})" if len(group) > 1 else write_axes(group) or "1"
    return " ".join(map(one, found))


@st.composite
def rearrange(draw) -> Case:
    """A composite is named by its parts, and has the rule of its outermost; its other parts have none."""
    axes = tuple(draw(st.permutations(AXES))[: draw(st.integers(1, 4))])
    left, right = draw(groups(axes)), draw(groups(axes))
    mesh, rules, sizes = draw(surroundings(AXES))
    inner = {axis for group in (*left, *right) for axis in group[1:]}
    table = {}
    for axis, dims in rules.items():
        table[axis] = () if axis in inner else dims
        table |= {"_of_".join(group): table[axis] for group in (*left, *right) if len(group) > 1 and group[0] == axis}
    units = {f"unit{i}": None for i in range(len(left) + len(right))}
    name = lambda i, group: "_of_".join(group) or f"unit{i}"
    for i, group in enumerate((*left, *right)):
        sizes[name(i, group)] = math.prod(sizes[axis] for axis in group)
    pattern = f"{written(left)} -> {written(right)}"
    some = {axis: sizes[axis] for group in left for axis in group[draw(st.integers(0, 1)) :]}

    def fn(x):
        return (ft.rearrange(pattern, x, **some),)

    def oracle(x):
        return (einops.rearrange(x, pattern, **some),)

    args = (Arg(write_axes(tuple(name(i, group) for i, group in enumerate(left)))),)
    result = write_axes(tuple(name(len(left) + i, group) for i, group in enumerate(right)))
    return Case(fn, oracle, args, (result,), sizes, mesh, ft.AxisRules({**table, **units}))


@pytest.mark.parametrize("law", LAWS)
@settings(max_examples=8)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_it_is_the_same_on_every_mesh(law, data, seed):
    check(LAWS[law](data.draw, data.draw(rearrange())), seed)


@given(data=st.data())
@settings(max_examples=20)
def test_without_a_mesh_it_is_einops(data):
    left, right = data.draw(groups(AXES)), data.draw(groups(AXES))
    sizes = {axis: data.draw(st.integers(1, 3)) for axis in AXES}
    x = torch.arange(math.prod(sizes.values())).reshape([math.prod(sizes[a] for a in group) for group in left])
    pattern = f"{written(left)} -> {written(right)}"
    ours, theirs = ft.rearrange(pattern, x, **sizes), einops.rearrange(x, pattern, **sizes)
    assert ours.shape == theirs.shape and torch.equal(ours, theirs)


def test_nothing_is_sent_and_views_stay_views():
    x = torch.randn(4, 6, 8)

    def rank(mesh, x):
        x = ft.shard(x, "batch seq mlp", mesh=mesh, rules=RULES)
        run = lambda x: ft.rearrange(HEADS, x, head_dim=2)
        with ft.record() as ledger:
            heads = ft.spmd(run, mesh=mesh, rules=RULES)(x)
            ft.spmd(ft.grad(lambda x: run(x).sum()), mesh=mesh, rules=RULES)(x)
        assert heads.data_ptr() == x.data_ptr() and not len(ledger)
        return ft.unshard(heads, "batch heads seq head_dim", mesh=mesh, rules=RULES)

    for heads in ft.simulate(fsdp=2, tp=2)(rank)(x):
        assert torch.equal(heads, einops.rearrange(x, HEADS, head_dim=2))


def test_heads_split_and_merge_around_other_ops():
    """A projection to "mlp" seen as heads, scaled by head, and merged again."""

    def program(x, w, scale):
        y = ft.einsum("batch seq embed, embed mlp -> batch seq mlp", x, w)
        y = ft.rearrange(HEADS, y, heads=4)
        y = y.tanh() * ft.broadcast("heads -> batch heads seq head_dim", scale)
        return ft.rearrange("batch heads seq head_dim -> batch seq (heads head_dim)", y)

    generator = torch.Generator().manual_seed(0)
    x, w, scale = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((8, 4, 6), (6, 12), (4,)))
    patterns = "batch seq embed", "embed mlp", "heads"
    rules = ft.AxisRules({**dict(RULES.items()), "embed": None})
    assert_mesh_invariant(program, (x, w, scale), patterns=patterns, out="batch seq mlp", rules=rules)


# --- what it refuses ------------------------------------------------------------------------------------------------

FIX = "write as in 'batch seq (heads head_dim) -> batch heads seq head_dim', with the same names on both sides"
FIX_SIZES = "sizes are global, and the parts of an axis multiply to its size"
BAD = {  # pattern: (shape, sizes, kind, lines after the first)
    "batch seq -> batch sqe": (
        (2, 3), {}, ft.PatternError,
        ["axis 'seq' (did you mean 'sqe'?) stands on the left only",
         "axis 'sqe' (did you mean 'seq'?) stands on the right only"], FIX,
    ),
    "batch (seq -> batch seq": ((2, 3), {}, ft.PatternError, ["'batch (seq': Imbalanced parentheses in expression: "
                                                             '"batch (seq"'], FIX),
    "batch batch -> batch": (
        (2, 3), {}, ft.PatternError,
        ["'batch batch': Indexing expression contains duplicate dimension \"batch\""], FIX,
    ),
    "... seq -> seq ...": (
        (2, 3), {}, ft.PatternError,
        ["'... seq' has an ellipsis: every axis has a name here",
         "'seq ...' has an ellipsis: every axis has a name here"], FIX,
    ),
    "batch 2 -> 2 batch": (
        (2, 2), {}, ft.PatternError,
        ["'batch 2' has a number other than 1: give the axis a name, and its size",
         "'2 batch' has a number other than 1: give the axis a name, and its size"], FIX,
    ),
    "batch seq -> seq batch": (
        (2, 2, 2), {}, ft.PatternError,
        ["'batch seq' has 2 axes, the tensor 3: (2, 2, 2)"],
        "give each axis of the tensor a name, 1, or names in parentheses",
    ),
    "batch 1 -> batch": ((2, 2), {}, ft.PatternError, ["'1' is 2, which is not 1"], FIX_SIZES),
    "(heads head_dim) -> heads head_dim": (
        (6,), {}, ft.PatternError,
        ["'(heads head_dim)' is 12 (6 on each of 2 ranks), and its parts 'heads', 'head_dim' have no size: "
         "one may be left out"], FIX_SIZES,
    ),
    "batch (heads head_dim) -> batch heads head_dim": (
        (3, 6), {"heads": 5, "batch": 7}, ft.PatternError,
        ["'batch' is 6 (3 on each of 2 ranks), which is not batch=7",
         "'(heads head_dim)' is 12 (6 on each of 2 ranks), which is no multiple of heads=5"], FIX_SIZES,
    ),
    "batch (heads head_dim) -> heads head_dim batch": (
        (3, 6), {"heads": 3}, ft.PatternError,
        ["'(heads head_dim)' is 12 (6 on each of 2 ranks), but 'heads' of size 3 is not divisible by 2"], FIX_SIZES,
    ),
    "(heads head_dim) batch -> heads head_dim batch": (
        (6, 2), {"haeds": 3, "head_dim": 0}, ft.PatternError,
        ["a size is given for 'haeds' (did you mean 'heads'?), no axis here", "axis 'head_dim' has size 0"], FIX_SIZES,
    ),
    "batch seq head_dim -> head_dim (batch seq)": (
        (2, 3, 4), {}, ft.LayoutError,
        ["part 'seq' of (batch seq) lies over ('tp',), and the outermost 'batch' over ('fsdp',): a rank's positions "
         "would not stand together in the composite"],
        "make the part whole first, by renaming it to an axis that the rules keep whole: "
        "ft.constrain('batch seq head_dim -> batch whole_seq head_dim', x); or change its rule",
    ),
    "(head_dim heads) -> heads head_dim": (
        (12,), {"heads": 4}, ft.LayoutError,
        ["part 'heads' of (head_dim heads) lies over ('tp',), and the outermost 'head_dim' over no mesh dim: a rank's "
         "positions would not stand together in the composite"],
        "make the part whole first, by renaming it to an axis that the rules keep whole: "
        "ft.constrain('head_dim heads -> head_dim whole_heads', x); or change its rule",
    ),
}  # fmt: skip


@pytest.mark.parametrize("pattern", BAD)
def test_what_cannot_be_says_why(pattern):
    shape, sizes, kind, problems, fix = BAD[pattern]
    call = lambda mesh: ft.spmd(ft.rearrange, mesh=mesh, rules=RULES)(pattern, torch.ones(shape), **sizes)
    with ft.record() as ledger, pytest.raises(kind) as error:
        ft.simulate(fsdp=2, tp=2)(call)()
    lines = [f"rearrange({pattern!r}):", *(f"  - {problem}" for problem in problems), f"  Fix: {fix}"]
    assert str(error.value).splitlines() == lines
    assert not len(ledger)


def test_an_axis_whose_mesh_dim_another_has_is_whole_and_may_be_merged():
    """mlp takes tp before seq can."""
    rules = ft.AxisRules({**dict(RULES.items()), "rows": ("dp", "fsdp")})
    merge = lambda x: ft.rearrange("batch seq mlp -> (batch seq) mlp", x)
    x = torch.randn(8, 3, 4, dtype=torch.float64)
    meshes = [dict(fsdp=2, tp=2), dict(dp=2, tp=2)]
    assert_mesh_invariant(merge, (x,), patterns=("batch seq mlp",), out="rows mlp", rules=rules, meshes=meshes)


def test_the_fix_works():
    rules = ft.AxisRules({**dict(RULES.items()), "whole_seq": None})

    def program(x):
        x = ft.constrain("batch seq head_dim -> batch whole_seq head_dim", x)
        return ft.rearrange("batch whole_seq head_dim -> (batch whole_seq) head_dim", x) * 2

    x = torch.randn(8, 4, 3, dtype=torch.float64)
    out = "rows head_dim"
    rules = ft.AxisRules({**dict(rules.items()), "rows": ("dp", "fsdp")})
    assert_mesh_invariant(program, (x,), patterns=("batch seq head_dim",), out=out, rules=rules)


def test_a_pattern_is_a_string_with_an_arrow():
    with pytest.raises(ft.PatternError) as error:
        ft.rearrange("batch seq", torch.ones(2, 2))
    assert str(error.value) == dedent(f"""\
        rearrange('batch seq'):
          - a pattern has one '->', this has 0
          Fix: {FIX}""")
    with pytest.raises(ft.PatternError) as error:  # einops' order; of a tensor its values are not printed
        ft.rearrange(torch.ones(2, 2), "batch seq -> seq batch")
    assert str(error.value) == dedent("""\
        pattern that is a value of type 'Tensor':
          - a pattern is a string
          Fix: write 'batch seq embed'; in ops it comes first, as in \
ft.rearrange('batch (heads head_dim) -> batch heads head_dim', x, heads=8)""")
