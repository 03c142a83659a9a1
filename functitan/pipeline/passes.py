"""One microbatch through one stage: forward, and backward whole or in two halves.

Invariant: a pass keeps the graph of its backward and no result; gradients of weights are added up where they are made,
now or, in a split backward, when `weight_half` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from functitan.ops.function import has_derivative
from functitan.sharding.context import using
from functitan.sharding.env import Env
from functitan.sharding.sink import Sink, into
from functitan.transforms.add_into import add_into


class Pass(NamedTuple):
    """What the backward of one microbatch needs."""

    ends: tuple[GradientEdge | None, ...]  # of the results; none of one without a gradient
    inputs: tuple[Tensor | None, ...]  # none for one without a gradient
    weights: tuple[Tensor, ...]
    sink: Sink


def forward(
    fn: Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], Any]],
    weights: Sequence[Tensor],
    sums: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    env: Env,
    split: bool,
    reached: set[int] | None = None,
) -> tuple[list[Tensor], Any, Pass]:
    """`fn(weights, inputs)` gives tensors and something beside; those, and the pass that its backward takes.

    The gradients of the weights will be added to `sums` where they are made; with `split`, those of the weights of
    named products by `weight_half`, others with the gradients of the inputs. A weight without a sum is frozen.
    `reached` gets the numbers of the sums, counted without those, that have any gradient.
    """
    reached = set() if reached is None else reached
    with torch.enable_grad():
        mine = [i for i, total in enumerate(sums) if total is not None]
        totals = [total for total in sums if total is not None]
        leaves = tuple(weights[i].detach().requires_grad_() for i in mine)
        given = [x.detach().requires_grad_() if has_derivative(x) else x for x in inputs]
        used = [add_into(x, totals[n], reached, n) for n, x in enumerate(leaves)]
        sink = Sink(used, totals, reached, waits=split)
        full = dict(enumerate(weights)) | dict(zip(mine, used, strict=True))
        with using(env.lowered_by(into(sink))._replace(differentiated=True)):
            results, beside = fn(list(full.values()), given)
        ends = tuple(get_gradient_edge(y) if y.requires_grad else None for y in results)
    starts = tuple(x if has_derivative(x) else None for x in given)
    return [y.detach() for y in results], beside, Pass(ends, starts, leaves, sink)


def backward(its: Pass, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The cotangents of the inputs; those of the weights are added up, or wait for `weight_half`."""
    pairs = [(end, g) for end, g in zip(its.ends, cotangents, strict=True) if end is not None]
    if not pairs:
        return (None,) * len(its.inputs)
    starts = [x for x in its.inputs if x is not None]
    wanted = [*starts, *its.weights]
    ends, gs = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(ends, wanted, gs, allow_unused=True)[: len(starts)] if wanted else ())
    return tuple(None if x is None else next(found) for x in its.inputs)


def weight_half(its: Pass) -> None:
    """Work out the gradients that wait, and add them up."""
    its.sink.run()
