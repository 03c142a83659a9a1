"""The signal that ends a run, as a value that a loop can ask for.

Invariant: the handler does nothing but note the signal; what was installed before is put back.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from functitan.errors import FunctitanError, report


@contextmanager
def termination(*signals: int) -> Iterator[Callable[[], bool]]:
    """In the body, a function that tells whether one of `signals` (SIGTERM by default) came; they do not end a process.

    Raises `FunctitanError` outside of the main thread, where Python takes no handler: on a virtual mesh, whose ranks
    are threads, make it around `ft.simulate` and give it to each rank's `Manager`.

    >>> import os
    >>> with termination() as stop:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     stop()
    True
    """
    if threading.current_thread() is not threading.main_thread():
        fix = "write with ft.checkpoint.termination() as stop: around ft.simulate(...), and give Manager(stop=stop)"
        raise FunctitanError(report("ft.checkpoint.termination", ["this is not the process's main thread"], fix))
    seen = threading.Event()
    before = {number: signal.signal(number, lambda *_: seen.set()) for number in signals or (signal.SIGTERM,)}
    try:
        yield seen.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
