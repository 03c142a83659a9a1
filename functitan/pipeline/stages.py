"""Stages of a model: pure functions of their own parameters, and which parameters a rank of a pipeline has.

Invariant: a parameter has the path that it has without a pipeline, whichever stages use it, so its initial value, its
checkpoints and its optimizer state do not know how the model was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from functitan import tree
from functitan.errors import FunctitanError, report
from functitan.param import Param
from functitan.pipeline.schedule import Schedule


class Stage(NamedTuple):
    """A part of a model: `apply(params, x, batch, key) -> y`, and the declarations of its parameters.

    `x` is what the stage before gave, `None` in the first; `batch` and `key` are those of a microbatch. What a stage
    gives is a tree of tensors, floating or not, and static values. The last gives `(sum, count)` or `((sum, count),
    aux)`, as a loss function does. A stage with layers 2 and 3 of a list has them as `{"layers": {2: ..., 3: ...}}`.
    """

    declarations: tree.Tree
    apply: Callable[..., Any]


def declarations(stages: Sequence[Stage], schedule: Schedule, place: int = 0) -> tree.Tree:
    """The parameters that the rank at `place` along `pp` has: of all its stages, each leaf once.

    The place is `ft.as_mesh(mesh).place`. A leaf that several stages share, such as a tied embedding, is on the rank of
    each, and the first owns it. Raises `FunctitanError` for stages that do not fit the schedule, or each other.

    >>> from functitan.pipeline.named import schedule
    >>> stages = [Stage({"layers": {i: Param("embed mlp", (4, 8))}}, print) for i in range(2)]
    >>> declarations(stages, schedule("1f1b", num_stages=2, num_microbatches=2, num_ranks=2), place=1)
    {'layers': {1: Param('embed mlp', (4, 8))}}
    """
    check_stages(stages, schedule)
    holders = holders_of(stages, schedule)
    mine = [stages[stage].declarations for stage in schedule.stages(place)]
    return tree.map_with_path(lambda path, leaf: replace(leaf, pp=holders[path]), _merged(mine))


def holders_of(stages: Sequence[Stage], schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """The places along `pp` that have each leaf, in the order of the stages that use it."""
    found: dict[str, tuple[int, ...]] = {}
    for stage, there in zip(stages, schedule.stage_rank, strict=True):
        for path in tree.paths(stage.declarations):
            found[path] = tuple(dict.fromkeys((*found.get(path, ()), there)))
    return found


def check_stages(stages: Sequence[Stage], schedule: Schedule) -> None:
    """Raise `FunctitanError` unless there is a stage for each of the schedule's, and shared leaves are the same."""
    problems = [
        f"stages[{i}] is a {type(stage).__name__}" for i, stage in enumerate(stages) if type(stage) is not Stage
    ]
    if problems:
        fix = "give a list of ft.pipeline.Stage, as llama.stages(config, [6, 6]) makes it"
        raise FunctitanError(report("ft.pipeline", problems, fix))
    if len(stages) != schedule.num_stages:
        problem = f"{len(stages)} stages for a schedule of {schedule.num_stages}"
        raise FunctitanError(report("ft.pipeline", [problem], "make both with one number of stages"))
    known: dict[str, tuple[int, Param]] = {}
    for number, stage in enumerate(stages):
        for path, leaf in zip(tree.paths(stage.declarations), tree.leaves(stage.declarations), strict=True):
            first, other = known.setdefault(path, (number, leaf))
            if not isinstance(leaf, Param):
                problems.append(f"stage {number}: {path} is a {type(leaf).__name__}, not a Param")
            elif _kind(leaf) != _kind(other):
                problems.append(f"{path} is {other!r} in stage {first}, and {leaf!r} in stage {number}")
    if problems:
        raise FunctitanError(report("ft.pipeline: the stages' declarations", problems, "declare a shared leaf once"))


def _kind(leaf: Param) -> tuple[Any, ...]:
    return leaf.pattern, leaf.shape, leaf.dtype, leaf.trainable


def _merged(trees: Sequence[tree.Tree]) -> tree.Tree:
    """One tree with every leaf of the trees: their dicts are joined, what else they share they have alike."""
    first = trees[0] if trees else {}
    if not all(isinstance(each, dict) for each in trees):
        for other in trees[1:]:
            if problems := tree.mismatches(first, other, "one stage", "another"):
                raise FunctitanError(report("ft.pipeline: stages of one rank", problems, _FIX_DICTS))
        return first
    keys = dict.fromkeys(key for each in trees for key in each)
    return {key: _merged([each[key] for each in trees if key in each]) for key in keys}


_FIX_DICTS = "put what stages do not share into dicts: {'layers': {2: ..., 3: ...}}"
