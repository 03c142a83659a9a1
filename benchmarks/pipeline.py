"""functitan's pipelines beside torch.distributed.pipelining's 1F1B: the same Llama in stages on two processes.

    python benchmarks/pipeline.py                              # 1F1B and zero-bubble schedules, 4 microbatches
    python benchmarks/pipeline.py --schedules zbv --microbatches 8
    python benchmarks/pipeline.py --picture folder             # a drawing of each schedule: predicted beside measured

Programs have the same weights, batches, clip and AdamW, and run step by step in turn in the same processes, each on one
thread. Both cut the layers alike for as many stages: into parts of equal estimated cost. Bounds: the best of ours takes
at most 0.90 of the peer's time, and a program's peak memory, that of the process that has most, is at most the peer's.
"""

from __future__ import annotations

import argparse
import os
from functools import partial

import torch
import torch.distributed as dist
from contest import Group, Sizes, compete, table
from peers import TINY
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import cross_entropy
from train_steps import LEARNING_RATE, WEIGHT_DECAY, Program, Step, adamw, device, whole_module

import functitan as ft
from functitan.models import llama

# seven layers and an output that costs about one: two ranks share them evenly, in two stages or in four
MODELS = {"small": llama.LlamaConfig(2048, 512, 7, 8, 4, 64, 1536), "tiny": TINY._replace(num_layers=7)}
PER_RANK = {"zbv": 2, "dualpipev": 2, "interleaved_1f1b": 2, "interleaved_zero_bubble": 2, "looped_bfs": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=["1f1b", "zero_bubble_h1", "zbv"])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peaks, which takes fresh processes")
    parser.add_argument("--picture", help="a folder to draw each schedule into")
    for name, value in {"steps": 16, "batch": 4, "seq": 256, "microbatches": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    ours = [ours_program(name, args.microbatches, args.picture) for name in args.schedules]
    group = Group("pp 2", "pp", (*ours, torch_program(args.microbatches)), 0.90)
    sizes = Sizes(MODELS[args.model], args.batch, args.seq, args.steps, clip=1.0)
    print(table(group, compete(group, sizes, not args.no_memory), sizes), flush=True)
    print(
        f"{sizes.config}\n{args.microbatches} microbatches of {args.batch // args.microbatches}, seq {args.seq}; ",
        end="",
    )
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, gloo")


def ours_program(name: str, microbatches: int, picture: str | None) -> Program:
    make = partial(our_step, name=name, microbatches=microbatches, picture=picture)
    return Program(f"functitan {name}", make, ours=True)


def torch_program(microbatches: int) -> Program:
    return Program("torch pipelining 1F1B", partial(torch_step, microbatches=microbatches))


def layers_of(config: llama.LlamaConfig, num_stages: int) -> tuple[range, ...]:
    costs = ft.pipeline.estimate_costs(llama.params(config))
    return ft.pipeline.partition(config.num_layers, num_stages, costs=costs)


def our_step(
    config: llama.LlamaConfig,
    seq: int,
    clip: float,
    mesh: DeviceMesh,
    *,
    name: str,
    microbatches: int,
    picture: str | None,
) -> Step:
    """functitan's step, eager."""
    ranks = mesh.size()
    num_stages = ranks * PER_RANK.get(name, 1)
    schedule = ft.pipeline.schedule(name, num_stages=num_stages, num_microbatches=microbatches, num_ranks=ranks)
    stages = llama.stages(config, layers_of(config, num_stages))
    declared = ft.pipeline.declarations(stages, schedule, ft.as_mesh(mesh).place)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(clip), ft.optim.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY))
    key = ft.random.key(0).to(device())
    held = [ft.TrainState.create(declared, tx, key, mesh=mesh, rules=llama.RULES)]
    times: list[tuple[float, float]] = []
    gradients = partial(ft.pipeline.value_and_grad(stages, schedule), times=times if picture else None)
    train = ft.train_step(None, tx, value_and_grad=gradients)

    def step(batch: dict[str, Tensor]) -> float:
        times.clear()
        held[0], metrics = train(held[0], batch)
        if picture:
            draw(schedule, times, f"{picture}/{name}.png")
        return metrics["loss"].item()

    return step


def draw(schedule: ft.pipeline.Schedule, times: list[tuple[float, float]], path: str) -> None:
    """The schedule as it was run, below what is predicted where every action takes as long as every other.

    Printed: the mean ms of each kind of action on each rank, waits for messages included.
    """
    measured: list[list[tuple[float, float]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(measured, times)
    start = min(row[0][0] for row in measured)
    shown = tuple(tuple((a - start, b - start) for a, b in row) for row in measured)
    if dist.get_rank() == 0:
        for rank, (actions, row) in enumerate(zip(schedule.actions, shown, strict=True)):
            kinds = dict.fromkeys(action.kind for action in actions)
            spent = {k: [b - a for action, (a, b) in zip(actions, row, strict=True) if action.kind == k] for k in kinds}
            print(schedule.name, rank, {k: round(1e3 * sum(each) / len(each), 1) for k, each in spent.items()})
        schedule.plot(path, measured=shown)


class Part(nn.Module):
    """The layers of one stage, with what comes before the first and after the last."""

    def __init__(self, whole: nn.Module, layers: range) -> None:
        super().__init__()
        self.embedding = whole.embedding if layers.start == 0 else None
        self.layers = nn.ModuleList(whole.layers[i] for i in layers)
        is_last = layers.stop == len(whole.layers)
        self.norm, self.unembedding = (whole.norm, whole.unembedding) if is_last else (None, None)
        self.register_buffer("cos", whole.cos)
        self.register_buffer("sin", whole.sin)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embedding is None else self.embedding(x)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return x if self.unembedding is None else self.unembedding(self.norm(x))


def torch_step(config: llama.LlamaConfig, seq: int, clip: float, mesh: DeviceMesh, *, microbatches: int) -> Step:
    """torch's own pipeline, with a clip by the norm of all stages together."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    part = Part(whole_module(config, seq), layers_of(config, ranks)[rank])
    group = mesh.get_group()
    stage = PipelineStage(part, rank, ranks, torch.device(device()), group=group)
    schedule = Schedule1F1B(stage, microbatches, loss_fn=lambda y, t: cross_entropy(y.flatten(0, 1), t.flatten()))
    optimizer = adamw(part)

    def step(batch: dict[str, Tensor]) -> float:
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(batch["tokens"])
        else:
            schedule.step(target=batch["labels"], losses=losses)
        gradients = [p.grad for p in part.parameters()]
        square = torch.nn.utils.get_total_norm(gradients).square()
        sums = torch.stack([square, torch.stack(losses).mean() if losses else torch.zeros_like(square)])
        dist.all_reduce(sums, group=group)
        torch.nn.utils.clip_grads_with_norm_(part.parameters(), clip, sums[0].sqrt())
        optimizer.step()
        optimizer.zero_grad()
        return sums[1].item()

    return step


if __name__ == "__main__":
    main()
