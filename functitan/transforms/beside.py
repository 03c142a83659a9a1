"""Values beside a loss, its aux: how those of microbatches and replicas become one.

Invariant: a value is declared as a mean, a sum, or the last one, and comes out the same in one process, on every mesh,
and in any number of microbatches of one whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functitan import tree
from functitan.errors import FunctitanError, nearest, report

WAYS = ("mean", "sum", "last")


def check_ways(ways: tree.Tree, where: str) -> None:
    """Raise `FunctitanError` for an entry of `aux=` that says no way to merge; `None` is the default."""
    named = zip(tree.paths(ways), tree.leaves(ways), strict=True)
    bad = [f"aux{'.' if path else ''}{path} is {way!r}{_near(way)}" for path, way in named if way not in WAYS]
    if bad:
        raise FunctitanError(report(f"{where}: aux", bad, f"say for each value, or for all, one of {list(WAYS)}"))


def check_aux(aux: tree.Tree, where: str) -> None:
    """Raise `FunctitanError` for values that cannot be merged."""
    bad = [
        f"aux{'.' if path else ''}{path} is a {type(leaf).__name__}"
        for path, leaf in zip(tree.paths(aux), tree.leaves(aux), strict=True)
        if not isinstance(leaf, (Tensor, int, float))
    ]
    if bad:
        fix = "return tensors and numbers beside the loss"
        raise FunctitanError(report(f"{where}: aux is merged over microbatches and replicas", bad, fix))


def part_of(aux: tree.Tree, ways: tree.Tree, where: str, is_last: bool, like: Tensor) -> tree.Tree:
    """What a microbatch adds to the whole: `merged` makes the whole of the sum. Other leaves than numbers stay.

    Without a word in `ways` floating-point numbers are averaged, whole ones and bools summed. Sums and means are taken
    in float32 or wider, in int64.

    >>> merged(part_of({"a": torch.ones(2), "n": True}, None, "", False, torch.ones(())), None, "", 1)
    {'a': tensor([1., 1.]), 'n': tensor(1)}
    """

    def part(leaf: Any, way: str | None) -> Any:
        if not isinstance(leaf, (Tensor, int, float)):
            return leaf
        x = torch.as_tensor(leaf, device=like.device)
        if way == "last":
            x = x.long() if x.dtype == torch.bool else x
            return x if is_last else torch.zeros_like(x)
        whole = not (x.is_floating_point() or x.is_complex())
        return x.to(torch.int64 if whole and way != "mean" else torch.promote_types(x.dtype, torch.float32))

    leaves, structure = tree.flatten(aux)
    return tree.unflatten(structure, map(part, leaves, _spread(ways, aux, where)))


def merged(aux: tree.Tree, ways: tree.Tree, where: str, number: int) -> tree.Tree:
    """The values of the whole, from the sum of the parts of `number` microbatches."""
    if number == 1:
        return aux

    def whole(x: Tensor, way: str | None) -> Tensor:
        averaged = way == "mean" or (way is None and (x.is_floating_point() or x.is_complex()))
        return x / number if averaged else x

    leaves, structure = tree.flatten(aux)
    return tree.unflatten(structure, map(whole, leaves, _spread(ways, aux, where)))


def _spread(ways: tree.Tree, aux: tree.Tree, where: str) -> list[Any]:
    return tree.broadcast_prefix(ways, aux, f"{where}: aux")


def _near(way: Any) -> str:
    return nearest(way, WAYS) if isinstance(way, str) else ""
