"""Every mistake of the table gets its whole text, at once: nothing is allocated, sent, or waited for."""

from __future__ import annotations

import importlib
import pkgutil
import time
from textwrap import dedent

import pytest
import torch
import user_errors
from torch.utils._python_dispatch import TorchDispatchMode

import functitan as ft

TABLE = {
    f"{name}: {what}": mistake
    for _, name, _ in pkgutil.iter_modules(user_errors.__path__)
    if name != "given"
    for what, mistake in importlib.import_module(f"user_errors.{name}").MISTAKES.items()
}
SECONDS = 4.0  # a hang ends after minutes; the first read of a file, on a busy machine, has taken 1.1 s


class Allocations(TorchDispatchMode):
    """The ops whose results have memory of their own, more than a key's: views of what there is have not.

    A train step folds its number into its key, two integers, before it runs the loss function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in ft.tree.leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in ft.tree.leaves(out) if isinstance(x, torch.Tensor)]
        if any(x.numel() > 2 and x.untyped_storage()._cdata not in known for x in made):
            self.found.append(str(func))
        return out


with Allocations():  # torch imports much at the first view under a dispatch mode
    torch.ones(2)[:1]


def test_the_table_is_long():
    assert len(TABLE) >= 100


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_gets_one_clear_error_before_anything_happens(name):
    call, kind, text = TABLE[name]
    start = time.monotonic()
    with ft.record() as ledger, Allocations() as allocations, pytest.raises(kind) as error:
        call()
    assert time.monotonic() - start < SECONDS
    assert str(error.value) == dedent(text)
    assert type(error.value) is kind and isinstance(error.value, ValueError)
    assert not allocations.found and len(ledger) == 0
