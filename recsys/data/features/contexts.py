"""Contexts: the situation of an event or a request as one integer, a few bits per field."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from recsys.arrays import Integers
from recsys.errors import UserError
from recsys.schema import normalize_value

HOUR, WEEKDAY, GAP, ACTIVITY = "hour", "weekday", "gap", "activity"
"""Fields that follow from the time, in UTC, and from the history: floor(log2(1 + n)) of the seconds n since the interaction before, and of
the number n of interactions before."""

DERIVED = {
    HOUR: tuple(map(str, range(24))),
    WEEKDAY: ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    GAP: tuple(map(str, range(32))),
    ACTIVITY: tuple(map(str, range(32))),
}
MAX_BITS = 63
_DAY = 86_400


class ContextField(BaseModel):
    """A field of the context. A code is the position of a value from 1, or 0 for a missing or unknown one; it takes some `bits`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    values: tuple[str, ...]
    bits: int


class ContextSpace(BaseModel):
    """The fields of a dataset's contexts; the codes of all fields together are one integer, 0 for an unknown context."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fields: tuple[ContextField, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.fields)

    @classmethod
    def of(cls, derived: Iterable[str], given: Mapping[str, Iterable[str]]) -> "ContextSpace":
        """Build from names of derived fields and the values of given ones; each given field has room for twice its values.

        Raises:
            UserError: the fields need too many bits.
        """
        fields = [ContextField(name=name, values=DERIVED[name], bits=len(DERIVED[name]).bit_length()) for name in derived]
        for name, found in given.items():
            values = tuple(sorted(found))
            fields.append(ContextField(name=name, values=values, bits=len(values).bit_length() + 1))
        if (bits := sum(field.bits for field in fields)) > MAX_BITS:
            most = max(fields, key=lambda field: field.bits)
            raise UserError(
                f"data.columns.context: the fields need {bits} bits, and at most {MAX_BITS} are possible; '{most.name}' has "
                f"{len(most.values)} values; leave it out, or group its values"
            )
        return cls(fields=tuple(fields))

    def extended(self, given: Mapping[str, Iterable[str]]) -> "ContextSpace":
        """Return the space with new values of given fields at the end, as far as their bits have room."""

        def extend(field: ContextField) -> ContextField:
            new = sorted(set(given.get(field.name, ())).difference(field.values)) if field.name not in DERIVED else []
            return field.model_copy(update={"values": (*field.values, *new)[: (1 << field.bits) - 1]})

        return ContextSpace(fields=tuple(map(extend, self.fields)))

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the fields that do not follow from times."""
        return tuple(field.name for field in self.fields if field.name not in DERIVED)

    @property
    def reads_places(self) -> bool:
        """Whether some field follows from the history (see `encode_places`)."""
        return any(field.name in (GAP, ACTIVITY) for field in self.fields)

    def encode(self, times: Integers | None, given: Mapping[str, pa.Array | pa.ChunkedArray], size: int) -> Integers:
        """Return the codes of contexts (size,) from `times` (size,) and the given fields; what is missing is unknown."""
        parts: dict[str, Integers] = {}
        if times is not None:
            parts = {HOUR: times % _DAY // 3600 + 1, WEEKDAY: (times // _DAY + 3) % 7 + 1}  # the first of January 1970 was a Thursday
        for field in self.fields:
            if field.name in given:
                codes = pc.index_in(normalized(given[field.name]), value_set=pa.array(field.values, pa.string()))
                parts[field.name] = pc.fill_null(codes, -1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
        return self._join(parts, size)

    def encode_places(self, num_before: Integers, gaps: Integers | None) -> Integers:
        """Return the codes of what follows from the history (N,), to be added to those of `encode`.

        Args:
            num_before: (N,) number of interactions before.
            gaps: (N,) seconds since the last of them; None without times.
        """
        parts = {ACTIVITY: _magnitudes(num_before)}
        if gaps is not None:
            parts[GAP] = np.where(num_before > 0, _magnitudes(gaps), 0)
        return self._join(parts, len(num_before))

    def ask(self, time: int | None, last: int | None, num_before: int, given: Mapping[str, str]) -> Integers:
        """Return the code (1,) of a request at a `time`, after `num_before` interactions, the `last` at that time, with given fields."""
        times = None if time is None else np.array([time])
        gaps = None if time is None or last is None else np.array([time - last])
        codes = self.encode(times, {name: pa.array([value], pa.string()) for name, value in given.items()}, 1)
        return codes | self.encode_places(np.array([num_before]), gaps)

    def without_history(self, codes: Integers) -> Integers:
        """Return the codes as if there were no interaction before."""
        kept = np.int64(-1)
        for field, shift in self._placed():
            if field.name in (GAP, ACTIVITY):
                kept &= ~(((1 << field.bits) - 1) << shift)
        return (codes & kept) | self.encode_places(np.zeros(1, np.int64), None)

    @property
    def names(self) -> tuple[str, ...]:
        """The values of all fields as `field=value`; the first of a field, without a value, stands for an unknown one."""
        return tuple(f"{field.name}={value}" for field in self.fields for value in ("", *field.values))

    def rows(self, codes: Any) -> Iterator[Any]:
        """Yield for each field the positions in `names` of its values; a value that only a later version of the dataset has is unknown."""
        begin = 0
        for field, part in zip(self.fields, self.split(codes), strict=True):
            yield begin + part * (part <= len(field.values))
            begin += 1 + len(field.values)

    def split(self, codes: Any) -> Sequence[Any]:
        """Return the code of each field; `codes` may be NumPy's or PyTorch's integers."""
        return [(codes >> shift) & ((1 << field.bits) - 1) for field, shift in self._placed()]

    def _placed(self) -> Iterator[tuple[ContextField, int]]:
        """Yield each field with the position of its lowest bit."""
        shift = 0
        for field in self.fields:
            yield field, shift
            shift += field.bits

    def _join(self, parts: Mapping[str, Integers], size: int) -> Integers:
        codes = np.zeros(size, np.int64)
        for field, shift in self._placed():
            if field.name in parts:
                codes |= parts[field.name].astype(np.int64) << shift
        return codes


def normalized(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return a text column with its values in their canonical form."""
    encoded = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).dictionary_encode()
    return pa.array(map(normalize_value, encoded.dictionary.to_pylist()), pa.string()).take(encoded.indices)


def _magnitudes(numbers: Integers) -> Integers:
    """Return 1 + floor(log2(1 + n)), capped."""
    _, exponents = np.frexp(np.maximum(numbers, 0) + 1.0)
    return np.minimum(exponents.astype(np.int64), len(DERIVED[GAP]))
