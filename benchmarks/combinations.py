"""Every wrapper and every pass, alone and in all pairs: do losses and gradients stay what they are without?

    python benchmarks/combinations.py                                # all meshes
    python benchmarks/combinations.py --mesh fsdp=2 --mesh gloo:tp=2 # some; --mesh none is one process
    python benchmarks/combinations.py --out benchmarks/COMBINATIONS.md

A tiny Llama takes two steps (clip that acts, SGD) in float64. A cell has the largest relative difference of the losses
and that of the gradients from the plain eager run on the same mesh in the same dtype, `=` where they are equal bit for
bit. ft.precision in float32 is held against plain float32, in bfloat16 against bfloat16 alone. Passes are held against
the captured graph without any. Ends with 1 where a cell is worse than its class allows. In float32 the gradients of
this model lie up to 6e-7 from those in float64, captured or not: embeddings begin at unit size, where a block's
cancellations are small.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule

import functitan as ft
from functitan.capture.compile import compiled
from functitan.capture.passes.table import PASSES, run_passes
from functitan.capture.trace import Program, trace
from functitan.models import llama
from functitan.optim.state import zeros_beside
from functitan.param import normal

CONFIG = llama.LlamaConfig(61, 16, 1, 4, 2, 4, 32, rope_theta=10000.0)
OF_PASSES = CONFIG._replace(num_layers=2)  # which join and keep apart what blocks send
RULES = llama.RULES
STORED = RULES.replace(embed=None, mlp=("fsdp", "tp"))  # of optimizer state: another table than the parameters'
BATCH, SEQ, STEPS = 4, 8, 2
MESHES = ["none", "fsdp=2", "fsdp=2,tp=2", "fsdp=2,cp=2", "gloo:fsdp=2", "gloo:tp=2", "other:tp=2"]
policies = ft.remat_policies


class Setup(NamedTuple):
    """How the step is made."""

    block: Callable[..., Any] = llama.block
    compute: torch.dtype | None = None  # of ft.precision
    accumulate: int | None = None
    nonfinite: str = "ignore"
    stored: bool = False
    check: bool = False
    backend: str | None = None  # of ft.jit
    dtype: torch.dtype = torch.float64  # of the parameters
    float8: bool = False
    async_tp: bool = False
    ring: bool = False  # of attention, where the sequence is sharded

    @property
    def baseline(self) -> Setup:
        """What it is held against."""
        compute = self.compute if self.compute == torch.bfloat16 else None
        return Setup(compute=compute, dtype=self.dtype, float8=self.float8)


def rematerialized(policy: Any) -> Callable[[Setup], Setup]:
    return lambda setup: setup._replace(block=ft.remat(setup.block, policy=policy))


def with_(**fields: Any) -> Callable[[Setup], Setup]:
    return lambda setup: setup._replace(**fields)


WRAPPERS: dict[str, Callable[[Setup], Setup]] = {  # of a pair, the first is the inner one
    # the innermost remat: one around another does not see the names in it, and says so
    "remat names": rematerialized(policies.save_only_these_names("attn_out")),
    "remat": rematerialized(policies.nothing_saveable),
    "remat dots": rematerialized(policies.dots_saveable),
    "remat budget": rematerialized(policies.budget(4096)),
    "precision float32": with_(compute=torch.float32, dtype=torch.float32),
    "precision bfloat16": with_(compute=torch.bfloat16, dtype=torch.float32),
    "float8": with_(float8=True),
    "async_tp": with_(async_tp=True),
    "ring": with_(ring=True),
    "accumulate 1": with_(accumulate=1),
    "accumulate 2": with_(accumulate=2),
    "nonfinite raise": with_(nonfinite="raise"),
    "nonfinite skip": with_(nonfinite="skip"),
    "optim.stored": with_(stored=True),
    "checked": with_(check=True),
    "jit": with_(backend="graph"),
    "jit inductor": with_(backend="inductor"),
    "compile": lambda setup: setup._replace(block=ft.compile(setup.block, backend="graph")),
    "compile inductor": lambda setup: setup._replace(block=ft.compile(setup.block)),
}

# What may differ, and why. All else is equal bit for bit.
SUMS = {
    "float8": "held against float8 alone; products sum in float32, and what rounds to 4 bits elsewhere moves by a bit",
    "async_tp": "sums over ranks, and over a gathered axis, are taken in the order of the ring",
    "ring": "attention over blocks of keys, merged by their logsumexp",
    "accumulate 1": "gradients of a replica are added before they are reduced, and divided after",
    "accumulate 2": "gradients of microbatches are added: another order of summation",
    "optim.stored": "the norm that clips is summed over other shards",
    "jit": "kernels that torch decomposes sum in another order: silu, and the softmax in the loss",
    "compile": "as jit",
    "compile inductor": "as jit inductor",
    "jit inductor": "fused kernels sum in another order; its cos and sin of rope's float32 angles round otherwise",
    "merge_reductions": "a sum over ranks of a sum, instead of a sum of sums over ranks",
}
NEEDS = {"async_tp": "tp", "ring": "cp"}  # the mesh dim that it is for
INDUCTOR = "jit inductor", "compile inductor"
EXACT = 1e-12  # float64
CLOSE = 1e-6  # float32
QUARTER = 2**-2  # cotangents in float8 have 2 bits after the first, and each microbatch has scales of its own
ROUNDED = 2**-5  # bfloat16 has 8 bits: what is rounded at another place differs by some of its last


class Cell(NamedTuple):
    """The largest relative differences; 0.0 only where all is equal bit for bit."""

    loss: float
    gradients: float
    limit: float  # 0.0: bitwise

    @property
    def right(self) -> bool:
        return self.loss <= self.limit and self.gradients <= self.limit  # false for nan

    def __str__(self) -> str:
        show = lambda x: "=" if x == 0 else f"{x:.0e}"
        text = show(self.loss) if self.loss == self.gradients == 0 else f"{show(self.loss)} {show(self.gradients)}"
        return text if self.right else f"{text} WRONG"


Found = tuple[Tensor, ...], tuple[Tensor, ...]  # losses, gradients


def text() -> dict[str, Tensor]:
    tokens = torch.randint(0, CONFIG.vocab_size, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def declared(dtype: torch.dtype, config: llama.LlamaConfig = CONFIG) -> ft.tree.Tree:
    init = lambda p: normal(1.0) if p.pattern == "vocab embed" else p.init  # well-conditioned: see above
    return ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, init(p), dtype), llama.params(config))


def loss_of(setup: Setup) -> Callable[..., Any]:
    loss = lambda params, batch, key: llama.loss(params, batch, CONFIG, block=setup.block)
    loss = ft.float8(loss, emulate=True) if setup.float8 else loss
    loss = ft.async_tp(loss) if setup.async_tp else loss
    loss = ft.context_parallel(loss, method="ring") if setup.ring else loss
    return loss if setup.compute is None else ft.precision(loss, compute=setup.compute)


def recorded() -> ft.optim.GradientTransformation:
    """Keeps the gradients as its state."""

    def update(updates, state, params=None, patterns=None, donate=False):
        return updates, ft.tree.map(torch.clone, updates)

    return ft.optim.GradientTransformation(zeros_beside, update)


def run(setup: Setup, mesh: Any) -> Found:
    """Losses and whole gradients of some steps on this rank."""
    optim, params = ft.optim, declared(setup.dtype)
    tx = optim.chain(recorded(), optim.clip_by_global_norm(0.05), optim.sgd(0.1))
    tx = optim.stored(tx, rules=STORED) if setup.stored else tx
    state = ft.TrainState.create(params, tx, ft.random.key(0), mesh=mesh, rules=RULES)
    batch = ft.shard(text(), "batch seq", mesh=mesh, rules=RULES)
    options: dict[str, Any] = dict(accumulate=setup.accumulate, nonfinite=setup.nonfinite, check=setup.check)
    step = ft.train_step(loss_of(setup), tx, donate=False, **options)
    step = step if setup.backend is None else ft.jit(step, backend=setup.backend)
    losses, gradients = [], []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
        grads = ft.unshard(state.opt_state[0], tx.init(params)[0], mesh=mesh, rules=RULES)
        gradients += ft.tree.leaves(grads)
    return tuple(losses), tuple(gradients)


def difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest norm of a difference, relative to the tensor's own norm; 0.0 only for equal bits."""
    pairs = list(zip(found, expected, strict=True))
    if all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs):
        return 0.0
    gaps = [(x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30) for x, y in pairs]
    return largest([sys.float_info.min, *(gap.item() for gap in gaps)])


def largest(values: Iterable[float]) -> float:
    """The maximum, which is nan where one is."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def setups(names: tuple[str, ...]) -> Setup | None:
    """The wrappers one around the other; `None` where the second undoes the first."""
    setup = Setup()
    for name in names:
        new = WRAPPERS[name](setup)
        fields = zip(Setup._fields, setup, new, Setup(), strict=True)
        if any(old != plain and old != now and field != "block" for field, old, now, plain in fields):
            return None
        setup = new
    return setup


def limit_of(names: tuple[str, ...]) -> float:
    if not any(name in SUMS for name in names):
        return 0.0
    if "float8" in names and len(names) > 1:
        return QUARTER
    if "precision bfloat16" in names:
        return ROUNDED
    return CLOSE if {"precision float32", "jit inductor", "compile inductor"} & {*names} else EXACT


def wrappers(mesh: Any, names: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], Cell]:
    """A cell for each combination of wrappers, on one rank."""
    plain = cache(lambda baseline: run(baseline, mesh))
    shape = {} if mesh is None else ft.as_mesh(mesh).shape
    there = lambda name: name not in NEEDS or NEEDS[name] in shape
    cells = {}
    for combination in names:
        setup = setups(combination)
        if setup is not None and all(map(there, combination)):
            gaps = map(difference, run(setup, mesh), plain(setup.baseline))
            cells[combination] = Cell(*gaps, limit_of(combination))
    return cells


def pass_sets() -> list[tuple[str, ...]]:
    """Each pass alone, each pair alone, all, and all without each and each pair; in the order in which they run."""
    some = [names for n in (1, 2) for names in combinations(PASSES, n)]
    return [*some, tuple(PASSES), *(tuple(name for name in PASSES if name not in off) for off in some)]


def captured(mesh: Any) -> tuple[Program, list[Tensor], list[Tensor]]:
    """The captured loss and gradients of one rank, what to run them on, and what they give eagerly."""
    batch = ft.shard(text(), "batch seq", mesh=mesh, rules=RULES)
    params = ft.init(declared(torch.float64, OF_PASSES), ft.random.key(0), mesh=mesh, rules=RULES)
    leaves, structure = ft.tree.flatten(params)
    mean = lambda params, batch: (lambda total, count: total / count)(*llama.loss(params, batch, OF_PASSES))
    fn = ft.spmd(ft.value_and_grad(mean), mesh=mesh, rules=RULES)

    def flat(tokens: Tensor, labels: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(ft.tree.leaves(fn(ft.tree.unflatten(structure, leaves), {"tokens": tokens, "labels": labels})))

    inputs = [batch["tokens"], batch["labels"], *leaves]
    return trace(flat, tuple(inputs)), inputs, list(flat(*inputs))


def after(program: Program) -> Callable[[tuple[str, ...]], Program]:
    """What passes make of it; those that begin alike run once."""

    @cache
    def made(names: tuple[str, ...]) -> Program:
        before = made(names[:-1]) if names else program
        graph = GraphModule(before.graph, copy.deepcopy(before.graph.graph))
        return run_passes(before._replace(graph=graph), names[-1:])

    return made


def passes(mesh: Any, sets: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], Cell]:
    """A cell for each set of passes, on one rank, against the graph without any; that one against the eager run."""
    program, inputs, eager = captured(mesh)
    made = after(program)

    def results(names: tuple[str, ...]) -> list[Tensor]:
        changed = made(names)
        count = len(list(changed.graph.graph.nodes)[-1].args[0])
        return compiled(changed, (None,) * count, "graph")(list(inputs))

    def cell(found: list[Tensor], expected: list[Tensor], limit: float) -> Cell:
        return Cell(difference(found[:1], expected[:1]), difference(found[1:], expected[1:]), limit)

    plain = results(())
    cells = {names: cell(results(names), plain, limit_of(names)) for names in sets}
    return {(): cell(plain, eager, EXACT), **cells}


def every_wrapper(inductor: str) -> list[tuple[str, ...]]:
    """Each wrapper and each pair; Inductor "alone", also in "pairs", or in "none"."""
    alone = [(name,) for name in WRAPPERS if name not in INDUCTOR or inductor != "none"]
    pairs = [pair for pair in combinations(WRAPPERS, 2) if inductor == "pairs" or not {*INDUCTOR} & {*pair}]
    return [*alone, *pairs]


Cells = dict[tuple[str, ...], Cell]


def both(mesh: Any, inductor: str) -> tuple[Cells, Cells]:
    return wrappers(mesh, every_wrapper(inductor)), passes(mesh, pass_sets())


def in_process(sizes: dict[str, int], inductor: str, backend: str) -> tuple[Cells, Cells]:
    torch.set_num_threads(1)
    if backend == "other":  # one that torch does not know
        create = lambda store, rank, size, timeout: dist.ProcessGroupGloo(store, rank, size, timeout)
        dist.Backend.register_backend(backend, create, devices=["cpu"])
    return both(ft.make_mesh(**sizes, backend=backend), inductor)


def worst(ranks: list[Cells]) -> Cells:
    """Of all ranks."""
    its = lambda key: [cells[key] for cells in ranks]
    return {
        key: Cell(largest(c.loss for c in its(key)), largest(c.gradients for c in its(key)), ranks[0][key].limit)
        for key in ranks[0]
    }


def on_mesh(name: str, inductor: str) -> tuple[Cells, Cells]:
    """The cells of a mesh: "none", sizes as in "fsdp=2,tp=2" for a virtual one, a backend before them for processes.

    "other:" is a backend that is registered with torch by name.
    """
    if name == "none":
        return both(None, inductor)
    kind, _, written = name.rpartition(":")
    sizes = {dim: int(n) for dim, n in (part.split("=") for part in written.split(","))}
    if kind:
        ranks = ft.launch(in_process, sizes, inductor, kind, nprocs=math.prod(sizes.values()))
    else:  # where the captured graph runs without Inductor
        ranks = ft.simulate(**sizes)(lambda mesh: both(mesh, "none"))()
    of_wrappers, of_passes = zip(*ranks, strict=True)  # of all ranks
    return worst(list(of_wrappers)), worst(list(of_passes))


Rows = list[list[str]]
Key = Callable[..., tuple[str, ...]]


def matrix(cells: Cells, names: list[str], above: Key, below: Key) -> Rows:
    """What is alone on the diagonal, pairs above it and, of another key, below it; columns are numbered as rows are."""
    rows = [["", *(str(i + 1) for i in range(len(names)))]]
    for i, name in enumerate(names):
        key = lambda j: above(name) if i == j else (above if i < j else below)(name, names[j])  # noqa: B023
        rows.append([f"{i + 1} {name}", *(str(cells.get(key(j), "")) for j in range(len(names)))])
    return rows


def tables(name: str, of_wrappers: Cells, of_passes: Cells) -> list[tuple[str, Rows]]:
    ordered = lambda names: tuple(p for p in PASSES if p in names)
    in_turn = lambda *names: names  # of wrappers, none the other way round
    only, without = lambda *names: ordered(names), lambda *names: ordered({*PASSES} - {*names})
    passes = matrix(of_passes, list(PASSES), only, without)
    for row, name_ in zip(passes, ["all but this", *PASSES], strict=True):
        row.append(name_ if row is passes[0] else str(of_passes[without(name_)]))
    return [
        (f"{name}: wrappers", matrix(of_wrappers, list(WRAPPERS), in_turn, in_turn)),
        (
            f"{name}: passes, only these (above) or all but these (below); "
            f"all: {of_passes[tuple(PASSES)]}; none, against eager: {of_passes[()]}",
            passes,
        ),
    ]


def as_markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def as_table(title: str, rows: Rows) -> Table:
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows[1:]:
        table.add_row(*(f"[red]{cell}" if "WRONG" in cell else cell for cell in row))
    return table


def legend() -> str:
    lines = [f"- {name}: {why}" for name, why in SUMS.items()]
    return (
        f"May differ, by {EXACT:g} at most in float64, by {CLOSE:g} in float32 and under Inductor, and by "
        f"{ROUNDED:g} in bfloat16 and {QUARTER:g} in float8, where another order of summation "
        "rounds at another place; all "
        "else must be equal bit for bit:\n\n" + "\n".join(lines)
    )


def sizes() -> str:
    return (
        f"torch {torch.__version__}; batch {BATCH}, seq {SEQ}, {STEPS} steps, {CONFIG}, and "
        f"{OF_PASSES.num_layers} layers where passes are shown. An empty cell is a pair of which one undoes the other, "
        "or is for another mesh, "
        "or of Inductor, which is shown alone (virtual meshes run captured graphs without it)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", action="append", help=f"one of {MESHES}, or another; default: all of these")
    parser.add_argument("--inductor-pairs", action="store_true", help="also each wrapper compiled by Inductor")
    parser.add_argument("--out", type=Path, help="write the tables to this file, as markdown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console, wrong = Console(width=max(160, Console().width)), 0
    parts = [f"# Combinations\n\n```\n{__doc__.strip()}\n```\n\n{legend()}\n\n{sizes()}"]
    for name in args.mesh or MESHES:
        of_wrappers, of_passes = on_mesh(name, "pairs" if args.inductor_pairs else "alone")
        bad = [key for cells in (of_wrappers, of_passes) for key, cell in cells.items() if not cell.right]
        wrong += len(bad)
        for title, rows in tables(name, of_wrappers, of_passes):
            console.print(as_table(title, rows))
            parts.append(f"## {title}\n\n{as_markdown(rows)}")
        console.print(f"{name}: {len(of_wrappers) + len(of_passes)} combinations, wrong: {bad or 'none'}")
        if args.out:
            args.out.write_text("\n\n".join(parts) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
