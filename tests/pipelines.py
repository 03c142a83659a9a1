"""A model in stages, with its data and its oracle: blocks of matmuls between a tied embedding and its output.

Its edges have a mask beside the activations, its blocks a scale and dropout, and its loss an aux.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

import functitan as ft
from functitan.pipeline import Stage

LAYERS, EMBED, MLP, EXAMPLES = 8, 8, 12, 16
RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "mlp": "tp", "embed": "fsdp"})
NAMES = (
    "gpipe", "1f1b", "interleaved_1f1b", "flexible_interleaved_1f1b", "looped_bfs", "zero_bubble_h1",
    "interleaved_zero_bubble", "zbv", "dualpipev",
)  # fmt: skip


def _param(pattern: str, *shape: int) -> ft.Param:
    return ft.Param(pattern, shape, dtype=torch.float64)


DECLARED = {
    "table": _param("mlp embed", MLP, EMBED),
    "layers": [
        {
            "up": _param("embed mlp", EMBED, MLP),
            "down": _param("mlp embed", MLP, EMBED),
            "scale": ft.Param("embed", (EMBED,), ft.param.ones, torch.float64),
        }
        for _ in range(LAYERS)
    ],
}


def layer(params, x, kept, key):
    size = ft.sizes("batch embed", x)["batch"]
    h = x * ft.broadcast("embed -> batch embed", params["scale"], batch=size)
    h = torch.tanh(ft.einsum("batch embed, embed mlp -> batch mlp", h, params["up"]))
    h = ft.einsum("batch mlp, mlp embed -> batch embed", h, params["down"])
    return x + torch.where(kept, h if key is None else ft.dropout("batch embed", h, key, 0.1), 0.0)


def first(params, batch):
    return {
        "x": ft.einsum("batch mlp, mlp embed -> batch embed", batch["x"], params["table"]),
        "kept": ft.broadcast("batch -> batch embed", batch["kept"], embed=EMBED) > 0,
    }


def last(params, x, batch):
    y = ft.einsum("batch embed, mlp embed -> batch mlp", x, params["table"])
    total = ft.reduce("batch mlp ->", (y - batch["x"]) ** 2)
    return (total, ft.reduce("batch ->", batch["kept"])), {"largest": ft.reduce("batch mlp ->", y.abs())}


def loss(params, batch, key, layer=layer):
    edge = first(params, batch)
    x = edge["x"]
    for i, its in enumerate(params["layers"]):
        x = layer(its, x, edge["kept"], None if key is None else ft.random.fold_in(key, f"layer {i}"))
    return last(params, x, batch)


def stages(number: int, layer=layer) -> list[Stage]:
    """The same model in stages of about as many layers each."""
    layers = ft.pipeline.partition(LAYERS, number)

    def make(s: int) -> Stage:
        mine = layers[s]
        declared: dict[str, Any] = {"layers": {i: DECLARED["layers"][i] for i in mine}}
        if s in (0, number - 1):
            declared["table"] = DECLARED["table"]

        def apply(params, edge, batch, key):
            edge = first(params, batch) if s == 0 else edge
            x = edge["x"]
            for i in mine:
                own = None if key is None else ft.random.fold_in(key, f"layer {i}")
                x = layer(params["layers"][i], x, edge["kept"], own)
            return last(params, x, batch) if s == number - 1 else {**edge, "x": x}

        return Stage(declared, apply)

    return [make(s) for s in range(number)]


@functools.cache
def batch(examples: int = EXAMPLES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, MLP, generator=generator, dtype=torch.float64)
    return {"x": x, "kept": (torch.rand(examples, generator=generator) < 0.8).to(torch.float64)}


PATTERNS = {"x": "batch mlp", "kept": "batch"}


@functools.cache
def expected(microbatches: int, examples: int = EXAMPLES):
    """Loss, count, aux and gradients by path, by plain accumulation without a mesh."""
    params = ft.init(DECLARED, ft.random.key(0))
    (value, (count, aux)), grads = ft.accumulate(loss, microbatches, aux="sum")(
        params, batch(examples), ft.random.key(1)
    )
    return (value, count, aux), by_path(grads)


def by_path(values) -> dict[str, torch.Tensor]:
    return dict(zip(ft.tree.paths(values), ft.tree.leaves(values), strict=True))


def run(mesh, schedule, rules=RULES, layer=layer, examples: int = EXAMPLES, times=None, **options):
    """The same of one rank of a pipeline, as global values."""
    its = stages(schedule.num_stages, layer)
    declared = ft.pipeline.declarations(its, schedule, 0 if mesh is None else mesh.place)
    params = ft.init(declared, ft.random.key(0), mesh=mesh, rules=rules)
    given = ft.shard(batch(examples), PATTERNS, mesh=mesh, rules=rules)
    f = ft.spmd(ft.pipeline.value_and_grad(its, schedule, aux="sum", **options), mesh=mesh, rules=rules)
    (value, (count, aux)), grads = f(params, given, ft.random.key(1), times=times)
    return (value, count, aux), by_path(ft.unshard(grads, declared, mesh=mesh, rules=rules))


def schedule_of(name: str, ranks: int, per_rank: int, microbatches: int):
    return ft.pipeline.schedule(name, num_stages=ranks * per_rank, num_microbatches=microbatches, num_ranks=ranks)
