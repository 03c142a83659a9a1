"""What ranks of a pipeline tell each other: the messages of a schedule, sums over stages, and shared gradients.

Invariant: a sum over stages is taken in one order, so all who hold it have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from functitan.ops.replica import in_rows
from functitan.pipeline.edges import Spec
from functitan.sharding.env import Env
from functitan.sharding.mesh import Pending
from functitan.sharding.message import Label
from functitan.sharding.messages import post, receive
from functitan.sharding.moves import Step
from functitan.sharding.steps import run_step

_NAMES = {"F": "input", "B": "cotangent"}


def post_all(tensors: Sequence[Tensor], to: tuple[str, int, int], place: int, env: Env) -> list[Pending]:
    """Send what stage `to[1]` takes for a microbatch to its rank."""
    here = env._replace(phase="forward" if to[0] == "F" else "backward")
    return [post(x, place, here, _label(to)) for x in tensors]


def receive_all(specs: Sequence[Spec], at: tuple[str, int, int], source: int, env: Env) -> list[Pending]:
    """Make room for what stage `at[1]` takes for a microbatch."""
    return [receive(*spec, source, env, _label(at)) for spec in specs]


def over_stages(values: list[Tensor], env: Env) -> list[Tensor]:
    """The sums of tensors over all stages, in one all-reduce for each dtype."""
    if env.pipeline is None:
        return values
    step, everywhere = Step("all_reduce", ("pp",)), env.of_all_stages()
    return in_rows(values, lambda row: run_step(row, step, everywhere, Label("pipeline", "sums")))


def shared_sums(grads: dict[str, Tensor], holders: dict[str, tuple[int, ...]], env: Env) -> None:
    """Put the sum over its holders in the place of each gradient, by path, that several ranks hold."""
    if env.pipeline is None:
        return
    me, here = env.pipeline.place, env._replace(phase="backward")
    shared = sorted(path for path in grads if len(holders[path]) > 1)  # each rank's own dict has an order of its own
    sent = [
        post(grads[path], other, here, Label("pipeline", f"gradient of {path}"))
        for path in shared
        for other in holders[path]
        if other != me
    ]
    for path in shared:
        own, total = grads[path], None
        for other in holders[path]:
            label = Label("pipeline", f"gradient of {path}")
            part = own if other == me else receive(tuple(own.shape), own.dtype, own.device, other, here, label).wait()
            total = part.clone() if total is None else total.add_(part)
        assert total is not None
        grads[path] = total
    for pending in sent:
        pending.wait()


def _label(to: tuple[str, int, int]) -> Label:
    kind, stage, microbatch = to
    return Label("pipeline", f"{_NAMES[kind]} of stage {stage}, microbatch {microbatch}")
