"""Gradient transformations in optax's form: pairs of pure functions that compose by `chain`.

Invariant: `update` leaves what it is given untouched, unless `donate=True` lets it write into updates and state, which
raise `DonatedError` when used again; the bits are the same either way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan import tree
from functitan.axes import parse_axes
from functitan.errors import FunctitanError, report
from functitan.optim.factors import times
from functitan.optim.kernels import added, owned
from functitan.optim.matrices import no_matrix
from functitan.optim.numbers import numbers_inside, telling
from functitan.optim.patterns import named_axes
from functitan.optim.schedules import Schedule
from functitan.optim.state import aligned, check_number, check_state, scalar_beside
from functitan.param import Param
from functitan.sharding.cut import carry_cut
from functitan.transforms.donate import TAKEN, taken

State = Any
_UPDATE = "an update with donate=True", None  # who took a tensor over
Mask = tree.Tree | Callable[[str, Any], bool]


class GradientTransformation(NamedTuple):
    """A pair of pure functions: `init(params) -> state` and

    `update(updates, state, params=None, patterns=None, donate=False) -> (updates, state)`.

    `params` are tensors, or `Param`s, of which `init` declares the state. `patterns` is a tree, or a prefix, of the
    leaves' patterns; only a mesh needs it. With `donate` an update may write into its updates and state: whatever reads
    those afterwards raises `DonatedError`. What an update is made of is told "taken", which is true: the tensors are
    its own then.
    """

    init: Callable[[tree.Tree], State]
    update: Callable[..., tuple[tree.Tree, State]]


def donating(update: Callable[..., Any]) -> Callable[..., Any]:
    """An `update` that takes over, where it may write, the updates and state that it is given: they are used up.

    So it writes into tensors of its own, and says `TAKEN` to what it is made of, which has nothing to take.
    """

    @functools.wraps(update)
    def inside(updates, state, params=None, patterns=None, donate=False):
        if not donate or donate is TAKEN:
            return update(updates, state, params, patterns=patterns, donate=donate)
        with taken((updates, state), _UPDATE) as (own, own_state):
            return update(own, own_state, params, patterns=patterns, donate=TAKEN)

    return inside


class ScheduleState(NamedTuple):
    """`count`: the number of steps taken, `[]` int64."""

    count: Any


def identity() -> GradientTransformation:
    """Leaves updates as they are."""
    return telling(GradientTransformation(lambda params: (), lambda updates, state, *args, **kwargs: (updates, state)))


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """One transformation after the other; the state is the tuple of their states.

    >>> import torch
    >>> tx = chain(scale(2.0), scale_by_learning_rate(0.5))
    >>> tx.update({"w": torch.ones(2)}, tx.init({"w": torch.ones(2)}))
    ({'w': tensor([-1., -1.])}, ((), ()))
    """
    check_transformations("chain", dict(enumerate(transformations)))

    def init(params: tree.Tree) -> State:
        return tuple(tx.init(params) for tx in transformations)

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        if not isinstance(state, tuple) or len(state) != len(transformations):
            found = f"tuple of {len(state)}" if type(state) is tuple else type(state).__name__
            problem = f"the state is a {found}, not a tuple of {len(transformations)}"
            raise FunctitanError(report("chain", [problem], "give the state that tx.init(params) or tx.update made"))
        states = []
        for tx, its in zip(transformations, state, strict=True):
            updates, its = tx.update(updates, its, params, patterns=patterns, donate=donate)
            states.append(its)
        return updates, tuple(states)

    numbers = lambda state: numbers_inside(list(zip(transformations, state, strict=False)))
    return telling(GradientTransformation(init, update), numbers)


def apply_updates(params: tree.Tree, updates: tree.Tree, donate: bool | str = False) -> tree.Tree:
    """`params + updates`, in the dtypes of `params`; `donate=True` adds into their own memory, and uses them up.

    >>> import torch
    >>> apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 2.0])})
    {'w': tensor([2., 3.])}
    """
    changes, values = aligned("apply_updates", updates, params=params)
    with taken(values, _UPDATE) if donate and donate is not TAKEN else nullcontext(values) as values:
        made = added(values, changes, donate=donate)
        return tree.unflatten(tree.flatten(params)[1], list(map(carry_cut, values, made)))


def scale(factor: float | Schedule) -> GradientTransformation:
    """Multiplies updates by a number, or a schedule of the number of steps taken before."""
    return _scale(factor, "a factor")


def _scale(factor: float | Schedule, name: str) -> GradientTransformation:
    if not callable(factor):
        constant = GradientTransformation(
            lambda params: (),
            donating(
                lambda updates, state, params, patterns, donate: (
                    times("scale", updates, factor, patterns, donate),
                    state,
                )
            ),
        )
        return telling(constant, lambda state: [(name, factor)])

    def init(params: tree.Tree) -> ScheduleState:
        return ScheduleState(scalar_beside(params, torch.int64))

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        check_state("scale", state, ScheduleState)
        updates = times("scale", updates, factor(state.count), patterns, donate)
        return updates, ScheduleState(state.count + 1)

    numbers = lambda state: [(name, factor(state.count))] if isinstance(state, ScheduleState) else []
    return telling(GradientTransformation(init, update), numbers)


def scale_by_learning_rate(learning_rate: float | Schedule) -> GradientTransformation:
    """Multiplies updates by minus the learning rate: a number, or a schedule of the number of steps taken before."""
    if not callable(learning_rate):
        check_number("scale_by_learning_rate", "learning_rate", learning_rate)
    return _scale(
        (lambda step: -learning_rate(step)) if callable(learning_rate) else -learning_rate, "the learning rate"
    )


def add_decayed_weights(weight_decay: float, mask: Mask | None = None) -> GradientTransformation:
    """Adds `weight_decay * params` to updates; before `scale_by_learning_rate` this is AdamW's decoupled decay.

    `mask` chooses leaves: a tree, or a prefix, of bools, or a function of a leaf's path and its pattern (the parameter
    itself where no patterns are given), such as `decay_matrices`. Loshchilov and Hutter, arXiv:1711.05101.

    >>> import torch
    >>> tx = add_decayed_weights(0.1, mask=decay_matrices)
    >>> params = {"scale": torch.ones(1), "w": torch.ones(1, 1)}
    >>> tx.update({"scale": torch.zeros(1), "w": torch.zeros(1, 1)}, (), params)[0]
    {'scale': tensor([0.]), 'w': tensor([[0.1000]])}
    """
    check_number("add_decayed_weights", "weight_decay", weight_decay)

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        if params is None:
            fix = "give them: tx.update(updates, state, params)"
            raise FunctitanError(report("add_decayed_weights", ["params is None"], fix))
        changes, weights = aligned("add_decayed_weights", updates, params=params)
        chosen = [i for i, decays in enumerate(chosen_by(mask, params, patterns)) if decays]
        if donate and len(chosen) < len(changes):  # one that stays may share memory with one that decays
            changes = owned(changes, True)
        mine = added([changes[i] for i in chosen], [weights[i] for i in chosen], weight_decay, donate)
        decayed = dict(zip(chosen, mine, strict=True))
        return tree.unflatten(tree.flatten(updates)[1], [decayed.get(i, x) for i, x in enumerate(changes)]), state

    return telling(GradientTransformation(lambda params: (), update))


def decay_matrices(path: str, leaf: str | Param | Tensor) -> bool:
    """A mask for `add_decayed_weights`: leaves of two or more axes that are neither biases nor scales of norms.

    These have the word "bias" or "scale" in their name, or axes that are all inputs or all outputs of a projection of
    attention: "heads head_dim".

    >>> decay_matrices("mlp.up", "embed mlp"), decay_matrices("norm.scale", "embed")
    (True, False)
    >>> decay_matrices("attention.q", "embed heads head_dim"), decay_matrices("attention.q_bias", "heads head_dim")
    (True, False)
    """
    axes = parse_axes(leaf) if isinstance(leaf, str) else named_axes(leaf)
    return len(axes) > 1 and not no_matrix(path, axes, {})


def chosen_by(mask: Mask | None, params: tree.Tree, patterns: tree.Tree | None) -> list[bool]:
    """For each leaf whether the mask chooses it; `None` chooses all."""
    leaves = tree.leaves(params)
    if mask is None:
        return [True] * len(leaves)
    if callable(mask):
        known = leaves if patterns is None else tree.broadcast_prefix(patterns, params, "patterns")
        about = [x if pattern is None else pattern for x, pattern in zip(leaves, known, strict=True)]
        return [bool(mask(path, leaf)) for path, leaf in zip(tree.paths(params), about, strict=True)]
    chosen = tree.broadcast_prefix(mask, params, "mask")
    bad = [f"{path}: {x!r}" for path, x in zip(tree.paths(params), chosen, strict=True) if not isinstance(x, bool)]
    if bad:
        raise FunctitanError(report("mask", bad, "a mask is a tree of bools, or a function (path, pattern) -> bool"))
    return chosen


def check_transformations(what: str, given: Mapping[Any, Any]) -> None:
    """Raise `FunctitanError` that lists what is not a gradient transformation."""
    bad = [
        f"{name} is {'a function' if callable(tx) else f'a {type(tx).__name__}'}"
        for name, tx in given.items()
        if not isinstance(tx, GradientTransformation)
    ]
    if bad:
        raise FunctitanError(report(what, bad, "give gradient transformations, as ft.optim.adamw(1e-3) makes them"))
