"""A pipeline schedule: what each rank does, in order, as a value that can be printed, checked and drawn.

Invariant: a schedule is immutable data, made before anything runs and the same on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from functitan.errors import ScheduleError, report
from functitan.pipeline import picture, text
from functitan.pipeline.actions import GATHERS, RECEIVES, SENDS, Action, Order, Orders, StageRank, is_compute
from functitan.pipeline.check import compute_problems, problems, waiting
from functitan.pipeline.clock import Cost, Times, bubble, costs, peak, run
from functitan.pipeline.communication import place, with_gathers, with_messages


@dataclass(frozen=True)
class Schedule:
    """What each rank of a pipeline does in one step.

    `actions[rank]` is a tuple of `Action(kind, stage, microbatch)`, communication included; `stage_rank[stage]` is the
    rank where a stage lives. `str(schedule)` draws it at unit costs.

    >>> import functitan as ft
    >>> print(ft.pipeline.schedule("1f1b", num_stages=2, num_microbatches=3, num_ranks=2))
    1f1b: 2 stages on 2 ranks, 3 microbatches; bubble 25.0%, at most 2 1 activations
    rank 0  0F0 0F1 ·   ·   0B0──── 0F2 0B1──── ·   0B2────
    rank 1  ·   1F0 1B0──── 1F1 1B1──── 1F2 1B2──── ·   ·
    """

    name: str
    num_stages: int
    num_microbatches: int
    num_ranks: int
    stage_rank: StageRank
    actions: Orders

    def compute(self, rank: int) -> Order:
        """The compute actions of a rank, without communication."""
        return tuple(filter(is_compute, self.actions[rank]))

    def stages(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, from the first to the last."""
        return tuple(stage for stage, there in enumerate(self.stage_rank) if there == rank)

    def check(self, buffers: int | None = 0) -> None:
        """Prove that the schedule computes each gradient once, and ends; raise `ScheduleError` with all that is wrong.

        Each stage runs F of each microbatch once, then B, or I and later W, in the order of their dependencies. Sends
        match receives, in one order at both ends. Parameters are gathered where they are used, gradients reduced when
        they are whole. And no rank waits forever, even if from one rank to another at most `buffers` messages are under
        way that the other has posted no receive for (0: a send waits for its receive; None: sends never wait).
        """
        if found := problems(self.actions, self.stage_rank, self.num_microbatches, buffers):
            raise ScheduleError(report(self._title(), short(found), _FIX_CHECK))

    def timeline(self, *, forward: Cost = 1, input: Cost = 1, weight: Cost = 1, send: float = 0) -> tuple[Times, ...]:
        """(start, end) of each action of each rank, by the simulated clock.

        `forward`, `input` and `weight` are the times of F, I and W, one number or one for each stage; B takes input +
        weight. `send` is the time of a message, which no rank waits for but the one that needs it: a receive starts
        where it is posted and ends when its message is there. Gathers and reductions take none.
        """
        cost = costs(forward, input, weight, self.num_stages)
        done = run(self.actions, self.stage_rank, cost, send)
        if done.stuck:
            raise ScheduleError(report(self._title(), waiting(self.actions, self.stage_rank), _FIX_CHECK))
        return done.times

    def bubble_fraction(
        self,
        forward: Cost = 1,
        input: Cost = 1,
        weight: Cost = 1,
        *,
        send: float = 0,
        measured: Sequence[Times] | None = None,
    ) -> float:
        """The share of all ranks' time, from the first action's start to the last's end, in which they do not compute.

        For 1F1B of p ranks and m microbatches (p - 1) / (m + p - 1). `measured[rank]` is (start, end) of each action as
        they were, instead of the predicted ones.

        >>> import functitan as ft
        >>> ft.pipeline.schedule("1f1b", num_stages=4, num_microbatches=9, num_ranks=4).bubble_fraction()
        0.25
        """
        times = measured or self.timeline(forward=forward, input=input, weight=weight, send=send)
        return bubble(self.actions, times)

    def peak_activations(self, kept: float = 1) -> tuple[float, ...]:
        """For each rank the most activations it holds at once; one is those of one microbatch in one stage.

        They live from F to B, or from F to W; of those, the share `kept` from I to W.
        """
        return tuple(peak(order, kept) for order in self.actions)

    def text(self, measured: Sequence[Times] | None = None, **costs: Any) -> str:
        """The schedule in letters, at costs as `timeline` takes them; below it, as wide, what was `measured`."""
        times = self.timeline(**costs)
        width = text.fitting_width(self.actions, times)
        lines = [self._title(times), *text.draw(self.actions, times, width)]
        if measured:
            lines += [_measured_title(self, measured), *text.draw(self.actions, measured, width)]
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str], measured: Sequence[Times] | None = None, **costs: Any) -> None:
        """Draw the schedule into a file (png, svg or pdf), at costs as `timeline` takes them; below it `measured`.

        `measured[rank]` is (start, end) of each of `actions[rank]`, in seconds. Needs matplotlib.
        """
        times = self.timeline(**costs)
        panels = [(self._title(times), "time, in units of the costs", times)]
        if measured:
            panels.append((_measured_title(self, measured), "seconds", tuple(measured)))
        picture.plot(path, self.actions, self.stage_rank, panels)

    def __str__(self) -> str:
        return self.text()

    def _title(self, times: Sequence[Times] | None = None) -> str:
        title = f"{self.name}: {self.num_stages} stages on {self.num_ranks} ranks, {self.num_microbatches} microbatches"
        if times is None:
            return title
        peaks = " ".join(f"{live:g}" for live in self.peak_activations())
        return f"{title}; bubble {bubble(self.actions, times):.1%}, at most {peaks} activations"


def from_actions(
    actions: Iterable[Iterable[tuple[str, int, int]]],
    *,
    name: str = "custom",
    num_stages: int | None = None,
    num_microbatches: int | None = None,
    max_unsharded: int | None = None,
) -> Schedule:
    """The schedule in which each rank does the given actions, `(kind, stage, microbatch)`, in order.

    A stage lives where its actions are. The numbers of stages and microbatches are one more than the largest given,
    unless told. Compute actions alone get their communication here (`max_unsharded` as in `schedule`); actions with
    sends and receives get gathers and reductions if they have none. Raises `ScheduleError` if the compute actions can't
    run; `check` proves the rest.

    >>> from_actions([[("F", 0, 0), ("B", 0, 0)]], name="one").compute(0)
    (Action(kind='F', stage=0, microbatch=0), Action(kind='B', stage=0, microbatch=0))
    """
    orders = tuple(tuple(Action(*action) for action in order) for order in actions)
    compute = tuple(tuple(filter(is_compute, order)) for order in orders)
    num_stages = num_stages or 1 + max((a.stage for order in compute for a in order), default=-1)
    num_microbatches = num_microbatches or 1 + max((a.microbatch for order in compute for a in order), default=-1)
    title, count = f"schedule {name!r}", sum(map(len, compute))
    if num_stages * num_microbatches > max(count, _SMALL):  # before anything of such a size is made
        problem = f"{num_stages} stages of {num_microbatches} microbatches are more than its {count} actions"
        raise ScheduleError(report(title, [problem], _FIX_CHECK))
    homes = [
        Counter(rank for rank, order in enumerate(compute) for a in order if a.stage == s) for s in range(num_stages)
    ]
    found = [f"stage {stage}: no rank has an action of it" for stage, ranks in enumerate(homes) if not ranks]
    if found or not homes:
        raise ScheduleError(report(title, found or ["it has no actions"], _FIX_CHECK))
    stage_rank = tuple(ranks.most_common(1)[0][0] for ranks in homes)
    if all(a.kind not in SENDS + RECEIVES for order in orders for a in order):
        found = compute_problems(compute, stage_rank, num_microbatches)
        if found := found or waiting(tuple(with_messages(o, stage_rank) for o in compute), stage_rank):
            raise ScheduleError(report(title, short(found), _FIX_CHECK))
        orders = place(compute, stage_rank, max_unsharded)
    elif all(a.kind not in GATHERS for order in orders for a in order):
        orders = tuple(with_gathers(order, max_unsharded) for order in orders)
    return Schedule(name, num_stages, num_microbatches, len(orders), stage_rank, orders)


def _measured_title(schedule: Schedule, measured: Sequence[Times]) -> str:
    return f"measured: bubble {bubble(schedule.actions, measured):.1%}"


def short(lines: list[str], most: int = 20) -> list[str]:
    """The first lines of many."""
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more"]


_SMALL = 10_000  # stages times microbatches: below it, each action that is missing is named
_FIX_CHECK = (
    "each stage needs F of every microbatch once, then B, or I and later W, after what they depend on; "
    "give compute actions alone, and from_actions and read_csv place the communication"
)
