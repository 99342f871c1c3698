"""The plots of the dataset report."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.arrays import Integers
from recsys.ingest.report.counts import GAP_EDGES, LENGTH_EDGES, SPLITS, time_edges, value_edges, value_scale
from recsys.report.labels import compact, readable
from recsys.report.svg import FIRST, GRID, INK, MUTED, SECOND, THIRD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS = 10
_UNITS = ((1, "1 s"), (60, "1 min"), (3600, "1 h"), (86_400, "1 day"), (30 * 86_400, "1 month"), (365 * 86_400, "1 year"))
_DAY_SECONDS = 86_400


def draw_times(axes: "Axes", counts: dict[str, Integers], times: tuple[int, int]) -> None:
    """Interactions over time, the splits stacked."""
    edges = time_edges(times)
    below = np.zeros(len(edges) - 1)
    for name, color in zip(SPLITS, (FIRST, SECOND, THIRD), strict=True):
        column = counts[f"times_{name}"]
        axes.bar(edges[:-1], column, np.diff(edges), below, align="edge", color=color, label=name, linewidth=0)
        below = below + column
    ticks = np.linspace(times[0], times[1], 4)
    is_short = times[1] - times[0] < 4 * _DAY_SECONDS
    texts = [str(np.datetime64(int(tick), "s")) for tick in ticks]
    axes.set_xticks(ticks, [text[5:16].replace("T", " ") if is_short else text[:10] for text in texts], ha="center")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handlelength=1, columnspacing=1.2)
    _count_axis(axes, "interactions")


def draw_long_tail(axes: "Axes", train_counts: Integers) -> None:
    """Interactions by popularity rank of the item, both on logarithmic axes."""
    ranked = np.sort(train_counts[train_counts > 0])[::-1]
    ranks = np.unique(np.geomspace(1, max(1, len(ranked)), 200).astype(np.int64))
    axes.loglog(ranks, ranked[ranks - 1], color=FIRST, linewidth=2.2)
    axes.fill_between(ranks, ranked[ranks - 1], 0.8, color=FIRST, alpha=0.15, linewidth=0)
    axes.set_ylim(bottom=0.8)
    axes.set_xlabel("rank of the item, most popular first")
    _log_ticks(axes.xaxis, len(ranked))
    _log_ticks(axes.yaxis, int(ranked.max(initial=1)))
    axes.set_ylabel("training interactions")
    axes.grid(color=GRID)


def draw_lengths(axes: "Axes", counts: Integers, unit: str, owners: str) -> None:
    """How many owners have how much, in bins that grow by half octaves."""
    first, stop = _occupied(counts)
    axes.bar(range(first, stop), counts[first:stop], 0.92, align="edge", color=FIRST, linewidth=0)
    powers = [2**power for power in range(int(LENGTH_EDGES[-1]).bit_length())]
    ticks = [place for place in np.searchsorted(LENGTH_EDGES, powers).tolist() if first <= place <= stop]
    shown = ticks[:: math.ceil(len(ticks) / 8)]
    axes.set_xticks(shown, [compact(LENGTH_EDGES[place]) for place in shown])
    axes.set_xlabel(unit)
    _count_axis(axes, owners)


def draw_gaps(axes: "Axes", counts: Integers, session_gap_seconds: int) -> None:
    """How much time passes between interactions of a user, and where a session ends."""
    first, stop = _occupied(counts)
    axes.bar(range(first, stop), counts[first:stop], 0.9, align="edge", color=FIRST, linewidth=0)
    limit = np.interp(session_gap_seconds, GAP_EDGES, np.arange(len(GAP_EDGES)))
    axes.axvline(limit, color=SECOND, linewidth=2)
    axes.text(limit, 1.02, "new session \u2192", color=SECOND, ha="center", va="bottom", transform=axes.get_xaxis_transform())
    places = [(np.interp(seconds, GAP_EDGES, np.arange(len(GAP_EDGES))), label) for seconds, label in _UNITS]
    shown = [(place, label) for place, label in places if first <= place <= stop]
    axes.set_xticks([place for place, _ in shown], [label for _, label in shown])
    axes.set_xlabel("time since the user's interaction before")
    _count_axis(axes, "pairs of interactions")


def draw_values(axes: "Axes", counts: dict[str, Integers], values: tuple[float, float]) -> None:
    """How often each value is given; bins where they are on no short scale."""
    first, steps = value_scale(values)
    if steps and not counts["off_scale"].sum():
        places = first + np.arange(steps) / 2
        is_whole = not counts["scale"][1::2].sum()
        step = 2 if is_whole else 1
        axes.bar(places[::step], counts["scale"][::step], 0.86 / (1 if is_whole else 2), color=FIRST, linewidth=0)
        found = places[counts["scale"] > 0]
        every = math.ceil(len(found) / 11)
        axes.set_xticks(found[::every], [f"{place:g}" for place in found[::every]])
    else:
        edges = value_edges(values)
        axes.bar(edges[:-1], counts["values"], np.diff(edges), align="edge", color=FIRST, linewidth=0)
    axes.set_xlabel("value")
    _count_axis(axes, "interactions")


def draw_periods(axes: "Axes", periods: Integers, train_counts: Integers) -> None:
    """Which share of each period's interactions goes to the most popular items, the next, and the rest."""
    order = np.argsort(-train_counts, kind="stable")
    num_items = len(order)
    bounds = [0, max(1, num_items // 100), max(1, num_items // 10), num_items]
    totals = np.maximum(periods.sum(axis=0), 1)
    places = np.arange(1, periods.shape[1] + 1)
    below = np.zeros(len(places))
    for start, stop, color, label in zip(bounds, bounds[1:], (FIRST, SECOND, THIRD), ("top 1%", "next 9%", "other items"), strict=False):
        share = periods[order[start:stop]].sum(axis=0) / totals
        axes.bar(places, share, 0.86, below, color=color, label=label, linewidth=0)
        below = below + share
    axes.set_xticks(places)
    axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.set_xlabel("period, oldest first")
    axes.set_ylabel("share of interactions")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handlelength=1, columnspacing=1.2)


def draw_new_items(axes: "Axes", periods: Integers) -> None:
    """How many items are first interacted with in each period."""
    firsts = np.argmax(periods[periods.any(axis=1)] > 0, axis=1)
    places = np.arange(1, periods.shape[1] + 1)
    axes.bar(places, np.bincount(firsts, minlength=len(places)), 0.86, color=FIRST, linewidth=0)
    axes.set_xticks(places)
    axes.set_xlabel("period, oldest first")
    _count_axis(axes, "items")


def bars_height(bars: dict[str, int]) -> float:
    """Return how many inches a figure needs for its bars."""
    return 0.75 + 0.4 * min(len(bars), MOST_BARS)


def draw_bars(axes: "Axes", bars: dict[str, int], unit: str, has_shares: bool = True) -> None:
    """One horizontal bar per name, with its number and its share of all; the smallest are joined where there are many."""
    shown = dict(bars)
    if len(shown) > MOST_BARS:
        largest = sorted(shown, key=lambda name: -shown[name])[: MOST_BARS - 1]
        rest = sum(number for name, number in shown.items() if name not in largest)
        shown = {name: number for name, number in shown.items() if name in largest} | {f"{len(bars) - len(largest)} others": rest}
    places = np.arange(len(shown))[::-1]
    axes.barh(places, list(shown.values()), 0.62, color=FIRST, linewidth=0)
    axes.set_yticks(places, [readable(name) for name in shown], color=INK)
    total = max(1, sum(shown.values()))
    for place, number in zip(places, shown.values(), strict=True):
        label = f"{number:,} ({number / total:.1%})" if has_shares else f"{number:,}"
        axes.annotate(label, (number, place), (4, 0), textcoords="offset points", va="center", color=MUTED)
    axes.set_xlim(0, max(1, *shown.values()) * 1.5)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel(unit)


def _occupied(counts: Integers) -> tuple[int, int]:
    places = np.flatnonzero(counts)
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 1)


def _log_ticks(axis: Any, largest: int) -> None:
    ticks = [10**power for power in range(len(str(max(1, largest))))]
    axis.set_ticks(ticks, labels=[compact(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def _count_axis(axes: "Axes", unit: str) -> None:
    axes.yaxis.set_major_formatter(lambda number, _: compact(number))
    axes.locator_params(axis="y", nbins=5)
    axes.grid(axis="y", color=GRID)
    axes.set_ylabel(unit)
    axes.margins(x=0.01)
