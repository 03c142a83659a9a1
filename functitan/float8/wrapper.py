"""`ft.float8`: the same function, with its products of matrices in float8.

Invariant: nothing is cast where the function is entered. Each einsum quantizes its operands where they lie, forward and
backward, and keeps for its backward what it was told.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functitan.axes import parse_axes
from functitan.errors import FunctitanError, check_function, nearest, report
from functitan.float8.arithmetic import lowering
from functitan.float8.recipes import FIX_STATE, RECIPES, Delayed, DelayedState, Float8, Matmul
from functitan.sharding.context import current, using
from functitan.sharding.env import Env
from functitan.sharding.message import Label
from functitan.sharding.steps import send

Scales = Sequence[float]  # of the operands that every result shares, of the last operands, of cotangents


def float8(
    fn: Callable[..., Any],
    *,
    recipe: str = "tensorwise",
    filter: Callable[[Matmul], bool] | Sequence[str] | None = None,
    emulate: bool = False,
    scales: Scales | Mapping[str, Scales] | None = None,
    history: int = 16,
) -> Callable[..., Any]:
    """A function that runs `fn` with its einsums in float8: e4m3 for operands, e5m2 for the cotangents of results.

    All three products are: `y = x w`, `dx = g w^T`, `dw = x^T g`. An operand becomes `x / scale` on its shard, and
    travels so: in half the bytes of bfloat16. Products sum in float32, and have the dtype that they have without
    float8, that of `ft.precision`. Scales are those of the global tensor, so every mesh rounds alike; inside
    `ft.accumulate`, and in a pipeline, those of a microbatch of one replica. The recipes:

    - "tensorwise": one scale for each tensor, its largest magnitude over 448 (e4m3) or 57344 (e5m2).
    - "rowwise": one for each position of the axes that the product keeps, so an operand has others in each product.
    - "rowwise_with_gw_hp": that, but `dw` in high precision. The last operand is the weight.
    - "delayed": one for each tensor, from the largest magnitude of the last `history` steps. `fn(*args)` becomes
      `(*args, state) -> (result, new state)`, where `None` begins: then, and for what the state lacks, as "tensorwise".
      Around `ft.value_and_grad` or a train step, cotangents are delayed too; inside, they are scaled as "tensorwise".
    - "static": `scales=(x, weight, cotangent)`, or a dict of them by pattern, "" for all others.
    - "mxfp8": powers of two for blocks of 32 along an axis that is summed (OCP Microscaling Formats); always emulated.

    `filter` chooses einsums: names of axes (those that name one stay: `filter=["vocab"]` leaves the output layer), or
    a predicate of a `Matmul`, with its pattern, axes and global sizes m, k, n: `lambda mm: mm.k >= 1024`. Einsums that
    are no products of two matrices stay too; `ft.explain(...).notes` names each kind. Kernels (`torch._scaled_mm`) run
    on CPU and CUDA from sm89 on, for sizes that 16 divides; `emulate=True` gives their numbers anywhere.

    Zeros stay zeros. What a given or delayed scale makes too large becomes the largest number. NaN and infinities count
    in no scale and become NaN, in just the results that they reach. Rounding counts as the identity: forward mode and
    second derivatives run in high precision. Of nested wrappers the inner one wins. Micikevicius et al., FP8 Formats
    for Deep Learning, 2022. Raises `FunctitanError`.

    >>> import functitan as ft
    >>> matmul = lambda x, w: ft.einsum("batch embed, embed mlp -> batch mlp", x, w)
    >>> float8(matmul, emulate=True)(torch.full((1, 2), 3.0), torch.full((2, 1), 0.5))
    tensor([[3.0000]])
    >>> y, state = float8(matmul, recipe="delayed", emulate=True, history=2)(torch.ones(1, 2), torch.ones(2, 1), None)
    >>> state.operands
    tensor([[1., 0.],
            [1., 0.]])
    """
    check_function(fn, "ft.float8")
    _check(recipe, filter, scales, history)
    chosen = filter if filter is None or callable(filter) else frozenset(filter)
    told = Float8(recipe, emulate, chosen, _by_pattern(scales))

    @functools.wraps(fn)
    def inside(*args: Any, **kwargs: Any) -> Any:
        if told.recipe.source == "state":
            return _delayed(fn, told, history, args, kwargs)
        with using(current().lowered_by(lowering(told))):
            return fn(*args, **kwargs)

    return inside


def outside(env: Env) -> str:
    """The complaint about a state that a program captured here would not be given, or the empty string."""
    told = env.find(Float8)
    held = told is not None and told.delayed is not None
    return "the state of the ft.float8(recipe='delayed') around it is no argument of it" if held else ""


def _delayed(fn: Callable[..., Any], told: Float8, history: int, args: Any, kwargs: Any) -> Any:
    if not args:
        raise FunctitanError(report("ft.float8(recipe='delayed')", ["there is no state"], _FIX_LAST))
    *args, state = args
    _check_state(state)
    rows = (0, 0) if state is None else (state.operands.shape[0], state.cotangents.shape[0])
    known = [None if state is None or not n else state[i].amax(1) for i, n in enumerate(rows)]
    delayed = Delayed((known[0], known[1]), rows, history)
    env = current()
    with using(env.lowered_by(lowering(told._replace(delayed=delayed)))):
        out = fn(*args, **kwargs)
    return out, delayed.next(state, functools.partial(_of_all_ranks, env, delayed))


def _of_all_ranks(env: Env, delayed: Delayed, maxima: Tensor) -> Tensor:
    mesh = delayed.meshes[0] if delayed.meshes else None
    dims = () if mesh is None else tuple(dim for dim in mesh.sizes.dims if dim != "pp" and mesh.sizes.size(dim) > 1)
    if not dims:
        return maxima
    label = Label("float8", f"{maxima.numel()} maxima")
    return send("all_reduce", maxima, dims, env._replace(mesh=mesh, phase="update"), label, "max")


def _by_pattern(scales: Any) -> tuple[tuple[str, tuple[float, ...]], ...]:
    if scales is None:
        return ()
    named = scales if isinstance(scales, Mapping) else {"": scales}
    return tuple((pattern, tuple(map(float, triple))) for pattern, triple in named.items())


def _check(recipe: Any, filter: Any, scales: Any, history: Any) -> None:
    problems = []
    if recipe not in RECIPES:
        problems.append(f"there is no recipe {recipe!r}{nearest(str(recipe), set(RECIPES))}; there are {list(RECIPES)}")
    if not (filter is None or callable(filter) or _names(filter)):
        problems.append(f"filter is {filter!r}: give a predicate of a Matmul, or a list of axis names")
    if (recipe == "static") != (scales is not None):
        problems.append(f"scales is {scales!r}: recipe 'static' alone is given scales")
    elif scales is not None and not _are_scales(scales):
        problems.append(f"scales is {scales!r}: give three positive numbers, (x, weight, cotangent), or a dict of such")
    if type(history) is not int or history < 1:
        problems.append(f"history is {history!r}: it counts steps, from 1")
    if problems:
        fix = "write as in ft.float8(fn, recipe='rowwise', filter=['vocab'])"
        raise FunctitanError(report("ft.float8", problems, fix))


def _names(filter: Any) -> bool:
    named = isinstance(filter, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in filter)
    return named and all(len(parse_axes(name)) == 1 for name in filter)


def _are_scales(scales: Any) -> bool:
    triples = list(scales.values()) if isinstance(scales, Mapping) else [scales]
    return all(
        isinstance(triple, Sequence) and len(triple) == 3 and all(isinstance(s, (int, float)) and s > 0 for s in triple)
        for triple in triples
    )


def _check_state(state: Any) -> None:
    if state is None:
        return
    if not isinstance(state, DelayedState):
        problem = f"the last argument is a {type(state).__name__}, not the state"
        raise FunctitanError(report("ft.float8(recipe='delayed')", [problem], _FIX_LAST))
    problems = [
        f"state.{name} is {tuple(x.shape)}: [tensors, history] is wanted"
        for name, x in state._asdict().items()
        if not isinstance(x, torch.Tensor) or x.dim() != 2
    ]
    if problems:
        raise FunctitanError(report("ft.float8(recipe='delayed')", problems, FIX_STATE))


FIX_DELAYED = "wrap inside: ft.{}(ft.float8(fn, recipe='delayed'))"
_FIX_LAST = "give it as the last argument, None at first: out, state = ft.float8(fn, recipe='delayed')(*args, state)"
