"""`ft.simulate`: every rank of an SPMD program as a thread of this process.

Invariant: no rank runs after the call has ended, however it ends. A rank begins with the caller's torch modes, and
without the caller's mesh.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import itertools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from functitan.errors import CaptureError, CollectiveError, MeshError, check_function, report
from functitan.sharding.context import current, using, within
from functitan.sharding.ledger import Ledger
from functitan.sharding.mesh import Mesh, MeshSizes, is_seconds, mesh_sizes
from functitan.sharding.program import Checks
from functitan.sharding.virtual import FIX_CAPTURE, Table, transport_of

TIMEOUT_S = 120.0
END_S = 5.0  # after an interrupt, for ranks to end


def simulate(*, timeout: float = TIMEOUT_S, **sizes: int) -> Callable[[Callable[..., Any]], Callable[..., list[Any]]]:
    """A wrapper that runs `fn(mesh, *args)` once for each rank of a virtual mesh; the list of their results, by rank.

    Each rank is a thread of this process with its own `mesh` value; ranks share `args`. `timeout` in seconds ends a
    collective that a rank does not join. The first failing rank's error is raised, with its rank as a note. Inside
    `ft.spmd`, or another `simulate`, a rank begins without a mesh, as at top level; autocast, the default device and
    grad mode of the caller hold in every rank. An interrupt (Ctrl-C) ends all ranks before it is raised.

    >>> import functitan as ft
    >>> simulate(dp=2, tp=2)(lambda mesh, x: x + mesh.rank)(10)
    [10, 11, 12, 13]
    """
    known = mesh_sizes(sizes or {"dp": 1})

    if not is_seconds(timeout):
        raise MeshError(report("ft.simulate", [f"timeout is {timeout!r}"], "give seconds, more than 0"))

    def wrap(fn: Callable[..., Any]) -> Callable[..., list[Any]]:
        check_function(fn, "ft.simulate(...)")

        @functools.wraps(fn)
        def run(*args: Any, **kwargs: Any) -> list[Any]:
            return _run(fn, known, timeout, args, kwargs)

        return run

    return wrap


def _run(fn: Callable[..., Any], sizes: MeshSizes, timeout: float, args: tuple, kwargs: dict) -> list[Any]:
    coordinates = list(itertools.product(*(range(n) for n in sizes.sizes)))
    table = Table(len(coordinates), timeout)
    results: list[Any] = [None] * len(coordinates)
    if current().is_captured:
        raise CaptureError(
            report("ft.simulate", ["it is called inside a function that is being captured"], FIX_CAPTURE)
        )
    outer, modes = current().on(None, None).without(Checks)._replace(vmap_axes=()), _modes_of_thread()

    def work(rank: int) -> None:
        mesh = Mesh(sizes, coordinates[rank], transport_of(table, sizes, coordinates[rank]))
        try:
            with ExitStack() as stack:
                stack.enter_context(using(outer if rank == 0 else outer.without(Ledger)))
                for mode in modes:
                    stack.enter_context(mode())
                results[rank] = within(f"rank {rank}", functools.partial(fn, mesh, *args, **kwargs))
            table.leave(rank)
        except BaseException as error:
            table.leave(rank, error)

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(work, rank), name=f"rank {rank}", daemon=True)
        for rank in range(len(coordinates))
    ]
    try:
        for thread in threads:
            thread.start()
        table.wait()  # a join that is interrupted takes the thread for ended, on Python 3.11
    except BaseException as error:
        table.interrupt(error)
        _end(threads, table)
        raise
    for thread in threads:
        thread.join()
    if table.errors:
        rank, error = next(((r, e) for r, e in table.errors if not isinstance(e, CollectiveError)), table.errors[0])
        error.add_note(f"on virtual rank {rank}, coordinate {dict(zip(sizes.dims, coordinates[rank], strict=True))}")
        raise error
    return results


def _modes_of_thread() -> list[Callable[[], AbstractContextManager[Any]]]:
    """What torch keeps for each thread and a user has set around the call: grad mode, default device, autocast."""
    grad, inference, device = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device()
    modes: list[Callable[[], AbstractContextManager[Any]]] = [functools.partial(torch.set_grad_enabled, grad)]
    modes += [functools.partial(torch.inference_mode, True)] if inference else []
    modes += [lambda: device] if device != torch.device("cpu") else []
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            modes.append(functools.partial(torch.autocast, kind, torch.get_autocast_dtype(kind)))
    return modes


def _end(threads: list[threading.Thread], table: Table) -> None:
    """End ranks that may be anywhere: one that waits ends by the table, one that computes at its next line."""
    for rank, thread in enumerate(threads):
        if rank not in table.left and thread.ident is not None:
            # CPython's only way to reach a thread that meets no collective
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt)
            )
    table.wait(sum(thread.ident is not None for thread in threads), END_S)
