"""Which layers each stage has.

Invariant: stages are contiguous ranges of layers, in order, and none is empty. The first stage also has what comes
before the layers (the embedding), the last what comes after them (the output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from functitan import tree
from functitan.errors import ScheduleError, report
from functitan.pipeline.actions import StageRank


class LayerCosts(NamedTuple):
    """What each part of a model costs, in any unit, measured or estimated."""

    embedding: float
    layers: tuple[float, ...]
    output: float


def partition(
    num_layers: int,
    num_stages: int,
    *,
    counts: Sequence[int] | None = None,
    splits: Sequence[int] | None = None,
    costs: LayerCosts | Sequence[float] | None = None,
    stage_rank: StageRank | None = None,
) -> tuple[range, ...]:
    """The layers of each stage, a range for each.

    `counts` is how many layers each stage has; `splits` the first layer of each stage but the first. Without either the
    stages are balanced: the costliest costs as little as can be, and the others are as alike as can be then. `costs`
    are those of the layers, or `LayerCosts` with the embedding's and the output's; without them all layers are equal.
    `stage_rank` is that of the schedule, for errors that name the rank. Raises `ScheduleError` for what does not fit.

    >>> partition(8, 4)
    (range(0, 2), range(2, 4), range(4, 6), range(6, 8))
    >>> partition(8, 4, costs=LayerCosts(embedding=1, layers=(2,) * 8, output=3))
    (range(0, 2), range(2, 4), range(4, 7), range(7, 8))
    >>> partition(8, 3, splits=[2, 5])
    (range(0, 2), range(2, 5), range(5, 8))
    """
    weighed = _weighed(num_layers, costs)
    given = [name for name, x in dict(counts=counts, splits=splits, costs=costs).items() if x is not None]
    problems = [f"{' and '.join(given)} are given, and one is enough"] if len(given) > 1 else []
    problems += _bad_sizes(num_layers, num_stages, weighed, counts, splits, stage_rank)
    if not problems:
        if counts is not None:
            ends = [0, *accumulate(counts)]
        else:
            ends = [0, *splits, num_layers] if splits is not None else _balanced(weighed, num_stages)
        ranges = tuple(range(start, end) for start, end in pairwise(ends))
        problems = [f"{_name(i, stage_rank)} has no layer: {r}" for i, r in enumerate(ranges) if not r]
        if not problems:
            return ranges
    raise ScheduleError(report(f"partition of {num_layers} layers into {num_stages} stages", problems, _FIX))


def estimate_costs(declarations: tree.Tree) -> LayerCosts:
    """The costs of a model's parts, as elements of matrices: each token meets each of them once.

    `declarations` is the tree of `Param` with "layers", a list; "embedding" is looked up and costs nothing; the output
    is "unembedding", or "embedding" again where that serves as output.

    >>> import functitan as ft
    >>> config = ft.models.gpt2.DEBUG._replace(num_layers=2)
    >>> estimate_costs(ft.models.gpt2.params(config))
    LayerCosts(embedding=0, layers=(786432, 786432), output=524288)
    """
    output = declarations.get("unembedding", declarations.get("embedding"))
    return LayerCosts(0, tuple(map(_matrix_elements, declarations["layers"])), _matrix_elements(output))


def _matrix_elements(declarations: tree.Tree) -> int:
    leaves = zip(tree.paths(declarations), tree.leaves(declarations), strict=True)
    return sum(math.prod(p.shape) for path, p in leaves if len(p.shape) > 1 and not path.endswith("bias"))


def _weighed(num_layers: int, costs: LayerCosts | Sequence[float] | None) -> LayerCosts:
    if isinstance(costs, LayerCosts):
        return costs
    return LayerCosts(0, (1,) * num_layers if costs is None else tuple(costs), 0)


def _bad_sizes(
    num_layers: int,
    num_stages: int,
    costs: LayerCosts,
    counts: Sequence[int] | None,
    splits: Sequence[int] | None,
    stage_rank: StageRank | None,
) -> list[str]:
    if num_stages < 1:
        return [f"there are {num_stages} stages"]
    if stage_rank is not None and len(stage_rank) != num_stages:
        return [f"stage_rank has {len(stage_rank)} stages"]
    found = [
        f"{_name(stage, stage_rank)} has no layer: there are {num_layers}" for stage in range(num_layers, num_stages)
    ]
    if counts is not None and len(counts) != num_stages:
        found.append(f"counts has {len(counts)} stages")
    if counts is not None and sum(counts) != num_layers:
        found.append(f"counts has {sum(counts)} layers")
    if splits is not None and len(splits) != num_stages - 1:
        found.append(
            f"splits has {len(splits)} numbers, and {num_stages} stages begin at {num_stages - 1} after the first"
        )
    if len(costs.layers) != num_layers:
        found.append(f"costs has {len(costs.layers)} layers")
    named = {"the embedding": costs.embedding, "the output": costs.output}
    named |= {f"layer {i}": cost for i, cost in enumerate(costs.layers)}
    return found + [f"{what} costs {cost}" for what, cost in named.items() if not 0 <= cost < math.inf]


def _name(stage: int, stage_rank: StageRank | None) -> str:
    return f"stage {stage}" + (f" (rank {stage_rank[stage]})" if stage_rank else "")


def _balanced(costs: LayerCosts, num_stages: int) -> list[int]:
    """Where the stages begin and end: the least cost of the costliest stage, and for that the least sum of squares."""
    worst, _ = _best(costs, num_stages, max, math.inf)
    return _best(costs, num_stages, lambda total, cost: total + cost**2, worst)[1]


def _best(
    costs: LayerCosts, num_stages: int, together: Callable[[float, float], float], most: float
) -> tuple[float, list[int]]:
    """The least value of `together` over all stages, none above `most`, and where they begin and end.

    Dynamic programming: the best stages up to each layer, from one stage to all.
    """
    sums = list(accumulate(costs.layers, initial=0))
    best: dict[int, tuple[float, list[int]]] = {0: (0, [0])}  # by the end of the last stage
    for stage in range(num_stages):
        more = costs.embedding * (stage == 0) + costs.output * (stage == num_stages - 1)
        longer: dict[int, tuple[float, list[int]]] = {}
        for start, (value, ends) in best.items():
            for end in range(start + 1, len(sums)):
                cost = sums[end] - sums[start] + more
                if cost <= most:
                    option = together(value, cost), [*ends, end]
                    longer[end] = min(longer.get(end, option), option)
        best = longer
    return best[len(sums) - 1]


_FIX = "give at most as many stages as layers, and counts, splits or costs that fit them"
