"""Compile time of 2 and of 32 equal Llama blocks, each compiled as one region.

    python benchmarks/compile_time.py

Seconds of the first call less those of the second, of `ft.value_and_grad` in eager and of the same inside `ft.jit`,
each in a process of its own with an empty Inductor cache. Bound: 32 layers take at most twice as long as 2.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

import torch

import functitan as ft

CONFIG = ft.models.llama.LlamaConfig(2048, 256, 2, 8, 4, 32, 768)
BATCH, SEQ, LAYERS = 1, 256, (2, 32)


def seconds(layers: int, jitted: bool) -> float:
    """How much longer the first call takes than the second."""
    config, llama = CONFIG._replace(num_layers=layers), ft.models.llama
    params = ft.init(llama.params(config), ft.random.key(0))
    tokens = torch.randint(0, config.vocab_size, (BATCH, SEQ + 1))
    batch = {"tokens": tokens[:, :-1].clone(), "labels": tokens[:, 1:].clone()}
    block = ft.compile(llama.block)

    def loss(params, batch):
        total, count = llama.loss(params, batch, config, block=block)
        return total / count

    step = ft.value_and_grad(loss)
    step = ft.jit(step) if jitted else step
    times = []
    for _ in range(2):
        start = time.perf_counter()
        step(params, batch)
        times.append(time.perf_counter() - start)
    assert len(block.regions) == 1
    return times[0] - times[1]


def in_a_fresh_process(layers: int, jitted: bool) -> float:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, str(layers), str(int(jitted))]
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        return float(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    if len(sys.argv) == 3:
        torch.set_num_threads(1)
        print(seconds(int(sys.argv[1]), sys.argv[2] == "1"))
        return
    print(f"torch {torch.__version__}, seconds\n{'':24}" + "".join(f"{n:>8} layers" for n in LAYERS) + f"{'ratio':>10}")
    for name, jitted in (("eager value_and_grad", False), ("ft.jit", True)):
        few, many = (in_a_fresh_process(n, jitted) for n in LAYERS)
        print(f"{name:24}{few:15.1f}{many:15.1f}{many / few:10.2f}", flush=True)


if __name__ == "__main__":
    main()
