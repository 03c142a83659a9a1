"""Gradients of weights that wait: what a backward pass leaves for later, when it is split in two.

Invariant: what waits is a product of a saved operand and a cotangent, which nobody computes twice, and it holds no
other tensor. It belongs to one backward pass of one function; an op knows a weight by the tensor itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

Product = Callable[[], Sequence[Tensor]]  # the gradients of some weights


class Deferred:
    """`add(i, gradient)` takes what comes, at last, of weight i."""

    def __init__(self, weights: Iterable[Tensor], add: Callable[[int, Tensor], None]) -> None:
        self._known = {id(x): (x, i) for i, x in enumerate(weights)}  # which keeps the tensor, and so its id
        self._add = add
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
        """Leave the gradients of these weights for later."""
        self._waiting.append((numbers, product))

    def run(self) -> None:
        """Work out all that waits, in its order, and forget it."""
        while self._waiting:
            numbers, product = self._waiting.pop(0)
            for number, gradient in zip(numbers, product(), strict=True):
                self._add(number, gradient)
        self._known = {}
