"""Float8 beside bfloat16: losses of the debug Llama on real text, and on CUDA the time of blocks of the 8B's shape.

    python benchmarks/float8.py [RECIPE ...]
    python benchmarks/float8.py --blocks          # on CUDA (sm89 or later)

Every run has the same initial weights and batches of Python's own sources, and computes in bfloat16 what is not float8.
The loss is the mean of the last 20 steps; one that is more than 2% from bfloat16's ends the script with an error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from curves import text

import functitan as ft
from functitan.models import llama

SCALES = (0.05, 0.002, 1e-6)  # of recipe "static": for activations to 22, weights to 0.9, cotangents to 0.06
RECIPES = {
    "bfloat16": None,
    "tensorwise": {},
    "rowwise": {},
    "rowwise_with_gw_hp": {},
    "delayed": {},
    "static": {"scales": SCALES},
    "mxfp8": {},
}
BOUND, LAST = 0.02, 20


def losses(name: str, config: llama.LlamaConfig, batches: list[dict[str, torch.Tensor]], emulate: bool) -> list[float]:
    """The loss of every step; the output layer stays in bfloat16, as is usual."""
    rate = ft.optim.warmup_cosine(1e-3, len(batches) // 10 + 1, len(batches), end=1e-4)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(rate, weight_decay=0.1))
    loss = ft.precision(lambda params, batch, key: llama.loss(params, batch, config))
    step = ft.train_step(loss, tx)
    state, memory, found = ft.TrainState.create(llama.params(config), tx, ft.random.key(0)), None, []
    if RECIPES[name] is not None:
        step = ft.float8(step, recipe=name, filter=["vocab"], emulate=emulate, **RECIPES[name])
    for batch in batches:
        if name == "delayed":
            (state, metrics), memory = step(state, batch, memory)
        else:
            state, metrics = step(state, batch)
        found.append(metrics["loss"].item())
    return found


def compare(names: list[str], steps: int, batch: int, seq: int, emulate: bool) -> None:
    config = llama.DEBUG._replace(vocab_size=257)
    batches = text(steps, seq, batch)
    print(f"Llama {config}\nbatch {batch}, seq {seq}, {steps} steps; torch {torch.__version__}")
    print(f"{'':20}{'first':>8}{'last':>8}{'difference':>12}{'seconds':>9}", flush=True)
    expected, bad = 0.0, []
    for name in dict.fromkeys(["bfloat16", *names]):
        start = time.perf_counter()
        found = losses(name, config, batches, emulate)
        last = sum(found[-LAST:]) / len(found[-LAST:])
        expected = expected or last
        took = time.perf_counter() - start
        print(f"{name:20}{found[0]:8.3f}{last:8.4f}{last / expected - 1:12.2%}{took:9.0f}", flush=True)
        if not abs(last / expected - 1) <= BOUND:
            bad.append(name)
    if bad:
        raise SystemExit(f"more than {BOUND:.0%} from bfloat16: {', '.join(bad)}")


def blocks(layers: int, batch: int, seq: int, repeats: int = 10) -> None:
    """Seconds of forward and backward of blocks of the 8B's shape, captured and compiled."""
    config = llama.LLAMA_8B._replace(num_layers=layers)
    key = ft.random.key(0).to("cuda")
    params = ft.init([llama.block_params(config) for _ in range(layers)], key)
    x = torch.randn(batch, seq, config.embed, device="cuda", dtype=torch.bfloat16)

    def loss(params, x):
        for layer in params:
            x = llama.block(layer, x, config)
        return ft.reduce("batch seq embed ->", x.float() ** 2)

    def measured(wrap: Callable) -> float:
        step = ft.jit(ft.grad(wrap(ft.precision(loss))))
        for _ in range(3):
            step(params, x)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            step(params, x)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    print(f"{layers} blocks of Llama 8B, batch {batch}, seq {seq}, {torch.cuda.get_device_name()}")
    plain = measured(lambda fn: fn)
    print(f"{'bfloat16':20}{plain * 1e3:9.1f} ms", flush=True)
    for name in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
        found = measured(partial(ft.float8, recipe=name))
        print(f"{name:20}{found * 1e3:9.1f} ms{plain / found:7.2f} times as fast", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(RECIPES)}: default all")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--kernels", action="store_true", help="torch._scaled_mm instead of the emulation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", action="store_true", help="the time of blocks on CUDA instead")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.blocks:
        blocks(args.layers, batch=2, seq=4096)
    else:
        compare(args.recipes or list(RECIPES), args.steps, args.batch, args.seq, not args.kernels)


if __name__ == "__main__":
    main()
