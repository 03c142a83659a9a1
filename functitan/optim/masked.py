"""Transformations of some of the leaves: `masked`, and `multi_transform`, one for each group of leaves.

Invariant: a transformation sees the whole tree with `None`, a node without leaves, for each leaf that is not its own;
so its state holds nothing for those, patterns and paths fit as they are, and the updates of the others pass untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from functitan import tree
from functitan.errors import FunctitanError, nearest, report
from functitan.optim.kernels import owned
from functitan.optim.numbers import Numbers, numbers_inside, numbers_of, telling
from functitan.optim.transform import (
    GradientTransformation,
    Mask,
    State,
    check_transformations,
    chosen_by,
    donating,
)
from functitan.sharding.context import current


def masked(transformation: GradientTransformation, mask: Mask) -> GradientTransformation:
    """A transformation of the leaves that `mask` chooses; `()` is its state where that is none.

    `mask` is a tree, or a prefix, of bools, or a function of a leaf's path and its pattern (the leaf itself where no
    patterns are given): it must choose the same leaves of parameters, declarations and patterns.

    >>> import torch
    >>> from functitan.optim.transform import scale
    >>> tx = masked(scale(2.0), {"a": True, "b": False})
    >>> tx.update({"a": torch.ones(1), "b": torch.ones(1)}, ())[0]
    {'a': tensor([2.]), 'b': tensor([1.])}
    """
    check_transformations("masked", {"transformation": transformation})

    def init(params: tree.Tree) -> State:
        mine = chosen_by(mask, params, None)
        return transformation.init(tree.only(params, mine)) if any(mine) else ()

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        mine = chosen_by(mask, updates if params is None else params, patterns)
        if not any(mine):
            if current().pipeline is not None:  # other stages may have leaves of its, and sum with this one
                none = tree.only(updates, mine)
                transformation.update(none, transformation.init(none), none, patterns=patterns)
            return updates, state
        leaves, structure = tree.flatten(updates)
        leaves = owned(leaves, True) if donate else leaves  # a leaf that is not ours may share memory with one that is
        own = tree.only(tree.unflatten(structure, leaves), mine)
        theirs = None if params is None else tree.only(params, mine)
        own, state = transformation.update(own, state, theirs, patterns=patterns, donate=donate)
        moved = iter(tree.leaves(own))
        merged = [next(moved) if ours else x for x, ours in zip(leaves, mine, strict=True)]
        return tree.unflatten(structure, merged), state

    return telling(GradientTransformation(init, update), lambda state: numbers_of(transformation, state))


def multi_transform(
    transformations: Mapping[str, GradientTransformation], labels: Mapping[str, str]
) -> GradientTransformation:
    """For each leaf the transformation of its label; the state is a dict of theirs.

    `labels` maps globs of paths to labels, and the first glob that matches wins: `*` stands for any text, dots
    included. Raises `FunctitanError` that lists every label without a transformation, and, from `init` and `update`,
    every leaf that no glob matches.

    >>> import torch
    >>> from functitan.optim.transform import scale
    >>> tx = multi_transform({"slow": scale(0.5), "fast": scale(2.0)}, {"*.scale": "slow", "*": "fast"})
    >>> grads = {"norm": {"scale": torch.ones(1)}, "w": torch.ones(1)}
    >>> tx.update(grads, tx.init(grads))[0]
    {'norm': {'scale': tensor([0.5000])}, 'w': tensor([2.])}
    """
    check_transformations("multi_transform", transformations)
    bad = [
        f"{glob!r}: {label!r}{nearest(label, transformations)} is none of {list(transformations)}"
        for glob, label in labels.items()
        if label not in transformations
    ]
    if bad:
        raise FunctitanError(report("multi_transform", bad, "give a transformation for each label"))

    def label_of(path: str) -> str | None:
        return next((label for glob, label in labels.items() if fnmatchcase(path, glob)), None)

    def check(params: tree.Tree) -> None:
        lost = [path or "leaf" for path in tree.paths(params) if label_of(path) is None]
        if lost:
            problems = [f"{path}: no glob matches it" for path in lost]
            raise FunctitanError(report("multi_transform", problems, "add a glob for them; a last '*' takes the rest"))

    parts = {
        label: masked(tx, lambda path, leaf, label=label: label_of(path) == label)
        for label, tx in transformations.items()
    }

    def init(params: tree.Tree) -> State:
        check(params)
        return {label: tx.init(params) for label, tx in parts.items()}

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        check(updates)
        if not isinstance(state, dict) or state.keys() != parts.keys():
            problem = f"the state is {sorted(state) if isinstance(state, dict) else type(state).__name__}"
            raise FunctitanError(
                report("multi_transform", [f"{problem}, not a dict of {sorted(parts)}"], "give the state of tx.init")
            )
        states = {}
        for label, tx in parts.items():
            updates, states[label] = tx.update(updates, state[label], params, patterns=patterns, donate=donate)
        return updates, states

    def numbers(state: State) -> Numbers | None:
        return numbers_inside([(tx, state.get(label, ())) for label, tx in parts.items()])

    return telling(GradientTransformation(init, update), numbers)
