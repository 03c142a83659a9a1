"""One law of every named op: on any mesh, under any rules, it is the function that plain torch has without a mesh.

So are its derivatives and its vmaps. The oracles are torch.einsum, torch.logsumexp, F.cross_entropy and the like.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import Arg, Case, batched, check, hvp_of, jvp_of, vjp_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import functitan as ft
from functitan.axes import parse_axes, write_axes, write_signature
from functitan.sharding.around import Around
from functitan.sharding.context import current, using
from functitan.sharding.contraction import terms_of
from functitan.testing.sharded import assert_close, sharded
from functitan.testing.strategies import AXES, axis_sizes, meshes, rules_tables, signatures

HIDDEN = ("example", "copy")  # axes that batched cases add: one that the mesh may shard, one that it never does


@st.composite
def surroundings(draw, axes: tuple[str, ...]) -> tuple[dict, ft.AxisRules, dict]:
    """(mesh, rules, sizes) for axes and those that vmaps will hide, which come first: they lie alike in all tensors."""
    mesh = draw(meshes())
    table = draw(rules_tables((*axes, "example")))
    rules = ft.AxisRules({"example": table["example"], "copy": None, **dict(table.items())})
    return mesh, rules, draw(axis_sizes(rules, mesh))


def torch_einsum(operands, result, *xs):
    names = dict.fromkeys(axis for axes in operands for axis in axes)
    letter = {axis: chr(97 + i) for i, axis in enumerate(names)}
    sides = [",".join("".join(letter[a] for a in axes) for axes in side) for side in (operands, [result])]
    return torch.einsum("->".join(sides), *xs)


@st.composite
def einsum(draw) -> Case:
    signature = draw(signatures())
    mesh, rules, sizes = draw(surroundings(AXES))
    pattern = write_signature(signature)
    terms = terms_of(len(signature.operands), len(signature.results))

    def fn(*xs):
        out = ft.einsum(pattern, *xs)
        return out if isinstance(out, tuple) else (out,)

    def oracle(*xs):
        return [
            torch_einsum([signature.operands[i] for i in term.operands], result, *(xs[i] for i in term.operands))
            for term, result in zip(terms, signature.results, strict=True)
        ]

    args = tuple(Arg(write_axes(axes)) for axes in signature.operands)
    return Case(fn, oracle, args, tuple(map(write_axes, signature.results)), sizes, mesh, rules)


@st.composite
def reduce(draw) -> Case:
    axes = draw(st.permutations(AXES))[: draw(st.integers(1, 4))]
    kept = draw(st.permutations(axes))[: draw(st.integers(0, len(axes)))]
    op = draw(st.sampled_from(["sum", "mean", "max", "logsumexp"]))
    mesh, rules, sizes = draw(surroundings(AXES))
    plain = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "logsumexp": torch.logsumexp}[op]
    gone = [i for i, axis in enumerate(axes) if axis not in kept]

    def oracle(x):
        left = [axis for axis in axes if axis in kept]
        return ((plain(x, gone) if gone else x).permute([left.index(axis) for axis in kept]),)

    pattern = f"{write_axes(axes)} -> {write_axes(kept)}"
    args = (Arg(write_axes(axes)),)
    return Case(lambda x: (ft.reduce(pattern, x, op=op),), oracle, args, (write_axes(kept),), sizes, mesh, rules)


@st.composite
def broadcast(draw) -> Case:
    """A parameter that meets an activation elementwise, and the same with its sizes given."""
    axes = draw(st.permutations(AXES))[: draw(st.integers(1, 4))]
    own = draw(st.permutations(axes))[: draw(st.integers(0, len(axes)))]
    mesh, rules, sizes = draw(surroundings(AXES))
    new = {axis: sizes[axis] for axis in axes if axis not in own}
    pattern = f"{write_axes(own)} -> {write_axes(axes)}"

    def fn(x, y):
        return ft.broadcast(pattern, x) * y, ft.broadcast(pattern, x, **new)

    def oracle(x, y):
        wide = torch_einsum([own, axes], axes, x, torch.ones_like(y))
        return wide * y, wide

    args = Arg(write_axes(own)), Arg(write_axes(axes))
    return Case(fn, oracle, args, (args[1].pattern,) * 2, sizes, mesh, rules, common=(1,))


@st.composite
def take(draw) -> Case:
    mesh, rules, sizes = draw(surroundings(AXES))
    vocab, *axes = draw(st.permutations(AXES))
    ids = tuple(axes[: draw(st.integers(0, 3))])
    others = draw(st.lists(st.sampled_from(axes), unique=True, max_size=2))
    table = tuple(draw(st.permutations([vocab, *others])))
    result = tuple(draw(st.permutations(sorted({*ids, *others}))))
    pattern = f"{write_axes(ids)}, {write_axes(table)} -> {write_axes(result)}"

    def oracle(ids_, x):
        rows = F.one_hot(ids_, sizes[vocab]).to(x.dtype)
        return (torch_einsum([(*ids, vocab), table], result, rows, x),)

    args = Arg(write_axes(ids), high=sizes[vocab]), Arg(write_axes(table))
    return Case(lambda ids, x: (ft.take(pattern, ids, x),), oracle, args, (write_axes(result),), sizes, mesh, rules)


@st.composite
def iota(draw) -> Case:
    """Indices made like a tensor meet it in any op, those of given sizes in a named one."""
    mesh, rules, sizes = draw(surroundings(AXES))
    axes = draw(st.permutations(AXES))[: draw(st.integers(1, 4))]
    along, pattern = draw(st.sampled_from(axes)), write_axes(axes)
    kept = draw(st.permutations(axes))[: draw(st.integers(0, len(axes)))]
    product = f"{pattern}, {pattern} -> {write_axes(kept)}"

    def fn(x):
        like = ft.iota(pattern, along, like=x).to(x.dtype)
        alone = ft.iota(pattern, along, **{axis: sizes[axis] for axis in axes}).to(x.dtype)
        return like * x, ft.einsum(product, like, x), ft.einsum(product, alone, x)

    def oracle(x):
        at = torch.arange(sizes[along], dtype=x.dtype)
        both = torch_einsum([axes, (along,)], kept, x, at)
        return torch_einsum([axes, (along,)], axes, x, at), both, both

    results = (pattern, write_axes(kept), write_axes(kept))
    return Case(fn, oracle, (Arg(pattern),), results, sizes, mesh, rules)


@st.composite
def select(draw) -> Case:
    """One position for all."""
    mesh, rules, sizes = draw(surroundings(AXES))
    axes = draw(st.permutations(AXES))[: draw(st.integers(1, 4))]
    gone = draw(st.sampled_from(axes))
    result = tuple(draw(st.permutations([axis for axis in axes if axis != gone])))
    index = draw(st.integers(-sizes[gone], sizes[gone] - 1))
    pattern = f"{write_axes(axes)} -> {write_axes(result)}"

    def oracle(x):
        left = [axis for axis in axes if axis != gone]
        return (x.select(axes.index(gone), index).permute([left.index(axis) for axis in result]),)

    args = (Arg(write_axes(axes)),)
    return Case(lambda x: (ft.select(pattern, x, index),), oracle, args, (write_axes(result),), sizes, mesh, rules)


@st.composite
def select_by_tensor(draw) -> Case:
    """A position for each index, from the end where negative: an index tensor has some of the tensor's other axes."""
    mesh, rules, sizes = draw(surroundings(AXES))
    axes = draw(st.permutations(AXES))[: draw(st.integers(1, 4))]
    gone, *left = draw(st.permutations(axes))
    ids = tuple(left[: draw(st.integers(0, len(left)))])
    pattern = f"{write_axes(axes)}, {write_axes(ids)} -> {write_axes(left)}"

    def oracle(x, index):
        rows = F.one_hot(index, sizes[gone]).to(x.dtype)
        return (torch_einsum([tuple(axes), (*ids, gone)], left, x, rows),)

    def fn(x, index):
        return (ft.select(pattern, x, index - sizes[gone]),)

    args = Arg(write_axes(axes)), Arg(write_axes(ids), high=sizes[gone])
    return Case(fn, oracle, args, (write_axes(left),), sizes, mesh, rules)


@st.composite
def constrain(draw) -> Case:
    """Renaming axes, one for one: to axes of another layout and back."""
    axes = draw(st.permutations(AXES))[: draw(st.integers(0, 3))]
    names = [draw(st.sampled_from([axis, f"new_{axis}"])) for axis in axes]
    mesh, rules, sizes = draw(surroundings((*AXES, *(f"new_{axis}" for axis in AXES))))
    common = {axis: math.lcm(sizes[axis], sizes[f"new_{axis}"]) for axis in AXES}
    sizes = {**sizes, **common, **{f"new_{axis}": size for axis, size in common.items()}}
    there = f"{write_axes(axes)} -> {write_axes(names)}"
    back = f"{write_axes(names)} -> {write_axes(axes)}"

    def fn(x):
        moved = ft.constrain(there, x)
        return moved, ft.constrain(back, moved * 2)

    args = (Arg(write_axes(axes)),)
    return Case(fn, lambda x: (x, x * 2), args, (write_axes(names), write_axes(axes)), sizes, mesh, rules)


@st.composite
def cross_entropy(draw) -> Case:
    mesh, rules, sizes = draw(surroundings(AXES))
    vocab, *axes = draw(st.permutations(AXES))
    rows = tuple(axes[: draw(st.integers(0, 3))])
    logits = tuple(draw(st.permutations([vocab, *rows])))
    result = rows if draw(st.booleans()) else tuple(draw(st.permutations(rows)))[: draw(st.integers(0, len(rows)))]
    pattern = f"{write_axes(logits)}, {write_axes(rows)} -> {write_axes(result)}"

    def oracle(x, labels):
        flat = x.permute([logits.index(axis) for axis in (*rows, vocab)]).reshape(-1, sizes[vocab])
        loss = F.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=0).view(labels.shape)
        return (torch_einsum([rows], result, loss),)

    def fn(x, labels):
        return (ft.cross_entropy(pattern, x, labels, ignore_index=0),)

    args = Arg(write_axes(logits)), Arg(write_axes(rows), high=sizes[vocab])
    return Case(fn, oracle, args, (write_axes(result),), sizes, mesh, rules)


@st.composite
def norm(draw) -> Case:
    mesh, rules, sizes = draw(surroundings(AXES))
    axes = draw(st.permutations(AXES))[: draw(st.integers(1, 3))]
    own = draw(st.sampled_from(axes))
    kind = draw(st.sampled_from(["rms", "layer", "layer with bias"]))
    pattern = f"{write_axes(axes)}, {own}"
    eps = 0.1  # rows of one number have no variance: derivatives grow with 1 / sqrt(eps)

    def fn(x, *learned):
        return (
            ft.rms_norm(pattern, x, *learned, eps=eps)
            if kind == "rms"
            else ft.layer_norm(pattern, x, *learned, eps=eps),
        )

    def oracle(x, scale, *bias):
        rows, at = x.movedim(axes.index(own), -1), axes.index(own)
        if kind == "rms":
            return ((rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt() * scale).movedim(-1, at),)
        normal = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return ((normal * scale + sum(bias)).movedim(-1, at),)

    args = Arg(write_axes(axes)), *(Arg(own) for _ in range(1 + (kind == "layer with bias")))
    return Case(fn, oracle, args, (write_axes(axes),), sizes, mesh, rules)


@st.composite
def attention(draw) -> Case:
    mesh, rules, sizes = draw(surroundings((*AXES, "kv_heads", "head_dim")))
    group = draw(st.sampled_from([1, 2, 3]))
    sizes["heads"] = math.lcm(sizes["heads"], sizes["kv_heads"] * group)
    sizes["seq"] = min(sizes["seq"], 16) if sizes["seq"] % 16 == 0 else sizes["seq"]
    batch = draw(st.sampled_from([(), ("batch",), ("batch", "mlp")]))
    q, kv = (write_axes((*batch, "seq", heads, "head_dim")) for heads in ("heads", "kv_heads"))
    marks = Arg(write_axes((*batch, "seq")), high=draw(st.integers(1, 4)))
    causal = draw(st.booleans())
    names = draw(st.lists(st.sampled_from(["positions", "segments"]), unique=True))

    def fn(q_, k, v, *given):
        return (ft.attention(f"{q}, {kv}", q_, k, v, causal=causal, **dict(zip(names, given, strict=True))),)

    def oracle(q_, k, v, *given):
        n, shared = q_.shape[-3], q_.shape[-2] // k.shape[-2]
        k, v = k.repeat_interleave(shared, -2), v.repeat_interleave(shared, -2)
        scores = torch.einsum("...qhd, ...khd -> ...hqk", q_, k) * q_.shape[-1] ** -0.5
        marks = dict(zip(names, given, strict=True))
        at, segments = marks.get("positions", torch.arange(n)), marks.get("segments", torch.zeros(n))
        if causal and names == ["positions"]:  # documents begin where positions do not ascend
            segments = torch.cat([torch.zeros_like(at[..., :1]), (at.diff(dim=-1) <= 0).long().cumsum(-1)], -1)
        seen = segments[..., :, None] == segments[..., None, :]
        seen = seen & (at[..., :, None] >= at[..., None, :]) if causal else seen
        seen = seen.unsqueeze(-3) if seen.dim() > 2 else seen
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        return (torch.einsum("...hqk, ...khd -> ...qhd", weights, v),)

    return Case(fn, oracle, (Arg(q), Arg(kv), Arg(kv), *(marks for _ in names)), (q,), sizes, mesh, rules)


# --- the laws -------------------------------------------------------------------------------------------------------


@st.composite
def hidden(draw, case: Case, axis: str) -> Case:
    """The case for each position of an axis, which at least one operand of each result has."""
    places = [draw(st.none() | st.integers(0, len(arg.pattern.split()))) for arg in case.args]
    common = range(len(places)) if len(case.results) == 1 else case.common
    if any(place is None for place in places) and all(places[i] is None for i in common):
        places = [0] * len(places)
    if axis == "copy":
        return batched(case, axis, places, torch.func.vmap)
    return batched(case, axis, places, lambda fn, in_dims: ft.vmap(fn, in_dims, axis=axis))


def with_free_examples(case: Case) -> Case:
    """Rules under which no axis but the examples has the mesh dims of the examples, as per-example gradients need."""
    own = case.rules["example"]
    free = {axis: tuple(dim for dim in dims if dim not in own) for axis, dims in case.rules.items()}
    return case._replace(rules=ft.AxisRules({**free, "example": own}))


def per_copy(draw, case: Case) -> Case:
    return draw(hidden(case, "copy"))


def per_example(draw, case: Case) -> Case:
    return draw(hidden(case, "example"))


def with_shared(draw, case: Case) -> Case:
    """Some operands are the same for all examples, of which each rank has some; they may meet others in plain ops."""
    rules = ft.AxisRules({axis: "dp" if axis == "example" else None for axis in case.rules})
    case = case._replace(mesh={"dp": 2}, rules=rules, sizes=case.sizes | {"example": 4})
    may = [i for i in range(len(case.args)) if i not in case.common] if len(case.results) == 1 or case.common else []
    most = min(len(may), len(case.args) - 1)
    shared = draw(st.sets(st.sampled_from(may), min_size=1, max_size=most)) if most else ()
    places = [None if i in shared else 0 for i in range(len(case.args))]
    return batched(case, "example", places, lambda fn, in_dims: ft.vmap(fn, in_dims, axis="example"))


LAWS = {  # what is the same on every mesh, as cases made of a case
    "values": lambda draw, case: case,
    "cotangents": lambda draw, case: vjp_of(case),
    "tangents": lambda draw, case: jvp_of(case),
    "hessians": lambda draw, case: hvp_of(case),
    "torch_vmap_over_an_axis_that_nothing_shards": per_copy,
    "ft_vmap_over_an_axis_that_the_mesh_may_shard": per_example,
    "cotangents_of_ft_vmap": lambda draw, case: vjp_of(per_example(draw, case)),
    "cotangents_of_what_examples_share": lambda draw, case: vjp_of(with_shared(draw, case)),
    "gradients_per_example": lambda draw, case: per_example(draw, vjp_of(with_free_examples(case))),
    "cotangents_of_nested_vmaps": lambda draw, case: vjp_of(per_example(draw, per_copy(draw, case))),
}
OPS = [einsum, reduce, broadcast, take, iota, select, select_by_tensor, constrain, cross_entropy, norm, attention]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("law", LAWS)
@settings(max_examples=10)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_ops_are_the_same_on_every_mesh(law, op, data, seed):
    check(LAWS[law](data.draw, data.draw(op())), seed)


@settings(max_examples=10)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_second_derivatives_of_a_loss_sum_over_all_examples_that_share_it(data, seed):
    check(vjp_of(with_shared(data.draw, vjp_of(data.draw(cross_entropy())))), seed)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_sums_of_exponentials_are_exact_at_any_magnitude(shift):
    """Softmax is the same of shifted logits: each rank shifts by the maximum over all of them."""
    rules, mesh = ft.AxisRules({"batch": "dp", "vocab": "tp"}), dict(dp=2, tp=2)
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 100 + shift
    labels = torch.arange(4)

    def ours(x, labels):
        return ft.cross_entropy("batch vocab, batch", x, labels), ft.reduce("batch vocab -> batch", x, op="logsumexp")

    run = sharded(ours, ("batch vocab", "batch"), "batch", mesh=mesh, rules=rules)
    expected = F.cross_entropy(x, labels, reduction="none"), x.logsumexp(-1)
    assert_close(run(x, labels), expected)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@settings(max_examples=8)
@given(data=st.data())
def test_what_a_transpose_runs_is_of_the_phase_backward(op, data):
    case = data.draw(op())

    def rank(*tensors):
        floats, taps = [tensors[i] for i in case.floats], []
        see = lambda call, xs, run: taps.append(call) or run(call, xs)
        of_floats = lambda *xs: case.fn(*(dict(enumerate(tensors)) | dict(zip(case.floats, xs, strict=True))).values())
        with using(current().inside(Around(taps, op=see, sees_every_op=True))):
            outs, back = torch.func.vjp(of_floats, *floats)
            forward = len(taps)
            grads = back(outs)
        found = [call.env.phase for call in taps]
        assert found == ["forward"] * forward + ["backward"] * (len(found) - forward)
        return grads

    patterns = tuple(arg.pattern for arg in case.args)
    shapes = [[case.sizes[axis] for axis in parse_axes(pattern)] for pattern in patterns]
    dtypes = [torch.float64 if arg.high is None else torch.int64 for arg in case.args]
    values = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    sharded(rank, patterns, tuple(patterns[i] for i in case.floats), mesh=case.mesh, rules=case.rules)(*values)


def test_forward_mode_is_refused_on_threads():
    """Torch's forward-AD levels are global to the process: rank 1 asks for no derivative, so that levels do not mix."""

    def one_asks(mesh, x):
        total = ft.spmd(lambda x: ft.reduce("batch ->", x), mesh=mesh, rules=ft.AxisRules({"batch": "dp"}))
        return torch.func.jvp(total, (x,), (x,)) if mesh.rank == 0 else total(x)

    with pytest.raises(ft.MeshError, match="jvp of contraction:\n  - torch's forward mode is not thread-safe"):
        ft.simulate(dp=2)(one_asks)(torch.ones(2))


def test_forward_mode_of_lookups_and_losses_is_that_of_plain_torch():
    """On a mesh of one process, where nothing is sent: tangents over more are in tests/test_gloo.py."""
    mesh, rules = ft.make_mesh(dp=1), ft.AxisRules({"batch": "dp", "seq": None, "vocab": None, "embed": None})
    x, t = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))[:, 0]
    ids, labels = torch.tensor([2, 0, 1]), torch.tensor([1, -100, 3, 0])

    def ours(x):
        looked = ft.take("batch, vocab embed -> batch embed", ids, x)
        chosen = ft.select("vocab embed, vocab -> vocab", x, labels.clamp(min=0))
        losses = ft.cross_entropy("vocab embed, vocab", x, labels)
        twice = torch.func.grad(lambda x: ft.cross_entropy("vocab embed, vocab -> ", x, labels))(x)
        return looked, chosen, losses, twice

    def plain(x):
        losses = F.cross_entropy(x, labels, reduction="none")
        twice = torch.func.grad(lambda x: F.cross_entropy(x, labels, reduction="sum"))(x)
        return x[ids], x.gather(1, labels.clamp(min=0)[:, None])[:, 0], losses, twice

    actual = ft.spmd(lambda: torch.func.jvp(ours, (x,), (t,)), mesh=mesh, rules=rules)()
    assert_close(actual, torch.func.jvp(plain, (x,), (t,)))
