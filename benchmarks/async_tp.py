"""Async TP beside plain TP: the two pairs of an MLP on two processes, over gloo and over a simulated link.

    python benchmarks/async_tp.py                  # about a minute on two cores
    python benchmarks/async_tp.py --pieces 8       # messages cut into more

Over gloo on one machine, messages and matmuls compete for the same cores, so little can be hidden. On the simulated
link (`functitan.testing.link`) a message takes as long as its matmul, and the cores are free meanwhile: at best a pair
of n ranks takes (1 + 1 / (n pieces)) / 2 of the plain time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import functitan as ft
from functitan.testing.link import slow_link

SEQ, EMBED, MLP, RANKS = 2048, 512, 4096, 2
RULES = ft.AxisRules({"mlp": "tp", "seq": "tp", "embed": None})
PAIRS = {  # the pattern, and the shapes of one rank's shards
    "gather, matmul": ("seq embed, embed mlp -> seq mlp", (SEQ // RANKS, EMBED), (EMBED, MLP // RANKS)),
    "matmul, scatter": ("seq mlp, mlp embed -> seq embed", (SEQ, MLP // RANKS), (MLP // RANKS, EMBED)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pieces", type=int, default=4, help="into which each rank's part is cut (4)")
    pieces = parser.parse_args().pieces
    print(f"{'pair':<16} {'link':<10} {'plain ms':>9} {'async ms':>9} {'ratio':>6}")
    for name, link, plain, ring in ft.launch(measure, pieces, nprocs=RANKS, timeout=110)[0]:
        print(f"{name:<16} {link:<10} {plain * 1e3:9.1f} {ring * 1e3:9.1f} {ring / plain:6.2f}")
    print(f"at best {(1 + 1 / (RANKS * pieces)) / 2:.2f} where one transfer takes as long as its matmul")


def measure(pieces: int) -> list[tuple[str, str, float, float]]:
    """(pair, link, seconds of the plain pair, seconds of the ring)."""
    torch.set_num_threads(1)
    mesh = ft.as_mesh(ft.make_mesh(tp=RANKS, timeout=60))
    assert mesh is not None
    rows = []
    for name, (pattern, *shapes) in PAIRS.items():
        shards = [torch.randn(shape) for shape in shapes]
        whole = torch.randn(SEQ, shapes[0][1])
        bandwidth = SEQ * EMBED * 4 * (RANKS - 1) / RANKS / fastest(lambda x=whole, w=shards[1]: x @ w)
        pair = lambda *xs, pattern=pattern: ft.einsum(pattern, *xs)
        ring = ft.async_tp(pair, pieces=pieces)
        with slow_link(mesh, bandwidth) as slow:
            for link, on in (("gloo", mesh), ("simulated", slow)):
                run = lambda fn, on=on, xs=shards: ft.spmd(fn, mesh=on, rules=RULES)(*xs)
                rows.append((name, link, fastest(lambda: run(pair)), fastest(lambda: run(ring))))  # noqa: B023
    return rows


def fastest(fn: Callable[[], Any], times: int = 7) -> float:
    """Seconds of the best call."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        fn()
        found.append(time.perf_counter() - begin)
    return min(found)


if __name__ == "__main__":
    main()
