"""What hides keys from queries: causality, a window, segments, and a mask function in FlexAttention's form.

Invariant: a mask is worked out for one tile at a time, from global positions, heads and examples, so it does not depend
on how the sequence is sharded. A mask function is pure: what its result depends on are its four indices alone.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functitan.errors import PatternError, report
from functitan.ops.function import peeled
from functitan.sharding.message import Label
from functitan.sharding.sequence import Runs, positions_of


class Rule(NamedTuple):
    """What hides keys by place, the same in every call: `mask(b, h, q_idx, kv_idx)` is true where a key is seen."""

    causal: bool = False
    window: int | None = None
    mask: Callable[..., Tensor] | None = None


class Marks(NamedTuple):
    """What tokens of queries or of keys bring with them, [*batch, seq]: places of their own, and their segments."""

    positions: Tensor | None
    segments: Tensor | None


class Side(NamedTuple):
    """The rows or the columns of a tile: positions, [n] or [B, n], and segments [B, n]."""

    positions: Tensor
    segments: Tensor | None

    def cut(self, begin: int, end: int) -> Side:
        return Side(*(None if x is None else x[..., begin:end] for x in self))  # type: ignore[arg-type]


class Numbers(NamedTuple):
    """Which examples and heads of all are here: (global size, first, size) of each batch axis, and the first head."""

    batch: tuple[tuple[int, int, int], ...]
    first_head: int

    def examples(self, count: int, device: torch.device) -> Tensor:
        """The numbers of `count` examples: row-major over batch axes, again for each position of hidden axes."""
        total = torch.zeros(1, dtype=torch.int64, device=device)
        for whole, first, size in self.batch:
            total = (total.unsqueeze(-1) * whole + torch.arange(first, first + size, device=device)).flatten()
        return total.repeat(count // total.numel())


def seen(rule: Rule, rows: Side, columns: Side, numbers: Numbers, q: Tensor) -> Tensor | None:
    """Which keys the queries [*batch, rows, heads, D] see, bool [B or 1, heads or 1, rows, columns]; `None`: all."""
    at, key_at = _upright(rows.positions, 3), _upright(columns.positions, 2)
    found: list[Tensor] = []
    if rule.causal:
        found.append(at >= key_at)
    if rule.window is not None:
        found.append(at - key_at < rule.window)
        if not rule.causal:
            found.append(key_at - at < rule.window)
    if rows.segments is not None and columns.segments is not None:
        found.append(_upright(rows.segments, 3) == _upright(columns.segments, 2))
    if rule.mask is not None:
        found.append(rule.mask(*_of_function(numbers, q, at, key_at)))
    if not found:
        return None
    total = reduce(torch.logical_and, found)
    return total.expand(*total.shape[:2], at.shape[-2], key_at.shape[-1])


def documents(positions: Tensor, held: Runs) -> Tensor:
    """The document of each token, by number: one begins where positions do not ascend. All slots are here, `held`.

    >>> from functitan.sharding.sequence import Run
    >>> documents(torch.tensor([0, 1, 4, 0, 1, 1]), (Run(0, 6),))
    tensor([0, 0, 0, 1, 1, 2])
    """
    places = positions_of(held, positions.device)
    given = positions[..., places.argsort()] if len(held) > 1 else positions
    begins = given[..., 1:] <= given[..., :-1]
    numbers = torch.nn.functional.pad(begins.long(), (1, 0)).cumsum(-1)
    return numbers[..., places] if len(held) > 1 else numbers


def check_rule(rule: Rule, label: Label, numbers: Numbers, rows: Runs, q: Tensor) -> None:
    """Raise `PatternError` for a mask function that is none, or is visibly not pure: it is tried twice, on few indices.

    Values of fake tensors cannot be read, and are left unchecked.
    """
    if rule.mask is None:
        return
    mask, problems = rule.mask, [f"it assigns to {name!r}, which is not its own" for name in _written(rule.mask)]
    at = positions_of(rows, q.device)[:4]
    own = [x[:2, :2] for x in _of_function(numbers, q, _upright(at, 3), _upright(at, 2))]
    given = [x.clone() for x in own]
    real = type(peeled(given[2])) is Tensor
    try:
        with _Watch() as watch:
            results = [mask(*given) for _ in range(2)]
    except (RuntimeError, TypeError, IndexError) as error:
        text = (str(error).splitlines() or [""])[0]
        problems.append(f"called with tensors of indices it fails: {type(error).__name__}: {text}")
        raise PatternError(report(_what(label), problems, _FIX)) from error
    bad = [y for y in results if not isinstance(y, Tensor) or y.dtype != torch.bool]
    problems += [f"it gave {_described(bad[0])}, where a tensor of bool is wanted"] if bad else []
    problems += sorted(watch.found)
    if real and not all(map(torch.equal, own, given)):
        problems.append("it writes into its indices")
    if real and not problems and type(results[0]) is Tensor and not torch.equal(*results):
        problems.append("called twice with the same indices it gave different results")
    if problems:
        raise PatternError(report(_what(label), problems, _FIX))


class _Watch(TorchDispatchMode):
    """What a mask function does besides elementwise work, on this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.found.add("it draws random numbers")
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found.add("it reads the value of a tensor, by .item() or an if")
        return func(*args, **(kwargs or {}))


def _of_function(numbers: Numbers, q: Tensor, at: Tensor, key_at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The indices that a mask function is given, each along an axis of its own."""
    batch, heads = q.shape[:-3].numel(), q.shape[-2]
    h = torch.arange(numbers.first_head, numbers.first_head + heads, device=q.device)
    return numbers.examples(batch, q.device).view(-1, 1, 1, 1), h.view(1, -1, 1, 1), at, key_at


def _upright(x: Tensor, axis: int) -> Tensor:
    """[n] or [B, n] as [B or 1, 1, n, 1] (axis 3) or [B or 1, 1, 1, n] (axis 2)."""
    return x.view(-1, x.shape[-1]).unsqueeze(1).unsqueeze(axis)


def _written(mask: Any) -> list[str]:
    """The names outside the function that its own code assigns to."""
    code = getattr(mask, "__code__", None)
    if code is None:
        return []
    writes = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF")
    outside = [op for op in dis.get_instructions(code) if op.opname in writes]
    return sorted({str(op.argval) for op in outside if "GLOBAL" in op.opname or op.argval in code.co_freevars})


def _described(y: Any) -> str:
    return f"a tensor of {str(y.dtype).removeprefix('torch.')}" if isinstance(y, Tensor) else f"a {type(y).__name__}"


def _what(label: Label) -> str:
    return f"attention({label.pattern!r}): mask="


_FIX = (
    "write a pure function of four index tensors, elementwise, that gives a bool: "
    "mask=lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < 128)"
)
