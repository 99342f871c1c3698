"""The evaluation report: one self-contained page of HTML."""

import html
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from recsys.evaluation.report import plots, tables
from recsys.evaluation.report.plots import Point
from recsys.evaluation.slices import COLD, COLD_AMONG_COLD, WARM, WARM_AMONG_WARM
from recsys.report.page import figure, grid, header, page, section

REPORT_NAME = "evaluation.html"
_DECILE, _HISTORY = "popularity decile ", "history "


def make_report(result: Mapping[str, Any], metric: str) -> str:
    """Write the page of what `evaluate` returned with `checkpoint` beside; `metric` is the config's main one."""
    sections = [
        _header(result, metric),
        section("Metrics", tables.metrics(result, metric)),
        *([section("Against the other checkpoint", tables.comparison(result["compare"], metric))] if "compare" in result else []),
        *([section("With a query", tables.queries(result["queries"]))] if "queries" in result else []),
        section(
            "Where it works, and for whom",
            grid([*_slices(result["slices"], metric), *_groups(result["fairness"], metric)]) + tables.slices(result["slices"], metric),
        ),
        section("Trade-offs", grid([_diversity(result.get("diversity"), metric), *_fairness_curves(result.get("curve"), metric)])),
    ]
    return page(f"Evaluation of {result['checkpoint'].rpartition('/')[2]}", sections)


def _header(result: Mapping[str, Any], metric: str) -> str:
    cutoff = metric.partition("@")[2]
    shown = dict.fromkeys((metric, f"hr@{cutoff}", f"coverage@{cutoff}"))
    numbers = {name: f"{result['metrics'][name]:.4f}" for name in shown}
    numbers[f"{metric} of popularity"] = f"{result['baselines']['popularity'][metric]:.4f}"
    rule = result["protocol"][:1].upper() + result["protocol"][1:]
    lead = f"<code>{html.escape(result['checkpoint'])}</code> on the {result['split']} targets.<br>{html.escape(rule)}."
    return header("Evaluation report", lead, {**numbers, "users": f"{result['num_users']:,}"})


def _slices(slices: Mapping[str, Any], metric: str) -> list[str]:
    names = {WARM: "warm", WARM_AMONG_WARM: "warm, among the warm", COLD: "cold", COLD_AMONG_COLD: "cold, among the cold"}
    cold = [Point.of_slice(label, slices[name], metric, shows_random=True) for name, label in names.items() if name in slices]
    lengths, deciles = (
        [Point.of_slice(name, found, metric) for name, found in slices.items() if name.startswith(kind)] for kind in (_HISTORY, _DECILE)
    )
    nothing = "No slice has enough users."
    return [
        figure(
            "cold",
            "Items that training saw, and items that it did not",
            "A cold target has no training interaction. Each is ranked among all items and among its like; bars are 95 % intervals.",
            partial(plots.draw_rows, points=cold, metric=metric) if cold else nothing,
            plots.points_height(cold) + 0.3,
        ),
        figure(
            "histories",
            "Short and long histories",
            "By the number of interactions before the targets.",
            partial(plots.draw_rows, points=lengths, metric=metric) if lengths else nothing,
            plots.points_height(lengths) + 0.3,
        ),
        figure(
            "deciles",
            "Popular and rare targets",
            "Each decile of the catalogue has a tenth of the training interactions. A steep fall says that the model follows the crowd.",
            partial(plots.draw_deciles, points=deciles, metric=metric) if deciles else nothing,
        ),
    ]


def _groups(fairness: Mapping[str, Any], metric: str) -> list[str]:
    if not fairness:
        return [figure("groups", "Groups of users", "", "No attribute of the users has two groups that are large enough to be compared.")]
    figures = []
    for number, (attribute, found) in enumerate(fairness.items()):
        points = [Point(name, group["mean"], group["interval_95"]) for name, group in found["groups"].items()]
        low, high = found["interval_95"]
        left_out = f" {found['num_groups_left_out']} small groups are left out." if found["num_groups_left_out"] else ""
        figures.append(
            figure(
                f"groups-{number}",
                f"By {attribute}",
                f"Between the best and the worst group lie {found['gap']:.4f} [{low:.4f}, {high:.4f}], {found['relative_gap']:.1%} of the "
                f"mean. The largest of several noisy differences is never 0.{left_out}",
                partial(plots.draw_rows, points=points, metric=metric),
                plots.points_height(points),
            )
        )
    return figures


def _diversity(diversity: Mapping[str, Any] | None, metric: str) -> str:
    draw: Any = "Set evaluation.diversity to some weights, such as [0.1, 0.3, 0.5], to see what diverse lists cost."
    caption = ""
    if diversity is not None:
        cutoff = metric.partition("@")[2]
        curve, across = diversity["curve"], f"intra_list_diversity@{cutoff}"
        places = [(point[across], point[metric]) for point in curve]
        labels = [f"{point['weight']:g}" for point in curve]
        draw = partial(plots.draw_curve, places=places, labels=labels, across=across, up=metric)
        caption = (
            f"Each user's best items re-ranked by {diversity['method'].upper()}; numbers are the weight of diversity, 0 the model's own."
        )
    return figure("diversity", "Quality against diversity", caption, draw)


def _fairness_curves(curve: Sequence[Mapping[str, Any]] | None, metric: str) -> list[str]:
    title = "Quality against the gap between groups"
    attributes = [name for name in (curve or [{"gaps": {}}])[0]["gaps"]]
    if curve is None or not attributes:
        return [
            figure(
                "fairness",
                title,
                "",
                "Set evaluation.fairness_curve to checkpoints trained under other bounds of fairness to see their cost.",
            )
        ]
    figures = []
    for number, attribute in enumerate(attributes):
        points = sorted(curve, key=lambda point: point["gaps"][attribute])
        draw = partial(
            plots.draw_curve,
            places=[(point["gaps"][attribute], point[metric]) for point in points],
            labels=[_bound_name(point["bound"]) for point in points],
            across=f"gap in {metric} by {attribute}",
            up=metric,
            own=points.index(curve[0]),
        )
        caption = (
            "One point per checkpoint, this one larger; labels are what it was trained under: fairness.max_gap and fairness.dual_rate. "
            "Up and left is better."
        )
        figures.append(figure(f"fairness-{number}", f"{title} by {attribute}", caption, draw))
    return figures


def _bound_name(bound: Mapping[str, Any] | None) -> str:
    return f"{bound['max_gap']:g}, rate {bound['dual_rate']:g}" if bound else "no bound"
