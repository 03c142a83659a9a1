"""Programs whose every message, graph and bit is written down: one step of a tiny Llama under each wrapper, on meshes.

    python tests/golden/dump.py           # writes the files anew, after a change that is meant

Invariant: a file tells what public names give, and nothing of how the package is built, so a rebuild leaves it equal
byte for byte. What a commit changes in these files its message explains.

Values are those of one kind of processor, whose name stands in the file: another one's matmuls round otherwise.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

import functitan as ft
from functitan.models import llama

CONFIG = llama.LlamaConfig(61, 16, 2, 4, 2, 4, 32, rope_theta=10000.0)
RULES = llama.RULES
DIRECTORY = Path(__file__).parent
policies = ft.remat_policies
TX = ft.optim.chain(ft.optim.clip_by_global_norm(0.05), ft.optim.adamw(1e-2, weight_decay=0.1))


class Program(NamedTuple):
    """One step: the mesh, how blocks and the loss are wrapped, and how the step is made of them."""

    sizes: dict[str, int]
    block: Callable[..., Any] = llama.block
    wrap: Callable[..., Any] = lambda loss: loss
    accumulate: int | None = None
    tx: ft.optim.GradientTransformation = TX
    dtype: torch.dtype = torch.float64
    order: str = "contiguous"
    schedule: str | None = None  # of a pipeline
    is_captured: bool = False  # whether the file has the graph of the step, too: of one layer


def zigzag(loss: Callable[..., Any]) -> Callable[..., Any]:
    return ft.context_parallel(loss, method="ring", order="zigzag")


def by_heads(loss: Callable[..., Any]) -> Callable[..., Any]:
    return ft.context_parallel(loss, method="all_to_all")


def in_bfloat16(loss: Callable[..., Any]) -> Callable[..., Any]:
    return ft.precision(loss, compute=torch.bfloat16)


def in_float8(loss: Callable[..., Any]) -> Callable[..., Any]:
    return ft.float8(loss, emulate=True)


REMAT = ft.remat(llama.block, policy=policies.dots_saveable)
NAMED = ft.remat(llama.block, policy=policies.save_only_these_names("attn_out"))
STORED = ft.optim.stored(TX, rules=RULES.replace(embed=("fsdp", "cp", "dp")))

PROGRAMS = {
    "plain": Program({}, is_captured=True),
    "fsdp_tp": Program(dict(fsdp=2, tp=2), is_captured=True),
    "hsdp_stored": Program(dict(dp=2, fsdp=2), tx=STORED),
    "float8": Program(dict(fsdp=2, tp=2), wrap=in_float8, dtype=torch.float32),
    "async_tp": Program(dict(tp=2), wrap=ft.async_tp, is_captured=True),
    "async_tp_float8": Program(dict(fsdp=2, tp=2), wrap=lambda loss: ft.async_tp(in_float8(loss)), dtype=torch.float32),
    "remat": Program(dict(fsdp=2), block=REMAT, is_captured=True),
    "remat_names_tp": Program(dict(fsdp=2, tp=2), block=NAMED),
    "accumulate": Program(dict(dp=2, fsdp=2), accumulate=2, is_captured=True),
    "accumulate_remat_tp": Program(dict(fsdp=2, tp=2), block=REMAT, accumulate=2),
    "zigzag": Program(dict(fsdp=2, cp=2), wrap=zigzag, order="zigzag", is_captured=True),
    "all_to_all": Program(dict(cp=2), wrap=by_heads),
    "precision": Program(dict(fsdp=2, tp=2), wrap=in_bfloat16, dtype=torch.float32, is_captured=True),
    "compile": Program(dict(fsdp=2), block=ft.compile(llama.block, backend="graph")),
    "pipeline_1f1b": Program(dict(pp=2, fsdp=2), schedule="1f1b", dtype=torch.float32),
    "pipeline_zbv": Program(dict(pp=2, tp=2), schedule="zbv", dtype=torch.float32),
    "pipeline_remat": Program(dict(pp=2), schedule="interleaved_zero_bubble", dtype=torch.float32, block=REMAT),
}


def text() -> dict[str, Tensor]:
    tokens = torch.randint(0, CONFIG.vocab_size, (8, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.where(tokens[:, 1:] % 7 == 0, -100, tokens[:, 1:])
    return {"tokens": tokens[:, :-1].contiguous(), "labels": labels}


def made(program: Program, mesh: Any) -> tuple[Callable[..., Any], Any, Any]:
    """The step, this rank's state, and its batch."""
    of_dtype = lambda p: ft.Param(p.pattern, p.shape, p.init, program.dtype)
    batch, key = text(), ft.random.key(0)
    if program.order == "zigzag":
        batch = ft.zigzag(batch, "batch seq", mesh=mesh)
    batch = ft.shard(batch, "batch seq", mesh=mesh, rules=RULES)
    given: Any = dict(mesh=mesh, rules=RULES)
    if program.schedule is None:
        config = CONFIG._replace(num_layers=1 if program.is_captured else 2)
        declared = ft.tree.map(of_dtype, llama.params(config))
        loss = program.wrap(lambda params, batch, key: llama.loss(params, batch, config, block=program.block))
        state = ft.TrainState.create(declared, program.tx, key, **given)
        return ft.train_step(loss, program.tx, donate=False, accumulate=program.accumulate), state, batch
    ranks = program.sizes["pp"]
    each = 1 if program.schedule == "1f1b" else 2
    schedule = ft.pipeline.schedule(program.schedule, num_stages=ranks * each, num_microbatches=2, num_ranks=ranks)
    config = CONFIG._replace(num_layers=ranks * each)
    layers = [range(i, i + 1) for i in range(config.num_layers)]
    stages = llama.stages(config, layers, block=program.block)
    declared = ft.tree.map(of_dtype, ft.pipeline.declarations(stages, schedule, mesh.place))
    state = ft.TrainState.create(declared, program.tx, key, **given)
    gradients = ft.pipeline.value_and_grad(stages, schedule)
    return ft.train_step(None, program.tx, donate=False, value_and_grad=gradients), state, batch


def messages(ledger: ft.Ledger) -> str:
    """Each entry of a ledger, one a line."""
    lines = [
        f"{e.phase}{' again' if e.recomputed else ''} {e.collective}{' hidden' if e.hidden else ''} "
        f"{'·'.join(e.mesh_dims)} {e.bytes} {str(e.dtype).removeprefix('torch.')} {e.op} {e.pattern}"
        for e in ledger
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in ledger.notes)])


def lines(graph: GraphModule) -> str:
    """The graph as code, without what it says of memory."""
    return re.sub(r";  [\w =]+ = None( .*)?$", "", graph.code.strip(), flags=re.MULTILINE)


def bits(leaf: Any) -> str:
    """A tensor's bytes, as a digest."""
    return hashlib.sha256(leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def values(state: Any, metrics: dict[str, Any]) -> str:
    """The loss to its last bit, and the bits of metrics, parameters and optimizer state."""
    named = {"metrics": metrics, "params": state.params, "opt_state": state.opt_state}
    leaves = zip(ft.tree.paths(named), ft.tree.leaves(named), strict=True)
    return "\n".join([f"loss {metrics['loss'].item().hex()}", *(f"{path} {bits(x)}" for path, x in leaves)])


def of_rank(program: Program, mesh: Any) -> dict[str, str]:
    """What one rank has to tell: its messages, its graph, and its values."""
    step, state, batch = made(program, mesh)
    found = {}
    if program.is_captured and (mesh is None or mesh.rank == 0):  # ranks' graphs differ in what is their own part
        found["graph"] = lines(ft.jit(step, backend="graph").graph(state, batch))
    with ft.record() as ledger:
        new, metrics = step(state, batch)
    return {"messages": messages(ledger), **found, "values": values(new, metrics)}


def told(name: str) -> dict[str, str]:
    """A program's sections, by the line that heads each; ranks that tell the same are told once."""
    program = PROGRAMS[name]
    of = partial(of_rank, program)
    ranks = ft.simulate(**program.sizes)(of)() if program.sizes else [of(None)]
    sections: dict[str, str] = {}
    for kind in ranks[0]:
        texts: dict[str, list[int]] = {}
        for rank, found in enumerate(ranks):
            if kind in found:
                texts.setdefault(found[kind], []).append(rank)
        for text, alike in texts.items():
            sections[f"{kind} of ranks {', '.join(map(str, alike))}" if len(texts) > 1 else kind] = text
    return sections


def processor() -> str:
    """What values depend on besides the program: torch and the processor's matmuls."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"^model name\s*: (.*)$", info, flags=re.MULTILINE)
    return f"torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}, {(names or ['?'])[0]}"


def write(sections: dict[str, str]) -> str:
    return "\n\n".join(f"== {head}\n{text}" for head, text in sections.items()) + "\n"


def read(name: str) -> dict[str, str]:
    """The sections of a file."""
    parts = (DIRECTORY / f"{name}.txt").read_text().removeprefix("== ").split("\n\n== ")
    return {head: text.removesuffix("\n") for head, text in (part.split("\n", 1) for part in parts)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or PROGRAMS:
        (DIRECTORY / f"{name}.txt").write_text(write({"processor": processor(), **told(name)}))
        print(name, flush=True)
