"""Loss curves of every optimizer on every mesh, on real text: the largest relative difference from no mesh.

    python benchmarks/curves.py [OPTIMIZER ...]

Trains the debug Llama for 20 steps on Python's own sources, on virtual meshes, each optimizer with the same
initial weights and batches. Bounds: 1e-4, and 1e-3 for Muon, whose bfloat16 iteration turns rounding errors of
gradients into more. So does Lion's sign, in proportion to its learning rate: 8e-5 with 2e-4, 5e-4 with 5e-4. A row
that does not learn, or a bound that does not hold, ends the script with an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch

import functitan as ft
from functitan import optim
from functitan.models import llama

MESHES = [dict(fsdp=2), dict(tp=2), dict(fsdp=2, tp=2), dict(dp=2, fsdp=2)]
CONFIG = llama.DEBUG._replace(vocab_size=257)
STORAGE = llama.RULES.replace(embed=("fsdp", "cp", "dp"))  # ZeRO-1: the state over dp, too
RATE = optim.warmup_stable_decay(1.0, warmup=5, stable=10, decay=5, end=0.1)


def rate(peak: float) -> optim.Schedule:
    return lambda step: peak * RATE(step)


def adamw() -> optim.GradientTransformation:
    return optim.adamw(rate(1e-3), weight_decay=0.1, mask=optim.decay_matrices)


def muon() -> optim.GradientTransformation:
    matrices = optim.muon(rate(2e-2), matrices=ft.nn.attention.MATRICES)
    labels = {"layers.*norm.scale": "adamw", "layers.*": "muon", "*": "adamw"}
    return optim.multi_transform({"muon": matrices, "adamw": adamw()}, labels)


OPTIMIZERS = {
    "adamw": adamw(),
    "sgd": optim.sgd(rate(0.3)),
    "momentum": optim.sgd(rate(0.1), momentum=0.9, nesterov=True),
    "lion": optim.lion(rate(2e-4), weight_decay=0.5, mask=optim.decay_matrices),
    "adafactor": optim.adafactor(rate(2e-2), weight_decay=0.1, mask=optim.decay_matrices),
    "muon": muon(),
    "stored adamw": optim.stored(adamw(), rules=STORAGE),
}
BOUNDS = {name: 1e-3 if name == "muon" else 1e-4 for name in OPTIMIZERS}


def text(steps: int, seq: int, batch: int) -> list[dict[str, torch.Tensor]]:
    """Batches of bytes of Python's own sources."""
    stream = ft.data.token_stream(ft.data.stdlib_documents(), ft.data.encoding("bytes"), seq, batch)
    batches, cursor = [], ft.data.Cursor()
    for _ in range(steps):
        data, cursor = stream.next_batch(cursor)
        batches.append(data)
    return batches


def losses(mesh, name: str, config: llama.LlamaConfig, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """The loss of every step, clipped as usual."""
    tx = optim.chain(optim.clip_by_global_norm(1.0), OPTIMIZERS[name])
    state = ft.TrainState.create(llama.params(config), tx, ft.random.key(0), mesh=mesh, rules=llama.RULES)
    step = ft.train_step(lambda params, batch, key: llama.loss(params, batch, config), tx)
    found = []
    for batch in batches:
        state, metrics = step(state, ft.shard(batch, ft.data.BATCH, mesh=mesh, rules=llama.RULES))
        found.append(metrics["loss"].item())
    return found


def differences(
    name: str, config: llama.LlamaConfig, batches: list[dict[str, torch.Tensor]], meshes: list[dict[str, int]] = MESHES
) -> tuple[list[float], list[float]]:
    """The losses without a mesh, and for each mesh the largest relative difference from them, on any rank."""
    plain = torch.tensor(losses(None, name, config, batches), dtype=torch.float64)
    worst = []
    for sizes in meshes:
        ranks = torch.tensor(ft.simulate(**sizes)(losses)(name, config, batches), dtype=torch.float64)
        worst.append(((ranks - plain) / plain).abs().max().item())
    return plain.tolist(), worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("optimizers", nargs="*", metavar="OPTIMIZER", help=f"of {', '.join(OPTIMIZERS)}: default all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batches = text(args.steps, seq=32, batch=4)
    print(f"Llama {CONFIG}\nbatch 4, seq 32, float32, {args.steps} steps; torch {torch.__version__}")
    print(f"{'':14}{'first':>8}{'last':>8}" + "".join(f"{written(sizes):>14}" for sizes in MESHES))
    bad = []
    for name in args.optimizers or OPTIMIZERS:
        plain, worst = differences(name, CONFIG, batches)
        print(f"{name:14}{plain[0]:8.3f}{plain[-1]:8.3f}" + "".join(f"{x:14.1e}" for x in worst), flush=True)
        if max(worst) > BOUNDS[name] or plain[-1] > plain[0] - 0.5:
            bad.append(f"{name}: at most {BOUNDS[name]:.0e}, and a loss that falls by 0.5")
    if bad:
        raise SystemExit("these do not hold:\n" + "\n".join(bad))


def written(sizes: Mapping[str, int]) -> str:
    return "·".join(f"{dim}{n}" for dim, n in sizes.items())


if __name__ == "__main__":
    main()
