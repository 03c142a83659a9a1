"""Laws of contractions as algebra: their cotangents and tangents are those of the sums of products they stand for."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functitan.axes import Axes
from functitan.sharding.contraction import Contraction, cotangents, tangents, terms_of
from functitan.testing.sharded import assert_close
from functitan.testing.strategies import AXES, signatures

SIZES = dict(zip(AXES, (2, 3, 4, 5, 2), strict=True))


def values(contraction: Contraction, tensors: tuple) -> tuple:
    """What a contraction of axes stands for, by torch.einsum; results that no term feeds are zeros."""
    out = [torch.zeros([SIZES[axis] for axis in axes], dtype=torch.float64) for axes in contraction.results]
    for result, operands in contraction.terms:
        wide = [torch.ones(SIZES[axis], dtype=torch.float64) for axis in contraction.results[result]]  # broadcasts
        sides = [*(contraction.operands[i] for i in operands), *((axis,) for axis in contraction.results[result])]
        letters = ",".join(map(_letters, sides)) + "->" + _letters(contraction.results[result])
        out[result] = out[result] + torch.einsum(letters, *(tensors[i] for i in operands), *wide)
    return tuple(out)


def _letters(axes: Axes) -> str:
    return "".join(chr(97 + AXES.index(axis)) for axis in axes)


def normal(axes: tuple[Axes, ...], seed: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn([SIZES[a] for a in own], generator=generator, dtype=torch.float64) for own in axes)


@settings(max_examples=30)
@given(signature=signatures(), data=st.data())
def test_cotangents_and_tangents_are_contractions(signature, data):
    operands, results = signature
    forward = Contraction(operands, results, terms_of(len(operands), len(results)), ())
    xs, given_ones = normal(operands, 0), normal(results, 1)
    some = lambda n: tuple(i for i in range(n) if data.draw(st.booleans()))
    wanted, given = some(len(operands)), some(len(results))

    _, back = torch.func.vjp(lambda *xs: values(forward, xs), *xs)
    masked = tuple(y if i in given else torch.zeros_like(y) for i, y in enumerate(given_ones))
    expected = back(masked)
    found = values(cotangents(forward, wanted, given), (*xs, *(given_ones[i] for i in given)))
    assert_close(found, tuple(expected[i] for i in wanted))

    directions = normal(operands, 2)
    masked = tuple(t if i in wanted else torch.zeros_like(t) for i, t in enumerate(directions))
    _, expected = torch.func.jvp(lambda *xs: values(forward, xs), xs, masked)
    assert_close(values(tangents(forward, wanted), (*xs, *(directions[i] for i in wanted))), expected)
