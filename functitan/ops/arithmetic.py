"""Arithmetic: what an operand of a contraction becomes on its shard, how that moves, and how such values multiply.

Invariant: a plan says what moves and what multiplies, an arithmetic alone says in which numbers; neither knows the
other. The plain arithmetic's values are tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.axes import Axes
from functitan.ops.local import product
from functitan.sharding.context import Env
from functitan.sharding.contraction import Contraction
from functitan.sharding.moves import Step
from functitan.sharding.precision import cast, narrowed
from functitan.sharding.steps import Label, run_step

Value = Any  # what an operand has become: opaque to who schedules moves and products


class Arithmetic(NamedTuple):
    """How operands travel and multiply: pure functions of values.

    `pack` makes one value for each pair (operand, use) on the shards, `move` runs a step on a value, `arrive` follows
    the last step. A schedule may instead cut a value by `narrow`, and send its tensors itself by `travel`, which
    applies a function to each of them that differs along an axis.
    """

    use: Callable[[tuple[Axes, ...], Axes, int], Any]  # (operands of a product, result, which): uses alike share a move
    pack: Callable[[tuple[Tensor, ...], Sequence[tuple[int, Any]], Contraction, Env, Label], Sequence[Value]]
    move: Callable[[Value, Step, Env, Label], Value]
    arrive: Callable[[Value], Value]
    narrow: Callable[[Value, int, int, int], Value]  # (value, axis, start, length), as of a tensor
    travel: Callable[[Value, int, Callable[[Tensor], Tensor]], Value]  # (value, axis, send)
    product: Callable[[tuple[Axes, ...], Axes, tuple[Value, ...], tuple[tuple[str, int], ...]], Tensor]
    backward: Arithmetic | None = None  # that of its vjp's products; `None`: plain


@cache
def plain(compute: torch.dtype | None) -> Arithmetic:
    """Tensors in the dtype `compute` (`None`: as they are), cast where that makes a message smaller, or at the end."""

    def move(x: Tensor, step: Step, env: Env, label: Label) -> Tensor:
        return run_step(x if step.kind == "slice" else narrowed(x, compute), step, env, label)

    return Arithmetic(
        use=lambda operands, result, which: None,
        pack=lambda tensors, wanted, full, env, label: [tensors[place] for place, _ in wanted],
        move=move,
        arrive=lambda x: cast(x, compute),
        narrow=lambda x, axis, start, length: x.narrow(axis, start, length),
        travel=lambda x, axis, send: send(narrowed(x, compute)),
        product=product,
    )
