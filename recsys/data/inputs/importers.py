"""Input tables under the house's column names: which columns are read; casting and counting is `cleaning.py`."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.inputs.formats import INPUT_ORDER, FilePart, plan_parts, read_header, read_tables
from recsys.data.inputs.layouts import catalogue_kinds, find_column, is_amazon_review, time_divisor
from recsys.data.inputs.sandbox import reading
from recsys.data.inputs.text_formats import is_jsonl
from recsys.data_config import ColumnsConfig, DataConfig, ItemFeaturesConfig
from recsys.errors import UserError
from recsys.schema import EVENT, ITEM_ID, POSITION, QUERY, TIMESTAMP, USER_ID, VALUE, FeatureKind, infer_item_features
from recsys.storage import ObjectInfo, Storage

_MISSING_NUMBERS = ("", "none", "null", "nan", "na", "n/a", "-", "\u2014")
_WHOLE_NUMBER = r"^[+-]?\d{1,18}$"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


def find_event_columns(storage: Storage, uri: str, columns: ColumnsConfig) -> dict[str, str]:
    """Tell which of the file's columns the event columns come from, as {house name: file's name}.

    The order comes from the timestamp where there is one and from the position otherwise. A column that the config
    renames must be there; `data.columns.query` may be empty, and then no queries are read. JSON lines always have queries: few events
    may have the key, and none of those that the header is told from.

    Raises:
        UserError: a required column is missing; the line names the columns that exist.
    """
    return _match_event_columns(uri, list(read_header(storage, uri)), columns)


def _match_event_columns(uri: str, names: list[str], columns: ColumnsConfig) -> dict[str, str]:
    found = {house_name: find_column(house_name, columns, names) for house_name in (USER_ID, ITEM_ID)}
    time_column = TIMESTAMP if find_column(TIMESTAMP, columns, names) in names else POSITION
    found[time_column] = find_column(time_column, columns, names)
    if is_jsonl(uri):
        names = [*names, columns.query]
    for optional in (EVENT, VALUE, QUERY):
        name = find_column(optional, columns, names)
        if name and (name in names or name != optional):
            found[optional] = name
    for house_name, name in found.items():
        if name not in names:
            wanted = f"'{columns.timestamp}' or '{columns.position}'" if house_name == POSITION else f"'{name}'"
            raise _missing(uri, wanted, house_name, names)
    return found


def import_events(storage: Storage, part: FilePart, data: DataConfig, time_column: str) -> Iterator[pa.Table]:
    """Read the event columns of one part under the house's names, batch by batch, uncast but that times are in seconds.

    Raises:
        UserError: the file cannot be read or lacks a column; `time_column`, the first file's, is one that it must have.
    """
    names = list(read_header(storage, part.uri))
    found = _match_event_columns(part.uri, names, data.columns)
    if time_column not in found:
        raise UserError(f"{part.uri}: has no column for {time_column}, which the first file of data.events has")
    divisor = time_divisor(data.time_unit, names)
    for table in read_tables(storage, part, list(dict.fromkeys(found.values()))):
        events = pa.table([*(table[name] for name in found.values()), table[INPUT_ORDER]], [*found, INPUT_ORDER])
        if divisor > 1 and TIMESTAMP in found:
            with reading(part.uri):
                seconds = _in_seconds(events[TIMESTAMP], divisor)
            events = events.set_column(events.column_names.index(TIMESTAMP), TIMESTAMP, seconds)
        yield events


def import_users(storage: Storage, part: FilePart, columns: ColumnsConfig) -> Iterator[pa.Table]:
    """Read the users of one part: `user_id` and every other column, uncast."""
    names = list(read_header(storage, part.uri))
    id_name = find_column(USER_ID, columns, names)
    if id_name not in names:
        raise _missing(part.uri, f"'{id_name}'", USER_ID, names)
    for table in read_tables(storage, part, names):
        yield table.rename_columns([USER_ID if name == id_name else name for name in table.column_names])


def import_items(
    storage: Storage, files: Sequence[ObjectInfo], columns: ColumnsConfig, features: ItemFeaturesConfig
) -> tuple[pa.Table, dict[str, FeatureKind]]:
    """Read the whole catalogue: `item_id` and the feature columns, with each one's kind.

    The kinds are the configured ones, those of a known layout or, where there are none, told by type. Text of a category is
    a list, split at the separator of the config, or at blanks where RecBole declares a token_seq.

    Raises:
        UserError: a column is missing or changes its type from file to file, or there is no row.
    """
    header = read_header(storage, files[0].uri)
    id_name = find_column(ITEM_ID, columns, header)
    known = catalogue_kinds(features, header)
    if is_amazon_review(header) and not known:
        raise UserError(f"{files[0].uri}: holds reviews, whose text is not the items'; the catalogue is the file meta_*.jsonl.gz beside it")
    for name in (id_name, *known):
        if name not in header:
            raise _missing(files[0].uri, f"'{name}'", ITEM_ID if name == id_name else known[name], list(header))
    wanted = [id_name, *(known or (name for name in header if name != id_name))]
    table = _read_whole(storage, files, wanted).rename_columns([ITEM_ID, *wanted[1:], INPUT_ORDER])
    lists = [name for name, declared in header.items() if declared in ("token_seq", "float_seq") and name in wanted]
    numbers = {name for name, declared in header.items() if declared in ("float", "float_seq")}
    kinds = known or _infer_kinds(table, lists, numbers, is_typed=any(header.values()))
    table = _split_lists(table, [name for name in lists if kinds[name] != "text"])
    return _split_categories(table, [name for name in kinds if kinds[name] == "categories" and not header[name]], features.separator), kinds


def _read_whole(storage: Storage, files: Sequence[ObjectInfo], wanted: list[str]) -> pa.Table:
    tables: list[pa.Table] = []
    for part in plan_parts(storage, files):
        names = list(read_header(storage, part.uri))
        missing = [name for name in wanted if name not in names]
        if missing and not is_jsonl(part.uri):
            raise _missing(part.uri, f"'{missing[0]}'", "which the first file has", names)
        tables += read_tables(storage, part, wanted)
    if not any(table.num_rows for table in tables):
        raise UserError(f"{files[0].uri}: has no rows")
    try:
        return pa.concat_tables(_with_equal_lists(tables), promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{files[0].uri}: a column changes its type from one file or batch to the next ({error})") from error


def _with_equal_lists(tables: list[pa.Table]) -> list[pa.Table]:
    """Make text a list of one where another batch has lists of text: a JSON column may have both."""
    text_lists = pa.list_(pa.string())
    names = {field.name for table in tables for field in table.schema if field.type == text_lists}
    return [
        pa.table([_as_lists(table[name]) if name in names else table[name] for name in table.column_names], table.column_names)
        for table in tables
    ]


def _as_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_string(column.type):
        return column
    texts = column.combine_chunks()
    starts = pc.if_else(texts.is_valid(), pa.array(range(len(texts)), pa.int32()), None)
    ends = pa.array([len(texts)], pa.int32())
    return pa.chunked_array([pa.ListArray.from_arrays(pa.concat_arrays([starts, ends]), texts)])


def _in_seconds(column: pa.ChunkedArray, divisor: int) -> pa.ChunkedArray:
    """Divide numbers, and text that is one, rounding down; what has a unit of its own, such as an Arrow timestamp, stays."""
    if pa.types.is_integer(column.type):
        kind = pa.uint64() if column.type == pa.uint64() else pa.int64()
        numbers, parts = column.cast(kind), pa.scalar(divisor, kind)
        seconds = pc.divide(numbers, parts)  # towards zero
        return pc.if_else(pc.less(numbers, pc.multiply(seconds, parts)), pc.subtract(seconds, pa.scalar(1, kind)), seconds)
    if pa.types.is_floating(column.type):
        return pc.floor(pc.divide(column.cast(pa.float64()), float(divisor)))
    if not pa.types.is_string(column.type):
        return column
    text = pc.utf8_trim_whitespace(column)
    is_whole = pc.match_substring_regex(text, _WHOLE_NUMBER)
    is_number = pc.and_not(pc.match_substring_regex(text, _NUMBER), is_whole)
    null = pa.scalar(None, pa.string())
    # Text without a sign first: Arrow's cast knows no plus.
    whole = pc.if_else(is_whole, pc.utf8_ltrim(text, characters="+"), null).cast(pa.int64())
    other = pc.if_else(is_number, pc.utf8_ltrim(text, characters="+"), null).cast(pa.float64())
    return pc.coalesce(_in_seconds(whole, divisor).cast(pa.string()), _in_seconds(other, divisor).cast(pa.string()), column)


def _infer_kinds(table: pa.Table, lists: list[str], numbers: set[str], is_typed: bool) -> dict[str, FeatureKind]:
    """Tell the kinds by type; strings that all read as numbers are numbers where the format declares no types."""
    ratios = {name: _distinct_ratio(table[name]) for name in table.column_names if pa.types.is_string(table[name].type)}
    for index, field in enumerate(table.schema):
        if field.name in ratios and field.name != ITEM_ID and (field.name in numbers or (not is_typed and _is_numeric(table[field.name]))):
            table = table.set_column(index, field.name, pa.nulls(table.num_rows, pa.float64()))
    categories = [name for name in lists if name not in numbers and ratios[name] <= 0.5]
    vectors = [name for name in lists if name in numbers]
    kinds = infer_item_features(table.drop_columns([INPUT_ORDER, *categories, *vectors]).schema, ratios)
    found = kinds | dict.fromkeys(categories, "categories") | dict.fromkeys(vectors, "vectors")
    return {name: found[name] for name in table.column_names if name in found}


def _is_numeric(column: pa.ChunkedArray) -> bool:
    """Tell whether all texts read as numbers, but for the words with which tables say that there is none."""
    texts = pc.utf8_lower(pc.utf8_trim_whitespace(column))
    is_missing = pc.fill_null(pc.is_in(texts, value_set=pa.array(_MISSING_NUMBERS)), True)
    values = texts.filter(pc.invert(is_missing)).drop_null()
    try:
        values.cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return len(values) > 0


def _distinct_ratio(column: pa.ChunkedArray) -> float:
    num_values: int = len(column) - column.null_count
    num_distinct: int = pc.count_distinct(column, mode="only_valid").as_py()
    return num_distinct / max(1, num_values)


def _split_lists(table: pa.Table, names: list[str]) -> pa.Table:
    for name in names:
        table = table.set_column(table.column_names.index(name), name, pc.utf8_split_whitespace(pc.utf8_trim_whitespace(table[name])))
    return table


def _split_categories(table: pa.Table, names: list[str], separator: str) -> pa.Table:
    for name in names:
        if separator and pa.types.is_string(table[name].type):
            table = table.set_column(table.column_names.index(name), name, pc.split_pattern(table[name], separator))
    return table


def _missing(uri: str, wanted: str, meaning: str, names: list[str]) -> UserError:
    shown = ", ".join(name[:80] for name in names[:50]) + (", ..." if len(names) > 50 else "")
    return UserError(f"{uri}: has no column {wanted} ({meaning}); its columns are {shown}; data.columns.* maps other names")
