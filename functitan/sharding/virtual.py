"""Where the ranks of a virtual mesh, threads of one process, meet: collectives and messages through a table.

Invariant: the last rank to arrive at a collective works out every rank's result, summing in rank order, so results
are the same bits in every run, and no rank reads another's tensor after that one's wait. A rank that fails, leaves, or
runs another program ends the others with an error instead of a hang.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch

from functitan.errors import CaptureError, CollectiveError, report
from functitan.sharding.context import current
from functitan.sharding.mesh import MeshSizes, Pending, Transport, Wait
from functitan.sharding.message import Message, Passing
from functitan.sharding.program import disagree, waited
from functitan.sharding.rules import Dims


class Table:
    """Where the ranks of one virtual mesh meet. A table lives as long as one `simulate` call."""

    def __init__(self, world: int, timeout: float) -> None:
        self.condition = threading.Condition()
        self.world = world
        self.timeout = timeout
        self.counts: dict[tuple[int, tuple[int, ...]], int] = {}
        self.arrived: dict[Any, dict[int, tuple[Any, Any]]] = {}
        self.results: dict[Any, dict[int, Any]] = {}
        self.posted: dict[tuple[int, int], int] = {}  # how many messages each rank has sent to each
        self.awaited: dict[tuple[int, int], int] = {}  # how many receives each rank has posted from each
        self.mail: dict[tuple[int, int, int], tuple[Message, Any]] = {}  # by (from, to, number)
        self.left: set[int] = set()
        self.errors: list[tuple[int, BaseException]] = []
        self.interrupted = False

    def leave(self, rank: int, error: BaseException | None = None) -> None:
        with self.condition:
            self.left.add(rank)
            if error is not None:
                self.errors.append((rank, error))
            self.condition.notify_all()

    def interrupt(self, error: BaseException) -> None:
        """End every rank at its next collective, also one whose partners are all there."""
        with self.condition:
            self.interrupted = True
            self.errors.insert(0, (0, error))
            self.condition.notify_all()

    def _go_on(self) -> None:
        if self.interrupted:
            raise CollectiveError(report("ft.simulate", ["the call was interrupted"], "start it again"))

    def wait(self, ranks: int | None = None, timeout: float | None = None) -> None:
        """Wait until so many ranks, all by default, have left."""
        with self.condition:
            self.condition.wait_for(lambda: len(self.left) >= (self.world if ranks is None else ranks), timeout)

    def meet(self, rank: int, group: tuple[int, ...], program: Any, x: Any, combine: Callable[[list], list]) -> Wait:
        """Hand in `x`; what waits for the group, and takes away this rank's part of `combine` of all."""
        if current().is_captured:  # whoever traces holds a lock: the other ranks would never come
            problem = f"rank {rank} {_does(program)} inside a function that is being captured"
            raise CaptureError(report("a virtual mesh", [problem], FIX_CAPTURE))
        with self.condition:
            self._go_on()
            count = self.counts[rank, group] = self.counts.get((rank, group), 0) + 1
            key = (group, count)
            there = self.arrived.setdefault(key, {})
            there[rank] = (program, x)
            last = len(there) == len(group)
        if last:
            if len({_asked(program) for program, _ in there.values()}) > 1:
                raise CollectiveError(disagree({r: _does(program) for r, (program, _) in there.items()}))
            results = combine([there[member][1] for member in group])
            with self.condition:
                del self.arrived[key]
                self.results[key] = dict(zip(group, results, strict=True))
                self.condition.notify_all()
        return functools.partial(self._take, rank, group, key, there, program)

    def _take(self, rank: int, group: tuple[int, ...], key: Any, there: dict[int, Any], program: Any) -> Any:
        with self.condition:
            done = self.condition.wait_for(
                lambda: (
                    key in self.results or bool(self.errors) or any(r in self.left and r not in there for r in group)
                ),
                self.timeout,
            )
            if key not in self.results:
                raise CollectiveError(_missing(rank, group, there, program, self, done))
            mine = self.results[key].pop(rank)
            if not self.results[key]:
                del self.results[key]
            return mine

    def post(self, rank: int, to: int, program: Message, x: torch.Tensor) -> Pending:
        with self.condition:
            self._go_on()
            number = self.posted[rank, to] = self.posted.get((rank, to), 0) + 1
            self.mail[rank, to, number] = program, x.clone()
            self.condition.notify_all()
        return Pending(lambda: x, lambda: True)

    def receive(self, rank: int, source: int, program: Message) -> Pending:
        number = self.awaited[source, rank] = self.awaited.get((source, rank), 0) + 1
        key = source, rank, number

        def wait() -> Any:
            with self.condition:
                done = self.condition.wait_for(
                    lambda: key in self.mail or bool(self.errors) or source in self.left, self.timeout
                )
                if key not in self.mail:
                    raise CollectiveError(_missing(rank, (source,), {}, program, self, done))
                sent, x = self.mail.pop(key)
            if sent.request != program.request:
                raise CollectiveError(disagree({source: f"sends {sent}", rank: f"awaits {program}"}))
            return x

        return Pending(wait, lambda: key in self.mail)


def transport_of(table: Table, sizes: MeshSizes, coordinate: tuple[int, ...]) -> Transport:
    strides = [1]
    for n in reversed(sizes.sizes[1:]):
        strides.insert(0, strides[0] * n)
    me = sum(c * s for c, s in zip(coordinate, strides, strict=True))

    @functools.cache
    def members(dims: Dims) -> tuple[int, ...]:
        places = [sizes.dims.index(dim) for dim in dims]
        base = me - sum(coordinate[p] * strides[p] for p in places)
        return tuple(
            base + sum(c * strides[p] for c, p in zip(at, places, strict=True))
            for at in itertools.product(*(range(sizes.sizes[p]) for p in places))
        )

    def start(message: Message, x: torch.Tensor) -> Wait:
        return table.meet(me, members(message.mesh_dims), message, x, functools.partial(_combined, message))

    def agree(program, wait=True, everyone=False):
        if wait:  # else it leaves with an error, which the table shows
            dims = tuple(dim for dim in sizes.dims if everyone or dim != "pp")
            table.meet(me, members(dims), program, None, lambda nothing: nothing)()

    def post(message: Message, x: torch.Tensor, to: int) -> Pending:
        return table.post(me, members(message.mesh_dims)[to], message, x)

    def receive(message: Message, device: torch.device, source: int) -> Pending:
        return table.receive(me, members(message.mesh_dims)[source], message)

    return Transport(start, agree, post=post, receive=receive, shares_a_process=True)


def _combined(message: Message, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each rank's result of a collective of these tensors, in the order of the ranks."""
    ranks = range(len(xs))
    match message.collective, message.how:
        case "all_gather", _:
            return [torch.stack(xs) for _ in ranks]
        case "reduce_scatter", str() as op:
            return [_REDUCE[op]([x[i] for x in xs]) for i in ranks]
        case "all_reduce", str() as op:
            total = _REDUCE[op](xs)
            return [total, *(total.clone() for _ in xs[1:])]
        case "all_to_all", _:
            return [torch.stack([x[i] for x in xs]) for i in ranks]
        case "permute", Passing() as way:
            come = (xs[(i - way.shift) % len(xs)] for i in ranks)
            return [x.clone() if way.reaches(i) else torch.zeros_like(x) for i, x in enumerate(come)]
    raise AssertionError(message)


_REDUCE: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
    "sum": lambda xs: functools.reduce(torch.add, xs[1:], xs[0].clone()),
    "max": lambda xs: functools.reduce(torch.maximum, xs[1:], xs[0].clone()),
}


def _missing(rank: int, group: tuple, there: dict, program: Any, table: Table, done: bool) -> str:
    absent = sorted(set(group) - set(there))
    if table.errors:
        why = [
            f"rank {r} failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            for r, e in table.errors[:1]
        ]
    elif done:
        why = [f"rank {r} left without joining" for r in absent if r in table.left]
    else:
        why = [f"ranks {absent} did not join within {table.timeout:g} s"]
    return waited(rank, _does(program).removeprefix("runs "), why)


def _does(program: Message | str) -> str:
    """What a rank runs, in words: a message, or what `agree` was told."""
    return program if isinstance(program, str) else f"runs {program}"


def _asked(program: Message | str) -> Any:
    """What the ranks that meet must have alike."""
    return program if isinstance(program, str) else program.request


FIX_CAPTURE = (
    "capture inside each rank: ft.simulate(...)(lambda mesh, x: ft.jit(ft.spmd(fn, mesh=mesh, rules=rules))(x))"
)
