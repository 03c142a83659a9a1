"""Policies of `ft.remat`: which results of named ops are stored in forward, so that backward need not compute them.

Invariant: a policy is a pure function of a `Made`, which says what an op gave without its values; so every rank and
every run decides alike. What no policy stores is computed again: plain torch ops always are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from functitan.errors import FunctitanError, nearest, report
from functitan.ops.contraction import Static
from functitan.ops.function import Call
from functitan.remat.memo import NAME
from functitan.sharding.env import Env


class Made(NamedTuple):
    """What a policy is asked about: the results of one call of a named op, on this rank."""

    place: int  # in the order of the function's calls
    op: str  # "einsum", "take", ...
    pattern: str
    name: str | None  # that `ft.checkpoint_name` gave
    is_dot: bool  # a product of several tensors that sums over some axis: a matmul
    flops: int  # that a dot takes
    sent: int  # bytes of its collectives; known only in the dry run of `budget`
    bytes: int  # of the results


Policy = Callable[[Made], bool]


def nothing_saveable(made: Made) -> bool:
    """Store nothing but the function's arguments: the least memory."""
    return False


def everything_saveable(made: Made) -> bool:
    """Store everything that backward reads, as if there were no remat."""
    return True


def dots_saveable(made: Made) -> bool:
    """Store the results of matmuls, after their collectives; compute the rest again."""
    return made.is_dot


class Names(NamedTuple):
    """Store what has one of these names."""

    names: tuple[str, ...]

    def __call__(self, made: Made) -> bool:
        return made.name in self.names


class Budget(NamedTuple):
    """Store at most `bytes`; `choose` says what, once all calls are known."""

    bytes: int
    flops_per_byte: float

    def choose(self, calls: Sequence[Made]) -> frozenset[int]:
        """The places of the calls to store, whose bytes are at most the budget: best ratio first."""
        worth = {made.place: made.flops + self.flops_per_byte * made.sent for made in calls}
        left, chosen = self.bytes, set()
        for made in sorted(calls, key=lambda made: -worth[made.place] / max(1, made.bytes)):
            if worth[made.place] > 0 and made.bytes <= left:
                chosen.add(made.place)
                left -= made.bytes
        return frozenset(chosen)


def save_only_these_names(*names: str) -> Names:
    """Store what `ft.checkpoint_name` gave one of these names; a name that nothing has is an error.

    >>> save_only_these_names("attn_out", "mlp_out").names
    ('attn_out', 'mlp_out')
    """
    if not names or not all(isinstance(name, str) for name in names):
        fix = "give texts: save_only_these_names('attn_out', 'mlp_out')"
        raise FunctitanError(report("save_only_these_names", [f"the names are {names}"], fix))
    return Names(names)


def budget(bytes: int, *, flops_per_byte: float = 1000.0) -> Budget:
    """Store at most `bytes` of results in each call: those that spare the most work per byte stored.

    Work is a dot's operations, and `flops_per_byte` for each byte that the op's collectives send: what the machine
    computes while it sends one. Chosen by a dry run on fake tensors at the first call with new shapes. Bytes are of
    one rank and one call: for n rematerialized layers give each the n-th part.

    >>> budget(2**20)
    Budget(bytes=1048576, flops_per_byte=1000.0)
    """
    if isinstance(bytes, bool) or not isinstance(bytes, int) or bytes < 0:
        problem = f"bytes is {bytes!r}, not an int of at least 0"
        raise FunctitanError(report("budget", [problem], "give what one call may store: budget(64 * 2**20)"))
    return Budget(bytes, flops_per_byte)


def made(place: int, call: Call, results: tuple[Tensor, ...]) -> Made:
    """What a policy is told of a call."""
    size = sum(x.numel() * x.element_size() for x in results)
    if call.op.name == NAME:
        return Made(place, NAME, "", call.static, False, 0, 0, size)
    flops = _flops(call.static, call.env) if isinstance(call.static, Static) else 0
    label = getattr(call.static, "label", None)
    op, pattern = (call.op.name, "") if label is None else label
    return Made(place, op, pattern, None, flops > 0, flops, 0, size)


def check_names(names: Sequence[str], given: set[str | None], where: str) -> None:
    """Raise `FunctitanError` for names that no `ft.checkpoint_name` of the function gave."""
    seen = {name for name in given if name is not None}
    problems = [
        f"nothing in it has the checkpoint_name {name!r}{nearest(name, seen)}" for name in names if name not in seen
    ]
    if problems:
        fix = f"its names are {sorted(seen)}" if seen else "name a tensor in it: x = ft.checkpoint_name(x, 'attn_out')"
        raise FunctitanError(report(where, problems, fix))


def check_policy(policy: object, where: str) -> None:
    """Raise `FunctitanError` for what is no policy."""
    if policy in (save_only_these_names, budget):
        problem = f"policy is {policy.__name__} itself"  # type: ignore[union-attr]
        raise FunctitanError(report(where, [problem], "call it: save_only_these_names('attn_out'), budget(64 * 2**20)"))
    if not callable(policy) and not isinstance(policy, Budget):
        known = [f.__name__ for f in (nothing_saveable, everything_saveable, dots_saveable)]
        fix = (
            f"take one of ft.remat_policies: {', '.join(known)}, save_only_these_names('attn_out'), budget(64 * 2**20)"
        )
        close = nearest(policy, known) if isinstance(policy, str) else ""
        raise FunctitanError(report(where, [f"policy is {policy!r}{close}"], fix))


def _flops(static: Static, env: Env) -> int:
    """Of the products that contract something with several operands, on one rank; 0 where there are none."""
    assert env.mesh is not None
    total, sizes = 0, dict(static.full.sizes)
    for term in static.full.terms:
        axes = {axis: static.full.operands[i].of(axis) for i in term.operands for axis in static.full.operands[i].axes}
        result = static.full.results[term.result]
        if len(term.operands) > 1 and set(axes) - set(result.axes):
            over = {dim for dims in (*axes.values(), *result.dims) for dim in dims}
            total += 2 * math.prod(sizes[axis] for axis in axes) // env.mesh.sizes.size(tuple(over))
    return total
