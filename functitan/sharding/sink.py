"""Gradients of weights that are added up where they are made: at once, or in the second half of a split backward.

Invariant: what waits is a product of a saved operand and a cotangent, which nobody computes twice, and it holds no
other tensor. It belongs to one backward pass of one function; an op knows a weight by the tensor itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from functitan.sharding.lowering import Lowering

Product = Callable[[Sequence[Tensor]], None]  # adds the gradients of some weights to their totals


def into(sink: Sink) -> Lowering:
    """The lowering by which the gradients of weights go into a sink."""
    return Lowering(sink, is_of_derivatives=False)


class Sink:
    """`totals` take the gradients of the weights; they wait until `run` if `waits`. `reached`: which have any."""

    def __init__(self, weights: Iterable[Tensor], totals: Sequence[Tensor], reached: set[int], waits: bool) -> None:
        self._known = {id(x): (x, i) for i, x in enumerate(weights)}  # which keeps the tensor, and so its id
        self._totals = totals
        self._reached = reached
        self._waits = waits
        self._waiting: list[tuple[tuple[int, ...], Product]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def number(self, x: Tensor | None) -> int | None:
        """The number of the weight that a tensor is; `None` for any other tensor, one made of a weight too."""
        return self._known.get(id(x), (None, None))[1]

    def renamed(self, old: Iterable[Tensor], new: Iterable[Tensor]) -> None:
        """Let each of the new tensors stand for an old one: all of its cotangent would go to that one."""
        for x, y in zip(old, new, strict=True):
            if (number := self.number(x)) is not None:
                self._known[id(y)] = y, number

    def put(self, numbers: tuple[int, ...], product: Product) -> None:
        """Add the gradients of these weights, now or later."""
        self._reached.update(numbers)
        self._waiting.append((numbers, product))
        if not self._waits:
            self._add()

    def run(self) -> None:
        """Work out all that waits, in its order, and forget it and the weights."""
        self._add()
        self._known = {}

    def _add(self) -> None:
        while self._waiting:
            numbers, product = self._waiting.pop(0)
            product([self._totals[i] for i in numbers])
