"""`ft.from_module`: an existing `nn.Module` as a function and a tree of parameters.

Invariant: the function is pure: parameters come in as an argument, nothing of the module given is changed, and ranks
that are threads share no module. On a mesh a parameter is whole only while it is used, and its cotangent is the sum of
all ranks that have a part of the batch.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from functitan import tree
from functitan.axes import Axes, parse_axes
from functitan.errors import FunctitanError, PatternError, nearest, report
from functitan.ops.contraction import move
from functitan.ops.replica import one_replica, spread
from functitan.ops.types import Type
from functitan.param import Block, Param
from functitan.sharding.context import current, using
from functitan.sharding.cut import refuse_shards
from functitan.sharding.layout import whole
from functitan.sharding.steps import Label


def from_module(
    module: nn.Module, patterns: Mapping[str, str] | None = None, *, batch: str = "batch"
) -> tuple[Callable[..., Any], tree.Tree]:
    """`(function, params)`, so that `function(params, *args)` is `module(*args)`.

    `params` is a tree of nested dicts, a leaf's path its name in the module; a parameter that stands twice is one leaf.
    Without `patterns` the leaves are the module's own tensors, detached, and the function is plain PyTorch.

    `patterns` gives each parameter's axes, by the first glob that its path matches, as in {"*.bias": "embed", "*":
    "embed mlp"}. Then the leaves are declarations, `ft.Param`, that begin as the module's values: what
    `ft.TrainState.create` and `ft.init` take; those whose `requires_grad` is False are frozen. On a mesh each rank runs
    the module on its rows of the batch, the shard of an axis `batch`; parameters lie as the rules say, and are gathered
    for the call.

    Buffers stay as they are in the module now. Raises `FunctitanError` for a parameter without a pattern, a glob that
    matches nothing, and in the call, if the module writes to a buffer: its state would be lost.

    >>> import torch
    >>> function, params = from_module(nn.Linear(2, 3))
    >>> sorted(params), function(params, torch.ones(4, 2)).shape
    (['bias', 'weight'], torch.Size([4, 3]))
    """
    named = dict(module.named_parameters())
    axes = _axes_of(named, patterns)
    skeleton = _skeleton(module)
    copies = threading.local()  # functional_call puts parameters into a module while it runs

    def function(params: tree.Tree, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(tree.paths(params), tree.leaves(params), strict=True))
        if given.keys() != named_paths:
            problems = [f"there is no {path}" for path in sorted(named_paths - given.keys())]
            problems += [f"{path} is no parameter" for path in sorted(given.keys() - named_paths)]
            raise FunctitanError(report("a function of ft.from_module", problems, "give the params that came with it"))
        if not hasattr(copies, "module"):
            copies.module = copy.deepcopy(skeleton)
        before = {name: x._version for name, x in copies.module.named_buffers()}
        out = functional_call(copies.module, _gathered(given, axes, batch), args, kwargs)
        written = [name for name, x in copies.module.named_buffers() if x._version != before.get(name)]
        if written:
            copies.module = copy.deepcopy(skeleton)
            problems = [f"the module wrote to its buffer {name}" for name in written]
            raise FunctitanError(report("a function of ft.from_module", problems, "give module.eval()"))
        return out

    named_paths = set(named)
    if axes is None:
        return function, _nested({name: x.detach() for name, x in named.items()})
    declared = {name: _declared(axes[name], x) for name, x in named.items()}
    return function, _nested(declared)


def _gathered(given: dict[str, Tensor], axes: dict[str, Axes] | None, batch: str) -> dict[str, Tensor]:
    """Each parameter whole, one copy for each part of the batch."""
    env = current()
    if env.mesh is None:
        refuse_shards("a function of ft.from_module", given.items())
        return given
    if axes is None:
        problem = "on a mesh its parameters need axes"
        raise FunctitanError(report("a function of ft.from_module", [problem], "give from_module(module, patterns=)"))
    dims = env.layout((batch,)).of(batch)
    copies = {name: spread(axes[name], x, dims) for name, x in given.items()}
    inner = one_replica(dims)
    if inner.mesh is None:
        return copies
    with using(inner):
        return {
            name: move(Type(axes[name]), Type(axes[name], layout=whole(axes[name])), x, inner, Label("module", name))
            for name, x in copies.items()
        }


def _axes_of(named: Mapping[str, Tensor], patterns: Mapping[str, str] | None) -> dict[str, Axes] | None:
    if patterns is None:
        return None
    found: dict[str, Axes] = {}
    problems, used = [], set()
    for name, x in named.items():
        glob = next((glob for glob in patterns if fnmatchcase(name, glob)), None)
        if glob is None:
            problems.append(f"no glob matches {name} {tuple(x.shape)}")
            continue
        used.add(glob)
        found[name] = parse_axes(patterns[glob])
        if len(found[name]) != x.dim():
            problems.append(f"{name} {tuple(x.shape)}: {glob!r} gives it {patterns[glob]!r}")
    problems += [
        f"{glob!r} is the first match of nothing{nearest(glob, named)}" for glob in patterns if glob not in used
    ]
    if problems:
        fix = "name each dimension of each parameter, as in {'*.weight': 'mlp embed', '*': 'mlp'}; first match wins"
        raise PatternError(report("ft.from_module", problems, fix))
    return found


def _declared(axes: Axes, x: Tensor) -> Param:
    return Param(" ".join(axes), tuple(x.shape), _BeginsAs(x), x.dtype, trainable=x.requires_grad)


@dataclass(frozen=True, eq=False)
class _BeginsAs:
    """An initializer that gives a tensor's values of then; equal to another of the same tensor object alone."""

    x: Tensor

    def __call__(self, key: Tensor, param: Param, block: Block) -> Tensor:
        x = self.x.detach()
        return (x if block is None else x[block]).to(key.device, copy=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BeginsAs) and other.x is self.x

    def __hash__(self) -> int:
        return id(self.x)


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy of a module that holds no parameter's data."""
    empty = {id(x): nn.Parameter(x.detach().to("meta"), requires_grad=False) for x in module.parameters()}
    return copy.deepcopy(module, dict[int, Any](empty))


def _nested(leaves: dict[str, Any]) -> tree.Tree:
    """{"a.b": x} as {"a": {"b": x}}."""
    found: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        place = found
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    return found
