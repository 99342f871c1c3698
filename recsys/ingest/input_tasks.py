"""Tasks that read input files and write cleaned events and user attributes as pieces by partition."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from recsys.config.data import AUTO
from recsys.data.manifest import ColumnUse
from recsys.errors import UserError
from recsys.ingest.clean.cleaning import apply_rules, cast_events, drop_ignored, is_long, normalize_queries, notice_ids, notice_rounded
from recsys.ingest.clean.pseudonyms import pseudonymize
from recsys.ingest.clean.rejects import Rejects
from recsys.ingest.clean.times import UNIT_NAMES, find_other_unit
from recsys.ingest.job import Cleaned, Job
from recsys.ingest.shuffle import write_pieces
from recsys.ingest.sources.column_mapping import Imported, import_events, import_users
from recsys.ingest.sources.formats import FILE_SHIFT, INPUT_ORDER, FilePart
from recsys.ingest.sources.sandbox import reading
from recsys.ingest.sources.scalars import ids_of
from recsys.schema import EVENTS_SCHEMA, TIMESTAMP, USER_ID, USERS_SCHEMA

ATTRIBUTES = "attributes"
STAGED_USERS = pa.schema([USERS_SCHEMA.field(USER_ID), USERS_SCHEMA.field(ATTRIBUTES), EVENTS_SCHEMA.field(INPUT_ORDER)])


def stage_events(job: Job, task: int, parts: Sequence[FilePart]) -> Cleaned:
    """Cast and clean parts of the events and write them as pieces; user ids become pseudonyms if a key is configured."""
    rejects, noticed = Rejects(), Counter[str]()

    def clean(raw: pa.Table) -> pa.Table:
        _check_unit(job, raw)
        events, faults = cast_events(raw, job.time_unit, job.optional)
        events, broken = apply_rules(events, job.data.cleaning, job.has_time, raw)
        events, ignored = drop_ignored(events, job.data)
        for found in (faults, broken, ignored):
            rejects.merge(found)
        events, of_queries = normalize_queries(events)
        noticed.update(notice_ids(events) + of_queries + notice_rounded(raw))
        return events

    imported = ((part, import_events(job.storage, part, job.data, job.time_column)) for part in parts)
    num_rows, uses = _write_pieces(job, "pieces", task, imported, clean)
    _redact_users(job, rejects, "null_user", "long_id", "negative_id")
    return Cleaned(rows=num_rows, rejected=rejects, examples=rejects.examples, noticed=noticed, uses=uses)


def stage_users(job: Job, task: int, parts: Sequence[FilePart]) -> Cleaned:
    """Convert parts of the users table to ids with attributes and write them as pieces."""
    rejects = Rejects()
    imported = ((part, import_users(job.storage, part, job.data)) for part in parts)
    num_rows, uses = _write_pieces(job, "user-pieces", task, imported, lambda raw: _with_attributes(raw, rejects))
    _redact_users(job, rejects, "user_null_id", "user_long_id")
    return Cleaned(rows=num_rows, rejected=rejects, examples=rejects.examples, uses=uses)


def _write_pieces(
    job: Job, folder: str, task: int, imported: Iterable[tuple[FilePart, Imported]], clean: Callable[[pa.Table], pa.Table]
) -> tuple[int, tuple[ColumnUse, ...]]:
    """Clean the parts' tables and write them by user partition; return the number of rows read and the use of each column."""
    num_rows = 0
    uses: dict[ColumnUse, None] = {}

    def tables() -> Iterator[pa.Table]:
        nonlocal num_rows
        for part, raw_tables in imported:
            uses.update(dict.fromkeys(raw_tables.uses))
            for raw in raw_tables:
                num_rows += raw.num_rows
                with reading(part.uri):
                    table = clean(raw)
                ids = pseudonymize(table[USER_ID], job.data.pseudonym_key_env)
                yield table.set_column(table.column_names.index(USER_ID), table.schema.field(USER_ID), ids)

    write_pieces(job.storage, job.staging(folder), task, tables(), USER_ID, job.num_partitions)
    return num_rows, tuple(uses)


def _check_unit(job: Job, raw: pa.Table) -> None:
    """Refuse times whose digits show another unit than the first file's, if the unit is inferred from digits."""
    if not job.has_time or job.data.time_unit != AUTO:
        return
    found = find_other_unit(raw[TIMESTAMP], job.time_unit)
    if found is not None:
        place, number = found
        row = raw[INPUT_ORDER][place].as_py() % (1 << FILE_SHIFT) + 1
        raise UserError(
            f"row {row}: the time {number} is not in {UNIT_NAMES[job.time_unit]}, the unit that was inferred from the first times of "
            "the input; set data.time_unit to the unit of all times"
        )


def _redact_users(job: Job, rejects: Rejects, *rules: str) -> None:
    if job.data.pseudonym_key_env:
        rejects.hide(rules)


def _with_attributes(raw: pa.Table, rejects: Rejects) -> pa.Table:
    names = [name for name in raw.column_names if name not in (USER_ID, INPUT_ORDER)]
    rows = zip(*(raw[name].to_pylist() for name in names), strict=True) if names else [()] * raw.num_rows
    pairs = [[(name, value) for name, value in zip(names, row, strict=True) if value] for row in rows]
    attributes = pa.array(pairs, STAGED_USERS.field(ATTRIBUTES).type)
    ids = ids_of(raw[USER_ID], USER_ID)
    rejects.add("user_null_id", ids.is_null(), raw[INPUT_ORDER], raw[USER_ID])
    rejects.add("user_long_id", is_long(ids), raw[INPUT_ORDER], ids)
    table = pa.table([ids, attributes, raw[INPUT_ORDER]], schema=STAGED_USERS)
    return table.filter(pc.and_(ids.is_valid(), pc.invert(is_long(ids))))
