"""Programs whose ranks part ways or never end: each ends, with the right value or one error, and soon."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import functitan as ft
from functitan.pipeline import Stage

RULES = ft.AxisRules({"batch": "dp", "embed": None})


def total(mesh):
    """The sum of 0 + 1 + 2 + 3 over a mesh: 6 on every rank."""
    x = ft.shard(torch.arange(4.0), "batch", mesh=mesh, rules=RULES)
    return ft.spmd(lambda x: ft.reduce("batch ->", x), mesh=mesh, rules=RULES)(x).item()


# --- captured programs ----------------------------------------------------------------------------------------------


def squares(mesh):
    x = ft.shard(torch.arange(4.0), "batch", mesh=mesh, rules=RULES)
    fn = ft.jit(ft.spmd(ft.checked(lambda x: ft.reduce("batch ->", x * x)), mesh=mesh, rules=RULES), backend="graph")
    return fn(x).item(), ft.checked(fn)(x).item()


def test_a_checked_function_is_captured():
    assert ft.simulate(dp=2, timeout=20)(squares)() == [(14.0, 14.0)] * 2


def test_ranks_of_a_checked_captured_function_are_compared():
    """What ft.checked asks for inside a graph is done before its first run: other collectives are an error."""

    def rank(mesh):
        x = ft.shard(torch.arange(4.0), "batch", mesh=mesh, rules=RULES)
        op = "sum" if mesh.rank else "max"
        fn = ft.spmd(ft.checked(lambda x: ft.reduce("batch ->", x, op=op)), mesh=mesh, rules=RULES)
        return ft.jit(fn, backend="graph")(x)

    with pytest.raises(ft.CollectiveError, match="different programs"):
        ft.simulate(dp=2, timeout=20)(rank)()


MEETINGS = {
    "a virtual mesh": lambda mesh, x: ft.simulate(dp=2)(total)()[0] + x,
    "a save": lambda mesh, x: (ft.checkpoint.save("memory://capture/x", {"x": x}, patterns="batch"), x)[1],
    "an agreement": lambda mesh, x: (mesh.transport.agree("saves"), x)[1],
}


@pytest.mark.parametrize("name", MEETINGS)
def test_ranks_that_would_meet_while_one_traces_get_an_error_at_once(name):
    def rank(mesh):
        fn = lambda x: MEETINGS[name](mesh, x)
        return ft.jit(ft.spmd(fn, mesh=mesh, rules=RULES), backend="graph")(torch.ones(2))

    start = time.monotonic()
    with pytest.raises(ft.CaptureError, match="being captured"):
        ft.simulate(dp=2, timeout=20)(rank)()
    assert time.monotonic() - start < 10


# --- ft.simulate ----------------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible():
    """A process that a shell starts in the background ignores the signal of Ctrl-C, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", ["collectives", "collectives of one rank", "no collective"])
def test_no_rank_runs_after_an_interrupt(how, interruptible):
    assert threading.current_thread() is threading.main_thread()
    steps = [0, 0]

    def forever(mesh):
        while True:
            steps[mesh.rank] += 1
            if how == "collectives" or (how == "collectives of one rank" and mesh.rank == 0):
                total(mesh)

    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ft.simulate(dp=2, timeout=60)(forever)()
    timer.join()
    at = list(steps)
    time.sleep(0.1)
    assert min(at) > 0 and steps == at
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank")]
    assert ft.simulate(dp=2)(total)() == [6.0, 6.0]  # and the next call is as ever


def test_a_rank_of_a_nested_mesh_begins_without_the_outer_one():
    def plain(mesh):
        return ft.reduce("batch ->", torch.ones(2)).item()

    def outer(mesh):
        inside = lambda x: (x, ft.simulate(dp=2)(total)(), ft.simulate(dp=2)(plain)(), total(mesh))
        return ft.spmd(ft.checked(inside), mesh=mesh, rules=RULES)(0)

    assert ft.simulate(dp=2)(outer)() == [(0, [6.0, 6.0], [2.0, 2.0], 6.0)] * 2


def test_ranks_have_the_torch_modes_of_the_caller():
    def found(mesh):
        product = torch.mm(*(torch.ones(2, 2, device="cpu"),) * 2)
        return torch.ones(2).device.type, product.dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    plain = ("cpu", torch.float32, True, False)
    assert ft.simulate(dp=2)(found)() == [plain] * 2
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.no_grad():
        assert ft.simulate(dp=2)(found)() == [("meta", torch.bfloat16, False, False)] * 2
    with torch.inference_mode():
        assert ft.simulate(dp=2)(found)() == [("cpu", torch.float32, False, True)] * 2


# --- pipelines ------------------------------------------------------------------------------------------------------


def test_leaves_that_two_ranks_share_in_other_orders_get_their_own_gradients():
    """Leaf z is in stages 0 and 3, a in 1 and 2: rank 0 has z before a, rank 1 a before z."""
    leaf = lambda: ft.Param("embed", (3,), dtype=torch.float64)
    names = ["z", "a", "a", "z"]
    weights = torch.tensor([2.0, 3.0, 5.0, 7.0], dtype=torch.float64)

    def stage(s):
        def apply(params, x, batch, key):
            x = batch if x is None else x
            x = x * ft.broadcast("embed -> batch embed", torch.sin(weights[s] * params[names[s]]), batch=x.shape[0])
            return (ft.reduce("batch embed ->", x), ft.reduce("batch embed ->", torch.ones_like(x))) if s == 3 else x

        return Stage({names[s]: leaf()}, apply)

    stages = [stage(s) for s in range(4)]
    schedule = ft.pipeline.schedule("interleaved_1f1b", num_stages=4, num_microbatches=2, num_ranks=2)
    x = torch.arange(1.0, 13.0, dtype=torch.float64).view(4, 3) / 7
    values = ft.init({"a": leaf(), "z": leaf()}, ft.random.key(0))
    rules = ft.AxisRules({"batch": "dp", "embed": None})

    def rank(mesh):
        place = ft.as_mesh(mesh).place
        mine = ft.init(ft.pipeline.declarations(stages, schedule, place), ft.random.key(0), mesh=mesh, rules=rules)
        step = ft.pipeline.value_and_grad(stages, schedule)
        return ft.spmd(step, mesh=mesh, rules=rules)(mine, x, None)[1]

    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    y = x
    for s, name in enumerate(names):
        y = y * torch.sin(weights[s] * leaves[name])
    y.mean().backward()
    for grads in ft.simulate(pp=2, timeout=20)(rank)():
        for name in ("a", "z"):
            torch.testing.assert_close(grads[name], leaves[name].grad, rtol=1e-12, atol=1e-12)


# --- ft.launch ------------------------------------------------------------------------------------------------------


def sockets():
    """The addresses, as in /proc/net, where this process and its parent listen, once there is a mesh; a sum over it."""
    found = total(ft.make_mesh(dp=2))
    links = [f"/proc/{pid}/fd/{fd}" for pid in (os.getpid(), os.getppid()) for fd in os.listdir(f"/proc/{pid}/fd")]
    inodes = {os.readlink(link)[8:-1] for link in links if os.path.islink(link) and "socket:" in os.readlink(link)}
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return found, [row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes], squares_of_one()


def squares_of_one():
    return squares(ft.make_mesh(dp=2))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_processes_of_a_launch_listen_on_the_loopback_alone():
    """The store in the parent, and gloo in each rank. And a checked function is captured in processes, too."""
    for found, addresses, squared in ft.launch(sockets, nprocs=2, timeout=120):
        assert found == 6.0 and squared == (14.0, 14.0)
        assert addresses and {address[-8:] for address in addresses} == {"0100007F"}


CELLS = (
    "import functitan as ft, torch\nfrom functitan import random\nscale = torch.tensor(2.0)",
    "def work(x):\n"
    "    rank = ft.as_mesh(ft.make_mesh(dp=2)).rank\n"
    "    return rank + (scale * x + random.key(7)[1]).item()",
    "print(ft.launch(work, 1.0, nprocs=2))",
    "def product(x):\n    return ft.einsum('batch embed, embed mlp -> batch mlp', x, x)",
    "product(torch.ones(2, 3))",
)


def test_a_notebook_launches_its_functions_and_shows_its_own_lines_in_errors(monkeypatch, tmp_path):
    """In a real Jupyter kernel. The function uses a module, a name from a module, and a tensor of the notebook."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), *sys.path]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True).execute()
    *_, launched, _, failed = notebook.cells
    assert launched.outputs[0].text.strip() == "[9.0, 10.0]"
    lines = failed.outputs[0].traceback
    shown = [line for line in "\n".join(lines).splitlines() if line.strip()]
    calls = [line.strip() for line in shown if line.startswith("    ") and "^" not in line]
    assert calls == ["product(torch.ones(2, 3))", "return ft.einsum('batch embed, embed mlp -> batch mlp', x, x)"]
    assert "axis 'embed' is 2 in operand 1 'embed mlp', but 3 in operand 0 'batch embed'" in lines[-1]
    assert not any(os.path.join("functitan", "") in line for line in shown if line.startswith("  File"))


def test_a_rank_outside_spmd_has_right_tangents():
    """torch's forward mode is one for the process: ranks that use it at once get wrong numbers, or errors."""
    x = torch.arange(1.0, 5.0, dtype=torch.float64)

    def rank(mesh):
        start = x * (mesh.rank + 1)
        return [ft.jvp(lambda y: torch.sin(y) * y, (start,), (x,))[1] for _ in range(50)]

    for number, tangents in enumerate(ft.simulate(dp=4)(rank)()):
        y = x * (number + 1)
        for tangent in tangents:
            torch.testing.assert_close(tangent, (torch.cos(y) * y + torch.sin(y)) * x)
