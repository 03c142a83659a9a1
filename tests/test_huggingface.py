"""Llama weights to and from Hugging Face's directories. The oracles are transformers and safetensors themselves."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_llama import SCALED, TINY, huggingface
from transformers import AutoModelForCausalLM

import functitan as ft
from functitan.checkpoint import from_huggingface, to_huggingface
from functitan.errors import CheckpointError, FunctitanError
from functitan.models import llama

CONFIGS = {"plain": TINY, "llama 3.1 rope": SCALED, "tied": TINY._replace(tied=True)}
MESHES = [dict(fsdp=2), dict(tp=2), dict(fsdp=2, tp=2)]
TOKENS = torch.randint(0, TINY.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def assert_bitwise(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype and torch.equal(actual[name], x), name


def assert_logits(params: ft.tree.Tree, config: llama.LlamaConfig, model: Any) -> None:
    logits = llama.apply(params, TOKENS, config)[..., : config.vocab_size]
    # float32 on both sides, other orders of summation
    torch.testing.assert_close(logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=CONFIGS)
def theirs(request, tmp_path_factory) -> tuple[llama.LlamaConfig, Any, Path]:
    """(our config, their model, a directory that transformers wrote in several files)."""
    config = CONFIGS[request.param]
    model = huggingface(config, ft.init(llama.params(config), ft.random.key(0)))
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return config, model, folder


def test_what_transformers_wrote_loads_and_gives_its_logits(theirs):
    config, model, folder = theirs
    params, found = from_huggingface(folder)
    assert found == config
    assert_logits(params, config, model)


def test_what_we_write_loads_in_transformers_and_gives_our_logits(theirs, tmp_path):
    config = theirs[0]
    params = ft.init(llama.params(config), ft.random.key(1))
    for name, options in {"one": {}, "several": {"file_bytes": 20000}}.items():
        to_huggingface(tmp_path / name, params, config, **options)
        assert (len(list((tmp_path / name).glob("*.safetensors"))) > 1) == (name == "several")
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report.values()), report
        assert_logits(params, config, model)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_round_trip_is_bitwise_on_every_mesh(theirs, tmp_path, sizes: dict[str, int]):
    config, _, folder = theirs
    whole = from_huggingface(folder)[0]

    def moved(mesh):
        params, found = from_huggingface(folder, mesh, llama.RULES)
        to_huggingface(tmp_path / "back", params, found, mesh, llama.RULES)
        declared = llama.params(config)
        expected = ft.shard(whole, declared, mesh=mesh, rules=llama.RULES)
        for ours, shard in zip(ft.tree.leaves(params), ft.tree.leaves(expected), strict=True):
            assert torch.equal(ours, shard)

    ft.simulate(**sizes)(moved)()
    assert_bitwise(tensors(tmp_path / "back"), tensors(folder))


def test_bfloat16_stays_bitwise_and_may_be_widened(tmp_path):
    params = ft.tree.map(lambda x: x.bfloat16(), ft.init(llama.params(TINY), ft.random.key(0)))
    to_huggingface(tmp_path / "first", params, TINY)
    kept, wide = from_huggingface(tmp_path / "first")[0], from_huggingface(tmp_path / "first", dtype=torch.float32)[0]
    assert kept["norm"]["scale"].dtype == torch.bfloat16 and wide["norm"]["scale"].dtype == torch.float32
    to_huggingface(tmp_path / "kept", kept, TINY)
    to_huggingface(tmp_path / "wide", wide, TINY, dtype=torch.bfloat16)
    for name in ("kept", "wide"):
        assert_bitwise(tensors(tmp_path / name), tensors(tmp_path / "first"))
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_rank_reads_its_slices_and_no_more(theirs, monkeypatch, sizes: dict[str, int]):
    """Bytes that leave the files, by rank: those of its shards, without the padding of the vocabulary."""
    folder = theirs[2]
    read: dict[int, int] = {}

    def loaded(mesh):
        shards = ft.tree.leaves(from_huggingface(folder, mesh, llama.RULES)[0])
        return sum(4 * int(x.count_nonzero()) for x in shards)  # padding is zero, and no weight is

    monkeypatch.setattr(
        "functitan.checkpoint.huggingface.safe_open", lambda path, kind: Counting(safe_open(path, kind), read)
    )
    held = ft.simulate(**sizes)(loaded)()
    assert [read[rank] for rank in range(len(held))] == held
    whole = sum(x.nbytes for x in tensors(folder).values())
    # scales of norms are not cut by tp, and the second half of a padded table is smaller than the first
    assert max(held) < 1.3 * whole / len(held)


class Counting:
    """A safetensors file whose slices count the bytes that each rank takes."""

    def __init__(self, file: Any, read: dict) -> None:
        self.file, self.read = file, read

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name: str):
        return CountingSlice(self.file.get_slice(name), self.read)


class CountingSlice:
    def __init__(self, view: Any, read: dict) -> None:
        self.view, self.read = view, read

    def get_shape(self):
        return self.view.get_shape()

    def __getitem__(self, index):
        x = self.view[index]
        rank = int(threading.current_thread().name.removeprefix("rank "))
        self.read[rank] = self.read.get(rank, 0) + x.nbytes
        return x


def test_every_bad_weight_is_named(theirs, tmp_path):
    folder = theirs[2]
    shutil.copytree(folder, bad := tmp_path / "bad")
    text = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(text | {"intermediate_size": 48, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError) as error:
        from_huggingface(bad)
    assert "model.layers.0.mlp.up_proj.weight has shape (64, 32), config.json says (48, 32)" in str(error.value)
    assert "model.layers.2.self_attn.q_proj.weight is missing" in str(error.value)
    (bad / "config.json").write_text(json.dumps(text | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight belongs to no parameter"):
        from_huggingface(bad)
    (bad / "config.json").write_text(json.dumps(text | {"model_type": "gemma", "attention_bias": True}))
    with pytest.raises(FunctitanError, match=r"attention_bias is True(.|\n)*model_type is 'gemma'"):
        from_huggingface(bad)


def test_missing_and_damaged_files_are_named(theirs, tmp_path):
    folder = theirs[2]
    shutil.copytree(folder, bad := tmp_path / "bad")
    first, second, *_ = sorted(bad.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(CheckpointError, match=f"there is no {first.name}"):
        from_huggingface(bad)
    shutil.copy(folder / first.name, first)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{second.name} is damaged"):
        from_huggingface(bad)
    with pytest.raises(CheckpointError, match="No such file"):
        from_huggingface(tmp_path / "nothing")


def test_a_directory_is_not_overwritten(theirs):
    config, _, folder = theirs
    with pytest.raises(CheckpointError, match="it is there already"):
        to_huggingface(folder, ft.init(llama.params(config), ft.random.key(0)), config)
