"""The programs that the benchmarks hold side by side: one train step each, from the same weights and global batches.

Invariant: `make(config, seq, clip, mesh)` gives a function from a global batch to its mean loss, which has updated the
program's own state by AdamW after a clip of the global norm. Peers are laid out as their authors recommend.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from llama_module import Llama, loaded
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy

import functitan as ft
from functitan.models import llama

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
Step = Callable[[dict[str, Tensor]], float]


class Program(NamedTuple):
    """How to make one step."""

    name: str
    make: Callable[..., Step]  # (config, seq, clip, mesh)
    ours: bool = False
    compiled: bool = False


def functitan(jit: bool = False, kept: bool = False, compute: torch.dtype | None = None) -> Program:
    ways = ["jit"] * jit + ["gathers kept"] * kept
    make = partial(functitan_step, jit=jit, kept=kept, compute=compute)
    return Program(f"functitan {', '.join(ways) or 'eager'}", make, ours=True, compiled=jit)


def module(compiled: bool = False, autocast: torch.dtype | None = None) -> Program:
    name = "nn.Module" + (" autocast" if autocast else "") + (", compiled" if compiled else ", eager")
    return Program(name, partial(module_step, compiled=compiled, autocast=autocast), compiled=compiled)


def fsdp(reshard: bool, compiled: bool = False) -> Program:
    name = "fully_shard" + ("" if reshard else ", no reshard") + (", compiled" if compiled else ", eager")
    return Program(name, partial(fsdp_step, reshard=reshard, compiled=compiled), compiled=compiled)


def tensor_parallel(compiled: bool = False) -> Program:
    name = "parallelize_module" + (", compiled" if compiled else ", eager")
    return Program(name, partial(tensor_parallel_step, compiled=compiled), compiled=compiled)


def jax(devices: int) -> Program:
    name = "JAX jitted" + (f", {devices} devices" if devices > 1 else "")
    return Program(name, partial(jax_step, devices=devices), compiled=True)


def functitan_step(
    config: llama.LlamaConfig,
    seq: int,
    clip: float,
    mesh: DeviceMesh | None,
    *,
    jit: bool,
    kept: bool,
    compute: torch.dtype | None,
) -> Step:
    """functitan's step: eager or captured, with gathered weights kept for backward or not."""
    optim, loss = ft.optim, lambda params, batch, key: llama.loss(params, batch, config)
    tx = optim.chain(optim.clip_by_global_norm(clip), optim.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY))
    key = ft.random.key(0).to(device())
    held = [ft.TrainState.create(llama.params(config), tx, key, mesh=mesh, rules=llama.RULES)]
    train = ft.train_step(loss if compute is None else ft.precision(loss, compute=compute), tx)
    run = ft.jit(train, donate=0, keep_gathered=kept) if jit else train

    def step(batch: dict[str, Tensor]) -> float:
        held[0], metrics = run(held[0], ft.shard(batch, "batch seq", mesh=mesh, rules=llama.RULES))
        return metrics["loss"].item()

    return step


def module_step(
    config: llama.LlamaConfig, seq: int, clip: float, mesh: None, *, compiled: bool, autocast: torch.dtype | None
) -> Step:
    """A hand-written module on one device, with the fused AdamW."""
    model = whole_module(config, seq)
    optimizer = adamw(model)

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model(tokens).flatten(0, 1).float(), labels.flatten())

    run = torch.compile(loss_of) if compiled else loss_of

    def step(batch: dict[str, Tensor]) -> float:
        with torch.autocast(device(), autocast) if autocast else nullcontext():
            loss = run(batch["tokens"], batch["labels"])
        loss.backward()
        update(model, optimizer, clip)
        return loss.item()

    return step


def fsdp_step(
    config: llama.LlamaConfig, seq: int, clip: float, mesh: DeviceMesh, *, reshard: bool, compiled: bool
) -> Step:
    """FSDP2: each rank has a part of the batch; gradients are averaged over ranks."""
    model = whole_module(config, seq)
    for layer in model.layers:
        if compiled:
            layer.compile(fullgraph=True)
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    optimizer = adamw(model)

    def step(batch: dict[str, Tensor]) -> float:
        own = {name: x.chunk(mesh.size())[mesh.get_local_rank()] for name, x in batch.items()}
        loss = cross_entropy(model(own["tokens"]).flatten(0, 1), own["labels"].flatten())
        loss.backward()
        update(model, optimizer, clip)
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=mesh.get_group())
        return mean.item() / mesh.size()

    return step


def tensor_parallel_step(config: llama.LlamaConfig, seq: int, clip: float, mesh: DeviceMesh, *, compiled: bool) -> Step:
    """Megatron's tensor and sequence parallelism, and a loss of logits that stay sharded over the vocabulary."""
    model = whole_module(config, seq)
    into = lambda *others: PrepareModuleInput(
        input_layouts=(Shard(1), *others), desired_input_layouts=(Replicate(), *others)
    )
    block = {
        "attention_norm": SequenceParallel(),
        "attention": into(None, None),
        **{f"attention.{name}": ColwiseParallel() for name in ("q", "k", "v")},
        "attention.out": RowwiseParallel(output_layouts=Shard(1)),
        "mlp_norm": SequenceParallel(),
        "mlp": into(),
        **{f"mlp.{name}": ColwiseParallel() for name in ("gate", "up")},
        "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    for layer in model.layers:
        parallelize_module(layer, mesh, block)
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "unembedding": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, ends)
    if compiled:
        model.compile()  # whole: backward of a compiled block fails on torch 2.13
    optimizer = adamw(model)

    def step(batch: dict[str, Tensor]) -> float:
        with loss_parallel():
            loss = cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())
            loss.backward()
        update(model, optimizer, clip)
        return (loss.full_tensor() if isinstance(loss, DTensor) else loss).item()

    return step


def jax_step(config: llama.LlamaConfig, seq: int, clip: float, mesh: DeviceMesh | None, *, devices: int) -> Step:
    """JAX's jitted step: one device, or parameters and batch sharded over several devices of the first process."""
    if mesh is not None and dist.get_rank() > 0:
        return lambda batch: float("nan")
    from llama_jax import make_step  # an optional package

    return make_step(config, initial(config), clip, LEARNING_RATE, WEIGHT_DECAY, devices)


def initial(config: llama.LlamaConfig) -> ft.tree.Tree:
    """functitan's initial parameters, whole: those of the same key as its own steps."""
    return ft.TrainState.create(llama.params(config), ft.optim.sgd(0.0), ft.random.key(0)).params


def whole_module(config: llama.LlamaConfig, seq: int) -> Llama:
    return loaded(config, seq, initial(config)).to(device())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
