"""Llama in Hugging Face's files: its `config.json`, and the name and the layout of each weight.

Invariant: a weight there is the same numbers as the parameter here, its axes in another order and some of them joined;
both pair the halves of a head for rotary positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from functitan.errors import FunctitanError, report
from functitan.models.llama import LlamaConfig
from functitan.models.llama_fields import (
    FIELDS,
    LLAMA3,
    ROPE,
    is_count,
    is_positive,
    problems_of,
    rope_of,
    said,
    value_of,
)
from functitan.nn.rope import RopeScaling


class Weight(NamedTuple):
    """A weight in the files: its name, and its dims, each the axes that it joins, outermost first."""

    name: str
    dims: tuple[tuple[str, ...], ...]


_BLOCK = {
    "attention_norm.scale": Weight("input_layernorm", (("embed",),)),
    "attention.q": Weight("self_attn.q_proj", (("heads", "head_dim"), ("embed",))),
    "attention.k": Weight("self_attn.k_proj", (("kv_heads", "head_dim"), ("embed",))),
    "attention.v": Weight("self_attn.v_proj", (("kv_heads", "head_dim"), ("embed",))),
    "attention.out": Weight("self_attn.o_proj", (("embed",), ("heads", "head_dim"))),
    "mlp_norm.scale": Weight("post_attention_layernorm", (("embed",),)),
    "mlp.gate": Weight("mlp.gate_proj", (("mlp",), ("embed",))),
    "mlp.up": Weight("mlp.up_proj", (("mlp",), ("embed",))),
    "mlp.down": Weight("mlp.down_proj", (("embed",), ("mlp",))),
}


def weights(config: LlamaConfig) -> dict[str, Weight]:
    """The weight of each parameter, by the parameter's path.

    >>> from functitan.models.llama import DEBUG
    >>> weights(DEBUG)["layers.1.mlp.up"]
    Weight(name='model.layers.1.mlp.up_proj.weight', dims=(('mlp',), ('embed',)))
    """
    found = {
        "embedding": Weight("model.embed_tokens.weight", (("vocab",), ("embed",))),
        "norm.scale": Weight("model.norm.weight", (("embed",),)),
    }
    if not config.tied:
        found["unembedding"] = Weight("lm_head.weight", (("vocab",), ("embed",)))
    for i in range(config.num_layers):
        for path, (name, dims) in _BLOCK.items():
            found[f"layers.{i}.{path}"] = Weight(f"model.layers.{i}.{name}.weight", dims)
    return found


def config_from(given: Any, file: str = "config.json") -> LlamaConfig:
    """The config that a `config.json` describes, of transformers 4 or 5; `file` names it in errors.

    Raises `FunctitanError` that lists every field that is not what it must be, or asks for what this Llama lacks.
    """
    if not isinstance(given, dict):
        raise FunctitanError(report(file, [f"it holds a {type(given).__name__}, not a dict of fields"], _FIX))
    problems = problems_of(given, FIELDS)
    if "model_type" not in given:
        problems.append("there is no model_type: it must be 'llama'")
    if not any(problem.startswith(("rope_", "max_position", "original")) for problem in problems):
        problems += _rope_problems(given)
    sizes = {name: value_of(given, name) for name in FIELDS}
    vocab, padding = sizes["vocab_size"], sizes["pad_token_id"]
    if is_count(vocab) and type(padding) is int and not -vocab <= padding < vocab:
        problems.append(f"pad_token_id {said(padding)} is no token: vocab_size is {vocab}")
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    kv_heads, head_dim = sizes["num_key_value_heads"], sizes["head_dim"]
    if is_count(width) and is_count(heads):
        if width % heads:
            problems.append(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
        kv_heads, head_dim = kv_heads or heads, head_dim or width // heads
        if is_count(kv_heads) and heads % kv_heads:
            problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if is_count(head_dim) and head_dim % 2:
            problems.append(f"head_dim {head_dim} is odd: rotary positions turn pairs")
    if problems:
        raise FunctitanError(report(file, problems, _FIX))
    rope = rope_of(given)[1]
    return LlamaConfig(
        **{ours: sizes[theirs] for ours, theirs in _SIZES.items()},
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=rope["rope_theta"],
        rope_scaling=RopeScaling(*(rope[name] for name in _SCALING)) if rope["rope_type"] == "llama3" else None,
        norm_eps=sizes["rms_norm_eps"],
        tied=sizes["tie_word_embeddings"],
    )


def _rope_problems(given: dict[str, Any]) -> list[str]:
    field, rope = rope_of(given)
    problems = problems_of(rope, ROPE, f"{field}: ")
    if rope["rope_type"] == "llama3":
        problems += problems_of(rope, LLAMA3, f"{field}: ")
        problems += [f"{field}: there is no {name}" for name in _SCALING if name not in rope]
        low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
        if low and high and is_positive(low) and is_positive(high) and low >= high:
            problems.append(f"{field}: low_freq_factor {low} is not below high_freq_factor {high}")
    return problems


def config_to(config: LlamaConfig, dtype: str, max_positions: int) -> dict[str, Any]:
    """The `config.json` of a config; rotary positions as transformers 4 and 5 each write them."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        factor, low, high, original = config.rope_scaling
        rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        rope["original_max_position_embeddings"] = original
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": max_positions,
        "torch_dtype": dtype,
        "dtype": dtype,
        **_FIXED,
    }


_SIZES = {
    "vocab_size": "vocab_size",
    "embed": "hidden_size",
    "mlp": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_FIXED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
_FIX = "give the config.json of a Llama, as transformers writes it"
