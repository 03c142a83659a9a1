"""What the calls of the table are given: built here, before any of them is called.

Invariant: nothing here is changed by a call, and the mesh sends nothing: its transport fails.
"""

from __future__ import annotations

from typing import Any

import torch

import functitan as ft
from functitan import data as data  # its import takes a second, which is not the calls'
from functitan.models import llama
from functitan.sharding.mesh import Mesh, MeshSizes, Transport

RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "heads": "tp", "seq": "cp", "embed": "fsdp", "mlp": "tp", "vocab": "tp"})
FEWER = ft.AxisRules({"batch": None})
KEY = ft.random.key(0)

X, X3, W, V = torch.ones(2, 4), torch.ones(2, 2, 4), torch.ones(4, 3), torch.ones(4)
ODD, HALF, WIDE, META, ARRAY = torch.ones(3, 5), X.half(), X.double(), X.to("meta"), X.numpy()
IDS, THREE, FLOATS, TABLE = torch.tensor([0, 1]), torch.tensor([0, 1, 2]), torch.zeros(2), torch.ones(6, 4)
TREE = {"a": [X3, ODD], "b": torch.ones(3)}
Q, K, K3 = torch.ones(2, 4, 4, 8), torch.ones(2, 4, 2, 8), torch.ones(2, 4, 3, 8)
LONG, LATER, PLACES = torch.ones(2, 5, 2, 8), torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 4)

P, PAIR = {"w": X}, {"w": X, "b": V}
ADAM, SGD = ft.optim.adamw(1e-3), ft.optim.sgd(0.1, momentum=0.9)
ADAM_OF_P, ADAM_OF_PAIR = ADAM.init(P), ADAM.init(PAIR)
DECLARED = {"w": ft.Param("embed mlp", (5, 3)), "v": ft.Param("vocab embed", (7, 8))}
MISSPELT = {"w": ft.Param("embde mlp", (4, 3)), "v": ft.Param("vocb embed", (7, 6))}
BATCH = {"x": X}
STATE, USED = (ft.TrainState.create(DECLARED, ADAM, KEY) for _ in range(2))
ft.train_step(lambda params, batch, key: (params["w"].sum(), 1), ADAM)(USED, BATCH)
CONFIG = llama.LlamaConfig(8, 8, 2, 2, 2, 4, 8)
LLAMA, TOKENS = ft.init(llama.params(CONFIG), KEY), torch.zeros(1, 2, dtype=torch.int64)


def refuse(*_: Any) -> None:
    raise AssertionError("something was sent")


def on(**sizes: int) -> Mesh:
    """Rank 0 of a mesh that sends nothing."""
    silent = Transport(refuse, refuse, post=refuse, receive=refuse, group=refuse)
    return Mesh(MeshSizes(tuple(sizes), tuple(sizes.values())), (0,) * len(sizes), silent)


def inside(fn, rules=RULES, **sizes: int):
    """`fn()` where named ops know a mesh: two ranks over fsdp unless sizes are given."""
    return ft.spmd(fn, mesh=on(**(sizes or {"fsdp": 2})), rules=rules)()


def step(out, tx=ADAM, state=STATE):
    """A train step whose loss function gives `out(params)`."""
    return ft.train_step(lambda params, batch, key: out(params), tx)(state, BATCH)
