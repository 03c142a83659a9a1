"""One eager train step on two processes: functitan beside torch's `fully_shard` (FSDP2) and `parallelize_module` (TP).

    python benchmarks/step_peers.py               # ratios of times: A B A B, medians
    python benchmarks/step_peers.py --pairs 8     # fewer timed pairs; losses are compared over all steps

Both programs of a row have the same weights, global batches, clip and AdamW, and run step by step in turn in the same
two processes (gloo, one thread each). A row whose losses differ by more than 1e-4 in any of the steps is INVALID.
Tensor parallelism is torch's with sequence parallelism and `loss_parallel`, laid out as its authors recommend.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from llama_module import Llama, batches, loaded
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

LEARNING_RATE, WEIGHT_DECAY, CLIP, TOLERANCE, UNTIMED = 1e-3, 0.1, 1.0, 1e-4, 2
ROWS = {  # name: (functitan's mesh, the peer's way)
    "fully_shard": ("fsdp", "reshard"),
    "fully_shard, reshard_after_forward=False": ("fsdp", "keep"),
    "parallelize_module, sequence and loss parallel": ("tp", "tp"),
}
Step = Callable[[dict[str, Tensor]], float]


def functitan_step(config: llama.LlamaConfig, mesh: DeviceMesh) -> Step:
    """functitan's step on a mesh, from global batches."""
    optim = ft.optim
    tx = optim.chain(optim.clip_by_global_norm(CLIP), optim.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY))
    held = [ft.TrainState.create(llama.params(config), tx, ft.random.key(0), mesh=mesh, rules=llama.RULES)]
    train = ft.train_step(lambda params, batch, key: llama.loss(params, batch, config), tx)

    def step(batch: dict[str, Tensor]) -> float:
        held[0], metrics = train(held[0], ft.shard(batch, "batch seq", mesh=mesh, rules=llama.RULES))
        return metrics["loss"].item()

    return step


def fsdp_step(config: llama.LlamaConfig, seq: int, mesh: DeviceMesh, reshard: bool) -> Step:
    """FSDP2: each rank has a part of the batch; gradients are averaged over ranks."""
    model = whole_module(config, seq)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    optimizer = adamw(model)

    def step(batch: dict[str, Tensor]) -> float:
        own = {name: x.chunk(mesh.size())[mesh.get_local_rank()] for name, x in batch.items()}
        loss = cross_entropy(model(own["tokens"]).flatten(0, 1), own["labels"].flatten())
        loss.backward()
        update(model, optimizer)
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=mesh.get_group())
        return mean.item() / mesh.size()

    return step


def tp_step(config: llama.LlamaConfig, seq: int, mesh: DeviceMesh) -> Step:
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
    optimizer = adamw(model)

    def step(batch: dict[str, Tensor]) -> float:
        with loss_parallel():
            loss = cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())
            loss.backward()
        update(model, optimizer)
        return (loss.full_tensor() if isinstance(loss, DTensor) else loss).item()

    return step


def whole_module(config: llama.LlamaConfig, seq: int) -> Llama:
    """The module with functitan's initial weights, whole."""
    declared = llama.params(config)
    state = ft.TrainState.create(declared, ft.optim.sgd(0.0), ft.random.key(0))  # the same key as functitan_step's
    return loaded(config, seq, state.params)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()


def run(options: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Every row on this process: seconds of each timed step of both programs, and the losses of all steps."""
    torch.set_num_threads(1)
    config, seq = config_of(options), options["seq"]
    found = {}
    for name, (dim, way) in ROWS.items():
        mesh = ft.make_mesh(**{dim: -1})
        peer = tp_step(config, seq, mesh) if way == "tp" else fsdp_step(config, seq, mesh, way == "reshard")
        programs = {"functitan": functitan_step(config, mesh), "peer": peer}
        times, losses = ({program: [] for program in programs} for _ in range(2))
        for i, batch in enumerate(batches(config, options["steps"], options["batch"], seq)):
            for program, step in programs.items():
                dist.barrier()
                start = time.perf_counter()
                losses[program].append(step(batch))
                if i >= max(UNTIMED, options["steps"] - options["pairs"]):  # the first steps allocate
                    times[program].append(time.perf_counter() - start)
        found[name] = {"times": times, "losses": losses}
    return found


def config_of(options: dict[str, int]) -> llama.LlamaConfig:
    embed, heads = options["embed"], options["heads"]
    return llama.LlamaConfig(
        options["vocab"], embed, options["layers"], heads, options["kv_heads"], embed // heads, options["mlp"]
    )


def table(found: dict[str, dict[str, Any]], options: dict[str, int]) -> str:
    """The rows that a run prints."""
    lines = [f"{'ms per step, two processes':50}{'functitan':>10}{'peer':>10}{'ratio':>8}{'losses differ':>15}"]
    for name, row in found.items():
        ours, theirs = row["times"].values()
        worst = max(abs(a - b) / abs(b) for a, b in zip(*row["losses"].values(), strict=True))
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) if ours else float("nan")
        means = [statistics.median(times) * 1e3 if times else float("nan") for times in (ours, theirs)]
        mark = "" if worst <= TOLERANCE else "   INVALID: above 1e-4"
        lines.append(f"{name:50}{means[0]:10.1f}{means[1]:10.1f}{ratio:8.3f}{worst:15.1e}{mark}")
    shapes = ", ".join(f"{name} {value}" for name, value in options.items())
    return "\n".join([*lines, f"{shapes}; float32, AdamW, clip {CLIP}; torch {torch.__version__}, gloo, 1 thread each"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {"steps": 36, "pairs": 34, "batch": 8, "seq": 256, "vocab": 2048, "embed": 256, "layers": 6, "heads": 8}
    for name, value in {**defaults, "kv_heads": 4, "mlp": 768}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options = vars(parser.parse_args())
    print(table(ft.launch(run, options, nprocs=2)[0], options))


if __name__ == "__main__":
    main()
