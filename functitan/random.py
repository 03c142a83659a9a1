"""`ft.random`: keys, and numbers drawn by the global index of each element.

Invariant: on every mesh a rank's shard is bitwise the slice of what one process draws. A key and an index give a value
(`functitan.threefry`); no generator has a state, and nothing is sent.

Every draw takes `shape`, the *global* shape, or `like`, a tensor of this rank. With `pattern` the result is this rank's
shard in the layout of the pattern, in the order that `ft.context_parallel` gives its tokens; without a mesh it is the
whole. `like`, which needs `pattern`, gives the global shape of which it is a shard, and the device; to `normal` and
`uniform` also the dtype. The result has the axes that an `ft.vmap` hides in `like` or in the key: along those of the
key numbers differ, along the others they are equal. `block`, one `slice(start, stop)` for each axis, asks for that part
of the global tensor instead. `device` is by default that of `like`, or the key's.

On a mesh a draw with neither `pattern` nor `block` raises `FunctitanError`: every rank would draw the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from functitan import threefry
from functitan.axes import Axes, parse_axes
from functitan.errors import FunctitanError, report
from functitan.ops.function import Hiddens, hidden_axes, hide
from functitan.ops.operands import Operand, check_operands
from functitan.ops.remembered import made
from functitan.ops.types import Type, layout_here
from functitan.sharding.context import current
from functitan.sharding.env import Env
from functitan.sharding.layout import Layout, block_of, check_leaves, check_rank, global_shape
from functitan.threefry import fold_in, key, split

__all__ = ["bernoulli", "bits", "fold_in", "key", "normal", "randint", "split", "uniform"]

Shape = Sequence[int] | None
Block = Sequence[slice] | None
Device = torch.device | str | None


class Place(NamedTuple):
    """Where numbers lie: the global shape, the blocks of it that this rank has side by side, and hidden axes."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    along: int = 0  # the dimension in which blocks lie side by side
    hidden: Hiddens = ()


def bits(
    key: Tensor,
    shape: Shape = None,
    *,
    pattern: str | None = None,
    like: Tensor | None = None,
    block: Block = None,
    device: Device = None,
) -> Tensor:
    """Uniform integers in [0, 2**32), int64.

    `key` is int64 (2,); the others are as the module says. Raises `FunctitanError` for a bad key, shape, pattern or
    block, and its kinds for a pattern that the rules do not know or a size that its mesh dims do not divide.

    >>> bits(key(0), (4,), pattern="batch")
    tensor([4070199207, 4202968722, 1427181096, 2012915765])
    >>> bits(key(0), (4,), block=[slice(1, 3)])
    tensor([4202968722, 1427181096])
    """
    return _drawn("bits", threefry.bits, key, shape, pattern, like, block, device)


def uniform(
    key: Tensor,
    shape: Shape = None,
    *,
    pattern: str | None = None,
    like: Tensor | None = None,
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype | None = None,
    block: Block = None,
    device: Device = None,
) -> Tensor:
    """Uniform numbers in [low, high), of as many random bits as `dtype` has digits (float32: 24).

    Every number in [0, 1) is an exact multiple of 2**-digits. With other bounds, rounding to `dtype` may give `high`.
    `low` <= `high`, finite; `dtype` is float16, bfloat16, float32 (the default) or float64. Raises as `bits` does.

    >>> uniform(key(0), (2, 2), pattern="batch embed", low=-1.0)[0, 0].item()
    0.8953...
    """
    draw = partial(threefry.uniform, low=low, high=high, dtype=_dtype(dtype, like))
    return _drawn("uniform", draw, key, shape, pattern, like, block, device)


def normal(
    key: Tensor,
    shape: Shape = None,
    *,
    pattern: str | None = None,
    like: Tensor | None = None,
    dtype: torch.dtype | None = None,
    block: Block = None,
    device: Device = None,
) -> Tensor:
    """Numbers of the standard normal distribution, at most 6.8 in magnitude.

    `dtype` is float16, bfloat16, float32 (the default) or float64. Raises as `bits` does.

    >>> noisy = lambda key, x: x + normal(key, pattern="batch embed", like=x)
    >>> torch.equal(noisy(key(0), torch.zeros(8, 6)), normal(key(0), (8, 6)))
    True
    """
    draw = partial(threefry.normal, dtype=_dtype(dtype, like))
    return _drawn("normal", draw, key, shape, pattern, like, block, device)


def bernoulli(
    key: Tensor,
    p: float,
    shape: Shape = None,
    *,
    pattern: str | None = None,
    like: Tensor | None = None,
    block: Block = None,
    device: Device = None,
) -> Tensor:
    """True with probability `p` in [0, 1], rounded to a multiple of 2**-32; 0 and 1 are exact.

    Raises as `bits` does.

    >>> keep = bernoulli(key(0), 0.9, (4, 8), pattern="batch embed")
    """
    draw = lambda key, shape, **kw: threefry.bernoulli(key, p, shape, **kw)
    return _drawn("bernoulli", draw, key, shape, pattern, like, block, device)


def randint(
    key: Tensor,
    shape: Shape,
    low: int,
    high: int,
    *,
    pattern: str | None = None,
    like: Tensor | None = None,
    block: Block = None,
    device: Device = None,
) -> Tensor:
    """Integers in [low, high), int64: at most 2**32 of them, whose probabilities differ by a part of 2**-31 at most.

    With `like`, `shape` is `None`. Raises as `bits` does.

    >>> steps = randint(key(0), (8,), 0, 1000, pattern="batch")
    """
    draw = lambda key, shape, **kw: threefry.randint(key, shape, low, high, **kw)
    return _drawn("randint", draw, key, shape, pattern, like, block, device)


def place_like(axes: Axes, x: Tensor, key: Tensor, env: Env) -> Place:
    """Where numbers for a tensor with these axes lie: beside it, with the axes that vmaps hide in it or in the key."""
    if env.mesh is None:
        return Place(tuple(x.shape), (None,))
    full = layout_here(axes, x, env)
    own = Layout(axes, tuple(full.of(axis) for axis in axes))
    return _place(axes, global_shape(own, tuple(x.shape), env.mesh.sizes), (x, key), env)


def draw_at(place: Place, draw: Callable[..., Tensor], key: Tensor, device: Device = None) -> Tensor:
    """`draw(key, shape, block=, device=)` of the blocks of this rank, side by side, with the hidden axes."""
    parts = [draw(key, place.shape, block=block, device=device) for block in place.blocks]
    found = parts[0] if len(parts) == 1 else torch.cat(parts, place.along)
    levels = {h.level for h in hidden_axes(found, current())} if place.hidden else set()
    missing = tuple(h for h in place.hidden if h.level not in levels)
    if not missing:
        return found
    if not levels:
        return hide(found, missing)
    return torch.where(hide(torch.ones((), dtype=torch.bool, device=found.device), missing), found, found)


def _place(axes: Axes, shape: tuple[int, ...], batched: tuple[Tensor, ...], env: Env) -> Place:
    """Where a global shape lies on this rank, beside what vmaps hide in these tensors."""
    assert env.mesh is not None
    hidden = tuple(sorted({h for x in batched for h in hidden_axes(x, env, frozenset(axes))}))
    full = Type(axes).resolve(hidden, env)
    layout = Layout(axes, full.dims[len(hidden) :])
    block = block_of(layout, shape, env.mesh)
    if env.sequence.ranks(env.sequence.axis, env.mesh.sizes) == 1 or env.sequence.axis not in axes:
        return Place(shape, (block,), 0, hidden)
    at = axes.index(env.sequence.axis)
    held = env.sequence.held(axes[at], block[at].stop - block[at].start, layout.dims[at], env.mesh)
    runs = [slice(run.first, run.first + run.size) for run in held]
    return Place(shape, tuple((*block[:at], run, *block[at + 1 :]) for run in runs), at, hidden)


def _drawn(
    name: str,
    draw: Callable[..., Tensor],
    key: Tensor,
    shape: Shape,
    pattern: str | None,
    like: Tensor | None,
    block: Block,
    device: Device,
) -> Tensor:
    what, env = f"ft.random.{name}", current()
    threefry.check_key(key)
    _check_given(what, shape, pattern, like, block, env)
    if pattern is None:
        return draw(key, shape, block=block, device=device)
    axes = parse_axes(pattern)
    if like is not None:
        check_operands(f"{what}(pattern={pattern!r})", Operand("like", like, axes))
        place = place_like(axes, like, key, env)
        return made(what, axes, draw_at(place, draw, key, like.device if device is None else device), env)
    assert shape is not None
    whole = threefry.check_shape(shape)
    check_rank(axes, whole, what)
    if env.mesh is None:
        return draw_at(Place(whole, (None,)), draw, key, device)
    assert env.rules is not None
    check_leaves(what, [("the result", pattern, whole)], env.rules, env.mesh.sizes)
    return made(what, axes, draw_at(_place(axes, whole, (key,), env), draw, key, device), env)


def _dtype(dtype: torch.dtype | None, like: Tensor | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    return like.dtype if isinstance(like, Tensor) else torch.float32


def _check_given(what: str, shape: Shape, pattern: str | None, like: Tensor | None, block: Block, env: Env) -> None:
    problems = ["both shape and like are given"] if shape is not None and like is not None else []
    problems += ["neither shape nor like is given"] if shape is None and like is None else []
    problems += ["like is given without a pattern"] if like is not None and pattern is None else []
    problems += ["both pattern and block are given"] if block is not None and pattern is not None else []
    if problems:
        fix = f"write {what}(key, shape, pattern='batch embed') of a global shape, or pattern='batch embed', like=x"
        raise FunctitanError(report(what, problems, fix))
    if pattern is None and block is None and env.mesh is not None and max(env.mesh.sizes.sizes, default=1) > 1:
        over = "·".join(f"{dim}={n}" for dim, n in zip(*env.mesh.sizes, strict=True) if n > 1)
        shown = list(shape) if isinstance(shape, Sequence) else shape
        problem = f"shape {shown} has no pattern, on a mesh ({over}): every rank would draw the same numbers"
        raise FunctitanError(report(what, [problem], _FIX_PLAIN))


_FIX_PLAIN = (
    "say which shard this is: pattern='batch embed' with the global shape, or with like=x for a tensor x of this rank; "
    "pattern='' for a scalar"
)
