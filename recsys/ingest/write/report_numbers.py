"""The numbers of a dataset's report, as stored in `statistics.json`: leakage checks of the split, histograms, popularity."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from recsys.arrays import Integers
from recsys.data.manifest import DatasetManifest
from recsys.ingest.clean.rejects import NOTICED, REJECTED
from recsys.ingest.clean.times import UNIT_NAMES
from recsys.ingest.write.feature_statistics import NUM_PERIODS
from recsys.ingest.write.report_counts import GAP_EDGES, LENGTH_EDGES, SPLITS, Limits, time_edges, value_edges, value_scale

State = Literal["pass", "note", "fail"]
_NUM_RANKS = 200
_FROM_MANIFEST = {
    "fingerprint",
    "version",
    "base",
    "inputs",
    "data_config",
    "tie_rule",
    "num_users",
    "num_items",
    "num_interactions",
    "rejected",
    "noticed",
    "rejected_examples",
    "warnings",
}


def dataset_numbers(manifest: DatasetManifest, counts: dict[str, Integers], limits: Limits, items: pa.Table) -> dict[str, Any]:
    """Return the report's numbers, from the merged counts of all partitions and the statistics of all items."""
    numbers = {name: column.tolist() for name, column in counts.items()}
    rules = {name: text for name, text in {**REJECTED, **NOTICED}.items() if name in manifest.rejected or name in manifest.noticed}
    train_counts = items["train_count"].to_numpy()
    return {
        **manifest.model_dump(mode="json", include=_FROM_MANIFEST),
        "num_samples": manifest.num_samples,
        "time_unit_name": UNIT_NAMES.get(manifest.time_unit, ""),
        "columns": [use.model_dump() for use in sorted(manifest.columns, key=lambda use: (bool(use.use), use.table))],
        "rules": rules,
        "density": sum(numbers["pairs"]) / max(1, manifest.num_users * manifest.num_items),
        "share_with_value": sum(numbers.get("values", ())) / max(1, manifest.num_interactions),
        "checks": [asdict(check) for check in check_split(counts, manifest.data_config, manifest.has_time)],
        "splits": dict(zip(SPLITS, numbers["splits"], strict=True)),
        "users_with": dict(zip(SPLITS, numbers["users_with"], strict=True)),
        "kinds": dict(zip(manifest.event_kinds, numbers["kinds"], strict=True)),
        "times": _times(numbers, limits.times),
        "values": _values(numbers, limits.values),
        "history_lengths": _histogram(LENGTH_EDGES, numbers.get("lengths")),
        "session_lengths": _histogram(LENGTH_EDGES, numbers.get("session_lengths")),
        "gaps": _histogram(GAP_EDGES, numbers.get("gaps")),
        "popularity": _popularity(train_counts),
        "periods": _periods(items, train_counts) if limits.times else None,
    }


def _histogram(edges: Integers, counts: list[int] | None) -> dict[str, Any] | None:
    return {"edges": edges.tolist(), "counts": counts} if counts is not None else None


def _times(numbers: dict[str, list[int]], times: tuple[int, int] | None) -> dict[str, Any] | None:
    return {"edges": time_edges(times).tolist(), "splits": {name: numbers[f"times_{name}"] for name in SPLITS}} if times else None


def _values(numbers: dict[str, list[int]], values: tuple[float, float] | None) -> dict[str, Any] | None:
    """Return counts by value if all values are on a short scale, otherwise by bin."""
    if values is None:
        return None
    first, steps = value_scale(values)
    if steps and not any(numbers["off_scale"]):
        return {"places": (first + np.arange(steps) / 2).tolist(), "counts": numbers["scale"]}
    return {"edges": value_edges(values).tolist(), "counts": numbers["values"]}


def _popularity(train_counts: Integers) -> dict[str, Any]:
    """Measure how training interactions spread over items: counts by rank, and how many items have half of them."""
    ranked = np.sort(train_counts[train_counts > 0])[::-1]
    ranks = np.unique(np.geomspace(1, max(1, len(ranked)), _NUM_RANKS).astype(np.int64))[: len(ranked)]
    running = np.cumsum(ranked)
    num_items_of_half = int(np.searchsorted(running, running[-1] / 2) + 1) if len(ranked) else 0
    return {
        "ranks": ranks.tolist(),
        "counts": ranked[ranks - 1].tolist(),
        "num_cold": len(train_counts) - len(ranked),
        "num_items_of_half": num_items_of_half,
        "share_of_half": num_items_of_half / max(1, len(train_counts)),
    }


def _periods(items: pa.Table, train_counts: Integers) -> dict[str, Any]:
    """Measure for each period the shares of item groups by popularity, and how many items are new."""
    periods = items["period_counts"].combine_chunks().flatten().to_numpy().reshape(-1, NUM_PERIODS)
    by_popularity = periods[np.argsort(-train_counts, kind="stable")]
    num_items = len(periods)
    top, next_ones = max(1, num_items // 100), max(1, num_items // 10)
    groups = {"top 1%": by_popularity[:top], "next 9%": by_popularity[top:next_ones], "other items": by_popularity[next_ones:]}
    totals = np.maximum(periods.sum(axis=0), 1)
    first_periods = np.argmax(periods[periods.any(axis=1)] > 0, axis=1)
    return {
        "shares": {name: (counts.sum(axis=0) / totals).tolist() for name, counts in groups.items()},
        "new_items": np.bincount(first_periods, minlength=NUM_PERIODS).tolist(),
    }


@dataclass(frozen=True)
class Check:
    """One leakage check: the targets that it found (validation, test), all targets, their share, and the verdict."""

    title: str
    meaning: str
    found: tuple[int, int]
    targets: tuple[int, int]
    share: float
    state: State


def check_split(counts: dict[str, Integers], data_config: Mapping[str, Any], has_time: bool) -> list[Check]:
    """Return the leakage checks for the merged counts of all partitions; `data_config` is the manifest's."""
    validation, test = counts["targets"].tolist()
    split = data_config.get("split", "")

    def check(name: str, title: str, meaning: str, otherwise: State) -> Check:
        found = counts[name].tolist()
        share = sum(found) / max(1, validation + test)
        return Check(title, meaning, (found[0], found[1]), (validation, test), share, otherwise if any(found) else "pass")

    order = "time" if has_time else "position"
    by_chance = "; data.split = 'random' draws from all of a user's interactions" if split == "random" else ""
    out_of_order: State = "note" if by_chance else "fail"
    last = f"its {order} is before the user's last"
    checks = [
        check("in_samples", "Targets in training samples", "the same user, item, time and kind is in a training sample", "fail"),
        check("before_training", "Targets before training ends", f"{last} training interaction{by_chance}", out_of_order),
        check("before_validation", "Test before validation", f"{last} validation target{by_chance}", out_of_order),
        check("in_history", "Targets seen before", "the user had interacted with the item before; evaluation skips it", "note"),
    ]
    if has_time:
        meaning = f"other users have later training interactions{by_chance}"
        if split == "leave_one_out":
            meaning += "; leave-one-out splits each user alone, data.split = 'time' splits all at one moment"
        checks.append(
            check("before_training_of_others", "Targets before the last of all training", meaning, "fail" if split == "time" else "note")
        )
    if data_config.get("withheld_items"):
        in_samples = int(counts["withheld_in_samples"].sum())
        meaning = f"data.withheld_items keeps their items out of training; training samples have {in_samples:,} interactions with them"
        checks.append(check("withheld", "Cold targets", meaning, "fail" if in_samples else "pass"))
    return checks
