"""The event kinds of a dataset, weak to strong, with their roles."""

from recsys.config.data import DataConfig
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.ingest.write.exposures import labelled_kinds, role_of_exposures
from recsys.schema import Kind, order_event_kinds

_MAX_EVENT_KINDS = 127
_MAX_LABELS = 31
"""Labels are bits of a 32-bit number."""


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
        kinds = base.manifest.kind_table
        if bool(role_of_exposures(kinds, data)) != base.manifest.has_exposures or (
            data.columns.labels and set(labelled_kinds(data)) != set(known)
        ):
            raise UserError("data.columns.labels: the events have other labels or exposures than the base dataset; give its columns")
        return kinds, []
    roles = {name: data.kind(name) for name in found}
    configured = data.event_kinds or tuple(data.columns.labels)
    names = order_event_kinds(found, configured, {name: kind.role for name, kind in roles.items()})
    if len(names) > _MAX_EVENT_KINDS:
        raise UserError(f"data.columns.event = '{data.columns.event}': has {len(names)} kinds; at most {_MAX_EVENT_KINDS} are possible")
    ordered = tuple(roles[name] for name in names)
    if role_of_exposures(ordered, data) and sum(kind.is_target for kind in ordered) > _MAX_LABELS:
        raise UserError(f"data.kinds: exposures can have labels of at most {_MAX_LABELS} positive kinds; give some the role ignored")
    return ordered, warnings
