"""Ranks agree, through a store, that they are about to do the same.

Invariant: `agree` returns on every rank or raises on every rank, within the timeout, whatever collective each of them
was about to run. A rank pays the same few messages on a mesh of any size, and the store holds no more keys after many
calls than after two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from functitan.errors import CollectiveError
from functitan.sharding.program import disagree, shorter, waited

_AGREED = "agreed"


def agreement(store: dist.Store, name: str, me: int, members: Sequence[int], timeout: timedelta) -> Callable[..., None]:
    """`agree(program, wait=True)` for rank `me` of `members`: all of them are about to do what `program` says.

    The first rank to come writes its program, the others hold theirs against it, and the last lets all go on: three
    messages and a wait. Raises `CollectiveError` that names two ranks' programs if they differ, and which ranks did
    not come, and what they did last, if some do not come in time. With `wait=False`, for a rank that leaves, it tells
    the others and returns.

    `name` tells agreements in one store apart; those made again under one name count on.

    >>> agree = agreement(dist.HashStore(), "step", 0, [0], timedelta(seconds=5))
    >>> agree("runs all_reduce over fsdp")
    """
    own = store.clone()  # type: ignore[attr-defined]  # a wait would hold up whoever shares its connection
    own.set_timeout(timeout)
    made = _tried(lambda: own.add(f"functitan/{name}/made/{me}", 1), me, name)
    keys, numbers = dist.PrefixStore(f"functitan/{name}/{made}", own), itertools.count()

    def agree(program: str, wait: bool = True) -> None:
        verdict = _tried(lambda: meet(next(numbers), program, wait), me, program)
        if verdict != _AGREED and wait:
            raise CollectiveError(verdict)

    def meet(number: int, program: str, wait: bool) -> str:
        first, count, verdict = _keys(number)
        keys.set(f"last/{me}", f"{number} {program}")
        rank, _, said = keys.compare_set(first, "", f"{me} {program}").decode().partition(" ")
        decide = lambda text: keys.compare_set(verdict, "", text).decode()  # the first decision holds for all
        if said != program:
            return decide(disagree({int(rank): said, me: program}))
        if keys.add(count, 1) == len(members):
            for key in _keys(number - 1):  # who comes here has read that verdict
                keys.delete_key(key)
            return decide(_AGREED)
        if not wait:
            return _AGREED
        try:
            return keys.get(verdict).decode()
        except dist.DistStoreError:  # the timeout
            return decide(waited(me, program.removeprefix("runs "), absent(number)))

    def absent(number: int) -> list[str]:
        problems = []
        for rank in members:
            known = keys.check([f"last/{rank}"])
            at, _, last = keys.get(f"last/{rank}").decode().partition(" ") if known else ("-1", "", "")
            if int(at) < number:
                did = f"; its last: {shorter(last.removeprefix('runs '))}" if known else ""
                problems.append(f"rank {rank} did not join within {timeout.total_seconds():g} s{did}")
        return problems or ["a rank ended while all were asked"]

    return agree


def _keys(number: int) -> list[str]:
    return [f"{number}/{part}" for part in ("first", "count", "verdict")]


def _tried(ask: Callable[[], Any], me: int, program: str) -> Any:
    try:
        return ask()
    except dist.DistError as error:
        why = f"torch.distributed's store does not answer: {(str(error).splitlines() or [type(error).__name__])[0]}"
        raise CollectiveError(waited(me, program.removeprefix("runs "), [why])) from error
