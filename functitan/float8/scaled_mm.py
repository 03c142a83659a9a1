"""Products of float8 matrices by `torch._scaled_mm`: its only user (private; tried on torch 2.13).

Invariant: the numbers are those of the emulated product, in another order of summation: sums in float32, times both
scales, rounded once to the dtype of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functitan.errors import FunctitanError, PatternError, report

MULTIPLE = 16  # of what is summed, and of columns: bytes that the kernels load at once


def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """`(a * a_scale) @ (b * b_scale)` of "m k" and "k n" in float8, with scales [m or 1, 1] and [1, n or 1].

    A batch may stand before. `fast` lets CUDA sum in fewer bits, as torchao does in forward.
    """
    if a.dim() == 3:
        scales = a_scale.expand(a.shape[0], -1, -1), b_scale.expand(a.shape[0], -1, -1)
        each = zip(a, b, *scales, strict=True)
        return torch.stack([scaled_mm(x, y, s, t, dtype, fast) for x, y, s, t in each])
    wide = dtype if dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.float32
    left, right = a.contiguous(), b.mT.contiguous().mT
    if a_scale.numel() == 1 == b_scale.numel():
        scales = a_scale.reshape(()), b_scale.reshape(())
        return torch._scaled_mm(left, right, *scales, out_dtype=wide, use_fast_accum=fast).to(dtype)
    if a.is_cuda and wide != torch.bfloat16:  # the kernel for rows gives bfloat16 alone
        one = torch.ones((), device=a.device)
        out = torch._scaled_mm(left, right, one, one, out_dtype=torch.float32, use_fast_accum=fast)
        return (out * a_scale * b_scale).to(dtype)
    rows = a_scale.flatten().expand(a.shape[0]).contiguous()[:, None]
    columns = b_scale.flatten().expand(b.shape[1]).contiguous()[None]
    return torch._scaled_mm(left, right, rows, columns, out_dtype=wide, use_fast_accum=fast).to(dtype)


def check_matrices(a: Tensor, b: Tensor, what: str) -> None:
    """Raise `PatternError` for sizes that the kernels do not take: the columns, and what is summed."""
    named = (("the axes summed", a.shape[-1]), ("the columns of the right operand", b.shape[-1]))
    problems = [f"{name} have size {n} on this rank: no multiple of {MULTIPLE}" for name, n in named if n % MULTIPLE]
    if problems:
        raise PatternError(report(what, problems, FIX_SIZES))


def check_device(device: torch.device, what: str) -> None:
    """Raise `FunctitanError` for a device without float8 kernels."""
    if device.type in ("cpu", "meta"):
        return
    found = f"device {device}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 9):
            return
        found = f"{torch.cuda.get_device_name(device)} (sm{major}{minor})"
    problem = f"{found} has no float8 kernels: they need CUDA sm89 (Ada, Hopper) or later, or a CPU"
    raise FunctitanError(report(what, [problem], "ft.float8(fn, emulate=True) computes the same numbers anywhere"))


FIX_SIZES = (
    f"pad these axes to multiples of {MULTIPLE} on each rank (vocabulary: config.padded_vocab; sequence or batch: the "
    "product of their shards), leave the einsum out by ft.float8(filter=lambda mm: mm.k % 16 == 0 == mm.n % 16), or "
    "compute the same numbers by ft.float8(emulate=True)"
)
