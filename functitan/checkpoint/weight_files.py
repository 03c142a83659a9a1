"""The safetensors files of a Hugging Face directory: which weights there are, of which shapes, in which file.

Invariant: all is known from the files' headers, and held against the config, before a parameter is declared or a byte
of a weight is read.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from functitan.errors import CheckpointError, report
from functitan.models.llama import LlamaConfig
from functitan.models.llama_weights import Weight, weights
from functitan.reading import name_problem, parsed_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_BYTES = 100 * 10**6  # safetensors' own limit


class Header(NamedTuple):
    """What a file says of a weight: its file, its dtype as safetensors names it, its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_json(what: str, folder: Path, name: str) -> Any:
    """A JSON file of the directory. Raises `CheckpointError` that names it."""
    try:
        return parsed_json((folder / name).read_bytes())
    except ValueError as error:
        raise CheckpointError(report(what, [f"{name}: {error}"], "copy it again")) from error


def headers_of(what: str, folder: Path) -> dict[str, Header]:
    """The header of each weight. Raises `CheckpointError` for files that are missing, damaged, or name others."""
    found: dict[str, Header] = {}
    problems = []
    placed = {} if (folder / SINGLE).exists() else _index(what, folder)
    for file in sorted(set(placed.values())) or [SINGLE]:
        if not (folder / file).is_file():
            problems.append(f"there is no {file}")
            continue
        try:
            mine = _header(folder / file)
        except (ValueError, OSError) as error:
            problems.append(f"{file} is damaged: {error}")
            continue
        problems += [f"{name} is in {found[name].file}, and again in {file}" for name in mine if name in found]
        found |= {name: Header(file, dtype, shape) for name, (dtype, shape) in mine.items()}
    lost = [name for name, file in placed.items() if name not in found or found[name].file != file]
    if not problems:
        problems = [f"{INDEX} has {name} in {placed[name]}, which does not have it" for name in lost]
    if problems:
        raise CheckpointError(report(what, problems, "give a directory with all its safetensors files, as they were"))
    return found


def check_headers(what: str, config: LlamaConfig, headers: dict[str, Header]) -> None:
    """Raise `CheckpointError` that lists each weight that is missing, unknown, or not of the config's shape."""
    names = [match[1] for name in headers if (match := re.match(r"model\.layers\.(\d{1,18})\.", name))]
    layers = len(set(names))
    problems = []
    if layers != config.num_layers:
        problems.append(
            f"num_hidden_layers is {config.num_layers} in config.json, the files have weights of {layers} layers"
        )
    known = weights(config._replace(num_layers=min(config.num_layers, layers + 1)))
    for weight in known.values():
        header, here = headers.get(weight.name), shape_of(weight, config)
        if header is None:
            problems.append(f"{weight.name} is missing")
        elif header.shape != here:
            problems.append(f"{weight.name} has shape {header.shape}, config.json says {here}")
        elif header.dtype not in DTYPES:
            problems.append(f"{weight.name} in {header.file} is {header.dtype}, not one of {', '.join(DTYPES)}")
    ours = {weight.name for weight in known.values()} | {"lm_head.weight"}  # of a tied model: the embedding again
    strange = [name for name in headers if name not in ours and not name.endswith("rotary_emb.inv_freq")]
    problems += [f"{name[:200]} belongs to no parameter" for name in strange]
    if problems:
        raise CheckpointError(report(what, problems, _FIX))


def shape_of(weight: Weight, config: LlamaConfig) -> tuple[int, ...]:
    """A weight's shape in the files, where the vocabulary is not padded."""
    sizes = {"vocab": config.vocab_size, "embed": config.embed, "mlp": config.mlp, "head_dim": config.head_dim}
    sizes |= {"heads": config.num_heads, "kv_heads": config.num_kv_heads}
    return tuple(math.prod(sizes[axis] for axis in dim) for dim in weight.dims)


def _index(what: str, folder: Path) -> dict[str, str]:
    """The file of each weight, by the index; nothing without one."""
    if not (folder / INDEX).exists():
        return {}
    index = read_json(what, folder, INDEX)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        problems = [f"{INDEX}: there is no weight_map, a dict from the names of weights to those of their files"]
    else:
        wrong = {file if isinstance(file, str) else type(file).__name__: file for file in placed.values()}
        problems = [f"{INDEX}: {problem}" for file in wrong.values() if (problem := name_problem(file)) is not None]
    if problems:
        raise CheckpointError(report(what, problems, "take a directory from elsewhere only as it was written"))
    assert isinstance(placed, dict)
    return placed


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each weight in a file. Raises `ValueError`."""
    with open(path, "rb") as file:
        whole = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if whole < 8 or not 2 <= length <= min(whole - 8, HEADER_BYTES):
            raise ValueError(f"its header would be of {length} bytes, the file is of {whole}")
        header = parsed_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no dict")
    header.pop("__metadata__", None)
    return {name: _entry(name, entry, whole - 8 - length) for name, entry in header.items()}


def _entry(name: str, entry: Any, stored: int) -> tuple[str, tuple[int, ...]]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
            size = DTYPES.get(dtype)
            sized = all(type(n) is int and n >= 0 for n in shape) and 0 <= start <= stop <= stored
            if sized and (size is None or math.prod(shape) * size == stop - start):
                return dtype, tuple(shape)
    raise ValueError(f"its header is wrong of {name[:200]}")


DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # those that a Llama computes in, and their bytes
_FIX = "nothing is allocated after a CheckpointError: give a directory whose config.json is that of its weights"
