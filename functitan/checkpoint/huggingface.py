"""Llama weights from and to directories of Hugging Face: safetensors files, their index, `config.json`.

Invariant: reading, a rank takes from the files the slices that its shards are made of; the numbers are never changed,
so that what was read is written back bitwise. The vocabulary is padded here and not in the files.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from functitan import tree
from functitan.axes import Axes
from functitan.checkpoint.files import clear_errors, hidden, is_empty, locate, publish, remove_leftovers, sync
from functitan.checkpoint.leaves import Block, Leaf, leaves_of
from functitan.checkpoint.save import together
from functitan.errors import CheckpointError, report
from functitan.models import llama
from functitan.models.language import check_params
from functitan.models.llama_weights import Weight, config_from, config_to, weights
from functitan.ops.move import unshard
from functitan.sharding.cut import mark_cut
from functitan.sharding.layout import axes_of
from functitan.sharding.mesh import Mesh
from functitan.sharding.rules import AxisRules

INDEX = "model.safetensors.index.json"
FILE_BYTES = 5 * 10**9  # transformers' own default


def from_huggingface(
    directory: str | os.PathLike,
    mesh: Mesh | DeviceMesh | None = None,
    rules: AxisRules | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[tree.Tree, llama.LlamaConfig]:
    """This rank's shards of a Llama, and its config.

    `directory` holds `config.json` and safetensors files, one or several with their index. `dtype` is by default that
    of each weight in the files. Rows of the padded vocabulary that the files do not have are zero.
    Raises `CheckpointError` that lists every weight that is missing, has another shape, or belongs to no parameter.
    """
    what, folder = f"ft.checkpoint.from_huggingface({os.fspath(directory)!r})", Path(directory)
    with clear_errors(what, "give a directory with config.json and safetensors files"):
        config = config_from(json.loads((folder / "config.json").read_text()))
        declared = llama.params(config)
        leaves, known = leaves_of(what, declared, None, mesh, rules)
        with ExitStack() as stack:
            views = _views(what, folder, stack)
            _check(what, leaves, config, views)
            named = weights(config)
            read = [
                _read(views[named[leaf.path].name], named[leaf.path], leaf, leaf.block(known), config.vocab_size)
                for leaf in leaves
            ]
    values = [x.to(device=device, dtype=dtype or x.dtype) for x in read]
    if known is not None:
        for leaf, x in zip(leaves, values, strict=True):
            mark_cut(x, "ft.checkpoint.from_huggingface", leaf.layout, known.sizes)
    return tree.unflatten(tree.flatten(declared)[1], values), config


def to_huggingface(
    directory: str | os.PathLike,
    params: tree.Tree,
    config: llama.LlamaConfig,
    mesh: Mesh | DeviceMesh | None = None,
    rules: AxisRules | None = None,
    *,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
    max_positions: int = 131072,
) -> None:
    """Write a Llama as a directory that `transformers.AutoModelForCausalLM.from_pretrained` reads.

    `params` are this rank's shards; every rank calls this, and rank 0 writes. Weights are gathered one at a time, and
    rank 0 keeps those of one file: at most `file_bytes`, or one weight. `dtype` is by default that of each parameter;
    `max_positions` is noted in `config.json`. The directory is there once it is whole.
    Raises `CheckpointError` on every rank if it is there already, or cannot be written.
    """
    what, place = f"ft.checkpoint.to_huggingface({os.fspath(directory)!r})", locate(directory)
    declared = llama.params(config)
    check_params("llama", params, declared)
    leaves, known = leaves_of(what, params, declared, mesh, rules)
    named, files = weights(config), _files(leaves, config, dtype, file_bytes)
    target, writes = Path(hidden(place).path), known is None or known.rank == 0

    def make() -> None:
        if not place.local or not is_empty(place):
            problem = "it is no local path" if not place.local else "it is there already"
            raise CheckpointError(report(what, [problem], "choose another path"))
        if writes:
            with clear_errors(what, _FIX_WRITE):
                remove_leftovers(place)
                target.mkdir(parents=True)

    def write() -> None:
        failed: OSError | None = None
        names = ["model.safetensors"]
        if len(files) > 1:
            names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        for name, group in zip(names, files, strict=True):
            kept = {}
            for leaf in group:  # every rank gathers, also for one that can write no more
                whole = unshard(leaf.value, leaf.pattern, mesh=known, rules=rules)
                if writes and failed is None:
                    weight = named[leaf.path]
                    kept[weight.name] = _joined(whole, weight, leaf, config.vocab_size).to(dtype or whole.dtype)
            try:
                if kept:
                    save_file(kept, target / name, metadata={"format": "pt"})
            except Exception as error:  # safetensors has an error of its own for what the file system says
                failed = error if isinstance(error, OSError) else OSError(str(error))
        if writes:
            with clear_errors(what, _FIX_WRITE):
                if failed is not None:
                    raise failed
                first = dtype or next(leaf.dtype for leaf in leaves)
                described = config_to(config, str(first).removeprefix("torch."), max_positions)
                (target / "config.json").write_text(json.dumps(described, indent=2))
                if len(files) > 1:
                    pairs = zip(names, files, strict=True)
                    where = {named[leaf.path].name: name for name, group in pairs for leaf in group}
                    size = sum(_bytes(leaf, config, dtype) for leaf in leaves)
                    index = {"metadata": {"total_size": size}, "weight_map": where}
                    (target / INDEX).write_text(json.dumps(index, indent=2))
                for file in target.iterdir():
                    sync(str(file))
                publish(place)

    together(known, f"is about to write {place.name}", make)
    together(known, f"wrote {place.name}", write)


def _views(what: str, folder: Path, stack: ExitStack) -> dict[str, Any]:
    """A lazy view of each weight in the files."""
    if (folder / INDEX).exists():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [f"there is no {name}" for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(report(what, missing, "give a directory with all its safetensors files"))
    views = {}
    for name in names:
        try:
            file = stack.enter_context(safe_open(folder / name, "pt"))
        except Exception as error:  # safetensors' own SafetensorError
            raise CheckpointError(report(what, [f"{name} is damaged: {error}"], "copy it again")) from error
        views |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    return views


def _check(what: str, leaves: list[Leaf], config: llama.LlamaConfig, views: dict[str, Any]) -> None:
    named, problems = weights(config), []
    for leaf in leaves:
        weight = named[leaf.path]
        if weight.name not in views:
            problems.append(f"{weight.name} is missing")
        elif (there := tuple(views[weight.name].get_shape())) != (here := _shape(leaf, weight, config.vocab_size)):
            problems.append(f"{weight.name} has shape {there}, config.json says {here}")
    known = {weight.name for weight in named.values()} | {"lm_head.weight"}  # of a tied model: the embedding again
    strange = [name for name in views if name not in known and not name.endswith("rotary_emb.inv_freq")]
    problems += [f"{name} belongs to no parameter" for name in strange]
    if problems:
        raise CheckpointError(report(what, problems, "give a directory whose config.json is that of its weights"))


def _read(view: Any, weight: Weight, leaf: Leaf, block: Block, vocab_size: int) -> Tensor:
    """A block of a parameter from the part of the weight that holds it: of joined axes, all but the outermost whole."""
    axes, sizes = _axes(leaf), _sizes(leaf, vocab_size)
    part = dict(zip(axes, block, strict=True))
    index, extents, within = [], [], []
    for outer, *inner in weight.dims:
        start, stop = (min(end, sizes[outer]) for end in (part[outer].start, part[outer].stop))
        first = min(start, sizes[outer] - 1)  # a shard of padding alone: safetensors takes no empty slice
        step = math.prod(sizes[axis] for axis in inner)
        index.append(slice(first * step, max(stop, first + 1) * step))
        extents += [max(stop, first + 1) - first, *(sizes[axis] for axis in inner)]
        within += [slice(start - first, stop - first), *(part[axis] for axis in inner)]
    order = [axis for dim in weight.dims for axis in dim]
    x = view[tuple(index)].reshape(extents)[tuple(within)].permute([order.index(axis) for axis in axes])
    missing = [part[axis].stop - part[axis].start - x.shape[at] for at, axis in enumerate(axes)]
    padding = [n for size in reversed(missing) for n in (0, size)]
    return torch.nn.functional.pad(x, padding).contiguous()


def _joined(x: Tensor, weight: Weight, leaf: Leaf, vocab_size: int) -> Tensor:
    """A whole parameter as the weight in the files."""
    axes = _axes(leaf)
    if "vocab" in axes:
        x = x.narrow(axes.index("vocab"), 0, vocab_size)
    x = x.permute([axes.index(axis) for dim in weight.dims for axis in dim])
    return x.detach().cpu().reshape(_shape(leaf, weight, vocab_size)).contiguous().clone()


def _files(
    leaves: list[Leaf], config: llama.LlamaConfig, dtype: torch.dtype | None, file_bytes: int
) -> list[list[Leaf]]:
    """The leaves of each file."""
    files: list[list[Leaf]] = []
    room = 0
    for leaf in leaves:
        size = _bytes(leaf, config, dtype)
        if size > room or not files:
            files.append([])
            room = file_bytes
        files[-1].append(leaf)
        room -= size
    return files


def _bytes(leaf: Leaf, config: llama.LlamaConfig, dtype: torch.dtype | None) -> int:
    known = dtype or leaf.dtype
    assert known is not None
    return math.prod(_sizes(leaf, config.vocab_size).values()) * known.itemsize


def _shape(leaf: Leaf, weight: Weight, vocab_size: int) -> tuple[int, ...]:
    sizes = _sizes(leaf, vocab_size)
    return tuple(math.prod(sizes[axis] for axis in dim) for dim in weight.dims)


def _sizes(leaf: Leaf, vocab_size: int) -> dict[str, int]:
    """The size of each axis in the files, where the vocabulary is not padded."""
    assert leaf.shape is not None
    return dict(zip(_axes(leaf), leaf.shape, strict=True)) | ({"vocab": vocab_size} if "vocab" in _axes(leaf) else {})


def _axes(leaf: Leaf) -> Axes:
    axes = axes_of(leaf.pattern)
    assert axes is not None
    return axes


_FIX_WRITE = "nothing of it is left; make room or choose another place"
