"""A copy of what a rank writes, so that training may go on while it is written.

Invariant: there is one such copy at most: its buffers are used again by the next save, and stay in host memory, pinned
for CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functitan.checkpoint.write import Part

Buffers = dict[str, Tensor]


def staged(part: Part, buffers: Buffers) -> tuple[Part, Buffers]:
    """The part with its tensors copied into buffers, those given where they fit; and the buffers to give next time."""
    kept: Buffers = {}
    blocks = []
    for path, offsets, value in part.blocks:
        if isinstance(value, Tensor):
            buffer = buffers.get(path)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                pin = value.is_cuda
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=pin)
            kept[path] = buffer
            value = buffer.copy_(value.detach(), non_blocking=True)
        blocks.append((path, offsets, value))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return part._replace(blocks=blocks), kept
