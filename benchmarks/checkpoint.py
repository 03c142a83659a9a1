"""What a save costs the training: written while it stands still, and in the background; and the memory that it takes.

    python benchmarks/checkpoint.py                    # one process
    python benchmarks/checkpoint.py --mesh fsdp=2      # two processes over gloo

Rounds of as many steps, in turn without a save, with one that blocks, and with one in the background, which ends in its
round. A save's cost is how much longer its round took than one without, each the least of all rounds, of which other
load on the machine leaves some alone. Bounds: a save in the background costs at most 15% of one that blocks, and holds
at most one copy of the state. Each process computes on one thread, so that the machine has a core for the writer.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import functitan as ft
from functitan.checkpoint import Manager
from functitan.models import llama

CONFIG = llama.LlamaConfig(4096, 768, 2, 12, 6, 64, 2304)


def hold(what: str) -> int:
    """Bytes of memory of this process: "VmRSS" now, "VmHWM" its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def run(sizes: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    mesh = ft.make_mesh(**sizes) if sizes else None
    config, rules = CONFIG, llama.RULES
    tx = ft.optim.adamw(1e-3)
    state = ft.TrainState.create(llama.params(config), tx, ft.random.key(0), mesh=mesh, rules=rules)
    rows = torch.randint(0, config.vocab_size, (args.batch * max(1, math.prod(sizes.values())), args.seq + 1))
    batch = {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}
    batch = ft.shard(batch, ft.data.BATCH, mesh=mesh, rules=rules)
    step = ft.train_step(lambda params, batch, key: llama.loss(params, batch, config), tx, check=False)
    state, _ = step(state, batch)
    times: dict[str, list[float]] = {"none": [], "blocking": [], "background": []}
    stood, extra = [], []
    with tempfile.TemporaryDirectory(dir=args.directory) as own:
        folder = own if mesh is None else args.directory
        managers = {kind: Manager(f"{folder}/{kind}", keep_last=1, background=kind == "background") for kind in times}
        for number in range(args.rounds + 1):
            for kind, manager in managers.items():
                Path("/proc/self/clear_refs").write_text("5")
                before, start = hold("VmRSS"), time.perf_counter()
                if kind != "none":
                    manager.save(number + 1, state)
                begun = time.perf_counter() - start
                for _ in range(args.steps):
                    state, _ = step(state, batch)
                waiting = time.perf_counter()
                manager.wait()
                late = time.perf_counter() - waiting
                if number == 0:
                    extra += [(kind, hold("VmHWM") - before)]
                    continue  # also: buffers are made, files are first created
                times[kind].append(time.perf_counter() - start)
                if kind == "background":
                    stood.append((begun, late))
    bytes_of = lambda tree: sum(x.nbytes for x in ft.tree.leaves(tree))
    return {"times": times, "stood": stood, "extra": dict(extra), "state": bytes_of(state)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="", help="mesh dims and sizes, as in fsdp=2: so many processes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6, help="of a round: a save in the background must end in it")
    parser.add_argument("--batch", type=int, default=1, help="rows of one rank")
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="of the disk to write to")
    args = parser.parse_args()
    sizes = {dim: int(n) for dim, n in (part.split("=") for part in args.mesh.split(",") if part)}
    with tempfile.TemporaryDirectory(dir=args.directory) as args.directory:
        if sizes:
            result = ft.launch(run, sizes, args, nprocs=torch.Size(sizes.values()).numel())[0]
        else:
            result = run(sizes, args)
    least, middle = ({kind: f(times) for kind, times in result["times"].items()} for f in (min, median))
    cost, hidden = (least[kind] - least["none"] for kind in ("blocking", "background"))
    state = result["state"]
    print(f"state of a rank {state / 2**20:.0f} MiB; a round of {args.steps} steps {least['none']:.3f} s")
    print(f"blocking    +{cost:.3f} s a save; by medians +{middle['blocking'] - middle['none']:.3f} s")
    print(f"background  +{hidden:.3f} s a save; by medians +{middle['background'] - middle['none']:.3f} s")
    begun, late = (median(each) for each in zip(*result["stood"], strict=True))
    print(f"            of it {begun:.3f} s to copy, {late:.3f} s to wait at the end of the round")
    print(f"background / blocking {hidden / cost:.1%} (bound 15%)")
    base = result["extra"]["none"]
    for kind in ("blocking", "background"):
        extra = (result["extra"][kind] - base) / state
        print(f"peak memory, {kind}: {extra:+.2f} states beyond a round without a save")


if __name__ == "__main__":
    main()
