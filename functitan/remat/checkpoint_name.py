"""`ft.checkpoint_name`: a name for a tensor, by which policies of `ft.remat` store it.

Invariant: it is the identity, and costs nothing outside `ft.remat`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from functitan.errors import FunctitanError, report
from functitan.ops.function import Call, Op, apply, hidden_axes
from functitan.remat.memo import NAME
from functitan.sharding.context import current


def checkpoint_name(x: Tensor, name: str) -> Tensor:
    """`x`, which `ft.remat(fn, policy=ft.remat_policies.save_only_these_names(name))` stores, not computes again.

    Name an op's own result where you can (`checkpoint_name(ft.einsum(...), "attn_out")`): then the op is spared, too.
    Transpose: the identity. Raises `FunctitanError` for a name that is no text.

    >>> import torch
    >>> checkpoint_name(torch.ones(2), "ones")
    tensor([1., 1.])
    """
    if not isinstance(name, str) or not name:
        problem = f"the name is {name!r}"
        raise FunctitanError(report("ft.checkpoint_name", [problem], "give a text: checkpoint_name(x, 'attn_out')"))
    env = current()
    if not env.sees_every_op:
        return x
    hidden = (hidden_axes(x, env),)
    return apply(Call(_NAMED, env, name, hidden, hidden), x)[0]


def _vjp(call: Call, tensors: Any, results: Any, grads: tuple[Tensor | None, ...], wanted: tuple[int, ...]) -> Any:
    return grads


_NAMED = Op(
    NAME,
    run=lambda call, x: (x,),
    vjp=_vjp,
    jvp=lambda call, tensors, results, tangents: tangents,
    show=lambda call, *_: call.static,
    saves_operands=False,
)
