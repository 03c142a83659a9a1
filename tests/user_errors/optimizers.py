"""Mistakes in optimizers, schedules, masks: the call, the kind of error, its whole text."""

from __future__ import annotations

import functitan as ft
from user_errors.given import ADAM, ADAM_OF_P, ADAM_OF_PAIR, PAIR, WIDE, P, W, inside

MISTAKES = {
    "a chain of functions": (
        lambda: ft.optim.chain(ft.optim.adamw, 3, ft.optim.sgd(0.1)),
        ft.FunctitanError,
        """\
        chain:
          - 0 is a function
          - 1 is a int
          Fix: give gradient transformations, as ft.optim.adamw(1e-3) makes them""",
    ),
    "a negative learning rate": (
        lambda: ft.optim.adamw(-1e-3),
        ft.FunctitanError,
        """\
        scale_by_learning_rate:
          - learning_rate is -0.001
          Fix: give a number in [0, inf)""",
    ),
    "betas out of range": (
        lambda: ft.optim.adamw(1e-3, b1=1.0, b2=2, eps=-1),
        ft.FunctitanError,
        """\
        scale_by_adam:
          - b1 is 1.0: it must lie in [0, 1)
          - b2 is 2: it must lie in [0, 1)
          - eps is -1: it must not be negative
          Fix: usual are b1=0.9, b2=0.95 or 0.999, eps=1e-8""",
    ),
    "a negative weight decay": (
        lambda: ft.optim.adamw(1e-3, weight_decay=-0.1),
        ft.FunctitanError,
        """\
        add_decayed_weights:
          - weight_decay is -0.1
          Fix: give a number in [0, inf)""",
    ),
    "a momentum that grows": (
        lambda: ft.optim.sgd(0.1, momentum=1.5),
        ft.FunctitanError,
        """\
        scale_by_momentum:
          - decay is 1.5
          Fix: give a number in [0, 1)""",
    ),
    "a clip to nothing": (
        lambda: ft.optim.clip_by_global_norm(0),
        ft.FunctitanError,
        """\
        clip_by_global_norm:
          - max_norm is 0
          Fix: give a positive number""",
    ),
    "a schedule whose warmup never ends": (
        lambda: ft.optim.warmup_cosine(3e-4, 100, 100),
        ft.FunctitanError,
        """\
        warmup_cosine:
          - warmup_steps is 100 and total_steps 100: nothing is left to fall in
          Fix: let the warmup be a part of all steps""",
    ),
    "a schedule of negative lengths": (
        lambda: ft.optim.warmup_stable_decay(3e-4, -1, 2.5, 0),
        ft.FunctitanError,
        """\
        warmup_stable_decay:
          - warmup is -1: it must be a whole number of at least 0
          - stable is 2.5: it must be a whole number of at least 0
          - decay is 0: it must be a whole number of at least 1
          Fix: count optimizer steps, as in warmup_cosine(3e-4, 100, 10_000)""",
    ),
    "a schedule that is a list": (
        lambda: ft.optim.piecewise([0.1, 0.2], 1.0),
        ft.FunctitanError,
        """\
        piecewise:
          - factors is a list, not a dict from steps to factors
          Fix: write as in piecewise({1000: 0.1, 2000: 0.1}, 3e-4)""",
    ),
    "a mask of another tree": (
        lambda: ft.optim.masked(ADAM, {"v": True}).init(P),
        ft.FunctitanError,
        """\
        mask:
          - nothing for w
          - v is not in the tree
          Fix: give a tree of the same structure, or one leaf for a whole subtree of it""",
    ),
    "labels without a transformation": (
        lambda: ft.optim.multi_transform({"slow": ADAM}, {"*.scale": "slwo", "*": "fast"}),
        ft.FunctitanError,
        """\
        multi_transform:
          - '*.scale': 'slwo' (did you mean 'slow'?) is none of ['slow']
          - '*': 'fast' is none of ['slow']
          Fix: give a transformation for each label""",
    ),
    "leaves that no glob matches": (
        lambda: ft.optim.multi_transform({"slow": ADAM}, {"*.scale": "slow"}).init(PAIR),
        ft.FunctitanError,
        """\
        multi_transform:
          - b: no glob matches it
          - w: no glob matches it
          Fix: add a glob for them; a last '*' takes the rest""",
    ),
    "gradients of other parameters": (
        lambda: ADAM.update(P, ADAM_OF_PAIR, P),
        ft.FunctitanError,
        """\
        scale_by_adam:
          - b is only in mu
          - b is only in nu
          Fix: give gradients of these parameters, in their dtypes, and the state that tx.init(params) made for \
them""",
    ),
    "gradients of another shape": (
        lambda: ADAM.update({"w": W}, ADAM_OF_P, P),
        ft.FunctitanError,
        """\
        scale_by_adam:
          - w: updates (4, 3) float32, mu (2, 4) float32
          - w: updates (4, 3) float32, nu (2, 4) float32
          Fix: give gradients of these parameters, in their dtypes, and the state that tx.init(params) made for \
them""",
    ),
    "the state of another optimizer": (
        lambda: ft.optim.chain(ADAM, ADAM).update(P, ADAM_OF_P, P),
        ft.FunctitanError,
        """\
        chain:
          - the state is a tuple of 3, not a tuple of 2
          Fix: give the state that tx.init(params) or tx.update made""",
    ),
    "a state that is none": (
        lambda: ft.optim.scale_by_adam().update(P, (), P),
        ft.FunctitanError,
        """\
        scale_by_adam:
          - the state is a tuple, not AdamState
          Fix: give the state that tx.init(params) or tx.update made""",
    ),
    "updates in another dtype": (
        lambda: ft.optim.apply_updates(P, {"w": WIDE}),
        ft.FunctitanError,
        """\
        apply_updates:
          - w: updates (2, 4) float64, params (2, 4) float32
          Fix: give gradients of these parameters, in their dtypes, and the state that tx.init(params) made for \
them""",
    ),
    "a norm of shards without patterns": (
        lambda: inside(lambda: ft.optim.global_norm(P)),
        ft.PatternError,
        """\
        global_norm without patterns:
          - rule 'batch' shards over ('dp', 'fsdp')
          - rule 'embed' shards over ('fsdp',)
          Fix: say how each leaf is sharded: tx.update(grads, state, params, patterns=patterns)""",
    ),
}
