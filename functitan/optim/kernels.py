"""Kernels over lists of leaves: functions, which write in place only where nothing can tell.

Invariant: a kernel gives the values of one plain formula, leaf by leaf. That formula itself runs wherever a derivative
is taken or a vmap is at work; elsewhere it is one call for all leaves, into memory that is new or was donated. The one
user of `torch._foreach_*`, `torch._fused_adamw_` and `UntypedStorage._cdata` in this package (tried on torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from functitan.errors import FunctitanError, report
from functitan.ops.function import transforms_active

Leaves = list[Tensor]


def transformed(*lists: Iterable[Tensor]) -> bool:
    """True where a derivative of what is made of these tensors may be asked for, or a vmap batches them."""
    if transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for xs in lists for x in xs)


def refuse_donation(donate: bool | str) -> None:
    """Raise `FunctitanError` for memory to write into where a graph may need what stands there."""
    if donate:
        problem = "it is differentiated, or under vmap: the values that donate=True overwrites are needed there"
        raise FunctitanError(report("an optimizer's update", [problem], "leave donate out, or let it be False"))


def owned(leaves: Leaves, donate: bool | str) -> Leaves:
    """Contiguous tensors that may be written: where donated the leaves themselves, which a caller took, else copies.

    Autograd may give one tensor as the gradient of two leaves, or an expanded one: such leaves are copied even so.
    """
    if not donate:
        return [x.clone(memory_format=torch.contiguous_format) for x in leaves]
    if transformed(leaves):
        refuse_donation(donate)
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


def root(x: Tensor) -> Tensor:
    """The square root of what is not negative, whose derivative at 0 is 0: that of a norm, not that of a root."""
    if not transformed((x,)):
        return x.sqrt()
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def scaled(xs: Leaves, factor: float | Tensor, donate: bool | str = False) -> Leaves:
    """`x * factor`, a number or a tensor `[]`, in the dtype of x."""
    if isinstance(factor, Tensor):  # in the dtype of the leaves it is one kernel on CUDA
        factor = factor.to(wide_dtype([x.dtype for x in xs]))
    if transformed(xs, [factor] if isinstance(factor, Tensor) else []):
        refuse_donation(donate)
        return [(x * factor).to(x.dtype) for x in xs]
    xs = owned(xs, donate)
    if xs:
        torch._foreach_mul_(xs, factor)  # with a tensor add_ would read its value, mul_ does not
    return xs


def scaled_each(xs: Leaves, factors: Leaves, donate: bool | str = False) -> Leaves:
    """`x * factor`, a tensor `[]` for each, in the dtype of x."""
    if transformed(xs, factors):
        refuse_donation(donate)
        return [(x * factor).to(x.dtype) for x, factor in zip(xs, factors, strict=True)]
    xs = owned(xs, donate)
    for x, factor in zip(xs, factors, strict=True):
        x.mul_(factor)
    return xs


def added(xs: Leaves, ys: Leaves, alpha: float = 1.0, donate: bool | str = False) -> Leaves:
    """`x + alpha * y`."""
    if transformed(xs, ys):
        refuse_donation(donate)
        return [torch.add(x, y, alpha=alpha) for x, y in zip(xs, ys, strict=True)]
    xs = owned(xs, donate)
    if xs:
        torch._foreach_add_(xs, ys, alpha=alpha)
    return xs


def replaced(x: Tensor, y: Tensor, factor: float) -> Tensor:
    """`y * factor` in the dtype of `x`, which is the caller's own, and may be written over."""
    if transformed((x, y)):
        return y.to(x.dtype) * factor
    return x.copy_(y).mul_(factor)


def copied(xs: Leaves, ys: Leaves, donate: bool | str = False) -> Leaves:
    """The values of `ys` in tensors of their own: where donated, those of `xs`."""
    if not donate:
        return [y.clone() for y in ys]
    if transformed(xs, ys):
        refuse_donation(donate)
    xs = owned(xs, True)
    if xs:
        torch._foreach_copy_(xs, ys)
    return xs


def moved(xs: Leaves, ys: Leaves, weight: float | Tensor, donate: bool | str = False) -> Leaves:
    """`x + weight * (y - x)`; the weight a number, or a tensor `[]`."""
    known = isinstance(weight, Tensor)
    of = lambda x: weight.to(x.dtype) if isinstance(weight, Tensor) else weight
    if transformed(xs, ys, [weight] if isinstance(weight, Tensor) else []):
        refuse_donation(donate)
        return [torch.lerp(x, y, of(x)) for x, y in zip(xs, ys, strict=True)]
    xs = owned(xs, donate)
    if known:
        for x, y in zip(xs, ys, strict=True):
            x.lerp_(y, of(x))
    elif xs:
        torch._foreach_lerp_(xs, ys, weight)
    return xs


def squares(xs: Leaves, dtype: torch.dtype) -> Tensor:
    """The sum of the squares of each tensor, `[len(xs)]`, in `dtype`."""
    assert xs
    if transformed(xs):
        return torch.stack([square(x, dtype).sum() for x in xs])
    xs = [torch.view_as_real(x) if x.is_complex() else x for x in xs]
    return torch.stack(torch._foreach_norm(xs, 2.0, dtype=dtype)).square()


def square(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The square of each element's size, in `dtype`."""
    return torch.view_as_real(x).to(dtype).square().sum(-1) if x.is_complex() else x.to(dtype).square()


def extremes(xs: Leaves) -> Tensor:
    """Values `[n]` in float32 or wider that are all finite if and only if all elements are: one pass over them."""
    xs = [torch.view_as_real(x) if x.is_complex() else x for x in xs if x.numel()]
    dtype = wide_dtype([x.dtype for x in xs])
    if not xs:
        return torch.zeros(0, dtype=dtype)
    if transformed(xs):
        return torch.stack([x.detach().abs().amax().to(dtype) for x in xs])
    if all(x.device.type == "cpu" for x in xs):  # where the infinity norm is not vectorized: 10 times slower
        return torch.stack([end.to(dtype) for x in xs for end in x.aminmax()])
    return torch.stack([norm.to(dtype) for norm in torch._foreach_norm(xs, float("inf"))])


def adam(
    grads: Leaves, mu: Leaves, nu: Leaves, count: Tensor, b1: float, b2: float, eps: float, donate: bool | str = False
) -> tuple[Leaves, Leaves, Leaves]:
    """One step of Adam's moments: the directions, `mu` and `nu`. `count` `[]` is the number of this step.

    `mu = b1 mu + (1 - b1) g`, `nu = b2 nu + (1 - b2) g²`, `mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps)`: in float32
    or wider, whatever the dtype of the leaves, so that `eps` and squares are not lost.
    """
    if transformed(grads, mu, nu):
        refuse_donation(donate)
        each = [_adam(g, m, n, count, b1, b2, eps) for g, m, n in zip(grads, mu, nu, strict=True)]
        first, second, third = ([its[k] for its in each] for k in range(3))
        return first, second, third
    grads, mu, nu = owned(grads, donate), owned(mu, donate), owned(nu, donate)
    if grads and _fuses([*grads, *mu, *nu]):
        # The fused step is p = (1 - lr wd) p - lr direction. lr = wd = -1 leave the direction alone, so p can be the
        # gradients' own memory: each element is read before it is written. 7 times as fast as what follows.
        steps = [count.to(torch.float32)] * len(grads)
        increment_version([*grads, *mu, *nu])  # which says that they were written into; the fused step forgets it
        torch._fused_adamw_(
            grads, grads, mu, nu, [], steps,
            lr=-1.0, beta1=b1, beta2=b2, weight_decay=-1.0, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
    elif grads:
        _adam_(grads, mu, nu, count.to(torch.float64), b1, b2, eps)
    return grads, mu, nu


def lion(grads: Leaves, mu: Leaves, b1: float, b2: float, donate: bool | str = False) -> tuple[Leaves, Leaves]:
    """One step of Lion: the directions `sign(b1 mu + (1 - b1) g)`, and `mu = b2 mu + (1 - b2) g`."""
    if transformed(grads, mu):
        refuse_donation(donate)
        return [x.sign() for x in moved(mu, grads, 1 - b1)], moved(mu, grads, 1 - b2)
    grads, mu = owned(grads, donate), owned(mu, donate)
    if grads:
        direction = list(torch._foreach_lerp(mu, grads, 1 - b1))
        torch._foreach_sign_(direction)
        torch._foreach_lerp_(mu, grads, 1 - b2)
        torch._foreach_copy_(grads, direction)
    return grads, mu


def momentum(
    grads: Leaves, sums: Leaves, decay: float, nesterov: bool, donate: bool | str = False
) -> tuple[Leaves, Leaves]:
    """One step of momentum: the directions, and the sums `m = decay m + g`. With `nesterov` `g + decay m`, else `m`."""
    if transformed(grads, sums):
        refuse_donation(donate)
        sums = [m * decay + g for g, m in zip(grads, sums, strict=True)]
        return (added(grads, sums, decay) if nesterov else [m.clone() for m in sums]), sums
    grads, sums = owned(grads, donate), owned(sums, donate)
    if grads:
        torch._foreach_mul_(sums, decay)
        torch._foreach_add_(sums, grads)
        if nesterov:
            torch._foreach_add_(grads, sums, alpha=decay)
        else:
            torch._foreach_copy_(grads, sums)  # not the same tensors: who comes next may write into the directions
    return grads, sums


def _adam(
    g: Tensor, mu: Tensor, nu: Tensor, count: Tensor, b1: float, b2: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam of one leaf: the formula that the kernels equal."""
    dtype, wide, t = g.dtype, wide_dtype([g.dtype]), count.to(torch.float64)
    g = g.to(wide)
    mu = torch.lerp(mu.to(wide), g, 1 - b1)
    nu = b2 * nu.to(wide) + (1 - b2) * g * g
    bottom = root(nu) * (1 - b2**t).rsqrt().to(wide) + eps
    return ((mu / bottom) * (1 / (1 - b1**t)).to(wide)).to(dtype), mu.to(dtype), nu.to(dtype)


def _adam_(grads: Leaves, mu: Leaves, nu: Leaves, t: Tensor, b1: float, b2: float, eps: float) -> None:
    """Adam in place, the directions over `grads`."""
    if any(x.dtype.itemsize < 4 for xs in (grads, mu, nu) for x in xs):  # in float32; wider leaves stay themselves
        g, m, n = ([x.to(wide_dtype([x.dtype])) for x in xs] for xs in (grads, mu, nu))
        _adam_(g, m, n, t, b1, b2, eps)
        for xs, ys in zip((grads, mu, nu), (g, m, n), strict=True):
            torch._foreach_copy_(xs, ys)
        return
    torch._foreach_lerp_(mu, grads, 1 - b1)
    torch._foreach_mul_(nu, b2)
    torch._foreach_addcmul_(nu, grads, grads, 1 - b2)
    dtype = wide_dtype([x.dtype for x in nu])
    bottom = list(torch._foreach_sqrt(nu))
    torch._foreach_mul_(bottom, (1 - b2**t).rsqrt().to(dtype))
    torch._foreach_add_(bottom, eps)
    torch._foreach_copy_(grads, mu)
    torch._foreach_div_(grads, bottom)
    torch._foreach_mul_(grads, (1 / (1 - b1**t)).to(dtype))


def _fuses(tensors: Leaves) -> bool:
    """Only where it runs at once: a compiler would not see that operands share memory, and fuses plain ops better.

    CPU only: elsewhere it is untried that the direction may overwrite the gradients.
    """
    traced = torch.compiler.is_compiling() or get_proxy_mode() is not None
    return not traced and all(x.device.type == "cpu" for x in tensors)
