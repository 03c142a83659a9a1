"""Random numbers that a rematerialized function draws from a generator with a state: its replay draws the same.

Invariant: a replay begins with every generator as forward found it, ends where forward ended or raises, and leaves all
as they were. Where states cannot be put back, in a capture and on threads that share them, a draw is an error.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._guards import detect_fake_mode  # private; tried on torch 2.13, as `random` does
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode

from functitan.errors import FunctitanError, report
from functitan.ops.function import peeled
from functitan.sharding.env import Env


class Source(NamedTuple):
    """One generator: its name in errors, its state as (what compares, what is put back), and the way to put it back."""

    name: str
    read: Callable[[], tuple[Any, Any]]
    write: Callable[[Any], Any]


class Drawn(NamedTuple):
    """The generators that moved while forward ran, and their states before and after."""

    sources: tuple[Source, ...] = ()
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()


def sources_of(own: Iterable[Any], tensors: Iterable[Tensor]) -> tuple[Source, ...]:
    """Torch's generators for the CPU and for the devices of these tensors, and those in `own`."""
    devices = {x.device for x in tensors if x.is_cuda}
    found = [_of_torch("torch's generator", torch.default_generator)]
    found += [
        _of_torch(f"torch's generator of {device}", torch.cuda.default_generators[device.index]) for device in devices
    ]
    return (*found, *(_own(generator) for generator in own))


def first_time(run: Callable[[], Any], sources: tuple[Source, ...], where: str) -> tuple[Any, Drawn]:
    """`run()` in forward, and what it drew. In a capture, which runs again, a draw of torch's raises."""
    traced = get_proxy_mode() is not None
    if not traced and detect_fake_mode() is not None:  # nothing is drawn
        return run(), Drawn()
    sources = tuple(source for source in sources if not (traced and "torch" in source.name))
    before = [source.read() for source in sources]
    with _Refusal(where, _IN_CAPTURE) if traced else nullcontext():
        result = run()
    after = [source.read() for source in sources]
    moved = [i for i, (was, now) in enumerate(zip(before, after, strict=True)) if not _equal(was[0], now[0])]
    at = lambda states: tuple(states[i] for i in moved)
    return result, Drawn(tuple(sources[i] for i in moved), at(before), at(after))


def again(run: Callable[[], Any], drawn: Drawn, env: Env, where: str) -> Any:
    """`run()` in the replay of what drew so. Raises `FunctitanError` where it does not draw the same."""
    if not drawn.sources:
        return run()
    if env.mesh is not None and env.mesh.transport.shares_a_process:
        return _undrawn(run, drawn, where)
    with unmoved(drawn.sources):
        for source, (_, state) in zip(drawn.sources, drawn.before, strict=True):
            source.write(state)
        result = run()
        ended = [source.read()[0] for source in drawn.sources]
    others = [
        f"from {source.name} its recomputation drew other numbers than its forward did"
        for source, was, then, now in zip(drawn.sources, drawn.before, drawn.after, ended, strict=True)
        if not (_equal(now, then[0]) or _equal(now, was[0]))  # as it began: what drew was stored, and did not run
    ]
    if others:
        raise FunctitanError(report(where, others, FIX_DRAWS))
    return result


@contextmanager
def unmoved(sources: tuple[Source, ...]) -> Iterator[None]:
    """Leave generators after the body as they were before."""
    states = [source.read()[1] for source in sources]
    try:
        yield
    finally:
        for source, state in zip(sources, states, strict=True):
            source.write(state)


def _undrawn(run: Callable[[], Any], drawn: Drawn, where: str) -> Any:
    """`run()`, which must draw nothing: threads move generators that others use, and that is how these moved."""
    others = [source for source in drawn.sources if "torch" not in source.name]
    before = [source.read()[0] for source in others]
    with _Refusal(where, _SHARED):
        result = run()
    moved = [source.name for source, was in zip(others, before, strict=True) if not _equal(source.read()[0], was)]
    if moved:
        problems = [f"it draws from {name}, {_SHARED}" for name in moved]
        raise FunctitanError(report(where, problems, FIX_DRAWS))
    return result


class _Refusal(TorchDispatchMode):
    """Raises at the first op of this thread that draws random numbers."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__()
        self.where, self.why = where, why

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if draws(func, args, kwargs or {}):
            problem = f"it draws random numbers by {func}, {self.why}"
            raise FunctitanError(report(self.where, [problem], FIX_DRAWS))
        return func(*args, **(kwargs or {}))


def draws(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True for a call of an op that draws random numbers; not of one that may drop out and is asked to drop nothing."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    rates = [given.get(name, defaults[name]) for name in ("dropout_p", "dropout", "p") if name in defaults]
    training = [given.get(name, defaults[name]) for name in ("train", "training") if name in defaults]
    if "attention" in str(func) or training:  # bernoulli's p is another
        return (not rates or any(rates)) and all(flag is not False for flag in training)
    return True


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def _of_torch(name: str, generator: torch.Generator) -> Source:
    def read() -> tuple[Any, Any]:
        state = peeled(generator.get_state())  # a transform around the caller wraps it
        return state, state

    return Source(name, read, generator.set_state)


def _of_numpy(generator: Any) -> Source:
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator._bit_generator

    def read() -> tuple[Any, Any]:
        return _comparable(bits.state), bits.state

    return Source("numpy's random numbers", read, lambda state: setattr(bits, "state", state))


def _comparable(state: Any) -> Any:
    """A state with bytes in place of arrays, which do not compare to one bool."""
    if isinstance(state, dict):
        return {name: _comparable(value) for name, value in state.items()}
    return state.tobytes() if isinstance(state, np.ndarray) else state


def _own(generator: Any) -> Source:
    if isinstance(generator, torch.Generator):
        return _of_torch("a torch.Generator", generator)
    if isinstance(generator, random.Random):
        python: random.Random = generator
        return Source("Python's random", lambda: (state := python.getstate(), state), python.setstate)
    return _of_numpy(generator)


_IN_CAPTURE = "which a captured step draws anew each time: its recomputation would draw others"
_SHARED = "which all ranks of a virtual mesh share: its recomputation would draw others"
FIX_DRAWS = "draw by ft.random or ft.dropout, from a key that is an argument: a recomputation draws the same"
