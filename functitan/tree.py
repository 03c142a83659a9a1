"""Pytrees: nested dicts, lists, tuples and NamedTuples of leaves. The only importer of optree.

Invariant: a leaf's identity is its path ("layers.0.attn.q"), never its flat index; `None` is a node without leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import optree

from functitan.errors import FunctitanError, report

Tree = Any
NAMESPACE = "functitan"


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """The leaves in order, and the structure to rebuild the tree from."""
    leaves, structure = optree.tree_flatten(tree, namespace=NAMESPACE)
    return leaves, structure


def unflatten(structure: Any, leaves: Iterable[Any]) -> Tree:
    """The tree of this structure with these leaves: the inverse of `flatten`."""
    return optree.tree_unflatten(structure, leaves)


def leaves(tree: Tree) -> list[Any]:
    """The leaves of a tree, in order."""
    return optree.tree_leaves(tree, namespace=NAMESPACE)


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`fn` of each leaf of `tree`, and of the same leaf of trees that have its structure.

    >>> map(lambda x, y: x + y, {"a": 1, "b": [2]}, {"a": 10, "b": [20]})
    {'a': 11, 'b': [22]}
    """
    return optree.tree_map(fn, tree, *rest, namespace=NAMESPACE)


def paths(tree: Tree) -> list[str]:
    """The path of each leaf, in the order of `leaves`.

    >>> paths({"layers": [{"q": 1}, {"q": 2}]})
    ['layers.0.q', 'layers.1.q']
    """
    return [".".join(str(key) for key in path) for path in optree.tree_paths(tree, namespace=NAMESPACE)]


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Like `map`, with the leaf's path as the first argument of `fn`."""
    names = unflatten(flatten(tree)[1], paths(tree))
    return map(fn, names, tree, *rest)


def broadcast_prefix(prefix: Tree, tree: Tree, what: str = "prefix") -> list[Any]:
    """The leaves of `prefix` once for each leaf of `tree` below them: `None` in a prefix is a leaf here.

    >>> broadcast_prefix({"a": 1, "b": None}, {"a": [5, None, 6], "b": 7})
    [1, 1, None]
    """
    try:
        spread = optree.broadcast_prefix(prefix, tree, none_is_leaf=True, namespace=NAMESPACE)
        below = optree.tree_leaves(tree, none_is_leaf=True, namespace=NAMESPACE)
        return [leaf for leaf, there in zip(spread, below, strict=True) if there is not None]
    except ValueError as error:
        raise FunctitanError(report(what, [str(error).splitlines()[0]], _FIX_PREFIX)) from None


def register(cls: type, flatten_fn: Callable[[Any], tuple], unflatten_fn: Callable[..., Any]) -> None:
    """Make an immutable class a node: `flatten_fn(value) -> (children, static, names)`."""
    optree.register_pytree_node(cls, flatten_fn, unflatten_fn, namespace=NAMESPACE)


_FIX_PREFIX = "give a tree of the same structure, or one leaf for a whole subtree of it"
