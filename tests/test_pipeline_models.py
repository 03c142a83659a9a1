"""Language models in pipelines: the stages are the model, on meshes of three and four dims and on processes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from programs import CONFIG, named, text

import functitan as ft
from functitan.models import gpt2, llama

STEPS = 20
TX = ft.optim.chain(ft.optim.clip_by_global_norm(0.5), ft.optim.adamw(1e-2, weight_decay=0.1))
DEEP = CONFIG._replace(num_layers=4, tied=True)
TINY_GPT2 = gpt2.GPT2Config(61, 16, 16, 4, 4)


def pipelined(model, config, schedule, **options):
    """(stages, declared in float64) of a model."""
    layers = ft.pipeline.partition(config.num_layers, schedule.num_stages)
    wide = lambda p: ft.Param(p.pattern, p.shape, p.init, torch.float64)
    stages = model.stages(config, layers, **options)
    return [stage._replace(declarations=ft.tree.map(wide, stage.declarations)) for stage in stages]


def train(mesh, name, model=llama, config=DEEP, per_rank=1, steps=STEPS, start=None, out=None, **options):
    """(loss, norm) of each step of one rank, with 4 microbatches of 16 examples, pipelined where the mesh has `pp`."""
    rules = gpt2.RULES
    ranks = 1 if mesh is None else mesh.shape.get("pp", 1)
    if ranks > 1:
        stages = ranks * per_rank
        schedule = ft.pipeline.schedule(name, num_stages=stages, num_microbatches=4, num_ranks=ranks)
        its = pipelined(model, config, schedule, **options)
        declared = ft.pipeline.declarations(its, schedule, mesh.place)
        step = ft.train_step(None, TX, value_and_grad=ft.pipeline.value_and_grad(its, schedule))
    else:
        declared = ft.tree.map(lambda p: ft.Param(p.pattern, p.shape, p.init, torch.float64), model.params(config))
        step = ft.train_step(lambda p, b, key: model.loss(p, b, config), TX)
    state = ft.TrainState.create(declared, TX, ft.random.key(0), mesh=mesh, rules=rules)
    if start is not None:
        state = ft.checkpoint.restore(start, state)
    batch, found = ft.shard(text(), "batch seq", mesh=mesh, rules=rules), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        found.append((metrics["loss"].item(), metrics["grad_norm"].item()))
    if out is not None:
        ft.checkpoint.save(out, state)
    return found


@functools.cache
def alone(model=llama, config=DEEP, steps=STEPS):
    return train(None, "", model, config, steps=steps)


def close(found, wanted):
    # float64 sums in another order, 1e-13, grow in 20 steps of training; the issue asks for 1e-4
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("sizes", "name", "per_rank"),
    [
        (dict(pp=2, fsdp=2, tp=2), "1f1b", 1),
        (dict(pp=2, fsdp=2, cp=2), "zero_bubble_h1", 1),
        (dict(fsdp=2, pp=2), "zbv", 2),
        (dict(pp=4), "interleaved_1f1b", 1),
    ],
    ids=lambda x: named(x) if isinstance(x, dict) else str(x),
)
def test_a_pipeline_trains_llama_as_one_process_does(sizes, name, per_rank):
    """With a tied embedding and clipping by the global norm, 20 steps, also where layers of a stage are sharded."""
    steps, config = (STEPS, DEEP._replace(num_layers=2)) if len(sizes) == 3 else (5, DEEP)
    for found in ft.simulate(**sizes)(train)(name, config=config, per_rank=per_rank, steps=steps):
        close(found, alone(config=config)[:steps])


def test_a_pipeline_trains_gpt2_as_one_process_does():
    for found in ft.simulate(pp=2, tp=2)(train)("dualpipev", gpt2, TINY_GPT2, per_rank=2, steps=3):
        close(found, alone(gpt2, TINY_GPT2, 3))


def on_gloo(folder: str):
    mesh = ft.as_mesh(ft.make_mesh(pp=2))
    whole = train(mesh, "1f1b")
    split = train(mesh, "zero_bubble_h1", steps=3, out=f"{folder}/three")
    return whole, split, train(mesh, "zbv", per_rank=2, steps=2, start=f"{folder}/three")


def test_a_pipeline_of_processes_trains_as_one_process_does_and_goes_on_from_a_checkpoint(tmp_path: Path):
    for whole, split, later in ft.launch(on_gloo, str(tmp_path), nprocs=2):
        close(whole, alone())
        close(split + later, alone()[:5])


def test_a_checkpoint_moves_between_any_pp_degrees(tmp_path: Path):
    """Written on pp2-fsdp2, read on tp2, on one rank, and on pp4; as the one of a state without pipeline."""
    first, second = f"{tmp_path}/first", f"{tmp_path}/second"
    ft.simulate(pp=2, fsdp=2)(train)("interleaved_1f1b", per_rank=2, steps=2, out=first)
    close(train(None, "", steps=2, start=first, out=second), alone()[2:4])
    for sizes, start, done in ((dict(tp=2), first, 2), (dict(pp=4), first, 2), (dict(pp=2, tp=2), second, 4)):
        for found in ft.simulate(**sizes)(train)("1f1b", steps=2, start=start):
            close(found, alone()[done : done + 2])
    names = lambda folder: sorted(torch.load(folder, weights_only=False))
    assert names(_as_torch(first, tmp_path)) == names(_as_torch(second, tmp_path))


def _as_torch(folder: str, tmp_path: Path) -> str:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, str(tmp_path / "as_torch.pt"))
    return str(tmp_path / "as_torch.pt")


@pytest.mark.parametrize("wrap", [ft.remat, ft.compile, ft.precision], ids=lambda wrap: wrap.__name__)
def test_stages_of_wrapped_blocks_train_as_the_wrapped_model(wrap):
    options = (
        dict(compute=torch.float64) if wrap is ft.precision else dict(backend="graph") if wrap is ft.compile else {}
    )
    block = wrap(llama.block, **options)
    for found in ft.simulate(pp=2, tp=2)(train)("zero_bubble_h1", steps=3, block=block):
        close(found, alone()[:3])
