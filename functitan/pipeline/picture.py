"""A schedule as a picture: a row for each rank, a box for each thing it computes, in the order of time.

Invariant: a colour is a kind of action, its shade the rank's stage; panels under each other show the same actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from functitan.errors import FunctitanError, report
from functitan.pipeline.actions import BACKWARD, COMPUTE, FORWARD, INPUT, WEIGHT, Orders, StageRank
from functitan.pipeline.clock import Times, compute_spans, makespan

_COLOURS = {FORWARD: "#4c78a8", BACKWARD: "#54a24b", INPUT: "#e39b3c", WEIGHT: "#b279a2"}
_NAMES = {FORWARD: "forward", BACKWARD: "backward", INPUT: "input gradient", WEIGHT: "weight gradient"}
_LIGHTEST = 0.55  # share of white in the last of a rank's stages
_WIDTH = 0.24  # inches for a box of mean length
_SIZES = (9.0, 30.0)  # least and most width of a picture, in inches


def plot(
    path: str | PathLike[str], orders: Orders, stage_rank: StageRank, panels: Sequence[tuple[str, Sequence[Times]]]
) -> None:
    """Draw panels of (title, times of each action of each rank) under each other, all as wide as their own time."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise FunctitanError(
            report("plot", ["matplotlib is not installed"], "install it, or print the schedule")
        ) from None
    boxes = max(
        len(row) for row in map(list, (compute_spans([o], [t]) for o, t in zip(orders, panels[0][1], strict=True)))
    )
    width = min(_SIZES[1], max(_SIZES[0], 2 + _WIDTH * boxes))
    figure = Figure(figsize=(width, len(panels) * (1.2 + 0.42 * len(orders)) + 0.4), layout="constrained")
    for axes, (title, times) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _panel(axes, orders, stage_rank, times, title)
    kinds = [kind for kind in COMPUTE if any(action.kind == kind for order in orders for action in order)]
    patches = [Patch(color=_COLOURS[kind], label=f"{kind}  {_NAMES[kind]}") for kind in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.savefig(path, dpi=150)


def _panel(axes, orders: Orders, stage_rank: StageRank, times: Sequence[Times], title: str) -> None:
    first, total = makespan(orders, times)
    width = axes.figure.get_figwidth() - 1
    for rank, action, start, end in compute_spans(orders, times):
        mine = [stage for stage, there in enumerate(stage_rank) if there == rank]
        white = _LIGHTEST * mine.index(action.stage) / max(1, len(mine) - 1)
        colour = _mixed(_COLOURS[action.kind], white)
        axes.barh(rank, end - start, left=start - first, height=0.86, color=colour, edgecolor="white", linewidth=0.6)
        label = str(action.microbatch)
        if (end - start) / (total or 1) * width * 72 > 6 * len(label):  # points that a digit needs
            dark = white > 0.3
            axes.text(
                (start + end) / 2 - first,
                rank,
                label,
                ha="center",
                va="center",
                fontsize=8,
                color="black" if dark else "white",
            )
    axes.set(xlim=(0, total), ylim=(len(orders) - 0.5, -0.5), yticks=range(len(orders)))
    axes.set_yticklabels([f"rank {rank}" for rank in range(len(orders))])
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_facecolor("#f0f0f0")
    axes.tick_params(left=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _mixed(colour: str, white: float) -> tuple[float, ...]:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return tuple(part + (1 - part) * white for part in parts)
