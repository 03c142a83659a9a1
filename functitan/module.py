"""`ft.from_module`: an existing `nn.Module` as a function and a tree of parameters.

Invariant: the function is pure: parameters come in as an argument, nothing of the module given is changed, and ranks
that are threads share no module. On a mesh a parameter is whole only while it is used, and its cotangent is the sum of
all ranks that have a part of the batch.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Mapping
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
from functitan.sharding.message import Label


def from_module(
    module: nn.Module, patterns: Mapping[str, str] | None = None, *, batch: str = "batch", buffers: bool = False
) -> tuple[Any, ...]:
    """`(function, params)`, so that `function(params, *args)` is `module(*args)`.

    `params` is a tree of nested dicts, a leaf's path its name in the module; a parameter that stands twice is one leaf.
    Without `patterns` the leaves are the module's own tensors, detached, and the function is plain PyTorch.

    `patterns` gives each parameter's axes, by the first glob that its path matches, as in {"*.bias": "embed", "*":
    "embed mlp"}. Then the leaves are declarations, `ft.Param`, that begin as the module's values: what
    `ft.TrainState.create` and `ft.init` take; those whose `requires_grad` is False are frozen. On a mesh each rank runs
    the module on its rows of the batch, the shard of an axis `batch`; parameters lie as the rules say, and are gathered
    for the call.

    Buffers stay as they are in the module now: what a module in train mode writes into them, running statistics, is
    lost, and the first call warns of it. With `buffers=True` they are state, `(function, params, buffers)`, so that
    `function(params, buffers, *args)` is `(module(*args), new buffers)`: hand them through a loss with the batch, and
    back as its aux. Raises `FunctitanError` for a parameter without a pattern, a glob that matches nothing, and in the
    call, if the module writes to a buffer where ranks have other rows: each would have statistics of its own.

    >>> import torch
    >>> function, params = from_module(nn.Linear(2, 3))
    >>> sorted(params), function(params, torch.ones(4, 2)).shape
    (['bias', 'weight'], torch.Size([4, 3]))
    >>> function, params, buffers = from_module(nn.BatchNorm1d(2, affine=False), buffers=True)
    >>> out, buffers = function(params, buffers, torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    >>> buffers["running_mean"]
    tensor([0.2000, 0.2000])
    """
    named = dict(module.named_parameters())
    names = set(named)  # all that the function keeps of them
    axes = _axes_of(named, patterns)
    skeleton = _skeleton(module)
    copies = threading.local()  # functional_call puts parameters into a module while it runs

    warned: list[bool] = []

    def called(params: tree.Tree, state: tree.Tree, args: Any, kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The module's result, and its buffers after the call, by name; `state` are those before, or `None`."""
        given = _named_leaves(params, names, "parameter", "params")
        if not hasattr(copies, "module"):
            copies.module = copy.deepcopy(skeleton)
        own = dict(copies.module.named_buffers())
        if state is not None:  # written to in place, or replaced: a copy takes it, the caller's stays
            own = {name: x.clone() for name, x in _named_leaves(state, set(own), "buffer", "buffers").items()}
        before = {name: (x, x._version) for name, x in own.items()}
        tensors = _gathered(given, axes, batch) | (own if state is not None else {})
        out = functional_call(copies.module, tensors, args, kwargs)
        after = {name: tensors[name] for name in own} if state is not None else dict(copies.module.named_buffers())
        written = [name for name, (x, version) in before.items() if after[name] is not x or x._version != version]
        if written:
            copies.module = copy.deepcopy(skeleton)
            _check_rows(written, batch)
        if written and state is None and not warned:
            warned.append(True)
            problems = [f"the module wrote to its buffer {name}, which is lost" for name in written]
            warnings.warn(report("a function of ft.from_module", problems, _FIX_LOST), stacklevel=3)
        return out, after

    def function(params: tree.Tree, *args: Any, **kwargs: Any) -> Any:
        return called(params, None, args, kwargs)[0]

    def with_buffers(params: tree.Tree, buffers: tree.Tree, *args: Any, **kwargs: Any) -> tuple[Any, tree.Tree]:
        out, after = called(params, buffers, args, kwargs)
        return out, _nested({name: x.detach() for name, x in after.items()})

    leaves = {name: x.detach() if axes is None else _declared(axes[name], x) for name, x in named.items()}
    if not buffers:
        return function, _nested(leaves)
    return with_buffers, _nested(leaves), _nested({name: x.detach().clone() for name, x in module.named_buffers()})


def _named_leaves(values: tree.Tree, expected: set[str], kind: str, name: str) -> dict[str, Tensor]:
    """The leaves of a tree by path. Raises `FunctitanError` if these are not what the module has."""
    given = dict(zip(tree.paths(values), tree.leaves(values), strict=True))
    if given.keys() != expected:
        problems = [f"there is no {path}" for path in sorted(expected - given.keys())]
        problems += [f"{path} is no {kind}" for path in sorted(given.keys() - expected)]
        raise FunctitanError(report("a function of ft.from_module", problems, f"give the {name} that came with it"))
    return given


def _check_rows(written: list[str], batch: str) -> None:
    """Raise `FunctitanError` where ranks have other rows, of which each would keep statistics of its own."""
    env = current()
    dims = () if env.mesh is None else env.layout((batch,)).of(batch)
    if dims:
        problems = [f"the module wrote to its buffer {name}, from the rows of this rank alone" for name in written]
        fix = f"{batch!r} lies over {'·'.join(dims)}: give module.eval(), or normalize by ft.reduce over the batch"
        raise FunctitanError(report("a function of ft.from_module", problems, fix))


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


_FIX_LOST = "give module.eval(), or from_module(module, buffers=True), whose function takes and gives the buffers"
