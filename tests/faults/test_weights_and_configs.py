"""Files of other programs: a Llama's config and weights are taken as transformers takes them, or refused by name.

The oracle is transformers itself: what it refuses is refused, what is taken has its logits.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
import struct
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import functitan as ft
from functitan import data
from functitan.checkpoint import from_huggingface, to_huggingface
from functitan.errors import CheckpointError, FunctitanError
from functitan.models import llama

transformers.utils.logging.set_verbosity_error()
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
BASE = {"model_type": "llama", **SIZES, "max_position_embeddings": 64}
TOKENS = torch.arange(24).reshape(2, 12) * 3
THREE = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A directory that transformers wrote, whose config.json each test writes anew."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "llama"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(path)
    return path


def theirs(fields: dict[str, Any], folder: Path) -> torch.Tensor | None:
    """The logits of transformers under a config, `None` where it refuses the config or the weights."""
    try:
        config = LlamaConfig.from_dict(json.loads(json.dumps(fields)))
    except Exception:
        return None
    numbers = json.dumps({name: value for name, value in config.to_dict().items() if name not in IGNORED})
    return logits(numbers, config.pad_token_id, folder)


@cache
def logits(config: str, padding: int | None, folder: Path) -> torch.Tensor | None:
    try:
        model = LlamaForCausalLM(LlamaConfig.from_dict(json.loads(config) | {"pad_token_id": padding})).eval()
        weights = load_file(folder / "model.safetensors")
        if model.config.tie_word_embeddings:
            weights.pop("lm_head.weight")
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        with torch.no_grad():
            return model(TOKENS).logits
    except Exception:
        return None


@cache
def ours(config: llama.LlamaConfig, folder: Path) -> torch.Tensor:
    return llama.apply(from_huggingface(folder)[0], TOKENS, config)[..., : config.vocab_size]


def assert_alike(fields: dict[str, Any], folder: Path, *, name: str = "") -> None:
    (folder / "config.json").write_text(json.dumps(fields))
    try:
        _, config = from_huggingface(folder)
    except FunctitanError as error:
        assert "config.json" in str(error) and name in str(error), str(error)
        return
    expected = theirs(fields, folder)
    assert expected is not None, f"transformers refuses {fields}"
    # float32, other orders of summation
    torch.testing.assert_close(ours(config, folder), expected, rtol=1e-4, atol=1e-4)


IGNORED = (
    "unknown",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "pretraining_tp",
    "initializer_range",
    "use_cache",
)
ODD = [None, True, False, 0, 1, -1, 2, 1.0, 0.5, -1.0, float("nan"), float("inf"), 10**30, 10**400, "", "x", "no", "1"]
ODD += [[], [1], {}, {"a": 1}]
SIZED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
SIZED += ["num_key_value_heads", "head_dim", "max_position_embeddings"]
NUMBERS = ["rms_norm_eps", "rope_theta", "initializer_range", "attention_dropout", "partial_rotary_factor"]
TRUTHS = ["tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache"]
IDS = ["pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp"]
DICTS = ["rope_parameters", "rope_scaling", "quantization_config", "per_layer_config"]
FIELDS = [*SIZED, *NUMBERS, *TRUTHS, *IDS, *DICTS, "hidden_act", "model_type", "original_max_position_embeddings"]
ROPE = ["rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"]
ROPE += ["original_max_position_embeddings"]


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_with_each_odd_value(folder, field: str):
    """Where a value is refused, the error has the file's name and the field's, or the weights that differ."""
    for value in ODD:
        said = "" if field in SIZED else field
        assert_alike(BASE | {field: value}, folder, name=said)


@pytest.mark.parametrize("field", ROPE)
def test_each_field_of_rotary_positions_with_each_odd_value(folder, field: str):
    homes = itertools.cycle(("rope_scaling", "rope_parameters"))
    for home, value in zip(homes, ODD[::2]):  # noqa: B905 (one is endless)
        rope = THREE | {field: value}
        assert_alike(BASE | {home: rope}, folder, name=home)
    assert_alike(BASE | {"rope_scaling": {name: it for name, it in THREE.items() if name != field}}, folder)


ROPES = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "llama3", "linear", None]),
        "type": st.sampled_from(["default", "llama3"]),
        "rope_theta": st.sampled_from([1e4, 5e5, 100, None]),
        "factor": st.sampled_from([8.0, 2, 0, "x"]),
        "low_freq_factor": st.sampled_from([1.0, 4.0]),
        "high_freq_factor": st.sampled_from([4.0, 1]),
        "original_max_position_embeddings": st.sampled_from([16, 32, 64.0]),
        "partial_rotary_factor": st.sampled_from([1.0, 0.5]),
    },
)
CONFIGS = st.fixed_dictionaries(
    {name: st.just(value) for name, value in BASE.items()},
    optional={
        "rope_scaling": ROPES | st.none(),
        "rope_parameters": ROPES | st.none(),
        "rope_theta": st.sampled_from([1e4, 500, None]),
        "partial_rotary_factor": st.sampled_from([1.0, 0.25]),
        "original_max_position_embeddings": st.sampled_from([8, 16]),
        "num_key_value_heads": st.sampled_from([4, None, 2]),
        "head_dim": st.sampled_from([8, None, 7]),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-5, 0.0, 1]),
        "tie_word_embeddings": st.booleans(),
        "hidden_act": st.sampled_from(["silu", "gelu"]),
        "attention_bias": st.booleans() | st.none(),
        "unknown": st.sampled_from(ODD),
    },
)


@given(CONFIGS)
@settings(max_examples=40)
def test_any_config_is_taken_as_transformers_takes_it(folder, fields: dict[str, Any]):
    assert_alike(fields, folder)


def test_a_field_that_is_absent_is_transformers_own(folder):
    known = LlamaConfig()
    for field in ("rms_norm_eps", "num_key_value_heads", "tie_word_embeddings", "max_position_embeddings"):
        fields = {**BASE, "rope_scaling": THREE}
        fields.pop(field, None)
        assert_alike(fields, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError) as error:
        from_huggingface(folder)
    whole = (known.vocab_size, known.hidden_size)
    assert f"has shape (96, 32), config.json says {whole}" in str(error.value)
    assert "num_hidden_layers is 32 in config.json, the files have weights of 1 layers" in str(error.value)


def test_all_problems_of_a_config_at_once(folder):
    fields = {"rms_norm_eps": -1.0, "tie_word_embeddings": "no", "vocab_size": True, "rope_theta": float("nan")}
    (folder / "config.json").write_text(json.dumps(BASE | fields | {"hidden_size": 30}))
    with pytest.raises(FunctitanError) as error:
        from_huggingface(folder)
    assert all(name in str(error.value) for name in (*fields, "hidden_size 30 is not a multiple"))


@pytest.mark.parametrize("field", SIZED[:-1])
@pytest.mark.parametrize("size", [10**8, 10**18])
def test_a_huge_number_allocates_nothing(folder, field: str, size: int):
    (folder / "config.json").write_text(json.dumps(BASE | {field: size // 4 * 4, "rope_scaling": THREE}))
    tracemalloc.start()
    try:
        from_huggingface(folder)  # of max_position_embeddings nothing is made
    except FunctitanError as error:
        assert "config.json" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10 * 2**20


DTYPES = [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_no_model_computes_in_are_refused(folder, tmp_path, dtype: torch.dtype):
    shutil.copytree(folder, bad := tmp_path / "bad")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(dtype)}, bad / "model.safetensors")
    (bad / "config.json").write_text(json.dumps(BASE))
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} in model\.safetensors is \w+, not one of F64, F32"):
        from_huggingface(bad)


def test_weights_in_two_files_and_weights_in_none(folder, tmp_path):
    params, config = whole(folder)
    to_huggingface(tmp_path / "parts", params, config, file_bytes=9000)
    first, second, *_ = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    index = tmp_path / "parts" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(name for name, file in content["weight_map"].items() if file == first)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: second}}))
    with pytest.raises(CheckpointError, match=rf"index.json has {re.escape(name)} in {second}, which does not have it"):
        from_huggingface(tmp_path / "parts")
    index.write_text(json.dumps(content))
    shutil.copy(tmp_path / "parts" / first, tmp_path / "parts" / second)
    with pytest.raises(CheckpointError, match=rf"is in {first}, and again in {second}"):
        from_huggingface(tmp_path / "parts")


def whole(folder: Path) -> tuple[Any, llama.LlamaConfig]:
    (folder / "config.json").write_text(json.dumps(BASE))
    return from_huggingface(folder)


@pytest.mark.parametrize(
    "entry",
    [{"dtype": "F32", "shape": [96, 32], "data_offsets": [0, 2**60]}, {"dtype": "F32", "shape": [-1]}, {"shape": []}]
    + [{"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}, 1, None, {"dtype": 1, "shape": "x"}],
    ids=str,
)
def test_a_header_that_lies_is_named(folder, tmp_path, entry: Any):
    shutil.copytree(folder, bad := tmp_path / "bad")
    (bad / "config.json").write_text(json.dumps(BASE))
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    (bad / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its header is wrong of model.embed"):
        from_huggingface(bad)


# --- encodings ------------------------------------------------------------------------------------------------------


def rank_file(path: Path, count: int, absent: tuple[int, ...] = ()) -> Path:
    """A file of so many ranks: all bytes, then words of four letters."""
    words = [bytes([i]) for i in range(256)]
    words += [bytes(word) for word in itertools.islice(itertools.product(range(97, 123), repeat=4), count - 256)]
    ranks = (rank for rank in itertools.count() if rank not in absent)
    path.write_bytes(b"\n".join(base64.b64encode(word) + b" %d" % rank for word, rank in zip(words, ranks)))  # noqa: B905
    return path


PUBLISHED = [  # ranks, ranks that are left out, size of the vocabulary, end of text, some special tokens
    (50256, (), 50257, 50256, {"<|endoftext|>": 50256}),
    (50280, (50256,), 50281, 50256, {"<|endoftext|>": 50256}),
    (100256, (), 100277, 100257, {"<|endoftext|>": 100257, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}),
    (
        128000,
        (),
        128256,
        128001,
        {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006, "<|eot_id|>": 128009}
        | {"<|reserved_special_token_0|>": 128002, "<|reserved_special_token_250|>": 128255},
    ),
    (199998, (), 200019, 199999, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
]


@pytest.mark.parametrize(("count", "absent", "size", "end", "special"), PUBLISHED, ids=lambda value: str(value)[:8])
def test_special_tokens_are_those_that_were_published(tmp_path, count, absent, size, end, special):
    found = data.encoding(rank_file(tmp_path / "x.tiktoken", count, absent))
    assert (found.n_vocab, found.eot_token) == (size, end)
    for name, token in special.items():
        assert found.encode(name, allowed_special="all") == [token] and found.decode([token]) == name
    stream = data.token_stream(Dataset.from_dict({"text": ["a", "bb"]}), found, 2, 2, shuffle=0)
    assert stream.next_batch((0, 0, 0, 0))[0]["labels"].tolist() == [[end, 98], [98, end]]


def test_an_unknown_file_as_large_as_published_ones_needs_a_word(tmp_path):
    path = rank_file(tmp_path / "x.tiktoken", 60000)
    with pytest.raises(FunctitanError, match=r"nothing is published of a file with 60000 ranks(.|\n)*end_of_text="):
        data.encoding(path)
    assert data.encoding(path, end_of_text=60003).eot_token == 60003
    found = data.encoding(path, special_tokens={"<s>": 60000, "</s>": 60001}, end_of_text=60001)
    assert (found.eot_token, found.n_vocab, found.decode([60001])) == (60001, 60002, "</s>")
    assert data.encoding(path, special_tokens={"<|end_of_text|>": 60005}).eot_token == 60005


def test_another_end_of_text_for_a_known_file(tmp_path):
    path = rank_file(tmp_path / "x.tiktoken", 128000)
    assert data.encoding(path, end_of_text=128009).decode([128009]) == "<|eot_id|>"


ARGUMENTS = [
    (dict(end_of_text=5), "end_of_text is 5, which another token has"),
    (dict(end_of_text=-1), "end_of_text is -1: it must be"),
    (dict(end_of_text=2**31), "end_of_text is 2147483648: it must be"),
    (dict(end_of_text=True), "end_of_text is True: it must be"),
    (dict(end_of_text="<|x|>"), "end_of_text is '<|x|>': it must be"),
    (dict(special_tokens={"a": 300, "b": 300}), "the special token 'b' is 300, which another token has"),
    (dict(special_tokens={"a": 300}), "which token ends a document?"),
    (dict(special_tokens=[300]), "special_tokens is no dict"),
    (dict(special_tokens={3: 300}), "special_tokens is no dict"),
    (dict(special_tokens={"a": 300}, end_of_text=301), "end_of_text is 301, which is none of special_tokens"),
    (dict(pattern="("), "pattern '('"),
    (dict(pattern=3), "pattern is a int"),
]


@pytest.mark.parametrize(("options", "text"), ARGUMENTS, ids=lambda value: str(value)[:40])
def test_special_tokens_that_cannot_be(tmp_path, options: dict[str, Any], text: str):
    with pytest.raises(FunctitanError, match=re.escape(text)):
        data.encoding(rank_file(tmp_path / "x.tiktoken", 260), **options)


LINES = {  # a line that is put at the end of 256 good ones: what is said of it
    "YWE= 3": "line 257: it has the rank 3 of line 4 again",
    "AA== 256": "line 257: it has the token of line 1 again",
    "YWE= -7": "line 257: '-7' is no rank",
    "YWE= 1000000000000": "line 257: '1000000000000' is no rank",
    "YWE= 2147483648": "line 257: rank 2147483648 is beyond what 257 lines can have",
    "YWE= 257": "rank 256 is in no line, a later one is in line 257",
    "YWE= 2.5": "line 257: '2.5' is no rank",
    "YWE= 1_0": "line 257: '1_0' is no rank",
    "YWE=": "line 257: it has 1 parts",
    "YWE= 256 1": "line 257: it has 3 parts",
    "Y!E= 256": "line 257: 'Y!E=' is not base64",
    "YWE 256": "line 257: 'YWE' is not base64",
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_no_rank_is_named(tmp_path, line: str):
    path = rank_file(tmp_path / "x.tiktoken", 256)
    path.write_bytes(path.read_bytes() + b"\n" + line.encode())
    with pytest.raises(FunctitanError) as error:
        data.encoding(path)
    assert LINES[line] in str(error.value) and "x.tiktoken" in str(error.value)


def test_all_lines_that_are_wrong_at_once(tmp_path):
    path = rank_file(tmp_path / "x.tiktoken", 256)
    path.write_bytes(path.read_bytes() + b"\n" + b"\n".join([b"!! 1"] * 50))
    with pytest.raises(FunctitanError, match=r"line 257: (.|\n)*line 258: (.|\n)*and 30 more"):
        data.encoding(path)


# --- documents, devices, arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("texts", [[1, 2], ["a", None], [None, None], [["a"]], [True], [{"a": 1}]], ids=str)
def test_a_text_that_is_none_is_named(texts: list, streaming: bool):
    documents = Dataset.from_dict({"text": texts})
    documents = documents.to_iterable_dataset() if streaming else documents

    def batch() -> Any:
        return data.token_stream(documents, data.byte_encoding(), 4, 2, shuffle=0).next_batch(data.Cursor())

    for call in (batch, lambda: [list(part) for part in data.split(documents, 0.5)]):
        with pytest.raises(FunctitanError, match=r"column 'text'"):
            call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "nonsense", 3.5])
def test_a_device_that_is_not_there(folder, tmp_path, device: Any):
    ft.checkpoint.save(tmp_path / "x", {"w": torch.ones(2)})
    whole(folder)
    for call in (
        lambda: ft.checkpoint.restore(tmp_path / "x", {"w": torch.ones(2)}, device=device),
        lambda: from_huggingface(folder, device=device),
    ):
        with pytest.raises(FunctitanError, match=rf"device is {device!r}"):
            call()


@pytest.mark.parametrize("path", [None, 3, b"x", "", "a\0b", [], object()], ids=lambda path: type(path).__name__)
def test_a_path_that_is_none(path: Any):
    params = ft.init(llama.params(llama.DEBUG._replace(num_layers=1, embed=8, mlp=8, vocab_size=8)), ft.random.key(0))
    calls = {
        "restore": lambda: ft.checkpoint.restore(path, {"w": torch.ones(2)}),
        "save": lambda: ft.checkpoint.save(path, {"w": torch.ones(2)}),
        "from_huggingface": lambda: from_huggingface(path),
        "to_huggingface": lambda: to_huggingface(path, params, llama.DEBUG),
        "encoding": lambda: data.encoding(path),
        "read_csv": lambda: ft.pipeline.read_csv(path),
        "huggingface_documents": lambda: data.huggingface_documents(path),
        "Manager": lambda: ft.checkpoint.Manager(path),
    }
    for name, call in calls.items():
        with pytest.raises(FunctitanError, match="is no path") as error:
            call()
        assert name in str(error.value) or name == "Manager"
