"""`ft.linear_cross_entropy` is the cross entropy of the einsum, on every mesh, without the logits."""

from __future__ import annotations

import math
from textwrap import dedent

import pytest
import torch
from cases import Arg, Case, check
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import LAWS, surroundings, torch_einsum
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import functitan as ft
from functitan.axes import write_axes
from functitan.ops.chunked_loss import default_chunk
from functitan.testing.sharded import sharded

AXES = ("batch", "seq", "heads", "embed", "vocab")
PATTERN = "batch seq embed, embed vocab, batch seq"
RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "vocab": "tp", "seq": ("cp", "tp"), "embed": ("fsdp", "cp")})
SHAPES = {"batch": 4, "seq": 8, "embed": 4, "vocab": 12}
PATTERNS = ("batch seq embed", "embed vocab", "batch seq")


def oracle_loss(logits, labels, z_loss, ignore_index):
    """Rows of plain torch: "rows vocab", "rows" -> "rows"."""
    loss = F.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
    return loss + z_loss * logits.logsumexp(-1) ** 2 * (labels != ignore_index)


def example(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [[SHAPES[axis] for axis in pattern.split()] for pattern in PATTERNS]
    x, w = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes[:2])
    return x, w, torch.randint(0, SHAPES["vocab"], shapes[2], generator=generator)


def close(actual, expected, tolerance=1e-12):  # float64 sums of tens of products in another order
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- the law of every op --------------------------------------------------------------------------------------------


@st.composite
def linear_cross_entropy(draw) -> Case:
    mesh, rules, sizes = draw(surroundings(AXES))
    embed, vocab, *axes = draw(st.permutations(AXES))
    rows = tuple(axes[: draw(st.integers(0, 3))])
    xs, ws = tuple(draw(st.permutations([embed, *rows]))), tuple(draw(st.permutations([embed, vocab])))
    result = rows if draw(st.booleans()) else tuple(draw(st.permutations(rows)))[: draw(st.integers(0, len(rows)))]
    pattern = f"{write_axes(xs)}, {write_axes(ws)}, {write_axes(rows)} -> {write_axes(result)}"
    real = draw(st.integers(1, sizes[vocab]))
    options = {
        "chunk": draw(st.none() | st.integers(1, 1 + math.prod(sizes[axis] for axis in rows))),
        "z_loss": draw(st.sampled_from([0.0, 0.1])),
    }
    if real < sizes[vocab]:
        options["vocab_size"] = real

    def oracle(x, w, labels):
        logits = torch_einsum([xs, ws], (*rows, vocab), x, w)[..., :real].reshape(-1, real)
        loss = oracle_loss(logits, labels.flatten(), options["z_loss"], ignore_index=0).view(labels.shape)
        return (torch_einsum([rows], result, loss),)

    def fn(x, w, labels):
        return (ft.linear_cross_entropy(pattern, x, w, labels, ignore_index=0, **options),)

    args = Arg(write_axes(xs)), Arg(write_axes(ws)), Arg(write_axes(rows), high=real)
    return Case(fn, oracle, args, (write_axes(result),), sizes, mesh, rules)


@pytest.mark.parametrize("law", [law for law in LAWS if law not in ("tangents", "hessians")])
@settings(max_examples=6)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_it_is_the_same_on_every_mesh(law, data, seed):
    check(LAWS[law](data.draw, data.draw(linear_cross_entropy())), seed)


@pytest.mark.parametrize("chunk", [None, 1, 5, 32, 100])
@pytest.mark.parametrize("weight", ["embed vocab", "vocab embed"])
def test_without_a_mesh_it_is_torchs_whatever_the_chunk(chunk, weight):
    x, w, labels = example()
    labels[0, :3] = -100
    pattern = f"batch seq embed, {weight}, batch seq"

    def ours(x, w):
        w = w if weight == "embed vocab" else w.T
        return ft.linear_cross_entropy(pattern, x, w, labels, chunk=chunk, z_loss=0.1, vocab_size=12)

    def theirs(x, w):
        return oracle_loss((x @ w).flatten(0, 1), labels.flatten(), 0.1, -100).view(labels.shape)

    g = torch.randn(labels.shape, dtype=torch.float64)
    (value, back), (expected, other) = torch.func.vjp(ours, x, w), torch.func.vjp(theirs, x, w)
    close(value, expected)
    close(back(g), other(g))
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    close(torch.autograd.grad(ours(*leaves), leaves, g), other(g))
    total = lambda x, w: theirs(x, w).sum()
    close(ft.grad(lambda x, w: ours(x, w).sum(), (0, 1))(x, w), torch.func.grad(total, (0, 1))(x, w))


def test_without_a_mesh_vmaps_give_gradients_for_each_example():
    x, w, labels = example()

    def ours(w, x, labels):
        return ft.linear_cross_entropy("seq embed, embed vocab, seq ->", x, w, labels, chunk=3)

    def theirs(w, x, labels):
        return F.cross_entropy(x @ w, labels, reduction="sum")

    expected = torch.func.vmap(torch.func.grad(theirs), (None, 0, 0))(w, x, labels)
    close(torch.func.vmap(torch.func.grad(ours), (None, 0, 0))(w, x, labels), expected)
    close(ft.vmap(ft.grad(ours), (None, 0, 0), axis="batch")(w, x, labels), expected)


# --- what is held ---------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an op gives, and how many matmuls there are."""

    def __init__(self):
        super().__init__()
        self.numel, self.matmuls = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        self.matmuls += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return out


def gradient(x, w, labels, **options):
    return ft.grad(lambda x, w: ft.linear_cross_entropy(PATTERN + " ->", x, w, labels, **options), (0, 1))(x, w)


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2}, {"tp": 2}, {"fsdp": 2, "tp": 2}], ids=str)
def test_no_tensor_has_the_elements_of_the_logits(mesh):
    rows, embed, vocab, chunk = 64, 4, 48, 8
    x, w, labels = torch.randn(4, 16, embed), torch.randn(embed, vocab), torch.randint(0, vocab, (4, 16))

    def rank(mesh, *values):
        values = ft.shard(values, PATTERNS, mesh=mesh, rules=RULES)
        with Largest() as seen:
            ft.spmd(gradient, mesh=mesh, rules=RULES)(*values, chunk=chunk)
        return seen.numel

    local = rows // mesh.get("fsdp", 1) * vocab // mesh.get("tp", 1)  # of the logits that a rank would have
    for numel in ft.simulate(**mesh)(rank)(x, w, labels) if mesh else [rank(None, x, w, labels)]:
        assert numel == max(chunk * vocab // mesh.get("tp", 1), rows * embed // mesh.get("fsdp", 1))
        assert numel < local / 3


def test_memory_is_that_of_operands_gradients_and_chunks():
    """256 rows and 8192 columns: logits would be 8 MiB; a chunk is 1 MiB."""
    x, w, labels = (ft.Param(p, s) for p, s in zip(PATTERNS, ((2, 128, 64), (64, 8192), (2, 128)), strict=True))
    program = lambda x, w, labels: gradient(x, w, labels.long(), chunk=32)
    ledger = ft.explain(program, x, w, labels, mesh=dict(dp=1), rules=RULES)
    x_bytes, w_bytes, chunk_bytes = 256 * 64 * 4, 64 * 8192 * 4, 32 * 8192 * 4
    rows = 30 * 256 * 8  # some vectors of rows
    assert ledger.peak_bytes - ledger.argument_bytes <= x_bytes + w_bytes + chunk_bytes + rows


def test_a_chunk_is_no_larger_than_x_by_default():
    assert default_chunk(8192, 4096, 128256) == 261
    assert default_chunk(8192, 4096, 128256) * 128256 <= 8192 * 4096
    assert default_chunk(100, 8, 1000) == 256


@pytest.mark.parametrize(("which", "matmuls"), [((0, 1), 4), (0, 3), (1, 3)])
def test_what_is_frozen_costs_no_matmul(which, matmuls):
    """One matmul in forward, the same again in backward, and one for each gradient that is wanted; of each chunk."""
    x, w, labels = example()
    with Largest() as seen:
        ft.grad(lambda x, w: ft.linear_cross_entropy(PATTERN + " ->", x, w, labels, chunk=8), which)(x, w)
    assert seen.matmuls == matmuls * math.ceil(labels.numel() / 8)


# --- what is sent ---------------------------------------------------------------------------------------------------


def entries(ledger):
    short = {"all_gather": "AG", "all_reduce": "AR", "reduce_scatter": "RS", "all_to_all": "A2A"}
    return [(e.phase, short[e.collective], e.mesh_dims, e.bytes) for e in ledger]


def recorded(mesh, which=(0, 1), chunk=3, pattern=PATTERN + " ->"):
    """The entries of gradients, as predicted; and they are what runs."""
    values = example()

    def program(x, w, labels):
        loss = lambda x, w: ft.linear_cross_entropy(pattern, x, w, labels, chunk=chunk)
        return ft.grad(loss if pattern.endswith("->") else lambda *xs: ft.reduce("batch seq ->", loss(*xs)), which)(
            x, w
        )

    def rank(own, *values):
        shards = ft.shard(values, PATTERNS, mesh=own, rules=RULES)
        return ft.spmd(program, mesh=own, rules=RULES)(*shards)

    predicted = ft.explain(program, *values, mesh=mesh, rules=RULES, patterns=PATTERNS)
    with ft.record() as ledger:
        ft.simulate(**mesh)(rank)(*values)
    assert list(ledger) == list(predicted)
    return entries(ledger)


X, W, ROWS = 4 * 8 * 4 * 8, 4 * 12 * 8, 4 * 8 * 8  # bytes, in float64 and int64
FSDP = ("fsdp",)
TP = ("tp",)


def test_fsdp_gathers_the_weight_once_each_way_and_reduces_its_gradient_once():
    gather, scalar = ("AG", FSDP, W // 2), ("AR", FSDP, 8)
    expected = [("forward", *gather), ("forward", *scalar), ("backward", *gather), ("backward", "RS", FSDP, W // 2)]
    assert recorded(dict(fsdp=2)) == expected == recorded(dict(fsdp=2), chunk=1)
    assert recorded(dict(fsdp=2), which=0) == expected[:3]  # the weight is frozen


def test_tp_is_megatrons_loss_parallel():
    """Sequence-parallel x is gathered; rows' maxima, and their sums with labels' logits, are reduced, not chunks'."""
    forward = [("AG", TP, ROWS // 2), ("AG", TP, X // 2), ("AR", TP, ROWS), ("AR", TP, 2 * ROWS)]  # labels first
    backward = [("AG", TP, X // 2), ("RS", TP, X // 2)]
    expected = [("forward", *entry) for entry in forward] + [("backward", *entry) for entry in backward]
    assert recorded(dict(tp=2)) == expected == recorded(dict(tp=2), chunk=1)
    assert recorded(dict(tp=2), which=1) == expected[:-1]  # x is frozen


def test_hsdp_and_context_parallelism_reduce_the_weight_over_both_dims():
    both = recorded(dict(dp=2, fsdp=2))
    assert both[-2:] == [("backward", "RS", FSDP, W // 2), ("backward", "AR", ("dp",), W // 2)]
    merged = ("fsdp", "cp")
    gather = ("AG", merged, 3 * W // 4)
    assert recorded(dict(fsdp=2, cp=2)) == [
        ("forward", *gather),
        ("forward", "AR", ("cp", "fsdp"), 12),
        ("backward", *gather),
        ("backward", "RS", merged, 3 * W // 4),
    ]


def test_2d_is_the_union():
    singles = recorded(dict(fsdp=2)), recorded(dict(tp=2))
    kinds = lambda ledger: sorted(entry[:3] for entry in ledger)
    assert kinds(recorded(dict(fsdp=2, tp=2))) == kinds(singles[0] + singles[1])


def test_only_shards_are_saved():
    saved = []

    def rank(mesh, *values):
        x, w, labels = ft.shard(values, PATTERNS, mesh=mesh, rules=RULES)
        x, w = x.requires_grad_(), w.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
            ft.spmd(lambda *xs: ft.linear_cross_entropy(PATTERN, *xs, chunk=3), mesh=mesh, rules=RULES)(x, w, labels)

    ft.simulate(fsdp=2, tp=2)(rank)(*example())
    # on each rank: x, w and labels as they came (labels brought to the logits), and two results, the loss and its lse
    assert sorted(set(saved)) == [(2, 4, 4), (2, 6), (2, 8)]


# --- precision ------------------------------------------------------------------------------------------------------


def test_the_weights_gradient_is_summed_in_float32():
    """1024 equal rows, one to a chunk: a bfloat16 sum of ones stops at 256."""
    x, w = torch.ones(1024, 1, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.bfloat16)
    labels = torch.zeros(1024, dtype=torch.int64)
    loss = lambda w: ft.linear_cross_entropy("batch embed, embed vocab, batch ->", x, w, labels, chunk=1)
    grads = ft.grad(loss)(w)
    assert grads.dtype == torch.bfloat16
    assert grads.tolist() == [[-512.0, 512.0]]
    wide = ft.grad(loss)(w.float())  # a float32 weight is cast for the matmul, and its gradient is float32
    assert wide.dtype == torch.float32 and wide.tolist() == [[-512.0, 512.0]]


def test_losses_are_float32_of_products_in_the_dtype_of_x():
    x, w, labels = (v.bfloat16() if v.is_floating_point() else v for v in example())
    ours = ft.linear_cross_entropy(PATTERN, x, w.float(), labels, chunk=3)
    theirs = F.cross_entropy((x @ w).float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    assert ours.dtype == torch.float32
    close(ours, theirs, 1e-6)  # float32 exp and log of few terms in another order


@pytest.mark.parametrize("mesh", [{}, {"tp": 2}], ids=str)
def test_logits_of_any_size_overflow_nothing(mesh):
    x, w, labels = example()
    loss = lambda *values: ft.linear_cross_entropy(PATTERN, *values, chunk=5)
    run = sharded(loss, PATTERNS, "batch seq", mesh=mesh, rules=RULES) if mesh else loss
    for scale in (1e3, -1e3, 1e-30):
        expected = F.cross_entropy(scale * (x @ w).flatten(0, 1), labels.flatten(), reduction="none")
        close(run(scale * x, w, labels), expected.view(labels.shape), 1e-10)  # of losses up to 1e4


# --- labels that are none -------------------------------------------------------------------------------------------

LOSSES = {
    "cross_entropy": ("batch vocab, batch", lambda x, w, labels, p: ft.cross_entropy(p, x @ w, labels)),
    "linear_cross_entropy": (
        "batch embed, embed vocab, batch",
        lambda x, w, labels, p: ft.linear_cross_entropy(p, x, w, labels),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mesh", [{}, {"tp": 2}], ids=str)
def test_labels_outside_the_vocabulary_are_refused(name, mesh):
    pattern, loss = LOSSES[name]
    x, w, labels = torch.ones(5, 2), torch.ones(2, 4), torch.tensor([0, 5, -1, -100, 3])
    rules = ft.AxisRules({"batch": None, "embed": None, "vocab": "tp"})
    text = dedent(f"""\
        {name}({pattern!r}):
          - 2 of 5 labels here are neither in the vocabulary, 0 to 3, nor ignore_index=-100: -1, 5
          Fix: labels are global indices into the vocabulary; rows that do not count have ignore_index as label""")

    def rank(mesh, x, w, labels):
        w = ft.shard(w, "embed vocab", mesh=mesh, rules=rules)
        run = lambda x, w, labels: loss(x, w, labels, pattern)
        for transform in (lambda f: f, lambda f: ft.grad(lambda *xs: f(*xs).sum())):
            with pytest.raises(ft.FunctitanError) as error:
                ft.spmd(transform(run), mesh=mesh, rules=rules)(x, w, labels)
            assert str(error.value) == text

    with ft.record() as ledger:
        ft.simulate(**mesh)(rank)(x, w, labels) if mesh else rank(None, x, w, labels)
    assert not list(ledger)


@pytest.mark.parametrize("name", LOSSES)
def test_where_labels_cannot_be_read_such_rows_are_nan(name, monkeypatch):
    """As on CUDA: reading labels would make the device wait."""
    pattern, loss = LOSSES[name]
    for module in ("loss", "linear_loss"):
        monkeypatch.setattr(f"functitan.ops.{module}.check_labels", lambda *_: None)
    x, w, labels = torch.ones(5, 2), torch.ones(2, 4), torch.tensor([0, 5, -1, -100, 3])
    rules = ft.AxisRules({"batch": None, "embed": None, "vocab": "tp"})

    def rank(mesh):
        own = ft.shard(w, "embed vocab", mesh=mesh, rules=rules)
        rows = ft.spmd(lambda x: loss(x, own, labels, pattern), mesh=mesh, rules=rules)(x)
        grads = ft.spmd(ft.grad(lambda x: loss(x, own, labels, pattern).sum()), mesh=mesh, rules=rules)(x)
        return rows.isnan().tolist(), grads.isnan().any(1).tolist()

    for rows, grads in ft.simulate(tp=2)(rank)():
        assert rows == grads == [False, True, True, False, False]


# --- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [{}, {"tp": 2}], ids=str)
def test_second_derivatives_and_forward_mode_are_refused(mesh):
    x, w, labels = example()
    loss = lambda w: ft.linear_cross_entropy(PATTERN + " ->", x, w, labels)
    text = dedent(f"""\
        linear_cross_entropy({PATTERN + " ->"!r}), a derivative other than the first reverse one:
          - it keeps no logits: it has the one derivative that makes them again
          Fix: use ft.cross_entropy of ft.einsum for forward mode and for second derivatives""")
    rules = ft.AxisRules(dict.fromkeys(SHAPES)).replace(vocab="tp")

    def rank(mesh):
        own = ft.shard(w, "embed vocab", mesh=mesh, rules=rules)
        for call in (
            lambda w: ft.hvp(loss, (w,), (w,)),
            lambda w: ft.jvp(loss, (w,), (w,)),
            lambda w: torch.func.grad(lambda w: torch.func.grad(loss)(w).sum())(w),
        ):
            with pytest.raises(ft.FunctitanError) as error:
                ft.spmd(call, mesh=mesh, rules=rules)(own)
            assert str(error.value) == text

    ft.simulate(**mesh)(rank)() if mesh else rank(None)


BAD = {
    "batch embed, embed vocab -> batch": "2 operands and 1 results: x, weight and labels give one loss",
    "batch embed, embed vocab, embed": (
        "weight 'embed vocab' must have two axes, that of x which the labels lack and the vocabulary"
    ),
    "batch seq embed, embed vocab, batch": (
        "x 'batch seq embed' must have all axes of labels 'batch' and one more",
        "weight 'embed vocab' must have two axes, that of x which the labels lack and the vocabulary",
    ),
    "batch embed, embed heads vocab, batch": (
        "weight 'embed heads vocab' must have two axes, that of x which the labels lack and the vocabulary"
    ),
    "batch embed, embed vocab, batch -> seq": "result axis 'seq' is not in the labels",
}


@pytest.mark.parametrize("pattern", BAD)
def test_patterns_that_do_not_fit_say_what_is_wrong(pattern):
    problems = BAD[pattern] if isinstance(BAD[pattern], tuple) else (BAD[pattern],)
    with pytest.raises(ft.PatternError) as error:
        ft.linear_cross_entropy(pattern, *3 * [torch.ones(())])
    fix = "  Fix: write as in 'batch seq embed, vocab embed, batch seq -> batch seq'"
    assert str(error.value).splitlines() == [
        f"linear_cross_entropy({pattern!r}):",
        *(f"  - {problem}" for problem in problems),
        fix,
    ]


def test_sizes_and_options_that_do_not_fit_say_so():
    x, w, labels = example()

    def text(*args, **options):
        with pytest.raises(ft.PatternError) as error:
            ft.linear_cross_entropy(PATTERN, *args, **options)
        return str(error.value).splitlines()[1:]

    assert text(x[0], w, labels) == [
        "  - x: pattern 'batch seq embed' names 3 axes, the tensor has 2: (8, 4)",
        "  Fix: name each dimension of the tensor once, in order",
    ]
    assert text(x, w[:2], labels.float()) == [
        "  - labels: dtype float32, where 64-bit integers are wanted",
        "  - axis 'embed' is 2 in w, but 4 in x",
        "  Fix: cast by x.long(); give each axis one size, in every operand",
    ]
    assert text(x, w, labels, chunk=0) == ["  - chunk is 0", "  Fix: give the number of rows of a chunk, at least 1"]
    assert text(x, w, labels, vocab_size=13) == [
        "  - vocab_size is 13, the weight's axis 'vocab' has 12",
        "  Fix: give the number of its columns that are no padding, or none",
    ]
