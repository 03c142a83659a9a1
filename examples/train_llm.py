"""Train a small Llama on text: in one process, on a virtual mesh, or under torchrun, with the same losses.

    python examples/train_llm.py                                              # one process
    python examples/train_llm.py --mesh fsdp=2,tp=2 --simulate                # four ranks as threads of one process
    torchrun --nproc-per-node=2 examples/train_llm.py --mesh fsdp=2           # two processes
    python examples/train_llm.py --data allenai/c4:en --encoding gpt2         # any Hugging Face dataset, any encoding
    python examples/train_llm.py --checkpoints runs/checkpoints               # again: goes on, on any of these meshes
    python examples/train_llm.py --validate-every 20                          # the loss of text that is held out

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
from functitan.models.generate import generate


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
    stream = ft.data.token_stream(documents(args.data, "train"), ft.data.encoding(args.encoding), args.seq, args.batch)
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
    report, losses, validated = reporter(args, config, declared, mesh, done), [], {}
    validate = validator(args, config, stream.encoding, mesh) if args.validate_every else None
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
        notes = {} if saves is None else saves.step(n + 1, state)
        if validate is not None and (n + 1) % args.validate_every == 0:
            notes |= validate(new.params)
            validated[n + 1] = notes["validation_loss"]
        report(losses, cursor, notes)
        if saves is not None and saves.stopping:
            break
    if saves is not None:
        saves.wait()
    text = sample(state["train"].params, config, stream.encoding, args, mesh)
    report(losses, state["cursor"], validated, text)
    return losses


def manager(args, stop) -> ft.checkpoint.Manager | None:
    """The checkpoints of this run, if it is to have any."""
    if not args.checkpoints:
        return None
    return ft.checkpoint.Manager(args.checkpoints, every_steps=args.save_every, keep_last=2, stop=stop)


def validator(args, config, encoding, mesh):
    """A function from parameters to the loss over the first batches of the validation split, each time the same."""
    stream = ft.data.token_stream(documents(args.data, args.validation_split), encoding, args.seq, args.batch)
    loss = ft.spmd(partial(llama.loss, config=config), mesh=mesh, rules=llama.RULES)

    def validate(params) -> dict[str, float]:
        start, cursor, parts = time.perf_counter(), ft.data.Cursor(), []
        while len(parts) < args.validation_batches and cursor.epoch == 0:
            batch, cursor = stream.next_batch(cursor)
            batch = ft.tree.map(lambda x: x.to(args.device), batch)
            parts.append(torch.stack(loss(params, ft.shard(batch, ft.data.BATCH, mesh=mesh, rules=llama.RULES))))
        total, count = torch.stack(parts).sum(0).tolist()
        return {"validation_loss": total / count, "validation_seconds": time.perf_counter() - start}

    return validate


def sample(params, config, encoding, args, mesh) -> str:
    """`args.sample` tokens that follow a prompt. The rules keep batch and seq whole: one example is not divisible."""
    if not args.sample:
        return ""
    rules = llama.RULES.replace(batch=None, seq=None)
    key = ft.random.key(args.seed).to(args.device)
    write = partial(generate, config=config, key=key, max_new_tokens=args.sample, temperature=0.8)
    prompt = torch.tensor([encoding.encode("def ")], device=args.device)
    return encoding.decode(ft.spmd(write, mesh=mesh, rules=rules)(params, prompt)[0].tolist())


def reporter(args, config, declared, mesh, done):
    """A function that shows and stores the progress after step `done`: on the first rank only."""
    if not is_first(mesh):
        return lambda losses, cursor, notes, text=None: None
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

    def report(losses, cursor, notes, text=None) -> None:
        if text is not None:
            bar.stop()
            log.close()
            if not losses:
                print(f"step {done} of {args.steps} is done already. A sample:\n{text}")
                return
            plot(losses, notes, out / "loss.png", done)
            print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; curve in {out}/loss.png. A sample:\n{text}")
            return
        now = time.perf_counter()
        speed = args.batch * args.seq / (now - started[0] - notes.get("validation_seconds", 0.0))
        row = {"step": done + len(losses), "loss": losses[-1], "tokens_per_second": round(speed)}
        row |= {"cursor": tuple(cursor), "mfu": round(speed * flops / peak, 4)}
        row |= {"memory_mib": ft.metrics.memory_bytes() >> 20} | notes
        started[0] = now
        log.write(json.dumps(row) + "\n")
        log.flush()
        line = f"loss {losses[-1]:.3f}  {speed:.0f} tokens/s  MFU {row['mfu']:.0%}  {row['memory_mib']} MiB"
        line += f"  validation {notes['validation_loss']:.3f}" if "validation_loss" in notes else ""
        bar.update(task, advance=1, description=line)
        if not console.is_terminal and (len(losses) == 1 or len(losses) % 10 == 0 or "validation_loss" in notes):
            print(f"step {done + len(losses)}/{args.steps}  {line}", flush=True)

    return report


def is_first(mesh) -> bool:
    return mesh is None or ft.as_mesh(mesh).rank == 0


def plot(losses: list[float], validated: dict[int, float], path: Path, done: int) -> None:
    """The loss of every step, its running mean, and the validation loss."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    smooth = [sum(losses[max(0, i - 9) : i + 1]) / len(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
    axes.plot(range(done + 1, done + len(losses) + 1), losses, color="tab:blue", alpha=0.3, label="loss of each step")
    axes.plot(range(done + 1, done + len(losses) + 1), smooth, color="tab:blue", label="mean of the last 10")
    if validated:
        axes.plot(list(validated), list(validated.values()), "o-", color="tab:orange", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def documents(name: str, split: str):
    """A split of Python's standard library, of which 5% are held out, or of a Hugging Face dataset: path or path:name.

    The split "train" is always the same, so that checkpoints go on whether a run validates or not.
    """
    if name == "stdlib":
        known = dict(zip(("train", "validation"), ft.data.split(ft.data.stdlib_documents()), strict=True))
        if split not in known:
            raise SystemExit(f"--validation-split {split}: the standard library has the splits {', '.join(known)}")
        return known[split]
    path, _, part = name.partition(":")
    return ft.data.huggingface_documents(path, part or None, split)


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
    parser.add_argument("--validate-every", type=int, default=0, help="steps between validations; 0: none")
    parser.add_argument("--validation-split", default="validation", help="the split of --data to validate on")
    parser.add_argument("--validation-batches", type=int, default=16, help="at most so many batches of that split")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="write a chrome trace of the third step")
    parser.add_argument("--checkpoints", default="", help="folder or fsspec URL to save the run to, and to go on from")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--out", default="runs/llama", help="folder for metrics.jsonl and loss.png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
