"""Float8: which einsums run in it, by which recipe, and what the recipe `delayed` remembers from step to step.

Invariant: all but `Delayed` are values without tensors, which a captured program may be made for. `Delayed` belongs to
one call of a wrapped function: it numbers the einsums in the order of forward, and a recomputation counts alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functitan.errors import FunctitanError, report
from functitan.sharding.mesh import Mesh

BLOCK = 32  # numbers that share a scale in the MX formats


class Recipe(NamedTuple):
    """How scales are found. `rows`: one for each position of the axes that a product keeps, else one for a tensor."""

    rows: bool = False
    blocks: bool = False  # one for 32 neighbours along an axis that is summed, a power of two
    exact_weight_gradient: bool = False
    source: str = "now"  # or "state", "given"


RECIPES = {
    "tensorwise": Recipe(),
    "rowwise": Recipe(rows=True),
    "rowwise_with_gw_hp": Recipe(rows=True, exact_weight_gradient=True),
    "delayed": Recipe(source="state"),
    "static": Recipe(source="given"),
    "mxfp8": Recipe(blocks=True),
}


class Matmul(NamedTuple):
    """What a filter is asked about: an einsum, and the global sizes of its first product, [m, k] times [k, n]."""

    pattern: str
    axes: frozenset[str]
    m: int
    k: int
    n: int


class Float8(NamedTuple):
    """What `ft.float8` says to the einsums inside."""

    name: str
    emulate: bool
    filter: Callable[[Matmul], bool] | frozenset[str] | None
    scales: tuple[tuple[str, tuple[float, ...]], ...] = ()  # (pattern, scales); "" for all that are not named
    delayed: Delayed | None = None

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.name]

    def at(self, mark: Any) -> Float8:
        """The same, counting einsums from a mark on: for a recomputation."""
        return self if self.delayed is None else self._replace(delayed=self.delayed.at(mark))

    @property
    def mark(self) -> Any:
        """Where the count of einsums is."""
        return None if self.delayed is None else tuple(self.delayed.count)


class DelayedState(NamedTuple):
    """The largest magnitudes of the last steps, the newest first: "tensors history" in float32, equal on every rank.

    `cotangents` has no rows where backward did not run inside the wrapped function.
    """

    operands: Tensor
    cotangents: Tensor


class Delayed:
    """The maxima that one call begins with (`None`: nothing is known yet), and those that it finds on this rank."""

    def __init__(self, maxima: tuple[Tensor | None, Tensor | None], rows: tuple[int, int], history: int) -> None:
        self.maxima, self.rows, self.history = maxima, rows, history
        self.count = [0, 0]
        self.found: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}
        self.meshes: list[Mesh | None] = []

    def at(self, mark: Any) -> Delayed:
        other = copy.copy(self)
        other.count = list(mark)
        return other

    def take(self, operands: int, results: int, mesh: Mesh | None) -> tuple[int, int]:
        """The first rows of the next einsum: of its operands, and of its results' cotangents."""
        rows = self.count[0], self.count[1]
        self.count[0] += operands
        self.count[1] += results
        if self.maxima[0] is not None and self.count[0] > self.rows[0]:
            raise FunctitanError(report("ft.float8(recipe='delayed')", [self.another()], FIX_STATE))
        if not self.meshes:
            self.meshes.append(mesh)
        elif self.meshes[0] != mesh:
            problem = "its einsums run on several meshes: ranks of one process share the state"
            raise FunctitanError(report("ft.float8(recipe='delayed')", [problem], "wrap inside ft.simulate"))
        return rows

    def another(self) -> str:
        return f"the state has {self.rows[0]} rows of operands, the function needs {self.count[0]} or more"

    def of(self, which: int, row: int, found: Tensor) -> Tensor | None:
        """Enter a maximum of this rank; that of the steps before, if there were any."""
        self.found[which][row] = found.reshape(())
        known = self.maxima[which]
        return None if known is None else known[row]

    def next(self, state: DelayedState | None, largest: Callable[[Tensor], Tensor]) -> DelayedState:
        """The state after the call; `largest` takes maxima of this rank to those of all."""
        if state is not None and self.count[0] != self.rows[0]:
            raise FunctitanError(report("ft.float8(recipe='delayed')", [self.another()], FIX_STATE))
        backward = self.found[1] or (state is not None and state.cotangents.shape[0])
        counts = self.count[0], self.count[1] if backward else 0
        found = [self.found[which].get(row) for which in (0, 1) for row in range(counts[which])]
        like = next((x for x in found if x is not None), torch.zeros(()))
        every = [torch.zeros_like(like) if x is None else x for x in found]
        largest_now = largest(torch.stack(every) if every else like.new_zeros(0)).split(counts)
        return DelayedState(*(self._rolled(which, largest_now[which], state) for which in (0, 1)))

    def _rolled(self, which: int, now: Tensor, state: DelayedState | None) -> Tensor:
        length = self.history if state is None else state.operands.shape[1]
        old = now.new_zeros(now.shape[0], length)
        if state is not None and state[which].shape[0]:
            old = state[which]
        seen = [row in self.found[which] for row in range(now.shape[0])]
        rolled = torch.cat([now[:, None], old[:, :-1]], 1)
        return rolled if all(seen) else torch.where(torch.tensor(seen, device=old.device)[:, None], rolled, old)


FIX_STATE = "a state belongs to one function: begin with None, and give the state that the last call gave"
