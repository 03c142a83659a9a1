"""The choice of a lowering for attention over a sharded sequence: ring, all-gather, all-to-all, or the last inside one.

Invariant: a choice depends on layouts, sizes and the user's word alone, so all ranks make the same. What cannot run as
fixed is an error, never another method.

Ring: Liu et al., 2023. All-to-all of heads for sequence: Jacobs et al., DeepSpeed Ulysses, 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from functitan.errors import LayoutError, report
from functitan.sharding.mesh import MeshSizes
from functitan.sharding.message import Label
from functitan.sharding.rules import Dims
from functitan.sharding.sequence import Sequence

LATENCY = 1 << 20  # bytes that one more collective is worth


class Method(NamedTuple):
    """The mesh dims of a sequence by how attention meets them: heads for sequence, a ring, or keys gathered."""

    exchange: Dims = ()
    ring: Dims = ()
    gather: Dims = ()


class Work(NamedTuple):
    """What a choice depends on. Heads and bytes are of one rank; `aligned`: kv heads are sharded as heads are."""

    dims: Dims
    heads: int
    kv_heads: int
    aligned: bool
    q_bytes: int
    kv_bytes: int  # of keys, and of values
    once: bool  # no more than a first reverse derivative is needed


def choose(work: Work, hops: dict[Dims, int], sequence: Sequence, mesh: MeshSizes, label: Label) -> Method:
    """The method fixed by `sequence`, or the cheapest: bytes sent in forward, and 1 MiB for each collective.

    The bytes of a ring count half, because they travel while it computes; `hops` says how many messages it takes over
    the dims left of an exchange. All-to-all takes heads that its ranks divide, and the last mesh dims of the sequence.
    Raises `LayoutError` for a fixed method that cannot run.
    """
    fixed = {dim: dict(sequence.methods).get(dim, sequence.method) for dim in work.dims}
    if None not in fixed.values():
        return _fixed(fixed, work, mesh, label)  # type: ignore[arg-type]
    options = [_cost(option, work, hops, mesh) for option in _options(work, mesh) if _agrees(option, fixed)]
    if not options:
        raise LayoutError(report(_what(label), _problems(fixed, work, mesh), _FIX))
    return min(options, key=lambda found: found[0])[1]


def _fixed(fixed: dict[str, str], work: Work, mesh: MeshSizes, label: Label) -> Method:
    exchange, ring, gather = (
        tuple(dim for dim in work.dims if fixed[dim] == kind) for kind in ("all_to_all", "ring", "all_gather")
    )
    if problems := _problems(fixed, work, mesh):
        raise LayoutError(report(_what(label), problems, _FIX))
    return Method(exchange, ring, gather)


def _problems(fixed: Mapping[str, str | None], work: Work, mesh: MeshSizes) -> list[str]:
    kinds = set(fixed.values())
    exchange = tuple(dim for dim in work.dims if fixed[dim] == "all_to_all")
    n, problems = mesh.size(exchange), []
    if {"ring", "all_gather"} <= kinds:
        problems.append(f"{fixed}: a ring and an all-gather do not stand beside each other")
    if exchange and not work.aligned:
        problems.append(f"all_to_all over {exchange}: kv heads are not sharded over the mesh dims of heads")
    for name, heads in (("heads", work.heads), ("kv heads", work.kv_heads)):
        if heads % n:
            problems.append(f"all_to_all over {exchange}: {heads} {name} on each rank are not divisible by {n}")
    if "ring" in kinds and not work.once:
        problems.append("ring: it has one reverse derivative, and nested transforms or forward mode ask for more")
    return problems


def _options(work: Work, mesh: MeshSizes) -> list[Method]:
    found = []
    for at in range(len(work.dims), -1, -1):  # fewer exchanged first
        rest, exchange = work.dims[:at], work.dims[at:]
        n = mesh.size(exchange)
        if exchange and (not work.aligned or work.heads % n or work.kv_heads % n):
            continue
        found.append(Method(exchange, (), rest))
        if rest and work.once:
            found.append(Method(exchange, rest, ()))
    return found


def _agrees(option: Method, fixed: dict[str, str | None]) -> bool:
    kinds = {"all_to_all": option.exchange, "ring": option.ring, "all_gather": option.gather}
    return all(kind is None or dim in kinds[kind] for dim, kind in fixed.items())


def _cost(option: Method, work: Work, hops: dict[Dims, int], mesh: MeshSizes) -> tuple[float, Method]:
    cost = 0.0
    if option.exchange:
        n = mesh.size(option.exchange)
        cost += 2 * (n - 1) * (work.q_bytes + work.kv_bytes) / n + 4 * LATENCY
    if option.gather:
        cost += 2 * (mesh.size(option.gather) - 1) * work.kv_bytes + 2 * LATENCY
    if option.ring:
        cost += hops[option.ring] * (work.kv_bytes + LATENCY)
    return cost, option


def _what(label: Label) -> str:
    return f"attention({label.pattern!r}): the method of ft.context_parallel"


_FIX = (
    "choose method='ring', 'all_gather', 'all_to_all' (ranks divide heads and kv heads), one for each mesh dim of the "
    "sequence, as in {'cp': 'ring'}, or none: the cheapest that can run"
)
