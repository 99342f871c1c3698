from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.data.features.contexts import DERIVED, ContextSpace
from recsys.errors import UserError

TIMES = np.array([0, 1_700_000_000, 1_709_164_799, 951_782_400])


@pytest.fixture
def space() -> ContextSpace:
    return ContextSpace.of(
        ("hour", "weekday", "gap", "activity"), {"device": {"tv", "phone"}, "page": {f"p{number}" for number in range(100)}}
    )


def read(space: ContextSpace, codes: np.ndarray) -> list[dict[str, str | None]]:
    """Return the values of the fields of each code by name; None where they are unknown."""
    columns = [
        [field.values[code - 1] if code else None for code in part.tolist()]
        for field, part in zip(space.fields, space.split(codes), strict=True)
    ]
    return [dict(zip([field.name for field in space.fields], row, strict=True)) for row in zip(*columns, strict=True)]


def test_codes_are_read_back_and_times_agree_with_the_calendar(space: ContextSpace) -> None:
    devices = pa.array(["tv", None, "fridge", "phone"])
    found = read(space, space.encode(TIMES, {"device": devices, "page": pa.array(["p99", "p0", None, "p7"])}, 4))
    for row, time, device, page in zip(found, TIMES.tolist(), ["tv", None, None, "phone"], ["p99", "p0", None, "p7"], strict=True):
        moment = datetime.fromtimestamp(time, UTC)
        expected = {
            "hour": str(moment.hour),
            "weekday": moment.strftime("%A").lower(),
            "gap": None,
            "activity": None,
            "device": device,
            "page": page,
        }
        assert row == expected


def test_gaps_and_activity_are_logarithmic(space: ContextSpace) -> None:
    seconds = np.array([0, 1, 2, 3, 1_000, 2**40, -5, 7])
    found = read(space, space.encode_places(np.array([1, 2, 3, 4, 7, 8, 2**40, 0]), seconds))
    assert [row["gap"] for row in found] == ["0", "1", "1", "2", "9", "31", "0", None]
    assert [row["activity"] for row in found] == ["1", "1", "2", "2", "3", "3", "31", "0"]
    assert [row["gap"] for row in read(space, space.encode_places(np.array([5]), None))] == [None]


def test_a_request_has_the_code_of_an_event(space: ContextSpace) -> None:
    expected = space.encode(np.array([TIMES[1]]), {"device": pa.array(["tv"])}, 1) | space.encode_places(np.array([6]), np.array([90]))
    assert space.ask(int(TIMES[1]), int(TIMES[1]) - 90, 6, {"device": "tv"}).tolist() == expected.tolist()
    (only,) = read(space, space.ask(None, None, 0, {"device": "phone"}))
    assert {name: value for name, value in only.items() if value} == {"device": "phone", "activity": "0"}


def test_codes_of_torch_are_split_alike(space: ContextSpace) -> None:
    codes = space.encode(TIMES, {"device": pa.array(["tv"] * 4)}, 4)
    assert [part.tolist() for part in space.split(torch.from_numpy(codes))] == [part.tolist() for part in space.split(codes)]


def test_new_values_follow_and_codes_keep_their_meaning(space: ContextSpace) -> None:
    later = space.extended({"device": {"watch", "phone", "car", "radio", "glasses", "mirror"}})
    given = {"device": pa.array(["phone", "tv", None, "watch"])}
    assert later.encode(TIMES, given, 4)[:3].tolist() == space.encode(TIMES, given, 4)[:3].tolist()
    device = next(field for field in later.fields if field.name == "device")
    assert device.values[:2] == ("phone", "tv")
    assert device.values[2:] == ("car", "glasses", "mirror", "radio", "watch")
    many = space.extended({"device": {f"d{number}" for number in range(100)}})
    assert len(next(field for field in many.fields if field.name == "device").values) == 2**device.bits - 1


def test_too_many_values_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"data.columns.context: the fields need \d+ bits, and at most 63 .*'b' has 40000 values"):
        ContextSpace.of(tuple(DERIVED), {name: {f"v{number}" for number in range(40_000)} for name in ("b", "c", "d")})


def test_a_space_without_fields_is_empty() -> None:
    assert not ContextSpace()
    assert ContextSpace().encode(TIMES, {}, 4).tolist() == [0] * 4


def test_without_a_history_there_is_no_gap_and_no_activity(space: ContextSpace) -> None:
    codes = space.encode(TIMES, {"device": pa.array(["tv"] * 4)}, 4)
    full = codes | space.encode_places(np.array([3, 9, 1, 5]), np.array([1, 2, 3, 4]))
    assert space.without_history(full).tolist() == (codes | space.encode_places(np.zeros(4, np.int64), None)).tolist()
