"""The leaves of a state beside its declarations: structure, shapes and dtypes, as a step finds them.

Invariant: no value is read, and nothing is remembered but what declarations say; a step asks anew for every leaf.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from functitan import tree
from functitan.errors import FunctitanError, report
from functitan.sharding.context import current
from functitan.sharding.layout import check_leaves, local_shape
from functitan.sharding.mesh import Mesh
from functitan.sharding.rules import AxisRules

if TYPE_CHECKING:
    from functitan.state import TrainState

Kind = tuple[tuple[int, ...], torch.dtype]
_KEPT = 8  # states of one step function, as of a GAN


class Declared(NamedTuple):
    """What the declarations of a state say of this rank's leaves."""

    of: tuple[Any, ...]  # declarations of parameters and of optimizer state, mesh, rules
    structure: Any
    kinds: list[Kind]


def check_declared(state: TrainState, what: str, known: list[Declared]) -> None:
    """Raise `FunctitanError` that lists each leaf of another shape or dtype than declared, before anything runs.

    `known` keeps what declarations said before.
    """
    env = current().of_all_stages()
    mesh, rules = (state.mesh, state.rules) if env.mesh is None else (env.mesh, env.rules)
    if mesh is not None and not mesh.transport.has_values:
        return
    of = state.declarations, state.opt_declarations, mesh, rules
    declared = next((one for one in known if all(a is b for a, b in zip(one.of, of, strict=True))), None)
    if declared is None:
        declared = _declared(of, mesh, rules)
        known[:] = [declared, *known[: _KEPT - 1]]
    leaves, structure = tree.flatten(_values(state))
    try:
        if structure == declared.structure and [(x.shape, x.dtype) for x in leaves] == declared.kinds:
            return
    except AttributeError:  # of what is no tensor
        pass
    raise FunctitanError(report(f"{what}: the state is not what it declares", _problems(state, declared), _FIX))


def _values(state: TrainState) -> tree.Tree:
    return {"params": state.params} | ({} if state.opt_declarations is None else {"opt_state": state.opt_state})


def _of(declarations: Any, opt_declarations: Any) -> tree.Tree:
    return {"params": declarations} | ({} if opt_declarations is None else {"opt_state": opt_declarations})


def _declared(of: tuple[Any, ...], mesh: Mesh | None, rules: AxisRules | None) -> Declared:
    trees = _of(*of[:2])
    leaves, structure = tree.flatten(trees)
    shapes = [param.shape for param in leaves]
    if mesh is not None and rules is not None:
        named = list(zip(tree.paths(trees), leaves, shapes, strict=True))
        layouts = check_leaves("the state's declarations", named, rules, mesh.sizes)
        shapes = [
            shape if layout is None else local_shape(layout, shape, mesh.sizes)
            for shape, layout in zip(shapes, layouts, strict=True)
        ]
    return Declared(of, structure, [(shape, param.dtype) for shape, param in zip(shapes, leaves, strict=True)])


def _problems(state: TrainState, declared: Declared) -> list[str]:
    values, trees = _values(state), _of(*declared.of[:2])
    if problems := tree.mismatches(trees, values, "the declarations", "the state"):
        return problems
    each = zip(tree.paths(trees), tree.leaves(values), declared.kinds, strict=True)
    found = [(path, _described(x), _kind(*kind)) for path, x, kind in each]
    return [f"{path} is {its}, and is declared {kind}" for path, its, kind in found if its != kind]


def _described(x: Any) -> str:
    return _kind(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else f"a {type(x).__name__}"


def _kind(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


_FIX = (
    "put in this rank's shards in the declared dtypes, as by from_huggingface(..., dtype=torch.float32) or "
    "ft.tree.map(lambda x: x.float(), params); or declare what they are, ft.Param(..., dtype=torch.bfloat16), and make "
    "the state by ft.TrainState.create"
)
