"""Two gloo processes that part ways, fail, or die: the other ends within the timeout with an error that says so.

Plain processes that nobody watches: `ft.launch` would end all of them. One pair runs every case; the last kills a rank.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import functitan as ft
from functitan.errors import report

RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "seq": None, "embed": None, "mlp": None})
SHORT = 2.5  # seconds: the timeout of a mesh where nothing but the timeout ends the wait
LONG = 60.0  # where the error comes at once
SLACK = 10.0  # for a busy machine
HOST = "127.0.0.1"


def line_of(fn: Callable, below: int = 1) -> str:
    return f"tests/test_guards_gloo.py:{fn.__code__.co_firstlineno + below}"


# --- what the ranks do: each case is (of rank 0, of rank 1), functions of nothing ------------------------------------


def make(timeout: float = SHORT) -> Any:
    return ft.make_mesh(fsdp=2, timeout=timeout)


def summed(x: Any) -> Any:
    return ft.reduce("batch ->", x)


def gathered(x: Any) -> Any:
    return ft.constrain("batch -> seq", x)


def nothing(x: Any) -> Any:
    return x


def fail(x: Any) -> Any:
    raise KeyError("flour")


def late(x: Any) -> Any:
    summed(x)
    time.sleep(SHORT + 1)


def twice(x: Any) -> Any:
    return summed(x) + summed(x)


def run(fn: Callable, timeout: float = LONG, wrap: Callable = ft.checked) -> Callable:
    return lambda: ft.spmd(wrap(fn), mesh=make(timeout), rules=RULES)(torch.ones(2))


def plain(fn: Callable) -> Callable:
    return run(fn, SHORT, lambda fn: fn)


def scaled(params: Any, x: Any, key: Any) -> Any:
    return ft.reduce("batch embed ->", x * params["scale"]), ft.count("batch", x[:, 0])


def broadcast(params: Any, x: Any, key: Any) -> Any:
    return ft.reduce("batch embed ->", x * ft.broadcast("embed -> batch embed", params["scale"])), ft.count(
        "batch", x[:, 0]
    )


def killed(params: Any, x: Any, key: Any) -> Any:
    """Dies on rank 1 in its third step, between its forward and its backward pass."""
    loss = broadcast(params, x, key)
    killed.steps += 1
    if killed.steps == 3 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss


killed.steps = 0


def train(loss: Callable, timeout: float = LONG, **options: Any) -> Callable:
    def steps() -> None:
        mesh, tx = make(timeout), ft.optim.adamw(0.1)
        state = ft.TrainState.create({"scale": ft.Param("embed", (3,))}, tx, ft.random.key(0), mesh=mesh, rules=RULES)
        step = ft.train_step(loss, tx, **options)
        x = ft.shard(torch.arange(12.0).view(4, 3), "batch embed", mesh=mesh, rules=RULES)
        for _ in range(3):
            state, _ = step(state, x)

    return steps


CASES = {
    "other programs": (run(summed), run(gathered)),
    "one ends": (run(summed), run(nothing)),
    "one fails": (run(summed), run(fail)),
    "one is late": (run(twice, SHORT), run(late, SHORT)),
    "other programs, unchecked": (plain(summed), plain(gathered)),
    "a gradient without its sum": (train(scaled), train(scaled)),
    "no mistake": (train(broadcast, check=True), train(broadcast, check=True)),
    "other meshes": (lambda: make(LONG), lambda: ft.make_mesh(dp=2, timeout=LONG)),
    "no second mesh": (lambda: (make(), ft.make_mesh(dp=1, fsdp=2, timeout=SHORT)), make),
    "nobody there": (make, lambda: time.sleep(SHORT + 1)),  # in turns: torch counts the groups that a process makes
    "nobody there, under torchrun": (lambda: time.sleep(SHORT + 1), make),
    "killed": (train(killed, check="first"), train(killed, check="first")),  # last, since it ends a process
}


def work(rank: int, names: list[str], ports: list[int], pipe: Any) -> None:
    """Run cases one after the other, each with a rendezvous of its own; send the error of each and the seconds."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR=HOST)
    for name, port in zip(names, ports, strict=True):
        own = name == "nobody there"  # rank 0 keeps the store, which else is this test's, as it is torchrun's
        os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE=str(not own))
        start, end = time.monotonic(), ("", "")
        try:
            CASES[name][rank]()
        except Exception as error:
            end = type(error).__name__, str(error)
        pipe.send((*end, time.monotonic() - start))
        pipe.recv()  # both have an end
        if dist.is_initialized():
            dist.destroy_process_group()


def pair(names: list[str]) -> dict[str, list[Any]]:
    """{case: [(kind of error, text, seconds) of rank 0, of rank 1, None where it died]}."""
    context = multiprocessing.get_context("spawn")
    stores = {name: dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False) for name in names}
    with socket.create_server((HOST, 0)) as free:
        ports = [free.getsockname()[1] if name == "nobody there" else stores[name].port for name in names]
    pipes, processes = [], []
    for rank in range(2):
        here, there = context.Pipe()
        process = context.Process(target=work, args=(rank, names, ports, there), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        ends: dict[str, list[Any]] = {}
        for name in names:
            ends[name] = [_received(pipe) for pipe in pipes]
            for pipe, end in zip(pipes, ends[name], strict=True):
                if end is not None:
                    pipe.send(None)
        return ends
    finally:
        for process in processes:
            process.kill()
            process.join()


def _received(pipe: Any) -> Any:
    assert pipe.poll(60), "a rank hangs"
    try:
        return pipe.recv()
    except EOFError:
        return None


@pytest.fixture(scope="module")
def ends() -> dict[str, list[Any]]:
    return pair(list(CASES))


def parted(first: str, second: str) -> str:
    lines = [f"rank 0 runs {first}", f"rank 1 {second}"]
    return report("ranks of one group run different programs", lines, FIX)


FIX = "every rank runs the same ops in the same order"
FIX_SUM = (
    "a parameter met a plain torch op, and its gradient lacks a sum over ranks: "
    "write ft.broadcast('embed -> batch seq embed', scale) for x * scale, ft.einsum for a product"
)
FIX_MESH = "start every process, and look for one that failed before it made its mesh"
ELSEWHERE = f"{FIX}: look for one that failed, left, or waits elsewhere"
SUM = f"all_reduce-sum over fsdp of float32[] for 'reduce' 'batch ->' in forward at {line_of(summed)}"
GATHER = f"all_gather over fsdp of float32[2] for 'constrain' 'batch -> seq' in forward at {line_of(gathered)}"
OF_SCALE = "gradients.scale: 'embed', float32[3], differs along fsdp by ... of its norm"
CLOSED = "... by peer..."  # closed or reset
NONE = ("", "")
TEXTS = {  # the errors of rank 0 and of rank 1, and the seconds that they may take; "..." stands for anything
    "other programs": ([("CollectiveError", parted(SUM, f"runs {GATHER}"))] * 2, 0),
    "one ends": ([("CollectiveError", parted(SUM, "runs the end of ft.checked(nothing)"))] * 2, 0),
    "one fails": ([("CollectiveError", parted(SUM, "raises KeyError: 'flour'")), ("KeyError", "'flour'")], 0),
    "one is late": (
        [
            (
                "CollectiveError",
                report(f"rank 0 waited in {SUM}", [f"rank 1 did not join within 2.5 s; its last: {SUM}"], FIX),
            )
        ]
        * 2,
        SHORT + 1,
    ),
    "other programs, unchecked": (
        [
            (
                "CollectiveError",
                report("process 0 in all_reduce over fsdp of float32[] for 'reduce' 'batch ->'", ["..."], ELSEWHERE),
            ),
            (
                "CollectiveError",
                report(
                    "process 1 in all_gather over fsdp of float32[2] for 'constrain' 'batch -> seq'",
                    ["..."],
                    ELSEWHERE,
                ),
            ),
        ],
        SHORT,
    ),
    "a gradient without its sum": ([("ReplicationError", report("ft.train_step", [OF_SCALE], FIX_SUM))] * 2, 0),
    "no mistake": ([NONE] * 2, 0),
    "other meshes": (
        [("CollectiveError", parted("make_mesh(fsdp=2) on cpu", "runs make_mesh(dp=2) on cpu"))] * 2,
        0,
    ),
    "no second mesh": (
        [
            (
                "CollectiveError",
                report("rank 0 waited in make_mesh(dp=1, fsdp=2) on cpu", ["rank 1 did not join within 2.5 s"], FIX),
            ),
            NONE,
        ],
        SHORT,
    ),
    "nobody there": (
        [
            (
                "CollectiveError",
                report(
                    "ft.make_mesh in process 0 of 2",
                    ["not all came within 2.5 s: Timed out after 3 seconds waiting for clients. 1/2 clients joined."],
                    FIX_MESH,
                ),
            ),
            NONE,
        ],
        SHORT + 1,
    ),
    "nobody there, under torchrun": (
        [
            NONE,
            (
                "CollectiveError",
                report(
                    "ft.make_mesh in process 1 of 2",
                    ["not all came within 2.5 s: wait timeout after 2500ms, keys: ..."],
                    FIX_MESH,
                ),
            ),
        ],
        SHORT + 1,
    ),
    "killed": (
        [
            (
                "CollectiveError",
                report(
                    "process 0 in all_reduce over fsdp of float32[3] for 'broadcast' 'embed -> batch embed'",
                    [CLOSED],
                    ELSEWHERE,
                ),
            ),
            None,
        ],
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_end_within_the_timeout_with_an_error_that_says_why(ends, case):
    texts, seconds = TEXTS[case]
    for end, expected in zip(ends[case], texts, strict=True):
        assert (end is None) == (expected is None)
        if end is not None:
            kind, text, took = end
            assert kind == expected[0], text
            assert re.fullmatch(re.escape(expected[1]).replace(r"\.\.\.", "[^\n]+"), text), text
            assert took < seconds + SLACK, "it waited for more than its timeout"
