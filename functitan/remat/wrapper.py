"""`ft.remat`: a function that keeps its arguments for backward, and computes the rest again.

Invariant: the backward of a rematerialized function is one itself, so no derivative of any order keeps what the
function computed. The function runs below all transforms; its recomputation reads only what the call kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from functitan.errors import FunctitanError, report
from functitan.ops.autocast import replayed
from functitan.ops.function import transforms_active
from functitan.remat.draws import sources_of
from functitan.remat.memo import Memo
from functitan.remat.policies import Budget, Policy, check_policy, everything_saveable, nothing_saveable
from functitan.remat.region import apply_region, recorded
from functitan.sharding.context import current, using
from functitan.transforms.closures import GENERATORS, problems_and_generators
from functitan.transforms.flat import join, of_tensors, split


def remat(fn: Callable[..., Any], *, policy: Policy | Budget = nothing_saveable, offload: bool = False) -> Any:
    """`fn`, which stores for backward its arguments and what `policy` says, and computes the rest again there.

    The policies are `ft.remat_policies`: `nothing_saveable` (the default), `dots_saveable`, `everything_saveable`,
    `save_only_these_names("attn_out")` for what `ft.checkpoint_name` named, `budget(bytes)`; or a function of a
    `remat_policies.Made`. They choose among results of named ops. `offload=True` moves what the policy stores to host
    memory in forward, and back in backward. For every k-th layer only: `ft.remat(block) if i % k == 0 else block`.

    Values and gradients are those of `fn`, under every transform and in a captured step, where the recomputation stays
    apart from forward. Randomness from keys replays exactly, and so does what torch's generators draw, and others that
    the function's own code names; in a captured step and on a virtual mesh those raise. Arguments and results are
    trees; leaves that are no tensors are static. Collectives of the recomputation are `recomputed` in the ledger, in
    phase "backward".

    Raises `FunctitanError` for a tensor that `fn` closes over and that is differentiated: it would get no gradient.
    Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.

    >>> import torch, functitan as ft
    >>> block = remat(lambda w, x: torch.tanh(w * x).sum())
    >>> ft.grad(block)(torch.zeros(2), torch.ones(2))
    tensor([1., 1.])
    """
    where = f"ft.remat of {getattr(fn, '__qualname__', repr(fn))}"
    check_policy(policy, where)
    if policy is everything_saveable:
        return fn
    plans: dict[Any, Any] = {}  # of a budget, by the shapes it was made for

    @functools.wraps(fn)
    def rematerialized(*args: Any, **kwargs: Any) -> Any:
        tensors, form = split((args, kwargs))  # backward keeps no tensors by the form
        env, generators = current(), []
        if transforms_active() or torch.is_grad_enabled():
            problems, generators = problems_and_generators(fn)
            if problems:
                raise FunctitanError(report(where, problems, FIX_CLOSURE))
        if not transforms_active() and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            with using(env.without(Memo)):  # of a remat around this one
                return fn(*args, **kwargs)
        again = replayed(fn)
        flat, result = of_tensors(lambda given: again(*given[0], **given[1]), form)
        kind = form.structure, tuple((type(leaf), leaf) for leaf in form.leaves)
        generators += [leaf for leaf in form.leaves if isinstance(leaf, GENERATORS)]
        sources = sources_of(generators, tensors)
        region = recorded(flat, policy, offload, env, where, sources, functools.partial(_planned, plans, kind))
        values = apply_region(region, tensors)
        return join(result[0], values)

    return rematerialized


def _planned(plans: dict[Any, Any], call: Any, shapes: Any, plan: Callable[[], Any]) -> Any:
    """A budget's choice for calls of one kind, made once."""
    key = (call, shapes)
    try:
        hash(key)
    except TypeError:  # a static argument that cannot be compared
        return plan()
    if key not in plans:
        plans[key] = plan()
    return plans[key]


FIX_CLOSURE = "pass it as an argument: ft.remat(lambda w, x: ...)(w, x)"
