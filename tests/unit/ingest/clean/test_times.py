"""Timestamps: every time zone, unit and format becomes whole seconds, and units are recognized by the number of digits."""

import math
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import UserError
from recsys.ingest.clean.times import cast_times, find_other_unit, guess_unit
from recsys.schema import read_time

ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "+05:45", "-03:30"]
SECONDS = st.integers(-(2**31), 2**32)
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def column(values: Any, kind: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, kind)])


def seconds_of(values: Any, kind: pa.DataType | None = None, unit: str = "s") -> list[int | None]:
    return cast_times(column(values, kind), unit)[0].to_pylist()


@given(second=SECONDS, zone=st.sampled_from(ZONES), unit=st.sampled_from([*PER_SECOND]), part=st.integers(0, 10**9 - 1))
def test_timestamps_of_any_zone_and_unit_come_back(second: int, zone: str, unit: str, part: int) -> None:
    raw = second * PER_SECOND[unit] + part * PER_SECOND[unit] // 10**9
    assert seconds_of([raw], pa.timestamp(unit, zone)) == [second]
    assert seconds_of([raw], pa.timestamp(unit)) == [second]
    assert seconds_of([raw], unit=unit) == [second]
    assert seconds_of([str(raw)], unit=unit) == [second]


@given(
    second=st.integers(0, 2**32),
    zone=st.sampled_from(ZONES[:5]),
    digits=st.integers(0, 9),
    offset=st.sampled_from(["iso", "Z", " UTC", " +0000"]),
)
def test_iso_text_of_any_zone_comes_back(second: int, zone: str, digits: int, offset: str) -> None:
    moment = datetime.fromtimestamp(second, UTC if offset != "iso" else ZoneInfo(zone))
    spelled = moment.strftime("%Y-%m-%dT%H:%M:%S") + ("." + "123456789"[:digits] if digits else "")
    assert seconds_of([spelled + (moment.strftime("%z") if offset == "iso" else offset)]) == [second]


def test_the_night_when_clocks_go_back() -> None:
    begin = 1698532200
    times = [begin + 3600 * hour for hour in range(6)]
    assert seconds_of([time * 10**6 for time in times], pa.timestamp("us", "Europe/Berlin")) == times


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2020-01-01 00:00:00 UTC", 1577836800),
        ("2020-01-01 00:00:00 GMT", 1577836800),
        ("2020-01-01T02:00:00+02:00", 1577836800),
        ("2020-01-01T00:00:00.999999999Z", 1577836800.999999),
        ("2020-01-01 00:00:00 +0000 UTC", 1577836800),
        ("2019-12-31 19:00:00 -05:00", 1577836800),
        ("2020/1/1 00:00", 1577836800),
        ("2020-01-01", 1577836800),
        ("01/02/2020", math.nan),
        ("yesterday", math.nan),
    ],
)
def test_spellings_of_a_time(text: str, seconds: float) -> None:
    assert read_time(text) == pytest.approx(seconds, nan_ok=True)


def test_dates_bytes_and_what_is_no_time() -> None:
    assert seconds_of([datetime(1970, 1, 2).date()]) == [86400]
    assert seconds_of([86_400_000], pa.date64()) == [86400]
    assert seconds_of([b"2020-01-01"]) == [1577836800]
    assert cast_times(column([timedelta(1)]), "s")[1].to_pylist() == [True]
    assert cast_times(column([[1]]), "s")[1].to_pylist() == [True]
    assert cast_times(column(["9223372036854775808", "1e30", "9" * 30]), "s")[1].to_pylist() == [True] * 3
    assert seconds_of(["9223372036854775807"], unit="ns") == [9223372036]


@given(second=st.integers(10**9, 4 * 10**9), unit=st.sampled_from([*PER_SECOND]))
def test_units_are_told_by_their_digits(second: int, unit: str) -> None:
    for values in ([second * PER_SECOND[unit]], [str(second * PER_SECOND[unit])], [float(second * PER_SECOND[unit])]):
        assert guess_unit(column(values)) == unit
        assert find_other_unit(column(values), unit) is None
        for other in PER_SECOND.keys() - {unit}:
            assert find_other_unit(column([0, -1, None, *values]) if isinstance(values[0], int) else column(values), other) is not None


def test_what_has_a_unit_of_its_own_tells_nothing() -> None:
    for values in (["2020-01-01"], [None], [0, -5], [datetime(2020, 1, 1)]):
        assert guess_unit(column(values)) == ""
        assert find_other_unit(column(values), "ms") is None
    assert guess_unit(column(["2020-01-01", None, "1577836800000"])) == "ms"
    assert find_other_unit(column([1577836800, 5, 1577836800000]), "s") == (2, 1577836800000)


def test_dates_without_separators_are_refused() -> None:
    with pytest.raises(UserError, match=r"20240131 read like dates .* data\.time_unit"):
        guess_unit(column([20240131, 20240201]))
    assert guess_unit(column([20240131, 20249999])) == "s"
