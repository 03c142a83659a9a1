"""Mistakes in calls of `ft.accumulate`: each has one error that names all that is wrong, before anything is sent."""

from __future__ import annotations

from textwrap import dedent

import pytest
import torch
from programs import RULES, matmuls

import functitan as ft


def calling(k=2, fn=matmuls, params=None, batch=None, mesh=None, rules=RULES, **options):
    """`ft.accumulate` on every rank of a virtual mesh, of values that are shards there."""
    params = {"up": torch.ones(8, 12), "down": torch.ones(12, 8)} if params is None else params
    batch = torch.ones(8, 8) if batch is None else batch
    options.setdefault("patterns", {"up": "embed mlp", "down": "mlp embed"})
    run = lambda: ft.accumulate(fn, k, **options)(params, batch)
    return run if mesh is None else lambda: ft.simulate(**mesh)(lambda mesh: ft.spmd(run, mesh=mesh, rules=rules)())()


BAD = {  # what is wrong: (the call, the kind of error, its whole text)
    "k is not a number of microbatches": (
        lambda: ft.train_step(matmuls, ft.optim.sgd(0.1), accumulate=0),
        ft.FunctitanError,
        """\
        ft.accumulate:
          - k is 0: it must be a whole number of at least 1
          Fix: k is the number of microbatches: it divides the examples that each rank has""",
    ),
    "k does not divide the batch": (
        calling(batch={"x": torch.ones(6, 8), "y": [torch.ones(6), 2.0]}, k=4, mesh=dict(dp=2, fsdp=2)),
        ft.FunctitanError,
        """\
        ft.accumulate: 4 microbatches:
          - batch.x: 6 examples on this rank (dp=2·fsdp=2) are not divisible by 4
          - batch.y.0: 6 examples on this rank (dp=2·fsdp=2) are not divisible by 4
          Fix: k is the number of microbatches: it divides the examples that each rank has""",
    ),
    "the batch's tensors differ in size": (
        calling(batch={"x": torch.ones(6, 8), "mask": torch.ones(4, 4)}),
        ft.FunctitanError,
        """\
        ft.accumulate: the batch's tensors differ in size:
          - batch.mask: 4 examples on this rank
          - batch.x: 6 examples on this rank
          Fix: the first axis of each tensor is the batch; where all examples share one, give patterns that say so: \
batch_patterns={'x': 'batch embed', 'mean': 'embed'}""",
    ),
    "the batch has no examples": (
        calling(batch={"rate": torch.ones(())}),
        ft.FunctitanError,
        """\
        ft.accumulate:
          - the batch has no tensor with a batch axis
          Fix: the first axis of each tensor is the batch; where all examples share one, give patterns that say so: \
batch_patterns={'x': 'batch embed', 'mean': 'embed'}""",
    ),
    "parameters without a derivative": (
        calling(params={"up": torch.ones(8, 12), "down": torch.ones(12, 8), "steps": torch.tensor(3), "name": "x"}),
        ft.FunctitanError,
        """\
        ft.accumulate: parameters without a derivative:
          - name is a value of type 'str'
          - steps is int64[]
          Fix: freeze such leaves: patterns=ft.trainable(declarations, globs of the others)""",
    ),
    "no patterns on a mesh": (
        calling(patterns=None, mesh=dict(fsdp=2)),
        ft.PatternError,
        """\
        ft.accumulate:
          - patterns is None, on a mesh
          Fix: say how each parameter is sharded: ft.accumulate(loss_fn, k, patterns=declarations)""",
    ),
    "a pattern of another rank": (
        calling(patterns={"up": "embed mlp", "down": "mlp"}, mesh=dict(fsdp=2)),
        ft.PatternError,
        """\
        ft.accumulate: down:
          - pattern 'mlp' names 1 axes, the tensor has 2: (12, 8)
          Fix: name each dimension of the tensor once, in order""",
    ),
    "a rule before the batch's takes its mesh dims": (
        calling(mesh=dict(fsdp=2), rules=ft.AxisRules({"mlp": ("tp", "fsdp"), "batch": ("dp", "fsdp"), "embed": None})),
        ft.RulesError,
        """\
        ft.accumulate:
          - rule 'mlp' stands before 'batch' and takes 'fsdp' first in tensors that have both
          Fix: put the rule of 'batch' first in the table""",
    ),
    "a batch axis without a rule": (
        calling(mesh=dict(fsdp=2), batch_axis="bach"),
        ft.RulesError,
        """\
        pattern 'bach':
          - axis 'bach' of 'bach' has no rule (did you mean 'batch'?)
          Fix: add the axis to the rules; None keeps it whole, as in rules.replace(head_dim=None)""",
    ),
    "sizes that to_rules do not divide": (
        calling(mesh=dict(fsdp=8), to_rules=RULES.replace(mlp="fsdp")),
        ft.LayoutError,
        """\
        ft.accumulate: to_rules:
          - down ('mlp embed', shape (12, 64)): axis 'mlp' of size 12 is not divisible by 8 (fsdp=8); 8 or 16 would be
          - up ('embed mlp', shape (64, 12)): axis 'mlp' of size 12 is not divisible by 8 (fsdp=8); 8 or 16 would be
          Fix: change the sizes, the mesh, or the rules of to_rules""",
    ),
    "aux that is no number": (
        calling(fn=lambda params, x, key: (matmuls(params, x, key), {"name": "x", "rows": x.sum(1)})),
        ft.FunctitanError,
        """\
        ft.accumulate: aux is merged over microbatches and replicas:
          - aux.name is a str
          Fix: return tensors and numbers beside the loss""",
    ),
    "a loss that is not (sum, count)": (
        calling(fn=lambda params, x, key: x.sum()),
        ft.FunctitanError,
        """\
        ft.accumulate: the loss function:
          - it returned float32[]
          Fix: return (sum, count), scalars over the whole batch: (ft.reduce('batch seq ->', loss), tokens); or (those, aux)""",  # noqa: E501
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(case):
    call, kind, text = BAD[case]
    with ft.record() as ledger, pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert str(caught.value) == dedent(text)
    assert not [e for e in ledger if e.op != "accumulate"]  # nothing but, at most, the weights for a bad loss
