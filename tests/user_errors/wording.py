"""Mistakes whose errors named another subject, or were torch's own: the call, the kind of error, its whole text."""

from __future__ import annotations

import torch

import functitan as ft
from user_errors.given import IDS, KEY, W, X

SPARSE, BOOLS = X.to_sparse(), X > 0
EMPTY = torch.ones(2, 0)
LONG = " ".join(f"axis_{i}" for i in range(2000))
MANY = " ".join(f"a{i}" for i in range(65))
TWO = torch.ones(1, 3, 2, 4)

MISTAKES = {
    "a tensor before the pattern of a rearrangement": (
        lambda: ft.rearrange(X, "batch embed -> embed batch"),
        ft.PatternError,
        """\
        pattern that is a value of type 'Tensor':
          - a pattern is a string
          Fix: write 'batch seq embed'; in ops it comes first, as in \
ft.rearrange('batch (heads head_dim) -> batch heads head_dim', x, heads=8)""",
    ),
    "a tensor before the pattern of a fused loss": (
        lambda: ft.linear_cross_entropy(X, "batch embed, vocab embed, batch", W, IDS),
        ft.PatternError,
        """\
        pattern that is a value of type 'Tensor':
          - a pattern is a string
          Fix: write 'batch seq embed'; in ops it comes first, as in \
ft.linear_cross_entropy('batch embed, vocab embed, batch', x, w, labels)""",
    ),
    "a list to rearrange": (
        lambda: ft.rearrange("batch embed -> embed batch", [1, 2]),
        ft.PatternError,
        """\
        rearrange('batch embed -> embed batch'):
          - x: a value of type 'list' is no tensor
          Fix: give tensors: torch.as_tensor(x)""",
    ),
    "a misspelt contracted axis": (
        lambda: ft.einsum("batch embed, embd mlp -> batch mlp", X, W),
        ft.PatternError,
        """\
        einsum('batch embed, embd mlp -> batch mlp'):
          - only operand 0 'batch embed' has axis 'embed' (did you mean 'embd'?), and no result has it
          - only operand 1 'embd mlp' has axis 'embd' (did you mean 'embed'?), and no result has it
          Fix: write a contracted axis alike in both operands; an axis of one operand alone is summed \
by ft.reduce first""",
    ),
    "products of bools": (
        lambda: ft.einsum("batch embed, embed mlp -> batch mlp", BOOLS, BOOLS.T),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mlp'):
          - operand 0 'batch embed': dtype bool, where numbers are wanted
          - operand 1 'embed mlp': dtype bool, where numbers are wanted
          Fix: cast by x.float()""",
    ),
    "a sparse operand": (
        lambda: ft.einsum("batch embed, embed mlp -> batch mlp", SPARSE, W),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mlp'):
          - operand 0 'batch embed': the tensor is sparse_coo, and named ops take dense ones
          Fix: give x.to_dense(), or a padded tensor""",
    ),
    "a sparse table": (
        lambda: ft.take("batch, vocab embed -> batch embed", IDS, SPARSE),
        ft.PatternError,
        """\
        take('batch, vocab embed -> batch embed'):
          - table: the tensor is sparse_coo, and named ops take dense ones
          Fix: give x.to_dense(), or a padded tensor""",
    ),
    "the maximum of nothing": (
        lambda: ft.reduce("batch embed -> batch", EMPTY, op="max"),
        ft.PatternError,
        """\
        reduce('batch embed -> batch', op='max'):
          - axis 'embed' is empty, and nothing has no maximum
          Fix: give every axis at least one element""",
    ),
    "a pattern of thousands of names": (
        lambda: ft.einsum(f"{LONG} -> ", X),
        ft.PatternError,
        """\
        pattern 'axis_0 axis_1 axis_2 axis_3 axis_4 axis_'...:
          - it has 18893 characters, and a pattern at most 10000
          Fix: name each axis once, with spaces between, as in 'batch seq embed'""",
    ),
    "more names than a tensor has dimensions": (
        lambda: ft.reduce(f"{MANY} -> a0", X),
        ft.PatternError,
        f"""\
        pattern '{MANY} -> a0':
          - 'a0 a1 a2 a3 a4 a5 a6 a7 a8 a9 a10 a11 a1'... has 65 names, and a tensor at most 64 dimensions
          Fix: name each axis once, with spaces between, as in 'batch seq embed'""",
    ),
    "a time that is none": (
        lambda: ft.make_mesh(dp=1, timeout="x"),
        ft.MeshError,
        """\
        ft.make_mesh:
          - timeout is 'x': it must be more than 0 seconds
          Fix: write as in make_mesh(fsdp=2, device_type='cuda', timeout=60)""",
    ),
    "a time of a virtual mesh that is none": (
        lambda: ft.simulate(dp=2, timeout=True),
        ft.MeshError,
        """\
        ft.simulate:
          - timeout is True
          Fix: give seconds, more than 0""",
    ),
    "a prompt of floats": (
        lambda: ft.models.generate.generate({}, X, None, max_new_tokens=1),
        ft.PatternError,
        """\
        generate:
          - prompt: dtype float32, where integers are wanted
          Fix: cast by x.long()""",
    ),
    "an initializer by an axis that is not there": (
        lambda: ft.Param("embed mlp", (4, 3), init=ft.param.fan_in("embd")),
        ft.PatternError,
        """\
        Param('embed mlp', (4, 3)):
          - init is fan_in of 'embd' (did you mean 'embed'?), which the pattern does not name
          Fix: write as in ft.Param('embed mlp', (256, 768)): one size for each name, in order""",
    ),
    "a state of nothing": (
        lambda: ft.TrainState.create({}, ft.optim.adamw(1e-3), KEY),
        ft.FunctitanError,
        """\
        ft.TrainState: the declarations:
          - the tree has no leaves
          Fix: declare what is trained, as in {'w': ft.Param('embed mlp', (256, 768))}""",
    ),
    "no new tokens": (
        lambda: ft.models.generate.generate({}, IDS[None], None, max_new_tokens=0, temperature=-1),
        ft.FunctitanError,
        """\
        generate:
          - max_new_tokens is 0: it must be at least 1
          - temperature is -1: it must be at least 0
          Fix: write generate(params, prompt, config, key=ft.random.key(0), max_new_tokens=100)""",
    ),
}
