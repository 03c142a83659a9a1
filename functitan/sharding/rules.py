"""The table that maps axis names to mesh dims.

Invariant: a table is an immutable, ordered value; an earlier rule takes a mesh dim before a later one, for each tensor
anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache

from functitan.errors import RulesError, nearest, report
from functitan.sharding.mesh import MeshSizes, check_dim

Dims = tuple[str, ...]


class AxisRules:
    """An ordered table from axis name to mesh dims: one name, a tuple of them outermost first, or `None`.

    `None` is written down: such an axis is whole on every rank. One table serves parameters and activations.

    >>> rules = AxisRules({"batch": ("dp", "fsdp"), "mlp": "tp", "embed": "fsdp", "head_dim": None})
    >>> rules["mlp"], rules["head_dim"]
    (('tp',), ())
    >>> rules.replace(embed=None)
    AxisRules({'batch': ('dp', 'fsdp'), 'mlp': 'tp', 'embed': None, 'head_dim': None})
    """

    __slots__ = ("_hash", "_rules")

    def __init__(self, rules: Mapping[str, str | Dims | None]):
        if not isinstance(rules, Mapping):
            raise RulesError(report("AxisRules", [f"a {type(rules).__name__} is no table"], _FIX_TABLE))
        problems = [problem for name, dims in rules.items() for problem in _problems(name, dims)]
        if problems:
            raise RulesError(report("AxisRules", problems, _FIX_TABLE))
        self._rules = {name: _as_tuple(dims) for name, dims in rules.items()}
        self._hash = hash(tuple(self._rules.items()))

    def __getitem__(self, name: str) -> Dims:
        return self._rules[name]

    def __contains__(self, name: str) -> bool:
        return name in self._rules

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def items(self):
        """The rules in their order, each as (name, tuple of mesh dims)."""
        return self._rules.items()

    def replace(self, **rules: str | Dims | None) -> AxisRules:
        """Another table: given names keep their place in the order, new ones go to its end."""
        return AxisRules({**self._rules, **rules})

    def without(self, dims: Dims) -> AxisRules:
        """The table in which no axis takes any of these mesh dims."""
        return _without(self, dims)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AxisRules) and list(self._rules.items()) == list(other._rules.items())

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        short = {
            name: (None if not dims else dims[0] if len(dims) == 1 else dims) for name, dims in self._rules.items()
        }
        return f"AxisRules({short!r})"


@cache
def idle_dims(rules: AxisRules, mesh: MeshSizes) -> str:
    """What is wrong where no rule uses some mesh dims, whose ranks repeat each other's work; else the empty string.

    `pp` has no rule: its ranks run different stages.

    >>> idle_dims(AxisRules({"batch": "dp"}), MeshSizes(("dp", "ep"), (2, 4)))
    "'ep' (4 ranks) is used by no rule: 8 ranks do the work of 2"
    """
    used = {"pp", *(dim for _, dims in rules.items() for dim in dims)}
    idle = [dim for dim, n in zip(*mesh, strict=True) if n > 1 and dim not in used]
    if not idle:
        return ""
    names = " and ".join(f"{dim!r} ({mesh.size(dim)} ranks)" for dim in idle)
    ranks, verb = math.prod(mesh.sizes), "is" if len(idle) == 1 else "are"
    return f"{names} {verb} used by no rule: {ranks} ranks do the work of {ranks // mesh.size(tuple(idle))}"


def check_rules(rules: AxisRules, mesh: MeshSizes) -> None:
    """Raise `RulesError` if the table names a mesh dim that neither this mesh nor the standard has."""
    problems = [
        f"rule {name!r}: {complaint}"
        for name, dims in rules.items()
        for dim in dims
        if (complaint := check_dim(dim, mesh))
    ]
    if problems:
        raise RulesError(report("AxisRules on this mesh", problems, "use one of the mesh's dims, or None"))


def unknown_names(axes: tuple[str, ...], rules: AxisRules) -> list[str]:
    """A complaint for each axis without a rule."""
    return [
        f"axis {name!r} of {' '.join(axes)!r} has no rule{nearest(name, rules)}"
        for name in axes
        if name not in rules and not name.startswith("_")
    ]


@cache
def _without(rules: AxisRules, dims: Dims) -> AxisRules:
    return AxisRules({name: tuple(dim for dim in own if dim not in dims) for name, own in rules.items()})


def _as_tuple(dims: str | Dims | None) -> Dims:
    return () if dims is None else (dims,) if isinstance(dims, str) else tuple(dims)


def _problems(name: object, dims: object) -> list[str]:
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
        return [f"{name!r} is not an axis name: letters, digits and '_', beginning with a letter"]
    if dims is not None and not isinstance(dims, (str, tuple, list)):
        return [f"rule {name!r}: {dims!r} is neither a mesh dim, nor a tuple of them, nor None"]
    dims = _as_tuple(dims)  # type: ignore[arg-type]
    problems = [
        f"rule {name!r}: {dim!r} is not a mesh dim's name"
        for dim in dims
        if not isinstance(dim, str) or not dim.isidentifier()
    ]
    if len(set(dims)) < len(dims):
        problems.append(f"rule {name!r}: a mesh dim stands twice in {dims!r}")
    if "pp" in dims:
        problems.append(
            f"rule {name!r}: 'pp' carries pipeline stages, which run different programs; no axis maps to it"
        )
    return problems


_FIX_TABLE = "write rules as in AxisRules({'batch': ('dp', 'fsdp'), 'mlp': 'tp', 'head_dim': None})"
