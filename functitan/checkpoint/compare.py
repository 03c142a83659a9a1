"""What a save keeps once is equal on every rank that has it: ranks compare before anything is written.

Invariant: every rank of the mesh calls, sends messages of the same sizes, and finds the same: all go on, or all raise
one error. Where all are equal, a rank sends a few numbers for each mesh dim, however many leaves there are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from functitan.axes import write_axes
from functitan.checkpoint.leaves import Leaf, described
from functitan.errors import CheckpointError, report
from functitan.param import Param
from functitan.reading import parsed_json
from functitan.sharding.context import current
from functitan.sharding.mesh import Mesh
from functitan.sharding.message import Label
from functitan.sharding.steps import send
from functitan.transforms.checked import CHUNK, signs_of, sums_of

Digest = tuple[int, int]


class Row(NamedTuple):
    """What ranks tell each other of a leaf along one mesh dim. Along a dim that shards it, `digest` is `None`."""

    path: str
    kind: str
    pattern: str | None
    owner: int  # the place along `pp` whose ranks write it
    digest: Sequence[int] | None  # of all bits
    sums: Sequence[float] | None = None  # of numbers that may differ by rounding, and what they may differ by


class Difference(NamedTuple):
    """What is wrong with a leaf, and two ranks that show it; `fix` is a key of `_FIXES`."""

    path: str
    problem: str
    fix: str
    dim: str
    ranks: Sequence[int]


def check_replicas(what: str, leaves: Sequence[Leaf], mesh: Mesh, device: torch.device) -> None:
    """Raise `CheckpointError` on every rank unless each leaf is equal along the mesh dims that do not shard it.

    The list of leaves, their shapes and dtypes are compared too, in each pipeline stage; leaves of each rank's own are
    not. Numbers without a pattern are equal bit for bit, and so are whole numbers. Floating-point numbers that ranks
    repeat by their pattern may differ as in `ft.check_equal`: kernels of an accelerator that add in no fixed order give
    the copies other last bits.
    """
    dims = tuple(dim for dim, n in mesh.shape.items() if n > 1)
    if not dims:
        return
    shared = [leaf for leaf in leaves if not leaf.own]
    compared = [leaf for leaf in shared if any(_is_equal(leaf, dim) for dim in dims)]
    digests = dict(zip((leaf.path for leaf in compared), _digests([leaf.value for leaf in compared]), strict=True))
    texts = {dim: json.dumps(_rows(shared, digests, dim)) for dim in dims}
    differ = _parted(texts, mesh, device)
    if not any(differ):
        return
    found: list[Difference] = []
    for dim, is_other in zip(dims, differ, strict=True):
        if is_other:
            text = json.dumps(_rows(shared, digests, dim, rounded=True))
            ranks = [[Row(*row) for row in each] for each in gathered(text, (dim,), mesh, device)]
            found += _differences(ranks, dim, mesh)
    all_found = gathered(json.dumps(found), dims, mesh, device)
    _raise(what, [Difference(*each) for one in all_found for each in one], dims)


def gathered(text: str, dims: tuple[str, ...], mesh: Mesh, device: torch.device) -> list[Any]:
    """What each rank along mesh dims says as JSON, in their order."""
    data = text.encode()
    longest = int(largest(torch.tensor(len(data), device=device), dims, mesh).item())
    own = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8).to(device)
    rows = send("all_gather", own, dims, current()._replace(mesh=mesh), _SAVE).cpu()
    return [parsed_json(row.numpy().tobytes()) for row in rows]


def largest(x: Tensor, dims: tuple[str, ...], mesh: Mesh, what: str = "checkpoint.save") -> Tensor:
    """The maximum of each number of `x` over the ranks along mesh dims."""
    return send("all_reduce", x, dims, current()._replace(mesh=mesh), Label(what, ""), "max")


def _is_equal(leaf: Leaf, dim: str) -> bool:
    """True if ranks that differ in their place along `dim` alone have the same of a leaf, or of a part of it."""
    if dim == "pp":  # stages have other leaves, but for those that they share
        return not isinstance(leaf.pattern, Param) or leaf.pattern.pp is None or len(leaf.pattern.pp) > 1
    return leaf.layout is None or not any(dim in dims for dims in leaf.layout.dims)


def _rows(leaves: list[Leaf], digests: dict[str, Digest], dim: str, rounded: bool = False) -> list[Row]:
    rows = []
    for leaf in leaves:
        equal = _is_equal(leaf, dim)
        if equal or dim != "pp":
            pattern = None if leaf.layout is None else write_axes(leaf.layout.axes)
            sums = _sums(leaf.value) if rounded and equal and pattern is not None else None
            kind = described(leaf.shape, leaf.dtype)
            rows.append(Row(leaf.path, kind, pattern, leaf.owner, digests[leaf.path] if equal else None, sums))
    return rows


def _parted(texts: dict[str, str], mesh: Mesh, device: torch.device) -> list[bool]:
    """For each mesh dim, whether texts differ between ranks along it: anywhere, and so the same on every rank."""
    differ = []
    for dim, text in texts.items():
        own = torch.tensor(_mark(text), device=device)
        most = largest(torch.cat([own, ~own]), (dim,), mesh)
        differ.append((most[:2] != ~most[2:]).any())
    flags = torch.stack(differ).to(torch.int32)
    return largest(flags, tuple(texts), mesh).bool().tolist()


def _differences(ranks: list[list[Row]], dim: str, mesh: Mesh) -> Iterator[Difference]:
    """What the ranks along one mesh dim do not have alike: each is held against the first, or the stage that writes."""
    known = [{row.path: row for row in rows} for rows in ranks]
    stride = math.prod(mesh.sizes.sizes[mesh.sizes.dims.index(dim) + 1 :])
    first_rank = mesh.rank - mesh.index((dim,)) * stride
    for place, rows in enumerate(known):
        for path in dict.fromkeys((*(known[0] if dim != "pp" else ()), *rows)):
            mine = rows.get(path)
            first = mine.owner if mine is not None and dim == "pp" else 0
            if problem := _compared(known[first].get(path), mine, dim):
                yield Difference(path, *problem, dim, [first_rank + first * stride, first_rank + place * stride])


def _compared(one: Row | None, other: Row | None, dim: str) -> tuple[str, str] | None:
    """What is wrong with two ranks' rows of a leaf, and the fix."""
    row = one or other
    assert row is not None
    if one is None and dim == "pp":
        return "is not on the stage whose ranks write it", "stage"
    if one is None or other is None:
        return "is not on every rank", "tree"
    if (one.kind, one.pattern) != (other.kind, other.pattern):
        return f"is {_text(one)} and {_text(other)}", "tree"
    if one.digest == other.digest or _is_close(one, other):
        return None
    return f"({_text(row)}) differs", "undeclared" if row.pattern is None else "declared"


def _text(row: Row) -> str:
    return f"{row.kind}, {'no pattern' if row.pattern is None else repr(row.pattern)}"


def _raise(what: str, found: list[Difference], dims: tuple[str, ...]) -> None:
    """Raise for all that was found on any rank, each leaf on a line."""
    by_line: dict[tuple[str, str], list[Difference]] = {}
    for each in sorted(found, key=lambda each: (max(each.ranks), min(each.ranks))):
        by_line.setdefault((each.path, each.problem), []).append(each)
    problems = []
    for (path, problem), each in by_line.items():
        along = " and ".join(dim for dim in dims if any(one.dim == dim for one in each))
        low, high = sorted(each[0].ranks)
        problems.append(f"{path or 'the value'} {problem}: ranks {low} and {high}, along {along}")
    if problems:
        fixes = [fix for name, fix in _FIXES.items() if any(each.fix == name for each in found)]
        raise CheckpointError(report(what, problems, "; ".join(fixes)))


def _mark(text: str) -> Digest:
    data = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(data[:8], signed=True), int.from_bytes(data[8:], signed=True)


def _digests(values: list[Any]) -> list[Digest]:
    """Of each leaf 128 bits that depend on all of its bits, and of a scalar on its type, in one pass."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (2, _WORDS), generator=generator)
    there: dict[torch.device, Tensor] = {}
    found: list[Any] = [None] * len(values)
    by_device: dict[torch.device, list[int]] = {}
    for number, value in enumerate(values):
        if isinstance(value, Tensor):
            known = there.setdefault(value.device, factors.to(value.device))
            found[number] = _digest(value.detach(), known)
            by_device.setdefault(value.device, []).append(number)
        else:
            found[number] = _mark(f"{type(value).__name__} {value!a}")
    for numbers in by_device.values():  # one wait for each device
        for number, digest in zip(numbers, torch.stack([found[n] for n in numbers]).tolist(), strict=True):
            found[number] = tuple(digest)
    return found


def _digest(x: Tensor, factors: Tensor) -> Tensor:
    """Two sums of the words of 32 bits, each times a random number of 64 bits, modulo 2^64: `[2]`, int64.

    Two values that differ have one sum with probability 2^-33 at most: Lemire and Kaser, Strongly universal string
    hashing is fast, 2014.
    """
    data = x.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 4:
        data = data.clone()
    total = factors.new_zeros(2)
    for chunk in data.split(4 * _WORDS):
        words = pad(chunk, (0, -len(chunk) % 4)).view(torch.int32) if len(chunk) % 4 else chunk.view(torch.int32)
        total = total * _TURN + (factors[:, : len(words)] * words).sum(1)
    return total


def _sums(x: Any) -> list[float] | None:
    """What `ft.check_equal` compares of floating-point numbers, and how far rounding may part them."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return None
    digest = sums_of(x, signs_of(2 * min(CHUNK, x.numel())).to(x.device)).tolist()
    eps = torch.finfo(x.dtype).eps
    return [*digest, (math.sqrt(eps) + eps) * digest[2]]


def _is_close(one: Row, other: Row) -> bool:
    if one.sums is None or other.sums is None:
        return False
    *mine, near = one.sums
    *theirs, far = other.sums
    return mine[3] == theirs[3] and all(abs(a - b) <= max(near, far) for a, b in zip(mine[:2], theirs[:2], strict=True))


_WORDS = 1 << 17  # words that are read at once
_TURN = 6364136223846793005  # odd; between two chunks, so that they have an order
_SAVE = Label("checkpoint.save", "")
_FIXES = {
    "undeclared": "give the pattern of what is a shard, patterns={'ema': declarations}; or say that each rank has a "
    "value of its own: patterns={'ema': ft.checkpoint.per_rank}",
    "declared": "what a pattern does not shard is equal on all ranks: start them from one key, and give the rules that "
    "the leaf lies under",
    "tree": "give every rank a tree of the same leaves; what each has of its own is said by "
    "patterns={'loader': ft.checkpoint.per_rank}",
    "stage": "a leaf of one stage is declared by ft.pipeline.declarations, or is each rank's own: "
    "patterns={'loader': ft.checkpoint.per_rank}",
}
