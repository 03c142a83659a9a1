"""Donation: a value whose buffers its consumer may overwrite, and a clear error for who uses it again.

Invariant: a donated tensor's storage is never resized or freed; the tensor object is marked, and functitan's entry
points refuse marked tensors. The new value holds other tensor objects over the same buffers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from functitan import tree
from functitan.errors import DonatedError, report

_MARK = "_functitan_donated"


def mark_donated(value: tree.Tree, where: str) -> None:
    """Mark every tensor of a tree as donated to `where`; its buffers live on in the value that took them over.

    >>> import torch
    >>> old = {"w": torch.zeros(2)}
    >>> mark_donated(old, "step 3")
    >>> check_donated(old, "the state")
    Traceback (most recent call last):
    ...
    functitan.errors.DonatedError: the state:
      - w was donated to step 3: its buffer holds newer values now
      Fix: use the state that the step returned, clone what you keep, or make the step with donate=False
    """
    mark_leaves([leaf for leaf in tree.leaves(value) if isinstance(leaf, Tensor)], where)


def mark_leaves(leaves: list[Tensor], where: str) -> None:
    """Mark tensors as donated to `where`."""
    for leaf in leaves:
        setattr(leaf, _MARK, where)


def check_donated(value: tree.Tree, what: str, kept: tuple[int, ...] = (), leaves: list[Any] | None = None) -> None:
    """Raise `DonatedError` that lists every leaf that was donated before, and every donated buffer that stands twice.

    `kept` are the numbers of the entries of `value`, a tuple, that are not donated; `leaves` its leaves, where they
    are known. A good value costs 0.2 us a leaf.
    """
    leaves = tree.leaves(value) if leaves is None else leaves
    if _plainly_good(leaves):
        return
    paths = tree.paths(value)
    owners = [path.split(".")[0] for path in paths]
    free = {i for i, owner in enumerate(owners) if owner not in map(str, kept)}
    problems, seen = [], {}
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        where = getattr(leaf, _MARK, None)
        if where is not None:
            problems.append(f"{path} was donated to {where}: its buffer holds newer values now")
        if type(leaf) is Tensor and leaf.numel() and leaf.device.type != "meta":
            for twin in seen.setdefault(leaf.untyped_storage()._cdata, []):
                if (i in free or twin in free) and _overlap(leaf, leaves[twin]):
                    problems.append(f"{path} and {paths[twin]} share a buffer: a donated buffer stands once")
            seen[leaf.untyped_storage()._cdata].append(i)
    if problems:
        fix = "use the state that the step returned, clone what you keep, or make the step with donate=False"
        raise DonatedError(
            report(what, problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else []), fix)
        )


def _plainly_good(leaves: list[Any]) -> bool:
    """True where nothing is marked and every storage is another."""
    tensors = [x for x in leaves if type(x) is Tensor]
    if any(_MARK in x.__dict__ for x in tensors):
        return False
    return len({x.untyped_storage()._cdata for x in tensors}) == len(tensors) == len(leaves)


def _overlap(x: Tensor, y: Tensor) -> bool:
    """True if two leaves of one storage share bytes: parts of one flat buffer do not."""
    first, second = sorted((_range(x), _range(y)))
    return first[1] > second[0]


def _range(x: Tensor) -> tuple[int, int]:
    """First byte of its storage that a tensor uses, and the one after its last."""
    first = int(x.storage_offset())
    last = first + sum((int(n) - 1) * int(s) for n, s in zip(x.shape, x.stride(), strict=True))
    return first * x.element_size(), (last + 1) * x.element_size()
