"""Decides how the columns of users and the contexts of events are read as inputs of the model (see `recsys.data.features`)."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.features.contexts import ACTIVITY, ContextSpace
from recsys.data.features.profiles import MAX_VALUES, ProfileSpace, common_values, fit_profiles
from recsys.data.manifest import ColumnUse
from recsys.errors import UserError
from recsys.ingest.input_tasks import ATTRIBUTES, STAGED_USERS
from recsys.ingest.job import Cleaned, Job, Partition, UserColumns
from recsys.ingest.shuffle import read_partition

_FEWEST_VALUES, _FEW_PARTITIONS = 256, 4
"""Values of a user column that a partition counts at least, and partitions up to which each counts as many as are told apart."""


def profile_space(job: Job, users: Sequence[Cleaned]) -> ProfileSpace:
    """Return how the columns of users are read: as in the base, with new values, or as the table's values suggest."""
    base = ProfileSpace() if job.base is None else job.base.manifest.profiles
    if not any(outcome.rows for outcome in users) or (job.base is not None and not base):
        return base
    values: dict[str, Counter[str]] = {}
    for outcome in job.run("user columns", UserColumns, partial(count_user_columns, job), range(job.num_partitions)):
        for name, counts in outcome.values.items():
            values.setdefault(name, Counter()).update(counts)
    if job.base is not None:
        return base.extended(values)
    features = job.data.user_features
    for kind in ("categories", "text", "numbers", "vectors"):
        if absent := sorted(set(getattr(features, kind)).difference(values)):
            raise UserError(
                f"data.user_features.{kind}: no user has a value of '{absent[0]}'; columns: {', '.join(sorted(values)) or 'none'}"
            )
    return fit_profiles(values, features)


def refuse_unknown_sensitive(job: Job, uses: Sequence[ColumnUse]) -> None:
    """Raise a UserError if `data.sensitive` names a column that no table has: a misspelled one would be an input."""
    known = {use.name for use in uses}
    if job.base is None and (unknown := sorted(set(job.data.sensitive).difference(known))):
        raise UserError(f"data.sensitive = {unknown[0]}: no table has this column; columns: {', '.join(sorted(known))}")


def context_space(job: Job, partitions: Sequence[Partition]) -> ContextSpace:
    """Return the fields of contexts: those of the base, with new values, or those that the config asks for."""
    given: dict[str, set[str]] = {name: set() for name in job.data.columns.context}
    for outcome in partitions:
        for name, values in outcome.contexts.items():
            given[name].update(values)
    if job.base is not None:
        return job.base.manifest.contexts.extended(given)
    if not job.has_time and (needs_time := [name for name in job.data.derived_context if name != ACTIVITY]):
        raise UserError(f"data.derived_context = {needs_time[0]}: the events have positions and no times; leave it out")
    return ContextSpace.of(job.data.derived_context, given)


def count_user_columns(job: Job, partition: int) -> UserColumns:
    """Count the users of one partition by value, for each column that may be an input."""
    staged = read_partition(job.storage, job.staging("user-pieces"), partition, STAGED_USERS)
    pairs = staged[ATTRIBUTES].combine_chunks()
    names, values = pairs.keys, pairs.items
    limit = max(_FEWEST_VALUES, MAX_VALUES * _FEW_PARTITIONS // max(job.num_partitions, _FEW_PARTITIONS))
    left_out = (*job.data.sensitive, *job.data.user_features.ignored)
    known = [
        name for name in sorted(pc.unique(names).to_pylist()) if name not in left_out and "=" not in name
    ]  # a category is `column=value`
    columns = {name: values.filter(pc.equal(names, name)) for name in known}
    return UserColumns(rows=staged.num_rows, values={name: count_values(column, limit) for name, column in columns.items()})


def count_values(column: pa.Array | pa.ChunkedArray, limit: int = MAX_VALUES) -> Counter[str]:
    """Count the values of a text column; of more than `limit` the most frequent."""
    counted = pc.value_counts(column.drop_null())
    return common_values(Counter(dict(zip(counted.field(0).to_pylist(), counted.field(1).to_pylist(), strict=True))), limit)
