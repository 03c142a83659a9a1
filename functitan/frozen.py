"""Which leaves are trained: a property of each declaration, `Param.trainable`, and trees of the trained leaves alone.

Invariant: in a tree of trained leaves `None`, a node without leaves, stands for each other leaf; so whoever takes
gradients, norms, clips, decays or keeps state of such a tree does not know that there are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from functitan import tree
from functitan.errors import FunctitanError, nearest, report
from functitan.param import Param


def trainable(declared: tree.Tree, *globs: str) -> Any:
    """The declarations with the leaves whose path matches a glob to be trained, and all others frozen.

    `*` in a glob stands for any text, dots included. `declared` is a tree of `Param`, or a list of `ft.pipeline.Stage`,
    whose leaves have the paths that they have without a pipeline. What is frozen has no gradient, no optimizer state,
    no decay and no part in norms; it lies as it is declared, is saved with the state, and keeps its bits and buffer.

    Raises `FunctitanError` for no globs, a glob that matches nothing, and leaves that are no `Param`.

    >>> declared = {"base": {"w": Param("embed mlp", (8, 8))}, "lora": {"a": Param("embed rank", (8, 2))}}
    >>> trainable(declared, "lora.*")["base"]
    {'w': Param('embed mlp', (8, 8), trainable=False)}
    """
    staged = isinstance(declared, (list, tuple)) and len(declared) and all(map(_is_stage, declared))
    parts = [stage.declarations for stage in declared] if staged else [declared]
    leaves = {path: leaf for part in parts for path, leaf in zip(tree.paths(part), tree.leaves(part), strict=True)}
    _check(leaves, globs)
    chosen = {path: any(fnmatchcase(path, glob) for glob in globs) for path in leaves}
    parts = [tree.map_with_path(lambda path, leaf: replace(leaf, trainable=chosen[path]), part) for part in parts]
    if not staged:
        return parts[0]
    return type(declared)(stage._replace(declarations=part) for stage, part in zip(declared, parts, strict=True))


def is_trained(pattern: Any) -> bool:
    """False for a declaration that is frozen; what is none, a pattern or `None`, says nothing about it.

    >>> is_trained("embed"), is_trained(Param("embed", (8,), trainable=False))
    (True, False)
    """
    return not isinstance(pattern, Param) or pattern.trainable


def trained(values: tree.Tree, patterns: tree.Tree) -> tree.Tree:
    """The tree with `None` for each frozen leaf; `patterns` is a tree, or a prefix, of patterns or `Param`s.

    >>> trained({"base": 1, "lora": 2}, {"base": Param("embed", (8,), trainable=False), "lora": "embed"})
    {'base': None, 'lora': 2}
    """
    if all(map(is_trained, tree.leaves(patterns))):
        return values
    return tree.only(values, which_trained(values, patterns, "patterns"))


def which_trained(values: tree.Tree, patterns: tree.Tree, what: str) -> list[bool]:
    """For each leaf of `values` whether it is trained; where nothing is frozen, `patterns` need not fit."""
    if all(map(is_trained, tree.leaves(patterns))):
        return [True] * len(tree.leaves(values))
    return [is_trained(pattern) for pattern in tree.broadcast_prefix(patterns, values, what)]


def _check(leaves: dict[str, Any], globs: Sequence[str]) -> None:
    strange = [
        f"{path or 'the value'} is a {type(leaf).__name__}, not a Param"
        for path, leaf in leaves.items()
        if not isinstance(leaf, Param)
    ]
    if strange:
        fix = "give declarations, before ft.init makes tensors of them: {'w': ft.Param('embed mlp', (8, 8))}"
        raise FunctitanError(report("ft.trainable", strange, fix))
    problems = [] if globs else ["there are no globs: nothing would be trained"]
    problems += [
        f"glob {glob!r} matches no leaf{nearest(glob, leaves)}" if isinstance(glob, str) else f"{glob!r} is no glob"
        for glob in globs
        if not isinstance(glob, str) or not any(fnmatchcase(path, glob) for path in leaves)
    ]
    if problems:
        fix = "name what is to be trained by globs of paths, as in ft.trainable(declared, 'lora.*', '*.bias')"
        raise FunctitanError(report("ft.trainable", problems, fix))


def _is_stage(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "declarations") and hasattr(x, "_replace")
