"""Llama 3 (The Llama 3 Herd of Models, 2024): declarations, the function, its loss, and the published sizes.

Invariant: nothing here mentions devices; every tensor's layout follows from its pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from torch import Tensor

from functitan import tree
from functitan.attention.op import attention as softmax_attention
from functitan.errors import FunctitanError, report
from functitan.models.language import (
    bad_sizes,
    check_batch,
    check_params,
    counted,
    marks_of,
    mask_padding,
    next_token_loss,
    padded,
    stages_of,
)
from functitan.nn import attention, rms_norm, swiglu
from functitan.nn.rope import RopeScaling
from functitan.ops.einsum import einsum
from functitan.ops.linear_loss import linear_cross_entropy
from functitan.ops.lookup import take
from functitan.param import Param, normal
from functitan.pipeline.stages import Stage
from functitan.sharding.rules import AxisRules

RULES = AxisRules(
    {
        "batch": ("dp", "fsdp"),
        "heads": "tp",
        "kv_heads": "tp",
        "mlp": "tp",
        "vocab": "tp",
        "seq": ("cp", "tp"),
        "embed": ("fsdp", "cp"),
        "head_dim": None,
    }
)


class LlamaConfig(NamedTuple):
    """The sizes of a Llama; `config._replace(...)` gives another."""

    vocab_size: int
    embed: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False

    @property
    def padded_vocab(self) -> int:
        """The vocabulary rounded up to a multiple of 128, so that mesh dims divide it; padded logits are -inf."""
        return padded(self.vocab_size)


DEBUG = LlamaConfig(2048, 256, 6, 8, 4, 32, 768)
LLAMA_1B = LlamaConfig(128256, 2048, 16, 32, 8, 64, 8192, rope_scaling=RopeScaling(32.0), tied=True)
LLAMA_3B = LlamaConfig(128256, 3072, 28, 24, 8, 128, 8192, rope_scaling=RopeScaling(32.0), tied=True)
LLAMA_8B = LlamaConfig(128256, 4096, 32, 32, 8, 128, 14336, rope_scaling=RopeScaling())
LLAMA_70B = LlamaConfig(128256, 8192, 80, 64, 8, 128, 28672, rope_scaling=RopeScaling())
LLAMA_405B = LlamaConfig(128256, 16384, 126, 128, 8, 128, 53248, rope_scaling=RopeScaling())
CONFIGS = {
    "debug": DEBUG, "1B": LLAMA_1B, "3B": LLAMA_3B, "8B": LLAMA_8B, "70B": LLAMA_70B, "405B": LLAMA_405B
}  # fmt: skip


def params(config: LlamaConfig) -> tree.Tree:
    """The tree of declarations. Without "unembedding" the embedding serves as output too (`config.tied`).

    Raises `FunctitanError` for sizes that no Llama can have.
    """
    _check_config(config)
    declared = {
        "embedding": Param("vocab embed", (config.padded_vocab, config.embed), normal(0.02)),
        "layers": [block_params(config) for _ in range(config.num_layers)],
        "norm": rms_norm.params(config.embed),
    }
    if not config.tied:
        declared["unembedding"] = Param("embed vocab", (config.embed, config.padded_vocab), normal(config.embed**-0.5))
    return declared


def block_params(config: LlamaConfig) -> tree.Tree:
    """The declarations of one block."""
    return {
        "attention_norm": rms_norm.params(config.embed),
        "attention": attention.params(config.embed, config.num_heads, config.num_kv_heads, config.head_dim),
        "mlp_norm": rms_norm.params(config.embed),
        "mlp": swiglu.params(config.embed, config.mlp),
    }


def block(
    params: tree.Tree,
    x: Tensor,
    config: LlamaConfig,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    *,
    attend: Callable[..., Tensor] = softmax_attention,
) -> Tensor:
    """One block, "batch seq embed" to the same: x + attention(norm(x)), then x + mlp(norm(x)).

    `attend` replaces `ft.attention`, where keys and values come from a cache too.
    """
    x = x + attention.apply(
        params["attention"], rms_norm.apply(params["attention_norm"], x, eps=config.norm_eps),
        theta=config.rope_theta, scaling=config.rope_scaling, positions=positions, segments=segments,
        attend=attend,
    )  # fmt: skip
    return x + swiglu.apply(params["mlp"], rms_norm.apply(params["mlp_norm"], x, eps=config.norm_eps))


def apply(
    params: tree.Tree,
    tokens: Tensor,
    config: LlamaConfig,
    *,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    block: Callable[..., Tensor] | Sequence[Callable[..., Tensor]] = block,
) -> Tensor:
    """Logits "batch seq vocab" of tokens "batch seq" (int64).

    `block` replaces the function of a block: `functools.partial` or any wrapper of `llama.block`, such as `ft.remat`;
    or the functions of all, in order: `[ft.remat(block) if i % 2 else block for i in range(config.num_layers)]`.
    """
    return _logits(params, hidden(params, tokens, config, positions=positions, segments=segments, block=block), config)


def hidden(
    params: tree.Tree,
    tokens: Tensor,
    config: LlamaConfig,
    *,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    block: Callable[..., Tensor] | Sequence[Callable[..., Tensor]] = block,
) -> Tensor:
    """What the last block gives, normalized: "batch seq embed", which the output matrix turns into logits."""
    check_params("llama", params, _declared(config))
    x = _begin(params, tokens)
    blocks = [block] * len(params["layers"]) if callable(block) else block
    for layer, run in zip(params["layers"], blocks, strict=True):
        x = run(layer, x, config, positions, segments)
    return rms_norm.apply(params["norm"], x, eps=config.norm_eps)


def loss(
    params: tree.Tree, batch: dict[str, Tensor], config: LlamaConfig, *, chunk: int | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """(sum of the cross entropies, number of labels that count) of {"tokens", "labels"}, both "batch seq".

    A batch may have "positions" and "segments" too, of packed documents: positions that begin anew tell them apart.
    With `chunk` a rank has logits of only so many positions at a time (`ft.linear_cross_entropy`): for long sequences.
    """
    check_batch("llama", batch)
    options = marks_of(batch) | options
    if chunk is None:
        return next_token_loss(apply(params, batch["tokens"], config, **options), batch["labels"])
    x, labels = hidden(params, batch["tokens"], config, **options), batch["labels"]
    pattern = f"batch seq embed, {_OUTPUT[config.tied]}, batch seq ->"
    w, vocab_size = _output(params, config), config.vocab_size
    return counted(linear_cross_entropy(pattern, x, w, labels, chunk=chunk, vocab_size=vocab_size), labels)


def _output(params: tree.Tree, config: LlamaConfig) -> Tensor:
    return params["embedding" if config.tied else "unembedding"]


def stages(
    config: LlamaConfig,
    layers: Sequence[range],
    *,
    block: Callable[..., Tensor] | Sequence[Callable[..., Tensor]] = block,
) -> list[Stage]:
    """The stages of `ft.pipeline`, of these layers each; the last gives `loss`.

    The batch may have "positions" and "segments" too. A tied embedding is in the first stage and in the last. Raises
    `FunctitanError`.

    >>> import functitan as ft
    >>> [list(s.declarations) for s in stages(DEBUG, ft.pipeline.partition(6, 2))]
    [['embedding', 'layers'], ['norm', 'unembedding', 'layers']]
    """
    runs = [block] * config.num_layers if callable(block) else block
    blocks = [lambda p, x, positions, segments, run=run: run(p, x, config, positions, segments) for run in runs]
    end = ("norm", "embedding" if config.tied else "unembedding"), partial(_end, config=config)
    return stages_of("llama", _declared(config), layers, (("embedding",), _begin), blocks, end)


def _begin(params: tree.Tree, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    return take("batch seq, vocab embed -> batch seq embed", tokens, params["embedding"])


def _end(params: tree.Tree, x: Tensor, config: LlamaConfig) -> Tensor:
    return _logits(params, rms_norm.apply(params["norm"], x, eps=config.norm_eps), config)


def _logits(params: tree.Tree, x: Tensor, config: LlamaConfig) -> Tensor:
    pattern = f"batch seq embed, {_OUTPUT[config.tied]} -> batch seq vocab"
    return mask_padding(einsum(pattern, x, _output(params, config)), config.vocab_size)


def _check_config(config: LlamaConfig) -> None:
    problems = bad_sizes(config, _SIZES)
    sized = not problems
    if sized and config.num_heads % config.num_kv_heads:
        problems.append(f"num_heads {config.num_heads} is not a multiple of num_kv_heads {config.num_kv_heads}")
    if sized and config.head_dim % 2:
        problems.append(f"head_dim {config.head_dim} is odd: rotary positions turn pairs")
    if problems:
        raise FunctitanError(report("LlamaConfig", problems, "begin with one of llama.CONFIGS, and use _replace"))


@cache
def _declared(config: LlamaConfig) -> tree.Tree:
    return params(config)


_OUTPUT = {True: "vocab embed", False: "embed vocab"}  # the output matrix, by `config.tied`
_SIZES = ("vocab_size", "embed", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp")
