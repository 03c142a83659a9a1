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
from functitan.checkpoint.leaves import Block, Leaf, device_of, leaves_of
from functitan.checkpoint.save import together
from functitan.checkpoint.weight_files import INDEX, SINGLE, Header, check_headers, headers_of, read_json
from functitan.errors import CheckpointError, FunctitanError, report
from functitan.models import llama
from functitan.models.language import check_params
from functitan.models.llama_weights import Weight, config_from, config_to, weights
from functitan.ops.move import unshard
from functitan.reading import path_text
from functitan.sharding.cut import mark_cut
from functitan.sharding.layout import axes_of
from functitan.sharding.mesh import Mesh, is_size
from functitan.sharding.rules import AxisRules

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
    `config.json` is held against the files' headers before anything is declared. Raises `FunctitanError` that lists
    every field of it that is not what it must be, and `CheckpointError` that lists every weight that is missing, has
    another shape or no floating dtype, or belongs to no parameter.
    """
    what = f"ft.checkpoint.from_huggingface({path_text('ft.checkpoint.from_huggingface', directory)!r})"
    folder, device = Path(directory), device_of(what, device)
    _check_dtype(what, dtype)
    with clear_errors(what, "give a directory with config.json and safetensors files"):
        config = config_from(read_json(what, folder, "config.json"), str(folder / "config.json"))
        headers = headers_of(what, folder)
        check_headers(what, config, headers)
        declared, named = llama.params(config), weights(config)
        leaves, known = leaves_of(what, declared, None, mesh, rules)
        with ExitStack() as stack:
            views = _views(what, folder, headers, stack)
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
    what = f"ft.checkpoint.to_huggingface({path_text('ft.checkpoint.to_huggingface', directory)!r})"
    _check_dtype(what, dtype)
    problems = [
        f"{name} is {n!r}: it must be a whole number of at least 1"
        for name, n in {"file_bytes": file_bytes, "max_positions": max_positions}.items()
        if not is_size(n)
    ]
    if not isinstance(config, llama.LlamaConfig):
        problems.append(f"config is a {type(config).__name__}, not a LlamaConfig")
    if problems:
        raise FunctitanError(report(what, problems, "give the config that the parameters were declared with"))
    place, declared = locate(directory), llama.params(config)
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
        names = [SINGLE]
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


def _views(what: str, folder: Path, headers: dict[str, Header], stack: ExitStack) -> dict[str, Any]:
    """A lazy view of each weight."""
    views = {}
    for name in sorted({header.file for header in headers.values()}):
        try:
            file = stack.enter_context(safe_open(folder / name, "pt"))
            views |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        except Exception as error:  # safetensors' own SafetensorError
            raise CheckpointError(report(what, [f"{name} is damaged: {error}"], "copy it again")) from error
    return views


def _check_dtype(what: str, dtype: object) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise FunctitanError(report(what, [f"dtype is {dtype!r}"], "give a floating dtype, as dtype=torch.bfloat16"))


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
