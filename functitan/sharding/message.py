"""`Message`: one collective, or one tensor sent to another pipeline stage, as a value.

Invariant: whoever handles a message (a transport, a ledger, ranks that compare programs, a captured graph, an error)
holds this one value, and none of them keeps a form of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from functitan.sharding.rules import Dims

FORMULAS = {  # bytes sent by one rank, from the bytes of its tensor and the number of ranks
    "all_gather": lambda nbytes, n: (n - 1) * nbytes,
    "reduce_scatter": lambda nbytes, n: (n - 1) * nbytes // n,
    "all_reduce": lambda nbytes, n: 2 * (n - 1) * nbytes // n,
    "all_to_all": lambda nbytes, n: (n - 1) * nbytes // n,
    "permute": lambda nbytes, n: nbytes if n > 1 else 0,
    "send": lambda nbytes, n: nbytes,
    "receive": lambda nbytes, n: 0,
}

_BETWEEN_STAGES = ("send", "receive")


class Label(NamedTuple):
    """Which op asks for a message, and in which pattern."""

    op: str
    pattern: str


class Passing(NamedTuple):
    """How a permute passes tensors on: rank r gets that of rank r - `shift`; a rank not in `to` gets zeros.

    Who sends and who receives follows from numbers alone, so each rank knows it of all.

    >>> str(Passing(1)), str(Passing(1, (2, 3))), Passing(1, (2, 3)).splits(4, 2)
    ('1', '1 to 2 3', ([0, 1, 0, 0], [0, 0, 0, 1]))
    """

    shift: int
    to: tuple[int, ...] | None = None  # all ranks

    def __str__(self) -> str:
        return " ".join(map(str, (self.shift, *(() if self.to is None else ("to", *self.to)))))

    def reaches(self, rank: int) -> bool:
        """Whether a rank gets a tensor."""
        return self.to is None or rank in self.to

    def sends(self, n: int, me: int) -> bool:
        """Whether rank `me` of `n` sends its tensor."""
        return self.reaches((me + self.shift) % n)

    def splits(self, n: int, me: int) -> tuple[list[int], list[int]]:
        """How many tensors rank `me` of `n` gets from each rank, and how many it sends to each."""
        receive, send = [0] * n, [0] * n
        receive[(me - self.shift) % n] = int(self.reaches(me))
        send[(me + self.shift) % n] = int(self.sends(n, me))
        return receive, send


class Message(NamedTuple):
    """A collective of a group of ranks, and what asks for it. A ledger's entries are messages.

    `collective` is "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute"; or "send" to another pipeline
    stage, where it is "receive". The group has `ranks` ranks, over `mesh_dims`; `shape` and `dtype` are those of the
    tensor that each gives. `how` is the reduction, "sum" or "max", or a permute's `Passing`.
    """

    collective: str
    mesh_dims: Dims
    ranks: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    how: str | Passing = ""
    op: str = ""
    pattern: str = ""
    phase: str = "forward"  # or "backward", "update"
    recomputed: bool = False
    hidden: bool = False  # computation that does not wait for it runs while it travels

    @property
    def bytes(self) -> int:
        """The bytes that one rank sends.

        >>> Message("all_gather", ("fsdp",), 4, (2, 3), torch.float32).bytes
        72
        """
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return FORMULAS[self.collective](size, self.ranks)

    @property
    def request(self) -> tuple:
        """What ranks that meet in a message have alike."""
        return self[1:8] if self.collective in _BETWEEN_STAGES else self[:8]

    def __str__(self) -> str:
        """
        >>> print(Message("all_gather", ("dp", "fsdp"), 4, (2, 3), torch.float32, "", "unshard", "batch embed"))
        all_gather over dp·fsdp of float32[2, 3] for 'unshard' 'batch embed'
        """
        return self._text("message" if self.collective in _BETWEEN_STAGES else self.collective)

    @property
    def detailed(self) -> str:
        """The text, with the reduction or the way of a permute: what ranks that compare programs compare."""
        return self._text(f"{self.collective}-{self.how}" if self.how else self.collective)

    def _text(self, what: str) -> str:
        of = f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"
        return f"{what} over {'·'.join(self.mesh_dims)} of {of} for {self.op!r} {self.pattern!r}"

    @property
    def name(self) -> str:
        """The name of the message in a trace of `ft.profile`; of a hidden one, that of its start.

        >>> Message("all_gather", ("fsdp",), 2, (1,), torch.float32, "", "einsum", "a b, b c -> a c", "backward").name
        'all_gather[fsdp] einsum a b, b c -> a c (backward)'
        """
        what = f"{self.collective}[{','.join(self.mesh_dims)}]" + (" hidden" if self.hidden else "")
        return f"{what} {span_name(self.op, self.pattern, self.phase, self.recomputed)}"

    @property
    def wait(self) -> str:
        """The name of the wait for a hidden message in a trace: the part of it that is exposed.

        >>> Message("permute", ("tp",), 2, (1,), torch.float32, Passing(1), "einsum", "a b, b c -> a c").wait
        'wait for permute over tp, einsum a b, b c -> a c'
        """
        over = ",".join(self.mesh_dims)
        return f"wait for {self.collective} over {over}, " + span_name(
            self.op, self.pattern, self.phase, self.recomputed
        )


def span_name(op: str, pattern: str, phase: str, recomputed: bool) -> str:
    """The name of an op in a trace, in plain ASCII, which is all that torch writes."""
    where = ("" if phase == "forward" else f" ({phase})") + (" again" if recomputed else "")
    return f"{op} {pattern}".strip().encode("ascii", "replace").decode() + where
