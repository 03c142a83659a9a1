"""The way of keys and values around a ring, and of their gradients back: who gets them at which stop.

Invariant: a block of keys reaches a rank only if that rank needs it, or one that it visits later, and gradients travel
only once there are any. Nothing here reads a tensor: all ranks know the whole way of every block.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from functitan.attention.tiles import meet
from functitan.sharding.message import Passing
from functitan.sharding.sequence import runs


class Stop(NamedTuple):
    """A stop of all blocks: rank r has that of rank r - `shift` there, if it is one of those who get it."""

    shift: int
    keys: Passing | None  # from here to the next stop; `None`: none goes on
    gradients: Passing | None  # likewise, and from the last stop home


@lru_cache(maxsize=2**12)  # lengths may vary without end
def route(length: int, ranks: int, zigzag: int, causal: bool, window: int | None) -> tuple[Stop, ...]:
    """Home, and the stops at which some rank needs what comes there.

    >>> [stop.shift for stop in route(64, 8, 1, True, 9)], [stop.shift for stop in route(64, 8, 8, True, 3)]
    ([0, 1], [0, 1, 7])
    >>> [str(stop.keys) for stop in route(64, 4, 1, True, None)]  # the first rank needs no other's
    ['1 to 1 2 3', '1 to 2 3', '1 to 3', 'None']
    """
    size = length // ranks
    held = [runs(length, zigzag, rank * size, size) for rank in range(ranks)]

    def needed(block: int, shift: int) -> bool:
        rows, keys = held[(block + shift) % ranks], held[block]
        return any(meet(row, key, causal, window) for row in rows for key in keys)

    users = {shift: [block for block in range(ranks) if needed(block, shift)] for shift in range(1, ranks)}
    shifts = [0, *(shift for shift, blocks in users.items() if blocks)]
    stops = {block: [at for at, shift in enumerate(shifts) if block in users.get(shift, ())] for block in range(ranks)}
    way = {block: (at[0], at[-1]) for block, at in stops.items() if at}  # its first and last use
    found = []
    for at, (shift, then) in enumerate(pairwise((*shifts, ranks))):
        keys = [(block + then) % ranks for block, (_, last) in way.items() if at < last]
        gradients = [(block + then) % ranks for block, (first, _) in way.items() if first <= at]
        found.append(Stop(shift, *(_passing(then - shift, to, ranks) for to in (keys, gradients))))
    return tuple(found)


def _passing(shift: int, to: list[int], ranks: int) -> Passing | None:
    return Passing(shift, None if len(to) == ranks else tuple(to)) if to else None
