"""The surroundings in force: what functions run in, and the ways to enter others.

Invariant: one context variable holds them, and nothing else of the package does; an op reads it when it is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from functitan.errors import MeshError, check_function, report
from functitan.sharding.distributed import mesh_of
from functitan.sharding.env import Env
from functitan.sharding.ledger import Ledger, entering
from functitan.sharding.mesh import Mesh
from functitan.sharding.rules import AxisRules, check_rules

_CURRENT: ContextVar[Env] = ContextVar("functitan", default=Env())  # noqa: B039 (an Env is immutable)


def current() -> Env:
    """The surroundings of the caller."""
    env = _CURRENT.get()
    if env.around and any(each.called is not None for each in env.around):
        return env._replace(around=tuple(each if each.called is None else each.called() for each in env.around))
    return env


def within(name: str, fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, as a span of this name where a profile is on."""
    for each in _CURRENT.get().around:
        if each.span is not None:
            with each.span(name):
                return fn(*args)
    return fn(*args)


@contextmanager
def using(env: Env) -> Iterator[Env]:
    """Run the body in these surroundings."""
    token = _CURRENT.set(env)
    try:
        yield env
    finally:
        _CURRENT.reset(token)


def spmd(
    fn: Callable[..., Any], *, mesh: Mesh | DeviceMesh | None, rules: AxisRules | None = None
) -> Callable[..., Any]:
    """A function that runs `fn` where named ops know the mesh and the rules.

    Tensors are local shards: `ft.shard` makes them from global values, `ft.init` from declarations. Without a mesh the
    function is `fn` as plain PyTorch. Raises `MeshError` and `RulesError` before anything runs.

    >>> import torch, functitan as ft
    >>> rules = ft.AxisRules({"batch": "dp", "embed": None})
    >>> def mean(mesh, x):
    ...     x = ft.shard(x, "batch embed", mesh=mesh, rules=rules)
    ...     return ft.spmd(lambda x: ft.reduce("batch embed ->", x, op="mean"), mesh=mesh, rules=rules)(x)
    >>> ft.simulate(dp=2)(mean)(torch.arange(8.0).view(4, 2))
    [tensor(3.5000), tensor(3.5000)]
    """
    check_function(fn, "ft.spmd")
    known = as_mesh(mesh)
    if rules is not None or known is not None:
        if not isinstance(rules, AxisRules):
            raise MeshError(report("ft.spmd", [f"rules is {rules!r}"], "give a table: rules=ft.AxisRules({...})"))
        if known is not None:
            check_rules(rules, known.sizes)

    @functools.wraps(fn)
    def inside(*args: Any, **kwargs: Any) -> Any:
        env = _CURRENT.get()
        outer = env.of_all_stages().mesh
        planned = outer is not None and not outer.transport.has_values and known is not None
        with using(env if planned else env.on(known, rules)):
            return fn(*args, **kwargs)

    return inside


@contextmanager
def record() -> Iterator[Ledger]:
    """Record the collectives that run in the body: a `Ledger`, to be held against `ft.explain`.

    On a virtual mesh opened inside the body, those of rank 0 are recorded.
    """
    ledger = Ledger("recorded")
    with using(current().without(Ledger).inside(entering(ledger))):
        yield ledger


def as_mesh(mesh: Mesh | DeviceMesh | None) -> Mesh | None:
    """A rank's `Mesh` of what users call a mesh: a `DeviceMesh`, a virtual mesh, or `None`."""
    if mesh is None or isinstance(mesh, Mesh):
        return mesh
    if isinstance(mesh, DeviceMesh):
        return mesh_of(mesh)
    problem = f"{mesh!r} is a {type(mesh).__name__}"
    raise MeshError(
        report("mesh", [problem], "make one by ft.make_mesh(fsdp=2, tp=2), or run under ft.simulate(fsdp=2, tp=2)")
    )
