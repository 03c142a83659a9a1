"""A permute's way: each rank of a group passes a tensor on, some places up, to every rank or to some.

Invariant: who sends and who receives follows from numbers alone, so each rank knows it of all.
"""

from __future__ import annotations

from typing import NamedTuple


class Passing(NamedTuple):
    """Rank r gets the tensor of rank r - `shift`, around the group; a rank that is not one of `to` gets zeros.

    >>> str(Passing(1)), str(Passing(1, (2, 3))), read_passing("1 to 2 3").splits(4, 2)
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


def read_passing(text: str) -> Passing:
    """The value that `str` wrote."""
    shift, *to = text.split()
    return Passing(int(shift), tuple(map(int, to[1:])) if to else None)
