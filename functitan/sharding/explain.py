"""`ft.explain`: what a program would communicate and hold on any mesh, worked out by running it on fake tensors.

Invariant: the program runs as it would on rank 0 of that mesh, with every collective replaced by its shape; nothing is
allocated or sent.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from functitan import tree
from functitan.axes import write_axes
from functitan.errors import MeshError, PatternError, check_function, report
from functitan.param import Param
from functitan.sharding.context import as_mesh, using
from functitan.sharding.cut import mark_cut
from functitan.sharding.env import Env
from functitan.sharding.layout import Layout, check_leaves, layout_of, local_shape
from functitan.sharding.ledger import Ledger, entering
from functitan.sharding.mesh import Mesh, MeshSizes, mesh_sizes
from functitan.sharding.rules import AxisRules, idle_dims
from functitan.sharding.shapes import shapes_only


def explain(
    fn: Callable[..., Any],
    *args: Any,
    mesh: DeviceMesh | Mesh | Mapping[str, int],
    rules: AxisRules | None = None,
    patterns: tree.Tree = None,
) -> Ledger:
    """The ledger of one call of `fn` on a mesh: its collectives in order, and the memory of one rank.

    `args` have global shapes: tensors (on "meta" will do), `Param`s, or anything else, which is passed as it is.
    `patterns` is a tree or prefix of the patterns of `args`, a tuple with an entry for each; `None` and missing ones
    mean whole tensors, and a `Param` brings its own. `mesh` is `{name: size}` or a mesh. Raises before the run what
    `ft.shard` would raise.

    >>> import functitan as ft
    >>> matmul = lambda x, w: ft.einsum("batch embed, embed mlp -> batch mlp", x, w)
    >>> rules = ft.AxisRules({"batch": "fsdp", "mlp": None, "embed": "fsdp"})
    >>> args = Param("batch embed", (64, 256)), Param("embed mlp", (256, 512))
    >>> ledger = explain(matmul, *args, mesh=dict(fsdp=4), rules=rules)
    >>> [(entry.collective, entry.mesh_dims, entry.bytes) for entry in ledger]
    [('all_gather', ('fsdp',), 393216)]
    """
    sizes = _sizes(mesh)
    if not isinstance(rules, AxisRules):
        raise MeshError(report("ft.explain", [f"rules is {rules!r}"], "give a table: rules=ft.AxisRules({...})"))
    check_function(fn, "ft.explain")
    each = isinstance(patterns, (tuple, list)) and len(patterns) == len(args)
    given = tuple(patterns) if each else (patterns,) * len(args)
    if type(patterns) is tuple and len(args) > 1 and not each:
        problem = f"{len(patterns)} patterns for {len(args)} arguments"
        raise PatternError(report("ft.explain", [problem], "give one for each argument; None for a whole tensor"))
    leaves, structure = tree.flatten(args)
    known = [_declared(x, p) for x, p in zip(leaves, tree.broadcast_prefix(given, args, "ft.explain"), strict=True)]
    shapes = [() if pattern is None else tuple(leaf.shape) for leaf, pattern in zip(leaves, known, strict=True)]
    names = [f"argument {path}" for path in tree.paths(args)]
    layouts = check_leaves("ft.explain", zip(names, known, shapes, strict=True), rules, sizes)
    ledger = Ledger(f"one call on {dict(zip(sizes.dims, sizes.sizes, strict=True))}, rank 0")
    env = Env(around=(entering(ledger),)).on(Mesh(sizes, (0,) * len(sizes.dims), shapes_only()), rules)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shards = [_shard(leaf, layout, sizes, what) for leaf, layout, what in zip(leaves, layouts, names, strict=True)]
        memory = _Memory([x for x in shards if isinstance(x, Tensor)])
        ledger.argument_bytes = memory.alive
        with using(env), memory:
            fn(*tree.unflatten(structure, shards))
        ledger.peak_bytes = memory.peak
    ledger.notes += _unused(rules, ledger, sizes)
    if patterns is None and any(isinstance(x, Tensor) and x.dim() for x in leaves) and math.prod(sizes.sizes) > 1:
        ledger.notes.append("patterns= is not given: tensors among the arguments are whole on every rank")
    return ledger


class _Memory(TorchDispatchMode):
    """Bytes of the storages alive, and the most there were."""

    def __init__(self, arguments: list[Tensor]) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()
        for x in arguments:
            self._enter(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for more often than all else together
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self._enter(x)
        return out

    def _enter(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._leave, storage._cdata, storage.nbytes())

    def _leave(self, identity: int, nbytes: int) -> None:
        self.known.discard(identity)
        self.alive -= nbytes


def _sizes(mesh: Any) -> MeshSizes:
    if isinstance(mesh, Mapping):
        return mesh_sizes(mesh)
    known = as_mesh(mesh)
    if known is None:
        raise MeshError(report("ft.explain", ["mesh is None"], "give sizes, as in mesh=dict(fsdp=64, tp=8)"))
    return known.sizes


def _declared(leaf: Any, pattern: Any) -> Any:
    """What says how an argument lies: itself if it is a declaration, the pattern of a tensor, or nothing."""
    return leaf if isinstance(leaf, Param) else pattern if isinstance(leaf, Tensor) else None


def _shard(leaf: Any, layout: Layout | None, sizes: MeshSizes, what: str) -> Any:
    if layout is not None:
        x = torch.empty(local_shape(layout, tuple(leaf.shape), sizes), dtype=leaf.dtype)
        zigzag = (1,) * x.dim() if isinstance(leaf, Param) else None
        return mark_cut(x, f"ft.explain, as {what}", layout, sizes, zigzag)
    return torch.empty(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _unused(rules: AxisRules, ledger: Ledger, sizes: MeshSizes) -> list[str]:
    """Mesh dims that no rule uses, rules that no pattern used, and rules that name mesh dims but never won one."""
    used = {axis for axes in ledger.patterns for axis in axes}
    won = {axis for axes in ledger.patterns for axis in axes if layout_of(axes, rules, sizes).of(axis)}
    idle = [name for name in rules if name not in used]
    beaten = [name for name, dims in rules.items() if name in used - won and sizes.size(dims) > 1]
    notes = [text] if (text := idle_dims(rules, sizes)) else []
    notes += [f"rules that nothing used: {write_axes(tuple(idle))}"] if idle else []
    return notes + ([f"rules that never won a mesh dim: {write_axes(tuple(beaten))}"] if beaten else [])
