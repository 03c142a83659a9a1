"""Laws of the cut into stages: contiguous, whole, and as balanced as any cut can be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import functitan as ft
from functitan.pipeline import LayerCosts, estimate_costs, partition

WHOLE = st.integers(0, 9)  # whole costs: sums are exact


def stage_costs(costs: LayerCosts, stages) -> list[float]:
    sums = [sum(costs.layers[i] for i in stage) for stage in stages]
    sums[0] += costs.embedding
    sums[-1] += costs.output
    return sums


def all_cuts(num_layers: int, num_stages: int):
    for inner in combinations(range(1, num_layers), num_stages - 1):
        yield [range(start, end) for start, end in pairwise((0, *inner, num_layers))]


@given(st.lists(WHOLE, min_size=1, max_size=9), WHOLE, WHOLE, st.data())
def test_no_cut_is_better_balanced(layers, embedding, output, data):
    """The oracle tries every cut."""
    costs = LayerCosts(embedding, tuple(layers), output)
    num_stages = data.draw(st.integers(1, len(layers)))
    found = partition(len(layers), num_stages, costs=costs)
    assert [i for stage in found for i in stage] == list(range(len(layers)))
    value = lambda stages: (max(stage_costs(costs, stages)), sum(c**2 for c in stage_costs(costs, stages)))
    assert value(found) == min(map(value, all_cuts(len(layers), num_stages)))


@pytest.mark.parametrize(("num_layers", "num_stages"), [(6, 4), (32, 8), (7, 7), (5, 1), (10, 3)])
def test_equal_layers_are_spread_evenly(num_layers, num_stages):
    sizes = [len(stage) for stage in partition(num_layers, num_stages)]
    assert sum(sizes) == num_layers and max(sizes) - min(sizes) <= 1


def test_an_output_takes_layers_from_its_stage():
    costs = estimate_costs(ft.models.llama.params(ft.models.llama.DEBUG))
    num_layers = len(costs.layers)
    heavy = costs._replace(output=2.5 * costs.layers[0])
    assert partition(num_layers, 2, costs=heavy)[1].start == num_layers // 2 + 1
    assert costs.output > 0 and costs.embedding == 0


def test_counts_and_splits_say_the_same():
    assert (
        partition(10, 3, counts=[2, 5, 3])
        == partition(10, 3, splits=[2, 7])
        == (range(0, 2), range(2, 7), range(7, 10))
    )


@pytest.mark.parametrize(
    ("sizes", "options", "text"),
    [
        ((2, 4), {}, "stage 2 has no layer: there are 2"),
        ((3, 4), dict(stage_rank=(0, 1, 0, 1)), "stage 3 (rank 1) has no layer: there are 3"),
        ((4, 0), {}, "there are 0 stages"),
        ((4, 2), dict(counts=[1, 2]), "counts has 3 layers"),
        ((4, 2), dict(counts=[4]), "counts has 1 stages"),
        ((4, 2), dict(counts=[4, 0]), "stage 1 has no layer: range(4, 4)"),
        ((4, 3), dict(splits=[3, 2]), "stage 1 has no layer: range(3, 2)"),
        ((4, 3), dict(splits=[3]), "splits has 1 numbers"),
        ((4, 2), dict(splits=[2], counts=[2, 2]), "counts and splits are given, and one is enough"),
        ((4, 2), dict(costs=[1, 2, 3]), "costs has 3 layers"),
        ((2, 2), dict(costs=[1, -2]), "layer 1 costs -2"),
        ((4, 2), dict(stage_rank=(0,)), "stage_rank has 1 stages"),
    ],
)
def test_what_does_not_fit_is_named(sizes, options, text):
    with pytest.raises(ft.ScheduleError) as error:
        partition(*sizes, **options)
    assert text in str(error.value) and "Fix: " in str(error.value)
