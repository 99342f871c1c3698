"""The training report: one self-contained page of HTML, drawn from the training state."""

import html
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from recsys.report.labels import readable
from recsys.report.page import figure, grid, header, page, section
from recsys.report.svg import FIRST, GRID, INK, SECOND
from recsys.train.state import Epoch, Incident, TrainingState

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT_NAME = "training.html"
_NOTHING = "No epoch came to its end."


def make_report(run: str, state: TrainingState) -> str:
    """Write the page of a run's last state."""
    metric = state.history[-1].metric if state.history else "validation"
    sections = [
        _header(run, metric, state),
        section("Learning", grid([*_losses(state.history), _validation(state, metric)])),
        section("Time", grid([_speed(state.history), _shares(state)])),
        section("Incidents", _incidents(state)),
    ]
    return page(f"Training of {run}", sections)


def _header(run: str, metric: str, state: TrainingState) -> str:
    numbers = {
        f"best {metric}": "none" if state.best_metric is None else f"{state.best_metric:.4f}",
        "steps": f"{state.step:,}",
        "samples per second": f"{state.samples_seen / max(state.train_seconds, 1e-9):,.0f}",
        "goodput": f"{state.goodput:.1%}",
        "incidents": str(len(state.incidents)),
    }
    return header("Training report", f"<code>{html.escape(run)}</code>, {state.samples_seen:,} samples, {state.epoch} epochs.", numbers)


def _losses(history: Sequence[Epoch]) -> list[str]:
    names = dict.fromkeys(name for epoch in history for name in epoch.losses)
    figures = []
    for number, name in enumerate(names):
        points = [(epoch.step, epoch.losses[name]) for epoch in history if name in epoch.losses]
        draw = partial(_draw_line, points=points, across="step", up="loss")
        figures.append(
            figure(f"loss-{number}", f"Loss: {readable(name)}", "Mean over the steps of each epoch, weighed by their samples.", draw)
        )
    return figures or [figure("loss-0", "Loss", "", _NOTHING)]


def _validation(state: TrainingState, metric: str) -> str:
    points = [(epoch.step, epoch.validation) for epoch in state.history]
    best = next((place for place, (step, _) in enumerate(points) if step == state.best_step), None)
    draw = partial(_draw_line, points=points, across="step", up=metric, mark=best) if points else _NOTHING
    return figure("validation", f"Validation {metric}", "After each epoch; the larger point is the best checkpoint.", draw)


def _speed(history: Sequence[Epoch]) -> str:
    points = [(epoch.step, epoch.samples_per_second) for epoch in history]
    draw = partial(_draw_line, points=points, across="step", up="samples/s", has_zero=True) if points else _NOTHING
    return figure("speed", "Samples per second", "Of each epoch's steps, waiting for data included.", draw)


def _shares(state: TrainingState) -> str:
    lost = sum(incident.seconds for incident in state.incidents)
    parts = {
        "steps": state.train_seconds - state.data_wait_seconds,
        "waiting for data": state.data_wait_seconds,
        "checkpoints": state.checkpoint_stall_seconds,
        "incidents": lost,
    }
    parts["validation, start, end"] = max(0.0, state.wall_seconds - sum(parts.values()))
    caption = f"Of {state.wall_seconds:,.0f} s. Goodput is the share of steps that count."
    return figure("time", "Where the time went", caption, partial(_draw_rows, seconds=parts), 2.4)


def _incidents(state: TrainingState) -> str:
    skipped = f"<p>Left out, since their loss was not finite: steps {', '.join(map(str, state.skipped_steps))}.</p>"
    if not state.incidents:
        return "<p>Nothing befell it.</p>" + skipped * bool(state.skipped_steps)
    heads = "".join(f"<th>{name}</th>" for name in ("Step", "Cause", "Seconds lost", "Start", "Load", "First batch"))
    rows = "".join(map(_incident, state.incidents))
    table = (
        f'<div class="card" role="region" aria-label="Incidents" tabindex="0"><table><thead><tr>{heads}</tr></thead>{rows}</table></div>'
    )
    return table + skipped * bool(state.skipped_steps)


def _incident(incident: Incident) -> str:
    causes = "<br>".join(html.escape(str(cause)) for cause in incident.causes) or "found stopped"
    seconds = (incident.seconds, incident.start_seconds, incident.load_seconds, incident.seek_seconds)
    cells = "".join(f'<td class="number">{part:.1f}</td>' for part in seconds)
    return f"<tr><th>{incident.step:,}</th><td>{causes}</td>{cells}</tr>"


def _draw_line(
    axes: "Axes", points: Sequence[tuple[float, float]], across: str, up: str, mark: int | None = None, has_zero: bool = False
) -> None:
    axes.plot(*zip(*points, strict=True), "o-", color=FIRST, markersize=3.5, linewidth=1.8)
    if mark is not None:
        axes.plot(*points[mark], "o", color=SECOND, markersize=9)
    if has_zero:
        axes.set_ylim(bottom=0)
    axes.margins(0.05)
    axes.locator_params(nbins=5)
    axes.set_xlabel(across)
    axes.set_ylabel(readable(up))
    axes.grid(color=GRID)


def _draw_rows(axes: "Axes", seconds: Mapping[str, float]) -> None:
    places = range(len(seconds))[::-1]
    axes.barh(places, list(seconds.values()), color=FIRST, height=0.6)
    axes.set_yticks(places, list(seconds), color=INK)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("seconds")
    axes.grid(axis="x", color=GRID)
