"""The tables of the evaluation report."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

MEANINGS = {
    "hr": "users with a target among the k best",
    "ndcg": "targets near the top count more; 1 is the best order",
    "mrr": "one over the rank of the first target",
    "recall": "share of a user's targets among the k best",
    "coverage": "share of the catalogue that somebody is recommended",
    "gini": "how unequally often items are recommended: 0 all alike, 1 one alone",
    "novelty": "bits of surprise of a recommended item",
    "intra_list_diversity": "1 - the mean cosine of the items of a list, by what the catalogue says of them",
    "popularity_percentile": "share of the catalogue that is less popular than what is recommended",
    "popularity_lift": "the same, over that of the users' histories: above 1 follows the crowd",
    "rmse": "root of the mean squared error, in the units of the value",
    "logloss": "surprise at the labels",
    "auc": "share of pairs of labels in the right order, over all users",
    "uauc": "the same within each user, averaged over users",
    "ece": "how far probabilities are from frequencies, in 15 bins",
    "num_labels": "targets with a label",
}


def metrics(result: Mapping[str, Any], metric: str) -> str:
    """Lay out all metrics of the model with their intervals, the baselines beside; other list lengths are folded away."""
    cutoff = metric.partition("@")[2]
    names = list(result["metrics"])
    main = [name for name in names if name.endswith(f"@{cutoff}") or "@" not in name]
    others = [name for name in names if name not in main]
    folded = f"<details><summary>Lists of other lengths</summary>\n{_metric_table(result, others)}</details>" if others else ""
    absent = "".join(f"<p>{html.escape(name)}: no metrics, since {html.escape(why)}.</p>" for name, why in result["absent_tasks"].items())
    return f'<div class="card" role="region" aria-label="Metrics" tabindex="0">{_metric_table(result, main)}\n{absent}{folded}</div>'


def _metric_table(result: Mapping[str, Any], names: Sequence[str]) -> str:
    rows = []
    for name in names:
        meaning = MEANINGS.get(name.partition("@")[0].rpartition(".")[2], "")
        cells = [_number(result["metrics"][name]) + _interval(result["interval_95"].get(name))]
        cells += [_number(found.get(name)) for found in result["baselines"].values()]
        rows.append(_row(name, cells, meaning))
    return _table(("Metric", "Model", *result["baselines"]), rows)


def comparison(compared: Mapping[str, Any], metric: str) -> str:
    """Lay out the paired test: of all users the metrics of lists of the main length, of each slice the main metric."""
    rows = [
        _row(name, [_number(found["value"]), _number(found["other"]), *_difference(found)], MEANINGS[name.partition("@")[0]])
        for name, found in compared["metrics"].items()
        if name.partition("@")[2] == metric.partition("@")[2]
    ]
    lead = f"<p>The same users, in pairs, with <code>{html.escape(compared['checkpoint'])}</code>.</p>"
    head = ("Metric", "This", "Other", "Difference, 95 % interval", "p")
    in_slices = [_row(name, _difference(found[metric])) for name, found in compared["slices"].items()]
    folded = f"<details><summary>{metric} slice by slice</summary>\n{_table(('Slice', *head[3:]), in_slices)}</details>"
    return f'{lead}<div class="card" role="region" aria-label="Comparison" tabindex="0">{_table(head, rows)}\n{folded}</div>'


def queries(found: Mapping[str, Any]) -> str:
    """Lay out what a query adds, beside the same users' figures without one."""
    without = found.get("without_query", {})
    rows = [_row(name, [_number(value), _number(without[name])]) for name, value in found.get("with_query", {}).items()]
    lead = f"<p>{html.escape(found['protocol'][:1].upper() + found['protocol'][1:])}. {found['num_users']:,} users.</p>"
    table = _table(("Metric", "With a query", "Without"), rows)
    return f'{lead}<div class="card" role="region" aria-label="Queries" tabindex="0">{table}</div>'


def slices(found: Mapping[str, Any], metric: str) -> str:
    """Lay out all slices, folded away."""
    hits = f"hr@{metric.partition('@')[2]}"
    names = list(dict.fromkeys((metric, hits)))
    rows = []
    for name, each in found.items():
        cells = [f"{each['num_users']:,}"]
        for metric_name in names:
            cells += [_number(each[metric_name]) + _interval(each["interval_95"][metric_name]), _number(each["random"][metric_name])]
        rows.append(_row(name, cells))
    heads = [head for name in names for head in (name, "random order")]
    table = _table(("Slice", "Users", *heads), rows)
    return (
        '<div class="card" style="margin-top: 18px" role="region" aria-label="Slices" tabindex="0">'
        f"<details><summary>All slices in numbers</summary>\n{table}</details></div>"
    )


def _difference(found: Mapping[str, Any]) -> list[str]:
    low, high = found["interval_95"]
    return [f"{found['difference']:+.4f}" + f'<span class="why">{low:+.4f} to {high:+.4f}</span>', _number(found["p"])]


def _number(value: float | None) -> str:
    if value is None:
        return '<span aria-label="none">\u2013</span>'
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _interval(interval: Sequence[float] | None) -> str:
    return f'<span class="why">{interval[0]:.4f} to {interval[1]:.4f}</span>' if interval else ""


def _row(name: str, cells: Sequence[str], meaning: str = "") -> str:
    why = f'<span class="why">{html.escape(meaning)}</span>' if meaning else ""
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f'<tr><th scope="row">{html.escape(name)}{why}</th>{numbers}</tr>'


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    first, *others = (html.escape(head) for head in heads)
    head = f'<tr><th scope="col">{first}</th>' + "".join(f'<th scope="col" class="number">{each}</th>' for each in others) + "</tr>"
    return f"<table><thead>{head}</thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
