"""`ft.launch`: one function in new local processes, as torchrun would run it.

Invariant: no process outlives the call, however the call ends. Whatever travels is copied by value.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from functitan.errors import CollectiveError, FunctitanError, report

GRACE_S = 1.0  # after one rank has failed, for others to tell a better reason
EXIT_S = 5.0  # after the last result, for processes to end by themselves
HOST = "127.0.0.1"
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def launch(fn: Callable[..., Any], *args: Any, nprocs: int, timeout: float | None = None) -> list[Any]:
    """Run `fn(*args)` in `nprocs` new local processes, as torchrun would; the list of their results, by rank.

    `fn` makes its mesh with `ft.make_mesh`. It is the top-level function of a module, or of a script that calls
    `launch` under `if __name__ == "__main__":`; a notebook's function is sent whole. Arguments and results are
    pickled, their tensors through CPU memory. `timeout` in seconds ends a run that takes longer (a missing rank ends
    a collective earlier: see `ft.make_mesh`).

    Raises the error of the rank that failed first, with its rank and traceback as a note; `CollectiveError` if a rank
    dies without one or the time is over; `FunctitanError`, before a process starts, for what cannot be sent.

    >>> import os
    >>> launch(os.getenv, "RANK", nprocs=2)
    ['0', '1']
    """
    work = _work(fn, args, nprocs)
    context = multiprocessing.get_context("spawn")
    store = _local_store()  # here, so that it outlives every rank
    workers: list[_Worker] = []
    try:
        for rank in range(nprocs):
            here, there = context.Pipe()
            environ = _environ(rank, nprocs, store.port)
            process = context.Process(target=_run, args=(there, environ), name=f"rank {rank}")
            process.start()
            workers.append(_Worker(process, here))
            there.close()  # so that its end is seen here
        for worker in workers:
            with suppress(OSError):  # it died: `_results` says so
                worker.pipe.send_bytes(work)
        results = _results(workers, timeout)
        for worker in workers:
            worker.pipe.close()
        for worker in workers:
            worker.process.join(EXIT_S)
        return results
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()


def _local_store() -> dist.TCPStore:
    """A store that this machine's processes alone can reach: torch's own socket listens on every interface."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port = listener.getsockname()[1]
        # the store closes the descriptor that it is given; tried on torch 2.13
        return dist.TCPStore(
            HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
        )


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection  # work goes in, one outcome comes out; closed when all ranks may end


class _Outcome(NamedTuple):
    result: Any = None
    error: BaseException | None = None
    weight: int = 0  # of failures at about the same time the lightest is the cause: death, own error, a collective's


def _results(workers: list[_Worker], timeout: float | None) -> list[Any]:
    limit = time.monotonic() + (math.inf if timeout is None else timeout)
    outcomes: dict[int, _Outcome] = {}
    while len(outcomes) < len(workers) and (left := limit - time.monotonic()) > 0:
        running = {rank: worker for rank, worker in enumerate(workers) if rank not in outcomes}
        ends = [end for worker in running.values() for end in (worker.pipe, worker.process.sentinel)]
        wait(ends, None if left == math.inf else left)
        for rank, worker in running.items():
            outcome = _outcome(rank, worker, len(workers))
            if outcome is not None:
                outcomes[rank] = outcome
                if outcome.error is not None:
                    limit = min(limit, time.monotonic() + GRACE_S)
    failures = [outcome for outcome in outcomes.values() if outcome.error is not None]
    if failures:
        raise min(failures, key=lambda outcome: outcome.weight).error  # type: ignore[misc]
    if len(outcomes) < len(workers):
        raise CollectiveError(_too_long([rank for rank in range(len(workers)) if rank not in outcomes], timeout))
    return [outcomes[rank].result for rank in range(len(workers))]


def _outcome(rank: int, worker: _Worker, nprocs: int) -> _Outcome | None:
    """What a rank has sent, its death, or `None` while it runs."""
    ended = worker.process.exitcode is not None  # asked first: what it sent before it ended is in the pipe
    try:
        if not worker.pipe.poll():
            return _Outcome(error=CollectiveError(_died(rank, worker.process)), weight=0) if ended else None
        message = worker.pipe.recv_bytes()
    except (EOFError, OSError):
        worker.process.join(EXIT_S)
        return _Outcome(error=CollectiveError(_died(rank, worker.process)), weight=0)
    result, error, text = _unpacked(message)
    if error is None and not text:
        return _Outcome(result)
    if error is None:
        error = RuntimeError(text.splitlines()[-1])
    error.add_note(f"on rank {rank} of {nprocs}, in a process of ft.launch:\n{text}")
    return _Outcome(error=error, weight=2 if isinstance(error, CollectiveError) else 1)


# --- in the new process ---------------------------------------------------------------------------------------------


def _run(pipe: Connection, environ: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environ)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)  # else gloo listens where the host's name points
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(environ["WORLD_SIZE"])))
    try:
        fn, args = map(_unpacked, pickle.loads(pipe.recv_bytes()))
        message = _packed((_known(fn)(*args), None, ""))
    except BaseException as error:
        message = _failed(error)
    sys.stdout.flush()
    pipe.send_bytes(message)
    with suppress(EOFError, OSError):
        pipe.recv_bytes()  # stay until all are done: whoever leaves early breaks the others' last collective
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _failed(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error)).rstrip()
    try:
        assert isinstance(error, Exception)  # SystemExit would end the parent
        message = _packed((None, error, text))
        _unpacked(message)
        return message
    except Exception:
        return _packed((None, None, text + f"\n{type(error).__qualname__}: {error}"))


def _environ(rank: int, nprocs: int, port: int) -> dict[str, str]:
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nprocs, "LOCAL_WORLD_SIZE": nprocs, "GROUP_RANK": 0}
    # torch's word, as from torchrun, for a store that the parent keeps
    return {name: str(value) for name, value in ours.items()} | {
        "MASTER_ADDR": HOST, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


# --- by value -------------------------------------------------------------------------------------------------------


def _packed(value: Any) -> bytes:
    buffer = BytesIO()  # torch.save copies storages wherever they stand; pickle in processes would share memory
    torch.save(value, buffer, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    return buffer.getvalue()


def _unpacked(message: bytes) -> Any:
    return torch.load(BytesIO(message), map_location="cpu", weights_only=False)


def _work(fn: Callable[..., Any], args: tuple[Any, ...], nprocs: int) -> bytes:
    problems = []
    if not isinstance(nprocs, int) or isinstance(nprocs, bool) or nprocs < 1:
        problems.append(f"nprocs is {nprocs!r}: a whole number of at least 1")
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is not None and not os.path.exists(file):
        problems.append(f"new processes cannot import the main program {file!r}, which is no file")
    parts = {"function": _whole(fn) if file is None else fn, "arguments": args}
    packed = []
    for what, part in parts.items():
        try:
            packed.append(_packed(part))
        except Exception as error:
            problems.append(f"the {what} cannot be sent to a process: {error}")
    if problems:
        fix = (
            "call it as ft.launch(train, config, nprocs=2), where train is defined at the top level of a module and "
            "gets what it needs as arguments"
        )
        raise FunctitanError(report(f"ft.launch of {fn!r}", problems, fix))
    return pickle.dumps(packed)


def _whole(fn: Callable[..., Any]) -> Callable[..., Any] | bytes:
    """A function of a notebook, which no process can import, as bytes with all the globals that it uses.

    Modules among these globals travel by name: dill would pack the contents of one that is installed for editing.
    """
    if getattr(fn, "__module__", None) != "__main__":
        return fn
    import dill  # comes with datasets; changes pickle when imported

    buffer = BytesIO()
    pickler = dill.Pickler(buffer, recurse=True)
    pickler.persistent_id = _name_of_module
    pickler.dump(fn)
    return buffer.getvalue()


def _known(fn: Callable[..., Any] | bytes) -> Callable[..., Any]:
    if not isinstance(fn, bytes):
        return fn
    import dill

    unpickler = dill.Unpickler(BytesIO(fn))
    unpickler.persistent_load = importlib.import_module
    return unpickler.load()


def _name_of_module(obj: Any) -> str | None:
    """The name under which a new process imports `obj`, if it is a module; else `None`: `obj` travels by value."""
    return obj.__name__ if isinstance(obj, ModuleType) and obj.__name__ != "__main__" else None


def _died(rank: int, process: BaseProcess) -> str:
    code = process.exitcode
    why = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    fix = "see what it printed; a script calls ft.launch under if __name__ == '__main__':"
    return report("ft.launch", [f"rank {rank} ended without a result: {why}"], fix)


def _too_long(ranks: list[int], timeout: float | None) -> str:
    problem = f"ranks {ranks} did not finish within {timeout} s, and were ended"
    return report("ft.launch", [problem], "give it more time with timeout=, or look for a rank that waits")
