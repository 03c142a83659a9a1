"""Bucket collectives: the weights of one block travel in one message, and so do its gradients.

Invariant: one bucket holds one block at most, whose weights would be alive together anyway: ZeRO-3 stays ZeRO-3. A
bucket of gathers stands where its first member stood, one of reductions where its last stood.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import prod

import torch
from torch.fx import Graph, Node

from functitan.capture.nodes import COLLECTIVE, Sent, emit, is_collective, sent_by
from functitan.capture.passes.order import Places, alike, last_use, needed_before, places, used_before
from functitan.capture.trace import Program

BLOCK = 512 << 20  # bytes of the whole tensors in a bucket, where blocks repeat
LOOSE = 25 << 20  # where nothing repeats that could tell what is used together

aten = torch.ops.aten


def bucket_collectives(program: Program, block: int = BLOCK, loose: int = LOOSE) -> Program:
    """The program with gathers, reduce-scatters and all-reduces of equal kind, dims and dtype joined by block.

    A block is one period of the sequence in which a phase uses its weights (their shapes and ops): a layer. Buckets
    are cut at `block` bytes, or at `loose` where nothing repeats; what lives on into the next phase is apart. Forward
    and backward, and what remat computes again, stay apart.
    """
    graph = program.graph.graph
    for group in alike(graph):
        kind = sent_by(group[0]).message.collective
        if kind not in ("all_gather", "reduce_scatter", "all_reduce"):
            continue
        at = places(graph)
        lasting = _lasting(group, at) if kind == "all_gather" else set()
        for run, cap in _blocks(group, block, loose):
            for its in ([x for x in run if x not in lasting], [x for x in run if x in lasting]):
                for bucket in _buckets(its, cap, at, kind == "all_gather"):
                    if len(bucket) > 1:
                        (_gather if kind == "all_gather" else _reduce)(graph, bucket, at)
    return program


def _lasting(group: list[Node], at: Places) -> set[Node]:
    """Gathers that a later phase uses too, as of norm scales: they would keep a whole bucket alive until then."""
    phase = sent_by(group[-1]).message.phase
    end = next(
        (at[x] for x in at if at[x] > at[group[-1]] and is_collective(x) and sent_by(x).message.phase != phase), None
    )
    return {node for node in group if end is not None and last_use(node, at) > end}


def period(keys: list) -> tuple[int, int, int] | None:
    """(period, begin, end) of the longest stretch that repeats itself, at least twice and over half of `keys`.

    >>> period(list("E" + 3 * "nqkvodgu" + "nH"))
    (8, 1, 26)
    """
    best = None
    for p in range(1, len(keys) // 2 + 1):
        begin = 0
        for i in range(p, len(keys) + 1):
            if i < len(keys) and keys[i] == keys[i - p]:
                continue
            if (
                i - begin >= 2 * p
                and 2 * (i - begin) > len(keys)
                and (best is None or i - begin > best[2] - best[1] + p)
            ):
                best = (p, begin, i)
            begin = i - p + 1
    return best


def _blocks(group: list[Node], block: int, loose: int) -> Iterable[tuple[list[Node], int]]:
    """Runs of collectives that may share a bucket, with the most bytes of one."""
    found = period([(m.shape, m.op, m.pattern) for m in (sent_by(node).message for node in group)])
    if found is None:
        yield group, loose
        return
    step, begin, end = found
    cuts = [0, *range(begin, end, step), *([end] if (end - begin) % step == 0 else []), len(group)]
    for first, last in pairwise(cuts):
        yield group[first:last], block


def _buckets(run: list[Node], cap: int, at: Places, early: bool) -> Iterable[list[Node]]:
    """Cut a run where bytes exceed the cap, or where a member cannot move to the first (`early`) or the last."""
    bucket: list[Node] = []
    total = 0
    for node in run:
        size = _whole(node)
        if early:
            fits = not bucket or needed_before(sent_by(node).x, at[bucket[0]], at) is not None
        else:
            fits = all(used_before(member, at[node], at) is not None for member in bucket)
        if bucket and (total + size > cap or not fits):
            yield bucket
            bucket, total = [], 0
        bucket.append(node)
        total += size
    yield bucket


def _whole(node: Node) -> int:
    """The bytes of the whole tensor of a collective."""
    x, _, message = sent_by(node)
    value = x.meta["val"]
    return value.numel() * value.element_size() * (message.ranks if message.collective == "all_gather" else 1)


def _gather(graph: Graph, bucket: list[Node], at: Places) -> None:
    """Gather the shards laid end to end; each is taken out where it was gathered before, and lives as long."""
    first = bucket[0]
    moved = {needed: None for node in bucket for needed in needed_before(sent_by(node).x, at[first], at) or ()}
    for needed in sorted(moved, key=at.__getitem__):
        first.prepend(needed)
    with graph.inserting_before(first):
        flat = [emit(graph, aten.reshape.default, sent_by(node).x, [-1]) for node in bucket]
        whole = _send(graph, emit(graph, aten.cat.default, flat), bucket)
    _take_out(graph, whole, bucket, 1)


def _reduce(graph: Graph, bucket: list[Node], at: Places) -> None:
    """Reduce what is laid end to end, when the last of it is known."""
    last = bucket[-1]
    moved = {user: None for node in bucket for user in used_before(node, at[last], at) or ()}
    lead = 1 if sent_by(last).message.collective == "reduce_scatter" else 0
    with graph.inserting_before(last):
        xs = [sent_by(node).x for node in bucket]
        flat = [emit(graph, aten.reshape.default, x, [*x.meta["val"].shape[:lead], -1]) for x in xs]
        whole = _send(graph, emit(graph, aten.cat.default, flat, lead), bucket)
    for node in bucket[:-1]:
        last.prepend(node)
    for user in sorted(moved, key=at.__getitem__):
        last.prepend(user)
    _take_out(graph, whole, bucket, 0)


def _send(graph: Graph, x: Node, bucket: list[Node]) -> Node:
    _, mesh, first = sent_by(bucket[0])
    members = (sent_by(node).message for node in bucket)
    patterns = "; ".join(dict.fromkeys(f"{m.op} {m.pattern}".strip() for m in members))
    message = first._replace(op="bucket", pattern=f"of {len(bucket)}: {patterns}")
    return emit(graph, COLLECTIVE, *Sent(x, mesh, message).arguments)


def _take_out(graph: Graph, whole: Node, bucket: list[Node], axis: int) -> None:
    """Replace each member by its part: a copy, so that it is contiguous and the bucket can be freed."""
    start = 0
    for node in bucket:
        shape = list(node.meta["val"].shape)
        size = prod(shape[axis:])
        with graph.inserting_before(node):
            part = emit(graph, aten.slice.Tensor, whole, axis, start, start + size)
            part = emit(graph, aten.reshape.default, part, shape)
            part = emit(graph, aten.clone.default, part, memory_format=torch.contiguous_format)
        node.replace_all_uses_with(part)
        graph.erase_node(node)
        start += size
