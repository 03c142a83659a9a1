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
    for leaf in tree.leaves(value):
        if isinstance(leaf, Tensor):
            setattr(leaf, _MARK, where)


def check_donated(value: tree.Tree, what: str) -> None:
    """Raise `DonatedError` that lists every leaf that was donated before, and every buffer that stands twice."""
    problems, seen = [], {}
    for path, leaf in zip(tree.paths(value), tree.leaves(value), strict=True):
        where = getattr(leaf, _MARK, None)
        if where is not None:
            problems.append(f"{path} was donated to {where}: its buffer holds newer values now")
        if isinstance(leaf, Tensor) and leaf.numel() and leaf.device.type != "meta" and not _is_fake(leaf):
            twin = seen.setdefault(leaf.untyped_storage().data_ptr(), path)
            if twin != path and _overlap(leaf, value, twin):
                problems.append(f"{path} and {twin} share a buffer: a donated buffer stands once")
    if problems:
        fix = "use the state that the step returned, clone what you keep, or make the step with donate=False"
        raise DonatedError(
            report(what, problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else []), fix)
        )


def _overlap(leaf: Tensor, value: Any, twin: str) -> bool:
    """True if two leaves of one storage share bytes: parts of one flat buffer do not."""
    other = dict(zip(tree.paths(value), tree.leaves(value), strict=True))[twin]
    first, second = sorted(_range(x) for x in (leaf, other))
    return first[1] > second[0]


def _range(x: Tensor) -> tuple[int, int]:
    """First byte of its storage that a tensor uses, and the one after its last."""
    first = int(x.storage_offset())
    last = first + sum((int(n) - 1) * int(s) for n, s in zip(x.shape, x.stride(), strict=True))
    return first * x.element_size(), (last + 1) * x.element_size()


def _is_fake(x: Tensor) -> bool:
    return type(x) is not Tensor
