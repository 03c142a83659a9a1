"""Tiles: the parts of a rank's attention matrix that are computed at all, worked out from positions alone.

Invariant: every (query, key) that causality and the window let through is in exactly one tile, and none that they hide
is in a tile that is not masked. Nothing here reads a tensor: all ranks know each other's tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from functitan.sharding.sequence import Run, Runs

BLOCK = 512  # rows and columns of a masked tile at most: the tile that torch's CPU kernel skips by, too


class Tile(NamedTuple):
    """Rows `begin:end` against columns `left:right`, counted in slots of the shard and of the block of keys."""

    begin: int
    end: int
    left: int
    right: int
    kind: str  # "full", "causal" (square, its own lower triangle) or "masked" (only a mask says)

    @property
    def work(self) -> float:
        """Products of a query and a key that a kernel which skips what causality hides computes."""
        rows, columns = self.end - self.begin, self.right - self.left
        return rows * (rows + 1) / 2 if self.kind == "causal" else float(rows * columns)


@lru_cache(maxsize=2**12)  # lengths may vary without end
def tiles(rows: Runs, columns: Runs, causal: bool, window: int | None, marked: bool = False) -> tuple[Tile, ...]:
    """The tiles of queries at some positions with keys at others; `marked` where a mask hides more of each.

    >>> tiles((Run(4, 4),), (Run(0, 8),), True, None)
    (Tile(begin=0, end=4, left=0, right=4, kind='full'), Tile(begin=0, end=4, left=4, right=8, kind='causal'))
    """
    ascending = all(before.first < after.first for before, after in pairwise(rows))  # as in the shard of a rank
    if rows == columns and ascending and causal and window is None and not marked:
        size = sum(run.size for run in rows)
        return (Tile(0, size, 0, size, "causal"),)
    found: list[Tile] = []
    begin = 0
    for row in rows:
        step = BLOCK if marked or window is not None or any(_cuts(row, column) for column in columns) else row.size
        for first in range(0, row.size, step):
            part = Run(row.first + first, min(step, row.size - first))
            found += _of_row(part, begin + first, columns, causal, window, marked)
        begin += row.size
    return tuple(_joined(found))


def meet(row: Run, column: Run, causal: bool, window: int | None) -> bool:
    """Whether a query at some positions sees a key at others."""
    return any(True for _ in _pieces(row, column, causal, window))


def _of_row(row: Run, begin: int, columns: Runs, causal: bool, window: int | None, marked: bool) -> Iterator[Tile]:
    below = 0
    for column in columns:
        for left, right, kind in _pieces(row, column, causal, window):
            kind = "masked" if marked else kind
            step = BLOCK if kind == "masked" else right - left
            for at in range(left, right, step):
                low = below + at - column.first
                yield Tile(begin, begin + row.size, low, low + min(step, right - at), kind)
        below += column.size


def _pieces(row: Run, column: Run, causal: bool, window: int | None) -> Iterator[tuple[int, int, str]]:
    """The positions of keys that a run of queries sees, cut by how: left, right, kind."""
    first, last = row.first, row.first + row.size - 1
    low, high = column.first, column.first + column.size
    begin, left = (low, low) if window is None else (first - window + 1, last - window + 1)  # some see, all see
    if causal:
        right, end = first, last + 1
    else:
        right, end = (high, high) if window is None else (first + window, last + window)
    spans = [(begin, left, "masked"), (left, right, "full"), (right, end, "causal" if causal else "masked")]
    if left > right:  # the window is shorter than the run: nobody is seen by all
        spans = [(begin, end, "masked")]
    for a, b, kind in spans:
        a, b, whole = max(a, low), min(b, high), a >= low and b <= high
        if a < b:
            yield a, b, "masked" if kind == "causal" and not whole else kind


def _cuts(row: Run, column: Run) -> bool:
    """Whether a block of keys ends within the positions of a run of queries: its triangle is not whole there."""
    low, high = column.first, column.first + column.size
    first, end = row.first, row.first + row.size
    return max(first, low) < min(end, high) and not (low <= first and end <= high)


def _joined(found: list[Tile]) -> list[Tile]:
    """Full tiles side by side as one, then full tiles above each other."""
    rows: list[Tile] = []
    for tile in found:
        last = rows[-1] if rows else None
        if last and tile.kind == last.kind == "full" and last[:2] == tile[:2] and last.right == tile.left:
            rows[-1] = last._replace(right=tile.right)
        else:
            rows.append(tile)
    full = sorted((tile for tile in rows if tile.kind == "full"), key=lambda tile: (tile.left, tile.right, tile.begin))
    joined: list[Tile] = []
    for tile in full:
        last = joined[-1] if joined else tile
        if last[2:] == tile[2:] and last.end == tile.begin:
            joined[-1] = last._replace(end=tile.end)
        else:
            joined.append(tile)
    return sorted(joined + [tile for tile in rows if tile.kind != "full"])
