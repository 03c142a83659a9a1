"""What language models share: a vocabulary padded so that mesh dims divide it, and the loss of the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from functitan.ops.lookup import iota
from functitan.ops.loss import IGNORE, cross_entropy
from functitan.ops.reduce import reduce


def padded(vocab_size: int) -> int:
    """The vocabulary rounded up to a multiple of 128: 257 and 50257 divide by nothing.

    >>> padded(50257)
    50304
    """
    return -(-vocab_size // 128) * 128


def mask_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits "batch seq vocab" of the padded vocabulary, -inf beyond the real one."""
    if padded(vocab_size) == vocab_size:
        return logits
    real = iota("batch seq vocab", "vocab", like=logits)[0, 0] < vocab_size
    return torch.where(real, logits, float("-inf"))


def next_token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the cross entropies, number of labels that count): "batch seq vocab", "batch seq"."""
    total = cross_entropy("batch seq vocab, batch seq ->", logits, labels)
    return total, reduce("batch seq ->", (labels != IGNORE).to(total.dtype))
