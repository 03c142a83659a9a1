"""Train a small Llama on text: in one process, on a virtual mesh, or under torchrun, with the same losses.

    python examples/train_llm.py                                              # one process
    python examples/train_llm.py --mesh fsdp=2,tp=2 --simulate                # four ranks as threads of one process
    torchrun --nproc-per-node=2 examples/train_llm.py --mesh fsdp=2           # two processes
    python examples/train_llm.py --data allenai/c4:en --encoding gpt2         # any Hugging Face dataset, any encoding
    python examples/train_llm.py --checkpoints runs/checkpoints               # again: goes on, on any of these meshes

Writes metrics.jsonl and loss.png into --out, and prints a sample of what the model has learned to write. With
--profile also trace.json, of the third step, for https://ui.perfetto.dev, and prints where its time went.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import functitan as ft
from functitan.models import llama


def main() -> None:
    args = parse()
    sizes = {dim: int(n) for dim, n in (part.split("=") for part in args.mesh.split(",") if part)}
    with ft.checkpoint.termination() as stop:  # SIGTERM: save, and leave
        if args.simulate:
            ft.simulate(**sizes)(train)(args, stop)
        else:
            train(ft.make_mesh(**sizes) if sizes else None, args, stop)


def train(mesh, args, stop) -> list[float]:
    """The whole run on one rank; the loss of every step."""
    stream = ft.data.token_stream(documents(args.data), ft.data.encoding(args.encoding), args.seq, args.batch)
    config = llama.CONFIGS[args.config]._replace(vocab_size=stream.encoding.n_vocab)
    declared, rules = llama.params(config), llama.RULES
    optim = ft.optim
    rate = optim.warmup_cosine(args.lr, args.steps // 10 + 1, args.steps, end=args.lr / 10)
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate, weight_decay=0.1, mask=optim.decay_matrices))
    key = ft.random.key(args.seed).to(args.device)  # everything lives where the key lives
    state = ft.TrainState.create(declared, tx, key, mesh=mesh, rules=rules)
    state = {"train": state, "cursor": ft.data.Cursor()}  # all that a run is made of
    step = ft.train_step(lambda params, batch, key: llama.loss(params, batch, config), tx)

    saves = manager(args, stop)
    if saves is not None:
        state = saves.restore(state) or state
    done = int(state["train"].step)
    report, losses = reporter(args, config, declared, mesh, done), []
    for n in range(done, args.steps):
        batch, cursor = stream.next_batch(state["cursor"])
        batch = ft.tree.map(lambda x: x.to(args.device), batch)
        seen = args.profile and n == done + 2 and is_first(mesh)  # the first steps are slower
        with ft.profile(Path(args.out) / "trace.json") if seen else nullcontext() as profile:
            new, metrics = step(state["train"], ft.shard(batch, ft.data.BATCH, mesh=mesh, rules=rules))
            losses.append(metrics["loss"].item())
        state = {"train": new, "cursor": cursor}
        if profile is not None:
            print(f"step {n + 1}, in {profile.path}:\n{profile.breakdown}")
        waited = {} if saves is None else saves.step(n + 1, state)
        report(losses, cursor, waited)
        if saves is not None and saves.stopping:
            break
    if saves is not None:
        saves.wait()
    report(losses, state["cursor"], text=sample(state["train"].params, config, stream.encoding, args, mesh))
    return losses


def manager(args, stop) -> ft.checkpoint.Manager | None:
    """The checkpoints of this run, if it is to have any."""
    if not args.checkpoints:
        return None
    return ft.checkpoint.Manager(args.checkpoints, every_steps=args.save_every, keep_last=2, stop=stop)


def sample(params, config, encoding, args, mesh) -> str:
    """`args.sample` tokens that follow a prompt. The rules keep batch and seq whole: one example is not divisible."""
    rules = llama.RULES.replace(batch=None, seq=None)
    forward = ft.spmd(partial(llama.apply, config=config), mesh=mesh, rules=rules)
    tokens = encoding.encode("def ")
    for i in range(args.sample):
        logits = forward(params, torch.tensor([tokens[-args.seq :]], device=args.device))[:, -1]
        whole = ft.unshard(logits, "batch vocab", mesh=mesh, rules=rules)[0].cpu() / 0.8
        noise = ft.random.uniform(ft.random.fold_in(ft.random.key(args.seed), i), (len(whole),))
        tokens.append(int((whole - (-noise.clamp(min=1e-20).log()).log()).argmax()))  # Gumbel's way to sample
    return encoding.decode(tokens)


def reporter(args, config, declared, mesh, done):
    """A function that shows and stores the progress after step `done`: on the first rank only."""
    if not is_first(mesh):
        return lambda losses, cursor, waited=None, text=None: None
    ranks = 1 if mesh is None or args.simulate else mesh.size()
    flops = ft.metrics.flops_per_token(declared, config.num_layers, config.num_heads, config.head_dim, args.seq)
    peak = ft.metrics.measure_peak_flops(device=args.device) * ranks
    out, console, started = Path(args.out), Console(), [time.perf_counter()]
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "metrics.jsonl").open("a" if done else "w")
    millions, where = ft.metrics.num_params(declared) / 1e6, f"mesh {args.mesh or 'none'}{' (virtual)' * args.simulate}"
    print(
        f"Llama {args.config}, {millions:.1f} M parameters, {where}, {args.batch} x {args.seq} tokens a step, to {out}/"
    )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task("loss", total=args.steps, completed=done)
    bar.start()

    def report(losses, cursor, waited=None, text=None) -> None:
        if text is not None:
            bar.stop()
            log.close()
            if not losses:
                print(f"step {done} of {args.steps} is done already. A sample:\n{text}")
                return
            plot(losses, out / "loss.png", done)
            print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; curve in {out}/loss.png. A sample:\n{text}")
            return
        now = time.perf_counter()
        speed = args.batch * args.seq / (now - started[0])
        row = {"step": done + len(losses), "loss": losses[-1], "tokens_per_second": round(speed)}
        row |= {"cursor": tuple(cursor), "mfu": round(speed * flops / peak, 4)}
        row |= {"memory_mib": ft.metrics.memory_bytes() >> 20} | (waited or {})
        started[0] = now
        log.write(json.dumps(row) + "\n")
        log.flush()
        line = f"loss {losses[-1]:.3f}  {speed:.0f} tokens/s  MFU {row['mfu']:.0%}  {row['memory_mib']} MiB"
        bar.update(task, advance=1, description=line)
        if not console.is_terminal and (len(losses) == 1 or len(losses) % 10 == 0):
            print(f"step {done + len(losses)}/{args.steps}  {line}", flush=True)

    return report


def is_first(mesh) -> bool:
    return mesh is None or ft.as_mesh(mesh).rank == 0


def plot(losses: list[float], path: Path, done: int) -> None:
    """The loss of every step, and its running mean."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    smooth = [sum(losses[max(0, i - 9) : i + 1]) / len(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
    axes.plot(range(done + 1, done + len(losses) + 1), losses, color="tab:blue", alpha=0.3, label="loss of each step")
    axes.plot(range(done + 1, done + len(losses) + 1), smooth, color="tab:blue", label="mean of the last 10")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def documents(name: str):
    """Python's standard library, or a Hugging Face dataset as path or path:name."""
    if name == "stdlib":
        return ft.data.stdlib_documents()
    path, _, part = name.partition(":")
    return ft.data.huggingface_documents(path, part or None)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="debug", choices=llama.CONFIGS, help="size of the Llama")
    parser.add_argument("--mesh", default="", help="mesh dims and sizes, as in fsdp=2,tp=2")
    parser.add_argument("--simulate", action="store_true", help="run the mesh as threads of this process")
    parser.add_argument("--data", default="stdlib", help="stdlib, or a Hugging Face dataset as path or path:name")
    parser.add_argument("--encoding", default="bytes", help="bytes, a tiktoken encoding, or a file of ranks")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="rows of one step, over all ranks")
    parser.add_argument("--seq", type=int, default=256, help="tokens of one row")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=200, help="tokens of the sample at the end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="write a chrome trace of the third step")
    parser.add_argument("--checkpoints", default="", help="folder or fsspec URL to save the run to, and to go on from")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--out", default="runs/llama", help="folder for metrics.jsonl and loss.png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
