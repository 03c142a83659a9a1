"""The ledger: what a program communicates, one entry for each collective, predicted or recorded.

Invariant: `bytes` is what one rank sends. With n ranks and S bytes of the whole tensor that is (n-1)/n S for an
all-gather or a reduce-scatter, 2(n-1)/n S for an all-reduce, (n-1)/n of the local tensor for an all-to-all, and the
message itself for a permute (of each rank that sends one: entries are the same on all), or for a send to another
pipeline stage, which its sender enters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from functitan.sharding.around import Around, noting
from functitan.sharding.message import Message


class Ledger:
    """Entries in the order of execution; `peak_bytes` is the most memory alive at once where it was measured."""

    def __init__(self, title: str = "") -> None:
        self.title = title
        self.entries: list[Message] = []
        self.argument_bytes: int | None = None
        self.peak_bytes: int | None = None
        self.notes: list[str] = []
        self.patterns: set[tuple[str, ...]] = set()  # every pattern whose layout was asked for

    def __iter__(self) -> Iterator[Message]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Message:
        return self.entries[index]

    def total_bytes(self, mesh_dim: str | None = None) -> int:
        """Bytes that one rank sends, over all collectives or over those whose group includes one mesh dim."""
        return sum(entry.bytes for entry in self.entries if mesh_dim is None or mesh_dim in entry.mesh_dims)

    def __str__(self) -> str:
        columns = ("phase", "collective", "over", "each", "dtype", "times", "op", "pattern")
        rows = [columns, *_rows(self.entries)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        right = {3, 5}
        lines = [
            "  ".join(
                cell.rjust(w) if i in right else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        rule = "-" * min(120, max(map(len, lines)))
        return "\n".join(
            line.rstrip()
            for line in [*([self.title] if self.title else []), lines[0], rule, *lines[1:], rule, *self._sums()]
        )

    def _sums(self) -> list[str]:
        dims = sorted({dim for entry in self.entries for dim in entry.mesh_dims})
        over = ", ".join(f"{dim} {_size(self.total_bytes(dim))}" for dim in dims)
        lines = [
            f"{len(self.entries)} collectives, {_size(self.total_bytes())} sent by each rank"
            + (f" ({over})" if over else "")
        ]
        if hidden := [entry for entry in self.entries if entry.hidden]:
            sent = sum(entry.bytes for entry in hidden)
            lines.append(f"{len(hidden)} of them, {_size(sent)}, travel while something is computed (hidden)")
        if self.argument_bytes is not None:
            lines.append(f"arguments {_size(self.argument_bytes)} on each rank")
        if self.peak_bytes is not None:
            lines.append(f"peak memory {_size(self.peak_bytes)} on each rank, arguments included")
        return lines + [f"note: {note}" for note in self.notes]

    def __repr__(self) -> str:
        return f"<Ledger of {len(self.entries)} collectives, {_size(self.total_bytes())}>"


def entering(ledger: Ledger) -> Around:
    """The hooks that enter messages into a ledger, before they are sent, with notes and the patterns looked up."""

    def enter(message: Message, x: Any, env: Any, start: Callable[..., Any]) -> Any:
        if message.collective != "receive":  # a message to another stage is entered by its sender
            ledger.entries.append(message)
        return start(message, x)

    notes, patterns = noting(ledger.notes), ledger.patterns.update
    return Around(ledger, message=enter, entered=ledger.entries.extend, note=notes, patterns=patterns)


def _rows(entries: list[Message]) -> list[tuple[str, ...]]:
    """Equal messages of one phase, counted, in the order of their first appearance: layers repeat themselves."""
    rows = []
    for _, phase in groupby(entries, key=lambda entry: entry.phase):
        counts = Counter((_row(entry), entry.bytes) for entry in phase)
        rows += [(*row[:5], str(times), *row[5:]) for (row, _), times in counts.items()]
    return rows


def _row(entry: Message) -> tuple[str, ...]:
    phase = entry.phase + (" (again)" if entry.recomputed else "")
    dtype = str(entry.dtype).removeprefix("torch.")
    dims = "·".join(entry.mesh_dims)
    collective = entry.collective + (" (hidden)" if entry.hidden else "")
    return phase, collective, dims, _size(entry.bytes), dtype, entry.op, _short(entry.pattern)


def _size(nbytes: int) -> str:
    scale = min(3, max(0, (max(nbytes, 1).bit_length() - 1) // 10))
    return f"{nbytes / 1024**scale:,.{1 if scale else 0}f} {('B', 'KiB', 'MiB', 'GiB')[scale]}"


def _short(text: str, width: int = 72) -> str:
    return text if len(text) <= width else text[: width - 4] + " ..."
