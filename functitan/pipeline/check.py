"""The proof that a schedule can run: what is missing, doubled, out of order, unmatched, or waits forever.

Invariant: a schedule without problems computes each microbatch's forward and backward once on each stage, and ends
whatever its actions cost, with at most `buffers` messages from one rank to another that nobody has asked for yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from functitan.pipeline.actions import (
    ALL,
    GATHERS,
    KINDS,
    RECEIVES,
    SENDS,
    Action,
    Order,
    Orders,
    StageRank,
    before,
    done_by,
    is_compute,
    peer,
    send_after,
)
from functitan.pipeline.clock import run


def problems(orders: Orders, stage_rank: StageRank, num_microbatches: int, buffers: int | None = 0) -> list[str]:
    """All that is wrong with the orders, each with rank, stage and action; what can't be judged before is left out.

    `buffers` is how many messages from one rank to another may be under way before their receives are posted.
    """
    found = list(_misplaced(orders, stage_rank, num_microbatches))
    found = found or [
        *compute_problems(orders, stage_rank, num_microbatches),
        *_messages(orders, stage_rank),
        *(line for rank, order in enumerate(orders) for line in _gathers(rank, order)),
    ]
    return found or waiting(orders, stage_rank, buffers)


def compute_problems(orders: Orders, stage_rank: StageRank, num_microbatches: int) -> list[str]:
    """What is wrong with the compute actions, and with the order of each rank taken alone."""
    found = list(_misplaced(orders, stage_rank, num_microbatches))
    return found or [*_counts(orders, stage_rank, num_microbatches), *_disorder(orders, stage_rank)]


def waiting(orders: Orders, stage_rank: StageRank, buffers: int | None = None) -> list[str]:
    """Each rank that can't go on, its next action, and what that waits for; nothing if the schedule ends."""
    done = run(orders, stage_rank, lambda action: 1, buffers=buffers)
    found = []
    for rank, (action, missing) in done.stuck.items():
        others = ", ".join(f"{need} of rank {stage_rank[need.stage]}" for need in missing)
        where = f"rank {rank}, stage {action.stage}, action {len(done.times[rank])}"
        found.append(f"{where}: {action} waits forever for {others}")
    return found


def _misplaced(orders: Orders, stage_rank: StageRank, num_microbatches: int) -> Iterator[str]:
    """Actions of no kind, of no stage or microbatch that there is, or on the wrong rank."""
    for rank, order in enumerate(orders):
        for i, action in enumerate(order):
            where = f"rank {rank}, stage {action.stage}, action {i}: {action}"
            once = action.kind in GATHERS
            if action.kind not in KINDS:
                yield f"{where} has the kind {action.kind!r}, and the kinds are {', '.join(KINDS)}"
            elif not 0 <= action.stage < len(stage_rank):
                yield f"{where} is of a stage that does not exist: there are {len(stage_rank)}"
            elif (action.microbatch == ALL) != once or not (once or 0 <= action.microbatch < num_microbatches):
                yield f"{where} has the microbatch {action.microbatch}, of {ALL if once else num_microbatches}"
            elif stage_rank[action.stage] != rank:
                yield f"{where} is on this rank, and its stage lives on rank {stage_rank[action.stage]}"


def _counts(orders: Orders, stage_rank: StageRank, num_microbatches: int) -> Iterator[str]:
    """Each microbatch's F, and B or both I and W, once on each stage."""
    for stage, rank in enumerate(stage_rank):
        where = f"rank {rank}, stage {stage}"
        counts = Counter(
            (done.kind, done.microbatch)
            for action in orders[rank]
            if action.stage == stage and is_compute(action)
            for done in done_by(action)
        )
        for m in range(num_microbatches):
            f, b, i, w = (counts[kind, m] for kind in "FBIW")  # b is in i and w too
            if not (b or i or w):
                yield f"{where}: B of microbatch {m}, or I and W, is missing"
            for kind, count in (("F", f), ("B", b), ("I", i - b), ("W", w - b)):
                if count > 1:
                    yield f"{where}: {kind} of microbatch {m} is there {count} times"
                elif count and b and kind in "IW":
                    yield f"{where}: {kind} of microbatch {m} is there beside B, which is I and W"
                elif not count and (kind == "F" or (kind in "IW" and not b and (i or w))):
                    yield f"{where}: {kind} of microbatch {m} is missing"


def _disorder(orders: Orders, stage_rank: StageRank) -> Iterator[str]:
    """Actions that stand before what they need on their own rank."""
    for rank, order in enumerate(orders):
        whole = {done for action in order for done in done_by(action)}
        seen: set[Action] = set()
        for i, action in enumerate(order):
            for need in before(action, stage_rank):
                if action.kind not in RECEIVES and need in whole - seen:
                    where = f"rank {rank}, stage {action.stage}, action {i}"
                    yield f"{where}: {action} stands before {need}, which it needs"
            seen.update(done_by(action))


def _messages(orders: Orders, stage_rank: StageRank) -> Iterator[str]:
    """Sends and receives: one of each where the next stage is on another rank, and in the same order at both ends."""
    for rank, order in enumerate(orders):
        needed = Counter({need for a in order for need in before(a, stage_rank) if need.kind in RECEIVES})
        needed.update({send for a in order if (send := send_after(a, stage_rank))})
        there = Counter(a for a in order if a.kind in SENDS + RECEIVES)
        for action in sorted((needed - there).keys() | (there - needed).keys(), key=lambda a: a[1:]):
            where = f"rank {rank}, stage {action.stage}"
            if action not in there:
                yield f"{where}: {action} is missing"
            elif action in needed:
                yield f"{where}: {action} is there {there[action]} times"
            else:
                yield f"{where}: {action} is of no use: nothing on rank {rank} makes or takes this message"
    sent, received = _channels(orders, stage_rank)
    for (source, target), messages in sent.items():
        taken = received.get((source, target), [])
        if sorted(taken) == sorted(messages) and taken != messages:
            i = next(i for i, pair in enumerate(zip(messages, taken, strict=True)) if pair[0] != pair[1])
            yield (
                f"rank {target}, stage {peer(taken[i]).stage}: {peer(taken[i])} is the receive number {i} from rank "
                f"{source}, which sends {messages[i]} as number {i}"
            )


def _channels(
    orders: Orders, stage_rank: StageRank
) -> tuple[dict[tuple[int, int], list[Action]], dict[tuple[int, int], list[Action]]]:
    """For each pair (from rank, to rank) the sends of the one, and those that the other's receives ask for."""
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[Action]] = {}
    for rank, order in enumerate(orders):
        for action in order:
            if action.kind in SENDS + RECEIVES and 0 <= peer(action).stage < len(stage_rank):
                other = stage_rank[peer(action).stage]
                if action.kind in SENDS:
                    sent.setdefault((rank, other), []).append(action)
                else:
                    received.setdefault((other, rank), []).append(peer(action))
    return sent, received


def _gathers(rank: int, order: Order) -> Iterator[str]:
    """Parameters are gathered while a stage computes, and gradients are reduced once, when they are whole."""
    gathered: set[int] = set()
    for i, action in enumerate(order):
        where = f"rank {rank}, stage {action.stage}, action {i}: {action}"
        if action.kind == "UNSHARD":
            if action.stage in gathered:
                yield f"{where} gathers what is gathered"
            gathered.add(action.stage)
        elif action.kind == "RESHARD":
            if action.stage not in gathered:
                yield f"{where} frees what is not gathered"
            gathered.discard(action.stage)
        elif is_compute(action) and action.stage not in gathered:
            yield f"{where} needs {Action('UNSHARD', action.stage, ALL)} before it"
            gathered.add(action.stage)  # say it once
    for stage in sorted({action.stage for action in order}):
        reduced = [i for i, a in enumerate(order) if a == ("REDUCE_GRAD", stage, ALL)]
        last = max((i for i, a in enumerate(order) if a.stage == stage and a.kind in "BW"), default=-1)
        if len(reduced) != 1:
            yield f"rank {rank}, stage {stage}: REDUCE_GRAD is there {len(reduced)} times, and once is right"
        elif reduced[0] < last:
            yield f"rank {rank}, stage {stage}, action {reduced[0]}: REDUCE_GRAD stands before {order[last]}"
