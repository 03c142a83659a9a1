"""The memo: results of named ops that remat stores in forward, and takes in place of computing in backward.

Invariant: a function calls the same ops in the same order when it is replayed, so a call's place in that order names
it; what stood at each place is noted, and a replay that meets another call there raises. An op that is lowered in
another way for higher derivatives counts as one place, with an order of its own for each way. The memo belongs to one
run of one rematerialized function; a derivative inside that function does not see it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.errors import FunctitanError, report
from functitan.sharding.around import Around

Results = tuple[Tensor, ...]
Place = tuple[int | str, ...]  # numbers in the order of calls; inside an op of several ways after its number and way


NAME = "checkpoint_name"  # of the op that names a tensor


def remembering(memo: Memo) -> Around:
    """The hooks by which ops are stored in a memo, or found in it, instead of computed."""
    return Around(
        memo,
        op=lambda call, tensors, run: memo.results(call, tensors, lambda: run(call, tensors)),
        inside=lambda label, way: remembering(memo.within(label.op, label.pattern, way)),
        sees_every_op=True,
        is_of_derivatives=False,
        changes_programs=True,
    )


class Seen(NamedTuple):
    """What stood at a place: the op, its pattern, and its operands' shapes and dtypes."""

    op: str
    pattern: str
    operands: tuple[tuple[torch.Size, torch.dtype], ...] = ()

    def __str__(self) -> str:
        of = ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in self.operands)
        return f"{self.op}({self.pattern!r}) of {of or 'no tensor'}"


class Kept(NamedTuple):
    """The place in the order of calls, and the stored results, of one call."""

    place: Place
    results: Results


class Notes(NamedTuple):
    """Of one run: what stood at each place, and how many places there were."""

    seen: dict[Place, Seen | None]
    count: int


class Memo:
    """While recording, `saves(number, call, results)` says of each call of an op whether its results are stored.

    While replaying, `notes` are of the run that was recorded, and `where` names the function in errors.
    """

    def __init__(
        self,
        saves: Callable[[int, Any, Results], bool] | None = None,
        kept: tuple[Kept, ...] = (),
        notes: Notes | None = None,
        where: str = "",
    ) -> None:
        self.saves = saves
        self.kept = {entry.place: entry.results for entry in kept}
        self.seen: dict[Place, Seen | None] = {} if notes is None else notes.seen
        self.where, self.total = where, None if notes is None else notes.count
        self.count, self.inside, self.known = 0, (), True
        # id of a result: its call's place, and a reference that shows its end
        self._made: dict[int, tuple[Place, Any]] = {}

    def results(self, call: Any, tensors: Results, compute: Callable[[], Results]) -> Results:
        """The results of the next call: computed, or those that were stored."""
        label, is_name = getattr(call.static, "label", None), call.op.name == NAME
        op, pattern = (call.op.name, call.static if is_name else "") if label is None else label
        place = self._next(Seen(op, pattern, tuple([(x.shape, x.dtype) for x in tensors])))
        if self.saves is None:
            if place in self.kept:
                return tuple(x.detach() for x in self.kept[place])  # autograd will write its history on them
            return compute()
        found = compute()
        if self.saves(len(self.seen), call, found):
            self._store(place, found, tensors if is_name else ())
        for x in found if len(found) == 1 else ():
            self._made[id(x)] = (place, weakref.ref(x))
        return found

    def within(self, op: str, pattern: str, way: str) -> Memo:
        """The memo of the calls inside the next op, which is lowered in this way.

        Lowered in another way than it was when recorded, it finds nothing stored, and computes.
        """
        inside = (*self._next(Seen(op, pattern)), way)
        inner = object.__new__(Memo)
        inner.__dict__.update(self.__dict__, inside=inside, count=0)
        if self.saves is not None:
            self.seen[inside] = None
        inner.known = self.known and inside in self.seen
        return inner

    def finish(self) -> Notes:
        """What was noted. Raises `FunctitanError` after a replay that has called fewer ops."""
        if self.total is not None and self.count < self.total:
            self._refuse(f"{self.total} named ops were called in forward, {self.count} when it was computed again")
        return Notes(self.seen, self.count)

    def entries(self) -> tuple[Kept, ...]:
        """What was stored."""
        return tuple(Kept(*entry) for entry in self.kept.items())

    def _next(self, seen: Seen) -> Place:
        place = (*self.inside, self.count)
        self.count += 1
        if self.saves is not None:
            self.seen[place] = seen
        elif self.known and self.seen.get(place) != seen:
            then = self.seen.get(place)
            before = "nothing" if then is None else str(then)
            self._refuse(f"named op {place[0]} was {before} in forward, and is {seen} when it is computed again")
        return place

    def _store(self, place: Place, found: Results, named: Results) -> None:
        for x in named:  # what is named may be an op's own result: to store it there spares the op
            source, alive = self._made.get(id(x), (place, lambda: None))
            place = source if alive() is x else place
        self.kept[place] = tuple(x.detach() for x in found)

    def _refuse(self, problem: str) -> None:
        raise FunctitanError(report(self.where, [problem], _FIX))


_FIX = (
    "a rematerialized function calls the same named ops each time: keep caches, counters, and branches on grad mode or "
    "on random numbers out of it, or let it store nothing: policy=ft.remat_policies.nothing_saveable"
)
