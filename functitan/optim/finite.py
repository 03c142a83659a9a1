"""NaN and infinity in what a step is about to do: its loss, count, gradients, and the numbers of its update.

Invariant: all ranks decide alike, by one all-reduce of one flag; which leaves are bad is worked out only once some are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functitan import tree
from functitan.capture.nodes import Capture
from functitan.errors import FunctitanError, NonFiniteError, report
from functitan.ops.function import is_batched, transforms_active
from functitan.optim.kernels import extremes
from functitan.optim.numbers import Numbers
from functitan.sharding.collectives import all_reduce
from functitan.sharding.context import current, using
from functitan.sharding.ledger import Ledger
from functitan.sharding.message import Label
from functitan.sharding.moves import Step
from functitan.sharding.steps import run_step

POLICIES = ("raise", "skip", "ignore")


def check_policy(policy: str) -> None:
    """Raise `FunctitanError` if there is no such policy."""
    if policy not in POLICIES:
        raise FunctitanError(
            report("ft.train_step", [f"nonfinite is {policy!r}"], "choose 'raise', 'skip' or 'ignore'")
        )


def guarded(
    policy: str,
    loss: Tensor,
    grads: tree.Tree,
    step: Any,
    old: Any,
    update: Callable[[bool], Any],
    donate: bool,
    seen: tuple[Tensor, Numbers | None] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """(`update(donate)`, metrics) where all that a step is about to use is finite; else as the policy says.

    That is the loss, the gradients, and what is `seen`: the count, which is not negative either, and the numbers of the
    update. "raise": `NonFiniteError` on every rank, before the update writes anything. "skip": `old`, and 1 as the
    metric "skipped", which is else 0. "ignore" looks at nothing. Where an optimizer does not tell its numbers (`None`),
    the update runs without donation, and what it made is looked at, too.
    """
    if policy == "ignore":
        return update(donate), {}
    count, numbers = (None, []) if seen is None else seen
    beside = {} if count is None else {"count": torch.where(count < 0, torch.nan, count)}  # a climb would follow
    beside |= {name: _wide(number, loss) for name, number in numbers or ()}
    made: dict[str, Tensor] = {}
    if numbers is None:
        new = update(False)
        made = {f"the update's {path}": x for path, x in zip(tree.paths(new), tree.leaves(new), strict=True)}
        made = {name: x for name, x in made.items() if x.is_floating_point() or x.is_complex()}
        update = lambda donate: new
    bad = any_nonfinite([loss, grads, *beside.values(), *made.values()])
    capture = current().find(Capture)
    if policy == "raise" and is_batched(bad):
        problem = "nonfinite is 'raise', which reads one value, and under vmap there are many"
        raise FunctitanError(report("ft.train_step", [problem], "choose 'skip' or 'ignore'"))
    if policy == "raise":
        if capture is not None:  # who runs the graph raises, and leaves what is donated as it was
            capture.failures.append((bad, _captured))
        else:
            refuse(bad, loss, grads, step, beside, made, count)
        return update(donate), {}
    return _unless(bad, old, update, donate), {"skipped": bad.to(torch.int64)}


def any_nonfinite(values: tree.Tree) -> Tensor:
    """bool `[]`, equal on all ranks: True if a leaf of some rank has a NaN or an infinity.

    >>> any_nonfinite({"a": torch.ones(2), "b": torch.tensor([3e38, torch.inf])})
    tensor(True)
    """
    bad = ~extremes(tree.leaves(values)).isfinite().all()
    return _over_ranks(bad.to(torch.float32), quiet=False) > 0


def refuse(
    bad: Tensor,
    loss: Tensor,
    grads: tree.Tree,
    step: Any,
    beside: dict[str, Tensor],
    made: dict[str, Tensor],
    count: Tensor | None = None,
    fix: str = "",
) -> None:
    """Raise `NonFiniteError` if `bad`, listing values in order, whichever rank has the bad shard."""
    if not _is_value(bad) or not bad.item():
        return
    of_grads = zip((f"gradients.{path}" for path in tree.paths(grads)), tree.leaves(grads), strict=True)
    values = {"loss": loss, **dict(of_grads), **beside, **made}
    kinds = [torch.stack([x.isnan().any(), x.isinf().any()]) for x in values.values()]
    of_all = _over_ranks(torch.stack(kinds).to(torch.float32), quiet=True, stages=False).bool().tolist()
    names = [" and ".join(kind for kind, has in zip(("NaN", "infinity"), row, strict=True) if has) for row in of_all]
    found = {name: kind for name, kind in zip(values, names, strict=True) if kind}
    if count is not None and count < 0:
        found["count"] = f"{count.item():g}, less than 0"
    lines = [f"{name}: {kind}" for name, kind in found.items()]
    of = len([name for name in values if name in found or name not in beside])
    number = len(lines)
    lines = lines or ["those of another pipeline stage, whose ranks name them"]
    lines[_SHOWN:] = [f"and {number - _SHOWN} more"] if number > _SHOWN else []
    where = f"step {int(step)} of ft.train_step, loss {loss.item():g}: {number} of {of} values are not finite"
    raise NonFiniteError(report(where, lines, fix + _FIX))


def _wide(number: Any, like: Tensor) -> Tensor:
    """A number `[]` in float32, or wider as the loss: what is more than that is infinite in an update."""
    return torch.as_tensor(number, device=like.device).to(torch.promote_types(like.dtype, torch.float32))


def _unless(skip: Tensor, old: Any, update: Callable[[bool], Any], donate: bool) -> Any:
    """`old` where `skip`, else `update(donate)`, which may overwrite `old`.

    The flag is read before the update runs, so that nothing is copied. A traced program cannot branch on it: it
    computes both and chooses.
    """
    if _is_value(skip):
        return old if skip.item() else update(donate)
    mesh = current().mesh
    if mesh is not None and not mesh.transport.has_values:
        return update(donate)  # predicts a step that is not skipped
    return tree.map(lambda x, y: torch.where(skip, x, y), old, update(False))


def _over_ranks(x: Tensor, quiet: bool, stages: bool = True) -> Tensor:
    """The maximum over all ranks, or this pipeline stage's; `quiet`: after an error, which no prediction knows."""
    env = current().of_all_stages() if stages else current()
    dims = tuple(dim for dim, n in env.mesh.shape.items() if n > 1) if env.mesh is not None else ()
    env = (env.without(Ledger) if quiet else env)._replace(phase="update")
    if dims and transforms_active():
        with using(env):
            return all_reduce(x, dims, "max")
    return run_step(x, Step("all_reduce", dims), env, Label("nonfinite", ""), "max") if dims else x


def _is_value(x: Tensor) -> bool:
    """True for a tensor whose value can be read: not a fake or traced one, nor the values of a vmap."""
    return type(x) is Tensor and not is_batched(x)


def _captured() -> NonFiniteError:
    problem = "the loss or a gradient is not finite, or the count, or the learning rate"
    return NonFiniteError(
        report("a captured step of ft.train_step", [problem], f"{_FIX}; without ft.jit the leaves are named")
    )


_SHOWN = 8
_FIX = (
    "the state is as before this step: lower the learning rate or clip, look at the batch; "
    "nonfinite='skip' leaves such steps out, 'ignore' takes them"
)
