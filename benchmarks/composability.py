"""Loss curves on the meshes of torchtitan's composability test: the largest relative difference from one process.

    python benchmarks/composability.py [--steps 10]

Trains a tiny Llama on Python's own sources, on virtual meshes: fsdp 8, and of 64 ranks fsdp 8 · cp 2 · tp 4 and
fsdp 8 · cp 8, each with contiguous and with zigzag data, by every method that its heads allow. The criterion is
torchtitan's for TorchComms: the loss curve of one process. Beyond 1e-4, or without learning, it ends with an error.
"""

from __future__ import annotations

import argparse
import time

import torch
from curves import adamw, text, written

import functitan as ft
from functitan import optim
from functitan.models import llama

CONFIG = llama.LlamaConfig(257, 64, 2, 8, 8, 8, 128, rope_theta=10000.0)
RUNS = [
    (dict(fsdp=8), None, "contiguous"),
    *((dict(fsdp=8, cp=2, tp=4), method, "zigzag") for method in ("ring", "all_gather", "all_to_all")),
    (dict(fsdp=8, cp=2, tp=4), None, "contiguous"),
    *((dict(fsdp=8, cp=8), method, "zigzag") for method in ("ring", "all_gather", "all_to_all")),
    (dict(fsdp=8, cp=8), None, "contiguous"),
]
BOUND = 1e-4  # float32 sums in other orders, through the steps of AdamW


def losses(mesh, method: str | None, order: str, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """The loss of every step, clipped as usual."""
    tx = optim.chain(optim.clip_by_global_norm(1.0), adamw())
    state = ft.TrainState.create(llama.params(CONFIG), tx, ft.random.key(0), mesh=mesh, rules=llama.RULES)
    loss = ft.context_parallel(
        lambda params, batch, key: llama.loss(params, batch, CONFIG, chunk=64, block=ft.remat(llama.block)),
        method=method, order=order,
    )  # fmt: skip
    step, found = ft.train_step(loss, tx), []
    for batch in batches:
        batch = ft.zigzag(batch, ft.data.BATCH, mesh=mesh) if order == "zigzag" else batch
        state, metrics = step(state, ft.shard(batch, ft.data.BATCH, mesh=mesh, rules=llama.RULES))
        found.append(metrics["loss"].item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", type=int, nargs="*", default=range(len(RUNS)), help="numbers of rows, from 0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    batches = text(args.steps, seq=64, batch=8)
    plain = torch.tensor(losses(None, None, "contiguous", batches), dtype=torch.float64)
    print(f"Llama {CONFIG}\nbatch 8, seq 64, float32, {args.steps} steps: loss {plain[0]:.3f} -> {plain[-1]:.3f}")
    bad = [] if plain[-1] < plain[0] - 0.2 else ["one process does not learn"]
    for sizes, method, order in (RUNS[i] for i in args.runs):
        begun = time.perf_counter()
        ranks = torch.tensor(ft.simulate(**sizes)(losses)(method, order, batches), dtype=torch.float64)
        worst, seconds = ((ranks - plain) / plain).abs().max().item(), time.perf_counter() - begun
        print(f"{written(sizes):18} {method or 'chosen':11} {order:11} {worst:.1e}  {seconds:.0f} s", flush=True)
        bad += [f"{written(sizes)}, {method}, {order}: {worst:.1e}"] * (worst > BOUND)
    if bad:
        raise SystemExit("these do not hold:\n" + "\n".join(bad))


if __name__ == "__main__":
    main()
