"""`ft.checkpoint.Manager`: when to save, what to keep, where to go on.

Invariant: all ranks save at the same steps, and at most one save runs; whatever ends the process, the newest complete
checkpoint is one that was whole, and the one that the run wrote last. Nothing is removed that no manager wrote.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import uuid4

import torch
from torch.distributed.device_mesh import DeviceMesh

from functitan import tree
from functitan.checkpoint.compare import gathered, largest
from functitan.checkpoint.files import Place, clear_errors, locate, remove
from functitan.checkpoint.history import DAMAGED, MARK, Saved, found, free_name, leftovers, mark_of, removable
from functitan.checkpoint.leaves import device_among, mesh_of
from functitan.checkpoint.restore import restore
from functitan.checkpoint.save import TIMEOUT_S, begin, together
from functitan.checkpoint.stage import Buffers, staged
from functitan.checkpoint.termination import termination
from functitan.checkpoint.write import Part, write_part
from functitan.errors import CheckpointError, FunctitanError, report
from functitan.sharding.mesh import Mesh, is_seconds, is_size
from functitan.sharding.rules import AxisRules

GRACE_S = 30.0  # for a write that goes on when the run ends by an error


class Manager:
    """The checkpoints of a run, in one directory (a local path or an fsspec URL), each named by its step.

    `every_steps` and `every_seconds` say when `step` saves; of the complete ones the last `keep_last` are kept (`None`:
    all), and those whose step is a multiple of `keep_every`. With `background` the training goes on while a copy of the
    state is written. Inside `with`, SIGTERM makes `step` save and `stopping` true; `stop` is another way to tell so, as
    from `ft.checkpoint.termination()`. `patterns`, `mesh`, `rules` and `timeout` are those of `ft.checkpoint.save`.
    Every rank makes one, and calls the same methods. Its state lives as long as the run.

    A run may go back, `restore(like, step=...)`, and on from there. What it saves then takes the place of the later
    checkpoints of its first way, each once it is met or passed, or sooner by `keep_last`; the newest is the one that
    was written last. A manager removes only what managers wrote: `ft.checkpoint.save("step_100", ...)` and other files
    stay; an old checkpoint that cannot be removed is a warning. Two runs do not share a directory: a manager that finds
    another's checkpoints in it, and has not restored one, raises `CheckpointError` when it is to save.

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
        fixes = ["give a number of at least 1, or None"] if problems else []
        seconds = {} if every_seconds is None else {"every_seconds": every_seconds}
        late = [f"{name} is {n!r}" for name, n in {**seconds, "timeout": timeout}.items() if not is_seconds(n)]
        fixes += ["give seconds, more than 0"] if late else []
        if problems + late:
            raise FunctitanError(report("ft.checkpoint.Manager", problems + late, "; ".join(fixes)))
        self.stopping = False
        self._place = locate(directory)
        self._every = every_steps, every_seconds
        self._keep = keep_last, keep_every
        self._background, self._stop, self._timeout = background, stop, timeout
        self._layout: dict[str, Any] = {"patterns": patterns, "mesh": mesh, "rules": rules}
        self._saved_at = time.monotonic()
        self._last: int | None = None  # the step of the last save
        self._session, self._begun = uuid4().hex, False
        self._known: set[Saved] | None = None  # what was there when the run last restored, or before its first save
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
        return sorted({saved.step for saved in found(self._place)})

    def restore(self, like: tree.Tree, step: int | None = None, **options: Any) -> tree.Tree | None:
        """The complete checkpoint that was written last, or that of `step`, as by `ft.checkpoint.restore`.

        `None` if there is none. The run goes on from it: what it saves next is newer than all that is there.
        """
        if step is not None:
            _check_step("restore", step)
        self.wait()
        there = found(self._place)
        self._known, self._last = set(there), None
        damaged = [f"{saved.name}/{MARK} is damaged" for saved in there if saved.order == DAMAGED]
        if step is None and damaged:
            fix = f"give the step to go on from, of {self.steps()}, and remove what is damaged"
            raise CheckpointError(report(self._text, [*damaged, "the order of writing is not known"], fix))
        names = [saved.name for saved in there if step in (None, saved.step)]
        if step is None and not names:
            return None
        name = names[-1] if names else f"step_{step:08d}"
        return restore(self._place.child(name).name, like, **self._layout | options)

    def step(self, step: int, state: tree.Tree) -> dict[str, float]:
        """Save, if it is time, the state after `step` steps. Metrics: "checkpoint_wait", the seconds that it waited for
        an earlier save, and "checkpoint_seconds", all that the training stood still.

        An error of an earlier save in the background is raised here, when the next begins, or by `wait`.
        """
        _check_step("step", step)
        start, waited = time.perf_counter(), 0.0
        if not self._begun:
            self._begin(state)
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
        _check_step("save", step)
        self.wait()
        if not self._begun:
            self._begin(state)
        saved = self._next(step, state)
        place, part = begin(self._place.child(saved.name).name, state, **self._layout, marks=mark_of(saved))
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
        except BaseException as error:
            self._error = error
        else:
            if part.rank == 0:
                self._prune()

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
        asked = torch.tensor(flags, dtype=torch.int32, device=device_among(tree.leaves(state)))
        stop, due = largest(asked, dims, mesh, "checkpoint.Manager").tolist()
        return bool(stop), bool(due)

    def _mesh(self, state: tree.Tree) -> Mesh | None:
        return mesh_of(state, self._layout["mesh"])

    def _begin(self, state: tree.Tree) -> None:
        """Before the first step: see that the directory is this run's, and remove what was never whole."""

        def work() -> None:
            if self._known is None:
                there = found(self._place)
                if own := [saved for saved in there if saved.own]:
                    steps = f"step {own[0].step}" if len(own) == 1 else f"{len(own)} steps up to {own[-1].step}"
                    problem = f"there are checkpoints of another run: {steps}, the last by {own[-1].by}"
                    raise CheckpointError(report(self._text, [problem], _FIX_OTHER_RUN))
                self._known = set(there)
            with self._warning():
                for name in leftovers(self._place):
                    self._place.fs.rm(self._place.child(name).path, recursive=True)

        self._alone(work, f"begins to save into {self._place.name}", state)
        self._begun = True

    def _next(self, step: int, state: tree.Tree) -> Saved:
        """What the next checkpoint is called, and its place in order: as rank 0 finds it, on every rank."""

        def work() -> tuple:
            there, known = found(self._place), self._known or set()
            others = [saved for saved in there if saved.own and saved.session != self._session and saved not in known]
            if others:
                problems = [f"{saved.name} was saved meanwhile by {saved.by}" for saved in others]
                raise CheckpointError(report(self._text, problems, _FIX_TWO))
            order = max([0, *(saved.order + 1 for saved in there)])
            by = f"process {os.getpid()} on {socket.gethostname()}"
            return free_name(self._place, step), step, order, self._session, by

        return Saved(*self._alone(work, f"saves step {step} into {self._place.name}", state))

    def _alone(self, work: Callable[[], Any], does: str, state: tree.Tree) -> Any:
        """What `work()` gives rank 0, as JSON has it, or its error, on every rank."""
        mesh = self._mesh(state)
        dims = () if mesh is None else tuple(dim for dim, n in mesh.shape.items() if n > 1)
        if mesh is None or not dims:
            with clear_errors(self._text, _FIX_ACCESS):
                return work()
        together(mesh, does, lambda: None)
        text = "null"
        if mesh.rank == 0:
            try:
                with clear_errors(self._text, _FIX_ACCESS):
                    text = json.dumps([work(), None])
            except Exception as error:
                text = json.dumps([None, str(error)])
        got, error = next(filter(None, gathered(text, dims, mesh, device_among(tree.leaves(state)))))
        if error is not None:
            raise CheckpointError(error)
        return got

    def _prune(self) -> None:
        gone: list[Saved] = []
        with self._warning():
            gone = removable(found(self._place), *self._keep)
        for saved in gone:
            with self._warning():
                remove(self._place.child(saved.name))

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """What cannot be removed ends no run."""
        try:
            yield
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            fix = "the run goes on; see that the directory can be written, or remove by hand what is old"
            warnings.warn(report(f"removing old checkpoints from {self._place.name}", [problem], fix), stacklevel=2)

    @property
    def _text(self) -> str:
        return f"ft.checkpoint.Manager({self._place.name!r})"


def _check_step(method: str, step: Any) -> None:
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        text = repr(step) if isinstance(step, (int, float, str)) else f"a {type(step).__name__}"
        fix = "give a whole number of at least 0, as int(state.step)"
        raise FunctitanError(report(f"ft.checkpoint.Manager.{method}", [f"step is {text}"], fix))


_FIX_OTHER_RUN = "go on from them, by manager.restore before the first step; or give another directory"
_FIX_ACCESS = "choose a directory that can be read and written"
_FIX_TWO = "two managers save into one directory: end one of the runs, or give it another directory"
