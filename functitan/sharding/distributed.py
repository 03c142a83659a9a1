"""Meshes over processes: torch's `DeviceMesh` and functional collectives. The only user of torch.distributed groups.

Invariant: a group's ranks stand in the order of the mesh dims asked for, whatever their order in the mesh, and its
collectives end after the mesh's timeout. Functional collectives (`torch.ops._c10d_functional`, tried on torch 2.11 and
2.13) are nodes that a captured graph shows.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store as get_default_store  # private; tried on torch 2.13
from torch.distributed.distributed_c10d import _set_pg_timeout as set_pg_timeout  # private; tried on torch 2.13

from functitan.errors import CollectiveError, MeshError, report
from functitan.sharding.agreement import agreement
from functitan.sharding.mesh import Mesh, MeshSizes, Transport, Wait, infer_sizes, is_seconds, mesh_sizes
from functitan.sharding.message import Message, Passing
from functitan.sharding.point_to_point import Line, point_to_point
from functitan.sharding.program import FIX
from functitan.sharding.rules import Dims

TIMEOUT_S = 300.0


def make_mesh(
    *, device_type: str | None = None, backend: str | None = None, timeout: float = TIMEOUT_S, **sizes: int
) -> DeviceMesh:
    """A `DeviceMesh` over the processes that torchrun (or `ft.launch`) started, outermost dim first; -1 infers a size.

    `device_type` is "cuda" where there is one, else "cpu"; `backend` is any of torch.distributed's, by its name (gloo
    on CPU, nccl on CUDA unless given); `timeout` in seconds ends collectives that a rank does not join. Starts
    torch.distributed if it is not running, and ends it with the process. Raises `MeshError` before that if the sizes
    do not multiply to the number of processes, and `CollectiveError` if a process does not come in time, or comes
    with other sizes.

    >>> make_mesh(fsdp=1, tp=-1).mesh_dim_names
    ('fsdp', 'tp')
    """
    running, started = dist.is_initialized(), {"RANK", "WORLD_SIZE"} <= set(os.environ)
    world = dist.get_world_size() if running else int(os.environ["WORLD_SIZE"]) if started else 1
    checked = infer_sizes(sizes or {"dp": -1}, world)
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device_type, timeout)
    limit = timedelta(seconds=timeout)
    backend = backend or ("nccl" if device_type == "cuda" else "gloo")
    _check_backend(backend)
    if not running:
        if device_type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        _meet(lambda: dist.init_process_group(backend, timeout=limit, **({} if started else alone)), world, timeout)
    agree = _agreement("make_mesh", range(world), limit)
    agree(f"runs make_mesh({', '.join(f'{dim}={n}' for dim, n in zip(*checked, strict=True))}) on {device_type}")
    device_mesh = init_device_mesh(device_type, checked.sizes, mesh_dim_names=checked.dims)
    for dim in checked.dims:  # a group made by DeviceMesh has its backend's timeout, half an hour
        set_pg_timeout(limit, device_mesh.get_group(dim))
    atexit.register(_leave, weakref.ref(device_mesh), not running)
    return device_mesh


def mesh_of(device_mesh: DeviceMesh) -> Mesh:
    """This process's view of a `DeviceMesh`, with collectives over any of its dims in any order."""
    return _mesh_of(device_mesh, dist.group.WORLD)


@cache  # also by the world: a mesh made after torch.distributed's restart equals the one before
def _mesh_of(device_mesh: DeviceMesh, _: Any) -> Mesh:
    names = device_mesh.mesh_dim_names
    if not names:
        raise MeshError(report("DeviceMesh", ["its dims have no names"], "give mesh_dim_names=, or use ft.make_mesh"))
    coordinate = device_mesh.get_coordinate()
    if coordinate is None:
        problem = f"process {dist.get_rank()} is not in it"
        raise MeshError(report("DeviceMesh", [problem], "call from its processes only"))
    sizes = mesh_sizes(dict(zip(names, device_mesh.shape, strict=True)))
    # numpy, because the first collective of a group may come while fake tensors are traced
    gloo = dist.get_backend(device_mesh.get_group(names[0])) == "gloo"  # its reduce-scatter takes twice an exchange
    known = device_mesh, device_mesh.mesh.numpy(), sizes, tuple(coordinate)
    post, receive = point_to_point(partial(_line, *known))
    transport = _transport(cache(partial(_group, *known)), _agree(device_mesh, known[1], tuple(coordinate)), gloo)
    return Mesh(sizes, tuple(coordinate), transport._replace(post=post, receive=receive))


def _group(
    device_mesh: DeviceMesh, processes: numpy.ndarray, sizes: MeshSizes, coordinate: tuple[int, ...], dims: Dims
) -> tuple[str, int, int]:
    """(group name, number of ranks, this process's number in it) over `dims`, in their order."""
    ranks, group = _members(processes, sizes, coordinate, dims), device_mesh.get_group(dims[0])
    if dist.get_process_group_ranks(group) != ranks:  # several dims, or a DeviceMesh of descending ranks
        group = _new_group(ranks, group, device_mesh)
    return group.group_name, len(ranks), group.rank()


def _line(
    device_mesh: DeviceMesh, processes: numpy.ndarray, sizes: MeshSizes, coordinate: tuple[int, ...], dim: str
) -> Line:
    """The processes along one mesh dim, with two groups that no collective uses."""
    ranks, group = _members(processes, sizes, coordinate, (dim,)), device_mesh.get_group(dim)
    up, down = (_new_group(ranks, group, device_mesh) for _ in range(2))
    return Line(tuple(ranks), up.rank(), up, down)


def _members(processes: numpy.ndarray, sizes: MeshSizes, coordinate: tuple[int, ...], dims: Dims) -> list[int]:
    """The processes that differ from this one in `dims` alone, in their order."""
    places = [sizes.dims.index(dim) for dim in dims]
    rest = [place for place in range(len(sizes.dims)) if place not in places]
    return processes.transpose(*rest, *places)[tuple(coordinate[place] for place in rest)].ravel().tolist()


def _new_group(ranks: list[int], like: dist.ProcessGroup, device_mesh: DeviceMesh) -> dist.ProcessGroup:
    # c10d sorts the ranks of a group unless told that they agree on their own order
    limit = _timeout(like, device_mesh.device_type)
    group = dist.new_group(ranks, limit, use_local_synchronization=True, sort_ranks=False)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _agree(device_mesh: DeviceMesh, processes: numpy.ndarray, coordinate: tuple[int, ...]) -> Callable[..., None]:
    """Agreement with the processes of this one's pipeline stage, or of all, through torch.distributed's own store."""
    names = device_mesh.mesh_dim_names
    assert names
    stage = tuple(at if dim == "pp" else slice(None) for dim, at in zip(names, coordinate, strict=True))

    @cache  # made when first asked for
    def agreed(everyone: bool) -> Callable[..., None]:
        members = processes[() if everyone else stage].ravel().tolist()
        limit = _timeout(device_mesh.get_group(names[0]), device_mesh.device_type) or timedelta(seconds=TIMEOUT_S)
        name = f"mesh {zlib.crc32(repr((names, members)).encode()):x}"
        return _agreement(name, members, limit)

    whole = "pp" not in names  # one stage: all ranks are its ranks, who count together
    return lambda program, wait=True, everyone=False: agreed(everyone and not whole)(program, wait)


def _agreement(name: str, members: Sequence[int], limit: timedelta) -> Callable[..., None]:
    if dist.get_backend() == "fake":  # torch's group of one process that plays a rank of many: the others never come
        return lambda program, wait=True: None
    return agreement(get_default_store(), name, dist.get_rank(), members, limit)


def _timeout(group: dist.ProcessGroup, device_type: str) -> timedelta | None:
    """The timeout of a group, where its backend tells (`_timeout` in gloo and nccl, tried on torch 2.13)."""
    options = getattr(group._get_backend(torch.device(device_type)), "options", None)
    return getattr(options, "_timeout", None)


def _transport(group: Callable[[Dims], tuple[str, int, int]], agree: Callable[..., None], exchanges: bool) -> Transport:
    ops, wait = torch.ops._c10d_functional, torch.ops._c10d_functional.wait_tensor

    def started(message: Message, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The tensor that will come, and what makes the message's result of it."""
        name, n, me = group(message.mesh_dims)
        x = x.contiguous()
        match message.collective, message.how:
            case "all_gather", _:
                return ops.all_gather_into_tensor(x.unsqueeze(0), n, name), _as_is
            case "all_reduce", op:
                return ops.all_reduce(x, op, name), _as_is
            case "reduce_scatter", op if not exchanges:
                return ops.reduce_scatter_tensor(x, op, n, name), _only
            case ("reduce_scatter" | "all_to_all") as kind, op:
                total = _as_is if kind == "all_to_all" else _summed if op == "sum" else _largest
                return ops.all_to_all_single(x, [1] * n, [1] * n, name), total
            case "permute", Passing() as way:
                receive, send = way.splits(n, me)
                rows = x.unsqueeze(0)[: sum(send)]
                return ops.all_to_all_single(rows, receive, send, name), _only_or_zeros
        raise AssertionError(message)

    def start(message: Message, x: Tensor) -> Wait:
        with _failing(message):
            sent, result = started(message, x)

        def arrived() -> Tensor:
            with _failing(message):
                return result(wait(sent))

        return arrived

    return Transport(start, agree, group=group, exchanges=exchanges)


def _meet(start: Callable[[], None], world: int, timeout: float) -> None:
    try:
        start()
    except dist.DistError as error:
        raise CollectiveError(_alone(world, timeout, error)) from error


def _leave(device_mesh: weakref.ref[DeviceMesh], destroy: bool) -> None:
    """At exit: a gloo thread that lets go of its last tensor once the interpreter is gone aborts the process."""
    if getattr(sys, "last_value", None) is not None:  # ends by an error: the other ranks may never come
        return
    if destroy and dist.is_initialized():
        dist.destroy_process_group()
        _mesh_of.cache_clear()
    if mesh := device_mesh():
        getattr(mesh, "_pg_registry", {}).clear()  # the last reference: a group joins its threads (torch 2.13)


def _check_device(device_type: str, timeout: float) -> None:
    problems = [] if is_seconds(timeout) else [f"timeout is {timeout!r}: it must be more than 0 seconds"]
    try:
        torch.device(device_type)
    except (RuntimeError, TypeError):
        problems.append(f"torch has no device {device_type!r}")
    if problems:
        raise MeshError(
            report("ft.make_mesh", problems, "write as in make_mesh(fsdp=2, device_type='cuda', timeout=60)")
        )


def _check_backend(backend: str) -> None:
    names = [part.split(":")[-1].lower() for part in backend.split(",")]  # also "cpu:gloo,cuda:nccl"
    if unknown := [name for name in names if name not in dist.Backend.backend_list]:
        problem = f"torch.distributed has no backend {unknown[0]!r}; it has {dist.Backend.backend_list}"
        raise MeshError(report("ft.make_mesh", [problem], "choose one of them, or register it with torch first"))


def _as_is(x: Tensor) -> Tensor:
    return x


def _only(x: Tensor) -> Tensor:
    return x.squeeze(0)


def _only_or_zeros(x: Tensor) -> Tensor:
    return _only(x) if len(x) else x.new_zeros(x.shape[1:])


def _summed(x: Tensor) -> Tensor:
    return x.sum(0)


def _largest(x: Tensor) -> Tensor:
    return x.amax(0)


@contextmanager
def _failing(message: Message) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if type(error) is RuntimeError or isinstance(error, dist.DistError):  # not: out of memory, tracing
            what = f"process {dist.get_rank()} in {message}"
            raise CollectiveError(report(what, [_first_line(error)], _FIX_FAILED)) from error
        raise


def _alone(world: int, timeout: float, error: dist.DistError) -> str:
    what = f"ft.make_mesh in process {os.environ.get('RANK')} of {world}"
    problem = f"not all came within {timeout:g} s: {_first_line(error)}"
    return report(what, [problem], "start every process, and look for one that failed before it made its mesh")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_FIX_FAILED = f"{FIX}: look for one that failed, left, or waits elsewhere"
