"""The laws of messages between pipeline stages: order, what a ledger says, and how waits end."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

import functitan as ft
from functitan.errors import CollectiveError
from functitan.sharding.context import current
from functitan.sharding.message import Label
from functitan.sharding.messages import post, receive

LABEL = Label("test", "a number")
RULES = ft.AxisRules({"batch": "fsdp"})
CPU = torch.device("cpu")


def inside(mesh, fn):
    return ft.spmd(lambda: fn(current()), mesh=mesh, rules=RULES)()


def exchange(mesh):
    """Both ranks send three numbers before either receives one; the last is awaited first."""

    def run(env):
        other = 1 - env.pipeline.place
        sent = [post(torch.full((2,), 10.0 * env.pipeline.rank + i), other, env, LABEL) for i in range(3)]
        got = [receive((2,), torch.float32, CPU, other, env, LABEL) for _ in range(3)]
        found = [int(pending.wait()[0]) for pending in reversed(got)]
        return found, [pending.wait().shape for pending in sent], [pending.done() for pending in sent]

    return inside(mesh, run)


def exchange_on_gloo():
    return exchange(ft.make_mesh(pp=2))


def test_messages_of_a_pair_arrive_in_the_order_they_were_posted():
    """Also where both directions are under way, and between ranks that differ in `pp` alone."""
    for found in (ft.simulate(pp=2)(exchange)(), ft.launch(exchange_on_gloo, nprocs=2)):
        assert [numbers for numbers, _, _ in found] == [[12, 11, 10], [2, 1, 0]]
        assert all(all(done) for _, _, done in found)
    beside = ft.simulate(pp=2, fsdp=2)(exchange)()
    assert [numbers[-1] for numbers, _, _ in beside] == [20, 30, 0, 10]


def test_a_ledger_holds_each_message_with_its_bytes_at_the_sender():
    with ft.record() as ledger:
        ft.simulate(pp=2)(exchange)()
    assert [(e.collective, e.mesh_dims, e.bytes, e.op) for e in ledger] == [("send", ("pp",), 8, "test")] * 3


def fails(mesh):
    def run(env):
        if env.pipeline.rank == 0:
            raise ValueError("rank 0 has had enough")
        receive((2,), torch.float32, CPU, 0, env, LABEL).wait()

    return inside(mesh, run)


def test_a_failing_rank_ends_those_that_wait_for_its_message():
    with pytest.raises(ValueError, match="rank 0 has had enough"):
        ft.simulate(pp=2)(fails)()


def waits_in_vain(mesh):
    def run(env):
        if env.pipeline.rank == 1:
            receive((2, 3), torch.float32, CPU, 0, env, LABEL).wait()

    return inside(mesh, run)


def test_a_message_that_nobody_sends_is_named():
    with pytest.raises(CollectiveError) as error:
        ft.simulate(pp=2, timeout=0.3)(waits_in_vain)()
    text = str(error.value)
    assert "rank 1 waited in message over pp of float32[2, 3] for 'test' 'a number'" in text
    assert "rank 0 left without joining" in text


def test_another_message_than_the_awaited_is_refused():
    def run(env):
        if env.pipeline.rank == 0:
            return post(torch.zeros(3), 1, env, LABEL)
        return receive((2,), torch.float64, CPU, 0, env, LABEL).wait()

    with pytest.raises(CollectiveError) as error:
        ft.simulate(pp=2)(lambda mesh: inside(mesh, run))()
    assert "rank 0 sends message over pp of float32[3]" in str(error.value)
    assert "rank 1 awaits message over pp of float64[2]" in str(error.value)


def killed():
    mesh = ft.make_mesh(pp=2, timeout=20)

    def run(env):
        exchange(mesh)
        if env.pipeline.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        try:
            receive((2,), torch.float32, CPU, 0, env, LABEL).wait()
        except CollectiveError as error:
            print(f"{error} in {time.monotonic() - start:.1f} s", flush=True)
            raise

    return inside(mesh, run)


def test_a_process_that_dies_ends_those_that_wait_for_its_message(capfd):
    with pytest.raises(CollectiveError, match="rank 0 ended without a result: killed by SIGKILL"):
        ft.launch(killed, nprocs=2)
    out = capfd.readouterr().out
    assert "rank 1 waited for the message over pp of float32[2] for 'test' 'a number' from rank 0" in out
    assert float(out.rpartition(" in ")[2].split()[0]) < 5  # not the timeout: the connection is closed
