"""Kernels over lists of leaves: one call for all of them, not a Python loop of small ops.

Invariant: a kernel whose name ends in `_` writes only into tensors that `owned` has given out. The one user of
`torch._foreach_*`, `torch._fused_adamw_` and `UntypedStorage._cdata` in this package (tried on torch 2.13).
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from functitan.ops.function import transforms_active


def owned(leaves: list[Tensor], donate: bool | str) -> list[Tensor]:
    """Contiguous tensors that may be written: where donated the leaves themselves, which a caller took, else copies.

    Autograd may give one tensor as the gradient of two leaves, or an expanded one: such leaves are copied even so.
    """
    if not donate:
        return [x.clone(memory_format=torch.contiguous_format) for x in leaves]
    seen = set()
    mine = []
    for x in leaves:
        place = (x.untyped_storage()._cdata, x.storage_offset())
        mine.append(x.clone(memory_format=torch.contiguous_format) if place in seen else x.contiguous())
        seen.add(place)
    return mine


def wide_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """The dtype to sum in, of real numbers: the widest of these, float32 at least."""
    return reduce(torch.promote_types, {dtype.to_real() for dtype in dtypes}, torch.float32)


def scale_(xs: list[Tensor], factor: float | Tensor) -> None:
    """`x *= factor`, a number or a tensor `[]`."""
    if isinstance(factor, Tensor):  # in the dtype of the leaves it is one kernel on CUDA
        factor = factor.to(wide_dtype([x.dtype for x in xs]))
    if xs:
        torch._foreach_mul_(xs, factor)  # with a tensor add_ would read its value, mul_ does not


def add_(xs: list[Tensor], ys: list[Tensor], alpha: float = 1.0) -> None:
    """`x += alpha * y`."""
    if xs:
        torch._foreach_add_(xs, ys, alpha=alpha)


def copy_(xs: list[Tensor], ys: list[Tensor]) -> None:
    """`x[:] = y`."""
    if xs:
        torch._foreach_copy_(xs, ys)


def scale_each_(xs: list[Tensor], factors: list[Tensor]) -> None:
    """`x *= factor`, a tensor `[]` for each."""
    for x, factor in zip(xs, factors, strict=True):
        x.mul_(factor)


def lerp_(xs: list[Tensor], ys: list[Tensor], weight: float) -> None:
    """`x += weight * (y - x)`."""
    if xs:
        torch._foreach_lerp_(xs, ys, weight)


def squares(xs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of the squares of each tensor, `[len(xs)]`, in `dtype`."""
    assert xs
    xs = [torch.view_as_real(x) if x.is_complex() else x for x in xs]
    return torch.stack(torch._foreach_norm(xs, 2.0, dtype=dtype)).square()


def extremes(xs: list[Tensor]) -> Tensor:
    """Values `[n]` in float32 or wider that are all finite if and only if all elements are: one pass over them."""
    xs = [torch.view_as_real(x) if x.is_complex() else x for x in xs if x.numel()]
    dtype = wide_dtype([x.dtype for x in xs])
    if not xs:
        return torch.zeros(0, dtype=dtype)
    if all(x.device.type == "cpu" for x in xs):  # where the infinity norm is not vectorized: 10 times slower
        return torch.stack([end.to(dtype) for x in xs for end in x.aminmax()])
    return torch.stack([norm.to(dtype) for norm in torch._foreach_norm(xs, float("inf"))])


def adam_(
    grads: list[Tensor], mu: list[Tensor], nu: list[Tensor], count: Tensor, b1: float, b2: float, eps: float
) -> None:
    """One step of Adam's moments; the direction is written over `grads`. `count` `[]` is the number of this step.

    `mu = b1 mu + (1 - b1) g`, `nu = b2 nu + (1 - b2) g²`, `g = mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps)`.
    """
    if not grads:
        return
    if _fuses([*grads, *mu, *nu]):
        # The fused step is p = (1 - lr wd) p - lr direction. lr = wd = -1 leave the direction alone, so p can be the
        # gradients' own memory: each element is read before it is written. 7 times as fast as what follows.
        steps = [count.to(torch.float32)] * len(grads)
        increment_version([*grads, *mu, *nu])  # which says that they were written into; the fused step forgets it
        torch._fused_adamw_(
            grads, grads, mu, nu, [], steps,
            lr=-1.0, beta1=b1, beta2=b2, weight_decay=-1.0, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        return
    if any(x.dtype.itemsize < 4 for xs in (grads, mu, nu) for x in xs):  # eps and squares would be lost
        g, m, n = ([x.to(wide_dtype([x.dtype])) for x in xs] for xs in (grads, mu, nu))
        adam_(g, m, n, count, b1, b2, eps)
        for xs, ys in ((grads, g), (mu, m), (nu, n)):
            copy_(xs, ys)
        return
    lerp_(mu, grads, 1 - b1)
    torch._foreach_mul_(nu, b2)
    torch._foreach_addcmul_(nu, grads, grads, 1 - b2)
    t = count.to(torch.float64)
    bottom = list(torch._foreach_sqrt(nu))
    scale_(bottom, (1 - b2**t).rsqrt())
    torch._foreach_add_(bottom, eps)
    copy_(grads, mu)
    torch._foreach_div_(grads, bottom)
    scale_(grads, 1 / (1 - b1**t))


def lion_(grads: list[Tensor], mu: list[Tensor], b1: float, b2: float) -> None:
    """One step of Lion's moment, `mu = b2 mu + (1 - b2) g`; `g = sign(b1 mu + (1 - b1) g)` with the moment before."""
    if not grads:
        return
    direction = list(torch._foreach_lerp(mu, grads, 1 - b1))
    torch._foreach_sign_(direction)
    lerp_(mu, grads, 1 - b2)
    copy_(grads, direction)


def _fuses(tensors: list[Tensor]) -> bool:
    """Only where it runs at once: a compiler would not see that operands share memory, and fuses plain ops better.

    CPU only: elsewhere it is untried that the direction may overwrite the gradients.
    """
    traced = torch.compiler.is_compiling() or get_proxy_mode() is not None or transforms_active()
    return not traced and all(x.device.type == "cpu" for x in tensors)
