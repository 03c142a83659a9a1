"""The train step: a pure function from (state, batch) to (state, metrics).

Invariant: the loss function gives (sum, count) over the whole batch, and the step divides once, so masks, meshes and
accumulation do not change the loss. Patterns are static data of the state.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from functitan import random, tree
from functitan.capture.nodes import Capture
from functitan.declared import Declared, check_declared
from functitan.errors import FunctitanError, check_function, report
from functitan.frozen import trained
from functitan.ops.function import transforms_active
from functitan.optim import ClipState, GradientTransformation, apply_updates, loss_scale
from functitan.optim.finite import check_policy, guarded
from functitan.optim.kernels import transformed
from functitan.optim.loss_scale import judged
from functitan.optim.numbers import numbers_of
from functitan.optim.transform import check_transformations
from functitan.param import Param
from functitan.reached import Part, with_gradients_of
from functitan.sharding.context import current, spmd, using, within
from functitan.sharding.mesh import Mesh
from functitan.sharding.program import Checks
from functitan.sharding.rules import AxisRules
from functitan.state import TrainState, declared_state
from functitan.transforms.accumulate import accumulated
from functitan.transforms.beside import check_ways, part_of
from functitan.transforms.checked import Held, check_step, checked, held_in
from functitan.transforms.donate import TAKEN, check_donated, taken
from functitan.transforms.grad import reaching
from functitan.transforms.loss import check_loss, count_of, divisor, is_on_mesh, split_loss
from functitan.transforms.own_batch import check_batch


def train_step(
    loss_fn: Callable[..., Any] | None,
    tx: GradientTransformation,
    donate: bool = True,
    accumulate: int | None = None,
    *,
    gradients: AxisRules | None = None,
    value_and_grad: Callable[..., Any] | None = None,
    check: bool | str = "first",
    nonfinite: str = "raise",
    aux: tree.Tree = None,
    batch_patterns: tree.Tree = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
    """`step(state, batch) -> (state, metrics)` of `loss_fn(params, batch, key) -> (sum, count)`.

    Gradients are those of sum / count, both over the whole batch: on a mesh a count is `ft.count` of a tensor, or
    `ft.reduce` of a mask, and no number of Python. Where nothing counts, loss and gradients are 0. The function may
    give `((sum, count), aux)` too. `batch` holds this rank's shards (`ft.shard`). Metrics are tensors, equal on every
    rank: "loss", "count", "grad_norm" where the optimizer clips by it, "loss_scale" where it scales the loss
    (`ft.optim.dynamic_loss_scale`), and "aux" where there is one. With `donate` the state's buffers are updated in
    place, and whatever reads the old state raises `DonatedError`: clone what you keep. A leaf whose memory something
    else sees (a view, an array) is copied once, and that keeps its values. `accumulate` is the number of microbatches
    that the batch is computed in, with one reduction for each weight: see `ft.accumulate`, whose `aux` and
    `batch_patterns` these are, too: how values beside the loss are merged ("mean", "sum", "last"), and which leaves of
    the batch all examples share. `gradients` is the table for the layout of gradients, that of `ft.optim.stored(tx,
    rules=..., gradients=...)`: ZeRO-2. `value_and_grad` takes the gradients instead, and `loss_fn` is `None` then: a
    function `(params, batch, key, *, scale) -> ((loss, (count, aux)), grads)`, as `ft.pipeline.value_and_grad` makes
    one; where `scale` is not `None`, it is that of a scaled loss. Runs on the state's mesh unless called inside
    `ft.spmd`.

    Leaves that are frozen (`ft.trainable`), that the loss does not reach, or whose gradient is `None`, are left as they
    are, and so is their optimizer state: no decay moves them, as in `torch.optim`.

    `check`: in which steps ranks compare programs and values (`ft.checked`, `ft.check_equal`): the "first" that this
    function makes on a mesh, all (`True`), or none. Parameters, optimizer state, key, loss, count, aux and gradients
    must be equal where no axis is sharded; the batch's shards must have one shape, and not be the same on all ranks
    that should have parts of it. Of a captured step ranks compare the collectives, before its first
    run. `nonfinite`: with NaN or infinity in loss or gradients, on any rank, "raise" a `NonFiniteError` and leave the
    state as it was, valid; "skip" the update, so that only the state's step advances and the metric "skipped" is 1; or
    "ignore" it. The first two cost one pass over the gradients, an all-reduce of 4 bytes, and on an accelerator a wait
    for it. An optimizer that scales the loss skips by itself.

    >>> import functitan as ft
    >>> def loss(params, batch, key):
    ...     y = ft.einsum("batch embed, embed mlp -> batch mlp", batch, params["w"])
    ...     return ft.reduce("batch mlp ->", y * y), ft.count("batch mlp", y)
    >>> tx = ft.optim.sgd(0.1)
    >>> state = ft.TrainState.create({"w": ft.Param("embed mlp", (2, 3))}, tx, ft.random.key(0))
    >>> state, metrics = ft.train_step(loss, tx)(state, torch.ones(4, 2))
    >>> sorted(metrics), int(state.step)
    (['count', 'loss'], 1)
    """

    _check_given(loss_fn, value_and_grad, any(given is not None for given in (accumulate, gradients, aux)))
    check_transformations("ft.train_step", {"tx": tx})
    if check not in (True, False, "first"):
        raise FunctitanError(report("ft.train_step", [f"check is {check!r}"], "choose True, False or 'first'"))
    check_policy(nonfinite)
    check_ways(aux, "ft.train_step")
    seen: tuple[WeakSet[Any], WeakSet[Any]] = WeakSet(), WeakSet()  # of meshes that had their first step, or capture
    tells = {"zeros": False} if value_and_grad is not None and _tells_zeros(value_and_grad) else {}
    looked: list[Any] = []  # mesh dims for which the loss function's closure has been looked through
    parts: dict[Any, Part] = {}  # of states, by the structure of the gradients
    said: list[Declared] = []
    known: list[Any] = []  # structures of optimizer states that are this optimizer's

    def with_gradients(scale: Tensor | None, patterns: tree.Tree) -> Callable[..., Any]:
        if value_and_grad is not None:
            return partial(value_and_grad, scale=scale, **tells)

        def scaled(params: tree.Tree, batch: Any, key: Tensor) -> tuple[tuple[Tensor, Any], Any]:
            assert loss_fn is not None
            found = loss_fn(params, batch, key)
            (total, count), beside = split_loss(found, "ft.train_step", is_on_mesh(current()))
            return (total if scale is None else total * scale, count), beside

        if accumulate is not None or gradients is not None:
            k = 1 if accumulate is None else accumulate
            options: Any = dict(to_rules=gradients, zeros=False, looked=looked)
            return accumulated(scaled, k, patterns, aux=aux, batch_patterns=batch_patterns, **options)

        def of_trained(params: tree.Tree, batch: Any, key: Tensor) -> Any:
            mine = trained(params, patterns)

            def mean_loss(part: tree.Tree) -> tuple[Tensor, Any]:
                whole = part if mine is params else tree.put_back(part, params)
                (total, count), beside = scaled(whole, batch, key)
                counted = count_of(count, total)
                beside = None if beside is None else part_of(beside, aux, "ft.train_step", True, total)
                return total / divisor(counted), (counted, beside)

            return reaching(mean_loss, 0, True, lambda leaf: None)(mine)

        return of_trained

    with_gradients(None, None)  # so that a bad number is named here

    def run(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        if current().find(Checks) is not None:
            check_batch(batch, batch_patterns)
        key = random.fold_in(state.key, state.step)
        patterns = tree.map(_pattern_of, state.declarations)
        scale = loss_scale(state.opt_state)
        (loss, (count, aux)), grads = with_gradients(scale, patterns)(state.params, batch, key)
        apart = {} if scale is None else {"loss_scale": _apart(scale)}
        apart |= {} if aux is None else {"aux": tree.map(lambda x: _apart(x, state.params), aux)}
        if value_and_grad is not None:
            grads = trained(grads, patterns)  # it may have others too
        part = with_gradients_of(tx, state, grads, parts)
        old = part.params_of(state.params, grads), part.of(state.opt_state)
        loss = loss if scale is None else loss / scale
        if current().find(Checks) is not None:
            of_grads = held_in(grads, patterns, "gradients", gradients)
            check_step(_held(state, tx), loss, count, aux, of_grads)

        def update(donate: bool) -> tuple[tree.Tree, tree.Tree]:
            with taken(old, ("step {} of ft.train_step", state.step)) if donate else nullcontext(old) as (params, own):
                told = TAKEN if donate else False
                updates, own = tx.update(grads, own, params, patterns=patterns, donate=told)
                if scale is not None:
                    flags.update(judged(nonfinite, tx, apart["loss_scale"], own, loss, grads, state.step))
                return apply_updates(params, updates, donate=told), own

        policy, flags = nonfinite if scale is None else "ignore", dict[str, Tensor]()
        derived = current().differentiated or transforms_active()
        with using(current()._replace(phase="update")), nullcontext() if derived else torch.no_grad():
            seen = None if policy == "ignore" else (count, numbers_of(tx, old[1]))
            new, skipped = within("update", guarded, policy, loss, grads, state.step, old, update, donate, seen)
        metrics = {"loss": loss, "count": count, **_norms(new[1]), **apart, **skipped, **flags}
        params, opt_state = part.params_back(new[0], state.params), part.put_back(new[1], state.opt_state)
        return replace(state, params=params, opt_state=opt_state, step=state.step + 1), metrics

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        _check_state(state, tx, known)
        donated = OrderedDict(params=state.params, opt_state=state.opt_state)  # parameters first: errors list them so
        env = current()
        if not transforms_active():  # whose tensors have no storage
            check_donated(donated, "ft.train_step: the state")
        if transformed(x for x in tree.leaves((donated, batch)) if isinstance(x, Tensor)):
            if donate:
                raise FunctitanError(report("ft.train_step", [_OVERWRITES], "make the step with donate=False"))
            env = env._replace(differentiated=env.differentiated or not transforms_active())
        outer, capture = env.mesh, env.find(Capture)
        check_declared(state, "ft.train_step", said)
        due = _due(check, outer or state.mesh, seen[capture is not None])
        inner = checked(run) if due and capture is None else run
        if capture is not None:
            capture.compared = capture.compared or due
        inner = inner if outer is not None else spmd(inner, mesh=state.mesh, rules=state.rules)
        with using(env):
            return within("train_step", inner, state, batch)

    return step


def _pattern_of(param: Param) -> str | Param:
    """What a step says of a leaf: no more than its pattern, where that is all there is to say."""
    return param.pattern if param.pp is None and param.trainable else param


def _check_given(loss_fn: Any, value_and_grad: Any, otherwise: bool) -> None:
    if value_and_grad is None:
        return check_loss(loss_fn, "ft.train_step")
    check_function(value_and_grad, "ft.train_step: value_and_grad")
    problems = ["loss_fn is given too"] if loss_fn is not None else []
    problems += ["accumulate and gradients belong to loss_fn, and so does aux"] if otherwise else []
    if problems:
        fix = "write ft.train_step(None, tx, value_and_grad=...), or leave value_and_grad out"
        raise FunctitanError(report("ft.train_step: value_and_grad", problems, fix))


def _tells_zeros(value_and_grad: Callable[..., Any]) -> bool:
    """True for a function that can leave out the zeros of leaves that the loss does not reach."""
    try:
        return "zeros" in inspect.signature(value_and_grad).parameters
    except (TypeError, ValueError):  # one without a signature
        return False


def _due(check: bool | str, mesh: Mesh | None, seen: WeakSet[Any]) -> bool:
    """True if this step on `mesh` is checked; a mesh is known by one of its functions, which live as long as it."""
    if mesh is None or check != "first":
        return mesh is not None and bool(check)
    first = mesh.transport.agree not in seen
    seen.add(mesh.transport.agree)
    return first


def _held(state: TrainState, tx: GradientTransformation) -> list[Held]:
    """What ranks must begin a step with alike, where its declaration does not shard it."""
    declared = declared_state(tx, state.declarations, "ft.train_step")
    of_optimizer = held_in(state.opt_state, declared, "opt_state")
    return [*held_in(state.params, state.declarations, "params"), *of_optimizer, *held_in(state.key, None, "key")]


def _apart(x: Any, overwritten: tree.Tree = None) -> Any:
    """A metric as a tensor object of its own, which outlives the state that it may be a leaf of.

    `overwritten` leaves may share memory with it: the update sees that, and copies; a graph must be told.
    """
    if not isinstance(x, Tensor):
        return x
    memory = lambda x: x.untyped_storage()._cdata
    copied = current().is_captured and any(memory(x) == memory(leaf) for leaf in tree.leaves(overwritten))
    return x.clone() if copied else x.detach()


def _norms(opt_state: Any) -> dict[str, Tensor]:
    """The gradient's norm, where a clip measured it."""
    if isinstance(opt_state, ClipState):
        return {"grad_norm": _apart(opt_state.norm)}
    inside = map(_norms, opt_state) if isinstance(opt_state, tuple) else ()
    return next((norms for norms in inside if norms), {})


def _check_state(state: Any, tx: GradientTransformation, known: list[Any]) -> None:
    if not isinstance(state, TrainState):
        raise FunctitanError(
            report("ft.train_step", [f"state is a {type(state).__name__}"], "make one by ft.TrainState.create")
        )
    structure = tree.flatten(state.opt_state)[1]
    if structure not in known:
        problems = tree.mismatches(
            declared_state(tx, state.declarations, "ft.train_step"),
            state.opt_state,
            "this optimizer's state",
            "the state's",
        )
        if problems:
            fix = "give ft.TrainState.create and ft.train_step the same optimizer"
            raise FunctitanError(report("ft.train_step: the optimizer state", problems, fix))
        known.append(structure)


_OVERWRITES = "it is differentiated, or under vmap: the values that donate=True overwrites are needed there"
