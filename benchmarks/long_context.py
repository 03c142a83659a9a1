"""Long sequences: the plan of 262,144 tokens, and a sequence of 8,192 over two processes beside torch's ring.

    python benchmarks/long_context.py plan     # the ledger of one step of 8B on cp 8, and its memory
    python benchmarks/long_context.py float32  # step time, beside torch's experimental context parallelism
    python benchmarks/long_context.py bfloat16 # the same in bfloat16
    python benchmarks/long_context.py memory   # peak of one rank, beside one process with the whole sequence
    python benchmarks/long_context.py small    # a scaled-down run of the plan: losses, and measured beside planned peak

Without a word, all of them.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from contest import Group, Sizes, compete, table
from llama_module import batches
from ring_module import loss_of, why_not_public, with_ring
from train_steps import LEARNING_RATE, WEIGHT_DECAY, Program, Step, adamw, update, whole_module

import functitan as ft
from functitan.models import llama

TOKENS, GIB, HALF = 262_144, 2**30, torch.bfloat16
CONFIG = llama.LlamaConfig(2048, 256, 2, 8, 4, 32, 768)
SCALED = llama.LlamaConfig(2048, 128, 4, 8, 2, 16, 384)
CHUNK = 1024


def step_of(config: llama.LlamaConfig, clip: float, *, lean: bool = False, half: bool = False, **options):
    """A train step over zigzag data; `lean`: remat, and logits of a chunk of positions at a time; `half`: bfloat16."""
    own = dict(chunk=CHUNK, block=ft.remat(llama.block)) if lean else {}
    loss = lambda params, batch, key: llama.loss(params, batch, config, **own)
    loss = ft.context_parallel(ft.precision(loss) if half else loss, order="zigzag", **options)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(clip), ft.optim.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY))
    return ft.train_step(loss, tx), tx


def functitan_step(config: llama.LlamaConfig, seq: int, clip: float, mesh, *, jit: bool, **options) -> Step:
    train, tx = step_of(config, clip, **options)
    run = ft.jit(train, donate=0) if jit else train
    held = [ft.TrainState.create(llama.params(config), tx, ft.random.key(0), mesh=mesh, rules=llama.RULES)]

    def step(batch: dict[str, torch.Tensor]) -> float:
        batch = ft.zigzag(batch, "batch seq", mesh=mesh)
        held[0], metrics = run(held[0], ft.shard(batch, "batch seq", mesh=mesh, rules=llama.RULES))
        return metrics["loss"].item()

    return step


def torch_step(config: llama.LlamaConfig, seq: int, clip: float, mesh, *, autocast: bool = False) -> Step:
    """FSDP2 over the ranks of the sequence, and torch's ring; gradients are averaged over ranks."""
    model = with_ring(whole_module(config, seq), mesh)
    optimizer = adamw(model)
    if (why := why_not_public(mesh)) and dist.get_rank() == 0:
        print(f"torch's context_parallel on {mesh.device_type}: {why}")

    def step(batch: dict[str, torch.Tensor]) -> float:
        with torch.autocast(mesh.device_type, HALF) if autocast else nullcontext():
            loss = loss_of(model, mesh, batch)
        loss.backward()
        update(model, optimizer, clip)
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=mesh.get_group())
        return mean.item() / mesh.size()

    return step


def ours(name: str, jit: bool = False, **options) -> Program:
    return Program(f"functitan {name}", partial(functitan_step, jit=jit, **options), ours=True, compiled=jit)


def plan() -> None:
    """One step of 8B on 262,144 tokens over 8 ranks, on fake tensors."""
    train, tx = step_of(llama.LLAMA_8B, 1.0, lean=True, half=True, method="ring")
    state = ft.TrainState.declare(llama.params(llama.LLAMA_8B), tx, ft.random.key(0))
    batch = {name: torch.empty(1, TOKENS, dtype=torch.int64, device="meta") for name in ("tokens", "labels")}
    ledger = ft.explain(train, state, batch, mesh=dict(cp=8), rules=llama.RULES, patterns=(None, "batch seq"))
    print(f"Llama 8B, 1 sequence of {TOKENS:,} tokens, remat, bfloat16 compute, logits of {CHUNK} positions at a time")
    print(ledger)
    if ledger.peak_bytes > 80 * GIB:
        raise SystemExit(f"{ledger.peak_bytes / GIB:.1f} GiB are more than 80")


GROUPS = {
    "float32": Group("cp 2, float32", "cp", (
        ours("eager, ring", method="ring"), ours("jit, ring", jit=True, method="ring"),
        ours("eager, all-to-all", method="all_to_all"), Program("torch's ring, FSDP2, eager", torch_step),
    ), 0.75),
    "bfloat16": Group("cp 2, bfloat16 compute", "cp", (
        ours("jit, ring", jit=True, half=True, method="ring"),
        Program("torch's ring, FSDP2, autocast, eager", partial(torch_step, autocast=True)),
    ), 0.75, 1e-2),
}  # fmt: skip


def time(group: Group, seq: int, steps: int) -> None:
    sizes = Sizes(CONFIG, 1, seq, steps, 1.0)
    print(table(group, compete(group, sizes, memory=False), sizes))


def memory(seq: int) -> None:
    """Peaks of tensors of three steps: a rank of two, and one process with the whole sequence."""
    own = ours("eager, ring", method="ring")
    rank = Group("cp 2", "cp", (own,), 0.6), Group("one process", None, (own,), 0.6)
    peaks = [compete(group, Sizes(CONFIG, 1, seq, 3, 1.0))[0].memory for group in rank]
    print(f"peak of tensors at seq {seq}: {peaks[0] >> 20} MiB on each of 2 ranks, {peaks[1] >> 20} MiB in one process")
    print(f"ratio {peaks[0] / peaks[1]:.3f} (at most 0.60)")


def small(seq: int, steps: int = 5) -> None:
    """The plan's step on two processes, scaled down: losses beside one process's, and the peak beside the plan's."""
    own = ours("lean", lean=True, half=True, method="ring")
    sizes = Sizes(SCALED, 1, seq, steps, 1.0)
    two, one = (compete(Group("small", dim, (own,), 1.0), sizes)[0] for dim in ("cp", None))
    train, tx = step_of(SCALED, 1.0, lean=True, half=True, method="ring")
    batch = batches(SCALED, 1, 1, seq)[0]
    ledger = ft.explain(
        train, ft.TrainState.declare(llama.params(SCALED), tx, ft.random.key(0)), batch,
        mesh=dict(cp=2), rules=llama.RULES, patterns=(None, "batch seq"),
    )  # fmt: skip
    differ = max(abs(a - b) / b for a, b in zip(two.losses, one.losses, strict=True))
    print(f"{SCALED}, seq {seq}: loss {two.losses[0]:.3f} -> {two.losses[-1]:.3f} in {steps} steps, {differ:.1e} off")
    print(f"peak: planned {ledger.peak_bytes >> 20} MiB on each of 2 ranks, measured {two.memory >> 20}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["plan", *GROUPS, "memory", "small"])
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    parts = {
        "plan": plan, **{name: partial(time, group, args.seq, args.steps) for name, group in GROUPS.items()},
        "memory": partial(memory, args.seq), "small": partial(small, args.seq),
    }  # fmt: skip
    for name in args.parts:
        if name not in parts:
            parser.error(f"no part is called {name}: {', '.join(parts)}")
        parts[name]()


if __name__ == "__main__":
    main()
