"""Optimizer state under a rules table of its own: ZeRO-1 and ZeRO-2.

Invariant: a transformation runs as if its table were the program's; what comes in is moved there, its updates back.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from functitan import tree
from functitan.ops.move import reshard
from functitan.optim.numbers import numbers_of, telling
from functitan.optim.patterns import leaves_of
from functitan.optim.transform import GradientTransformation, State, check_transformations, donating
from functitan.param import Param
from functitan.sharding.context import current, using
from functitan.sharding.rules import AxisRules


def stored(
    transformation: GradientTransformation, *, rules: AxisRules, gradients: AxisRules | None = None
) -> GradientTransformation:
    """A transformation whose state lies under `rules`, and whose arithmetic runs there; on no mesh, itself.

    Parameters that the program's table keeps whole over `dp` need not be so in the optimizer: with `rules` that shard
    them over `dp` too, each rank keeps and updates its part of the moments. Gradients and parameters are sliced, which
    is free, and the updates are all-gathered, once for each weight: ZeRO-1. `gradients` is the table under which the
    gradients come (default: the program's); with `gradients=rules` they were reduce-scattered straight to where the
    state lies, and clip_by_global_norm belongs inside: ZeRO-2. Rajbhandari et al., arXiv:1910.02054.

    The state of declarations is declared under `rules` (`Param.rules`), so `ft.TrainState.create`, `ft.explain` and
    `ft.unshard` of `tx.init(declarations)` know how it lies.

    >>> import functitan as ft
    >>> table = ft.AxisRules({"batch": "dp", "embed": None, "mlp": None})
    >>> tx = stored(ft.optim.adamw(1e-3), rules=table.replace(embed="dp"))
    >>> declared = {"w": ft.Param("embed mlp", (64, 256))}
    >>> tx.init(declared)[0].mu["w"].rules
    AxisRules({'batch': 'dp', 'embed': 'dp', 'mlp': None})
    """
    check_transformations("stored", {"transformation": transformation})

    def init(params: tree.Tree) -> State:
        return tree.map(lambda x: _under(rules, x), transformation.init(params))

    @donating
    def update(updates, state, params=None, patterns=None, donate=False):
        env = current()._replace(phase="update")
        if env.mesh is None:
            return transformation.update(updates, state, params, patterns=patterns, donate=donate)
        own = env._replace(rules=rules)
        leaves_of("stored", updates, patterns, own)
        with using(env if gradients is None else env._replace(rules=gradients)):
            updates = reshard(updates, patterns, to_rules=rules)
        with using(env):
            params = None if params is None else reshard(params, patterns, to_rules=rules)
        with using(own):
            updates, state = transformation.update(updates, state, params, patterns=patterns, donate=donate)
            assert env.rules is not None
            return reshard(updates, patterns, to_rules=env.rules), state

    return telling(GradientTransformation(init, update), lambda state: numbers_of(transformation, state))


def _under(rules: AxisRules, x: Param | Tensor) -> Param | Tensor:
    return replace(x, rules=rules) if isinstance(x, Param) and x.rules is None else x
