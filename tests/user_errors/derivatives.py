"""Mistakes in derivatives and batches of functions: the call, the kind of error, its whole text."""

from __future__ import annotations

import functitan as ft
from user_errors.given import IDS, PAIR, WIDE, V, W, X

MISTAKES = {
    "a value that is no scalar": (
        lambda: ft.value_and_grad(lambda x: x)(X),
        ft.FunctitanError,
        """\
        ft.value_and_grad:
          - the function gives float32[2, 4], not a floating-point scalar
          Fix: return a scalar: ft.reduce('batch ->', loss); has_aux=True for (value, aux)""",
    ),
    "a value with an aux that was not announced": (
        lambda: ft.value_and_grad(lambda x: (x[0, 0], x))(X),
        ft.FunctitanError,
        """\
        ft.value_and_grad:
          - the function gives a value of type 'tuple', not a floating-point scalar
          Fix: return a scalar: ft.reduce('batch ->', loss); has_aux=True for (value, aux)""",
    ),
    "an aux that does not come": (
        lambda: ft.value_and_grad(lambda x: x[0, :2], has_aux=True)(X),
        ft.FunctitanError,
        """\
        ft.value_and_grad:
          - the function gives float32[2], not (value, aux)
          Fix: return both, or leave has_aux out""",
    ),
    "leaves without a derivative": (
        lambda: ft.grad(lambda p: p["w"][0, 0])({"w": X, "ids": [IDS, 3]}),
        ft.FunctitanError,
        """\
        ft.value_and_grad:
          - argument 0.ids.0: int64[2] has no derivative
          - argument 0.ids.1: a value of type 'int' has no derivative
          Fix: pass such leaves in another argument, or choose argnums""",
    ),
    "an argument that is not there": (
        lambda: ft.grad(lambda x: x[0, 0], argnums=(0, 1, "x"))(X),
        ft.FunctitanError,
        """\
        ft.value_and_grad:
          - argnums has 1, but the call has 1 positional arguments
          - argnums has 'x', but the call has 1 positional arguments
          Fix: argnums counts positional arguments from 0""",
    ),
    "an argument named twice": (
        lambda: ft.grad(lambda x: x[0, 0], argnums=(0, -1))(X),
        ft.FunctitanError,
        """\
        ft.value_and_grad:
          - argnums (0, -1) names an argument twice
          Fix: argnums counts positional arguments from 0""",
    ),
    "a tensor in place of a function": (
        lambda: ft.grad(X),
        ft.FunctitanError,
        """\
        ft.value_and_grad:
          - it wraps a function, not a value of type 'Tensor'
          Fix: write ft.value_and_grad(fn, ...), and call what it returns""",
    ),
    "tangents of another structure": (
        lambda: ft.jvp(lambda p: p["w"], (PAIR,), ({"w": X, "c": V},)),
        ft.FunctitanError,
        """\
        ft.jvp:
          - 0.b is only in primals
          - 0.c is only in tangents
          Fix: give each differentiated leaf a tangent of its shape and dtype""",
    ),
    "tangents of other shapes and dtypes": (
        lambda: ft.jvp(lambda a, b, c: a, (X, X, IDS), (W, WIDE, IDS)),
        ft.FunctitanError,
        """\
        ft.jvp:
          - 0: float32[2, 4] has tangent float32[4, 3]
          - 1: float32[2, 4] has tangent float64[2, 4]
          - 2: int64[2] has no derivative
          Fix: give each differentiated leaf a tangent of its shape and dtype""",
    ),
    "tangents without a tuple": (
        lambda: ft.hvp(lambda x: x[0, 0], X, X),
        ft.FunctitanError,
        """\
        ft.hvp:
          - primals is a Tensor, not a tuple with an entry for each argument
          - tangents is a Tensor, not a tuple with an entry for each argument
          Fix: give each differentiated leaf a tangent of its shape and dtype""",
    ),
    "a tangent for an argument that hvp keeps": (
        lambda: ft.hvp(lambda x, y: x[0, 0], (X, W), (X, W)),
        ft.FunctitanError,
        """\
        ft.hvp:
          - 2 tangents for 1 differentiated arguments
          Fix: give each differentiated leaf a tangent of its shape and dtype""",
    ),
    "a vmap over two axes": (
        lambda: ft.vmap(lambda x: x, axis="batch seq"),
        ft.FunctitanError,
        """\
        ft.vmap:
          - axis='batch seq' is not one axis name
          Fix: write axis='batch'""",
    ),
    "a vmap over sizes that differ": (
        lambda: ft.vmap(lambda x, y: x, axis="batch")(X, W),
        ft.FunctitanError,
        """\
        ft.vmap over 'batch': its local size differs:
          - argument 0: 2 on this rank
          - argument 1: 4 on this rank
          Fix: give the axis one global size, and the first rule of the table, so that it lies alike in every \
argument""",
    ),
    "a vmap over a dimension that is not there": (
        lambda: ft.vmap(lambda x, y, z: x, (0, 5, 0), axis="batch")(X, W, 3),
        ft.FunctitanError,
        """\
        ft.vmap:
          - argument 1 of shape (4, 3) has no dimension 5
          - argument 2 is a int, not a tensor
          Fix: in_dims says where each argument has the axis, None where one lacks it, as in (0, None)""",
    ),
    "a vmap over nothing": (
        lambda: ft.vmap(lambda x: x, None, axis="batch")(X),
        ft.FunctitanError,
        """\
        ft.vmap:
          - every in_dims is None
          Fix: at least one argument has the axis""",
    ),
}
