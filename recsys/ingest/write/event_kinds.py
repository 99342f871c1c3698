"""The event kinds of a dataset, weak to strong, with their roles."""

from recsys.config.data import DataConfig
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.ingest.write.exposures import labelled_kinds
from recsys.schema import Kind, order_event_kinds

_MAX_EVENT_KINDS = 127


def choose_kinds(found: set[str], data: DataConfig, base: Dataset | None) -> tuple[tuple[Kind, ...], list[str]]:
    """Return the base's kinds or, without a base, those of the events or the label columns; and warnings about `data.kinds`.

    Raises:
        UserError: the events have a kind that the base does not have, or too many kinds.
    """
    found = set(labelled_kinds(data)) if data.columns.labels else found
    unknown = sorted(name for name, kind in data.kinds.items() if name not in found and kind.role != "ignored")
    warnings = [f"data.kinds.{name}: no event is of this kind; there are {', '.join(sorted(found))}" for name in unknown]
    if base is not None:
        known = base.manifest.event_kinds
        if new := sorted(found.difference(known)):
            raise UserError(
                f"data.events = {data.events}: has the event kind '{new[0]}', which the base dataset does not have; "
                f"it has {', '.join(known)}; prepare a new dataset from all events"
            )
        return base.manifest.kind_table, []
    kinds = {name: data.kind(name) for name in found}
    configured = data.event_kinds or tuple(data.columns.labels)
    names = order_event_kinds(found, configured, {name: kind.role for name, kind in kinds.items()})
    if len(names) > _MAX_EVENT_KINDS:
        raise UserError(f"data.columns.event = '{data.columns.event}': has {len(names)} kinds; at most {_MAX_EVENT_KINDS} are possible")
    return tuple(kinds[name] for name in names), warnings
