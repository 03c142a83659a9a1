"""The metadata file of torch.distributed.checkpoint, which is a pickle, read without running it.

Invariant: nothing that a pickle names is imported, made or called. A class stands here as its name, an object as what
it would be made of, a dict as its pairs; names that are not of DCP's metadata are refused.
"""

from __future__ import annotations

import pickletools
from typing import Any, NamedTuple

import torch


class Name(NamedTuple):
    """A class or function that a pickle names."""

    module: str
    name: str


class Made(NamedTuple):
    """An object: what it would be made by, of which arguments, and its states."""

    by: Name
    args: Any
    states: list[Any]


class Pairs(NamedTuple):
    """A dict: keys that repeat, or that nothing can hash, are still only pairs."""

    items: list[tuple[Any, Any]]


class ForbiddenName(ValueError):
    """A pickle that names what is not of DCP's metadata."""


def records(data: bytes) -> Any:
    """The value of a pickle, made of `Made`, `Pairs`, names, lists, tuples and scalars.

    Raises `ForbiddenName` for names outside of DCP's metadata, and `ValueError` for all that is no such pickle.

    >>> import pickle
    >>> records(pickle.dumps({"a": torch.Size([2])}))
    Pairs(items=[('a', Made(by=Name(module='torch', name='Size'), args=((2,),), states=[]))])
    """
    try:
        return _run(data)
    except ForbiddenName:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"it is no whole pickle: {str(error)[:200] or type(error).__name__}") from error


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    outer: list[list[Any]] = []  # a mark begins a stack of its own
    memo: dict[Any, Any] = {}
    for opcode, arg, _ in pickletools.genops(data):
        match opcode.name:
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[arg])
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[arg] = stack[-1]
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _SCALARS:
                stack.append(arg)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                count = int(name[-1])
                if len(stack) < count:
                    raise ValueError(f"{name} of {len(stack)} items")
                stack[-count:] = [tuple(stack[-count:])]
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append(Pairs([]))
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE" | "LIST" | "DICT" | "APPENDS" | "SETITEMS" as name:
                items, stack = stack, outer.pop()
                if name == "TUPLE":
                    stack.append(tuple(items))
                elif name in ("LIST", "APPENDS"):
                    _list(stack, name == "LIST").extend(items)
                else:
                    _pairs(stack, name == "DICT").extend(zip(items[::2], items[1::2], strict=True))
            case "APPEND":
                item = stack.pop()
                _list(stack, False).append(item)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _pairs(stack, False).append((key, value))
            case "GLOBAL":
                module, _, name = str(arg).partition(" ")
                stack.append(_allowed(module, name))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_allowed(module, name))
            case "REDUCE" | "NEWOBJ":
                args, by = stack.pop(), stack.pop()
                if not isinstance(by, Name) or not isinstance(args, tuple):
                    raise ValueError(f"{opcode.name} of a {type(by).__name__}")
                stack.append(Pairs([]) if by.name == "OrderedDict" and not args else Made(by, args, []))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], Made):
                    raise ValueError(f"a state of a {type(stack[-1]).__name__}")
                stack[-1].states.append(state)
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"it has the instruction {name}, which DCP does not write")
    raise ValueError("it does not end")


def _list(stack: list[Any], new: bool) -> list[Any]:
    if new:
        stack.append([])
    if not isinstance(stack[-1], list):
        raise ValueError(f"items of a {type(stack[-1]).__name__}")
    return stack[-1]


def _pairs(stack: list[Any], new: bool) -> list[Any]:
    if new:
        stack.append(Pairs([]))
    if not isinstance(stack[-1], Pairs):
        raise ValueError(f"pairs of a {type(stack[-1]).__name__}")
    return stack[-1].items


def _allowed(module: object, name: object) -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a class that is not named by texts")
    if name not in ALLOWED.get(module, ()):
        raise ForbiddenName(f"it names {module[:80]}.{name[:80]}, which is no part of DCP's metadata")
    return Name(module, name)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SCALARS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"} | {
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES"
}  # fmt: skip
DTYPES = {name: dtype for name in dir(torch) if isinstance(dtype := getattr(torch, name), torch.dtype)}
_PATHS = frozenset({"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"})  # of StorageMeta.checkpoint_id
ALLOWED: dict[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {"Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"}
        | {"BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"}
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    "torch": frozenset({"Size", *DTYPES}),
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict"}),  # of planner_data
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}
