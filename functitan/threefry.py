"""Counter-based random numbers of blocks: a key and an index give a value, and no generator has a state.

Invariant: an element depends only on the key and on its row-major int64 index in the global shape. So a block of a
tensor is bitwise the slice of the whole, and every sharding of a tensor holds the same numbers.

The generator is Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
one call for each element. `key`, `split`, `fold_in` and `bits` give the numbers of `jax.random` (with
`jax_threefry_partitionable`, its default). As there, a key is used once: either to sample, or to derive other keys.
`functitan.random` is what users call: it knows which block of a tensor is this rank's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import product

import torch
from torch import Tensor
from torch._guards import detect_fake_mode  # private; tried on torch 2.13; used in `_sample` only
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from functitan.errors import FunctitanError, report

Block = Sequence[slice]
Device = torch.device | str

_CHUNK = 2**16  # elements sampled at once: the work buffers stay in the cache
_MASK = 2**32 - 1
_error = lambda problem, fix: FunctitanError(report("ft.random", [problem], fix))


def key(seed: int) -> Tensor:
    """A key from a seed, an int in [0, 2**64): int64 of shape (2,), two words of 32 bits.

    Raises FunctitanError for another seed.

    >>> key(7)
    tensor([0, 7])
    """
    _check_64_bits(seed, "seed")
    return torch.tensor([seed >> 32, seed & _MASK], dtype=torch.int64)


def split(key: Tensor, n: int = 2) -> Tensor:
    """`n` new keys, int64 (n, 2), independent of each other and of all else if `key` is not used again.

    Row i is `fold_in(key, i)`. Raises FunctitanError for a bad key or a negative `n`.

    >>> first, second = split(key(0))
    """
    check_key(key)
    check_shape((n,))
    counter = torch.arange(n, dtype=torch.int64, device=key.device)
    return torch.stack([_unsigned(word) for word in _threefry(key, counter)], -1)


def fold_in(key: Tensor, data: int | str | Tensor) -> Tensor:
    """A new key for `data`: a step, a layer's index, the path of a leaf.

    `key` is int64 (2,), `data` an int in [0, 2**64), a str (its 64-bit BLAKE2b hash is used, so that the
    result is the same in every process) or an integer tensor of shape () (so that a captured step can fold in its
    own counter). Result: int64 (2,). Raises FunctitanError for other data and for a bad key.

    >>> dropout_key = fold_in(fold_in(key(0), "blocks.3.dropout"), 100)
    """
    check_key(key)
    if isinstance(data, Tensor):
        if data.ndim or data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
            raise _error(f"fold_in: data is {data.dtype} {tuple(data.shape)}", "a tensor must be an integer, []")
        counter = data.to(key.device, torch.int64)
    else:
        if isinstance(data, str):
            data = int.from_bytes(blake2b(data.encode(), digest_size=8).digest(), "little")
        _check_64_bits(data, "fold_in: data")
        counter = torch.full((), data if data < 2**63 else data - 2**64, dtype=torch.int64, device=key.device)
    return torch.stack([_unsigned(word) for word in _threefry(key, counter)], -1)


def bits(key: Tensor, shape: Sequence[int], *, block: Block | None = None, device: Device | None = None) -> Tensor:
    """Uniform integers in [0, 2**32), int64, of the block's shape.

    `shape` is global, `block` one `slice(start, stop)` for each axis (None: all of it), `device` the key's by default.

    >>> bits(key(0), (4,), block=[slice(1, 3)])
    tensor([4202968722, 1427181096])
    """
    return _sample(lambda first, second: _unsigned(first ^ second), torch.int64, key, shape, block, device)


def randint(
    key: Tensor, shape: Sequence[int], low: int, high: int, *, block: Block | None = None, device: Device | None = None
) -> Tensor:
    """Integers in [low, high), int64: 63 random bits modulo their number, so probabilities differ by 2**-31 at most.

    >>> randint(key(0), (4,), 0, 10).max().item() < 10
    True
    """
    if type(low) is not int or type(high) is not int or not -(2**63) <= low < high < 2**63 or high - low > 2**32:
        raise _error(f"randint: low={low!r}, high={high!r}", "give ints with low < high, at most 2**32 of them")

    def draw(first: Tensor, second: Tensor) -> Tensor:
        return (_unsigned(first) << 31 | _unsigned(second) >> 1) % (high - low) + low

    return _sample(draw, torch.int64, key, shape, block, device)


def uniform(
    key: Tensor,
    shape: Sequence[int],
    *,
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype = torch.float32,
    block: Block | None = None,
    device: Device | None = None,
) -> Tensor:
    """Uniform numbers in [low, high), of as many random bits as `dtype` has digits (float32: 24).

    >>> uniform(key(0), (2, 2), low=-1.0)[0, 0].item()
    0.8953...
    """
    digits = _digits(dtype)
    if not (math.isfinite(high - low) and low <= high):
        raise _error(f"uniform: low={low}, high={high}", "give finite numbers with low <= high")

    def draw(first: Tensor, second: Tensor) -> Tensor:
        if digits <= 32:
            integer = _unsigned(first ^ second) >> (32 - digits)
        else:
            integer = _unsigned(first) << (digits - 32) | _unsigned(second) >> (64 - digits)
        return (low + (high - low) * (integer.double() * 2.0**-digits)).to(dtype)

    return _sample(draw, dtype, key, shape, block, device)


def normal(
    key: Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    block: Block | None = None,
    device: Device | None = None,
) -> Tensor:
    """Numbers of the standard normal distribution: the cosine half of Box and Muller, sqrt(-2 log u) cos(2 pi v).

    It is computed in float64 and rounded once, so that bits do not hang on the last digit of a device's log and cos.

    >>> whole = normal(key(0), (8, 6))
    >>> torch.equal(normal(key(0), (8, 6), block=(slice(2, 4), slice(None))), whole[2:4])
    True
    """
    _digits(dtype)

    def draw(first: Tensor, second: Tensor) -> Tensor:
        radius = torch.sqrt(torch.log(_open_unit(first)) * -2.0)
        return (radius * torch.cos(_open_unit(second) * (2.0 * math.pi))).to(dtype)

    return _sample(draw, dtype, key, shape, block, device)


def bernoulli(
    key: Tensor, p: float, shape: Sequence[int], *, block: Block | None = None, device: Device | None = None
) -> Tensor:
    """True with probability `p`, rounded to a multiple of 2**-32; 0 and 1 are exact."""
    if not 0.0 <= p <= 1.0:
        raise _error(f"bernoulli: p={p}", "give a probability in [0, 1]")
    threshold = round(p * 2**32)
    return _sample(lambda first, second: _unsigned(first ^ second) < threshold, torch.bool, key, shape, block, device)


def _sample(
    draw: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype,
    key: Tensor,
    shape: Sequence[int],
    block: Block | None,
    device: Device | None,
) -> Tensor:
    """`draw` of the two words of every element of a block, in boxes of at most `_CHUNK` elements."""
    check_key(key)
    shape = check_shape(shape)
    bounds = _check_block(block, shape)
    key = key if device is None else key.to(device)
    runs = _runs(shape, bounds)
    sizes = [size for _, size, _ in runs]
    # A trace holds a few dozen nodes for each box, and fake tensors use no memory: there, one box.
    traced = key.is_meta or get_proxy_mode() is not None or detect_fake_mode(key) is not None
    boxes = _boxes(sizes, max(1, math.prod(sizes)) if traced else _CHUNK)
    words = (_threefry(key, _indices(runs, box, key.device)) for box in boxes)
    if len(boxes) == 1:
        return draw(*next(words)).reshape([stop - start for start, stop in bounds])
    out = key.new_empty(sizes, dtype=dtype)  # of the key, so that it is batched under vmap over keys
    for box, pair in zip(boxes, words, strict=True):
        out[box] = draw(*pair)
    return out.reshape([stop - start for start, stop in bounds])


def _runs(shape: tuple[int, ...], bounds: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """The axes of a block as (first index, size, stride), an axis that is whole merged into the one before it."""
    runs: list[tuple[int, int, int]] = []
    stride = math.prod(shape)
    for size, (start, stop) in zip(shape, bounds, strict=True):
        stride = stride // size if size else 0
        if runs and stop - start == size:
            first, length, _ = runs.pop()
            runs.append((first, length * size, stride))
        else:
            runs.append((start * stride, stop - start, stride))
    return runs


def _boxes(sizes: list[int], limit: int) -> list[tuple[slice, ...]]:
    """Cuts a box of `sizes` into boxes of at most `limit` elements: trailing axes whole, one axis cut evenly."""
    cuts: list[list[slice]] = []
    for size in reversed(sizes):
        parts = -(-size // max(1, limit))
        step = -(-size // max(1, parts))
        cuts.append([slice(at, min(at + step, size)) for at in range(0, size, step)] if size else [slice(0, 0)])
        limit = limit // max(1, size) if parts <= 1 else 1
    return list(product(*reversed(cuts)))


def _indices(runs: list[tuple[int, int, int]], box: tuple[slice, ...], device: torch.device) -> Tensor:
    index = torch.zeros((), dtype=torch.int64, device=device)
    for (first, _, stride), part in zip(runs, box, strict=True):
        size = part.stop - part.start
        step = torch.arange(size, dtype=torch.int64, device=device) * stride + (first + part.start * stride)
        index = index.unsqueeze(-1) + step
    return index


def _threefry(key: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20 of an int64 counter. All ops are out of place and wrap around in int32."""
    keys = [word.to(torch.int32) for word in key.unbind(-1)]
    keys.append(keys[0] ^ keys[1] ^ 0x1BD11BDA)
    first = (counter >> 32).to(torch.int32) + keys[0]
    second = counter.to(torch.int32) + keys[1]
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            first = first + second
            second = first ^ (second << rotation | second >> (32 - rotation) & (1 << rotation) - 1)
        first = first + keys[(group + 1) % 3]
        second = second + (keys[(group + 2) % 3] + (group + 1))
    return first, second


def _unsigned(word: Tensor) -> Tensor:
    return word.to(torch.int64) & _MASK


def _open_unit(word: Tensor) -> Tensor:
    """An int32 word as a float64 in (0, 1), by (unsigned word + 1/2) / 2**32."""
    return ((word ^ -(2**31)).double() + (2.0**31 + 0.5)) * 2.0**-32


def _digits(dtype: torch.dtype) -> int:
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise _error(f"dtype={dtype}", "give torch.float16, bfloat16, float32 or float64")
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def _check_64_bits(value: int, name: str) -> None:
    if type(value) is not int or not 0 <= value < 2**64:
        raise _error(f"{name}={value!r}", "give an int in [0, 2**64)")


def check_key(key: Tensor, what: str = "ft.random") -> None:
    """Raise FunctitanError for what is no key."""
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or tuple(key.shape) != (2,):
        found = f"a tensor {key.dtype} {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
        fix = "make it by ft.random.key(seed), an int64 tensor of shape (2,); of ft.random.split take one row"
        raise FunctitanError(report(what, [f"the key is {found}"], fix))


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape as a tuple. Raises FunctitanError for what is none."""
    sizes = shape if isinstance(shape, Sequence) else (-1,)
    if not all(type(size) is int and size >= 0 for size in sizes) or math.prod(sizes) >= 2**63:
        raise _error(f"shape={shape!r}", "give a sequence of ints >= 0, fewer than 2**63 elements")
    return tuple(shape)


def _check_block(block: Block | None, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    if block is None:
        return [(0, size) for size in shape]
    if not isinstance(block, Sequence) or len(block) != len(shape) or not all(isinstance(s, slice) for s in block):
        raise _error(f"block={block!r}", f"give one slice for each of the {len(shape)} axes of shape {shape}")
    bounds = [(s.start or 0, size if s.stop is None else s.stop) for s, size in zip(block, shape, strict=True)]
    bad = [
        f"axis {axis}: {s} of size {size}"
        for axis, (s, size, (start, stop)) in enumerate(zip(block, shape, bounds, strict=True))
        if s.step not in (None, 1) or {type(start), type(stop)} != {int} or not 0 <= start <= stop <= size
    ]
    if bad:
        raise _error(f"block of shape {shape}: {'; '.join(bad)}", "give 0 <= start <= stop <= size, and step 1")
    return bounds
