"""The fields of a Llama's `config.json`: what each may be, and what stands for one that is absent.

Invariant: what transformers 5.23 refuses is refused here; a field that is absent is what its `LlamaConfig` takes.
A field that could change the numbers, and that this Llama does not know, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

MOST = 3.4028234663852886e38  # of float32, in which angles are computed


class Field(NamedTuple):
    """A field: its value where it is absent, what it must be in words, and whether a value is that."""

    absent: Any
    words: str
    fits: Callable[[Any], bool]


def is_count(value: object) -> bool:
    """A whole number of at least 1, which true is not."""
    return type(value) is int and 1 <= value < 2**63


def is_positive(value: object) -> bool:
    """A number above 0 that is neither infinite nor NaN."""
    return (type(value) is float and 0 < value <= MOST) or is_count(value)


def problems_of(given: dict[str, Any], fields: dict[str, Field], prefix: str = "") -> list[str]:
    """A line for each field that is not what it must be."""
    return [
        f"{prefix}{name} is {said(given[name])}: it must be {field.words}"
        for name, field in fields.items()
        if name in given and not field.fits(given[name])
    ]


def value_of(given: dict[str, Any], name: str) -> Any:
    """A field's value, or what stands for it."""
    return given.get(name, FIELDS[name].absent)


def rope_of(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The dict of rotary positions, by the name of its field: of two, transformers takes the older name's."""
    for name in ("rope_scaling", "rope_parameters"):
        if given.get(name):
            return name, complete(given, given[name])
    return "rope_parameters", complete(given, {})


def complete(given: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """A dict of rotary positions with what transformers adds to it from the fields around it."""
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": given.get("rope_theta", 10000.0), **rope}
    if "partial_rotary_factor" in given:
        rope.setdefault("partial_rotary_factor", given["partial_rotary_factor"])
    if rope["rope_type"] == "llama3":
        context = "original_max_position_embeddings"
        rope.setdefault(context, value_of(given, "max_position_embeddings"))
        rope[context] = given.get(context, rope[context])
    return rope


def said(value: Any) -> str:
    """A value of a file in a few letters: what it holds may be long, or deep."""
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of more than 30 digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


_COUNT = "a whole number of at least 1"
_POSITIVE = "a finite number above 0"


def _or_null(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is_int(value: object) -> bool:
    return type(value) is int


def _sized(absent: int) -> Field:
    return Field(absent, _COUNT, is_count)


_SHARE = "a number in (0, 1]"
_is_share = lambda value: is_positive(value) and value <= 1
_BOOL = lambda value: type(value) is bool
_DICT = lambda value: isinstance(value, dict)
_FALSE = lambda value: value is False
_NOTHING = lambda value: value is None
FIELDS = {
    "vocab_size": _sized(32000),
    "hidden_size": _sized(4096),
    "intermediate_size": _sized(11008),
    "num_hidden_layers": _sized(32),
    "num_attention_heads": _sized(32),
    "num_key_value_heads": Field(None, f"{_COUNT}, or null", _or_null(is_count)),
    "head_dim": Field(None, f"{_COUNT}, or null", _or_null(is_count)),
    "max_position_embeddings": _sized(2048),
    "rms_norm_eps": Field(
        1e-6, "a finite float of at least 0", lambda value: type(value) is float and 0 <= value <= MOST
    ),
    "tie_word_embeddings": Field(False, "true or false", _BOOL),
    "rope_parameters": Field(None, "a dict, or null", _or_null(_DICT)),
    "rope_scaling": Field(None, "a dict, or null", _or_null(_DICT)),
    "rope_theta": Field(10000.0, _POSITIVE, is_positive),
    "hidden_act": Field("silu", "'silu'", lambda value: value == "silu"),
    "attention_bias": Field(False, "false: this Llama has no biases", _FALSE),
    "mlp_bias": Field(False, "false: this Llama has no biases", _FALSE),
    "attention_dropout": Field(
        0.0, "0: this Llama has no dropout", _or_null(lambda value: type(value) in (int, float) and value == 0)
    ),
    "partial_rotary_factor": Field(1.0, _SHARE, _is_share),
    "original_max_position_embeddings": Field(None, _COUNT, is_count),
    "quantization_config": Field(None, "null: this Llama's weights are not quantized", _NOTHING),
    "per_layer_config": Field(None, "null: this Llama's layers are alike", _NOTHING),
    "initializer_range": Field(0.02, "a float in [0, 1]", lambda value: type(value) is float and 0 <= value <= 1),
    "use_cache": Field(True, "true or false", _BOOL),
    "pretraining_tp": Field(1, "a whole number, or null", _or_null(_is_int)),
    "pad_token_id": Field(None, "a whole number, or null", _or_null(_is_int)),
    "bos_token_id": Field(1, "a whole number, or null", _or_null(_is_int)),
    "eos_token_id": Field(
        2,
        "a whole number, a list of them, or null",
        _or_null(lambda value: _is_int(value) or (isinstance(value, list) and all(map(_is_int, value)))),
    ),
    "model_type": Field(None, "'llama'", lambda value: value == "llama"),
}
ROPE = {
    "rope_type": Field("default", "'default' or 'llama3'", lambda value: value in ("default", "llama3")),
    "rope_theta": Field(10000.0, _POSITIVE, is_positive),
    "partial_rotary_factor": Field(1.0, _SHARE, _is_share),
}
LLAMA3 = {
    "factor": Field(None, _POSITIVE, is_positive),
    "low_freq_factor": Field(None, _POSITIVE, is_positive),
    "high_freq_factor": Field(None, _POSITIVE, is_positive),
    "original_max_position_embeddings": Field(None, _COUNT, is_count),
    "partial_rotary_factor": Field(1.0, "1, or absent", lambda value: type(value) in (int, float) and value == 1),
}
