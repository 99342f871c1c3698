"""The page of a dataset, drawn from `statistics.json`."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from recsys.report.render import render
from recsys.report.svg import FIRST, GRID, INK, MUTED, SECOND, THIRD, Plot, plot, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_BARS = 10
_UNITS = {1: "1 s", 60: "1 min", 3600: "1 h", 86_400: "1 day", 30 * 86_400: "1 month", 365 * 86_400: "1 year"}
_DAY_SECONDS = 86_400
Numbers = Mapping[str, Any]


def dataset_page(numbers: Numbers) -> str:
    """Draw the page of a dataset's statistics."""
    periods = numbers["periods"] or {}
    plots = {
        "times": plot(_draw_times, numbers["times"]),
        "splits": _bars(numbers["splits"], "interactions"),
        "kinds": _bars(numbers["kinds"], "interactions"),
        "values": plot(_draw_values, numbers["values"]),
        "lengths": plot(_draw_lengths, numbers["history_lengths"], "interactions of a user", "users"),
        "popularity": plot(_draw_long_tail, numbers["popularity"]),
        "periods": plot(_draw_periods, periods.get("shares")),
        "new_items": plot(_draw_new_items, periods.get("new_items")),
        "gaps": plot(_draw_gaps, numbers["gaps"], numbers["data_config"]["session_gap_seconds"]),
        "sessions": plot(_draw_lengths, numbers["session_lengths"], "interactions in a session", "sessions"),
        "rejected": _bars(numbers["rejected"], "rows"),
        "noticed": _bars(numbers["noticed"], "cases", has_shares=False),
    }
    return render("dataset.html", **numbers, plots=plots)


def _bars(bars: Mapping[str, int], unit: str, has_shares: bool = True) -> Plot | None:
    return plot(_draw_bars, bars, unit, has_shares, height_inches=0.75 + 0.4 * min(len(bars), _MOST_BARS))


def _draw_times(axes: "Axes", times: Numbers) -> None:
    """Draw the interactions over time, stacked by split."""
    edges = np.array(times["edges"])
    _draw_stacked(axes, edges[:-1], times["splits"], np.diff(edges), "edge")
    first, last = edges[0], edges[-1] - 1  # the last bin ends one second after the last time
    ticks = np.linspace(first, last, 4)
    is_short = last - first < 4 * _DAY_SECONDS
    texts = [str(np.datetime64(int(tick), "s")) for tick in ticks]
    axes.set_xticks(ticks, [text[5:16].replace("T", " ") if is_short else text[:10] for text in texts], ha="center")
    _count_axis(axes, "interactions")


def _draw_long_tail(axes: "Axes", popularity: Numbers) -> None:
    """Draw interactions by popularity rank of the item, on two logarithmic axes."""
    ranks, counts = popularity["ranks"], popularity["counts"]
    axes.loglog(ranks, counts, color=FIRST, linewidth=2.2)
    axes.fill_between(ranks, counts, 0.8, color=FIRST, alpha=0.15, linewidth=0)
    axes.set_ylim(bottom=0.8)
    axes.set_xlabel("rank of the item, most popular first")
    _log_ticks(axes.xaxis, max(ranks, default=1))
    _log_ticks(axes.yaxis, max(counts, default=1))
    axes.set_ylabel("training interactions")
    axes.grid(color=GRID)


def _draw_lengths(axes: "Axes", histogram: Numbers, unit: str, owners: str) -> None:
    """Draw a histogram of lengths, in bins that grow by half octaves."""
    edges = histogram["edges"]
    first, stop = _draw_occupied(axes, histogram["counts"], 0.92)
    powers = [2**power for power in range(edges[-1].bit_length())]
    ticks = [place for place in np.searchsorted(edges, powers).tolist() if first <= place <= stop]
    shown = ticks[:: math.ceil(len(ticks) / 8)]
    axes.set_xticks(shown, [_compact(edges[place]) for place in shown])
    axes.set_xlabel(unit)
    _count_axis(axes, owners)


def _draw_gaps(axes: "Axes", histogram: Numbers, session_gap_seconds: int) -> None:
    """Draw a histogram of the gaps between a user's interactions, and the gap that ends a session."""
    edges = histogram["edges"]
    first, stop = _draw_occupied(axes, histogram["counts"], 0.9)
    limit, *places = np.interp([session_gap_seconds, *_UNITS], edges, range(len(edges)))
    axes.axvline(limit, color=SECOND, linewidth=2)
    axes.text(limit, 1.02, "new session \u2192", color=SECOND, ha="center", va="bottom", transform=axes.get_xaxis_transform())
    shown = {place: label for place, label in zip(places, _UNITS.values(), strict=True) if first <= place <= stop}
    axes.set_xticks(list(shown), list(shown.values()))
    axes.set_xlabel("time since the user's interaction before")
    _count_axis(axes, "pairs of interactions")


def _draw_values(axes: "Axes", values: Numbers) -> None:
    """Draw the counts of each value of a short scale, or of bins of other values."""
    counts = np.array(values["counts"])
    if "places" in values:
        places = np.array(values["places"])
        step = 1 if counts[1::2].any() else 2  # every second place is a whole number
        axes.bar(places[::step], counts[::step], 0.43 * step, color=FIRST, linewidth=0)
        found = places[counts > 0]
        every = math.ceil(len(found) / 11)
        axes.set_xticks(found[::every], [f"{place:g}" for place in found[::every]])
    else:
        edges = np.array(values["edges"])
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=FIRST, linewidth=0)
    axes.set_xlabel("value")
    _count_axis(axes, "interactions")


def _draw_periods(axes: "Axes", shares: Numbers) -> None:
    """Draw the shares of item groups by popularity in each period's interactions."""
    num_periods = len(next(iter(shares.values())))
    places = np.arange(1, num_periods + 1)
    _draw_stacked(axes, places, shares, 0.86, "center")
    axes.set_xticks(places)
    axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.set_xlabel("period, oldest first")
    axes.set_ylabel("share of interactions")


def _draw_new_items(axes: "Axes", counts: list[int]) -> None:
    """Draw the number of items whose first interaction is in each period."""
    places = range(1, len(counts) + 1)
    axes.bar(places, counts, 0.86, color=FIRST, linewidth=0)
    axes.set_xticks(places)
    axes.set_xlabel("period, oldest first")
    _count_axis(axes, "items")


def _draw_bars(axes: "Axes", bars: Mapping[str, int], unit: str, has_shares: bool) -> None:
    """Draw one horizontal bar per name, with its number and its share; if there are many, the smallest are merged."""
    shown = dict(bars)
    if len(shown) > _MOST_BARS:
        largest = sorted(shown, key=lambda name: -shown[name])[: _MOST_BARS - 1]
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


def _draw_occupied(axes: "Axes", counts: list[int], width: float) -> tuple[int, int]:
    """Draw the bins from the first to the last non-empty one, by index; return the first index, and the last plus one."""
    places = np.flatnonzero(counts)
    first, stop = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 1)
    axes.bar(range(first, stop), counts[first:stop], width, align="edge", color=FIRST, linewidth=0)
    return first, stop


def _draw_stacked(axes: "Axes", places: Any, columns: Numbers, width: Any, align: Literal["center", "edge"]) -> None:
    """Draw three stacked columns at each place, with a legend above."""
    below = np.zeros(len(places))
    for (name, column), color in zip(columns.items(), (FIRST, SECOND, THIRD), strict=True):
        axes.bar(places, column, width, below, align=align, color=color, label=name, linewidth=0)
        below = below + column
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handlelength=1, columnspacing=1.2)


def _log_ticks(axis: Any, largest: int) -> None:
    ticks = [10**power for power in range(len(str(max(1, largest))))]
    axis.set_ticks(ticks, labels=[_compact(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def _count_axis(axes: "Axes", unit: str) -> None:
    axes.yaxis.set_major_formatter(lambda number, _: _compact(number))
    axes.locator_params(axis="y", nbins=5)
    axes.grid(axis="y", color=GRID)
    axes.set_ylabel(unit)
    axes.margins(x=0.01)


def _compact(number: float) -> str:
    """Format a number in few characters: 950, 1.2k, 30M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"
