"""Donation: a value whose buffers its consumer may overwrite, and a clear error for who uses it again.

Invariant: before the first write the consumer has tensor objects of its own, and those that were given are `Donated`:
whatever reads one raises `DonatedError`. Memory that anybody else can see is copied, never overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

from functitan import tree
from functitan.errors import DonatedError, FunctitanError, NonFiniteError, report
from functitan.ops.function import transforms_active

TAKEN = "taken"  # for `donate`: the tensors are objects of the callee's own already

Where = tuple[str, Any]  # who took a tensor over, and the number that belongs into the text: a tensor, read if need be
_WHERE = "_functitan_donated"


class Donated(Tensor):
    """What a donated tensor object turns into: any use of it raises `DonatedError`. No value is computed with it.

    The class is the mark: every function of torch asks the classes of its arguments, so that no reader need know.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise DonatedError(report("a tensor that is used again", [f"it {_told(_found((args, kwargs)))}"], _FIX))


class _DonatedFake(FakeTensor):
    """The same of a tensor that a program is traced on."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Donated.__torch_function__(func, types, args, kwargs)


def is_donated(leaf: Any) -> bool:
    """True for a tensor object whose buffer was given away."""
    return type(leaf) in (Donated, _DonatedFake)


@contextmanager
def taken(value: tree.Tree, where: Where) -> Iterator[tree.Tree]:
    """`value` as tensors of the body's own, which it may write into; those of `value` are `Donated` from now on.

    A `FunctitanError` that the body raises before it has written anything gives `value` back; so does a
    `NonFiniteError`, which says that all is as it was.

    >>> import torch
    >>> old = {"w": torch.zeros(2)}
    >>> with taken(old, ("step {}", torch.tensor(3))) as own:
    ...     new = {"w": own["w"].add_(1)}
    >>> new["w"] + old["w"]
    Traceback (most recent call last):
    ...
    functitan.errors.DonatedError: a tensor that is used again:
      - it was donated to step 3: its buffer holds newer values now
      Fix: use the state that the step returned, clone what you keep, or make the step with donate=False
    """
    leaves, structure = tree.flatten(value)
    own = take(leaves, where)
    before = _versions(own)
    try:
        yield tree.unflatten(structure, own)
    except NonFiniteError:  # raised where what was written is what there was
        give_back(leaves, own)
        raise
    except FunctitanError:  # of a check; whatever else raises may have written as torch does not count
        if before is not None and _versions(own) == before:
            give_back(leaves, own)
        raise


def take(leaves: list[Any], where: Where, check: Callable[[], None] = lambda: None) -> list[Any]:
    """For each tensor another object with its memory, or with a copy of it where somebody else sees that memory.

    Views, arrays and graphs that were made of a tensor keep their values so; so do two leaves that share memory, where
    `check`, which is asked then, lets them. Where a leaf is differentiated, or transformed by torch.func, nothing is
    donated. Costs 1.4 us a leaf.
    """
    if transforms_active() or (
        torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
    ):
        return [x.clone() if isinstance(x, Tensor) else x for x in leaves]
    alone = [type(x) in _SOLID and _is_alone(x) for x in leaves]
    if len(set(map(id, leaves))) < len(leaves):  # one object stands twice
        alone = [
            free and not any(x is y for y in leaves[:i]) for i, (x, free) in enumerate(zip(leaves, alone, strict=True))
        ]
    if not all(alone):
        check()
    copied = lambda x: x.detach().clone() if isinstance(x, Tensor) else x
    own = [x.detach() if free or type(x) is FakeTensor else copied(x) for x, free in zip(leaves, alone, strict=True)]
    try:
        with torch._C.DisableTorchFunctionSubclass():  # private: tried on torch 2.13
            _end(leaves, own, alone, where)
    except BaseException:
        give_back(leaves, own)
        raise
    return own


def _end(leaves: list[Any], own: list[Any], alone: list[bool], where: Where) -> None:
    """Make tensor objects `Donated`, now that others have their memory, or copies of it."""
    note, dead = (where, Tensor, True), None
    for x, y, free in zip(leaves, own, alone, strict=True):
        kind = type(x)
        end = _ENDS.get(kind)
        if end is None:  # no tensor, one that is copied, or one that stands twice
            continue
        if x.__dict__:  # notes on the value, as that of how it lies
            y.__dict__.update(x.__dict__)
        x.__dict__[_WHERE] = note if free and kind is Tensor else (where, kind, free)
        x.__class__ = end
        if free:  # else somebody sees its memory, perhaps by its own C++ object, and that is not written into
            try:
                x.data = dead  # seen where no class is asked (torch.func.grad); and what was given holds no memory
            except (TypeError, RuntimeError):  # the first, or on another device
                dead = torch.full((), torch.nan, device=x.device)
                x.data = dead


def give_back(leaves: Sequence[Any], own: Sequence[Any]) -> None:
    """Undo `take`, whose result was not written into: the leaves have their values again."""
    with torch._C.DisableTorchFunctionSubclass():
        for x, y in zip(leaves, own, strict=True):
            if is_donated(x):
                _, x.__class__, free = x.__dict__.pop(_WHERE)
                if free:
                    x.data = y


def _is_alone(x: Tensor) -> bool:
    """True if nothing but this tensor can see its memory: no view, array, graph, or whoever made the memory."""
    # private torch API, tried on torch 2.13: how many hold a tensor, and its storage, which `storage` holds too
    storage = x.untyped_storage()
    alone = torch._C._storage_Use_Count(storage._cdata) == 2 and x._use_count() == 1  # type: ignore[attr-defined]
    return alone and storage.resizable()  # memory that others made cannot be resized


def _versions(own: list[Any]) -> list[int] | None:
    """How often each tensor was written into; `None` where torch does not count."""
    try:
        return [x._version for x in own if isinstance(x, Tensor)]
    except RuntimeError:  # inference mode
        return None


def _found(value: Any) -> Where | None:
    """Where the first donated tensor of a call was donated."""
    if is_donated(value):
        return value.__dict__[_WHERE][0]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((found for found in map(_found, inside) if found is not None), None)


def _told(where: Where | None) -> str:
    text, number = ("somebody", None) if where is None else where
    return f"was donated to {text.format(_read(number))}: its buffer holds newer values now"


def _read(number: Any) -> str:
    """A tensor's number, if it has one: what is traced, or was donated itself, has none."""
    with suppress(Exception), _disable_current_modes():  # the error that is told matters more than its number
        return str(int(number)) if type(number) is Tensor else "?"
    return "?"


def check_donated(
    value: tree.Tree, what: str, donates: tuple[int, ...] | None = None, leaves: list[Any] | None = None
) -> None:
    """Raise `DonatedError` that lists every leaf that was donated before, and every donated buffer that stands twice.

    `donates` are the numbers of the entries of `value`, a tuple, that are donated now (`None`: all are); `leaves` its
    leaves, where they are known. A good value costs 0.2 us a leaf.
    """
    leaves = tree.leaves(value) if leaves is None else leaves
    if not any(map(is_donated, leaves)) if donates == () or transforms_active() else _plainly_good(leaves):
        return  # what torch.func has wrapped has no memory to compare
    paths = tree.paths(value)
    free = {i for i, path in enumerate(paths) if donates is None or path.split(".")[0] in map(str, donates)}
    free = set() if transforms_active() else free
    problems, seen = [], {}
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if is_donated(leaf):
            problems.append(f"{path} {_told(_found(leaf))}")
        elif free and type(leaf) in _SOLID and _is_dense(leaf) and leaf.numel() and leaf.device.type != "meta":
            for twin in seen.setdefault(leaf.untyped_storage()._cdata, []):
                if (i in free or twin in free) and _overlap(leaf, leaves[twin]):
                    problems.append(f"{path} and {paths[twin]} share a buffer: a donated buffer stands once")
            seen[leaf.untyped_storage()._cdata].append(i)
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise DonatedError(report(what, shown, _FIX))


def _plainly_good(leaves: list[Any]) -> bool:
    """True where nothing was donated and every storage is another."""
    try:
        places = [x.untyped_storage()._cdata for x in leaves if type(x) in _SOLID]
    except NotImplementedError:  # of a sparse or nested tensor
        return False
    return len(set(places)) == len(leaves)


def _is_dense(x: Tensor) -> bool:
    """True for a tensor with one storage."""
    return x.layout == torch.strided and not x.is_nested


def _overlap(x: Tensor, y: Tensor) -> bool:
    """True if two leaves of one storage share bytes: parts of one flat buffer do not."""
    first, second = sorted((_range(x), _range(y)))
    return first[1] > second[0]


def _range(x: Tensor) -> tuple[int, int]:
    """First byte of its storage that a tensor uses, and the one after its last."""
    first = int(x.storage_offset())
    last = first + sum((int(n) - 1) * int(s) for n, s in zip(x.shape, x.stride(), strict=True))
    return first * x.element_size(), (last + 1) * x.element_size()


_SOLID = (Tensor, Parameter)  # what has memory of its own
_ENDS: dict[type, type] = {Tensor: Donated, Parameter: Donated, FakeTensor: _DonatedFake}  # what tensors turn into
_FIX = "use the state that the step returned, clone what you keep, or make the step with donate=False"
