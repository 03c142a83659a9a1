"""Mutation proof: every collective, transpose and rule step that is removed, swapped or retargeted fails a law test.

    python tests/mutation.py [--list] [--only GLOB] [--jobs N]

Each mutant (tests/mutants.py) is a copy of the package in a directory of its own; a forked process, which has torch
but not yet functitan, runs the law tests of the changed module on it. Nothing in the repository is written. The laws
must pass without a mutant, and each mutant must fail one, but for those in `SAME`, which change nothing: their proofs
stand there. Exits with 1 if a mutant survives, or if one in `SAME` is gone or is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
LIMIT_S = 60.0  # of processor time for one mutant: a busy machine gives the same verdicts; laws need half of it at most
STUCK_S = 15.0  # without any processor time: ranks that wait for each other

REPLICAS = [f"test_accumulate.py {law}" for law in ("[fsdp2-tp2]", "[dp2-fsdp2]", "randomness", "table", "one_replica")]
REPLICAS += ["test_accumulate_cost.py gathered_once"]
# module (a glob) -> its laws, in the order in which they run: a test file, and a part of the ids in it
LAWS = {
    "sharding.rules": ["test_plan.py", "test_accumulate.py one_replica"],
    "sharding.layout": ["test_plan.py", "test_errors.py", "test_nn.py [swiglu]"],
    "sharding.choice": ["test_choice.py", "test_plan.py", "test_ops.py values-take]"],
    "sharding.moves": ["test_moves.py einsum", "test_moves.py", "test_plan.py", "test_choice.py"],
    "sharding.plan": ["test_moves.py einsum", "test_plan.py", "test_ops.py cotangents-"],
    "sharding.contraction": ["test_contraction.py", "test_plan.py", "test_ops.py cotangents-einsum]"],
    "sharding.collectives": ["test_collectives.py"],
    "sharding.virtual": ["test_collectives.py", "test_guards.py their_lines", "test_messages.py order"],
    "sharding.steps": ["test_collectives.py", "test_plan.py", "test_ops.py values-", "test_ops.py -constrain]"],
    "sharding.distributed": ["test_gloo.py adjoint"],
    "sharding.message": ["test_context_parallel.py way_around", "test_context_parallel.py sees_none"]
    + ["test_context_composition.py processes"],
    "attention.op": [f"test_ops.py {law}attention]" for law in ("values-", "cotangents-", "shard-", "ft_vmap-")]
    + ["test_llama.py megatrons"],
    "attention.kernel": ["test_context_kernel.py", "test_context_parallel.py"],
    "attention.*": ["test_context_parallel.py", "test_context_errors.py", "test_context_composition.py cp"]
    + ["test_context_composition.py per_example", "test_context_composition.py several_cotangents"],
    "sharding.sequence": ["test_context_parallel.py", "test_context_errors.py"],
    "attention.context_parallel": ["test_context_parallel.py", "test_context_errors.py"],
    "float8.arithmetic": ["test_float8_mesh.py alike", "test_float8_mesh.py"],
    "float8.quantized": ["test_float8_mesh.py alike", "test_float8_mesh.py"],
    "overlap.ring": ["test_rings.py", "test_async_tp.py plain_torch", "test_async_tp.py composes"],
    "ops.contraction": [
        "test_ops.py -einsum]",
        "test_ops.py share-",
        "test_ops.py backward[einsum",
        "test_grad.py",
    ]
    + ["test_gloo.py forward_mode"],
    "ops.dropout": ["test_nn.py dropout", "faults/test_random_numbers_by_global_index.py hidden_axis"],
    "ops.einsum": ["test_ops.py -einsum]"],
    "ops.function": ["test_ops.py -einsum]", "test_ops.py forward_mode", "test_ops.py backward[", "test_grad.py"],
    "ops.lookup": [f"test_ops.py {law}" for law in ("-take]", "forward_mode", "backward[take", "values-select")]
    + ["test_ops.py cotangents-select", "test_ops.py values-iota]", "test_nn.py [rope]"],
    "ops.rows": ["test_ops.py -take]", "test_ops.py -select_by_tensor]"],
    "ops.loss": [
        f"test_ops.py {law}" for law in ("-cross_entropy]", "second", "exponentials", "forward_mode", "backward[cross")
    ],
    "ops.move": ["test_reshard.py", "test_ops.py -constrain]", "test_nn.py [rope]", "test_ops.py values-"],
    "ops.linear_loss*": ["test_linear_loss.py on_every_mesh", "test_linear_loss.py", "test_vmap.py"],
    "ops.norm": ["test_nn.py norm]", "test_ops.py -norm]"],
    "ops.rearrange": ["test_rearrange.py"],
    "ops.replica": REPLICAS,
    "ops.reduce": ["test_ops.py -reduce]", "test_ops.py -broadcast]", "test_ops.py exponentials"],
    "ops.types": ["test_ops.py -constrain]", "test_ops.py -einsum]", "test_ops.py -cross_entropy]"]
    + ["test_vmap.py", "test_nn.py [given"],
    "nn.attention": ["test_nn.py attention]"],
    "nn.mlp": ["test_nn.py [mlp]"],
    "nn.position_embedding": ["test_nn.py [position_embedding]", "test_nn.py [given"],
    "nn.rope": ["test_nn.py [rope]", "test_nn.py packed", "test_llama.py huggingface[plain]"],
    "models.*": ["test_nn.py losses"],
    "optim.factored": ["test_optim_laws.py steps_on_a_mesh", "test_optim_laws.py equal_torch"]
    + ["test_optim_sharded.py tiny"],
    "optim.finite": ["test_finite.py"],
    "optim.muon": ["test_optim_laws.py steps_on_a_mesh", "test_optim_laws.py equal_torch"],
    "optim.norms": ["test_optim.py mesh", "test_optim.py norm", "test_optim_laws.py steps_on_a_mesh"],
    "optim.stored": ["test_optim_laws.py steps_on_a_mesh", "test_optim_sharded.py stored"],
    "pipeline.*": [f"test_pipeline.py {law}" for law in ("sharded_like", "gathers_its_weights", "bad_number")],
    "transforms.accumulate": REPLICAS,
    "transforms.checked": ["test_guards.py"],
    "float8.wrapper": ["test_float8_mesh.py delayed", "test_float8_mesh.py"],
    "remat.policies": ["test_remat.py work"],
    "*": ["test_grad.py", "test_threads.py", "test_ops.py values-", "test_ops.py cotangents-", "test_nn.py"],
}

# mutants that change nothing -> why not
SAME: dict[str, str] = {
    "optim.finite._over_ranks: \"max\" -> 'sum'": "flags are 0 or 1, and their sum is positive where their maximum is",
    "sharding.virtual.transport_of.agree: dims -> dims[::-1]": "ranks that agree are a set: their order is free",
    **{
        f"sharding.virtual.transport_of.{end}: message.mesh_dims -> message.mesh_dims[::-1]": "it is over pp alone"
        for end in ("post", "receive")
    },
    "sharding.distributed._transport.started: ops.reduce_scatter_tensor(x, op, n, name) -> x": "gloo has none",
    "sharding.message.Passing.splits: (me - self.shift) % n -> me - self.shift": "a list counts from its end, too",
    "pipeline.gradients.value_and_grad.gradients: dims -> dims[::-1]": "the order of replicas is free",
}


class Verdict(NamedTuple):
    """What the laws say of a mutant: `killed` by a test, `survived`, or ended by the `timeout`; processor seconds."""

    kind: str
    seconds: float
    test: str
    error: str


class Job(NamedTuple):
    """A process that runs laws on a copy of the package, and where it writes what came of it."""

    label: str
    pid: int
    home: Path
    progress: list[tuple[float, float]]  # (processor seconds, when) where they last changed


def main() -> int:
    if os.environ.get("PYTHONHASHSEED") != "0":  # orders of sets, so that every run is the same
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    from mutants import modules, mutants

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--only", action="append", metavar="GLOB", help="mutants whose id matches, or contains it")
    parser.add_argument("--jobs", type=int, default=2, metavar="N")
    args = parser.parse_args()
    chosen = {m.id: m for module in modules() for m in mutants(module) if matches(m.id, args.only)}
    if args.list:
        print("\n".join(chosen))
        return 0
    unknown = [label for label in SAME if not args.only and label not in chosen]
    print(f"{len(chosen)} mutants", flush=True)
    warm_up()
    began = time.monotonic()
    sources = {label: (m.module, m.source) for label, m in chosen.items()}
    laws = {module: laws_of(module) for module, _ in sources.values()}
    # the laws without a mutant come first: each must pass
    plain = {f"no mutant, laws of {module}": (module, None) for module in laws}
    verdicts: dict[str, Verdict] = {}
    for label, verdict in run({**plain, **sources}, laws, args.jobs):
        verdicts[label] = verdict
        line = chosen[label].line if label in chosen else 0
        print(f"{verdict.kind:8} {verdict.seconds:5.1f} s  {label}  (line {line})", flush=True)
        print(f"          {verdict.test}: {verdict.error[:150]}" if verdict.test else "", end="\n" * bool(verdict.test))
    broken = [label for label in plain if verdicts[label].kind != "survived"]
    survivors = [label for label in chosen if verdicts[label].kind == "survived" and label not in SAME]
    stale = unknown + [label for label in SAME if label in chosen and verdicts[label].kind != "survived"]
    count = {kind: sum(verdicts[label].kind == kind for label in chosen) for kind in ("killed", "timeout", "survived")}
    print(f"\n{len(chosen)} mutants in {time.monotonic() - began:.0f} s: {count}, {len(SAME)} listed as the same")
    for title, labels in (("laws fail without a mutant", broken), ("survivors", survivors), ("stale in SAME", stale)):
        print("\n".join([f"{title}:", *(f"  {label}" for label in labels)]) if labels else f"{title}: none")
    return 1 if broken or survivors or stale else 0


def matches(label: str, patterns: list[str] | None) -> bool:
    """True if an id matches a glob, or contains it: ids have brackets, which globs read as sets."""
    return not patterns or any(pattern in label or fnmatch(label, pattern) for pattern in patterns)


def laws_of(module: str) -> list[str]:
    """The laws of a module; one that the table lacks has those of the test file with its name, too."""
    own = f"test_{module.split('.')[-1]}.py"
    pattern = next(pattern for pattern in LAWS if fnmatch(module, pattern))
    return [own] * (pattern == "*" and (TESTS / own).exists()) + LAWS[pattern]


def warm_up() -> None:
    """Import what takes long, but not functitan, before any fork; one thread, so that a fork is safe."""
    import hypothesis
    import pytest  # noqa: F401
    import torch
    import torch._subclasses.fake_tensor
    import torch.distributed.device_mesh
    import torch.fx.experimental.proxy_tensor

    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    torch.set_num_threads(1)
    phases = hypothesis.Phase.explicit, hypothesis.Phase.generate  # no shrinking: the first failure is enough
    checks = list(hypothesis.HealthCheck)
    hypothesis.settings.register_profile(
        "mutation", derandomize=True, database=None, deadline=None, phases=phases, report_multiple_bugs=False,
        suppress_health_check=checks, max_examples=50,
    )  # fmt: skip
    assert not any(name.partition(".")[0] == "functitan" for name in sys.modules)


def run(
    work: dict[str, tuple[str, str | None]], laws: dict[str, list[str]], jobs: int
) -> Iterator[tuple[str, Verdict]]:
    """Run each (module, source) under the laws of its module, `jobs` at a time; verdicts as they come."""
    waiting, running = list(work), list[Job]()
    while waiting or running:
        while waiting and len(running) < jobs:
            label = waiting.pop(0)
            running.append(start(label, *work[label], laws[work[label][0]]))
        time.sleep(0.05)
        for job in list(running):
            verdict = finished(job)
            if verdict is not None:
                running.remove(job)
                shutil.rmtree(job.home, ignore_errors=True)
                yield job.label, verdict


def start(label: str, module: str, source: str | None, laws: list[str]) -> Job:
    """Fork a process that runs the laws on a copy of the package in which one module has this source."""
    home = Path(tempfile.mkdtemp(prefix="mutant-"))
    shutil.copytree(TESTS.parent / "functitan", home / "functitan")
    if source is not None:
        changed = home.joinpath("functitan", *module.split(".")).with_suffix(".py")
        changed.write_text(source)
        for compiled in changed.parent.glob(f"__pycache__/{changed.stem}.*"):
            compiled.unlink()
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        os.setsid()
        try:
            child(home, laws)
        finally:
            os._exit(0)
    return Job(label, pid, home, [(0.0, time.monotonic())])


def child(home: Path, laws: list[str]) -> None:
    import pytest

    out = os.open(home / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.path.insert(0, str(home))
    os.environ["PYTHONPATH"] = str(home)  # for the processes that a law starts
    os.chdir(TESTS.parent)
    found: dict = {"laws": 0}
    files = list(dict.fromkeys(str(TESTS / law.split()[0]) for law in laws))
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutation", "-o", "addopts="]
    code = pytest.main([*options, *files], plugins=[Selected(laws, found)])
    import functitan

    assert Path(functitan.__file__).is_relative_to(home), functitan.__file__
    found["code"] = int(code)
    (home / "verdict.json").write_text(json.dumps(found))


class Selected:
    """A pytest plugin: the laws alone, in their order, and the first that fails."""

    def __init__(self, laws: list[str], found: dict) -> None:
        self.laws, self.found = laws, found

    def pytest_collection_modifyitems(self, items: list) -> None:
        ranks = {item: self._rank(item.nodeid) for item in items}
        items[:] = sorted((item for item in items if ranks[item] is not None), key=lambda item: ranks[item])
        self.found["laws"] = len(items)

    def _rank(self, nodeid: str) -> int | None:
        for rank, law in enumerate(self.laws):
            file, part = (law.split() + [""])[:2]
            if nodeid.split("::")[0].endswith(file) and part in nodeid.partition("::")[2]:
                return rank
        return None

    def pytest_runtest_logreport(self, report) -> None:
        self._note(report)

    def pytest_collectreport(self, report) -> None:
        self._note(report)

    def _note(self, report) -> None:
        if report.failed and "test" not in self.found:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(crash.message if crash else report.longrepr)
            self.found |= {"test": report.nodeid.split("/")[-1], "error": " ".join(text.split())[:300]}


def finished(job: Job) -> Verdict | None:
    """The verdict of a process that has ended, or that is ended now because its time is over."""
    ended, _, usage = os.wait4(job.pid, os.WNOHANG)
    if ended:
        seconds, path = usage.ru_utime + usage.ru_stime, job.home / "verdict.json"
        found = json.loads(path.read_text()) if path.exists() else {"code": -1, "laws": 0}
        if found["code"] == 0 and found["laws"]:
            return Verdict("survived", seconds, "", "")
        output = (job.home / "output").read_text(errors="replace").split("\n")[-3:]
        return Verdict("killed", seconds, found.get("test", "crash"), found.get("error", " ".join(output)))
    (spent, changed), now = job.progress[-1], time.monotonic()
    if now - changed > 1 and (cpu := processor_seconds(job.pid)) > spent + 0.02:
        spent, changed = job.progress[-1] = cpu, now
    if spent > LIMIT_S or now - changed > STUCK_S:
        os.killpg(job.pid, signal.SIGKILL)
        os.waitpid(job.pid, 0)
        return Verdict("timeout", spent, "", "")
    return None


def processor_seconds(group: int) -> float:
    """User and system time of a process group's members."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # a process that has just ended
            fields = stat.read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:13])) if int(fields[2]) == group else 0
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
