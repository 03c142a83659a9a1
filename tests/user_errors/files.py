"""Mistakes in files of other programs, and in what is said of them: weights, configs, ranks, documents, schedules.

Invariant: the files are written here, before any call; a call reads them and allocates nothing.
"""

from __future__ import annotations

import base64
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset

import functitan as ft
from user_errors.given import LLAMA, data, llama

FOLDER = Path(tempfile.mkdtemp())
CONFIG = llama.LlamaConfig(8, 8, 2, 2, 2, 4, 8)
ft.checkpoint.to_huggingface(FOLDER / "llama", LLAMA, CONFIG)
FIELDS = json.loads((FOLDER / "llama" / "config.json").read_text())
BYTES = [base64.b64encode(bytes([i])).decode() + f" {i}" for i in range(256)]
NUMBERS = Dataset.from_dict({"text": [1, 2]})


def weights(text: str, index: str | None = None, **fields: object) -> Path:
    """A directory with other fields in its config, or another index."""
    path = FOLDER / str(len(list(FOLDER.iterdir())))
    path.mkdir()
    (path / "config.json").write_text(text or json.dumps(FIELDS | fields))
    if index is None:
        (path / "model.safetensors").write_bytes((FOLDER / "llama" / "model.safetensors").read_bytes())
    else:
        (path / "model.safetensors.index.json").write_text(index)
    return path


def ranks(*lines: str) -> Path:
    """A file of the ranks of all bytes, and these lines."""
    path = FOLDER / f"{len(list(FOLDER.iterdir()))}.tiktoken"
    path.write_text("\n".join([*BYTES, *lines]))
    return path


ODD = weights("", rms_norm_eps="x", rope_parameters={"rope_type": "llama3"}, rope_scaling=None, attention_bias=True)
LARGE, BROKEN = weights("", num_hidden_layers=10**8), weights('{"model_type": ')
OUTSIDE = weights("", index='{"weight_map": {"model.norm.weight": "../x.safetensors"}}')
TWICE, NO_RANK = ranks("YWE= 3", "YWI= 256"), ranks("YWE= -7", "!! 256", "YWI=")
ft.checkpoint.save(FOLDER / "saved", {"w": torch.ones(2)})
(FOLDER / "x.csv").write_text("0F0,0X0\n")

MISTAKES = {
    "a config whose fields are wrong": (
        lambda: ft.checkpoint.from_huggingface(ODD),
        ft.FunctitanError,
        f"""\
        {ODD}/config.json:
          - rms_norm_eps is 'x': it must be a finite float of at least 0
          - attention_bias is True: it must be false: this Llama has no biases
          - rope_parameters: there is no factor
          - rope_parameters: there is no low_freq_factor
          - rope_parameters: there is no high_freq_factor
          Fix: give the config.json of a Llama, as transformers writes it""",
    ),
    "a config that is no JSON": (
        lambda: ft.checkpoint.from_huggingface(BROKEN),
        ft.CheckpointError,
        f"""\
        ft.checkpoint.from_huggingface({str(BROKEN)!r}):
          - config.json: it is no JSON: Expecting value: line 1 column 16 (char 15)
          Fix: copy it again""",
    ),
    "a config of many more layers than its weights": (
        lambda: ft.checkpoint.from_huggingface(LARGE),
        ft.CheckpointError,
        f"""\
        ft.checkpoint.from_huggingface({str(LARGE)!r}):
          - num_hidden_layers is 100000000 in config.json, the files have weights of 2 layers
          - model.layers.2.input_layernorm.weight is missing
          - model.layers.2.self_attn.q_proj.weight is missing
          - model.layers.2.self_attn.k_proj.weight is missing
          - model.layers.2.self_attn.v_proj.weight is missing
          - model.layers.2.self_attn.o_proj.weight is missing
          - model.layers.2.post_attention_layernorm.weight is missing
          - model.layers.2.mlp.gate_proj.weight is missing
          - model.layers.2.mlp.up_proj.weight is missing
          - model.layers.2.mlp.down_proj.weight is missing
          Fix: nothing is allocated after a CheckpointError: \
give a directory whose config.json is that of its weights""",
    ),
    "an index that leads out of its directory": (
        lambda: ft.checkpoint.from_huggingface(OUTSIDE),
        ft.CheckpointError,
        f"""\
        ft.checkpoint.from_huggingface({str(OUTSIDE)!r}):
          - model.safetensors.index.json: '../x.safetensors' is no plain name of a file in the same directory
          Fix: take a directory from elsewhere only as it was written""",
    ),
    "weights without a directory": (
        lambda: ft.checkpoint.to_huggingface(None, LLAMA, CONFIG),
        ft.FunctitanError,
        """\
        ft.checkpoint.to_huggingface:
          - None is no path
          Fix: give that of a file or a directory, as 'runs/first'""",
    ),
    "weights written under odd options": (
        lambda: ft.checkpoint.to_huggingface(FOLDER / "new", LLAMA, "1B", file_bytes=0, max_positions=1.5),
        ft.FunctitanError,
        f"""\
        ft.checkpoint.to_huggingface({str(FOLDER / "new")!r}):
          - file_bytes is 0: it must be a whole number of at least 1
          - max_positions is 1.5: it must be a whole number of at least 1
          - config is a str, not a LlamaConfig
          Fix: give the config that the parameters were declared with""",
    ),
    "a device that is none": (
        lambda: ft.checkpoint.restore(FOLDER / "saved", {"w": ft.Param("embed", (2,))}, device="gpu0"),
        ft.FunctitanError,
        f"""\
        ft.checkpoint.restore from {FOLDER}/saved:
          - device is 'gpu0': Invalid device string: 'gpu0'
          Fix: give device='cpu', or one there is""",
    ),
    "a rank that is there twice": (
        lambda: data.encoding(TWICE),
        ft.FunctitanError,
        f"""\
        encoding({str(TWICE)!r}):
          - line 257: it has the rank 3 of line 4 again
          Fix: give a file, in which each line is a base64 token, a rank, or one of ['bytes', 'gpt2', \
'r50k_base', 'p50k_base', 'p50k_edit', 'cl100k_base', 'o200k_base', 'o200k_harmony']""",
    ),
    "lines that are no ranks": (
        lambda: data.encoding(NO_RANK),
        ft.FunctitanError,
        f"""\
        encoding({str(NO_RANK)!r}):
          - line 257: '-7' is no rank: a whole number of at least 0
          - line 258: '!!' is not base64: Only base64 data is allowed
          - line 259: it has 1 parts, not a base64 token and a rank
          Fix: give a file, in which each line is a base64 token, a rank, or one of ['bytes', 'gpt2', \
'r50k_base', 'p50k_base', 'p50k_edit', 'cl100k_base', 'o200k_base', 'o200k_harmony']""",
    ),
    "an end of text for an encoding that has one": (
        lambda: data.encoding("bytes", end_of_text=300),
        ft.FunctitanError,
        """\
        encoding('bytes'):
          - a name has its own pattern, special tokens and end of text
          Fix: give them for a file of ranks only""",
    ),
    "documents that are numbers": (
        lambda: data.split(NUMBERS),
        ft.FunctitanError,
        """\
        split:
          - documents has a column 'text' that holds no text: the first is '1'
          Fix: give a dataset with a column 'text', and a share like 0.05""",
    ),
    "a schedule with a cell that is no action": (
        lambda: ft.pipeline.read_csv(FOLDER / "x.csv"),
        ft.ScheduleError,
        f"""\
        read_csv({str(FOLDER / "x.csv")!r}):
          - rank 0 (row 1), cell 2: '0X0' is no action
          Fix: write stage, kind and microbatch, as 0F0, 1I2, 0SEND_F0; \
UNSHARD, RESHARD and REDUCE_GRAD have no microbatch""",
    ),
}
