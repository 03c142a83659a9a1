"""What an update knows of each leaf: its pattern, and the surroundings in which named ops see it.

Invariant: on a mesh that shards anything, an update that mixes positions of a leaf refuses to run without patterns.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from functitan import tree
from functitan.axes import Axes, parse_axes, write_axes
from functitan.errors import PatternError, report
from functitan.param import Param
from functitan.sharding.cut import refuse_shards
from functitan.sharding.env import Env
from functitan.sharding.layout import Layout, axes_of, check_rank, global_shape, local_shape, whole


class Leaf(NamedTuple):
    """One leaf of an update: its path, axes, and surroundings, which have no mesh where all ranks hold it whole.

    Of a pipeline's leaf the rank at place `owner` counts it; ranks at other places may have a copy, or it not at all.
    """

    path: str
    axes: Axes
    env: Env
    owner: int = 0

    @property
    def pattern(self) -> str:
        return write_axes(self.axes)

    @property
    def layout(self) -> Layout:
        return whole(self.axes) if self.env.mesh is None else self.env.layout(self.axes)

    def global_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The global shape of which this rank holds `shape`."""
        return shape if self.env.mesh is None else global_shape(self.layout, shape, self.env.mesh.sizes)

    def shape_of(self, axes: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The local shape of a tensor with some of the leaf's axes, in the layout of its own pattern."""
        sizes = dict(zip(self.axes, self.global_shape(shape), strict=True))
        kept = tuple(sizes[axis] for axis in axes)
        return kept if self.env.mesh is None else local_shape(self.env.layout(axes), kept, self.env.mesh.sizes)


def leaves_of(what: str, values: tree.Tree, patterns: tree.Tree | None, env: Env) -> list[Leaf]:
    """Each leaf of a tree, in order; one without a pattern is equal on every rank, and its axes are numbered.

    Raises `PatternError` if `patterns` is left out where the rules shard anything, and `LayoutError` for shards where
    there is no mesh.
    """
    if patterns is None and env.mesh is not None:
        assert env.rules is not None
        sharding = [
            f"rule {name!r} shards over {dims}" for name, dims in env.rules.items() if env.mesh.sizes.size(dims) > 1
        ]
        if sharding:
            raise PatternError(report(f"{what} without patterns", sharding, _FIX_PATTERNS))
    if env.mesh is None:
        refuse_shards(what, zip(tree.paths(values), tree.leaves(values), strict=True))
    plain = env._replace(mesh=None, rules=None)
    found = []
    given = tree.broadcast_prefix(patterns, values, "patterns")
    for path, x, pattern in zip(tree.paths(values), tree.leaves(values), given, strict=True):
        axes = axes_of(pattern)
        if axes is not None:
            check_rank(axes, tuple(x.shape), path)
        owner = pattern.owner if isinstance(pattern, Param) else 0
        found.append(Leaf(path, named_axes(x), plain) if axes is None else Leaf(path, axes, env, owner))
    return found


def named_axes(x: Param | Tensor) -> Axes:
    """The axes of a declaration; numbered ones of a tensor, which has no pattern."""
    return parse_axes(x.pattern) if isinstance(x, Param) else tuple(f"axis{i}" for i in range(x.dim()))


_FIX_PATTERNS = "say how each leaf is sharded: tx.update(grads, state, params, patterns=patterns)"
