"""Where the time of a step went: a pure function of the spans of one thread, or of one device.

Invariant: the parts sum to the total. Each moment belongs to one part: what is communication is no optimizer, and what
is optimizer is no compute.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from io import StringIO
from typing import NamedTuple

from functitan.errors import FunctitanError, report

Interval = tuple[float, float]


class Span(NamedTuple):
    """A stretch of one thread's or device's time, in seconds. `category` is that of the chrome trace."""

    name: str
    start: float
    end: float
    category: str = "user_annotation"


class Breakdown(NamedTuple):
    """Seconds of one step; all but `total` sum to it."""

    total: float
    compute: float  # in torch's ops, or in a captured graph
    communication: float  # exposed: nothing else runs in it
    optimizer: float  # the phase "update"; that of a captured graph is part of compute
    other: float  # Python, data, waiting

    def mfu(self, flops: float, peak: float) -> float:
        """The share of the hardware's peak that a step of `flops` operations reaches, with `peak` a second.

        >>> Breakdown(2.0, 1.0, 0.5, 0.25, 0.25).mfu(flops=1e9, peak=1e9)
        0.5
        """
        if not (flops >= 0 and peak > 0 and self.total > 0):
            problem = f"flops is {flops}, peak {peak}, the step took {self.total} s"
            raise FunctitanError(report("mfu", [problem], "give operations of a step, and operations per second"))
        return flops / (self.total * peak)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("part of a step", "ms", "share")
        for column in table.columns[1:]:
            column.justify = "right"
        names = {"communication": "exposed communication", "optimizer": "optimizer (phase update)"}
        for name, seconds in zip((*self._fields[1:], "total"), (*self[1:], self.total), strict=True):
            share = seconds / self.total if self.total else 0.0
            table.add_row(names.get(name, name), f"{seconds * 1e3:.3f}", f"{share:.1%}", end_section=name == "other")
        out = StringIO()
        Console(file=out, width=80).print(table)
        return out.getvalue().rstrip()


def breakdown(spans: Iterable[Span], window: Interval, steps: int = 1) -> Breakdown:
    """What the spans of one thread, or the kernels of one device, make of `window`; per step.

    >>> spans = [Span("all_gather[fsdp] einsum a b", 1.0, 2.0), Span("aten::mm", 0.0, 4.0, "cpu_op")]
    >>> breakdown([*spans, Span("update", 4.0, 6.0)], (0.0, 7.0))
    Breakdown(total=7.0, compute=3.0, communication=1.0, optimizer=2.0, other=1.0)
    """
    parts: dict[str, list[Interval]] = {"communication": [], "optimizer": [], "compute": []}
    on_device = False
    for span in spans:
        part = part_of(span)
        start, end = max(span.start, window[0]), min(span.end, window[1])
        if part is not None and start < end:
            parts[part].append((start, end))
            on_device |= span.category == "kernel"
    sent, updated, worked = map(union, parts.values())
    if on_device:  # where kernels run beside it, a message is hidden
        sent = without(sent, worked)
    updated = without(updated, sent)
    worked = without(without(worked, sent), updated)
    compute, communication, optimizer = (_length(its) / steps for its in (worked, sent, updated))
    total = (window[1] - window[0]) / steps
    return Breakdown(total, compute, communication, optimizer, total - compute - communication - optimizer)


def part_of(span: Span) -> str | None:
    """The part of a step that a span belongs to, by its name and category; `None`: it says nothing."""
    name, category = span.name, span.category
    if category == "kernel":
        return "communication" if "nccl" in name.lower() else "compute"
    if category in ("gpu_memcpy", "gpu_memset"):
        return "compute"
    if category in ("user_annotation", "gpu_user_annotation"):
        if name == "update":
            return "optimizer"
        if name.startswith("ft.jit of ") and category == "user_annotation":
            return "compute"
        return "communication" if _COLLECTIVE.match(name) and category == "user_annotation" else None
    if category == "cpu_op" and "::" in name and not name.startswith("autograd::"):
        return "communication" if name.startswith(("_c10d_functional::", "c10d::")) else "compute"
    return None


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals in order, which cover what these cover."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def without(intervals: list[Interval], others: list[Interval]) -> list[Interval]:
    """What the first cover and the others do not; both as `union` gives them."""
    return list(_without(intervals, others))


def _length(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _without(intervals: list[Interval], others: list[Interval]) -> Iterator[Interval]:
    left = iter(others)
    hole = next(left, None)
    for start, end in intervals:
        while hole is not None and hole[0] < end:
            if hole[1] > start:
                if hole[0] > start:
                    yield start, hole[0]
                start = hole[1]
                if start >= end:
                    break
            hole = next(left, None)
        if start < end:
            yield start, end


_COLLECTIVE = re.compile(r"(all_gather|reduce_scatter|all_reduce|all_to_all|permute)\[|wait for ")
