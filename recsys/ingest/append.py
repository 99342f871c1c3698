"""Rules for appending to a dataset: what the new version takes over from its base, and how new events join the known ones.

A version is a dataset whose manifest lists the shards of older versions before its own. Older shards never change, and a run that
trains on an older version is not affected. Versions form a tree: any version may be appended to, any number of times.

- Partitions, split, windows and cleaning are the base's; a key that asks for something else is refused by name. Input column names and
  units may differ, because the new files may differ. `data.k_core` does not apply to new events: users and items below it may still
  become active.
- Users and items keep their indices. New users and new items are numbered after them, the items in natural order. Event kinds, tasks
  and the moments of values and numbers are the base's. New categories are added at the end of the base's vocabulary, so old shards and
  old checkpoints keep their meaning. A new event kind is refused.
- A user's history continues with the new events in their own time order. Events older than the known ones are added at the end, too,
  and counted as "late". An event that agrees with a known one in user, item, time and kind is a duplicate.
- The split rule is applied to the whole sequence. Only new interactions in its training part become targets, with up to
  `data.max_history` older ones as context. An interaction that was held out and now has newer ones after it is context and never a
  target, so over all versions an interaction is a target at most once. Training data stays training data: under leave_one_out, if
  both interactions of a user were trained on, a third one is the test target and there is no validation target. Under the random
  split every interaction stays in the part that it was drawn for.
- The same items are withheld, and new items by the same draw. Their interactions in the training part are removed, even if they were
  held out before. A late interaction with a withheld item is removed, too, since an older version may have removed it before.
  leave_one_out counts the interactions left in the rows: a user with two interactions, one of them removed, has one.
- The new users shards have complete rows, but only of users with new events; attributes are new where the new users table has them.
  The new catalogue shards have only new and changed items. `rejected` and `noticed` count the new input only.
- Statistics and the report cover the whole version. Statistics among the catalogue's numbers keep the base's values.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.arrays import Floats, Integers, Mask
from recsys.config import Config
from recsys.config.base import Fact
from recsys.config.data import DataConfig
from recsys.config.verb_settings import facts_of, refuse_contradictions
from recsys.data.manifest import Dataset, last_rows
from recsys.data.sequences import Sequences
from recsys.errors import UserError
from recsys.ingest.clean.pseudonyms import refuse_other_key
from recsys.ingest.inputs import Inputs, content_config
from recsys.ingest.sources.formats import INPUT_ORDER
from recsys.ingest.write.catalogue import Catalogue, build_catalogue
from recsys.ingest.write.splits import TRAINING, part_by_place, split_in_order
from recsys.schema import CATALOGUE_SCHEMA, ITEM_ID, LISTED_SCHEMA, POSITION, TIMESTAMP, USER_ID, FeatureKind, RowParts, users_schema
from recsys.store import Storage

KNOWN_INDEX_NAME = "known_items.parquet"
"""The staged item index of the base."""

PART = "part"
"""The column of `Sequences` with the part (see `recsys.ingest.write.splits`) that each interaction was in or is drawn for."""

_KEYS = ("user", "item", "time", "kind")


def open_base(config: Config, storage: Storage) -> Dataset:
    """Open `data.base`.

    Raises:
        UserError: it is not a dataset of this store.
    """
    base = Dataset.open(storage, config.data.base, "data.base")
    folder = storage.uri("datasets")
    if base.uri.rpartition("/")[0] != folder:
        raise UserError(f"data.base = {base.uri}: all versions are stored in one folder; give a dataset in {folder}")
    return base


def with_base_settings(config: Config, base: Dataset) -> Config:
    """Return the config with the base's settings.

    Raises:
        UserError: a given key contradicts the base.
    """
    made_by = content_config(DataConfig()) | base.manifest.data_config  # the manifest of an old base may lack newer keys
    refuse_contradictions(config, {"data": made_by}, "the base dataset", "a version keeps that; prepare a new dataset from all events")
    adopted = {key: value for key, value in made_by.items() if Fact.INPUT not in facts_of(f"data.{key}")}
    if "kinds" not in base.manifest.data_config:  # made before kinds had roles: all are positive, whatever their names
        adopted["kinds"] = {kind.name: {"role": kind.role} for kind in base.manifest.kind_table}
    if not any(key.startswith("data.columns.") for key in config.given):
        adopted["columns"] = made_by["columns"]
    elif "data.columns.context" not in config.given:
        adopted["columns.context"] = made_by["columns"].get("context", ())
    return config.with_values({f"data.{key}": value for key, value in adopted.items()})


def refuse_other_input(base: Dataset, data: DataConfig, inputs: Inputs) -> None:
    """Refuse input that differs from the base in how it orders events or in its pseudonym key.

    Raises:
        UserError: the column that orders events differs, or the key does.
    """
    refuse_other_key(data.pseudonym_key_env, base.manifest.inputs)
    expected = TIMESTAMP if base.manifest.has_time else POSITION
    if inputs.time_column != expected:
        raise UserError(f"{inputs.events[0].uri}: orders events by {inputs.time_column}; the base dataset orders them by {expected}")


def extend(base: Dataset, changed: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest fields of the version after `base`: changed fields replaced, and new shards after the inherited ones."""
    fields = base.manifest.model_dump(exclude={"fingerprint"}) | {"version": base.manifest.version + 1, "base": base.name} | changed
    for name in fields:
        if name.endswith("_shards"):
            inherited = [shard.model_copy(update={"dataset": shard.dataset or base.name}) for shard in getattr(base.manifest, name)]
            fields[name] = [*inherited, *changed.get(name, ())]
    return fields


def known_users(base: Dataset | None, partition: int, user_ids: pa.ChunkedArray) -> pa.Table:
    """Read the newest rows of the given users of a partition, sorted by index; empty without a base.

    Every version names its shards by partition.
    """
    tables = [users_schema(base.manifest.row_parts if base is not None else RowParts()).empty_table()]
    for shard in base.manifest.users_shards if base is not None else ():
        if base is not None and shard.path == f"users/{partition:05d}.parquet":
            users = base.read_shard(shard)
            tables.append(users.filter(pc.is_in(users[USER_ID], value_set=pc.unique(user_ids))))
    return last_rows(pa.concat_tables(tables), "user_index").combine_chunks()


def listed_attributes(base: Dataset | None, partition: int, user_ids: pa.Array) -> pa.Array:
    """Return the attributes that users without events have in the base, for each of the given ids; none for others."""
    tables = [LISTED_SCHEMA.empty_table()]
    for shard in base.manifest.listed_shards if base is not None else ():
        if base is not None and shard.path == f"listed/{partition:05d}.parquet":
            tables.append(base.read_shard(shard))
    listed = pa.concat_tables(tables[::-1]).combine_chunks()  # the newest version first: index_in finds the first row of an id
    nothing = pa.array([[]] * len(user_ids), LISTED_SCHEMA.field("attributes").type)
    rows = pc.index_in(user_ids, value_set=listed[USER_ID].combine_chunks())
    chosen = pc.if_else(rows.is_valid(), rows, pa.array(np.arange(listed.num_rows, listed.num_rows + len(user_ids)), pa.int32()))
    return pa.chunked_array([listed["attributes"].combine_chunks(), nothing]).take(chosen).combine_chunks()


def is_known(owners: Integers, columns: dict[str, Any], known: pa.Table) -> Mask:
    """Return which events agree with a known one in user, item, time and kind; `owners` are rows of `known`, or -1 for new users."""
    keys = [owners, columns["items"].astype(np.int64), columns["timestamps"], columns["events"].astype(np.int64)]
    flat = [known[name].combine_chunks().flatten().to_numpy().astype(np.int64) for name in ("items", "timestamps", "events")]
    history = pa.table([np.repeat(np.arange(known.num_rows), _lengths(known)), *flat], names=list(_KEYS))
    rows = pa.table([*keys, np.arange(len(owners))], names=[*_KEYS, INPUT_ORDER])
    found = rows.join(history, keys=list(_KEYS), join_type="left semi", use_threads=False)[INPUT_ORDER].to_numpy()
    return np.isin(np.arange(len(owners)), found)


def newest_times(known: pa.Table) -> Integers:
    """Return the time of each known user's newest interaction, plus the minimum int64 as a last entry for unknown users."""
    newest = np.full(known.num_rows + 1, np.iinfo(np.int64).min)
    times = known["timestamps"].combine_chunks().flatten().to_numpy()
    np.maximum.at(newest, np.repeat(np.arange(known.num_rows), _lengths(known)), times)
    return newest


def join_known(known: pa.Table, new: Sequences, new_rows: Integers) -> tuple[Sequences, Mask]:
    """Append the new interactions to each user's known ones; also return which are new.

    The users of `known` come first. `new_rows` is each user's row in `new`.
    """
    if not known.num_rows:
        return new, np.ones(int(new.lengths.sum()), bool)
    before = replace(Sequences.from_table(known), exposures=None, profiles=None)
    parts = part_by_place(before.offsets, before.scalars["num_train"], before.scalars["num_validation"])
    both = Sequences.join([replace(before, columns={**before.columns, PART: parts}, scalars={}), new])
    user = np.arange(len(new_rows))
    is_unknown = user >= len(before)
    rows = np.stack([np.where(is_unknown, 0, user), len(before) + new_rows], axis=1).reshape(-1)  # each user's known and new row
    lengths = both.lengths[rows]
    lengths[::2][is_unknown] = 0
    pairs = both[rows].within(0, lengths)
    columns = {name: pairs.flat(name) for name in pairs.columns}
    return Sequences.of_offsets(columns, pairs.offsets[::2]), pairs.owners % 2 == 1


def _lengths(known: pa.Table) -> Integers:
    return np.asarray(known["items"].combine_chunks().value_lengths().to_numpy(), np.int64)


def assign_parts(everything: Sequences, is_new: Mask, data: DataConfig, is_target: Mask) -> Integers:
    """Return the part of each interaction: as drawn or as the log says, otherwise by the rule over the user's whole sequence."""
    parts = everything.columns[PART]
    if data.split in ("random", "column"):
        return parts
    was_trained_on = (parts == TRAINING) & ~is_new  # and is never held out again
    return np.where(was_trained_on, TRAINING, split_in_order(everything.columns["timestamps"], everything.offsets, data, is_target))


def changed_items(base: Dataset, ids: pa.Array, items: pa.Table | None, kinds: dict[str, FeatureKind]) -> Catalogue:
    """Build the catalogue rows of new and changed items; the base's items are the first of `ids`.

    New categories are added at the end of the base's vocabulary; numbers are standardized by the base's moments.

    Raises:
        UserError: the item table's features differ from the base's.
    """
    manifest, rows = base.manifest, base.catalogue_rows
    features = manifest.data_config.get("item_features", {})
    if {name for kind in set(kinds.values()) for name in features.get(kind, ())} != set(kinds):
        raise UserError(
            "data.items: the base dataset was made without the item features "
            f"{', '.join(kinds)}; leave data.items out, or prepare a new dataset from all events"
        )
    is_new = np.arange(len(ids)) >= rows.num_rows
    is_listed = pc.is_in(ids, value_set=pc.unique(items[ITEM_ID])).to_numpy(zero_copy_only=False) if items is not None else False
    places = np.flatnonzero(is_new | is_listed)
    counts = np.append(rows["train_count"].to_numpy(), np.zeros(int(is_new.sum()), np.int64))[places]
    measured = _measured(base, places, [name for name, kind in kinds.items() if kind == "numbers"])
    known = (manifest.category_vocabulary, manifest.number_moments, manifest.vector_size if items is None else 0)
    catalogue = build_catalogue(ids.take(pa.array(places)), items, kinds, counts, measured, *known)
    if catalogue.vector_size != manifest.vector_size:
        raise UserError(f"data.items: its vectors have {catalogue.vector_size} numbers; the base dataset's have {manifest.vector_size}")
    table = catalogue.table.set_column(0, CATALOGUE_SCHEMA.field("item_index"), pa.array(places + 1, pa.int32()))
    before = rows.take(pa.array(places[~is_new[places]]))
    is_changed = np.ones(table.num_rows, bool)
    is_changed[: before.num_rows] = ~_same(before, table.slice(0, before.num_rows))
    return replace(catalogue, table=table.filter(pa.array(is_changed)))


def _measured(base: Dataset, places: Integers, listed: list[str]) -> dict[str, Floats]:
    """Return the base's number columns that are not in the item table, before standardization; NaN for a new item."""
    measured: dict[str, Floats] = {}
    for position, (name, (mean, deviation)) in enumerate(zip(base.manifest.number_columns, base.manifest.number_moments, strict=True)):
        if name not in listed:
            known = pc.list_element(base.catalogue_rows["numbers"], position).to_numpy().astype(np.float64) * deviation + mean
            measured[name] = np.append(known, np.full(max(0, int(places.max(initial=0)) + 1 - len(known)), np.nan))[places]
    return measured


def _same(before: pa.Table, after: pa.Table) -> Mask:
    """Return which rows are equal except for rounding."""
    is_same = np.ones(before.num_rows, bool)
    for name in ("title", "text"):
        is_same &= pc.equal(before[name], after[name]).to_numpy()
    for name in ("categories", "numbers", "vector"):
        pairs = zip(before[name].to_pylist(), after[name].to_pylist(), strict=True)
        is_same &= np.array([len(old) == len(new) and np.allclose(old, new, rtol=1e-5, equal_nan=True) for old, new in pairs], bool)
    return is_same
