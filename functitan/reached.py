"""The part of a state that a step updates: the leaves that have a gradient, and the optimizer's state of these.

Invariant: what `tx.init` does not declare without a leaf is the leaf's part of the state, so no optimizer knows that
there are others; those and their state are passed on as they are, neither copied nor written to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from functitan import tree
from functitan.errors import FunctitanError, report
from functitan.frozen import trained
from functitan.optim import GradientTransformation
from functitan.state import TrainState, declared_state, of_leaves

Values = tuple[tree.Tree, tree.Tree]  # parameters, and the optimizer's state


class Part(NamedTuple):
    """The optimizer's state of some parameters, by its structure and its places in the whole state; `None` is all."""

    declarations: tree.Tree  # of all parameters
    structure: Any
    places: tuple[int, ...] | None
    all_params: bool = False

    def params_of(self, params: tree.Tree, grads: tree.Tree) -> tree.Tree:
        """The parameters that have a gradient."""
        return params if self.all_params else tree.also_in(grads, params, "ft.train_step: the gradients")

    def params_back(self, part: tree.Tree, params: tree.Tree) -> tree.Tree:
        """All parameters, with these."""
        return part if self.all_params else tree.put_back(part, params)

    def of(self, opt_state: tree.Tree) -> tree.Tree:
        """This part of a state."""
        if self.places is None:
            return opt_state
        leaves = tree.leaves(opt_state)
        return tree.unflatten(self.structure, [leaves[i] for i in self.places])

    def put_back(self, part: tree.Tree, opt_state: tree.Tree) -> tree.Tree:
        """The state with this part."""
        if self.places is None:
            return part
        leaves, structure = tree.flatten(opt_state)
        for i, leaf in zip(self.places, tree.leaves(part), strict=True):
            leaves[i] = leaf
        return tree.unflatten(structure, leaves)


def with_gradients_of(tx: GradientTransformation, state: TrainState, grads: tree.Tree, known: dict[Any, Part]) -> Part:
    """The part of the state that these gradients update: `None` stands for one of a leaf that is left as it is.

    `known` keeps what was found, by the structure of the gradients. Raises `FunctitanError` for gradients of another
    structure, and for an optimizer whose state of some leaves is no part of its state of all.
    """
    structure = tree.flatten(grads)[1]
    if structure == tree.flatten(state.params)[1]:
        return Part(state.declarations, None, None, all_params=True)
    found = known.get(structure)
    if found is None or found.declarations is not state.declarations:
        known[structure] = found = _found(tx, state.declarations, grads)
    return found


def _found(tx: GradientTransformation, declarations: tree.Tree, grads: tree.Tree) -> Part:
    ours = tree.also_in(grads, declarations, "ft.train_step: the gradients")
    if tree.flatten(ours)[1] == tree.flatten(trained(declarations, declarations))[1]:
        return Part(declarations, None, None)
    whole, part = declared_state(tx, declarations, "ft.train_step"), of_leaves(tx, ours)
    leaves, structure = tree.flatten(part)
    places = {path: i for i, path in enumerate(tree.paths(whole))}
    kinds = [(leaf.pattern, leaf.shape, leaf.dtype) for leaf in tree.leaves(whole)]
    problems = [
        f"without it, {path} of the optimizer's state is another"
        for path, leaf in zip(tree.paths(part), leaves, strict=True)
        if path not in places or kinds[places[path]] != (leaf.pattern, leaf.shape, leaf.dtype)
    ]
    if problems:
        idle = [path for path in tree.paths(declarations) if path not in set(tree.paths(ours))]
        fix = "freeze what the loss does not use, by ft.trainable(declarations, ...), before the state is made"
        raise FunctitanError(report(f"ft.train_step: the loss does not reach {', '.join(idle)}", problems, fix))
    return Part(declarations, structure, tuple(places[path] for path in tree.paths(part)))
