"""The dataset report: one self-contained page of HTML."""

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from recsys.arrays import Integers
from recsys.data.manifest import ColumnUse, DatasetManifest, Example
from recsys.ingest.clean.rejects import NOTICED, REJECTED
from recsys.ingest.clean.times import UNIT_NAMES
from recsys.ingest.report import plots
from recsys.ingest.report.checks import Check, check_split
from recsys.ingest.report.counts import SPLITS, Limits
from recsys.ingest.write.statistics import NUM_PERIODS
from recsys.report.page import figure, grid, header, page, section

REPORT_NAME = "report.html"
_NO_TIME = "This dataset has positions, not times, so this cannot be told."
_NO_VALUES = "No interaction has a value."


@dataclass(frozen=True)
class Findings:
    """What the report is made from: the manifest, the merged counts and limits, and the statistics of all items."""

    manifest: DatasetManifest
    counts: dict[str, Integers]
    limits: Limits
    items: pa.Table


def make_report(findings: Findings) -> str:
    """Write the page."""
    manifest = findings.manifest
    sections = [
        _header(findings),
        section("Does the split leak?", _checks(findings)),
        section("Interactions", grid(_interactions(findings))),
        section("Users and items", grid(_users_and_items(findings))),
        section("Input", _input(manifest)),
        section("Cleaning", grid(_cleaning(manifest)) + _rules(manifest)),
        section("How it was made", _making(manifest)),
    ]
    return page(f"Dataset {findings.manifest.fingerprint[:12]}", sections)


def _bars(name: str, title: str, caption: str, bars: dict[str, int], unit: str, nothing: str = "") -> str:
    draw = partial(plots.draw_bars, bars=bars, unit=unit, has_shares=unit != "cases") if bars else nothing
    return figure(name, title, caption, draw, plots.bars_height(bars))


def _header(findings: Findings) -> str:
    manifest = findings.manifest
    density = int(findings.counts["pairs"].sum()) / max(1, manifest.num_users * manifest.num_items)
    numbers = {
        "users": f"{manifest.num_users:,}",
        "items": f"{manifest.num_items:,}",
        "interactions": f"{manifest.num_interactions:,}",
        "of all pairs": f"{density:.2%}",
        "training samples": f"{manifest.num_samples:,}",
        "rejected rows": f"{sum(manifest.rejected.values()):,}",
    }
    lead = f"Version {manifest.version}, fingerprint <code>{html.escape(manifest.fingerprint)}</code>"
    rule = manifest.tie_rule[:1].upper() + manifest.tie_rule[1:]
    return header("Dataset report", f"{lead}<br>{html.escape(rule)}.", numbers)


def _checks(findings: Findings) -> str:
    manifest = findings.manifest
    checks = check_split(findings.counts, manifest.data_config, manifest.has_time)
    rows = "\n".join(_check_row(check) for check in checks)
    head = (
        "<tr><th>Check</th><th class='number'>Validation</th><th class='number'>Test</th><th class='number'>Share</th><th>Result</th></tr>"
    )
    return (
        "<p>Counted over every validation and test target, against the training samples as they were written.</p>\n"
        f'<div class="card"><table class="checks" id="checks"><thead>{head}</thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )


def _check_row(check: Check) -> str:
    cells = [f"{found:,} of {targets:,}" for found, targets in zip(check.found, check.targets, strict=True)] + [f"{check.share:.2%}"]
    labels = ("Validation", "Test", "Share")
    numbers = "".join(f'<td class="number" data-label="{label}">{cell}</td>' for label, cell in zip(labels, cells, strict=True))
    title = f'<th scope="row">{html.escape(check.title)}<span class="why">{html.escape(check.meaning)}</span></th>'
    return f'<tr>{title}{numbers}<td><span class="state {check.state}">{check.state}</span></td></tr>'


def _interactions(findings: Findings) -> list[str]:
    counts, limits, manifest = findings.counts, findings.limits, findings.manifest
    splits = dict(zip(SPLITS, counts["splits"].tolist(), strict=True))
    kinds = dict(zip(manifest.event_kinds, counts["kinds"].tolist(), strict=True))
    num_values = int(counts["values"].sum()) if limits.values else 0
    users = " and ".join(f"{count:,} users have {name}" for name, count in zip(SPLITS[1:], counts["users_with"].tolist()[1:], strict=True))
    return [
        figure(
            "times",
            "Interactions over time",
            "Gaps and spikes are outages or imports. With a split by time the colours follow one another; with leave-one-out they overlap.",
            partial(plots.draw_times, counts=counts, times=limits.times) if limits.times else _NO_TIME,
        ),
        _bars("splits", "Size of the splits", f"{users} targets.", splits, "interactions"),
        _bars(
            "kinds",
            "Interactions by kind",
            "From weak to strong. A kind with a tiny share gives a task with few positive labels.",
            kinds,
            "interactions",
        ),
        figure(
            "values",
            "Values",
            f"{num_values / max(1, manifest.num_interactions):.1%} of the interactions have a value. A pile at one end says that "
            "users rate what they like.",
            partial(plots.draw_values, counts=counts, values=limits.values) if limits.values else _NO_VALUES,
        ),
    ]


def _users_and_items(findings: Findings) -> list[str]:
    counts, manifest, train_counts = findings.counts, findings.manifest, findings.items["train_count"].to_numpy()
    has_time = findings.limits.times is not None
    gap = int(manifest.data_config.get("session_gap_seconds", 0))
    num_cold = int((train_counts == 0).sum())
    median = _median_item(train_counts)
    periods = findings.items["period_counts"].combine_chunks().flatten().to_numpy().reshape(-1, NUM_PERIODS)
    lengths = partial(plots.draw_lengths, counts=counts["lengths"], unit="interactions of a user", owners="users")
    return [
        figure(
            "lengths",
            "History lengths",
            f"Histories are cut at data.max_history = {manifest.data_config.get('max_history')}; longer ones give several samples.",
            lengths,
        ),
        figure(
            "popularity",
            "The long tail of items",
            f"Half of all training interactions go to {median:,} items ({median / max(1, len(train_counts)):.1%}); "
            f"{num_cold:,} items have none and rest on their text and features.",
            partial(plots.draw_long_tail, train_counts=train_counts),
        ),
        figure(
            "periods",
            "Popularity by period",
            f"Training time in {NUM_PERIODS} equal periods. A share of the top items that moves says that popularity drifts.",
            partial(plots.draw_periods, periods=periods, train_counts=train_counts) if has_time else _NO_TIME,
        ),
        figure(
            "new-items",
            "New items by period",
            "Items whose first training interaction falls into the period. A stream that does not dry up asks for frequent exports.",
            partial(plots.draw_new_items, periods=periods) if has_time else _NO_TIME,
        ),
        figure(
            "gaps",
            "Time between interactions",
            f"A session ends where more than {gap:,} seconds pass (data.session_gap_seconds); a good limit lies in a valley.",
            partial(plots.draw_gaps, counts=counts["gaps"], session_gap_seconds=gap) if has_time else _NO_TIME,
        ),
        figure(
            "sessions",
            "Session lengths",
            "Many sessions of one interaction say that the gap is short, or that users come for one thing.",
            partial(plots.draw_lengths, counts=counts["session_lengths"], unit="interactions in a session", owners="sessions")
            if has_time
            else _NO_TIME,
        ),
    ]


def _median_item(train_counts: Integers) -> int:
    running = np.cumsum(np.sort(train_counts)[::-1])
    return int(np.searchsorted(running, running[-1] / 2) + 1) if len(running) and running[-1] else 0


def _cleaning(manifest: DatasetManifest) -> list[str]:
    of = " Of the events that this version appended." if manifest.base else ""
    dropped = f"Rows that are not in the dataset, each under the first rule that it breaks.{of}"
    kept = "Nothing was dropped for these; a number that surprises is worth a look at the source." + of
    return [
        _bars("rejected", "Rejected rows by reason", dropped, manifest.rejected, "rows", "No row was rejected."),
        _bars("noticed", "Kept, but odd", kept, manifest.noticed, "cases", "Nothing odd was found."),
    ]


def _rules(manifest: DatasetManifest) -> str:
    found = {name: text for name, text in {**REJECTED, **NOTICED}.items() if name in manifest.rejected or name in manifest.noticed}
    rows = [
        (f"<code>{name}</code>", html.escape(text) + _examples(manifest.rejected_examples.get(name, ()))) for name, text in found.items()
    ]
    return f'<div style="margin-top: 18px">{_table(rows)}</div>' if rows else ""


def _examples(examples: Sequence[Example]) -> str:
    shown = "".join(f"<br>{html.escape(each.file)}, row {each.row}: <code>{html.escape(each.value)}</code>" for each in examples)
    return f'<span class="why">{shown.removeprefix("<br>")}</span>' if shown else ""


def _input(manifest: DatasetManifest) -> str:
    """Return how the input was read: what to look at, the unit of its times, and what became of each column."""
    unit = UNIT_NAMES.get(manifest.time_unit)
    notes = [("Look at this", html.escape(warning)) for warning in manifest.warnings]
    notes += [("Times", f"Numbers are read as {unit} (<code>data.time_unit</code>).")] if unit else []
    columns = [
        (f"{use.table}.<code>{html.escape(use.name)}</code>", f"{html.escape(use.use) or '<b>not used</b>'}{_why(use)}")
        for use in sorted(manifest.columns, key=lambda use: (bool(use.use), use.table))
    ]
    return _table([*notes, *columns]) if notes or columns else "<p>The generator's tables.</p>"


def _why(use: ColumnUse) -> str:
    return f'<span class="why">{html.escape(", ".join(part for part in (use.type, use.reason) if part))}</span>'


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "\n".join(f'<tr><th scope="row">{name}</th><td>{text}</td></tr>' for name, text in rows)
    return f'<div class="card"><table>\n{cells}\n</table></div>'


def _making(manifest: DatasetManifest) -> str:
    settings = {**manifest.data_config, "inputs": manifest.inputs}
    rows = "\n".join(
        f'<tr><th scope="row"><code>{html.escape(key)}</code></th><td><code>{html.escape(json.dumps(value))}</code></td></tr>'
        for key, value in settings.items()
    )
    summary = "<summary>The config of the data section, and the inputs</summary>"
    return f'<div class="card"><details>{summary}\n<table>\n{rows}\n</table></details></div>'
