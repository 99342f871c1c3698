"""Input tables under the house's column names: which files and columns are read; casting and counting is `cleaning.py`."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from recsys.config import ColumnsConfig, ItemFeaturesConfig
from recsys.data.formats import ATOMIC_SUFFIXES, COMMON_SUFFIXES, INPUT_ORDER, FilePart, plan_parts, read_header, read_tables
from recsys.errors import UserError
from recsys.schema import EVENT, ITEM_ID, POSITION, TIMESTAMP, USER_ID, VALUE, FeatureKind, infer_item_features
from recsys.storage import ObjectInfo, Storage


def find_files(storage: Storage, role: str, uri: str) -> list[ObjectInfo]:
    """List the files of an input table, sorted by name; `role` is events, items or users.

    In a folder, names that start with `_` or `.` are passed over, and so is what has no suffix of a table.

    Raises:
        UserError: nothing is there, no file has a known suffix, or a file is empty.
    """
    suffixes = (ATOMIC_SUFFIXES[role], *COMMON_SUFFIXES)
    files = [file for file in storage.expand(uri) if _is_visible(file.uri, uri) and file.uri.lower().endswith(suffixes)]
    if not files:
        raise UserError(f"data.{role} = {uri}: no file has one of the suffixes {' '.join(suffixes)}")
    for file in files:
        if file.num_bytes == 0:
            raise UserError(f"{file.uri}: is empty (0 bytes)")
    return files


def find_in_folder(storage: Storage, role: str, folder: str) -> list[ObjectInfo]:
    """List a table's files in a folder that holds them all, known by RecBole's suffix or a name that starts with the role.

    Raises:
        UserError: there are no events. Items and users may be absent.
    """
    if not folder:
        return []
    files = [file for file in storage.expand(folder) if file.num_bytes and _is_visible(file.uri, folder) and _has_role(file.uri, role)]
    if role == "events" and not files:
        raise UserError(
            f"data.folder = {folder}: has no file *{ATOMIC_SUFFIXES[role]} and none like events.parquet; name the tables with data.events"
        )
    return files


def _has_role(uri: str, role: str) -> bool:
    name = uri.rpartition("/")[2].lower()
    return name.endswith(ATOMIC_SUFFIXES[role]) or (name.startswith(role) and name.endswith(COMMON_SUFFIXES))


def _is_visible(uri: str, root: str) -> bool:
    names = uri.removeprefix(root).split("/")
    return not any(name.startswith(("_", ".")) for name in names if name)


def find_event_columns(storage: Storage, uri: str, columns: ColumnsConfig) -> dict[str, str]:
    """Tell which of the file's columns the event columns come from, as {house name: file's name}.

    The order comes from the timestamp where there is one and from the position otherwise. A column that the config
    renames must be there.

    Raises:
        UserError: a required column is missing; the line names the columns that exist.
    """
    names = list(read_header(storage, uri))
    found = {USER_ID: columns.user_id, ITEM_ID: columns.item_id}
    time_column = TIMESTAMP if columns.timestamp in names else POSITION
    found[time_column] = getattr(columns, time_column)
    for optional in (EVENT, VALUE):
        name = getattr(columns, optional)
        if name in names or name != optional:
            found[optional] = name
    for house_name, name in found.items():
        if name not in names:
            wanted = f"'{columns.timestamp}' or '{columns.position}'" if house_name == POSITION else f"'{name}'"
            raise _missing(uri, wanted, house_name, names)
    return found


def import_events(storage: Storage, part: FilePart, columns: ColumnsConfig) -> Iterator[pa.Table]:
    """Read the event columns of one part under the house's names, uncast, batch by batch."""
    found = find_event_columns(storage, part.uri, columns)
    for table in read_tables(storage, part, list(dict.fromkeys(found.values()))):
        yield pa.table([*(table[name] for name in found.values()), table[INPUT_ORDER]], [*found, INPUT_ORDER])


def import_users(storage: Storage, part: FilePart, columns: ColumnsConfig) -> Iterator[pa.Table]:
    """Read the users of one part: `user_id` and every other column, uncast."""
    names = list(read_header(storage, part.uri))
    if columns.user_id not in names:
        raise _missing(part.uri, f"'{columns.user_id}'", USER_ID, names)
    for table in read_tables(storage, part, names):
        yield table.rename_columns([USER_ID if name == columns.user_id else name for name in table.column_names])


def import_items(
    storage: Storage, files: Sequence[ObjectInfo], columns: ColumnsConfig, features: ItemFeaturesConfig
) -> tuple[pa.Table, dict[str, FeatureKind]]:
    """Read the whole catalogue: `item_id` and the feature columns, with each one's kind.

    The kinds are the configured ones or, where none is configured, told by type. A RecBole token_seq column is a list
    where it is a category and the raw string where it is text.

    Raises:
        UserError: a column is missing or changes its type from file to file, or there is no row.
    """
    header = read_header(storage, files[0].uri)
    configured = _configured_kinds(features)
    for name in (columns.item_id, *configured):
        if name not in header:
            raise _missing(files[0].uri, f"'{name}'", ITEM_ID if name == columns.item_id else configured[name], list(header))
    wanted = [columns.item_id, *(configured or (name for name in header if name != columns.item_id))]
    table = _read_whole(storage, files, wanted).rename_columns([ITEM_ID, *wanted[1:], INPUT_ORDER])
    lists = [name for name, declared in header.items() if declared in ("token_seq", "float_seq") and name in wanted]
    numbers = {name for name, declared in header.items() if declared in ("float", "float_seq")}
    kinds = configured or _infer_kinds(table, lists, numbers, is_typed=any(header.values()))
    return _split_lists(table, [name for name in lists if kinds[name] != "text"]), kinds


def _read_whole(storage: Storage, files: Sequence[ObjectInfo], wanted: list[str]) -> pa.Table:
    tables: list[pa.Table] = []
    for part in plan_parts(storage, files):
        names = list(read_header(storage, part.uri))
        missing = [name for name in wanted if name not in names]
        if missing and not part.uri.lower().endswith((".jsonl", ".jsonl.gz")):
            raise _missing(part.uri, f"'{missing[0]}'", "which the first file has", names)
        tables += read_tables(storage, part, wanted)
    if not any(table.num_rows for table in tables):
        raise UserError(f"{files[0].uri}: has no rows")
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{files[0].uri}: a column changes its type from one file or batch to the next ({error})") from error


def _configured_kinds(features: ItemFeaturesConfig) -> dict[str, FeatureKind]:
    kinds: dict[str, FeatureKind] = {}
    kinds |= dict.fromkeys(features.text, "text")
    kinds |= dict.fromkeys(features.categories, "categories")
    kinds |= dict.fromkeys(features.numbers, "numbers")
    kinds |= dict.fromkeys(features.vectors, "vectors")
    return kinds


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
    values = pc.drop_null(column)
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


def _missing(uri: str, wanted: str, meaning: str, names: list[str]) -> UserError:
    return UserError(f"{uri}: has no column {wanted} ({meaning}); its columns are {', '.join(names)}; data.columns.* maps other names")
