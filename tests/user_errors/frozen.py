"""Mistakes in what is trained, clipped and cast: the call, the kind of error, its whole text."""

from __future__ import annotations

import torch

import functitan as ft
from user_errors.given import IDS, KEY, SGD, TABLE, V, X

DECLARED = {"base": {"w": ft.Param("embed mlp", (4, 8))}, "lora": {"a": ft.Param("embed rank", (4, 2))}}
FROZEN = {"w": ft.Param("embed mlp", (4, 8), trainable=False)}
STATE = ft.TrainState.create({"w": ft.Param("embed", (4,)), "b": ft.Param("embed", (4,))}, SGD, KEY)
PLAN = ft.pipeline.schedule("gpipe", num_stages=2, num_microbatches=2, num_ranks=1)
STAGES = [ft.pipeline.Stage({"w": leaf}, print) for leaf in (FROZEN["w"], DECLARED["base"]["w"])]
DOUBLED, SUM = ft.jit(lambda x: 2 * x), ft.compile(lambda x: x.sum())
MUON = ft.optim.muon(0.1, matrices=ft.nn.attention.MATRICES)


def under_autocast(fn, *args):
    with torch.autocast("cpu", torch.bfloat16):
        fn(*args)


def lacking(params, batch, key, *, scale):
    return (V[0], (V[1], None)), {"w": params["w"]}


MISTAKES = {
    "no globs": (
        lambda: ft.trainable(DECLARED),
        ft.FunctitanError,
        """\
        ft.trainable:
          - there are no globs: nothing would be trained
          Fix: name what is to be trained by globs of paths, as in ft.trainable(declared, 'lora.*', '*.bias')""",
    ),
    "a glob of nothing": (
        lambda: ft.trainable(DECLARED, "lora.*", "base.v", 3),
        ft.FunctitanError,
        """\
        ft.trainable:
          - glob 'base.v' matches no leaf (did you mean 'base.w'?)
          - 3 is no glob
          Fix: name what is to be trained by globs of paths, as in ft.trainable(declared, 'lora.*', '*.bias')""",
    ),
    "tensors to be frozen": (
        lambda: ft.trainable({"w": X, "rate": 0.1}, "w"),
        ft.FunctitanError,
        """\
        ft.trainable:
          - rate is a float, not a Param
          - w is a Tensor, not a Param
          Fix: give declarations, before ft.init makes tensors of them: {'w': ft.Param('embed mlp', (8, 8))}""",
    ),
    "a Param that may be trained": (
        lambda: ft.Param("embed mlp", (4, 8), trainable="no"),
        ft.PatternError,
        """\
        Param('embed mlp', (4, 8)):
          - trainable is 'no', not True or False, which freezes it
          Fix: write as in ft.Param('embed mlp', (256, 768)): one size for each name, in order""",
    ),
    "nothing to train": (
        lambda: ft.TrainState.create(FROZEN, SGD, KEY),
        ft.FunctitanError,
        """\
        ft.TrainState.create:
          - none of 1 leaves is trained
          Fix: name what is trained: ft.trainable(declarations, 'lora.*')""",
    ),
    "nothing to train, declared": (
        lambda: ft.TrainState.declare(FROZEN, SGD, KEY),
        ft.FunctitanError,
        """\
        ft.TrainState.declare:
          - none of 1 leaves is trained
          Fix: name what is trained: ft.trainable(declarations, 'lora.*')""",
    ),
    "a stage that froze a shared leaf": (
        lambda: ft.pipeline.value_and_grad(STAGES, PLAN),
        ft.FunctitanError,
        """\
        ft.pipeline: the stages' declarations:
          - w is Param('embed mlp', (4, 8), trainable=False) in stage 0, and Param('embed mlp', (4, 8)) in stage 1
          Fix: declare a shared leaf once""",
    ),
    "gradients of fewer leaves": (
        lambda: ft.train_step(None, SGD, value_and_grad=lacking, nonfinite="ignore")(STATE, X),
        ft.FunctitanError,
        """\
        ft.train_step: the gradients:
          - b is only in the parameters
          Fix: give a tree of the parameters' structure, with None for a leaf that is to stay as it is""",
    ),
    "muon for biases": (
        lambda: MUON.init({"q_bias": ft.Param("heads head_dim", (2, 4)), "offset": ft.Param("head_dim heads", (4, 2))}),
        ft.FunctitanError,
        """\
        scale_by_muon: leaves that are no matrices:
          - offset 'head_dim heads' has axes of one side alone of 'embed heads head_dim', embed -> heads head_dim
          - q_bias 'heads head_dim' is a bias, by its name 'q_bias'
          Fix: give the leaves that are no matrices to another optimizer, by optim.multi_transform; say which axes \
of others are inputs and outputs: matrices={'heads head_dim embed': 'heads head_dim -> embed'} \
(ft.nn.attention.MATRICES)""",
    ),
    "clipping to a negative norm": (
        lambda: ft.optim.clip_grads({"w": X}, -1.0),
        ft.FunctitanError,
        """\
        clip_grads:
          - max_norm is -1.0
          Fix: give a positive number""",
    ),
    "a captured step under autocast": (
        lambda: under_autocast(DOUBLED, X),
        ft.CaptureError,
        """\
        ft.jit of <lambda>:
          - it is called under torch.autocast, which a graph does not hold
          Fix: give the function ft.precision(fn, compute=torch.bfloat16), and call it under torch.autocast('cpu', \
enabled=False)""",
    ),
    "a compiled block under autocast": (
        lambda: under_autocast(SUM, X),
        ft.FunctitanError,
        """\
        ft.compile of <lambda>:
          - it is called under torch.autocast, which a graph does not hold
          Fix: give the function ft.precision(fn, compute=torch.bfloat16), and call it under torch.autocast('cpu', \
enabled=False)""",
    ),
    "accumulating whole numbers": (
        lambda: ft.accumulate(lambda p, x, key: (x.sum(), 1), 1)({"w": V, "ids": IDS}, TABLE),
        ft.FunctitanError,
        """\
        ft.accumulate: parameters without a derivative:
          - ids is int64[2]
          Fix: freeze such leaves: patterns=ft.trainable(declarations, globs of the others)""",
    ),
}
