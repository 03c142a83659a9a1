"""The first step on a mesh compares what ranks hold alike, and refuses a batch that is not each rank's shard."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functitan as ft

RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "seq": "cp", "embed": "fsdp", "mlp": "tp"})
DECLARED = {"w": ft.Param("embed mlp", (4, 4)), "scale": ft.Param("mlp", (4,), ft.param.ones)}
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
TX = ft.optim.adamw(0.1)
SIZES = dict(dp=2, tp=2)


def loss(params, batch, key):
    y = ft.einsum("batch embed, embed mlp -> batch mlp", batch["x"], params["w"])
    y = y * ft.broadcast("mlp -> batch mlp", params["scale"])
    return ft.reduce("batch mlp ->", y * y), ft.count("batch mlp", y)


def stepped(change=lambda state, mesh: state, batch=None, sizes=SIZES, tx=TX, key=lambda mesh: 0, loss=loss, **options):
    """A step of each rank from a state that `change` has changed, with a batch that `batch(mesh)` gives."""

    def rank(mesh):
        of_rank = ft.random.key(key(mesh))
        state = change(ft.TrainState.create(DECLARED, tx, of_rank, mesh=mesh, rules=RULES), mesh)
        its = {"x": ft.shard(X, "batch embed", mesh=mesh, rules=RULES)} if batch is None else batch(mesh)
        return ft.train_step(loss, tx, **options)(state, its)[1]["count"].item()

    return ft.simulate(**sizes)(rank)()


@pytest.mark.parametrize("check", ["first", True])
def test_ranks_that_begin_from_other_keys_are_told(check):
    with pytest.raises(ft.ReplicationError) as error:
        stepped(key=lambda mesh: mesh.rank, check=check)
    text = str(error.value)
    assert "params.w: 'embed mlp', float32[4, 2], differs along dp" in text and "key: int64[2], differs" in text
    assert "params.scale" not in text and "Fix: begin all ranks alike: one key" in text
    assert stepped(key=lambda mesh: mesh.rank, check=False) == [32.0] * 4


OPTIMIZERS = {
    "adamw": TX,
    "momentum": ft.optim.sgd(0.1, momentum=0.9),
    "adafactor": ft.optim.adafactor(0.1),
    "bfloat16_state": ft.optim.bfloat16_state(ft.optim.adamw(0.1)),
    "loss scale": ft.optim.dynamic_loss_scale(ft.optim.adamw(0.1)),
    "stored": ft.optim.stored(ft.optim.adamw(0.1), rules=RULES.replace(mlp=("tp", "dp"))),
}


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_leaf_of_a_state_that_differs_is_named(data):
    """Of every optimizer: a leaf of one rank is changed, and told if its declaration does not shard it there."""
    tx = OPTIMIZERS[data.draw(st.sampled_from([*OPTIMIZERS]))]
    state = ft.TrainState.declare(DECLARED, tx, ft.random.key(0))
    paths = [path for path in ft.tree.paths(state) if path != "step"]
    path, rank = data.draw(st.sampled_from(paths)), data.draw(st.integers(0, 3))
    leaf = dict(zip(ft.tree.paths(state), ft.tree.leaves(state), strict=True))[path]

    def change(state, mesh):
        if mesh.rank == rank:
            dict(zip(ft.tree.paths(state), ft.tree.leaves(state), strict=True))[path].add_(1)
        return state

    pattern = getattr(leaf, "pattern", "")
    table = getattr(leaf, "rules", None) or RULES
    sharded = {dim for axis in pattern.split() for dim in table[axis]} & {"dp", "tp"}
    if sharded == {"dp", "tp"}:
        assert stepped(change, tx=tx) == [32.0] * 4
    else:
        with pytest.raises(ft.ReplicationError, match=rf"(?m)- {path}: .* differs along"):
            stepped(change, tx=tx)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_begins_alike_is_not(name):
    assert stepped(tx=OPTIMIZERS[name], check=True) == [32.0] * 4


def test_a_long_integer_that_differs_in_its_last_bit_is_told():
    def rank(mesh):
        value = torch.tensor([2**62 + mesh.rank])
        ft.spmd(ft.check_equal, mesh=mesh, rules=RULES)({"n": value})

    with pytest.raises(ft.ReplicationError, match="n: int64"):
        ft.simulate(dp=2)(rank)()


# --- the batch --------------------------------------------------------------------------------------------------------

REPEATED = "ranks repeat each other's batch"
DATA = {
    "constants": (lambda mesh: {"x": torch.ones(4, 4)}, "batch.x: float32[4, 4] is the same on all ranks along dp=2"),
    "the whole batch": (lambda mesh: {"x": X}, "batch.x: float32[8, 4] is the same"),
    "one seed on all ranks": (lambda mesh: {"x": X[:4].clone()}, "batch.x"),
    "several tensors": (lambda mesh: {"x": X, "labels": torch.arange(8)}, "batch.labels: int64[8] is the same"),
}


@pytest.mark.parametrize("case", DATA)
def test_a_batch_that_all_ranks_have_alike_is_refused(case):
    batch, line = DATA[case]
    with pytest.raises(ft.LayoutError, match=REPEATED) as error:
        stepped(batch=batch)
    assert line in str(error.value) and "ft.shard(batch, patterns" in str(error.value)
    assert len(stepped(batch=batch, check=False)) == 4


def test_only_some_mesh_dims_may_be_repeated():
    half = lambda mesh: {"x": X[4 * mesh.index(("dp",)) :][:4]}
    assert stepped(batch=half) == [32.0] * 4  # along tp all have the same
    with pytest.raises(ft.LayoutError, match=r"the same on all ranks along fsdp=2$"):
        try:
            stepped(batch=half, sizes=dict(dp=2, fsdp=2))
        except ft.LayoutError as error:
            raise ft.LayoutError(str(error).splitlines()[1]) from None


OWN = {
    "constants that ft.shard cut": lambda mesh: {
        "x": ft.shard(torch.ones(8, 4), "batch embed", mesh=mesh, rules=RULES)
    },
    "examples of its own": lambda mesh: {"x": X[:4] + mesh.index(("dp",))},
    "a mask that is the same, beside": lambda mesh: {"x": X[:4] + mesh.index(("dp",)), "mask": torch.ones(4)},
    "what is not known": lambda mesh: {"x": X[:4] + mesh.index(("dp",)), "nan": torch.full((4,), torch.nan)},
    "a scalar, and no tensor": lambda mesh: {"x": X[:4] + mesh.index(("dp",)), "rate": torch.tensor(2.0), "name": "x"},
}


@pytest.mark.parametrize("case", OWN)
def test_a_batch_of_each_ranks_own_passes(case):
    assert stepped(batch=OWN[case]) == [32.0] * 4


def test_patterns_of_the_batch_say_which_axes_are_sharded():
    """A sequence that was not cut is told by its pattern, and what ranks should share is compared."""
    other = lambda mesh, x: {"x": x, "stats": torch.zeros(4) + 1.0 * (mesh.rank == 1)}
    patterns = {"x": "batch embed", "stats": "seq"}
    same = lambda mesh: {"x": X[:4] + mesh.index(("dp",)), "stats": torch.ones(4)}
    assert stepped(batch=same, batch_patterns=patterns) == [32.0] * 4
    with pytest.raises(ft.ReplicationError, match=r"batch\.stats: 'seq', float32"):
        stepped(batch=lambda mesh: other(mesh, X[:4] + mesh.index(("dp",))), batch_patterns=patterns)
    with pytest.raises(ft.LayoutError, match=r"batch\.stats: .* along cp=2"):
        own = lambda mesh: {"stats": torch.ones(4)}
        stepped(batch=own, batch_patterns={"stats": "seq"}, sizes=dict(cp=2))


@pytest.mark.parametrize("options", [{}, {"accumulate": 1}], ids=["plain", "accumulated"])
def test_shards_of_several_sizes_are_refused_with_the_ranks_that_have_each(options):
    ragged = lambda mesh: {"x": X[: 2 + 2 * mesh.index(("dp",))] + mesh.rank // 2}
    with pytest.raises(ft.LayoutError) as error:
        stepped(batch=ragged, **options)
    assert "- batch.x: (2, 4) on ranks 0, 1; (4, 4) on ranks 2, 3" in str(error.value)


def test_batches_of_other_trees_are_other_programs():
    batch = lambda mesh: {"x": X[:4] + mesh.rank // 2} | ({"extra": torch.ones(2)} if mesh.rank else {})
    with pytest.raises(ft.CollectiveError, match=r"rank 0 runs a step of batch\.x"):
        stepped(batch=batch)


def test_only_checked_steps_compare_and_no_ledger_sees_it():
    tx = ft.optim.sgd(0.1)
    step = ft.train_step(loss, tx)

    def rank(mesh):
        state = ft.TrainState.create(DECLARED, tx, ft.random.key(0), mesh=mesh, rules=RULES)
        batch, ops = {"x": ft.shard(X, "batch embed", mesh=mesh, rules=RULES)}, []
        for _ in range(2):
            with ft.record() as ledger:
                state, _ = step(state, batch)
            ops.append([entry.op for entry in ledger])
        return ops

    first, second = ft.simulate(**SIZES)(rank)()[0]
    assert first == second and "check_equal" not in first
