"""Mistakes in counts, batches, values beside a loss, and loss scales: the call, the kind of error, its whole text."""

from __future__ import annotations

from torch import nn

import functitan as ft
from user_errors.given import ADAM, BATCH, STATE, V, X, inside, step

SMALL = {"w": X[:1, :2]}
MEAN = lambda params, batch, key: (params["w"][0, 0], X.numel())
HITS = lambda params, batch, key: ((params["w"][0, 0], 1), {"hits": V[0]})
WITH_AUX = lambda params, batch, key: ((params["w"][0, 0], 1), {"hits": V[0], "name": "x"})
NORM = nn.BatchNorm1d(2)
OF_NORM, OF_PARAMS, OF_BUFFERS = ft.from_module(NORM, buffers=True)
SCALE = ft.optim.dynamic_loss_scale


def on_mesh(loss, **options):
    """A train step on a mesh that sends nothing."""
    return lambda: inside(lambda: ft.train_step(loss, ADAM, check=False, **options)(STATE, BATCH), dp=2)


def accumulate(loss=MEAN, batch=X, **options):
    return ft.accumulate(loss, 2, patterns="embed mlp", **options)(SMALL, batch)


MISTAKES = {
    "a number of this rank's elements as count, on a mesh": (
        on_mesh(MEAN),
        ft.FunctitanError,
        """\
        ft.train_step: the loss function:
          - the count is the number 8: on a mesh x.numel() and len(x) count this rank's shard
          Fix: count over the whole batch: ft.count('batch mlp', y) for the elements of a tensor of that pattern, \
ft.reduce('batch seq ->', mask) for those that a mask keeps, torch.ones(()) where the sum is a mean already""",
    ),
    "a weight of Python's as count, on a mesh": (
        on_mesh(lambda params, batch, key: ((params["w"][0, 0], 0.5), None)),
        ft.FunctitanError,
        """\
        ft.train_step: the loss function:
          - the count is the number 0.5: on a mesh x.numel() and len(x) count this rank's shard
          Fix: count over the whole batch: ft.count('batch mlp', y) for the elements of a tensor of that pattern, \
ft.reduce('batch seq ->', mask) for those that a mask keeps, torch.ones(()) where the sum is a mean already""",
    ),
    "a number as count in a replica": (
        lambda: inside(accumulate, dp=2),
        ft.FunctitanError,
        """\
        ft.accumulate: the loss function:
          - the count is the number 8: on a mesh x.numel() and len(x) count this rank's shard
          Fix: count over the whole batch: ft.count('batch mlp', y) for the elements of a tensor of that pattern, \
ft.reduce('batch seq ->', mask) for those that a mask keeps, torch.ones(()) where the sum is a mean already""",
    ),
    "a count below 0": (
        lambda: step(lambda params: (params["w"][0, 0], -1)),
        ft.FunctitanError,
        """\
        ft.train_step: the loss function:
          - it returned (float32[], -1)
          Fix: return (sum, count), scalars over the whole batch: (ft.reduce('batch seq ->', loss), tokens); or \
(those, aux)""",
    ),
    "a count of another pattern": (
        lambda: ft.count("batch seq mlp", X),
        ft.PatternError,
        """\
        count('batch seq mlp'):
          - pattern 'batch seq mlp' names 3 axes, the tensor has 2: (2, 4)
          Fix: name each dimension of the tensor once, in order""",
    ),
    "a count of a number": (
        lambda: ft.count("batch", 3),
        ft.PatternError,
        """\
        count('batch'):
          - x: a value of type 'int' is no tensor
          Fix: give tensors: torch.as_tensor(x)""",
    ),
    "a count of an axis without a rule": (
        lambda: inside(lambda: ft.count("bach mlp", X)),
        ft.RulesError,
        """\
        count('bach mlp'):
          - axis 'bach' of 'bach mlp' has no rule (did you mean 'batch'?)
          Fix: add the axis to the rules; None keeps it whole, as in rules.replace(head_dim=None)""",
    ),
    "a way to merge that does not exist": (
        lambda: ft.train_step(MEAN, ADAM, aux={"hits": "some", "loss": "maen"}),
        ft.FunctitanError,
        """\
        ft.train_step: aux:
          - aux.hits is 'some' (did you mean 'sum'?)
          - aux.loss is 'maen' (did you mean 'mean'?)
          Fix: say for each value, or for all, one of ['mean', 'sum', 'last']""",
    ),
    "ways to merge other values": (
        lambda: accumulate(HITS, aux={"hit": "sum"}),
        ft.FunctitanError,
        """\
        ft.accumulate: aux:
          - nothing for hits
          - hit is not in the tree
          Fix: give a tree of the same structure, or one leaf for a whole subtree of it""",
    ),
    "a name among values to merge": (
        lambda: accumulate(WITH_AUX),
        ft.FunctitanError,
        """\
        ft.accumulate: aux is merged over microbatches and replicas:
          - aux.name is a str
          Fix: return tensors and numbers beside the loss""",
    ),
    "ways to merge what another function gives": (
        lambda: ft.train_step(None, ADAM, aux="sum", value_and_grad=max),
        ft.FunctitanError,
        """\
        ft.train_step: value_and_grad:
          - accumulate and gradients belong to loss_fn, and so does aux
          Fix: write ft.train_step(None, tx, value_and_grad=...), or leave value_and_grad out""",
    ),
    "a pattern of the batch that does not fit": (
        lambda: accumulate(batch_patterns="batch"),
        ft.PatternError,
        """\
        ft.accumulate: batch:
          - pattern 'batch' names 1 axes, the tensor has 2: (2, 4)
          Fix: name each dimension of the tensor once, in order""",
    ),
    "patterns of another batch": (
        lambda: accumulate(batch={"x": X}, batch_patterns={"y": "batch embed"}),
        ft.FunctitanError,
        """\
        ft.accumulate: batch_patterns:
          - nothing for x
          - y is not in the tree
          Fix: give a tree of the same structure, or one leaf for a whole subtree of it""",
    ),
    "statistics cut as examples": (
        lambda: accumulate(batch={"x": X, "mean": V}),
        ft.FunctitanError,
        """\
        ft.accumulate: the batch's tensors differ in size:
          - batch.mean: 4 examples on this rank
          - batch.x: 2 examples on this rank
          Fix: the first axis of each tensor is the batch; where all examples share one, give patterns that say so: \
batch_patterns={'x': 'batch embed', 'mean': 'embed'}""",
    ),
    "a batch that all examples share": (
        lambda: accumulate(batch_patterns="embed mlp"),
        ft.FunctitanError,
        """\
        ft.accumulate:
          - the batch has no tensor with a batch axis
          Fix: the first axis of each tensor is the batch; where all examples share one, give patterns that say so: \
batch_patterns={'x': 'batch embed', 'mean': 'embed'}""",
    ),
    "a loss scale that begins below its floor": (
        lambda: SCALE(ADAM, init_scale=4.0, min_scale=8.0),
        ft.FunctitanError,
        """\
        dynamic_loss_scale:
          - min_scale 8, init_scale 4, max_scale 8.50706e+37: they must ascend, within [2**-126, 2**126], where \
float32 is exact
          Fix: usual are init_scale=2**16, growth=2, backoff=0.5, interval=2000""",
    ),
    "a loss scale without a ceiling": (
        lambda: SCALE(ADAM, max_scale=float("inf")),
        ft.FunctitanError,
        """\
        dynamic_loss_scale:
          - min_scale 1, init_scale 65536, max_scale inf: they must ascend, within [2**-126, 2**126], where float32 \
is exact
          Fix: usual are init_scale=2**16, growth=2, backoff=0.5, interval=2000""",
    ),
    "a loss scale of no inverse": (
        lambda: SCALE(ADAM, growth=float("nan"), init_scale=0.5),
        ft.FunctitanError,
        """\
        dynamic_loss_scale:
          - init_scale is 0.5: it must be at least 1
          - growth is nan: it must be at least 1
          Fix: usual are init_scale=2**16, growth=2, backoff=0.5, interval=2000""",
    ),
    "buffers of another module": (
        lambda: OF_NORM(OF_PARAMS, {"running_mean": V[:2], "mean": V[:2]}, X[:, :2]),
        ft.FunctitanError,
        """\
        a function of ft.from_module:
          - there is no num_batches_tracked
          - there is no running_var
          - mean is no buffer
          Fix: give the buffers that came with it""",
    ),
    "parameters in place of buffers": (
        lambda: OF_NORM(OF_BUFFERS, OF_PARAMS, X[:, :2]),
        ft.FunctitanError,
        """\
        a function of ft.from_module:
          - there is no bias
          - there is no weight
          - num_batches_tracked is no parameter
          - running_mean is no parameter
          - running_var is no parameter
          Fix: give the params that came with it""",
    ),
}
