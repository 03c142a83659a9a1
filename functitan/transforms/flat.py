"""A tree as its tensors and its form: what a transform of a function of flat tensors needs around it.

Invariant: `join(form, tensors)` is the tree that `split` took apart, and a form holds no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from functitan import tree

TENSOR = object()  # stands for a tensor among leaves


class Form(NamedTuple):
    """A tree without its tensors."""

    structure: Any
    leaves: tuple[Any, ...]  # `TENSOR` for tensors


def split(value: tree.Tree) -> tuple[list[Tensor], Form]:
    """The tensors of a tree, in order, and the rest of it."""
    leaves, structure = tree.flatten(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, Form(structure, tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves))


def join(form: Form, tensors: Iterable[Tensor]) -> tree.Tree:
    """The tree of this form with these tensors."""
    left = iter(tensors)
    return tree.unflatten(form.structure, [next(left) if leaf is TENSOR else leaf for leaf in form.leaves])


def of_tensors(fn: Callable[[Any], Any], form: Form) -> tuple[Callable[..., tuple[Tensor, ...]], list[Form]]:
    """`fn` of trees of one form as a function of tensors to tensors, and a list that holds its result's form, once run.

    >>> import torch
    >>> xs, form = split({"x": torch.ones(2), "name": "a"})
    >>> flat, result = of_tensors(lambda given: {**given, "y": 2 * given["x"]}, form)
    >>> found = flat(*xs)
    >>> join(result[0], found)
    {'x': tensor([1., 1.]), 'name': 'a', 'y': tensor([2., 2.])}
    """
    result: list[Form] = []

    def flat(*xs: Tensor) -> tuple[Tensor, ...]:
        tensors, found = split(fn(join(form, xs)))
        result[:] = [found]
        return tuple(tensors)

    return flat, result
