"""The page of an evaluation, drawn from `evaluation.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.report.render import render
from recsys.report.svg import FIRST, GRID, INK, SECOND, Plot, plot, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLD_SLICES = {
    "warm target": "warm",
    "warm target among warm items": "warm among warm",
    "cold target": "cold",
    "cold target among cold items": "cold among cold",
}
_NEAR = 0.13
"""Labels of points closer than this fraction of the axes would overlap."""
Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A mean over users with its 95 % interval and, if wanted, the value for a random order."""

    name: str
    mean: float
    interval: tuple[float, float]
    random: float | None = None

    @classmethod
    def of_slice(cls, name: str, found: Numbers, metric: str, shows_random: bool = False) -> "Point":
        """Read one metric of one slice in the JSON."""
        low, high = found["interval_95"][metric]
        return cls(name, found[metric], (low, high), found["random"][metric] if shows_random else None)


def evaluation_page(numbers: Numbers) -> str:
    """Draw the page of an evaluation; `metric` is the config's main metric, `ranking_metric` that of slices and groups."""
    metric = numbers.get("ranking_metric", numbers["metric"])  # a file of an earlier release has only the latter
    numbers, slices = {**numbers, "ranking_metric": metric}, numbers["slices"]
    cutoff = metric.partition("@")[2]
    main_metrics = [name for name in numbers["metrics"] if "@" not in name or name.endswith(f"@{cutoff}")]
    cold = [Point.of_slice(label, slices[name], metric, shows_random=True) for name, label in COLD_SLICES.items() if name in slices]
    lengths, deciles = (
        [Point.of_slice(name, found, metric) for name, found in slices.items() if name.startswith(kind)]
        for kind in ("history ", "popularity decile ")
    )
    plots = {
        "cold": _rows(cold, metric, extra_inches=0.3),
        "histories": _rows(lengths, metric, extra_inches=0.3),
        "deciles": plot(_draw_deciles, deciles, metric),
        "groups": {
            attribute: _rows([Point(name, group["mean"], group["interval_95"]) for name, group in found["groups"].items()], metric)
            for attribute, found in numbers["fairness"].items()
        },
        "diversity": _diversity(numbers.get("diversity"), metric, cutoff),
        "gaps": _gaps(numbers.get("curve", []), metric),
    }
    target_kinds = {name: found for name, found in slices.items() if name.startswith("target kind ")}
    other_metrics = [name for name in numbers["metrics"] if name not in main_metrics]
    named = {"main_metrics": main_metrics, "other_metrics": other_metrics, "target_kinds": target_kinds, "targets": numbers.get("targets")}
    return render("evaluation.html", **{**numbers, **named}, cutoff=cutoff, plots=plots)


def _rows(points: Sequence[Point], metric: str, extra_inches: float = 0.0) -> Plot | None:
    return plot(_draw_rows, points, metric, height_inches=1.05 + 0.34 * len(points) + extra_inches)


def _diversity(diversity: Numbers | None, metric: str, cutoff: str) -> Plot | None:
    if diversity is None:
        return None
    across = f"intra_list_diversity@{cutoff}"
    places = [(point[across], point[metric]) for point in diversity["curve"]]
    return plot(_draw_curve, places, [f"{point['weight']:g}" for point in diversity["curve"]], across, metric)


def _gaps(curve: Sequence[Numbers], metric: str) -> dict[str, Plot | None]:
    """Plot the metric against the gap of each attribute, one point per checkpoint; the first of `curve` is the evaluated one."""
    plots = {}
    for attribute in curve[0]["gaps"] if curve else ():
        points = sorted(curve, key=lambda point: point["gaps"][attribute])
        places = [(point["gaps"][attribute], point[metric]) for point in points]
        labels = [_bound_name(point["bound"]) for point in points]
        plots[attribute] = plot(_draw_curve, places, labels, f"gap in {metric} by {attribute}", metric, points.index(curve[0]))
    return plots


def _bound_name(bound: Numbers | None) -> str:
    return f"{bound['max_gap']:g}, rate {bound['dual_rate']:g}" if bound else "no bound"


def _draw_rows(axes: "Axes", points: Sequence[Point], metric: str) -> None:
    """Draw one row per point, the first on top: the mean, the interval as a bar, and a cross for a random order."""
    places = np.arange(len(points))[::-1]
    means = [point.mean for point in points]
    axes.errorbar(means, places, xerr=_arms(points), fmt="o", color=FIRST, markersize=6, elinewidth=2, capsize=3)
    by_chance = [(point.random, place) for point, place in zip(points, places, strict=True) if point.random is not None]
    if by_chance:
        axes.plot(*zip(*by_chance, strict=True), "x", color=SECOND, markersize=7, markeredgewidth=2, label="random order")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=1)
    axes.set_yticks(places, [readable(point.name) for point in points], color=INK)
    axes.set_ylim(-0.6, len(points) - 0.4)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(metric)
    axes.grid(axis="x", color=GRID)


def _draw_deciles(axes: "Axes", points: Sequence[Point], metric: str) -> None:
    """Draw one column per popularity decile, which is the number at the end of the point's name."""
    places = [int(point.name.rpartition(" ")[2]) for point in points]
    axes.errorbar(places, [point.mean for point in points], yerr=_arms(points), fmt="o", color=FIRST, elinewidth=2, capsize=3)
    axes.set_xticks(range(1, 11))
    axes.set_xlim(0.4, 10.6)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", nbins=5)
    axes.set_xlabel("decile of the target's item, most popular first")
    axes.set_ylabel(metric)
    axes.grid(axis="y", color=GRID)


def _draw_curve(axes: "Axes", places: Sequence[tuple[float, float]], labels: Sequence[str], across: str, up: str, own: int = 0) -> None:
    """Draw points in the given order, joined by a line; the `own` point, which the others are compared with, is highlighted."""
    xs, ys = zip(*places, strict=True)
    axes.plot(xs, ys, "o-", color=FIRST, markersize=6, linewidth=1.8)
    axes.plot(xs[own], ys[own], "o", color=SECOND, markersize=9)
    axes.margins(0.15)
    axes.locator_params(nbins=5)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(color=GRID)
    for index in _apart(places, own):
        axes.annotate(readable(labels[index]), places[index], (0, 8), textcoords="offset points", ha="center", color=INK)


def _arms(points: Sequence[Point]) -> list[list[float]]:
    """Return the lengths of the error bars, downwards and upwards."""
    below = [max(0.0, point.mean - point.interval[0]) for point in points]
    return [below, [max(0.0, point.interval[1] - point.mean) for point in points]]


def _apart(places: Sequence[tuple[float, float]], own: int) -> list[int]:
    """Choose points whose labels do not overlap; the own point and the ends come before the others."""
    scaled = np.array(places) / np.maximum(np.ptp(np.array(places), axis=0), 1e-12)
    chosen: list[int] = []
    for index in dict.fromkeys((own, 0, len(places) - 1, *range(len(places)))):
        if all(np.abs(scaled[index] - scaled[other]).max() > _NEAR for other in chosen):
            chosen.append(index)
    return chosen
