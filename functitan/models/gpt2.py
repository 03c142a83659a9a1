"""GPT-2 (Radford et al., Language Models are Unsupervised Multitask Learners, 2019), without dropout.

Invariant: nothing here mentions devices; every tensor's layout follows from its pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from torch import Tensor

from functitan import tree
from functitan.errors import FunctitanError, report
from functitan.models import llama
from functitan.models.language import (
    bad_sizes,
    check_batch,
    check_params,
    marks_of,
    mask_padding,
    next_token_loss,
    padded,
    stages_of,
)
from functitan.nn import attention, layer_norm, mlp, position_embedding
from functitan.ops.einsum import einsum
from functitan.ops.lookup import take
from functitan.param import Param, normal
from functitan.pipeline.stages import Stage

RULES = llama.RULES.replace(positions=None)


class GPT2Config(NamedTuple):
    """The sizes of a GPT-2; `config._replace(...)` gives another."""

    vocab_size: int
    context: int
    embed: int
    num_layers: int
    num_heads: int
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """The heads share the embedding."""
        return self.embed // self.num_heads

    @property
    def mlp(self) -> int:
        """The hidden layer is four times as wide as the embedding."""
        return 4 * self.embed

    @property
    def padded_vocab(self) -> int:
        """The vocabulary rounded up to a multiple of 128, so that mesh dims divide it; padded logits are -inf."""
        return padded(self.vocab_size)


DEBUG = GPT2Config(2048, 256, 256, 6, 8)
GPT2 = GPT2Config(50257, 1024, 768, 12, 12)
GPT2_MEDIUM = GPT2Config(50257, 1024, 1024, 24, 16)
GPT2_LARGE = GPT2Config(50257, 1024, 1280, 36, 20)
GPT2_XL = GPT2Config(50257, 1024, 1600, 48, 25)
CONFIGS = {
    "debug": DEBUG, "gpt2": GPT2, "gpt2-medium": GPT2_MEDIUM, "gpt2-large": GPT2_LARGE, "gpt2-xl": GPT2_XL
}  # fmt: skip


def params(config: GPT2Config) -> tree.Tree:
    """The tree of declarations. The embedding serves as output too.

    Raises `FunctitanError` for sizes that no GPT-2 can have.
    """
    _check_config(config)
    return {
        "embedding": Param("vocab embed", (config.padded_vocab, config.embed), normal(0.02)),
        "positions": position_embedding.params(config.context, config.embed, init=normal(0.02)),
        "layers": [block_params(config) for _ in range(config.num_layers)],
        "norm": layer_norm.params(config.embed),
    }


def block_params(config: GPT2Config) -> tree.Tree:
    """The declarations of one block; what adds to the residual stream begins smaller, by the number of its addends."""
    embed, heads = config.embed, config.num_heads
    inits = dict(init=normal(0.02), out_init=normal(0.02 * (2 * config.num_layers) ** -0.5))
    return {
        "attention_norm": layer_norm.params(embed),
        "attention": attention.params(embed, heads, heads, config.head_dim, bias=True, **inits),
        "mlp_norm": layer_norm.params(embed),
        "mlp": mlp.params(embed, config.mlp, **inits),
    }


def block(
    params: tree.Tree, x: Tensor, config: GPT2Config, positions: Tensor | None = None, segments: Tensor | None = None
) -> Tensor:
    """One block, "batch seq embed" to the same: x + attention(norm(x)), then x + mlp(norm(x))."""
    x = x + attention.apply(
        params["attention"], layer_norm.apply(params["attention_norm"], x, eps=config.norm_eps),
        theta=None, positions=positions, segments=segments,
    )  # fmt: skip
    return x + mlp.apply(params["mlp"], layer_norm.apply(params["mlp_norm"], x, eps=config.norm_eps))


def apply(
    params: tree.Tree,
    tokens: Tensor,
    config: GPT2Config,
    *,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    block: Callable[..., Tensor] = block,
) -> Tensor:
    """Logits "batch seq vocab" of tokens "batch seq" (int64), at most `config.context` of them.

    `block` replaces the function of a block: `functools.partial` or any wrapper of `gpt2.block`.
    """
    check_params("gpt2", params, _declared(config))
    x = _begin(params, tokens, positions)
    for layer in params["layers"]:
        x = block(layer, x, config, positions, segments)
    return _end(params, x, config)


def loss(params: tree.Tree, batch: dict[str, Tensor], config: GPT2Config, **options: Any) -> tuple[Tensor, Tensor]:
    """(sum of the cross entropies, number of labels that count) of {"tokens", "labels"}, both "batch seq".

    A batch may have "positions" and "segments" too, of packed documents: positions that begin anew tell them apart.
    """
    check_batch("gpt2", batch)
    options = marks_of(batch) | options
    return next_token_loss(apply(params, batch["tokens"], config, **options), batch["labels"])


def stages(config: GPT2Config, layers: Sequence[range], *, block: Callable[..., Tensor] = block) -> list[Stage]:
    """The stages of `ft.pipeline`, of these layers each; the last gives `loss`.

    The batch may have "positions" and "segments" too. The embedding is in the first stage and in the last. Raises
    `FunctitanError`.

    >>> import functitan as ft
    >>> [list(s.declarations) for s in stages(DEBUG, ft.pipeline.partition(6, 2))]
    [['embedding', 'positions', 'layers'], ['norm', 'embedding', 'layers']]
    """
    run = lambda params, x, positions, segments: block(params, x, config, positions, segments)
    begin = ("embedding", "positions"), _begin
    end = ("norm", "embedding"), partial(_end, config=config)
    return stages_of("gpt2", _declared(config), layers, begin, run, end)


def _begin(params: tree.Tree, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    x = take("batch seq, vocab embed -> batch seq embed", tokens, params["embedding"])
    return position_embedding.apply(params["positions"], x, positions=positions)


def _end(params: tree.Tree, x: Tensor, config: GPT2Config) -> Tensor:
    x = layer_norm.apply(params["norm"], x, eps=config.norm_eps)
    logits = einsum("batch seq embed, vocab embed -> batch seq vocab", x, params["embedding"])
    return mask_padding(logits, config.vocab_size)


def _check_config(config: GPT2Config) -> None:
    problems = bad_sizes(config, _SIZES)
    if not problems and config.embed % config.num_heads:
        problems.append(f"embed {config.embed} is not a multiple of num_heads {config.num_heads}")
    if problems:
        raise FunctitanError(report("GPT2Config", problems, "begin with one of gpt2.CONFIGS, and use _replace"))


@cache
def _declared(config: GPT2Config) -> tree.Tree:
    return params(config)


_SIZES = ("vocab_size", "context", "embed", "num_layers", "num_heads")
