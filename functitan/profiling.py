"""`ft.profile`: a chrome trace in which ops, collectives and phases have the names that the program gave them.

Invariant: a profile changes no result and captures nothing anew. It is in the hooks of `Env.around`: a
program that is not profiled pays nothing for it.
"""

from __future__ import annotations

import gzip
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._profiler import _ExperimentalConfig  # private, for the ranks that are threads; tried on torch 2.13
from torch.profiler import ProfilerActivity, record_function

from functitan.breakdown import Breakdown, Interval, Span, breakdown
from functitan.errors import FunctitanError, report
from functitan.reading import parsed_json
from functitan.sharding.around import Around
from functitan.sharding.context import current, using
from functitan.sharding.message import Message


class Profile:
    """What `ft.profile` found; known once its body has ended."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path = path
        self.steps = steps
        self._timeline: Timeline | None = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans of this rank's thread, in the order in which they started."""
        return self._known().spans

    @property
    def breakdown(self) -> Breakdown:
        """Where the time of one step went: on the device where kernels ran on one, else on this rank's thread."""
        known = self._known()
        return breakdown(known.device or known.spans, known.window, self.steps)

    def _known(self) -> Timeline:
        if self._timeline is None:
            raise FunctitanError(report("ft.profile", ["its body has not ended"], "read it after the with block"))
        return self._timeline


class Timeline(NamedTuple):
    """What a trace holds of one rank."""

    window: Interval
    spans: tuple[Span, ...]  # of its thread
    device: tuple[Span, ...]  # of its kernels, if any


@contextmanager
def profile(path: str | Path, *, steps: int = 1) -> Iterator[Profile]:
    """Profile the body, which runs `steps` steps, and write a chrome trace to `path` (`.json`, or `.json.gz`).

    Open it in https://ui.perfetto.dev. Its spans: "train_step" with "forward", "backward" and "update"; named ops as
    "einsum batch embed, embed mlp -> batch mlp", with "(backward)" where a cotangent is computed and "again" where
    remat does; collectives as "all_gather[fsdp] einsum ... (backward)", one for each entry that `ft.record` would
    have, in its order; and torch's own ops within. Without a mesh the backward of an op is autograd's, and named as
    torch names it. A loop of your own marks its phases by `torch.profiler.record_function("update")`.

    A call of `ft.jit` is one span, "ft.jit of train_step". Compiled by Inductor it holds the matmuls ("aten::mm") and
    the collectives as "_c10d_functional::all_gather_into_tensor" and "_c10d_functional::wait_tensor"; generated
    kernels have spans ("cpp_fused_...") if `torch._inductor.config.cpp.enable_kernel_profile` was on when they were
    compiled. The optimizer is part of that one graph, and counts as compute.

    Afterwards `profile.breakdown` has the seconds of a step by part, `profile.breakdown.mfu(flops, peak)` the share
    of the peak, and `profile.spans` what this rank's thread did. On a virtual mesh opened inside, that is rank 0's
    thread; all ranks are in the trace. In processes each rank profiles itself, to a path of its own. Warm up first: the
    first step of a mesh is checked, and the first call of a jitted step compiles. Profiling slows eager Python down,
    which shows as "other". Raises `FunctitanError` for a second profile at the same time: torch has one a process.

    >>> import functitan as ft, tempfile
    >>> x, w = torch.ones(2, 3), torch.ones(3, 4)
    >>> with tempfile.TemporaryDirectory() as folder, profile(f"{folder}/trace.json") as found:
    ...     _ = ft.einsum("batch embed, embed mlp -> batch mlp", x, w)
    >>> [span.name for span in found.spans if span.category == "user_annotation"]
    ['einsum batch embed, embed mlp -> batch mlp']
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise FunctitanError(report("ft.profile", [f"steps is {steps!r}"], "give the number of steps in its body"))
    if not _ONE_AT_A_TIME.acquire(blocking=False):
        raise FunctitanError(report("ft.profile", ["another one is running in this process"], _FIX))
    try:
        found = Profile(Path(path), steps)
        found.path.parent.mkdir(parents=True, exist_ok=True)
        cuda = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        every = _ExperimentalConfig(profile_all_threads=True)
        env = current().inside(_NAMING)
        inner = torch.profiler.profile(activities=activities, experimental_config=every)
        with inner, record_function(_WINDOW), using(env):
            yield found
            if cuda:
                torch.cuda.synchronize()
        inner.export_chrome_trace(str(path))
    finally:
        _ONE_AT_A_TIME.release()
    found._timeline = read(found.path)


def read(path: Path) -> Timeline:
    """The timeline of this rank in a trace that `profile` wrote: rank 0's thread, if the body opened a virtual mesh."""
    try:
        events = [event for event in parsed_json(_content(path))["traceEvents"] if event.get("ph") == "X"]
        window = next(event for event in events if event["name"] == _WINDOW and event["cat"] == "user_annotation")
        return _timeline(events, window)
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        problem = f"it is no whole trace: {type(error).__name__}: {str(error)[:200]}"
        raise FunctitanError(report(f"the trace {path}", [problem], "profile again")) from error


def _content(path: Path) -> bytes:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        return file.read()


def _timeline(events: list[dict[str, Any]], window: dict[str, Any]) -> Timeline:
    ranks = {event["tid"] for event in events if event["name"] == "rank 0" and event["cat"] == "user_annotation"}
    threads, own = ranks or {window["tid"]}, ("user_annotation", "cpu_op")
    order = sorted((event for event in events if event is not window), key=lambda event: (event["ts"], -event["dur"]))
    start = window["ts"]
    spans = tuple(_span(event, start) for event in order if event["cat"] in own and event["tid"] in threads)
    device = tuple(_span(event, start) for event in order if event["cat"] in _ON_DEVICE)
    kernels = any(span.category == "kernel" for span in device)
    return Timeline((0.0, window["dur"] * 1e-6), spans, device if kernels else ())


def _span(event: dict[str, Any], start: float) -> Span:
    first = (event["ts"] - start) * 1e-6
    return Span(event["name"], first, first + event["dur"] * 1e-6, event["cat"])


def _named(message: Message, x: Any, env: Any, start: Callable[..., Any]) -> Any:
    """Name the span of a message; of one that travels hidden, its start and its wait; of a receive, the wait."""
    if message.collective == "receive":
        pending = start(message, x)
        return pending._replace(wait=_spanned(message.name, pending.wait))
    with record_function(message.name):
        found = start(message, x)
        if message.collective == "send" or found is None:
            return found
        if not message.hidden:
            result = found()
            return lambda: result
    return _spanned(message.wait, found)


def _spanned(name: str, wait: Callable[[], Any]) -> Callable[[], Any]:
    def waits() -> Any:
        with record_function(name):
            return wait()

    return waits


_NAMING = Around(None, message=_named, span=record_function)
_WINDOW = "ft.profile"
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation")
_ONE_AT_A_TIME = threading.Lock()  # a second profiler ends the process (torch 2.13)
_FIX = "end it first; on a virtual mesh, profile around ft.simulate, or on one rank: if mesh.rank == 0"
