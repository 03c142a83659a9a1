"""`ft.async_tp`: transfers beside a matmul become rings, which compute with one chunk while the next travels.

Invariant: it changes how plans are lowered, in forward and in backward, and no value. What it leaves as it was, the
ledger names; a function in which it finds nothing to do is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from functitan.errors import MeshError, check_function, report
from functitan.overlap.products import lowering
from functitan.overlap.rings import Pipelining
from functitan.sharding.context import current, using
from functitan.sharding.ledger import Ledger, entering
from functitan.sharding.mesh import MeshSizes, check_dim, is_size


def async_tp(fn: Callable[..., Any], *, dims: str | Sequence[str] = "tp", pieces: int = 1) -> Callable[..., Any]:
    """`fn` whose gathers before a matmul and reduce-scatters after one, over mesh dims `dims`, run beside it.

    In forward and in backward an einsum whose plan is *gather, then matmul* computes with the part that it has while
    the next one travels around the ring of ranks; all weights that share the gathered operand take each part as it
    comes. *Matmul, then reduce-scatter* computes the part of one rank while the sums for another travel. The bytes are
    the same. With transfers as long as their matmuls a pair of n ranks takes (1 + 1 / (n pieces)) / 2 of the plain time
    at best: `pieces` cuts each message, where matmuls stay large enough. On CUDA, a ring of one matmul is a fused op of
    `torch.ops.symm_mem`; captured programs, float8 and sums of several products run the ring there, too.

    Values and gradients are those of `fn`; sums over ranks, and over a gathered axis, are taken in the order of the
    ring. Each message is a `permute` of the ledger with `hidden` set. What stays one message of its own (an all-reduce;
    a gather before no matmul) is a note of the ledger, with the reason: see `str(ft.explain(...))`. Without a mesh
    nothing travels, and `fn` runs as it is.

    Wang et al., Overlap Communication with Dependent Computation via Decomposition, 2023. Raises `MeshError` where the
    mesh lacks one of `dims`, and after a call in which nothing could be pipelined.

    >>> import functitan as ft
    >>> rules = ft.AxisRules({"mlp": "tp", "seq": "tp", "embed": None})
    >>> up = ft.async_tp(lambda x, w: ft.einsum("seq embed, embed mlp -> seq mlp", x, w))
    >>> args = ft.Param("seq embed", (64, 8)), ft.Param("embed mlp", (8, 32))
    >>> ledger = ft.explain(up, *args, mesh=dict(tp=4), rules=rules)
    >>> [(entry.collective, entry.bytes, entry.hidden) for entry in ledger]
    [('permute', 512, True), ('permute', 512, True), ('permute', 512, True)]
    """
    check_function(fn, "ft.async_tp")
    asked = (dims,) if isinstance(dims, str) else tuple(dims)
    _check(asked, pieces)

    @functools.wraps(fn)
    def inside(*args: Any, **kwargs: Any) -> Any:
        env = current()
        if env.mesh is None:
            return fn(*args, **kwargs)
        _check_mesh(asked, env.mesh.sizes)
        own = Ledger()
        with using(env.lowered_by(lowering(Pipelining(asked, pieces))).inside(entering(own))):
            out = fn(*args, **kwargs)
        ran = (entry for entry in own if entry.hidden and {*asked} & {*entry.mesh_dims})
        if not env.recomputed and not any(ran):  # a recomputation may find all that it needs stored
            raise MeshError(_nothing(fn, asked, own))
        return out

    return inside


def _check(dims: tuple[Any, ...], pieces: Any) -> None:
    problems = [f"dims has {dim!r}, which is no name" for dim in dims if not isinstance(dim, str)]
    problems += [] if dims else ["dims is empty"]
    problems += [] if is_size(pieces) else [f"pieces is {pieces!r}: a whole number of at least 1"]
    if problems:
        raise MeshError(report("ft.async_tp", problems, "write as in ft.async_tp(fn, dims='tp', pieces=2)"))


def _check_mesh(dims: tuple[str, ...], sizes: MeshSizes) -> None:
    shape = dict(zip(sizes.dims, sizes.sizes, strict=True))
    problems = [
        check_dim(dim, sizes) or f"the mesh {shape} has one rank along {dim!r}: nothing travels there"
        for dim in dims
        if sizes.size(dim) == 1
    ]
    if problems:
        raise MeshError(report("ft.async_tp", problems, _FIX_MESH))


def _nothing(fn: Callable[..., Any], dims: tuple[str, ...], ledger: Ledger) -> str:
    over = ", ".join(dims)
    problems = [f"no gather before a matmul, and no reduce-scatter after one, runs over {over} in its forward"]
    problems += [note for note in ledger.notes if note.startswith("async_tp: ")][:_SHOWN]
    return report(f"ft.async_tp of {getattr(fn, '__qualname__', repr(fn))}", problems, _FIX_NOTHING)


_SHOWN = 5  # of the transfers that are not pipelined
_FIX_MESH = "name a dim of the mesh, as in ft.async_tp(fn, dims='fsdp'), or call fn as it is on this mesh"
_FIX_NOTHING = (
    "shard an axis of the activations over it that the matmuls need whole, as in rules.replace(seq='tp') beside "
    "heads and mlp (sequence parallelism), or call fn as it is"
)
