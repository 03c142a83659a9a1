"""Laws of the five collectives on a virtual mesh: what they move, their transposes, vmap, and the dtype of sums.

The oracle is numpy and a for-loop over mesh coordinates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import functitan as ft
from functitan.sharding import collectives

MESH = {"dp": 2, "fsdp": 2, "tp": 2}
COORDINATES = list(itertools.product(*(range(n) for n in MESH.values())))
GROUPS = [("tp",), ("dp",), ("fsdp", "tp"), ("tp", "fsdp"), ("tp", "dp")]
SHAPE = (8, 4, 3)
NO_RULES = ft.AxisRules({})


class Case(NamedTuple):
    """A collective by name, its options, and what the ranks of one group get from the list of what they have."""

    name: str
    options: dict[str, Any]
    oracle: Callable[[list[np.ndarray]], list[np.ndarray]]

    def __call__(self, x: torch.Tensor, dims: tuple[str, ...], **more: Any) -> torch.Tensor:
        return getattr(collectives, self.name)(x, dims, **self.options, **more)

    def __str__(self) -> str:
        return f"{self.name}{tuple(self.options.values())}"


def gather(axis):
    return Case("all_gather", {"axis": axis}, lambda xs: [np.concatenate(xs, axis)] * len(xs))


def scatter(axis):
    return Case("reduce_scatter", {"axis": axis}, lambda xs: np.split(sum(xs), len(xs), axis))


def exchange(split, join):
    def oracle(xs):
        parts = [np.split(x, len(xs), split) for x in xs]
        return [np.concatenate([own[i] for own in parts], join) for i in range(len(xs))]

    return Case("all_to_all", {"split": split, "join": join}, oracle)


def rotate(shift):
    return Case("permute", {"shift": shift}, lambda xs: [xs[(i - shift) % len(xs)] for i in range(len(xs))])


REDUCE = Case("all_reduce", {}, lambda xs: [sum(xs)] * len(xs))
EXCHANGES = [exchange(0, 1), exchange(1, 0), exchange(0, 2), exchange(0, 0), exchange(1, -1)]
ROTATIONS = [rotate(1), rotate(-1), rotate(3)]
LINEAR = [gather(0), gather(1), gather(-1), scatter(0), scatter(1), REDUCE, *EXCHANGES, *ROTATIONS]
of_linear = pytest.mark.parametrize("case", LINEAR, ids=str)
of_groups = pytest.mark.parametrize("dims", GROUPS, ids="·".join)


def groups(dims) -> list[list[int]]:
    """The ranks of each group over `dims`, the last of which changes fastest."""
    found: dict[tuple, list] = {}
    for rank, coordinate in enumerate(COORDINATES):
        at = dict(zip(MESH, coordinate, strict=True))
        others = tuple(place for dim, place in at.items() if dim not in dims)
        found.setdefault(others, []).append((tuple(at[dim] for dim in dims), rank))
    return [[rank for _, rank in sorted(members)] for members in found.values()]


def on_mesh(fn, *stacked):
    """`fn` of each rank's row of the stacked tensors."""
    rank = lambda mesh: ft.spmd(fn, mesh=mesh, rules=NO_RULES)(*(x[mesh.rank] for x in stacked))
    return ft.simulate(**MESH)(rank)()


def rows(*shape, seed=0):
    return torch.randn(len(COORDINATES), *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@of_linear
@of_groups
def test_each_rank_gets_what_a_loop_over_coordinates_gives(case, dims):
    x = rows(*SHAPE)
    actual = on_mesh(lambda x: case(x, dims), x)
    for group in groups(dims):
        for rank, expected in zip(group, case.oracle([x[rank].numpy() for rank in group]), strict=True):
            # sums of up to 4 numbers in any order
            np.testing.assert_allclose(actual[rank].numpy(), expected, rtol=0, atol=1e-14)


@of_linear
@of_groups
def test_vjp_is_the_transpose(case, dims):
    """<f(x), y> == <x, f^T(y)>, summed over ranks."""
    x = rows(*SHAPE)

    def both(x):
        out, back = torch.func.vjp(lambda x: case(x, dims), x)
        y = torch.randn(out.shape, generator=torch.Generator().manual_seed(int(x[0, 0, 0] * 1e6)), dtype=out.dtype)
        return (out * y).sum(), (x * back(y)[0]).sum()

    left, right = map(sum, zip(*on_mesh(both, x), strict=True))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-11)  # 8 ranks' float64 sums of up to 384 products


@of_linear
def test_the_transpose_of_the_transpose_is_the_collective(case):
    x = rows(*SHAPE)

    def twice(x):
        out, back = torch.func.vjp(lambda x: case(x, ("fsdp", "tp")), x)
        _, forth = torch.func.vjp(lambda y: back(y)[0], torch.zeros_like(out))
        return forth(x)[0] - out

    assert all(not difference.any() for difference in on_mesh(twice, x))


@of_linear
@pytest.mark.parametrize("place", [0, 1, 3])
def test_vmap_maps_each_example(case, place):
    dims = ("tp", "fsdp")
    x = rows(*SHAPE, 5)
    batched = on_mesh(lambda x: torch.func.vmap(lambda x: case(x, dims), place, place)(x.movedim(-1, place)), x)
    for i in range(5):
        for actual, expected in zip(batched, on_mesh(lambda x, i=i: case(x[..., i], dims), x), strict=True):
            assert torch.equal(actual.select(place, i), expected)


@pytest.mark.parametrize("case", [scatter(0), REDUCE], ids=str)
def test_sums_are_taken_in_the_dtype_given(case):
    """256 + 1 + 1 + 1 is 259: bfloat16 adds nothing to 256, float32 adds three and rounds once, to 260."""
    dims, scale = ("tp", "fsdp"), 2.0 ** torch.arange(8).view(8, 1, 1)  # exact, and another for each row
    x = torch.ones(8, *SHAPE) * scale
    for group in groups(dims):
        x[group[0]] *= 256
    for dtype, total in ((None, 256), (torch.float32, 260)):
        outs = on_mesh(lambda x, dtype=dtype: case(x, dims, dtype=dtype), x.bfloat16())
        whole = (total * scale).expand(SHAPE)
        for group in groups(dims):
            wanted = whole.split(2) if case.name == "reduce_scatter" else [whole] * 4
            assert all(torch.equal(outs[rank], own.bfloat16()) for rank, own in zip(group, wanted, strict=True))


def test_the_transpose_of_a_gather_sums_in_the_dtype_given():
    x = torch.ones(8, *SHAPE, dtype=torch.bfloat16)

    def back(x, y):
        return torch.func.vjp(lambda x: collectives.all_gather(x, ("fsdp", "tp"), dtype=torch.float32), x)[1](y)[0]

    y = torch.ones(8, 32, *SHAPE[1:], dtype=torch.bfloat16)
    for group in groups(("fsdp", "tp")):
        y[group[0]] = 256
    with ft.record() as ledger:
        outs = on_mesh(back, x, y)
    assert all((out == 260).all() for out in outs)
    assert [(e.collective, e.phase, e.dtype) for e in ledger] == [
        ("all_gather", "forward", torch.bfloat16),
        ("reduce_scatter", "backward", torch.float32),
    ]


def test_the_ledger_counts_the_bytes_that_one_rank_sends():
    n, local = 4, 8 * 4 * 3 * 8
    expected = {
        "all_gather": (n - 1) * local,
        "reduce_scatter": (n - 1) * local // n,
        "all_reduce": 2 * (n - 1) * local // n,
        "all_to_all": (n - 1) * local // n,
        "permute": local,
    }
    for case in LINEAR:
        with ft.record() as ledger:
            on_mesh(lambda x, case=case: case(x, ("fsdp", "tp")), rows(*SHAPE))
        (entry,) = ledger
        assert (entry.collective, entry.mesh_dims, entry.bytes) == (case.name, ("fsdp", "tp"), expected[case.name])


def test_max_is_taken_over_the_group_and_has_no_transpose():
    x = rows(*SHAPE)
    actual = on_mesh(lambda x: collectives.all_reduce(x, ("tp", "dp"), op="max"), x)
    for group in groups(("tp", "dp")):
        assert all(torch.equal(actual[rank], x[group].amax(0)) for rank in group)
    with pytest.raises(ft.MeshError) as error:
        on_mesh(torch.func.grad(lambda x: collectives.all_reduce(x, ("tp",), op="max").sum()), x)
    assert str(error.value) == "the transpose of all_reduce max:\n  - it is not linear\n  Fix: detach it"


def test_sums_are_the_same_bits_in_every_run():
    x = rows(*SHAPE).float()
    first, second = (on_mesh(lambda x: collectives.all_reduce(x, ("dp", "fsdp", "tp")), x) for _ in range(2))
    assert all(torch.equal(a, first[0]) and torch.equal(b, first[0]) for a, b in zip(first, second, strict=True))


def test_forward_mode_is_refused_on_threads():
    """One rank alone asks for it, since the others' levels would be its own."""

    def one_asks(mesh, x):
        gathered = ft.spmd(lambda x: collectives.all_gather(x, "tp"), mesh=mesh, rules=NO_RULES)
        return torch.func.jvp(gathered, (x,), (x,)) if mesh.rank == 0 else gathered(x)

    with pytest.raises(ft.MeshError) as error:
        ft.simulate(tp=2)(one_asks)(torch.ones(2))
    assert str(error.value) == (
        "jvp of all_gather:\n"
        "  - torch's forward mode is not thread-safe, and a virtual mesh is threads: its numbers would be wrong\n"
        "  Fix: use ft.jvp or ft.hvp, which take two vjps here, or processes"
    )
