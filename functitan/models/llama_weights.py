"""Llama in Hugging Face's files: its `config.json`, and the name and the layout of each weight.

Invariant: a weight there is the same numbers as the parameter here, its axes in another order and some of them joined;
both pair the halves of a head for rotary positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from functitan.errors import FunctitanError, report
from functitan.models.llama import LlamaConfig
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


def config_from(given: dict[str, Any]) -> LlamaConfig:
    """The config that a `config.json` describes, of transformers 4 or 5.

    Raises `FunctitanError` that lists every entry that asks for what this Llama does not have.
    """
    rope = dict(given.get("rope_parameters") or given.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    problems = [
        f"{name} is {given.get(name)!r}, not {known!r}"
        for name, known in _FIXED.items()
        if given.get(name, known) != known
    ]
    if given.get("model_type") != "llama":
        problems.append(f"model_type is {given.get('model_type')!r}, not 'llama'")
    if kind not in ("default", "llama3"):
        problems.append(f"rope_type is {kind!r}, neither 'default' nor 'llama3'")
    problems += [f"there is no {name!r}" for name in _SIZES.values() if name not in given]
    if problems:
        raise FunctitanError(report("config.json", problems, "give the directory of a Llama"))
    heads = given["num_attention_heads"]
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        )
    return LlamaConfig(
        **{ours: given[theirs] for ours, theirs in _SIZES.items()},
        num_kv_heads=given.get("num_key_value_heads") or heads,
        head_dim=given.get("head_dim") or given["hidden_size"] // heads,
        rope_theta=rope.get("rope_theta", given.get("rope_theta", 10000.0)),
        rope_scaling=scaling,
        norm_eps=given.get("rms_norm_eps", 1e-6),
        tied=given.get("tie_word_embeddings", False),
    )


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
_FIXED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
