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
from functitan.sharding.contraction import Contraction
from functitan.sharding.env import Env
from functitan.sharding.message import Label
from functitan.sharding.moves import Step
from functitan.sharding.precision import cast, narrowed
from functitan.sharding.steps import run_step

Start = Callable[[Tensor], Callable[[], Tensor]]  # sends a tensor, and gives what waits for the one that comes
Value = Any  # what an operand has become: opaque to who schedules moves and products


class Arithmetic(NamedTuple):
    """How operands travel and multiply: pure functions of values.

    Operands of equal `use` are one value: `pack` makes it for each pair (operand, use) on the shards, `move` runs a
    step on a value, `arrive` follows the last step. A schedule may instead cut a value by `narrow`, and send it by
    `travel`: a function starts each of its tensors that differs along an axis, and what comes back waits for the value.
    """

    use: Callable[[Contraction, tuple[int, ...], int, int], Any]  # (of it, a product's operands, result; which operand)
    pack: Callable[[tuple[Tensor, ...], Sequence[tuple[int, Any]], Contraction, Env, Label], Sequence[Value]]
    move: Callable[[Value, Step, Env, Label], Value]
    arrive: Callable[[Value], Value]
    narrow: Callable[[Value, int, int, int], Value]  # (value, axis, start, length), as of a tensor
    travel: Callable[[Value, int, Start], Callable[[], Value]]  # (value, axis, start)
    product: Callable[[tuple[Axes, ...], Axes, tuple[Value, ...], tuple[tuple[str, int], ...]], Tensor]
    # that of the vjp, by what its operands are: an operand's place, or their number and a cotangent's place
    backward: Callable[[tuple[int, ...]], Arithmetic | None] = lambda roles: None  # `None`: plain


@cache
def plain(compute: torch.dtype | None) -> Arithmetic:
    """Tensors in the dtype `compute` (`None`: as they are), cast where that makes a message smaller, or at the end."""

    def move(x: Tensor, step: Step, env: Env, label: Label) -> Tensor:
        return run_step(x if step.kind == "slice" else narrowed(x, compute), step, env, label)

    return Arithmetic(
        use=lambda full, operands, result, which: None,
        pack=lambda tensors, wanted, full, env, label: [tensors[place] for place, _ in wanted],
        move=move,
        arrive=lambda x: cast(x, compute),
        narrow=lambda x, axis, start, length: x.narrow(axis, start, length),
        travel=lambda x, axis, start: start(narrowed(x, compute)),
        product=product,
    )
