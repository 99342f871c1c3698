"""The page of a training run, drawn from `training.json`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recsys.report.render import render
from recsys.report.svg import FIRST, GRID, INK, SECOND, plot, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]


def training_page(numbers: Mapping[str, Any]) -> str:
    """Draw the page of the last state of a run."""
    history = numbers["history"]
    metric = history[-1]["metric"] if history else "validation"
    validation = [(epoch["step"], epoch["validation"]) for epoch in history]
    best = next((point for point in validation if point[0] == numbers["best_step"]), None)
    losses = {
        name: [(epoch["step"], epoch["losses"][name]) for epoch in history if name in epoch["losses"]]
        for name in dict.fromkeys(name for epoch in history for name in epoch["losses"])
    }
    plots = {
        "losses": [(readable(name), plot(_draw_line, points, "loss")) for name, points in losses.items()],
        "validation": plot(_draw_line, validation, metric, best),
        "speed": plot(_draw_line, [(epoch["step"], epoch["samples_per_second"]) for epoch in history], "samples/s", None, True),
        "time": plot(_draw_seconds, numbers["seconds_by_part"], height_inches=2.4),
    }
    return render("training.html", **numbers, metric=metric, plots=plots)


def _draw_line(axes: "Axes", points: Sequence[Point], up: str, mark: Point | None = None, has_zero: bool = False) -> None:
    """Draw a value by step, with one point marked."""
    axes.plot(*zip(*points, strict=True), "o-", color=FIRST, markersize=3.5, linewidth=1.8)
    if mark is not None:
        axes.plot(*mark, "o", color=SECOND, markersize=9)
    if has_zero:
        axes.set_ylim(bottom=0)
    axes.margins(0.05)
    axes.locator_params(nbins=5)
    axes.set_xlabel("step")
    axes.set_ylabel(readable(up))
    axes.grid(color=GRID)


def _draw_seconds(axes: "Axes", seconds: Mapping[str, float]) -> None:
    places = range(len(seconds))[::-1]
    axes.barh(places, list(seconds.values()), color=FIRST, height=0.6)
    axes.set_yticks(places, list(seconds), color=INK)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("seconds")
    axes.grid(axis="x", color=GRID)
