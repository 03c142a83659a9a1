"""A schedule as a picture: a row for each rank, a box for each thing it computes, in the order of time.

Invariant: a colour is a kind of action, its shade the rank's stage; panels under each other show the same actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from functitan.errors import FunctitanError, report
from functitan.pipeline.actions import BACKWARD, COMPUTE, FORWARD, INPUT, WEIGHT, Orders, StageRank, is_compute
from functitan.pipeline.clock import Times, compute_spans, makespan

Panel = tuple[str, str, Sequence[Times]]  # its title, the unit of its time, and the times of each action of each rank

_NAMES = {FORWARD: "forward", BACKWARD: "backward", INPUT: "input gradient", WEIGHT: "weight gradient"}
_COLOURS = {FORWARD: "#4c78a8", BACKWARD: "#4f9a47", INPUT: "#d98a1f", WEIGHT: "#a9659b"}
_LIGHTEST = 0.55  # share of white in the last of a rank's stages
_BOX = 0.24  # inches of width for each box of the fullest rank
_NARROWEST, _WIDEST = 9.0, 30.0  # inches
_DIGIT = 6  # points that a digit needs


def plot(path: str | PathLike[str], orders: Orders, stage_rank: StageRank, panels: Sequence[Panel]) -> None:
    """Draw the panels under each other, each as wide as its own time."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise FunctitanError(report("plot", ["matplotlib is not installed"], "install it, or use print")) from None
    boxes = max(sum(map(is_compute, order)) for order in orders)
    width = min(_WIDEST, max(_NARROWEST, 2 + _BOX * boxes))
    figure = Figure(figsize=(width, len(panels) * (1.4 + 0.42 * len(orders)) + 0.4), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _draw(axes, orders, stage_rank, panel, points=72 * (width - 1))
    kinds = [kind for kind in COMPUTE if any(action.kind == kind for order in orders for action in order)]
    patches = [Patch(color=_COLOURS[kind], label=f"{kind}  {_NAMES[kind]}") for kind in kinds]
    if len(stage_rank) > len(orders):
        patches.append(Patch(color=_mixed("#777777", _LIGHTEST), label="lighter: a later stage of the rank"))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.savefig(path, dpi=150)


def _draw(axes: Any, orders: Orders, stage_rank: StageRank, panel: Panel, points: float) -> None:
    title, unit, times = panel
    first, total = makespan(orders, times)
    for rank, action, start, end in compute_spans(orders, times):
        mine = [stage for stage, there in enumerate(stage_rank) if there == rank]
        white = _LIGHTEST * mine.index(action.stage) / max(1, len(mine) - 1)
        left, length, label = start - first, end - start, str(action.microbatch)
        colour = _mixed(_COLOURS[action.kind], white)
        axes.barh(rank, length, left=left, height=0.86, color=colour, edgecolor="white", linewidth=0.6)
        if length * points > _DIGIT * len(label) * total:
            ink = "black" if white > 0.3 else "white"
            axes.text(left + length / 2, rank, label, ha="center", va="center", fontsize=8, color=ink)
    axes.set(xlim=(0, total or 1), ylim=(len(orders) - 0.5, -0.5), facecolor="#f0f0f0")
    axes.set_yticks(range(len(orders)), [f"rank {rank}" for rank in range(len(orders))])
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(unit, loc="right", fontsize=8)
    axes.tick_params(left=False, labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _mixed(colour: str, white: float) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red + (1 - red) * white, green + (1 - green) * white, blue + (1 - blue) * white
