"""One eager train step on one process: functitan beside a hand-written nn.Module with fused AdamW.

    python benchmarks/step.py            # ratios of times (A B A B, medians) and of peak memory

Both have the same weights, data, clip and optimizer; the losses of all steps must agree to 1e-4, or the row is invalid.
Memory is the growth of the peak resident set from just before the model exists, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from llama_module import batches, loaded
from torch import Tensor, nn
from torch.nn import functional

import functitan as ft

CONFIG = ft.models.llama.DEBUG
BATCH, SEQ, LEARNING_RATE, WEIGHT_DECAY, CLIP = 8, 256, 1e-3, 0.1, 1.0


def module_step() -> Callable[[dict[str, Tensor]], float]:
    """The hand-written step, from functitan's initial weights."""
    state = ft.TrainState.create(ft.models.llama.params(CONFIG), ft.optim.sgd(0.0), ft.random.key(0))
    model = loaded(CONFIG, SEQ, state.params)
    del state
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)

    def step(batch: dict[str, Tensor]) -> float:
        logits = model(batch["tokens"])
        loss = functional.cross_entropy(logits.view(-1, logits.shape[-1]), batch["labels"].view(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def functitan_step() -> Callable[[dict[str, Tensor]], float]:
    """functitan's step without a mesh."""
    optim = ft.optim
    tx = optim.chain(optim.clip_by_global_norm(CLIP), optim.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY))
    state = ft.TrainState.create(ft.models.llama.params(CONFIG), tx, ft.random.key(0))
    train = ft.train_step(lambda params, batch, key: ft.models.llama.loss(params, batch, CONFIG), tx)
    held = [state]
    del state

    def step(batch: dict[str, Tensor]) -> float:
        held[0], metrics = train(held[0], batch)
        return metrics["loss"].item()

    return step


def child_memory(which: str) -> int:
    """Bytes by which the peak resident set of a fresh process grows over a few steps."""
    data = batches(CONFIG, 4, BATCH, SEQ)
    torch.randn(512, 512) @ torch.randn(512, 512)  # the libraries' own buffers
    before = peak_kib()
    step = {"functitan": functitan_step, "module": module_step}[which]()
    for batch in data:
        step(batch)
    return (peak_kib() - before) * 1024


def peak_kib() -> int:
    """The peak resident set of this process (getrusage's is inherited from the parent)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=18, help="counted pairs of steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", choices=["functitan", "module"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(child_memory(args.memory_of)))
        return
    ours, theirs = functitan_step(), module_step()
    times: dict[str, list[float]] = {"functitan": [], "module": []}
    worst = 0.0
    for i, batch in enumerate(batches(CONFIG, args.pairs + 2, BATCH, SEQ)):
        losses = []
        for name, step in (("functitan", ours), ("module", theirs)):
            start = time.perf_counter()
            losses.append(step(batch))
            if i >= 2:  # the first steps allocate
                times[name].append(time.perf_counter() - start)
        worst = max(worst, abs(losses[0] - losses[1]) / losses[1])
        print(f"\rstep {i + 1}/{args.pairs + 2}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    ratios = [a / b for a, b in zip(times["functitan"], times["module"], strict=True)]
    command = [sys.executable, __file__, "--threads", str(args.threads), "--memory-of"]
    memory = {
        name: json.loads(subprocess.run([*command, name], check=True, capture_output=True).stdout) for name in times
    }
    print(f"Llama {CONFIG}")
    print(f"batch {BATCH}, seq {SEQ}, float32, AdamW, clip {CLIP}; torch {torch.__version__}, {args.threads} threads")
    print(
        f"losses agree to {worst:.1e} over {args.pairs + 2} steps" + ("" if worst < 1e-4 else "   INVALID: above 1e-4")
    )
    print(f"{'':12}{'ms per step':>14}{'peak MiB':>12}")
    for name in times:
        print(f"{name:12}{statistics.median(times[name]) * 1e3:14.1f}{memory[name] / 2**20:12.0f}")
    ratio, of_memory = statistics.median(ratios), memory["functitan"] / memory["module"]
    print(f"{'ratio':12}{ratio:14.3f}{of_memory:12.3f}   (at most 1.10 and 1.15)")


if __name__ == "__main__":
    main()
