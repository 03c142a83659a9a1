"""Tokens from a Llama: `prefill` reads a prompt into a cache of keys and values, `decode` goes on, `generate` is both.

Invariant: the logits of a token are those of `llama.apply` on all tokens up to it, and they, like the tokens, are equal
on every rank. A cache is a pytree of fixed sizes; nothing is changed in place. Weights stay where they lie.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from functitan import threefry, tree
from functitan.attention.op import attention
from functitan.errors import FunctitanError, LayoutError, MeshError, report
from functitan.models import llama
from functitan.ops.lookup import select
from functitan.ops.move import unshard
from functitan.ops.operands import Operand, check_operands
from functitan.sharding.context import current, using
from functitan.sharding.mesh import is_size


class Cache(NamedTuple):
    """What a Llama keeps of the tokens it has read: for each layer keys and values, "batch cache kv_heads head_dim"."""

    keys: list[Tensor]
    values: list[Tensor]
    length: Tensor  # int64, no axes: how many tokens it holds; the rest of its places are free


def generate(
    params: tree.Tree,
    prompt: Tensor,
    config: llama.LlamaConfig,
    *,
    max_new_tokens: int,
    key: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`prompt` (int64, "batch seq", rows of one length) and `max_new_tokens` that follow: "batch seq".

    Each token is drawn from softmax(logits / temperature) by `key`, a number for each place and row; `temperature` 0
    takes the most likely one, and needs no key. On a mesh run it under `rules.replace(batch=None, seq=None)`, since
    neither one row nor one token can be cut. Raises `MeshError` under rules that shard them, and `FunctitanError`.

    >>> params = llama.params(config := llama.DEBUG._replace(num_layers=1))
    >>> from functitan.sharding.init import init
    >>> generate(init(params, threefry.key(0)), torch.ones(2, 3, dtype=torch.int64), config, key=threefry.key(1),
    ...          max_new_tokens=4).shape
    torch.Size([2, 7])
    """
    check_operands("generate", Operand("prompt", prompt, ("batch", "seq"), "int"))
    problems = [] if is_size(max_new_tokens) else [f"max_new_tokens is {max_new_tokens!r}: it must be at least 1"]
    problems += [] if temperature >= 0 else [f"temperature is {temperature!r}: it must be at least 0"]
    problems += ["there is no key to sample with"] if temperature > 0 and key is None else []
    if problems:
        fix = "write generate(params, prompt, config, key=ft.random.key(0), max_new_tokens=100)"
        raise FunctitanError(report("generate", problems, fix))
    logits, cache = prefill(params, prompt, config, prompt.shape[1] + max_new_tokens - 1)
    tokens = [prompt]
    for i in range(max_new_tokens):
        if i:
            logits, cache = decode(params, tokens[-1], cache, config)
        tokens.append(_sample(logits, config, None if key is None else threefry.fold_in(key, i), temperature))
    return torch.cat(tokens, 1)


def prefill(params: tree.Tree, tokens: Tensor, config: llama.LlamaConfig, length: int) -> tuple[Tensor, Cache]:
    """Logits "batch seq vocab" of the first tokens, "batch seq", and a cache of `length` places that holds them."""
    _check_rules()
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(pattern: str, q: Tensor, k: Tensor, v: Tensor, **marks: bool | Tensor | None) -> Tensor:
        for x, kept in ((k, keys), (v, values)):
            free = x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:])
            kept.append(torch.cat((x, free), 1))
        return attention(pattern, q, k, v, **marks)  # type: ignore[arg-type]

    logits = llama.apply(params, tokens, config, block=partial(llama.block, attend=attend))
    return logits, Cache(keys, values, torch.tensor(tokens.shape[1], device=tokens.device))


def decode(params: tree.Tree, tokens: Tensor, cache: Cache, config: llama.LlamaConfig) -> tuple[Tensor, Cache]:
    """Logits "batch seq vocab" of tokens that follow those in a cache, "batch seq", and the cache that holds them too.

    Raises `IndexError` on a CPU if the cache has no room for them.
    """
    _check_rules()
    batch, count = tokens.shape
    written = cache.length + torch.arange(count, device=tokens.device)
    positions = written.expand(batch, count)
    places = torch.arange(cache.keys[0].shape[1], device=tokens.device).expand(batch, -1)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(pattern: str, q: Tensor, k: Tensor, v: Tensor, **marks: bool | Tensor | None) -> Tensor:
        layer = len(keys)
        keys.append(cache.keys[layer].index_copy(1, written, k))
        values.append(cache.values[layer].index_copy(1, written, v))
        env = current()
        with using(env if env.rules is None else env._replace(rules=env.rules.replace(cache=None))):
            pattern = "batch seq heads head_dim, batch cache kv_heads head_dim"
            return attention(pattern, q, keys[layer], values[layer], key_positions=places, **marks)  # type: ignore[arg-type]

    logits = llama.apply(params, tokens, config, positions=positions, block=partial(llama.block, attend=attend))
    return logits, Cache(keys, values, cache.length + count)


def _sample(logits: Tensor, config: llama.LlamaConfig, key: Tensor | None, temperature: float) -> Tensor:
    """The next token of each row, "batch seq" of one."""
    env = current()
    last = select("batch seq vocab -> batch vocab", logits, -1)
    last = unshard(last, "batch vocab", mesh=env.mesh, rules=env.rules)[:, : config.vocab_size].float()
    if temperature > 0:
        assert key is not None
        noise = threefry.uniform(key, last.shape, device=last.device).clamp(min=2.0**-25)
        last = last / temperature - (-noise.log()).log()  # Gumbel's way to sample
    return last.argmax(-1, keepdim=True)


def _check_rules() -> None:
    env = current()
    if env.mesh is None:
        return
    layout = env.layout(("batch", "seq"))
    bad = [f"axis {axis!r} is sharded by {dims}" for axis, dims in zip(layout.axes, layout.dims, strict=True) if dims]
    if env.sequence.ranks("seq", env.mesh.sizes) > 1:
        problem = "tokens lie in the order 'zigzag' of ft.context_parallel, and new ones come at the end"
        raise LayoutError(report("generate", [problem], "call it outside ft.context_parallel(fn, order='zigzag')"))
    if bad:
        raise MeshError(report("generate", bad, "run it in ft.spmd(..., rules=rules.replace(batch=None, seq=None))"))
