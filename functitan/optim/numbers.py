"""Numbers by which an optimizer multiplies, a schedule's learning rate among them: known before it writes anything.

Invariant: where a transformation tells its numbers, finite numbers, gradients, parameters and state give finite
updates, unless these leave the range of the dtype. One that tells nothing may give anything: its updates are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Numbers = list[tuple[str, Any]]  # (what it is, a number or a tensor `[]`)

_ATTRIBUTE = "_functitan_numbers"  # of the function `update`, so that a transformation stays a pair


def telling(transformation: Any, numbers: Callable[[Any], Numbers | None] = lambda state: []) -> Any:
    """The transformation, which tells `numbers(state)` of the update that comes next; `None`: it cannot tell.

    >>> from functitan.optim import sgd
    >>> numbers_of(sgd(lambda step: 0.5), sgd(lambda step: 0.5).init({}))
    [('the learning rate', -0.5)]
    """
    setattr(transformation.update, _ATTRIBUTE, numbers)
    return transformation


def numbers_of(transformation: Any, state: Any) -> Numbers | None:
    """What a transformation tells of its next update; `None` for one that tells nothing, as one of a user's own."""
    numbers = getattr(transformation.update, _ATTRIBUTE, None)
    return None if numbers is None else numbers(state)


def numbers_inside(pairs: list[tuple[Any, Any]]) -> Numbers | None:
    """What several transformations tell, given with their states: `None` as soon as one tells nothing."""
    found: Numbers = []
    for transformation, state in pairs:
        numbers = numbers_of(transformation, state)
        if numbers is None:
            return None
        found += numbers
    return found
