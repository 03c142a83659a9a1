"""A schedule in letters: one line for each rank, time from left to right.

Invariant: a column is the same moment on all lines.
"""

from __future__ import annotations

from collections.abc import Sequence

from functitan.pipeline.actions import Orders
from functitan.pipeline.clock import Times, compute_spans, makespan


def fitting_width(orders: Orders, times: Sequence[Times], most: int = 400) -> int:
    """Columns in which the name of each compute action has room, but at most `most`."""
    needed = [
        (len(str(action)) + 1) / (end - start) for _, action, start, end in compute_spans(orders, times) if end > start
    ]
    return min(most, round(max(needed, default=1) * makespan(orders, times)[1]))


def draw(orders: Orders, times: Sequence[Times], width: int) -> list[str]:
    """One line for each rank, in `width` columns: the actions it computes, and dots where it waits."""
    first, total = makespan(orders, times)
    scale = width / (total or 1)
    spans = [
        (rank, str(action), round((start - first) * scale), round((end - first) * scale))
        for rank, action, start, end in compute_spans(orders, times)
    ]
    step = max(2, min((right - left for *_, left, right in spans), default=2))
    rows = [[" " if i % step else "·" for i in range(width)] for _ in orders]
    for rank, name, left, right in spans:
        room = max(0, right - left - 1)  # and a space behind
        rows[rank][left:right] = f"{name[:room]:─<{room}} "[: right - left]
    return [f"rank {rank:<{len(str(len(rows) - 1))}}  {''.join(row)}".rstrip() for rank, row in enumerate(rows)]
