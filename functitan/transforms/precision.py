"""`ft.precision`: the same function, computed in another dtype from float32 master parameters.

Invariant: nothing is cast where the function is entered, so its cotangents have the dtypes of its arguments: each named
op casts its operands where they lie, and keeps the precision for its own backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from functitan.errors import FunctitanError, report
from functitan.sharding.context import current, using
from functitan.sharding.mesh import check_dim
from functitan.sharding.precision import Precision

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def precision(
    fn: Callable[..., Any],
    *,
    compute: torch.dtype = torch.bfloat16,
    reduce: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
) -> Callable[..., Any]:
    """A function that runs `fn` with its named ops in `compute`, and sums over ranks in `reduce`.

    `ft.einsum`, `ft.take`, `ft.broadcast` and `ft.attention` cast every floating operand to `compute`, a float64 one
    too, on its shard and before it is gathered; their results have that dtype. Cotangents have their operand's dtype:
    a float32 parameter's is summed over ranks in `reduce`, and not rounded after. `reduce` is one dtype, or one for
    each mesh dim that it names (float32 for others); a sum over several takes the widest. Sums, means and logsumexps
    of `ft.reduce`, norms and losses stay in float32 or better; `ft.reduce` of bfloat16 gives float32.

    Plain torch ops between named ones are left alone. Of nested wrappers the inner one wins, so
    `precision(router, compute=torch.float32)` keeps a part of `fn` in full; on float32 tensors that changes nothing.
    Micikevicius et al., Mixed Precision Training, 2018. Raises `FunctitanError`.

    >>> import functitan as ft
    >>> matmul = lambda w, x: ft.einsum("batch embed, embed mlp -> batch mlp", x, w)
    >>> w, x = torch.ones(3, 4), torch.ones(2, 3)
    >>> ft.precision(matmul)(w, x).dtype
    torch.bfloat16
    >>> ft.grad(ft.precision(lambda w: ft.reduce("batch mlp ->", matmul(w, x))))(w).dtype
    torch.float32
    """
    _check(compute, reduce)
    named = tuple(reduce.items()) if isinstance(reduce, Mapping) else ()
    value = Precision(compute, named, torch.float32 if isinstance(reduce, Mapping) else reduce)

    @functools.wraps(fn)
    def inside(*args: Any, **kwargs: Any) -> Any:
        env = current()
        _check_dims(value, env.mesh.sizes if env.mesh is not None else None)
        with using(env._replace(precision=value)):
            return fn(*args, **kwargs)

    return inside


def _check(compute: Any, reduce: Any) -> None:
    asked = {f"reduce[{dim!r}]": dtype for dim, dtype in reduce.items()} if isinstance(reduce, Mapping) else {}
    asked = {"compute": compute} | (asked if isinstance(reduce, Mapping) else {"reduce": reduce})
    problems = [f"{name} is {dtype!r}" for name, dtype in asked.items() if dtype not in _FLOATS]
    if problems:
        raise FunctitanError(report("ft.precision", problems, _FIX_DTYPES))


def _check_dims(value: Precision, mesh: Any) -> None:
    """A name that no mesh has would leave its sums in float32 silently."""
    if mesh is None:
        return
    problems = [f"reduce: {complaint}" for dim, _ in value.reduce if (complaint := check_dim(dim, mesh))]
    if problems:
        raise FunctitanError(report("ft.precision", problems, "use the mesh's dims, or one dtype for all of them"))


_FIX_DTYPES = "give torch.bfloat16, float16, float32 or float64; reduce= may be a dict of them by mesh dim"
