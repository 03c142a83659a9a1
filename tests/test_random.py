"""Laws of the counter-based random numbers. The oracle is Threefry in numpy, and numbers that JAX 0.10 printed."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from functitan import random
from functitan import threefry as threefry_core

SAMPLERS = {
    "bits": random.bits,
    "uniform": random.uniform,
    "uniform_float64": lambda key, shape, **kw: random.uniform(
        key, shape, low=-3.0, high=0.7, dtype=torch.float64, **kw
    ),
    "normal": random.normal,
    "normal_bfloat16": lambda key, shape, **kw: random.normal(key, shape, dtype=torch.bfloat16, **kw),
    "normal_float64": lambda key, shape, **kw: random.normal(key, shape, dtype=torch.float64, **kw),
    "bernoulli": lambda key, shape, **kw: random.bernoulli(key, 0.3, shape, **kw),
}


def threefry(key: tuple[int, int], counter: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32-20 as its authors write it, in uint32; `counter` is uint64."""
    word = np.uint32
    ks = [word(key[0]), word(key[1]), word(key[0] ^ key[1] ^ 0x1BD11BDA)]
    x, y = (counter >> np.uint64(32)).astype(word), counter.astype(word)
    with np.errstate(over="ignore"):
        x, y = x + ks[0], y + ks[1]
        for i in range(20):
            r = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
            x = x + y
            y = ((y << word(r)) | (y >> word(32 - r))) ^ x
            if i % 4 == 3:
                x, y = x + ks[(i // 4 + 1) % 3], y + ks[(i // 4 + 2) % 3] + word(i // 4 + 1)
    return x, y


@pytest.mark.parametrize(
    "key, counter, result",
    [  # the known answers of Random123
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_fold_in_gives_the_known_answers_of_threefry(key, counter, result):
    assert random.fold_in(torch.tensor(key), counter[0] << 32 | counter[1]).tolist() == list(result)


def test_keys_and_bits_are_those_of_jax():
    key = random.key(7)
    assert random.split(key, 3).tolist() == [[3625411723, 1954958720], [195045567, 4062205631], [966301609, 1948237315]]
    assert random.fold_in(key, 11).tolist() == [2796958904, 1911163382]
    assert random.bits(random.key(42), (2, 3)).tolist() == [
        [2098992034, 2919706841, 2646866425],
        [2409546199, 1935504149, 2516274904],
    ]


def test_golden_values_pin_the_bits():
    key = random.fold_in(random.key(1), "blocks.0.attention.query")
    assert key.tolist() == [1717025992, 2518340268]
    assert random.uniform(key, (4,)).view(torch.int32).tolist() == [1057374360, 1053128956, 1063496028, 1026789264]
    assert random.normal(key, (4,)).view(torch.int32).tolist() == [1066932898, 1024219329, -1114123901, 1061536157]
    assert random.bernoulli(key, 0.5, (8,)).int().tolist() == [0, 1, 0, 1, 1, 0, 1, 1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(1, 50))
def test_samples_are_the_formulas_over_threefry(seed, n):
    key = random.key(seed)
    x, y = threefry(tuple(key.tolist()), np.arange(n, dtype=np.uint64))
    np.testing.assert_array_equal(random.bits(key, (n,)).numpy(), (x ^ y).astype(np.int64))
    np.testing.assert_array_equal(random.uniform(key, (n,)).numpy(), ((x ^ y) >> 8) * np.float32(2**-24))
    double = (x.astype(np.uint64) << 21 | y >> 11) * 2.0**-53
    np.testing.assert_array_equal(random.uniform(key, (n,), dtype=torch.float64).numpy(), double)
    np.testing.assert_array_equal(random.bernoulli(key, 0.25, (n,)).numpy(), (x ^ y) < 2**30)
    # numpy's log and cos may differ from torch's in the last digit of a float64; near a zero of the cosine that counts
    # against its argument, at most 2 pi, hence the absolute tolerance: 4 ulp of 2 pi times the largest radius, 6.8.
    exact = np.sqrt(-2 * np.log((x + 0.5) / 2.0**32)) * np.cos(2 * np.pi * ((y + 0.5) / 2.0**32))
    np.testing.assert_allclose(random.normal(key, (n,), dtype=torch.float64).numpy(), exact, rtol=1e-14, atol=3e-14)
    assert torch.equal(random.normal(key, (n,)), random.normal(key, (n,), dtype=torch.float64).float())


@st.composite
def shapes_and_blocks(draw):
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    if shape and draw(st.booleans()):  # a large axis, so that there are several chunks
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(60_000, 70_000) | st.integers(1000, 1100))
        shape = [min(size, 3) if size < 1000 else size for size in shape]
    bounds = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    return tuple(shape), tuple(slice(*pair) if draw(st.booleans()) else slice(None) for pair in bounds)


@pytest.mark.parametrize("name", SAMPLERS)
@settings(max_examples=25, deadline=None)
@given(shapes_and_blocks(), st.sampled_from([1, 2]))
def test_a_block_is_bitwise_the_slice_of_the_whole(name, shape_and_block, threads):
    shape, block = shape_and_block
    before = torch.get_num_threads()
    whole = SAMPLERS[name](random.key(3), shape)
    try:
        torch.set_num_threads(threads)
        part = SAMPLERS[name](random.key(3), shape, block=block)
    finally:
        torch.set_num_threads(before)
    assert whole.shape == shape
    assert part.shape == whole[block].shape
    assert torch.equal(part, whole[block])


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_one_by_one_are_bitwise_the_whole(name):
    """Odd small blocks meet every scalar tail of the vectorized log and cos."""
    whole = SAMPLERS[name](random.key(5), (257, 37))
    for i, j in product(range(0, 257, 19), range(37)):
        part = SAMPLERS[name](random.key(5), (257, 37), block=(slice(i, i + 10), slice(j, 37)))
        assert torch.equal(part, whole[i : i + 10, j:])


def test_an_index_beyond_32_bits_counts():
    shape, at = (2**33, 3), 2**32 + 5
    got = random.bits(random.key(9), shape, block=(slice(at, at + 2), slice(0, 3))).flatten().numpy()
    x, y = threefry((0, 9), np.arange(3 * at, 3 * at + 6, dtype=np.uint64))
    np.testing.assert_array_equal(got, (x ^ y).astype(np.int64))


def test_shape_is_only_a_view_of_the_index():
    assert torch.equal(random.normal(random.key(0), (6, 4)), random.normal(random.key(0), (24,)).reshape(6, 4))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_split_gives_distinct_keys(seed):
    keys = random.split(random.key(seed), 200)
    assert len({tuple(row) for row in keys.tolist()}) == 200
    assert keys[17].tolist() == random.fold_in(random.key(seed), 17).tolist()


def test_fold_in_of_a_str_is_the_same_in_another_process():
    code = "from functitan import random; print(random.fold_in(random.key(0), 'blocks.1.mlp').tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(random.fold_in(random.key(0), "blocks.1.mlp").tolist())


@pytest.mark.parametrize("step", [0, 1, 2**31, 2**32 + 3, 2**63 - 1])
def test_fold_in_of_a_tensor_is_that_of_its_int(step):
    assert random.fold_in(random.key(4), torch.tensor(step)).tolist() == random.fold_in(random.key(4), step).tolist()


def test_samples_have_the_moments_of_their_distribution():
    n = 2**20
    normal = random.normal(random.key(0), (n,), dtype=torch.float64)
    uniform = random.uniform(random.key(0), (n,), low=2.0, high=4.0, dtype=torch.float64)
    heads = random.bernoulli(random.key(0), 0.3, (n,)).double()
    # Six standard errors of each estimate: sqrt(var / n), with var of x**2 = 2, of x**4 = 96.
    for found, expected, variance in [
        (normal.mean(), 0, 1),
        (normal.square().mean(), 1, 2),
        (normal.pow(4).mean(), 3, 96),
        ((normal[1:] * normal[:-1]).mean(), 0, 1),
        (uniform.mean(), 3, 1 / 3),
        (heads.mean(), 0.3, 0.21),
    ]:
        assert abs(found.item() - expected) < 6 * math.sqrt(variance / n)
    assert uniform.min() >= 2 and uniform.max() < 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_stays_below_one_in_every_dtype(dtype):
    x = random.uniform(random.key(0), (2**17,), dtype=dtype)
    assert x.dtype == dtype and x.min() >= 0 and x.max() < 1


@pytest.mark.parametrize("p, count", [(0.0, 0), (1.0, 1000), (2**-40, 0)])
def test_bernoulli_is_exact_at_its_ends(p, count):
    assert random.bernoulli(random.key(0), p, (1000,)).sum() == count


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shape", [(5, 3), (70_000, 2)])
def test_vmap_over_keys_is_a_loop_over_keys(name, shape):
    keys = random.split(random.key(0), 3)
    batched = torch.func.vmap(lambda key: SAMPLERS[name](random.fold_in(key, "x"), shape))(keys)
    assert torch.equal(batched, torch.stack([SAMPLERS[name](random.fold_in(key, "x"), shape) for key in keys]))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_trace_gives_the_same_bits_in_one_box(name, mode):
    def sample(key, step):
        return SAMPLERS[name](random.fold_in(key, step), (300, 1000), block=(slice(0, 300), slice(250, 500)))

    args = random.key(0), torch.tensor(3)
    graph = make_fx(sample, tracing_mode=mode)(*args)
    assert len(graph.graph.nodes) < 400
    assert torch.equal(graph(random.key(1), torch.tensor(8)), sample(random.key(1), torch.tensor(8)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_half_a_billion_fake_elements_cost_no_memory(name):
    with FakeTensorMode():
        x = SAMPLERS[name](random.key(0), (500_000, 1000))
    assert x.shape == (500_000, 1000)
    assert SAMPLERS[name](random.key(0), (500_000, 1000), device="meta").is_meta


def test_the_buffers_of_a_block_are_bounded(monkeypatch):
    sizes = []
    plain = threefry_core._threefry
    monkeypatch.setattr(threefry_core, "_threefry", lambda key, index: sizes.append(index.numel()) or plain(key, index))
    random.normal(random.key(0), (10**6, 10**6), block=(slice(5, 8), slice(1, 200_001)))
    assert sum(sizes) == 600_000
    assert max(sizes) <= 2**16 and min(sizes) > 2**15  # even cuts: no box is a sliver


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda key: random.key(-1), r"(?s)seed=-1.*an int in \[0, 2\*\*64\)"),
        (lambda key: random.key(1.5), r"(?s)seed=1.5.*an int in"),
        (lambda key: random.bits(key.int(), (2,)), r"(?s)key is a tensor torch.int32 \(2,\).*random.key\(seed\)"),
        (lambda key: random.bits(random.split(key), (2,)), r"key is a tensor torch.int64 \(2, 2\)"),
        (lambda key: random.split(0), r"(?s)the key is 0.*an int64 tensor"),
        (lambda key: random.split(key, -1), r"(?s)shape=\(-1,\).*a sequence of ints >= 0"),
        (lambda key: random.fold_in(key, -3), r"fold_in: data=-3"),
        (lambda key: random.fold_in(key, torch.ones(2)), r"fold_in: data is torch.float32 \(2,\)"),
        (lambda key: random.bits(key, 5), r"(?s)shape=5.*a sequence"),
        (lambda key: random.bits(key, (2, -1)), r"shape=\(2, -1\)"),
        (lambda key: random.bits(key, (2**32, 2**31)), r"2\*\*63 elements"),
        (
            lambda key: random.bits(key, (2, 3), block=(slice(0, 1),)),
            r"one slice for each of the 2 axes of shape \(2, 3\)",
        ),
        (lambda key: random.bits(key, (2, 3), block=(0, 1)), r"one slice for each"),
        (
            lambda key: random.bits(key, (2, 3), block=(slice(0, 3), slice(2, 1))),
            r"axis 0: .* size 2; axis 1: .* size 3",
        ),
        (
            lambda key: random.bits(key, (4,), block=(slice(0, 4, 2),)),
            r"(?s)axis 0: slice\(0, 4, 2\) of size 4.*step 1",
        ),
        (lambda key: random.bits(key, (4,), block=(slice(-2, None),)), r"axis 0: slice\(-2, None, None\)"),
        (lambda key: random.bits(key, (4,), block=(slice(0.5, 2),)), r"axis 0: slice\(0.5, 2, None\)"),
        (lambda key: random.normal(key, (4,), dtype=torch.int64), r"(?s)dtype=torch.int64.*torch.float16"),
        (lambda key: random.uniform(key, (4,), low=1.0, high=0.0), r"(?s)low=1.0, high=0.0.*finite"),
        (lambda key: random.uniform(key, (4,), high=math.inf), r"give finite"),
        (lambda key: random.bernoulli(key, 1.5, (4,)), r"(?s)p=1.5.*in \[0, 1\]"),
    ],
)
def test_a_mistake_is_one_clear_error(call, text):
    with pytest.raises(ValueError, match=text):
        call(random.key(0))
