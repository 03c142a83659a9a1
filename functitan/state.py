"""The training state: one tree of this rank's shards, and what its leaves are.

Invariant: declarations, mesh and rules are static data of the state, which say how each leaf lies; no leaf is a handle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from functitan import random, tree
from functitan.errors import FunctitanError, report
from functitan.frozen import is_trained, trained
from functitan.optim import GradientTransformation
from functitan.optim.transform import check_transformations
from functitan.param import Param, constant
from functitan.sharding.context import as_mesh
from functitan.sharding.init import check_declarations, initial
from functitan.sharding.layout import table_of
from functitan.sharding.mesh import Mesh
from functitan.sharding.rules import AxisRules


@dataclass(frozen=True)
class TrainState:
    """Parameters, optimizer state, step and key: one tree of this rank's shards. Static: declarations, mesh and rules.

    >>> import functitan as ft
    >>> state = TrainState.create({"w": ft.Param("embed mlp", (2, 3))}, ft.optim.sgd(0.1), ft.random.key(0))
    >>> state.params["w"].shape, int(state.step)
    (torch.Size([2, 3]), 0)
    """

    params: tree.Tree
    opt_state: tree.Tree
    step: Any  # int64, 0-d
    key: Any  # int64 [2]
    declarations: tree.Tree
    mesh: Mesh | None = None
    rules: AxisRules | None = None
    opt_declarations: tree.Tree = None

    @staticmethod
    def create(
        declarations: tree.Tree,
        tx: GradientTransformation,
        key: Tensor,
        *,
        mesh: Mesh | DeviceMesh | None = None,
        rules: AxisRules | None = None,
    ) -> TrainState:
        """Initial parameters and optimizer state on this rank; the step folds its number into `key` for randomness.

        The optimizer state is what `tx.init` declares of the leaves that are trained (`ft.trainable`): a tree of
        `Param`. Raises `FunctitanError` where all are frozen.
        To begin from other values, as of a file, put them in as shards of declared dtypes,
        `dataclasses.replace(state, params=...)`: a step checks.
        """
        known = as_mesh(mesh)
        check_transformations("ft.TrainState.create", {"tx": tx})
        check_declarations(declarations, key, known, rules, "ft.TrainState.create")
        _check_tables(declarations)
        of_optimizer = declared_state(tx, declarations, "ft.TrainState.create")
        check_declarations(of_optimizer, key, known, rules, "ft.TrainState.create: the optimizer state")
        of_params, of_steps = random.split(key)
        params = initial(declarations, of_params, known, rules, "ft.TrainState.create")
        step = torch.zeros((), dtype=torch.int64, device=key.device)
        opt_state = initial(of_optimizer, of_params, known, rules, "ft.TrainState.create: the optimizer state")
        return TrainState(params, opt_state, step, of_steps, declarations, known, rules, of_optimizer)

    @staticmethod
    def declare(
        declarations: tree.Tree,
        tx: GradientTransformation,
        key: Tensor,
        *,
        mesh: Mesh | DeviceMesh | None = None,
        rules: AxisRules | None = None,
    ) -> TrainState:
        """The state as declarations: every leaf of params and optimizer state a `Param`. Nothing is allocated.

        What `ft.explain` takes, and `ft.checkpoint.restore` as `like`, to make the state on this mesh.
        """
        of_optimizer = declared_state(tx, declarations, "ft.TrainState.declare")
        step = torch.zeros((), dtype=torch.int64, device=key.device)
        return TrainState(declarations, of_optimizer, step, key, declarations, as_mesh(mesh), rules, of_optimizer)

    def declared(self) -> TrainState:
        """This state with the declaration of each leaf in its place; step and key, whole on every rank, as they are."""
        return replace(self, params=self.declarations, opt_state=self.opt_declarations)


def declared_state(tx: GradientTransformation, declarations: tree.Tree, where: str) -> tree.Tree:
    """The optimizer state as declarations: of the trained leaves, as if there were no others.

    A rank of a pipeline may have none; what counts steps is declared there too.
    """
    leaves = tree.leaves(declarations)
    if leaves and not any(is_trained(leaf) or leaf.pp is not None for leaf in leaves):
        problem = f"none of {len(leaves)} leaves is trained"
        raise FunctitanError(report(where, [problem], "name what is trained: ft.trainable(declarations, 'lora.*')"))
    return of_leaves(tx, trained(declarations, declarations))


def of_leaves(tx: GradientTransformation, declarations: tree.Tree) -> tree.Tree:
    """`tx.init` of declarations, whose scalars are declared where there is no leaf to lie beside."""
    declared = lambda x: Param("", (), constant(x.item()), x.dtype) if isinstance(x, Tensor) else x
    found = tx.init(declarations)
    return found if tree.leaves(declarations) else tree.map(declared, found)


def _check_tables(declarations: tree.Tree) -> None:
    if not tree.leaves(declarations):
        fix = "declare what is trained, as in {'w': ft.Param('embed mlp', (256, 768))}"
        raise FunctitanError(report("ft.TrainState: the declarations", ["the tree has no leaves"], fix))
    own = [
        f"{path} has rules of its own"
        for path, leaf in zip(tree.paths(declarations), tree.leaves(declarations), strict=True)
        if table_of(leaf, None) is not None
    ]
    if own:
        fix = "only optimizer state may be stored under another table than the program's: optim.stored(tx, rules=...)"
        raise FunctitanError(report("ft.TrainState.create: the parameters", own, fix))


@dataclass(frozen=True)
class _Static:
    """Declarations as static data, which a structure compares."""

    tree: tree.Tree


tree.register(
    TrainState,
    lambda state: (
        (state.params, state.opt_state, state.step, state.key),
        (_Static((state.declarations, state.opt_declarations)), state.mesh, state.rules),
        ("params", "opt_state", "step", "key"),
    ),
    lambda static, children: TrainState(
        *children,
        declarations=static[0].tree[0],
        mesh=static[1],
        rules=static[2],
        opt_declarations=static[0].tree[1],
    ),
)
