"""Mistakes in checkpoints, their managers, and the paths of leaves: the call, the kind of error, its whole text."""

from __future__ import annotations

import os
import socket

import numpy

import functitan as ft
from user_errors.given import ADAM, KEY, META, P, X

SAVED, RUN, OWN = (f"memory://user_errors/{name}" for name in ("saved", "run", "own"))
OTHER_FILES = "memory://user_errors"  # a directory with checkpoints of other names
Q = ft.Param("embed mlp", (5, 3))
DOTTED, NUMBERS, LISTED = {"a.b": Q, "a": {"b": Q}}, {0: X, "0": X}, [{"0": X, 0: X}]
SPARSE = X.to_sparse()
LOADER = {"loader": ft.checkpoint.per_rank}

ft.checkpoint.save(SAVED, {"w": X, "step": 3})
with ft.checkpoint.Manager(RUN) as MANAGER:
    for n in (1, 3):
        MANAGER.save(n, {"w": X})
ft.simulate(dp=2)(
    lambda mesh: ft.checkpoint.save(OWN, {"loader": 1}, patterns=LOADER, mesh=mesh, rules=ft.AxisRules({}))
)()
BY = f"process {os.getpid()} on {socket.gethostname()}"

MISTAKES = {
    "a manager that waits for less than no time": (
        lambda: ft.checkpoint.Manager(RUN, timeout=-1, keep_last=0),
        ft.FunctitanError,
        """\
        ft.checkpoint.Manager:
          - keep_last is 0
          - timeout is -1
          Fix: give a number of at least 1, or None; give seconds, more than 0""",
    ),
    "a save that waits for no time": (
        lambda: ft.checkpoint.save(SAVED, P, timeout=0),
        ft.FunctitanError,
        """\
        ft.checkpoint.save:
          - timeout is 0
          Fix: give seconds, more than 0""",
    ),
    "a step before the first": (
        lambda: MANAGER.save(-3, P),
        ft.FunctitanError,
        """\
        ft.checkpoint.Manager.save:
          - step is -3
          Fix: give a whole number of at least 0, as int(state.step)""",
    ),
    "half a step": (
        lambda: MANAGER.step(1.5, P),
        ft.FunctitanError,
        """\
        ft.checkpoint.Manager.step:
          - step is 1.5
          Fix: give a whole number of at least 0, as int(state.step)""",
    ),
    "a step that is a tensor": (
        lambda: MANAGER.restore(P, step=KEY),
        ft.FunctitanError,
        """\
        ft.checkpoint.Manager.restore:
          - step is a Tensor
          Fix: give a whole number of at least 0, as int(state.step)""",
    ),
    "a step that was never saved": (
        lambda: MANAGER.restore(P, step=2),
        ft.CheckpointError,
        f"""\
        ft.checkpoint.restore from {RUN}/step_00000002:
          - there is no complete checkpoint
          Fix: look for others beside it""",
    ),
    "another run in the directory": (
        lambda: ft.checkpoint.Manager(RUN).step(1, P),
        ft.CheckpointError,
        f"""\
        ft.checkpoint.Manager('{RUN}'):
          - there are checkpoints of another run: 2 steps up to 3, the last by {BY}
          Fix: go on from them, by manager.restore before the first step; or give another directory""",
    ),
    "a save where there is one": (
        lambda: ft.checkpoint.save(SAVED, P),
        ft.CheckpointError,
        f"""\
        ft.checkpoint.save to {SAVED}:
          - it is there already
          Fix: choose another path, or remove it""",
    ),
    "leaves that no checkpoint holds": (
        lambda: ft.checkpoint.save(f"{OTHER_FILES}/new", {"a": numpy.float64(1), "b": b"", "c": SPARSE, "d": P}),
        ft.FunctitanError,
        f"""\
        ft.checkpoint.save to {OTHER_FILES}/new:
          - a is a float64
          - b is a bytes
          - c is a tensor that is sparse, nested or quantized
          Fix: a checkpoint holds tensors, and scalars: bool, int, float, str""",
    ),
    "leaves without values": (
        lambda: ft.checkpoint.save(f"{OTHER_FILES}/new", {"declared": Q, "meta": META}),
        ft.CheckpointError,
        f"""\
        ft.checkpoint.save to {OTHER_FILES}/new:
          - meta is on the device meta
          - declared is a Param
          Fix: save the values that were made: ft.TrainState.create, ft.init""",
    ),
    "a key that looks like what a rank has of its own": (
        lambda: ft.checkpoint.save(f"{OTHER_FILES}/new", {"w[rank 0 of 2]": X}),
        ft.FunctitanError,
        f"""\
        ft.checkpoint.save to {OTHER_FILES}/new:
          - w[rank 0 of 2] is named as what each rank has of its own
          Fix: a checkpoint holds tensors, and scalars: bool, int, float, str""",
    ),
    "what two ranks had, on one": (
        lambda: ft.checkpoint.restore(OWN, {"loader": 0}, patterns=LOADER),
        ft.CheckpointError,
        f"""\
        ft.checkpoint.restore from {OWN}:
          - loader is each rank's own, of 2 ranks, and here are 1
          Fix: restore it by patterns={{...: ft.checkpoint.per_rank}}, on as many ranks as saved it; \
restore(path, None) gives what each of them had""",
    ),
    "what each rank had, as one value": (
        lambda: ft.checkpoint.restore(OWN, {"loader": 0}),
        ft.CheckpointError,
        f"""\
        ft.checkpoint.restore from {OWN}:
          - loader is each rank's own, of 2 ranks, and here it is asked for as one value of all ranks
          Fix: restore it by patterns={{...: ft.checkpoint.per_rank}}, on as many ranks as saved it; \
restore(path, None) gives what each of them had""",
    ),
    "one value, as each rank's own": (
        lambda: ft.checkpoint.restore(SAVED, {"w": P["w"], "step": 0}, patterns={"w": None, "step": LOADER["loader"]}),
        ft.CheckpointError,
        f"""\
        ft.checkpoint.restore from {SAVED}:
          - step is one value of all ranks in the checkpoint, and not each rank's own
          Fix: leave out ft.checkpoint.per_rank there, and every rank has that value""",
    ),
    "two leaves of one path, made": (
        lambda: ft.init(DOTTED, KEY),
        ft.FunctitanError,
        """\
        a tree's keys:
          - the leaves of ('a', 'b') and ('a.b',) have one path, 'a.b'
          Fix: rename a key: a leaf is known by its path, to random keys, checkpoints, masks and errors""",
    ),
    "two leaves of one path, in a train state": (
        lambda: ft.TrainState.create(DOTTED, ADAM, KEY),
        ft.FunctitanError,
        """\
        a tree's keys:
          - the leaves of ('a', 'b') and ('a.b',) have one path, 'a.b'
          Fix: rename a key: a leaf is known by its path, to random keys, checkpoints, masks and errors""",
    ),
    "two leaves of one path, saved": (
        lambda: ft.checkpoint.save(f"{OTHER_FILES}/new", NUMBERS),
        ft.FunctitanError,
        """\
        a tree's keys:
          - the leaves of (0,) and ('0',) have one path, '0'
          Fix: rename a key: a leaf is known by its path, to random keys, checkpoints, masks and errors""",
    ),
    "two leaves of one path, restored": (
        lambda: ft.checkpoint.restore(SAVED, LISTED),
        ft.FunctitanError,
        """\
        a tree's keys:
          - the leaves of (0, 0) and (0, '0') have one path, '0.0'
          Fix: rename a key: a leaf is known by its path, to random keys, checkpoints, masks and errors""",
    ),
    "two leaves of one path, masked": (
        lambda: ft.optim.add_decayed_weights(0.1, lambda path, leaf: True).update(NUMBERS, (), NUMBERS),
        ft.FunctitanError,
        """\
        a tree's keys:
          - the leaves of (0,) and ('0',) have one path, '0'
          Fix: rename a key: a leaf is known by its path, to random keys, checkpoints, masks and errors""",
    ),
}
