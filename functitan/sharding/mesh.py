"""The shape of a mesh and a rank's place in it, without devices.

Invariant: a `MeshSizes` is all that rules, layouts and plans ever know of a mesh; a `Mesh` adds one rank's coordinate
and the functions that carry its messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from functitan.errors import MeshError, nearest, report

STANDARD_DIMS = ("pp", "dp", "fsdp", "cp", "tp", "ep")


class MeshSizes(NamedTuple):
    """Mesh dims and their sizes, outermost first.

    >>> MeshSizes(("dp", "fsdp"), (2, 4)).size(("fsdp", "tp"))
    4
    """

    dims: tuple[str, ...]
    sizes: tuple[int, ...]

    def size(self, dims: str | tuple[str, ...]) -> int:
        """Number of ranks over one or several mesh dims; a dim that this mesh lacks counts as 1."""
        return _size(self, (dims,) if isinstance(dims, str) else dims)


Wait = Callable[[], Any]


class Pending(NamedTuple):
    """A message under way. `wait()` gives its tensor once it has arrived, or has left; `done()` says if it has."""

    wait: Wait
    done: Callable[[], bool]


class Transport(NamedTuple):
    """How one rank's messages travel: pure functions of a message and its tensor, a check, and traits.

    `start` sends a message and gives the function that waits for its result; what runs between the two hides it. Ranks
    start the same messages in the same order, and leave `x` as it is until they have waited. The order of a message's
    mesh dims is the order of the ranks in the group, outermost first. With n ranks an all-gather gives [n, *x.shape],
    a reduce-scatter of [n, ...] gives x.shape[1:], and an all-to-all of [n, ...] sends row j to rank j; all others give
    x.shape.

    `own(x, axis, dim, place)` is this rank's part, of size 1, of an axis with an entry for each place along a mesh dim.
    `agree` raises `CollectiveError` unless all ranks of this pipeline stage call it with the same text; with
    `wait=False`, for a rank that fails, it tells the others and returns; with `everyone`, all ranks of all stages call.

    `post` and `receive` carry messages between this rank and the one that differs from it in its place along one mesh
    dim alone. Neither waits: they give a `Pending`. Messages of a pair arrive in the order they were posted.
    """

    start: Callable[..., Wait]  # (message, x)
    agree: Callable[..., None]  # (program, wait=True, everyone=False)
    own: Callable[..., Any] = lambda x, axis, dim, place: x.narrow(axis, place, 1)
    post: Callable[..., Pending] | None = None  # (message, x, to)
    receive: Callable[..., Pending] | None = None  # (message, device, source)
    group: Callable[..., Any] | None = None  # (dims) -> (its c10d name, number of ranks, this rank's number)
    # traits
    has_values: bool = True  # else tensors are shapes alone, and nothing is sent
    shares_a_process: bool = False  # ranks are threads
    exchanges: bool = False  # a reduce-scatter runs as an all-to-all of the same bytes, and a sum

    @property
    def compiles(self) -> bool:
        """Whether a compiler knows its collectives: torch's functional ones, over groups with names."""
        return self.group is not None


class Mesh(NamedTuple):
    """One rank's view of a mesh: its sizes, this rank's coordinate, and the transport."""

    sizes: MeshSizes
    coordinate: tuple[int, ...]
    transport: Transport

    @property
    def shape(self) -> dict[str, int]:
        """`{dim: size}`, outermost first."""
        return dict(zip(self.sizes.dims, self.sizes.sizes, strict=True))

    @property
    def place(self) -> int:
        """This rank's place among the pipeline's, 0 without one."""
        return self.index(("pp",))

    @property
    def rank(self) -> int:
        """This rank's row-major number in the mesh."""
        rank = 0
        for place, size in zip(self.coordinate, self.sizes.sizes, strict=True):
            rank = rank * size + place
        return rank

    def index(self, dims: tuple[str, ...]) -> int:
        """This rank's row-major number in its group over `dims`, in the order given."""
        index = 0
        for dim in dims:
            if dim in self.sizes.dims:
                place = self.sizes.dims.index(dim)
                index = index * self.sizes.sizes[place] + self.coordinate[place]
        return index

    def without(self, dims: tuple[str, ...]) -> Mesh | None:
        """The mesh of the ranks that differ from this one in no dim of `dims`; `None` where that is this rank alone."""
        kept = [at for at, dim in enumerate(self.sizes.dims) if dim not in dims]
        sizes = MeshSizes(tuple(self.sizes.dims[at] for at in kept), tuple(self.sizes.sizes[at] for at in kept))
        if math.prod(sizes.sizes) == 1:
            return None
        return Mesh(sizes, tuple(self.coordinate[at] for at in kept), self.transport)


def mesh_sizes(sizes: Mapping[str, int]) -> MeshSizes:
    """Checked sizes: at least 1, each a whole number, names as in rules.

    >>> mesh_sizes({"fsdp": 4, "tp": 2})
    MeshSizes(dims=('fsdp', 'tp'), sizes=(4, 2))
    """
    problems = [
        f"mesh dim {dim!r} has size {size!r}: a size is a whole number of at least 1"
        for dim, size in sizes.items()
        if not is_size(size)
    ]
    problems += [
        f"{dim!r} is not a mesh dim's name" for dim in sizes if not (isinstance(dim, str) and dim.isidentifier())
    ]
    if problems:
        raise MeshError(report(f"mesh {dict(sizes)!r}", problems, "write sizes as in dict(fsdp=4, tp=2)"))
    return MeshSizes(tuple(sizes), tuple(sizes.values()))


def is_size(n: object) -> bool:
    """True for a whole number of at least 1."""
    return isinstance(n, int) and not isinstance(n, bool) and n >= 1


def is_seconds(n: object) -> bool:
    """True for a number of more than 0."""
    return isinstance(n, int | float) and not isinstance(n, bool) and n > 0


def infer_sizes(sizes: Mapping[str, int], world: int) -> MeshSizes:
    """The sizes of a mesh over `world` processes, where one size may be -1: what is left.

    >>> infer_sizes({"fsdp": -1, "tp": 2}, 8)
    MeshSizes(dims=('fsdp', 'tp'), sizes=(4, 2))
    """
    open_dims = [dim for dim, size in sizes.items() if size == -1]
    if len(open_dims) > 1:
        raise MeshError(
            report(
                f"mesh {dict(sizes)!r}",
                [f"the sizes of {open_dims} are -1: one alone can be inferred"],
                "give the others",
            )
        )
    known = mesh_sizes({dim: 1 if size == -1 else size for dim, size in sizes.items()})
    product = math.prod(known.sizes)
    whole = {dim: (world // product if size == -1 else size) for dim, size in sizes.items()}
    if math.prod(whole.values()) != world or 0 in whole.values():
        raise MeshError(
            report(
                f"mesh {dict(sizes)!r}",
                [
                    f"its sizes multiply to {product}"
                    + (
                        f", which does not divide the number of processes, {world}: {open_dims[0]} has no size"
                        if open_dims
                        else f", but the number of processes is {world}"
                    )
                ],
                f"start {product} processes (torchrun --nproc-per-node={product}, ft.launch), choose sizes whose "
                f"product is {world}, or run on threads with ft.simulate",
            )
        )
    return mesh_sizes(whole)


def check_dim(dim: str, mesh: MeshSizes) -> str:
    """The complaint about a mesh dim that neither this mesh nor the standard has, or the empty string."""
    if dim in mesh.dims or dim in STANDARD_DIMS:
        return ""
    return f"unknown mesh dim {dim!r}{nearest(dim, {*mesh.dims, *STANDARD_DIMS})}; this mesh has {list(mesh.dims)}"


@cache
def _size(mesh: MeshSizes, dims: tuple[str, ...]) -> int:
    sizes = dict(zip(mesh.dims, mesh.sizes, strict=True))
    return math.prod(sizes.get(dim, 1) for dim in dims)
