"""Schedules in CSV files, in the form of torch.distributed.pipelining: a row for each rank, a cell for each action.

Invariant: reading what was written gives the same actions.
"""

from __future__ import annotations

import csv
import re
from os import PathLike
from pathlib import Path

from functitan.errors import ScheduleError, report
from functitan.pipeline.actions import Action, is_compute, parse_action
from functitan.pipeline.schedule import Schedule, from_actions, short
from functitan.reading import path_text


def write_csv(schedule: Schedule, path: str | PathLike[str], compute_only: bool = False) -> None:
    """Write `0F0`, `0SEND_F0`, `1UNSHARD`, ...; or with `compute_only` just what each rank computes."""
    rows = [[str(a) for a in order if is_compute(a) or not compute_only] for order in schedule.actions]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def read_csv(
    path: str | PathLike[str],
    *,
    num_stages: int | None = None,
    num_microbatches: int | None = None,
    max_unsharded: int | None = None,
) -> Schedule:
    """The checked schedule of a file; its name is the file's.

    Empty cells are bubbles, and `(0F1;1B0)OVERLAP_F_B` is one action after the other. If the file has neither sends nor
    receives, all communication is placed as for a named schedule. The numbers of stages and microbatches are those that
    the file has, unless told. Raises `ScheduleError` naming rank, stage and action for what can't be read or run.
    """
    problems: list[str] = []
    rows: list[list[Action]] = []
    what = f"read_csv({path_text('read_csv', path)!r})"
    try:
        with open(path, newline="") as file:
            table = list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        problem = f"it can't be read: {getattr(error, 'strerror', None) or error}"
        raise ScheduleError(report(what, [problem], "give a CSV file in UTF-8, as write_csv makes it")) from error
    for rank, cells in enumerate(table):
        rows.append([])
        for i, cell in enumerate(cells):
            overlapped = _OVERLAP.fullmatch(cell.strip())
            for text in overlapped[1].split(";") if overlapped else [cell]:
                action = parse_action(text)
                if action:
                    rows[rank].append(action)
                elif text.strip():
                    said = f"{text.strip()[:60]!r}"
                    problems.append(f"rank {rank} (row {rank + 1}), cell {i + 1}: {said} is no action")
    if problems:
        raise ScheduleError(report(what, short(problems), _FIX))
    sizes = dict(num_stages=num_stages, num_microbatches=num_microbatches, max_unsharded=max_unsharded)
    schedule = from_actions(rows, name=Path(path).stem, **sizes)
    schedule.check(buffers=None)
    return schedule


_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")
_FIX = "write stage, kind and microbatch, as 0F0, 1I2, 0SEND_F0; UNSHARD, RESHARD and REDUCE_GRAD have no microbatch"
