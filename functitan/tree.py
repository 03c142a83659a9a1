"""Pytrees: nested dicts, lists, tuples and NamedTuples of leaves. The only importer of optree.

Invariant: a leaf's identity is its path ("layers.0.attn.q"), never its flat index; `None` is a node without leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optree
from optree.registry import __GLOBAL_NAMESPACE as _GLOBAL  # private: tried on optree 0.20

from functitan.errors import FunctitanError, report

Tree = Any


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """The leaves in order, and the structure to rebuild the tree from."""
    leaves, structure = optree.tree_flatten(tree)
    return leaves, structure


def unflatten(structure: Any, leaves: Iterable[Any]) -> Tree:
    """The tree of this structure with these leaves: the inverse of `flatten`."""
    return optree.tree_unflatten(structure, leaves)


def leaves(tree: Tree) -> list[Any]:
    """The leaves of a tree, in order."""
    return optree.tree_leaves(tree)


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`fn` of each leaf of `tree`, and of the same leaf of trees that have its structure.

    >>> map(lambda x, y: x + y, {"a": 1, "b": [2]}, {"a": 10, "b": [20]})
    {'a': 11, 'b': [22]}
    """
    try:
        return optree.tree_map(fn, tree, *rest)
    except ValueError:
        problems = [
            p for i, other in enumerate(rest) for p in mismatches(tree, other, "the first tree", f"tree {i + 2}")
        ]
        if not problems:  # it is the function's own
            raise
        raise FunctitanError(report("tree.map", problems, "give trees of one structure")) from None


def mismatches(first: Tree, second: Tree, name: str, other: str) -> list[str]:
    """What differs between the structures of two trees, by path: leaves that one lacks, else the containers.

    >>> mismatches({"a": 1, "b": 2}, {"a": 1, "c": 2}, "params", "grads")
    ['b is only in params', 'c is only in grads']
    """
    if flatten(first)[1] == flatten(second)[1]:
        return []
    mine, theirs = paths(first), paths(second)
    lines = [f"{path or 'one leaf'} is only in {name}" for path in mine if path not in set(theirs)]
    lines += [f"{path or 'one leaf'} is only in {other}" for path in theirs if path not in set(mine)]
    return _short(lines) or [
        f"{name} and {other} have other containers: {type(first).__name__}, {type(second).__name__}"
    ]


def paths(tree: Tree) -> list[str]:
    """The path of each leaf, in the order of `leaves`: its keys, joined by dots.

    Raises `FunctitanError` where two leaves would have one path, as under the keys "a.b" and "a", "b", or 0 and "0".

    >>> paths({"layers": [{"q": 1}, {"q": 2}]})
    ['layers.0.q', 'layers.1.q']
    """
    keys = optree.tree_paths(tree)
    found = [".".join(str(key) for key in path) for path in keys]
    if len(set(found)) < len(found):
        raise FunctitanError(report("a tree's keys", _shared(found, keys), _FIX_SHARED))
    return found


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Like `map`, with the leaf's path as the first argument of `fn`."""
    names = unflatten(flatten(tree)[1], paths(tree))
    return map(fn, names, tree, *rest)


def only(tree: Tree, chosen: Sequence[bool]) -> Tree:
    """The tree with `None` in the place of each leaf that is not chosen.

    >>> only({"a": 1, "b": [2]}, [False, True])
    {'a': None, 'b': [2]}
    """
    values, structure = flatten(tree)
    return unflatten(structure, [x if mine else None for x, mine in zip(values, chosen, strict=True)])


def also_in(part: Tree, whole: Tree, what: str) -> Tree:
    """The leaves of `whole`, a tree like parameters, where `part`, its tree with `None` for some leaves, has one.

    >>> also_in({"a": None, "b": [2]}, {"a": 10, "b": [20]}, "parts")
    {'a': None, 'b': [20]}
    """
    try:
        return optree.tree_map(lambda x, y: None if x is None else y, part, whole, none_is_leaf=True)
    except ValueError:
        raise FunctitanError(report(what, mismatches(whole, part, "the parameters", "these"), _FIX_PART)) from None


def put_back(part: Tree, whole: Tree) -> Tree:
    """`whole` with the leaves of `part`, its tree with `None` for some leaves, in the place of its own.

    >>> put_back({"a": None, "b": [2]}, {"a": 10, "b": [20]})
    {'a': 10, 'b': [2]}
    """
    return optree.tree_map(lambda x, y: y if x is None else x, part, whole, none_is_leaf=True)


def map_nodes(fn: Callable[[Any], Tree], kind: type, tree: Tree) -> Tree:
    """`tree` with `fn` of each node of a kind in its place.

    >>> map_nodes(len, tuple, {"a": (1, 2), "b": 3})
    {'a': 2, 'b': 3}
    """
    is_kind = lambda x: isinstance(x, kind)
    return optree.tree_map(lambda x: fn(x) if is_kind(x) else x, tree, is_leaf=is_kind)


def broadcast_prefix(prefix: Tree, tree: Tree, what: str = "prefix") -> list[Any]:
    """The leaves of `prefix` once for each leaf of `tree` below them: `None` in a prefix is a leaf here.

    >>> broadcast_prefix({"a": 1, "b": None}, {"a": [5, None, 6], "b": 7})
    [1, 1, None]
    """
    try:
        spread = optree.broadcast_prefix(prefix, tree, none_is_leaf=True)
        below = optree.tree_leaves(tree, none_is_leaf=True)
        return [leaf for leaf, there in zip(spread, below, strict=True) if there is not None]
    except ValueError:
        raise FunctitanError(report(what, _prefix_problems(prefix, tree), _FIX_PREFIX)) from None


def register(cls: type, flatten_fn: Callable[[Any], tuple], unflatten_fn: Callable[..., Any]) -> None:
    """Make an immutable class a node: `flatten_fn(value) -> (children, static, names)`."""
    # for all users of optree: a namespace of our own costs a lookup more for every node
    optree.register_pytree_node(cls, flatten_fn, unflatten_fn, namespace=_GLOBAL)


def _prefix_problems(prefix: Tree, tree: Tree) -> list[str]:
    """The subtrees of `tree` that a prefix has no entry for, and its entries that `tree` does not have."""
    entries = optree.tree_paths(prefix, none_is_leaf=True)
    below = optree.tree_paths(tree, none_is_leaf=True)
    heads = {path[:n] for path in below for n in range(len(path) + 1)}
    known = set(entries)
    lines = [
        f"nothing for {'.'.join(map(str, p))}" for p in below if not any(p[:n] in known for n in range(len(p) + 1))
    ]
    lines += [f"{'.'.join(map(str, p)) or 'an entry'} is not in the tree" for p in entries if p not in heads]
    return _short(lines) or ["its containers are not those of the tree: lists, tuples and dicts must stand alike"]


def _shared(paths: list[str], keys: list[tuple[Any, ...]]) -> list[str]:
    """The paths that several leaves have, with the keys of each."""
    own: dict[str, list[str]] = {}
    for path, each in zip(paths, keys, strict=True):
        own.setdefault(path, []).append(str(each))
    return [f"the leaves of {' and '.join(each)} have one path, {path!r}" for path, each in own.items() if each[1:]]


def _short(lines: list[str], most: int = 8) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more"]


_FIX_SHARED = "rename a key: a leaf is known by its path, to random keys, checkpoints, masks and errors"
_FIX_PART = "give a tree of the parameters' structure, with None for a leaf that is to stay as it is"
_FIX_PREFIX = "give a tree of the same structure, or one leaf for a whole subtree of it"
