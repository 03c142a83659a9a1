"""What language models share: a vocabulary padded so that mesh dims divide it, the loss of the next token, stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functitan import tree
from functitan.errors import FunctitanError, report
from functitan.ops.lookup import iota
from functitan.ops.loss import IGNORE, cross_entropy
from functitan.ops.reduce import reduce
from functitan.pipeline.stages import Stage
from functitan.sharding.mesh import is_size


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
    return counted(cross_entropy("batch seq vocab, batch seq ->", logits, labels), labels)


def counted(total: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A sum of losses, and the number of labels, "batch seq", that count."""
    return total, reduce("batch seq ->", (labels != IGNORE).to(total.dtype))


def stages_of(
    model: str,
    declared: tree.Tree,
    layers: Sequence[range],
    begin: tuple[tuple[str, ...], Callable[..., Tensor]],
    block: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
    end: tuple[tuple[str, ...], Callable[..., Tensor]],
) -> list[Stage]:
    """The stages of a model with these layers each, one range after the other; the last gives the loss.

    `begin` has the names of the parameters before the layers, and `f(params, tokens, positions) -> x`; `end` those
    after them, and `f(params, x) -> logits`; `block(layer, x, positions, segments) -> x`. Raises `FunctitanError`.
    """
    count = len(declared["layers"])
    blocks = [block] * count if callable(block) else list(block)
    problems = [] if len(blocks) == count else [f"{len(blocks)} functions of blocks for {count} layers"]
    if [i for its in layers for i in its] != list(range(count)):
        problems.append(f"layers {list(map(list, layers))} are not 0 to {count - 1}, each once and in order")
    if problems:
        fix = f"cut them by ft.pipeline.partition({count}, num_stages)"
        raise FunctitanError(report(f"{model}.stages", problems, fix))

    def stage(number: int) -> Stage:
        is_first, is_last = number == 0, number == len(layers) - 1
        names = dict.fromkeys((*(begin[0] if is_first else ()), *(end[0] if is_last else ())))
        own = {name: declared[name] for name in names}
        own["layers"] = {i: declared["layers"][i] for i in layers[number]}

        def run(params: tree.Tree, x: Any, batch: dict[str, Tensor], key: Any) -> Any:
            check_batch(model, batch)
            x = begin[1](params, batch["tokens"], batch.get("positions")) if is_first else x
            for i in layers[number]:
                x = blocks[i](params["layers"][i], x, batch.get("positions"), batch.get("segments"))
            return next_token_loss(end[1](params, x), batch["labels"]) if is_last else x

        return Stage(own, run)

    return [stage(number) for number in range(len(layers))]


def bad_sizes(config: Any, names: tuple[str, ...]) -> list[str]:
    """A complaint for each of these entries of a config that is no whole number of at least 1."""
    sizes = ((name, getattr(config, name)) for name in names)
    return [f"{name} is {n!r}: it must be a whole number of at least 1" for name, n in sizes if not is_size(n)]


def check_params(model: str, given: tree.Tree, declared: tree.Tree) -> None:
    """Raise `FunctitanError` for parameters of another model, or of another number of layers."""
    if tree.flatten(given)[1] != tree.flatten(declared)[1]:
        problems = tree.mismatches(declared, given, "this config", "the parameters")
        fix = f"give the config that the parameters were declared with: ft.init({model}.params(config), key)"
        raise FunctitanError(report(f"{model}.apply", problems, fix))


def marks_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a batch says of its tokens besides: "positions" and "segments", as `apply` takes them."""
    return {name: batch[name] for name in ("positions", "segments") if name in batch}


def check_batch(model: str, batch: dict[str, Tensor]) -> None:
    """Raise `FunctitanError` for a batch without tokens or labels."""
    missing = [f"there is no {name!r}" for name in ("tokens", "labels") if name not in batch]
    if missing:
        fix = "give {'tokens': ..., 'labels': ...}, 'batch seq'"
        raise FunctitanError(report(f"{model}.loss: the batch", missing, fix))
