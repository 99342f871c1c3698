"""Reads input tables under this project's column names, and records the use of each column."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc

from recsys.config.data import ColumnsConfig, DataConfig
from recsys.data.manifest import ColumnUse
from recsys.errors import UserError
from recsys.ingest.sources.formats import FILE_SHIFT, INPUT_ORDER, FilePart, plan_parts, read_header, read_tables
from recsys.ingest.sources.item_columns import (
    AN_INDEX,
    as_kind,
    as_vectors,
    infer_kind,
    is_index_name,
    is_missing,
    odd_vector,
    scalar_lists,
    title_column,
)
from recsys.ingest.sources.known_layouts import catalogue_kinds, find_column, is_amazon_review, slate_columns
from recsys.ingest.sources.sandbox import reading
from recsys.ingest.sources.scalars import ids_of, is_list, is_text, simple_lists, spell, without_point_zero
from recsys.ingest.sources.slates import expand_slates
from recsys.ingest.sources.text_files import ATOMIC_TYPES, TEXT, WHOLE_JSON, is_jsonl
from recsys.schema import (
    CONTEXT_PREFIX,
    DISPLAY_POSITION,
    EVENT,
    IMPRESSION_ID,
    ITEM_ID,
    LABEL_PREFIX,
    POSITION,
    QUERY,
    SLICE_PREFIX,
    SPLIT,
    TIMESTAMP,
    USER_ID,
    VALUE,
    FeatureKind,
)
from recsys.store import ObjectInfo, Storage

Headers = Mapping[str, Mapping[str, str]]
"""The columns of each file with their declared types."""

_ATTRIBUTE = "attribute"
_TAKEN = {
    USER_ID: "another column is the id",
    ITEM_ID: "another column is the id",
    INPUT_ORDER: "this name is reserved for the row number; rename the column",
}
_LEFT_OUT = "data.item_features names the columns that are used, and not this one"
_IGNORED = "data.item_features.ignored names it"
_OF_LAYOUT = "the known layout of this file leaves it out"


@dataclass(frozen=True)
class Imported:
    """A part of a table under this project's column names, uncast, batch by batch, and the use of each file column."""

    uses: tuple[ColumnUse, ...]
    tables: Iterator[pa.Table]

    def __iter__(self) -> Iterator[pa.Table]:
        return self.tables


@dataclass(frozen=True)
class Items:
    """The whole catalogue: `item_id` as text and the feature columns, the kind of each feature, and the use of each file column."""

    rows: pa.Table
    kinds: dict[str, FeatureKind]
    uses: tuple[ColumnUse, ...]


def find_event_columns(storage: Storage, uri: str, data: DataConfig) -> dict[str, str]:
    """Return the file columns that the event columns come from, as {project's name: file's name}.

    Events are ordered by the timestamp if there is one, otherwise by the position. A column that the config renames must exist; event,
    value and query may be set to an empty name and are then not read. JSON lines always get a query column, since few events may have
    the key, and perhaps none of the lines that the header is read from.

    Raises:
        UserError: a required column is missing; the error lists the columns that exist.
    """
    return _match_event_columns(uri, list(read_header(storage, uri, data.csv)), data.columns)


def _match_event_columns(uri: str, names: list[str], columns: ColumnsConfig) -> dict[str, str]:
    if slates := slate_columns(uri, columns):
        return _match_slates(uri, names, columns, slates)
    found = {canonical_name: find_column(canonical_name, columns, names) for canonical_name in (USER_ID, ITEM_ID)}
    time_column = TIMESTAMP if find_column(TIMESTAMP, columns, names) in names else POSITION
    found[time_column] = find_column(time_column, columns, names)
    if is_jsonl(uri):
        names = [*names, columns.query, *columns.labels.values(), *columns.slices, *columns.context, *filter(None, [columns.split])]
    for optional in (EVENT, VALUE, QUERY, IMPRESSION_ID, DISPLAY_POSITION):
        name = find_column(optional, columns, names)
        if name and (name in names or name != optional):
            found[optional] = name
    found |= {f"{LABEL_PREFIX}{task}": name for task, name in columns.labels.items()}
    found |= {f"{SLICE_PREFIX}{name}": name for name in columns.slices} | ({SPLIT: columns.split} if columns.split else {})
    found |= {f"{CONTEXT_PREFIX}{name}": name for name in columns.context}
    for canonical_name, name in found.items():
        if name == INPUT_ORDER:
            raise UserError(f"{uri}: its column '{name}' ({canonical_name}) has a name that is reserved for the row number; rename it")
        if name not in names:
            wanted = f"'{columns.timestamp}' or '{columns.position}'" if canonical_name == POSITION else f"'{name}'"
            raise _missing(uri, wanted, canonical_name, names)
    return found


def _match_slates(uri: str, names: list[str], columns: ColumnsConfig, slates: dict[str, str]) -> dict[str, str]:
    """Return the file columns that the event columns of slates come from; the slate gives the item, the kind and the position."""
    time = next((name for name in (find_column(TIMESTAMP, columns, names), "time") if name in names), None)
    position = columns.position if time is None and columns.position in names else None
    found = {
        USER_ID: find_column(USER_ID, columns, names),
        (TIMESTAMP if position is None else POSITION): time or position or columns.timestamp,
    }
    for canonical_name, name in (*found.items(), *slates.items()):
        if name not in names:
            raise _missing(uri, f"'{name}'", canonical_name, names)
    impression = columns.impression_id if columns.impression_id in names else slates["slate"]
    return found | dict.fromkeys((ITEM_ID, EVENT, DISPLAY_POSITION), slates["slate"]) | {IMPRESSION_ID: impression}


def _read_slates(
    storage: Storage, part: FilePart, found: dict[str, str], slates: dict[str, str], time_column: str, data: DataConfig
) -> Iterator[pa.Table]:
    """Read a part's slates as events."""
    own = {USER_ID: found[USER_ID], time_column: found[time_column]} | slates
    own |= {IMPRESSION_ID: found[IMPRESSION_ID]} if found[IMPRESSION_ID] != slates["slate"] else {}
    for table in read_tables(storage, part, list(dict.fromkeys(own.values())), data.csv, has_lists=True):
        yield expand_slates(pa.table([*(table[name] for name in own.values()), table[INPUT_ORDER]], [*own, INPUT_ORDER]), time_column)


def import_events(storage: Storage, part: FilePart, data: DataConfig, time_column: str) -> Imported:
    """Read the event columns of one part under this project's names.

    Raises:
        UserError: the file cannot be read or lacks a column, for example `time_column`, which the first file has.
    """
    header = read_header(storage, part.uri, data.csv)
    found = _match_event_columns(part.uri, list(header), data.columns)
    if time_column not in found:
        raise UserError(f"{part.uri}: has no column for {time_column}, which the first file of data.events has")

    slates = slate_columns(part.uri, data.columns)

    def tables() -> Iterator[pa.Table]:
        if slates:
            yield from _read_slates(storage, part, found, slates, time_column, data)
            return
        for table in read_tables(storage, part, list(dict.fromkeys(found.values())), data.csv, has_lists=False):
            columns = [
                _without_floats(table[own], header, own) if name in (USER_ID, ITEM_ID, EVENT) else table[own] for name, own in found.items()
            ]
            yield pa.table([*columns, table[INPUT_ORDER]], [*found, INPUT_ORDER])

    used = {own: canonical_name for canonical_name, own in found.items()} | {own: name for name, own in slates.items()}
    return Imported(
        tuple(_use("events", header, name, used.get(name, ""), "" if name in used else _unused_event(name, used)) for name in header),
        tables(),
    )


def _unused_event(name: str, used: Mapping[str, str]) -> str:
    if name == POSITION and TIMESTAMP in used.values():
        return "the order comes from the time"
    return AN_INDEX if is_index_name(name) else "events do not use it"


def import_users(storage: Storage, part: FilePart, data: DataConfig) -> Imported:
    """Read the users of one part: `user_id`, and every other column that can be spelled as text."""
    header = read_header(storage, part.uri, data.csv, is_whole=True)
    id_name = find_column(USER_ID, data.columns, header)
    if id_name not in header:
        raise _missing(part.uri, f"'{id_name}'", USER_ID, list(header))
    wanted = [name for name in header if name == id_name or not (is_index_name(name) or name in (USER_ID, INPUT_ORDER))]
    tables = read_tables(storage, part, wanted, data.csv)
    first = next(tables, None)
    spelled = {} if first is None else {name: _attribute(first[name]) for name in wanted}
    attributes = [name for name in wanted if name != id_name and spelled.get(name) is not None]

    def rename(table: pa.Table) -> pa.Table:
        columns = [_attribute(table[name]) for name in attributes]
        return pa.table(
            [_without_floats(table[id_name], header, id_name), *columns, table[INPUT_ORDER]], [USER_ID, *attributes, INPUT_ORDER]
        )

    uses = dict.fromkeys(attributes, _ATTRIBUTE) | {id_name: USER_ID}
    reasons = {name: AN_INDEX if is_index_name(name) else "values of this type cannot be read as text" for name in header} | _TAKEN
    reasons |= dict.fromkeys(uses, "")
    return Imported(
        tuple(_use("users", header, name, uses.get(name, ""), reasons[name]) for name in header),
        (rename(table) for table in chain(() if first is None else (first,), tables)),
    )


def _attribute(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Spell an attribute as text; return None if its type has no text form."""
    try:
        return pc.binary_join(spell(simple_lists(column)), "|") if is_list(column.type) else spell(column)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return None


def _without_floats(column: pa.ChunkedArray, header: Mapping[str, str], name: str) -> pa.ChunkedArray:
    """Strip `.0` from ids of CSV, RecBole and MovieLens files; strings in Parquet and JSON stay unchanged."""
    return without_point_zero(column) if header.get(name, TEXT) in (TEXT, *ATOMIC_TYPES) else column


def _use(table: str, header: Mapping[str, str], name: str, use: str, reason: str) -> ColumnUse:
    return ColumnUse(table=table, name=name, type=header[name], use=use, reason=reason)


def _share_of_files(name: str, headers: Headers) -> str:
    num_files = sum(name in header for header in headers.values())
    return f"{num_files} of {len(headers)} files have it" if num_files < len(headers) else ""


def import_items(storage: Storage, files: Sequence[ObjectInfo], data: DataConfig) -> Items:
    """Read the whole catalogue.

    Kinds come from the config, else from a known layout, else from `item_columns.infer_kind`. Text of a category is split into a list,
    at the configured separator, or at blanks if RecBole declares a token_seq; a vector is a list of numbers.

    Raises:
        UserError: a column is missing or changes its type between files, vectors differ in length, or there are no rows.
    """
    features = data.item_features
    is_told = bool(catalogue_kinds(features, read_header(storage, files[0].uri, data.csv)))
    headers = {file.uri: read_header(storage, file.uri, data.csv, is_whole=not is_told) for file in files}
    first = headers[files[0].uri]
    header = {name: declared for own in reversed(headers.values()) for name, declared in own.items()}
    header = {name: header[name] for name in (*first, *(name for name in header if name not in first))}
    id_name = find_column(ITEM_ID, data.columns, first)
    ignored = {**dict.fromkeys(data.sensitive, "data.sensitive names it"), **dict.fromkeys(features.ignored, _IGNORED)}
    known = {name: kind for name, kind in catalogue_kinds(features, first).items() if name not in ignored}
    if is_amazon_review(first) and not known:
        raise UserError(
            f"{files[0].uri}: holds reviews, whose text is not the items'; the catalogue is the file meta_*.jsonl.gz in the same folder"
        )
    for name in (id_name, *known):
        if name not in first:
            raise _missing(files[0].uri, f"'{name}'", ITEM_ID if name == id_name else known[name], list(first))
    wanted = list(known) or [name for name in header if name not in (id_name, ITEM_ID, INPUT_ORDER, *ignored)]
    table = _read_whole(storage, files, headers, id_name, wanted, data)
    title = title_column([name for name in wanted if known.get(name, "text") == "text"])
    kinds, reasons = dict(known), dict.fromkeys(header, _LEFT_OUT if features.names_columns else _OF_LAYOUT)
    reasons |= _TAKEN | ignored | dict.fromkeys((id_name, *known), "")
    columns: dict[str, pa.ChunkedArray] = {}
    for name in wanted:
        columns[name] = scalar_lists(table[name])
        if not known:
            kind, reasons[name] = infer_kind(name, columns[name], header[name], name == title)
            kinds |= {name: kind} if kind else {}
    for name, kind in kinds.items():
        before = columns[name]
        columns[name] = _as_feature(before, name, kind, header[name], features.separator)
        if kind == "numbers" and (lost := _lost_numbers(before, columns[name], name)):
            reasons[name] = lost
        if kind == "vectors" and (odd := odd_vector(columns[name])) is not None:
            place = int(table[INPUT_ORDER][odd[0]].as_py())
            raise UserError(
                f"{files[place >> FILE_SHIFT].uri}: row {place % (1 << FILE_SHIFT) + 1}: column '{name}' has a vector of {odd[1]} numbers, "
                f"where most rows have {odd[2]}; make them equal, or exclude the column with data.item_features.ignored=['{name}']"
            )
    rows = pa.table([table[ITEM_ID], *(columns[name] for name in kinds), table[INPUT_ORDER]], [ITEM_ID, *kinds, INPUT_ORDER])
    uses: dict[str, str] = {**kinds, id_name: ITEM_ID}
    reasons |= {name: note for name in uses if (note := _share_of_files(name, headers))}
    return Items(rows, kinds, tuple(_use("items", header, name, uses.get(name, ""), reasons[name]) for name in header))


def _as_feature(column: pa.ChunkedArray, name: str, kind: FeatureKind, declared: str, separator: str) -> pa.ChunkedArray:
    if kind == "vectors":
        return as_vectors(column, name)
    try:
        column = as_kind(column, kind)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise UserError(f"data.item_features.{kind}: column '{name}' ({column.type}) cannot be read as {kind} ({error})") from error
    if kind == "categories" and pa.types.is_string(column.type):
        if declared == "token_seq":
            return pc.utf8_split_whitespace(pc.utf8_trim_whitespace(column))
        if declared not in ATOMIC_TYPES and separator:
            return pc.split_pattern(column, separator)
    return column


def _lost_numbers(before: pa.ChunkedArray, numbers: pa.ChunkedArray, name: str) -> str:
    """Describe the values of a number column that are not numbers, except the usual words for a missing one; empty if none.

    Raises:
        UserError: no value is a number.
    """
    is_lost = pc.and_(pc.invert(is_missing(before)), numbers.is_null()) if not is_list(before.type) else before.is_valid()
    num_lost = pc.sum(is_lost).as_py() or 0
    if not num_lost:
        return ""
    example = str(before.filter(is_lost)[0].as_py())[:60]
    if numbers.null_count == len(numbers) or is_list(before.type):
        raise UserError(f"data.item_features.numbers: column '{name}' has no number in any row; it has values such as '{example}'")
    return f"{num_lost} values are not numbers, such as '{example}'"


def _read_whole(
    storage: Storage, files: Sequence[ObjectInfo], headers: Headers, id_name: str, wanted: list[str], data: DataConfig
) -> pa.Table:
    """Read all files into one table, ids as text; a column that a file lacks is null there."""
    tables: list[pa.Table] = []
    for part in plan_parts(storage, files):
        header = headers[part.uri]
        if id_name not in header:
            raise _missing(part.uri, f"'{id_name}'", "which the first file has", list(header))
        own = [name for name in wanted if name in header or is_jsonl(part.uri)]
        for table in read_tables(storage, part, list(dict.fromkeys([id_name, *own])), data.csv):
            with reading(part.uri):
                ids = ids_of(_without_floats(table[id_name], header, id_name), id_name)
            tables.append(pa.table([ids, *(table[name] for name in own), table[INPUT_ORDER]], [ITEM_ID, *own, INPUT_ORDER]))
    if not any(table.num_rows for table in tables):
        raise UserError(f"{files[0].uri}: has no rows")
    try:
        return pa.concat_tables(_with_equal_lists(tables), promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{files[0].uri}: a column changes its type from one file or batch to the next ({error})") from error


def _with_equal_lists(tables: list[pa.Table]) -> list[pa.Table]:
    """Cast a JSON column to one type where batches differ: lists of text if any batch has those, else lists of floats if any has those."""
    kinds = {(field.name, field.type) for table in tables for field in table.schema}
    texts, vectors = ({name for name, kind in kinds if kind == pa.list_(value)} for value in (pa.string(), pa.float64()))

    def align(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
        if name in texts:
            return _as_text_lists(column)
        return column.cast(pa.list_(pa.float64())) if name in vectors and column.type == pa.list_(WHOLE_JSON) else column

    return [
        pa.table([align(*pair) for pair in zip(table.column_names, table.columns, strict=True)], table.column_names) for table in tables
    ]


def _as_text_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if is_list(column.type):
        return spell(simple_lists(column))
    if not is_text(column):
        return column
    texts = column.combine_chunks()
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(range(len(texts) + 1), pa.int32()), texts, mask=texts.is_null())])


def _missing(uri: str, wanted: str, meaning: str, names: list[str]) -> UserError:
    shown = ", ".join(name[:80] for name in names[:50]) + (", ..." if len(names) > 50 else "")
    return UserError(f"{uri}: has no column {wanted} ({meaning}); its columns are {shown}; data.columns.* maps other names")
