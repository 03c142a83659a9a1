"""A shard is refused where no mesh is known, and a renamed tensor by a named op under whose names it lies otherwise."""

from __future__ import annotations

import inspect
import io
import warnings

import pytest
import torch
from torch import nn

import functitan as ft
from functitan.models import gpt2, llama
from functitan.nn import position_embedding, rope

RULES = ft.AxisRules(
    {"batch": "fsdp", "seq": "tp", "free": None, "embed": None, "heads": None, "head_dim": None, "mlp": None, "h": None}
)
KEY = ft.random.key(0)
LLAMA = llama.LlamaConfig(61, 8, 1, 2, 2, 4, 16)
GPT2 = gpt2.GPT2Config(61, 8, 8, 1, 2)
TX = {
    "clip": ft.optim.clip_by_global_norm(1.0),
    "block clip": ft.optim.clip_by_block_rms(1.0),
    "adafactor": ft.optim.adafactor(0.1),
    "muon": ft.optim.muon(0.1),
}


def updated(tx, x):
    return tx.update(x, tx.init(ft.Param("batch embed", tuple(x.shape))), x, patterns="batch embed")


OUTSIDE = {  # of a shard x "batch embed", ids "batch" that are one, and a whole w "embed mlp"
    "einsum": lambda x, ids, w: ft.einsum("batch embed, embed mlp -> batch mlp", x, w),
    "reduce": lambda x, ids, w: ft.reduce("batch embed ->", x),
    "reduce, mean": lambda x, ids, w: ft.reduce("batch embed -> embed", x, op="mean"),
    "reduce, max": lambda x, ids, w: ft.reduce("batch embed ->", x, op="max"),
    "reduce, logsumexp": lambda x, ids, w: ft.reduce("batch embed ->", x, op="logsumexp"),
    "broadcast": lambda x, ids, w: ft.broadcast("batch embed -> batch mlp embed", x),
    "take": lambda x, ids, w: ft.take("batch, mlp embed -> batch embed", ids, w.T),
    "take of a table": lambda x, ids, w: ft.take("mlp, batch embed -> mlp embed", torch.tensor([0]), x),
    "select": lambda x, ids, w: ft.select("batch embed -> embed", x, -1),
    "sizes": lambda x, ids, w: ft.sizes("batch embed", x),
    "count": lambda x, ids, w: ft.count("batch embed", x),
    "iota": lambda x, ids, w: ft.iota("batch embed", "batch", like=x),
    "dropout": lambda x, ids, w: ft.dropout("batch embed", x, KEY, 0.5),
    "rms_norm": lambda x, ids, w: ft.rms_norm("batch embed, embed", x, torch.ones(4)),
    "layer_norm": lambda x, ids, w: ft.layer_norm("batch embed, embed", x, torch.ones(4)),
    "rearrange": lambda x, ids, w: ft.rearrange("batch embed -> embed batch", x),
    "constrain": lambda x, ids, w: ft.constrain("batch embed -> free embed", x),
    "attention": lambda x, ids, w: ft.attention("free h embed, free h embed", *[torch.ones(2, 1, 4)] * 3, segments=ids),
    "cross_entropy": lambda x, ids, w: ft.cross_entropy("batch embed, batch ->", x, ids),
    "linear_cross_entropy": lambda x, ids, w: ft.linear_cross_entropy("batch embed, embed mlp, batch ->", x, w, ids),
    "rope.apply": lambda x, ids, w: rope.apply("batch heads head_dim", x.view(2, 1, 4), theta=1e4, positions=ids),
    "position_embedding": lambda x, ids, w: position_embedding.apply({"embedding": x}, torch.ones(1, 2, 4)),
    "random.normal": lambda x, ids, w: ft.random.normal(KEY, pattern="batch embed", like=x),
    "reshard": lambda x, ids, w: ft.reshard(x, "batch embed", to_rules=RULES),
    "check_equal": lambda x, ids, w: ft.check_equal({"x": x}),
    "global_norm": lambda x, ids, w: ft.optim.global_norm({"x": x}),
    **{name: lambda x, ids, w, tx=tx: updated(tx, x) for name, tx in TX.items()},
    "grad": lambda x, ids, w: ft.grad(lambda y: ft.reduce("batch embed ->", y))(x),
    "grad, twice": lambda x, ids, w: ft.hvp(lambda y: ft.reduce("batch embed ->", y), (x,), (x,)),
    "jvp": lambda x, ids, w: ft.jvp(lambda y: ft.reduce("batch embed ->", y), (x,), (x,)),
    "accumulate": lambda x, ids, w: ft.accumulate(lambda p, b, k: (ft.reduce("batch embed ->", p), w.sum()), 1)(x, w),
    "remat": lambda x, ids, w: ft.remat(lambda y: ft.reduce("batch embed ->", y))(x),
    "jit": lambda x, ids, w: ft.jit(lambda y: ft.reduce("batch embed ->", y), backend="graph")(x),
    "a copy": lambda x, ids, w: ft.reduce("batch embed ->", saved(x)),
}  # fmt: skip


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def shards(mesh):
    put = lambda x, pattern: ft.shard(x, pattern, mesh=mesh, rules=RULES)
    return put(torch.ones(4, 4), "batch embed"), put(torch.zeros(4, dtype=torch.int64), "batch"), torch.ones(4, 3)


def test_the_table_has_every_op_with_a_pattern():
    found = {
        name for name in set(ft.__all__) - {"data"} if next(iter(parameters(getattr(ft, name))), None) == "pattern"
    }
    assert found <= {name.partition(",")[0] for name in OUTSIDE}, found


def parameters(fn):
    return inspect.signature(fn).parameters if inspect.isfunction(fn) else {}


def test_an_op_outside_spmd_refuses_a_shard():
    def run(mesh):
        given, texts = shards(mesh), {}
        for name, call in OUTSIDE.items():
            try:
                call(*given)
                texts[name] = "no error"
            except (RuntimeError, ValueError, TypeError) as error:
                texts[name] = f"{type(error).__name__}: {error}"
        return texts

    for texts in ft.simulate(fsdp=2)(run)():
        for name, text in texts.items():
            assert (
                text.startswith("LayoutError") and "called outside ft.spmd:" in text and "sharded over fsdp=2" in text
            ), (name, text)
            assert "ft.spmd(fn, mesh=mesh, rules=rules)" in text and "ft.unshard(x, pattern" in text


@pytest.mark.parametrize("make", ["init", "TrainState.create", "after a step", "reshard", "restore"])
def test_whatever_makes_a_shard_marks_it(make, tmp_path):
    declared, tx = {"w": ft.Param("batch embed", (4, 4))}, ft.optim.sgd(0.1)
    loss = lambda params, batch, key: (ft.reduce("batch embed ->", params["w"]), ft.reduce("batch ->", batch))

    def run(mesh):
        on = dict(mesh=mesh, rules=RULES)
        state = ft.TrainState.create(declared, tx, KEY, **on)
        if make == "init":
            params = ft.init(declared, KEY, **on)
        elif make == "reshard":
            whole = ft.init(declared, KEY, mesh=mesh, rules=RULES.replace(batch=None))
            move = lambda x: ft.reshard(x, "batch embed", to_rules=RULES)
            params = ft.spmd(move, mesh=mesh, rules=RULES.replace(batch=None))(whole)
        elif make == "restore":
            ft.checkpoint.save(tmp_path / "saved", state)
            params = ft.checkpoint.restore(tmp_path / "saved", state).params
        else:
            batch = ft.shard(torch.ones(4), "batch", **on)
            for _ in range(2 * (make == "after a step")):
                state, _ = ft.train_step(loss, tx)(state, batch)
            params = state.params
        with pytest.raises(ft.LayoutError, match=r"called outside ft\.spmd"):
            ft.reduce("batch embed ->", params["w"])

    ft.simulate(fsdp=2)(run)()


def test_what_is_whole_is_no_shard():
    x, w = torch.ones(4, 4), torch.ones(4, 3)

    def run(mesh):
        on = dict(mesh=mesh, rules=RULES)
        whole = ft.shard({"w": w, "n": x, "k": 3}, {"w": "embed mlp", "n": None, "k": None}, **on)
        back = ft.unshard(ft.shard(x, "batch embed", **on), "batch embed", **on)
        assert ft.reduce("batch embed ->", back) == 16
        return ft.einsum("batch embed, embed mlp -> batch mlp", whole["n"], whole["w"])

    for y in ft.simulate(fsdp=2)(run)():
        assert torch.equal(y, x @ w)
    ft.simulate(pp=2)(lambda mesh: ft.reduce("batch embed ->", ft.shard(x, "batch embed", mesh=mesh, rules=RULES)))()


def test_models_outside_spmd_refuse_their_shards():
    tokens = torch.zeros(2, 4, dtype=torch.int64)

    def run(mesh):
        on = dict(mesh=mesh, rules=llama.RULES)
        for model, config in ((llama, LLAMA), (gpt2, GPT2)):
            rules = getattr(model, "RULES", llama.RULES)
            params = ft.init(model.params(config), KEY, mesh=mesh, rules=rules)
            with pytest.raises(ft.LayoutError, match=r"called outside ft\.spmd"):
                model.apply(params, tokens, config)
        with pytest.raises(ft.LayoutError, match=r"called outside ft\.spmd"):
            function(ft.init(declared, KEY, **on), torch.ones(3, 2))

    function, declared = ft.from_module(nn.Linear(2, 4), {"bias": "mlp", "*": "mlp embed"})
    ft.simulate(fsdp=2, tp=2)(run)()


# Each gives a tensor "batch {n} embed" of global sizes (2, 4, 4), from one
PRODUCERS = {
    "shard": lambda n, x: x,
    "einsum": lambda n, x: ft.einsum(f"batch {n} embed, embed -> batch {n} embed", x, torch.ones(4)),
    "reduce": lambda n, x: ft.reduce(f"batch {n} embed mlp -> batch {n} embed", x[..., None] + torch.ones(3)),
    "broadcast": lambda n, x: ft.broadcast(f"batch {n} -> batch {n} embed", x[..., 0] + 0, embed=4),
    "take": lambda n, x: ft.take(f"batch {n}, mlp embed -> batch {n} embed", x[..., 0].long(), torch.ones(2, 4)),
    "select": lambda n, x: ft.select(f"batch {n} embed mlp -> batch {n} embed", x[..., None] + 0, 0),
    "iota": lambda n, x: ft.iota(f"batch {n} embed", n, like=x),
    "dropout": lambda n, x: ft.dropout(f"batch {n} embed", x, KEY, 0.5),
    "rms_norm": lambda n, x: ft.rms_norm(f"batch {n} embed, embed", x, torch.ones(4)),
    "layer_norm": lambda n, x: ft.layer_norm(f"batch {n} embed, embed", x, torch.ones(4)),
    "rearrange": lambda n, x: ft.rearrange(f"batch {n} (h embed) -> batch {n} (embed h)", x, h=2),
    "constrain": lambda n, x: ft.constrain(f"batch {OTHER[n]} embed -> batch {n} embed", moved(n, x)),
    "random": lambda n, x: ft.random.normal(KEY, (2, 4, 4), pattern=f"batch {n} embed"),
    "reshard": lambda n, x: ft.reshard(x, f"batch {n} embed", to_rules=RULES),
}  # fmt: skip
OTHER = {"free": "seq", "seq": "free"}
CONSUMERS = {
    "reduce": lambda n, x: ft.reduce(f"batch {n} embed -> {n}", x),
    "einsum": lambda n, x: ft.einsum(f"batch {n} embed -> batch", x),
    "broadcast": lambda n, x: ft.broadcast(f"batch {n} embed -> batch {n} embed mlp", x),
    "take": lambda n, x: ft.take(f"mlp, batch {n} embed -> batch {n} mlp", torch.tensor([0]), x),
    "select": lambda n, x: ft.select(f"batch {n} embed -> batch {n}", x, 0),
    "sizes": lambda n, x: ft.sizes(f"batch {n} embed", x),
    "iota": lambda n, x: ft.iota(f"batch {n} embed", n, like=x),
    "rearrange": lambda n, x: ft.rearrange(f"batch {n} embed -> {n} batch embed", x),
    "constrain": lambda n, x: ft.constrain(f"batch {n} embed -> batch mlp embed", x),
    "random": lambda n, x: ft.random.bits(KEY, pattern=f"batch {n} embed", like=x),
    "dropout": lambda n, x: ft.dropout(f"batch {n} embed", x, KEY, 0.5),
    "rms_norm": lambda n, x: ft.rms_norm(f"batch {n} embed, embed", x, torch.ones(4)),
}


FLOATS = {"dropout", "rms_norm"}


def moved(n, x):
    return ft.constrain(f"batch {n} embed -> batch {OTHER[n]} embed", x)


@pytest.mark.parametrize("mesh", [dict(fsdp=2), dict(fsdp=2, tp=2)], ids=str)
@pytest.mark.parametrize(("was", "now"), [("free", "seq"), ("seq", "free"), ("seq", "seq")])
def test_an_axis_that_the_next_op_calls_otherwise(mesh, was, now):
    """It is an error exactly where the two names lie otherwise: seq is sharded over tp, free is whole."""

    def outcome(use, made):
        try:
            use(now, made)
        except ft.LayoutError as error:
            return str(error)
        return ""

    def program(x):
        made = {name: make(was, x) for name, make in PRODUCERS.items()}
        return {
            (a, b): outcome(use, y)
            for a, y in made.items()
            for b, use in CONSUMERS.items()
            if y.is_floating_point() or b not in FLOATS
        }

    def run(own):
        x = ft.shard(torch.ones(2, 4, 4), f"batch {was} embed", mesh=own, rules=RULES)
        return ft.spmd(ft.checked(program), mesh=own, rules=RULES)(x)

    for found in ft.simulate(**mesh)(run)():
        for pair, text in found.items():
            assert bool(text) == (was != now and "tp" in mesh), (pair, text)
            if text:
                assert f"{now!r} is " in text and f"{was!r} was " in text and "ft.constrain(" in text


def patches(img):
    x = ft.rearrange("batch (h ph) (w pw) -> batch (h w) (ph pw)", img, ph=4, pw=4)
    return ft.reduce("batch seq pixels ->", x)


PATCHES = ft.AxisRules(
    {"batch": "fsdp", "seq": "tp", **dict.fromkeys(["h", "w", "h_w", "ph", "pw", "ph_pw", "pixels"])}
)
TEXT = "x was made as 'batch (h w) (ph pw)' by rearrange and is used as 'batch seq pixels': 'seq' is sharded over tp=2"


@pytest.mark.parametrize("way", ["checked", "jit", "explain", "first step"])
def test_a_renamed_composite_is_named_wherever_a_program_runs_for_the_first_time(way):
    img = torch.arange(128.0).view(2, 8, 8)

    def run(mesh):
        x = ft.shard(img, "batch h w", mesh=mesh, rules=PATCHES)
        if way == "first step":
            declared, tx = {"w": ft.Param("pixels", (16,))}, ft.optim.sgd(0.1)
            state = ft.TrainState.create(declared, tx, KEY, mesh=mesh, rules=PATCHES)
            loss = lambda params, x, key: (
                patches(x) * ft.reduce("pixels ->", params["w"]),
                ft.reduce("batch h w ->", x),
            )
            return ft.train_step(loss, tx)(state, x)
        wrapped = ft.checked(patches) if way == "checked" else ft.jit(patches, backend="graph")
        return ft.spmd(wrapped, mesh=mesh, rules=PATCHES)(x)

    with pytest.raises(ft.LayoutError) as error:
        if way == "explain":
            ft.explain(patches, img, mesh=dict(fsdp=2, tp=2), rules=PATCHES, patterns="batch h w")
        else:
            ft.simulate(fsdp=2, tp=2)(run)()
    assert TEXT in str(error.value)
    assert "ft.constrain('batch h_w ph_pw -> batch seq pixels', x)" in str(error.value)


def test_the_fix_gives_the_right_value():
    def mended(img):
        x = ft.rearrange("batch (h ph) (w pw) -> batch (h w) (ph pw)", img, ph=4, pw=4)
        return ft.reduce("batch seq pixels ->", ft.constrain("batch h_w ph_pw -> batch seq pixels", x))

    img = torch.arange(128.0).view(2, 8, 8)
    run = lambda mesh: ft.spmd(ft.checked(mended), mesh=mesh, rules=PATCHES)(
        ft.shard(img, "batch h w", mesh=mesh, rules=PATCHES)
    )
    assert ft.simulate(fsdp=2, tp=2)(run)() == [img.sum()] * 4


def test_parameters_and_batches_are_known_inside_gradients():
    rules = ft.AxisRules({"batch": None, "embed": "fsdp", "mlp": None})
    tx, declared = ft.optim.sgd(0.1), {"w": ft.Param("embed mlp", (4, 4))}

    def run(mesh):
        state = ft.TrainState.create(declared, tx, KEY, mesh=mesh, rules=rules)
        turned = lambda p, x, key: (ft.reduce("mlp embed ->", p["w"]), ft.reduce("batch ->", x))
        return ft.train_step(turned, tx)(state, ft.shard(torch.ones(4), "batch", mesh=mesh, rules=rules))

    with pytest.raises(ft.LayoutError, match="'mlp embed': 'mlp' is whole here, 'embed' was sharded over fsdp=2"):
        ft.simulate(fsdp=2)(run)()


@pytest.mark.parametrize("op", ["mean", "sum", "logsumexp"])
def test_shards_of_several_sizes_are_one_error_that_names_them(op):
    run = lambda mesh: ft.spmd(ft.checked(lambda x: ft.reduce("batch embed ->", x, op=op)), mesh=mesh, rules=RULES)(
        torch.ones(2 + 2 * mesh.rank, 3)
    )
    with pytest.raises(ft.CollectiveError) as error:
        ft.simulate(fsdp=2)(run)()
    first, second = (line for line in str(error.value).splitlines() if line.startswith("  - "))
    assert "rank 0 runs all_reduce" in first and first.endswith("of shards 'batch embed' [2, 3]")
    assert "rank 1 runs all_reduce" in second and second.endswith("of shards 'batch embed' [4, 3]")


def test_a_mesh_dim_that_no_rule_uses_is_a_note_and_a_warning():
    fn = lambda x: ft.reduce("batch embed ->", x)
    says = "'ep' (4 ranks) is used by no rule: 8 ranks do the work of 2"
    notes = ft.explain(fn, torch.empty(4, 4), mesh=dict(fsdp=2, ep=4), rules=RULES, patterns="batch embed").notes
    assert says in notes
    for quiet in (dict(fsdp=2, ep=1), dict(fsdp=2, tp=2), dict(fsdp=2, pp=2)):
        notes = ft.explain(fn, torch.empty(4, 4), mesh=quiet, rules=RULES, patterns="batch embed").notes
        assert not [note for note in notes if "no rule" in note or "patterns=" in note]
    notes = ft.explain(fn, torch.empty(4, 4), mesh=dict(fsdp=2), rules=RULES).notes
    assert "patterns= is not given: tensors among the arguments are whole on every rank" in notes
    run = lambda mesh: ft.spmd(ft.checked(fn), mesh=mesh, rules=RULES)(torch.ones(4, 4))
    with pytest.warns(UserWarning) as found:
        ft.simulate(fsdp=2, ep=4)(run)()
    assert [str(each.message) for each in found] == [
        f"functitan: {says}; let a rule name it, or leave it out of the mesh"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ft.simulate(fsdp=2, ep=1)(run)()
