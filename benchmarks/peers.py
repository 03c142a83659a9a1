"""functitan's captured step beside its peers: nn.Module, `fully_shard`, `parallelize_module` and JAX, and bfloat16.

    python benchmarks/peers.py                # all groups
    python benchmarks/peers.py one fsdp tp    # some of: one, fsdp, kept, tp, bfloat16
    python benchmarks/peers.py --clip 0.1     # a clip that acts in every step
    python benchmarks/peers.py --eager        # without the compiled programs: what benchmarks/step.py does

The programs of a group have the same weights, batches, clip and AdamW, and run step by step in turn in the same
processes. JAX takes part where it is installed. On CUDA `--model 1B` and `8B` are the shapes of Llama 3.
"""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec

import torch
from contest import Group, Sizes, compete, table
from train_steps import fsdp, functitan, jax, module, tensor_parallel

from functitan.models.llama import CONFIGS, LlamaConfig

HALF = torch.bfloat16
GROUPS = {
    "one": Group(
        "one process", None, (functitan(), functitan(jit=True), module(), module(compiled=True), jax(1)), 1.00
    ),
    "fsdp": Group(
        "fsdp 2, ZeRO-3", "fsdp", (functitan(), functitan(jit=True), fsdp(True), fsdp(True, compiled=True), jax(2)), 0.9
    ),
    "kept": Group(
        "fsdp 2, gathered weights kept",
        "fsdp",
        (functitan(jit=True, kept=True), fsdp(False), fsdp(False, compiled=True)),
        0.86,
    ),
    "tp": Group(
        "tp 2, sequence and loss parallel",
        "tp",
        (
            functitan(),
            functitan(jit=True),
            functitan(jit=True, kept=True),
            tensor_parallel(),
            tensor_parallel(compiled=True),
        ),
        0.78,
    ),
    # rounding to 8 bits in other places: losses near 7.6 differ in the fourth digit
    "bfloat16": Group(
        "one process, bfloat16 compute",
        None,
        (functitan(jit=True, compute=HALF), module(autocast=HALF), module(compiled=True, autocast=HALF)),
        0.85,
        1e-2,
    ),
}
SMALL, TINY = LlamaConfig(2048, 256, 6, 8, 4, 32, 768), LlamaConfig(128, 32, 2, 4, 2, 8, 48)
MODELS = {"small": SMALL, "tiny": TINY, **CONFIGS}


def main(eager: bool = False) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", default=list(GROUPS), help=f"some of {', '.join(GROUPS)}")
    parser.add_argument("--eager", action="store_true", default=eager, help="no compiled programs")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peaks, which takes fresh processes")
    parser.add_argument("--model", choices=MODELS, default="small")
    for name, value in {"steps": 36, "batch": 8, "seq": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--clip", type=float, default=1.0, help="of the global norm; near 0.5 in the first steps")
    args = parser.parse_args()
    if unknown := [name for name in args.groups if name not in GROUPS]:
        parser.error(f"no group is called {unknown[0]}")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    config = MODELS[args.model]
    sizes = Sizes(config, args.batch, args.seq, args.steps, args.clip)
    for name in args.groups:
        group = GROUPS[name]
        here = [p for p in group.programs if not (p.compiled and args.eager)]
        here = [p for p in here if find_spec("jax") or not p.name.startswith("JAX")]
        if any(p.ours for p in here) and not all(p.ours for p in here):
            group = group._replace(programs=tuple(here))
            print(table(group, compete(group, sizes, not args.no_memory), sizes), flush=True)
    print(f"{config}\nbatch {args.batch}, seq {args.seq}, AdamW, clip {args.clip}; {_versions()}")


def _versions() -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, gloo"
    jax_version = f", jax {__import__('jax').__version__}" if find_spec("jax") else ""
    return f"torch {torch.__version__}{jax_version}, {where}"


if __name__ == "__main__":
    main()
