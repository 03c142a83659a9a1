"""The examples run as their first lines say, and give the same losses on every mesh."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import functitan as ft
from functitan.models import llama

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--steps", "3", "--batch", "4", "--seq", "32", "--sample", "3"]


def run(command: list[str], out: Path) -> list[float]:
    """The losses that an example wrote."""
    done = subprocess.run([*command, *TINY, "--out", str(out)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "step 1/3  loss" in done.stdout and "A sample:\ndef " in done.stdout
    assert (out / "loss.png").stat().st_size > 5000
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert set(rows[0]) == {"step", "loss", "tokens_per_second", "cursor", "mfu", "memory_mib"}
    return [row["loss"] for row in rows]


LEAVES = """
import atexit, os, torch
threads = lambda: [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
atexit.register(lambda: os.write(1, f"{sum('gloo' in name for name in threads())} gloo threads\\n".encode()))
import functitan as ft
torch.set_num_threads(1)
meshes = ft.make_mesh(fsdp=2), ft.make_mesh(tp=2)
for mesh, dim in zip(meshes, ("fsdp", "tp")):
    ft.unshard(torch.ones(8), "a", mesh=mesh, rules=ft.AxisRules({"a": dim}))
"""


def test_a_process_leaves_no_thread_of_a_mesh_to_the_end_of_its_interpreter(tmp_path):
    """Such a thread aborts the process, now and then, when it lets go of a tensor."""
    (tmp_path / "leaves.py").write_text(LEAVES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(tmp_path / "leaves.py")]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=120)
    assert done.stdout == 2 * "0 gloo threads\n", done.stderr


def test_train_llm_has_the_same_losses_in_each_way_to_run_it(tmp_path):
    script = str(EXAMPLES / "train_llm.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", script]
    plain = run([sys.executable, script], tmp_path / "plain")
    virtual = run([sys.executable, script, "--mesh", "fsdp=2,tp=2", "--simulate", "--profile"], tmp_path / "virtual")
    trace = json.loads((tmp_path / "virtual" / "trace.json").read_text())
    assert {"forward", "backward", "update"} <= {event.get("name") for event in trace["traceEvents"]}
    processes = run([*torchrun, "--mesh", "fsdp=2"], tmp_path / "processes")
    for losses in (virtual, processes):
        torch.testing.assert_close(losses, plain, rtol=1e-4, atol=0)  # float32 sums in other orders


def test_train_llm_goes_on_from_its_checkpoints_on_another_mesh(tmp_path):
    script = [sys.executable, str(EXAMPLES / "train_llm.py"), "--lr", "1e-3"]
    whole = run(script, tmp_path / "whole")
    saved = [*TINY, "--out", str(tmp_path / "parts"), "--checkpoints", str(tmp_path / "saved"), "--save-every", "1"]
    for more in (["--steps", "2"], ["--mesh", "fsdp=2", "--simulate"]):
        done = subprocess.run([*script, *saved, *more], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and all("checkpoint_wait" in row for row in rows)
    # float32 sums in other orders, and a schedule that ends after 2 steps or 3: its first two steps are the same
    torch.testing.assert_close([row["loss"] for row in rows], whole, rtol=1e-4, atol=0)


def test_train_llm_validates_on_text_that_is_held_out(tmp_path):
    """The losses are the same on every mesh, and go down: what is learned of some files holds in others."""
    script, losses = [sys.executable, str(EXAMPLES / "train_llm.py"), *TINY, "--seq", "128", "--steps", "6"], []
    for name, more in {"plain": [], "virtual": ["--mesh", "fsdp=2,tp=2", "--simulate"]}.items():
        out = tmp_path / name
        options = ["--validate-every", "2", "--validation-batches", "2", "--out", str(out)]
        done = subprocess.run([*script, *options, *more], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4, 6]
        losses.append([row["validation_loss"] for row in rows if "validation_loss" in row])
        assert losses[-1][2] < losses[-1][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)  # float32 sums in other orders


def test_validation_is_the_loss_of_the_named_split(tmp_path):
    """Of a folder of texts; the oracle is torch's cross entropy of one pass over all rows of the split."""
    example = runpy.run_path(str(EXAMPLES / "train_llm.py"))
    for split, text in {"train": "a" * 99, "test": "abc" * 53}.items():
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text}))
    args = Namespace(data=str(tmp_path), validation_split="test", seq=16, batch=2, validation_batches=5, device="cpu")
    config, encoding = llama.DEBUG._replace(num_layers=1, vocab_size=257), ft.data.byte_encoding()
    params = ft.init(llama.params(config), ft.random.key(0))
    found = example["validator"](args, config, encoding, None)(params)["validation_loss"]
    tokens = torch.tensor([*(b"abc" * 53), 256, ord("a")])  # the epoch after gives the last label
    rows = tokens[:160].view(10, 16), tokens[1:].view(10, 16)
    expected = cross_entropy(llama.apply(params, rows[0], config).flatten(0, 1), rows[1].flatten())
    torch.testing.assert_close(found, expected.item(), rtol=1e-5, atol=0)  # float32 sums in other orders


@pytest.mark.parametrize("sizes", [dict(fsdp=2), dict(tp=2), dict(dp=2, fsdp=2, tp=2)], ids=str)
def test_a_block_in_a_foreign_loop_trains_alike_on_every_mesh(sizes):

    train = runpy.run_path(str(EXAMPLES / "foreign_loop.py"))["train"]
    expected = train(None, 10)
    assert expected[-1] < 0.6 * expected[0]
    for losses in ft.simulate(**sizes)(train)(10):
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
