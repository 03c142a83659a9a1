"""The memo: results of named ops that remat stores in forward, and takes in place of computing in backward.

Invariant: a function calls the same ops in the same order when it is replayed, so a call's place in that order names
it. The memo belongs to one run of one rematerialized function; a derivative inside that function does not see it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Results = tuple[Tensor, ...]


class Kept(NamedTuple):
    """The place in the order of calls, and the stored results, of one call."""

    place: int
    results: Results


class Memo:
    """While recording, `saves(place, call, results)` says of each call of an op whether its results are stored."""

    def __init__(self, saves: Callable[[int, Any, Results], bool] | None = None, kept: tuple[Kept, ...] = ()) -> None:
        self.saves = saves
        self.kept = {entry.place: entry.results for entry in kept}
        self.count = 0
        self._made: dict[
            int, tuple[int, Any]
        ] = {}  # id of a result: its call's place, and a reference that shows its end

    def results(self, call: Any, tensors: Results, compute: Callable[[], Results], is_name: bool) -> Results:
        """The results of the next call: computed, or those that were stored."""
        place, self.count = self.count, self.count + 1
        if self.saves is None:
            if place in self.kept:
                return tuple(x.detach() for x in self.kept[place])  # autograd will write its history on them
            return compute()
        found = compute()
        if self.saves(place, call, found):
            self._store(place, found, tensors if is_name else ())
        for x in found if len(found) == 1 else ():
            self._made[id(x)] = (place, weakref.ref(x))
        return found

    def _store(self, place: int, found: Results, named: Results) -> None:
        for x in named:  # what is named may be an op's own result: to store it there spares the op
            source, alive = self._made.get(id(x), (place, lambda: None))
            place = source if alive() is x else place
        self.kept[place] = tuple(x.detach() for x in found)

    def entries(self) -> tuple[Kept, ...]:
        """What was stored, in the order of calls."""
        return tuple(Kept(*entry) for entry in sorted(self.kept.items(), key=lambda entry: entry[0]))
