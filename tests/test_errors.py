"""Bad input gets one clear error that names every failure and then the fix, before anything is sent."""

from __future__ import annotations

import time
from textwrap import dedent

import pytest
import torch

import functitan as ft
from functitan.sharding import collectives

RULES = ft.AxisRules(
    {
        "batch": ("dp", "fsdp"),
        "seq": "cp",
        "embed": "fsdp",
        "mlp": "tp",
    }
)
MATMUL = "batch embed, embed mlp -> batch mlp"


def ones(*shape):
    return torch.ones(shape)


def inside(fn, rules=RULES, **mesh):
    """`fn()` on every rank of a virtual mesh."""
    return lambda: ft.simulate(**(mesh or {"fsdp": 2}))(lambda mesh: ft.spmd(fn, mesh=mesh, rules=rules)())()


def shard(values, patterns, **mesh):
    return lambda: ft.simulate(**mesh)(lambda mesh: ft.shard(values, patterns, mesh=mesh, rules=RULES))()


BAD = {  # what is wrong: (the call, the kind of error, its whole text)
    "a name without a rule": (
        inside(lambda: ft.einsum("batch embde, embde mlp -> batch mlp", ones(2, 4), ones(4, 2))),
        ft.RulesError,
        """\
        einsum('batch embde, embde mlp -> batch mlp'):
          - axis 'embde' of 'batch embde' has no rule (did you mean 'embed'?)
          - axis 'embde' of 'embde mlp' has no rule (did you mean 'embed'?)
          Fix: add the axis to the rules; None keeps it whole, as in rules.replace(head_dim=None)""",
    ),
    "a misspelt mesh dim": (
        inside(lambda: None, ft.AxisRules({"batch": "fdsp", "embed": ("tp", "modle")}), fsdp=2, model=2),
        ft.RulesError,
        """\
        AxisRules on this mesh:
          - rule 'batch': unknown mesh dim 'fdsp' (did you mean 'fsdp'?); this mesh has ['fsdp', 'model']
          - rule 'embed': unknown mesh dim 'modle' (did you mean 'model'?); this mesh has ['fsdp', 'model']
          Fix: use one of the mesh's dims, or None""",
    ),
    "sizes that mesh dims do not divide": (
        shard(
            {"layers": [{"up": ones(8, 6)}, {"up": ones(6, 7)}], "x": ones(5, 3)},
            {"layers": "embed mlp", "x": "batch embed"},
            fsdp=3,
            dp=2,
        ),
        ft.LayoutError,
        """\
        ft.shard:
          - layers.0.up ('embed mlp', shape (8, 6)): axis 'embed' of size 8 is not divisible by 3 (fsdp=3); \
6 or 9 would be
          - x ('batch embed', shape (5, 3)): axis 'batch' of size 5 is not divisible by 6 (dp=2·fsdp=3); 6 would be
          Fix: change the sizes, the mesh, or the rules of those axes""",
    ),
    "a pattern of the wrong rank": (
        inside(lambda: ft.reduce("batch embed -> batch", ones(2, 2, 2))),
        ft.PatternError,
        """\
        reduce('batch embed -> batch'):
          - pattern 'batch embed' names 2 axes, the tensor has 3: (2, 2, 2)
          Fix: name each dimension of the tensor once, in order""",
    ),
    "a pattern of the wrong rank in an einsum": (
        inside(lambda: ft.einsum(MATMUL, ones(2, 2, 2), ones(2, 2))),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mlp'):
          - operand 0 'batch embed' has 2 names, its tensor 3 dimensions: (2, 2, 2)
          Fix: tensors are local shards: make them with ft.shard or ft.init, and give each axis one size""",
    ),
    "a repeated axis": (
        lambda: ft.einsum("batch embed embed -> batch", ones(2, 2, 2)),
        ft.PatternError,
        """\
        pattern 'batch embed embed -> batch':
          - axis 'embed' stands twice in 'batch embed embed': each axis of a tensor has a name of its own
          Fix: name each axis once, with spaces between, as in 'batch seq embed'""",
    ),
    "a mesh that the processes do not fill": (
        lambda: ft.make_mesh(fsdp=2, tp=4),
        ft.MeshError,
        """\
        mesh {'fsdp': 2, 'tp': 4}:
          - its sizes multiply to 8, but there are 1 processes
          Fix: start 8 processes (torchrun --nproc-per-node=8, ft.launch), choose sizes whose product is 1, or run on \
threads with ft.simulate""",
    ),
    "sizes that are none": (
        lambda: ft.simulate(fsdp=0, tp="2"),
        ft.MeshError,
        """\
        mesh {'fsdp': 0, 'tp': '2'}:
          - mesh dim 'fsdp' has size 0: a size is a whole number of at least 1
          - mesh dim 'tp' has size '2': a size is a whole number of at least 1
          Fix: write sizes as in dict(fsdp=4, tp=2)""",
    ),
    "rules that cannot be": (
        lambda: ft.AxisRules({"layer": "pp", "a b": "tp", "c": 3, "d": ("tp", "tp")}),
        ft.RulesError,
        """\
        AxisRules:
          - rule 'layer': 'pp' carries pipeline stages, which run different programs; no axis maps to it
          - 'a b' is not an axis name: letters, digits and '_', beginning with a letter
          - rule 'c': 3 is neither a mesh dim, nor a tuple of them, nor None
          - rule 'd': a mesh dim stands twice in ('tp', 'tp')
          Fix: write rules as in AxisRules({'batch': ('dp', 'fsdp'), 'mlp': 'tp', 'head_dim': None})""",
    ),
    "the wrong number of operands": (
        inside(lambda: ft.einsum(MATMUL, ones(2, 2))),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mlp'):
          - the pattern has 2 operands, the call 1 tensors
          Fix: give one tensor for each operand, in order""",
    ),
    "sizes that disagree on a mesh": (
        inside(lambda: ft.einsum(MATMUL, ones(2, 2), ones(5, 2))),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mlp'):
          - axis 'embed' is 10 in operand 1 'embed mlp' (a shard of 5 over ('fsdp',)) but 2 in an earlier one
          Fix: tensors are local shards: make them with ft.shard or ft.init, and give each axis one size""",
    ),
    "an axis from nowhere": (
        lambda: ft.einsum("batch embed, embed mlp -> batch mpl", ones(2, 2), ones(2, 2)),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mpl'):
          - result 'batch mpl' has axis 'mpl' (did you mean 'mlp'?), which none of its operands has
          Fix: ft.broadcast gives a tensor an axis that it lacks""",
    ),
    "a tensor before the pattern": (
        lambda: ft.einsum(torch.tensor(1), "batch ->"),
        ft.PatternError,
        """\
        pattern tensor(1):
          - a pattern is a string, this is a Tensor
          Fix: the pattern comes first and tensors after, as in ft.einsum('a b, b c -> a c', x, w)""",
    ),
    "an index out of range": (
        inside(lambda: ft.select("batch embed -> embed", ones(3, 2), -7)),
        ft.PatternError,
        """\
        select('batch embed -> embed'):
          - index -7 is out of range for axis 'batch' of size 6
          Fix: give one from -6 to 5""",
    ),
    "heads that do not group": (
        lambda: ft.attention("seq heads head_dim, seq kv_heads head_dim", ones(2, 3, 2), ones(2, 2, 2), ones(2, 2, 2)),
        ft.PatternError,
        """\
        attention('seq heads head_dim, seq kv_heads head_dim'):
          - 3 heads are not a multiple of 2 kv heads
          Fix: each kv head serves the same number of heads""",
    ),
    "arguments of ft.vmap whose named axis lies differently": (
        inside(lambda: ft.vmap(lambda x, y: x + y, axis="embed")(ones(2), ones(4))),
        ft.FunctitanError,
        """\
        ft.vmap over 'embed': its local size differs:
          - argument 0: 2 on this rank
          - argument 1: 4 on this rank
          Fix: give the axis one global size, and the first rule of the table, so that it lies alike in every \
argument""",
    ),
    "a mesh that is none": (
        lambda: ft.spmd(lambda: None, mesh={"fsdp": 2}, rules=RULES),
        ft.MeshError,
        """\
        mesh:
          - {'fsdp': 2} is a dict
          Fix: make one by ft.make_mesh(fsdp=2, tp=2), or run under ft.simulate(fsdp=2, tp=2)""",
    ),
    "a mesh without rules": (
        lambda: ft.simulate(fsdp=2)(lambda mesh: ft.spmd(lambda: None, mesh=mesh)())(),
        ft.MeshError,
        """\
        ft.spmd:
          - rules is None
          Fix: give a table: rules=ft.AxisRules({...})""",
    ),
    "a collective that is wrong in two ways": (
        inside(lambda: collectives.all_reduce(ones(3), ("fdsp",), op="avg")),
        ft.MeshError,
        """\
        all_reduce over ('fdsp',):
          - unknown mesh dim 'fdsp' (did you mean 'fsdp'?); this mesh has ['fsdp']
          - op is 'avg', not 'sum' or 'max'
          Fix: the mesh is {'fsdp': 2}""",
    ),
    "a value that is no scalar": (
        lambda: ft.value_and_grad(lambda x: x)(ones(2)),
        ft.FunctitanError,
        """\
        ft.value_and_grad:
          - the function's value is of shape (2,), torch.float32, not a scalar
          Fix: return a scalar: ft.reduce('batch ->', loss); has_aux=True for (value, aux)""",
    ),
    "leaves without a derivative": (
        lambda: ft.value_and_grad(lambda p: p["w"].sum())({"w": ones(2), "ids": [torch.arange(2), 3]}),
        ft.FunctitanError,
        """\
        ft.value_and_grad:
          - argument 0.ids.0: a tensor of torch.int64 has no derivative
          - argument 0.ids.1: a int has no derivative
          Fix: pass such leaves in another argument, or choose argnums""",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_error_before_anything_is_sent(name):
    call, kind, text = BAD[name]
    with ft.record() as ledger, pytest.raises(kind) as error:
        call()
    assert str(error.value) == dedent(text)
    assert isinstance(error.value, ValueError)
    assert len(ledger) == 0


def test_per_example_gradients_of_what_the_examples_mesh_dim_shards_tell_to_reshard():
    """The weight's embed lies over fsdp, where its gradient for each example has the batch."""
    loss = lambda w, x: ft.reduce("mlp ->", ft.einsum("embed, embed mlp -> mlp", x, w))
    per_example = ft.vmap(ft.grad(loss), (None, 0), axis="batch")
    with ft.record() as ledger, pytest.raises(ft.LayoutError) as error:
        inside(lambda: per_example(ones(2, 8), ones(2, 4)))()
    assert str(error.value) == dedent("""\
        vmap of the gradient of einsum('embed, embed mlp -> mlp'):
          - operand 'embed mlp': axis 'embed' lies over ('fsdp',), but in its gradient for each 'batch' over ()
          Fix: reshard the parameters first, so that the hidden axis can have the mesh dim: \
params = ft.reshard(params, patterns, to_rules=rules.replace(embed=None)), \
then differentiate inside ft.spmd(..., rules=those rules)""")
    assert all(entry.phase == "forward" for entry in ledger), "a gradient was sent"


# --- ranks that part ways on a virtual mesh: an error at once, instead of a hang -------------------------------------


def part_ways(of_rank_1, timeout=60.0):
    """Rank 0 sums over the batch while rank 1 does something else; the error, and that it came at once."""

    def program(mesh):
        own = (lambda: ft.reduce("batch -> ", ones(2))) if mesh.rank == 0 else of_rank_1
        return ft.spmd(own, mesh=mesh, rules=RULES)()

    start = time.monotonic()
    with pytest.raises(Exception) as error:
        ft.simulate(fsdp=2, timeout=timeout)(program)()
    assert time.monotonic() - start < 30, "a rank waited for its timeout"
    return error.value


def test_ranks_that_run_different_programs_are_told_what_each_runs():
    error = part_ways(lambda: ft.reduce("batch seq -> ", ones(2, 3)))
    assert isinstance(error, ft.CollectiveError)
    assert str(error) == dedent("""\
        ranks of one group run different programs:
          - rank 0 runs all_reduce over fsdp of float32[] for 'reduce' 'batch -> '
          - rank 1 runs all_reduce over fsdp of float32[] for 'reduce' 'batch seq -> '
          Fix: every rank runs the same ops in the same order""")


def test_a_failing_ranks_own_error_is_raised_with_its_place():
    def fail():
        raise KeyError("lost")

    error = part_ways(fail)
    assert isinstance(error, KeyError) and error.args == ("lost",)
    assert error.__notes__ == ["on virtual rank 1, coordinate {'fsdp': 1}"]


def test_a_rank_that_leaves_early_is_named():
    error = part_ways(lambda: None)
    assert isinstance(error, ft.CollectiveError)
    assert str(error) == dedent("""\
        rank 0 waited in all_reduce over fsdp of float32[] for 'reduce' 'batch -> ':
          - rank 1 left without joining
          Fix: every rank runs the same ops in the same order""")


def test_a_rank_that_does_not_come_is_named_after_the_timeout():
    error = part_ways(lambda: time.sleep(1.0), timeout=0.2)
    assert isinstance(error, ft.CollectiveError)
    assert str(error).splitlines()[1] == "  - ranks [1] did not join within 0.2 s"
