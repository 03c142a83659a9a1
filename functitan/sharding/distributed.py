"""Meshes over processes: torch's `DeviceMesh` and functional collectives. The only user of torch.distributed groups.

Invariant: a group's ranks stand in the order of the mesh dims asked for, whatever their order in the mesh.
Functional collectives (`torch.ops._c10d_functional`, tried on torch 2.11 and 2.13) are nodes that a captured graph shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from functitan.errors import MeshError, report
from functitan.sharding.mesh import Mesh, MeshSizes, Transport, infer_sizes, mesh_sizes
from functitan.sharding.rules import Dims

TIMEOUT_S = 300.0


def make_mesh(
    *, device_type: str | None = None, backend: str | None = None, timeout: float = TIMEOUT_S, **sizes: int
) -> DeviceMesh:
    """A `DeviceMesh` over the processes that torchrun (or `ft.launch`) started, outermost dim first; -1 infers a size.

    `device_type` is "cuda" where there is one, else "cpu"; `backend` is any of torch.distributed's, by its name (gloo
    on CPU, nccl on CUDA unless given); `timeout` in seconds ends collectives that a rank does not join. Starts
    torch.distributed if it is not running. Raises `MeshError` before that if the sizes do not multiply to the number
    of processes.

    >>> make_mesh(fsdp=1, tp=-1).mesh_dim_names
    ('fsdp', 'tp')
    """
    running = dist.is_initialized()
    world = dist.get_world_size() if running else int(os.environ.get("WORLD_SIZE", 1))
    checked = infer_sizes(sizes or {"dp": -1}, world)
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if not running:
        backend = backend or ("nccl" if device_type == "cuda" else "gloo")
        if backend.lower() not in dist.Backend.backend_list:
            problem = f"torch.distributed has no backend {backend!r}; it has {dist.Backend.backend_list}"
            raise MeshError(report("ft.make_mesh", [problem], "choose one of them, or register it with torch first"))
        if device_type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        here: dict[str, Any] = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **here)
    return init_device_mesh(device_type, checked.sizes, mesh_dim_names=checked.dims)


@lru_cache(maxsize=None)
def mesh_of(device_mesh: DeviceMesh) -> Mesh:
    """This process's view of a `DeviceMesh`, with collectives over any of its dims in any order."""
    names = device_mesh.mesh_dim_names
    if not names:
        raise MeshError(report("DeviceMesh", ["its dims have no names"], "give mesh_dim_names=, or use ft.make_mesh"))
    coordinate = device_mesh.get_coordinate()
    if coordinate is None:
        raise MeshError(report("DeviceMesh", [f"process {dist.get_rank()} is not in it"], "call from its processes only"))
    sizes = mesh_sizes(dict(zip(names, device_mesh.shape, strict=True)))
    group = lru_cache(maxsize=None)(partial(_group, device_mesh, sizes, tuple(coordinate)))
    return Mesh(sizes, tuple(coordinate), _transport(group))


def _group(device_mesh: DeviceMesh, sizes: MeshSizes, coordinate: tuple[int, ...], dims: Dims) -> tuple[str, int, int]:
    """(group name, number of ranks, this process's number in it) over `dims`, in their order."""
    n = sizes.size(dims)
    if len(dims) == 1:
        group = device_mesh.get_group(dims[0])
    else:
        places = [sizes.dims.index(dim) for dim in dims]
        rest = [place for place in range(len(sizes.dims)) if place not in places]
        ranks = device_mesh.mesh.permute(*rest, *places)[tuple(coordinate[place] for place in rest)].flatten().tolist()
        # c10d sorts the ranks of a group unless told that they must agree on their own order
        group = dist.new_group(ranks, use_local_synchronization=True, sort_ranks=False)
    return group.group_name, n, group.rank()


def _transport(group: Callable[[Dims], tuple[str, int, int]]) -> Transport:
    ops, wait = torch.ops._c10d_functional, torch.ops._c10d_functional.wait_tensor

    def all_gather(x, dims, note):
        name, n, _ = group(dims)
        return wait(ops.all_gather_into_tensor(x.unsqueeze(0).contiguous(), n, name))

    def reduce_scatter(x, dims, op, note):
        name, n, _ = group(dims)
        return wait(ops.reduce_scatter_tensor(x.contiguous(), op, n, name)).squeeze(0)

    def all_reduce(x, dims, op, note):
        name, _, _ = group(dims)
        return wait(ops.all_reduce(x.contiguous(), op, name))

    def all_to_all(x, dims, note):
        name, n, _ = group(dims)
        return wait(ops.all_to_all_single(x.contiguous(), [1] * n, [1] * n, name))

    def permute(x, dims, shift, note):
        name, n, me = group(dims)
        send, receive = [0] * n, [0] * n
        send[(me + shift) % n] = receive[(me - shift) % n] = 1
        return wait(ops.all_to_all_single(x.unsqueeze(0).contiguous(), receive, send, name)).squeeze(0)

    return Transport("distributed", all_gather, reduce_scatter, all_reduce, all_to_all, permute)

