"""`ft.checkpoint.Manager`: when to save, what to keep, where to go on.

Invariant: all ranks save at the same steps, and at most one save runs; whatever ends the process, the newest complete
checkpoint is one that was whole.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from functitan import tree
from functitan.checkpoint.files import HIDDEN, Place, clear_errors, is_complete, locate, remove
from functitan.checkpoint.leaves import mesh_of
from functitan.checkpoint.restore import restore
from functitan.checkpoint.save import TIMEOUT_S, begin
from functitan.checkpoint.stage import Buffers, staged
from functitan.checkpoint.termination import termination
from functitan.checkpoint.write import Part, write_part
from functitan.errors import FunctitanError, report
from functitan.sharding.mesh import Mesh, is_size
from functitan.sharding.rules import AxisRules

GRACE_S = 30.0  # for a write that goes on when the run ends by an error


class Manager:
    """The checkpoints of a run, in one directory (a local path or an fsspec URL), each named by its step.

    `every_steps` and `every_seconds` say when `step` saves; of the complete ones the last `keep_last` are kept (`None`:
    all), and those whose step is a multiple of `keep_every`. With `background` the training goes on while a copy of the
    state is written. Inside `with`, SIGTERM makes `step` save and `stopping` true; `stop` is another way to tell so, as
    from `ft.checkpoint.termination()`. `patterns`, `mesh`, `rules` and `timeout` are those of `ft.checkpoint.save`.
    Every rank makes one, and calls the same methods. Its state lives as long as the run.

    >>> import tempfile, torch
    >>> folder, state = tempfile.mkdtemp(), {"w": torch.zeros(2), "step": 0}
    >>> with Manager(folder, every_steps=2, keep_last=1) as manager:
    ...     state = manager.restore(state) or state
    ...     for n in range(state["step"], 5):
    ...         state = {"w": state["w"] + 1, "step": n + 1}
    ...         metrics = manager.step(n + 1, state)
    ...         if manager.stopping:
    ...             break
    >>> manager.steps(), manager.restore(state)
    ([4], {'w': tensor([4., 4.]), 'step': 4})
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        background: bool = True,
        stop: Callable[[], bool] | None = None,
        patterns: tree.Tree = None,
        mesh: Mesh | DeviceMesh | None = None,
        rules: AxisRules | None = None,
        timeout: float = TIMEOUT_S,
    ) -> None:
        sizes = {"every_steps": every_steps, "keep_last": keep_last, "keep_every": keep_every}
        problems = [f"{name} is {n!r}" for name, n in sizes.items() if n is not None and not is_size(n)]
        if every_seconds is not None and not every_seconds > 0:
            problems.append(f"every_seconds is {every_seconds!r}")
        if problems:
            raise FunctitanError(report("ft.checkpoint.Manager", problems, "give a number of at least 1, or None"))
        self.stopping = False
        self._place = locate(directory)
        self._every = every_steps, every_seconds
        self._keep = keep_last, keep_every
        self._background, self._stop, self._timeout = background, stop, timeout
        self._layout: dict[str, Any] = {"patterns": patterns, "mesh": mesh, "rules": rules}
        self._saved_at = time.monotonic()
        self._last: int | None = None  # the step of the last save
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: Buffers = {}
        self._handlers = ExitStack()

    def __enter__(self) -> Manager:
        if self._stop is None:
            self._stop = self._handlers.enter_context(termination())
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._handlers.close()
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join(GRACE_S)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        self._place.fs.invalidate_cache()
        if not self._place.fs.exists(self._place.path):
            return []
        names = [os.path.basename(path.rstrip("/")) for path in self._place.fs.ls(self._place.path, detail=False)]
        known = [int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d+)", name))]
        return sorted(step for step in known if is_complete(self._at(step)))

    def restore(self, like: tree.Tree, step: int | None = None, **options: Any) -> tree.Tree | None:
        """The newest complete checkpoint, or that of `step`, as by `ft.checkpoint.restore`; `None` if there is none."""
        self.wait()
        if step is None:
            step = max(self.steps(), default=None)
        return None if step is None else restore(self._at(step).name, like, **self._layout | options)

    def step(self, step: int, state: tree.Tree) -> dict[str, float]:
        """Save, if it is time, the state after `step` steps. Metrics: "checkpoint_wait", the seconds that it waited for
        an earlier save, and "checkpoint_seconds", all that the training stood still.

        An error of an earlier save in the background is raised here, when the next begins, or by `wait`.
        """
        start, waited = time.perf_counter(), 0.0
        self.stopping, due = self._decided(state)
        steps = self._every[0]
        if due or self.stopping or (steps is not None and step % steps == 0):
            self.wait()
            waited = time.perf_counter() - start
            if self._last != step:
                self.save(step, state)
            if self.stopping:
                self.wait()
        return {"checkpoint_wait": waited, "checkpoint_seconds": time.perf_counter() - start}

    def save(self, step: int, state: tree.Tree) -> None:
        """Save now; in the background, if it is the manager's way."""
        self.wait()
        if self._last is None and _rank(self._mesh(state)) == 0:
            self._sweep()
        place, part = begin(self._at(step).name, state, **self._layout)
        self._last, self._saved_at = step, time.monotonic()
        if not self._background:
            self._write(place, part)
            self.wait()
            return
        part, self._buffers = staged(part, self._buffers)
        self._thread = threading.Thread(target=self._write, args=(place, part), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when no save runs; raise the error of the last one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, place: Place, part: Part) -> None:
        try:
            write_part(place, part, self._timeout)
            if part.rank == 0:
                self._prune()
        except BaseException as error:
            self._error = error

    def _decided(self, state: tree.Tree) -> tuple[bool, bool]:
        """Whether to stop, and whether the time for a save is over: on every rank, if on one."""
        stop, seconds = self._stop, self._every[1]
        flags = [stop is not None and stop(), seconds is not None and time.monotonic() - self._saved_at >= seconds]
        if stop is None and seconds is None:
            return False, False
        mesh = self._mesh(state)
        dims = () if mesh is None else tuple(dim for dim in mesh.sizes.dims if mesh.sizes.size(dim) > 1)
        if mesh is None or not dims:
            return flags[0], flags[1]
        device = next((x.device for x in tree.leaves(state) if isinstance(x, Tensor)), None)
        asked = torch.tensor(flags, dtype=torch.int32, device=device)
        stop, due = mesh.transport.all_reduce(asked, dims, "max", ("checkpoint.Manager", ""))().tolist()
        return bool(stop), bool(due)

    def _mesh(self, state: tree.Tree) -> Mesh | None:
        return mesh_of(state, self._layout["mesh"])

    def _prune(self) -> None:
        last, every = self._keep
        steps = self.steps()
        with clear_errors(f"removing old checkpoints from {self._place.name}", "see that the directory can be written"):
            for step in steps[: -last or None] if last is not None else ():
                if every is None or step % every:
                    remove(self._at(step))

    def _sweep(self) -> None:
        """Remove what killed runs have left."""
        fs, root = self._place.fs, self._place.path
        whole = {f"step_{step:08d}" for step in self.steps()}
        with suppress(FileNotFoundError):
            for path in fs.ls(root, detail=False):
                name = os.path.basename(path.rstrip("/"))
                if re.fullmatch(rf"\.step_\d+{re.escape(HIDDEN)}(\..*)?", name) or (
                    re.fullmatch(r"step_\d+", name) and name not in whole
                ):
                    fs.rm(f"{root}/{name}", recursive=True)

    def _at(self, step: int) -> Place:
        return self._place.child(f"step_{step:08d}")


def _rank(mesh: Mesh | None) -> int:
    return 0 if mesh is None else mesh.rank
