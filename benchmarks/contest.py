"""Programs side by side: step by step in turn on the same batches, in the same processes.

Invariant: a ratio is the median over the steps of our time over a peer's in the same round. A program whose losses
differ by more than its row's tolerance from the first peer's, in any step, is INVALID.
"""

from __future__ import annotations

import statistics
import time
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from llama_module import batches
from rich.console import Console
from rich.progress import track
from rich.table import Table
from train_steps import Program, device

import functitan as ft
from functitan.models.llama import LlamaConfig

UNTIMED = 3  # the first steps compile and allocate


class Group(NamedTuple):
    """Programs that one ratio is about."""

    title: str
    dim: str | None  # of the mesh over two processes; None: one process
    programs: tuple[Program, ...]
    limit: float  # of our best time over the best peer's
    tolerance: float = 1e-4


class Sizes(NamedTuple):
    """What every program of a run shares."""

    config: LlamaConfig
    batch: int
    seq: int
    steps: int
    clip: float


class Row(NamedTuple):
    name: str
    ours: bool
    times: list[float]  # seconds of each timed step
    losses: list[float]  # of all steps
    memory: int = 0  # the most bytes of tensors at once, in the process that has most, of processes of its own


def compete(group: Group, sizes: Sizes, memory: bool = True) -> list[Row]:
    """The rows of one group, from processes that it starts."""
    nprocs = 1 if group.dim is None else 2
    rows = ft.launch(_run, group, sizes, nprocs=nprocs)[0]
    if not memory:
        return rows
    short = sizes._replace(steps=3)
    peaks = [max(ft.launch(_peak, group, program, short, nprocs=nprocs)) for program in group.programs]
    return [row._replace(memory=peak) for row, peak in zip(rows, peaks, strict=True)]


def table(group: Group, rows: list[Row], sizes: Sizes) -> str:
    """The rows as they are printed, and the ratio that the group is about."""
    shown = Table(title=group.title, title_justify="left")
    for column in ("", "ms per step", "of best peer", "tokens/s", "peak MiB", "of first peer", "losses differ"):
        shown.add_column(column, justify="right" if column else "left")
    peers = [row for row in rows if not row.ours]
    first, best = peers[0], min(peers, key=lambda row: _median(row.times))
    for row in rows:
        differ = difference(row, first)
        ms, memory = _median(row.times) * 1e3, row.memory / 2**20
        shown.add_row(
            row.name,
            f"{ms:.1f}",
            f"{ratio(row, best):.3f}",
            f"{sizes.batch * sizes.seq / ms * 1e3:.0f}",
            f"{memory:.0f}" if memory else "",
            f"{row.memory / first.memory:.3f}" if memory and first.memory else "",
            f"{differ:.1e}" + ("" if differ <= group.tolerance else f"  INVALID: above {group.tolerance:g}"),
        )
    console = Console(width=120)
    with console.capture() as captured:
        console.print(shown)
    found = [ratio(row, best) for row in rows if row.ours]
    verdict = f"best of functitan is {min(found):.3f} of {best.name}, the best peer (at most {group.limit:.2f})"
    return f"{captured.get()}{verdict}\n"


def difference(row: Row, first: Row) -> float:
    """The largest relative difference of two programs' losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(row.losses, first.losses, strict=True))


def ratio(row: Row, other: Row) -> float:
    return _median([a / b for a, b in zip(row.times, other.times, strict=True)])


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def _run(group: Group, sizes: Sizes) -> list[Row]:
    mesh, data = _start(group, sizes)
    steps = {program: program.make(sizes.config, sizes.seq, sizes.clip, mesh) for program in group.programs}
    rows = [Row(program.name, program.ours, [], []) for program in group.programs]
    shown = mesh is None or dist.get_rank() == 0
    for i, batch in enumerate(track(data, group.title, console=Console(stderr=True), disable=not shown)):
        for row, step in zip(rows, steps.values(), strict=True):
            _settle(mesh)
            start = time.perf_counter()
            row.losses.append(step(batch))
            if i >= UNTIMED:
                row.times.append(time.perf_counter() - start)
    return rows


def _peak(group: Group, program: Program, sizes: Sizes) -> int:
    """The most bytes of tensors alive at once, from before the program exists through a few of its steps."""
    mesh, data = _start(group, sizes)
    if program.name.startswith("JAX"):
        return 0  # it does not tell
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step = program.make(sizes.config, sizes.seq, sizes.clip, mesh)
        for batch in data:
            step(batch)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # every allocation and release of the CPU allocator (private, tried on torch 2.13)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes_in_time = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(sizes_in_time), default=0)


def _start(group: Group, sizes: Sizes) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    torch.set_num_threads(2 if group.dim is None else 1)
    mesh = None if group.dim is None else ft.make_mesh(**{group.dim: 2})
    data = batches(sizes.config, sizes.steps, sizes.batch, sizes.seq)
    return mesh, [{name: x.to(device()) for name, x in batch.items()} for batch in data]


def _settle(mesh: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if mesh is not None:
        dist.barrier()
