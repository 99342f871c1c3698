"""The storage adapter behind a proxy that injects faults: all calls end, with the right content or a one-line error."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.retries.standard import ExponentialBackoff

from recsys.errors import StoreError, UserError
from recsys.store import ReplacedError, Storage, backends
from tests.proxy import CODES, FAULTS, Fault, FaultProxy, Faults

RATES = (pytest.param(0.01, marks=pytest.mark.slow), 0.1, 0.3)  # the least takes the most requests until it shows
MAX_CALLS = 1500
LIMIT_SECONDS = 15.0
"""Time for ten attempts with the short timeout of these tests and their pauses, with a margin for a busy machine."""

LARGE = bytes(range(256)) * 40_000  # more than one part of a multipart upload


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten timeouts and pauses, not the number of attempts."""
    monkeypatch.setattr(backends, "READ_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(backends, "LONGEST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.02)


def contents(number: int) -> bytes:
    return f"object {number} ".encode() * 3000


def run_until_struck(proxy: FaultProxy, call: Callable[[int], None]) -> int:
    """Make calls until some faults have been injected; return their number."""
    before = proxy.num_faults
    for number in range(MAX_CALLS):
        call(number)
        if proxy.num_faults >= before + 3:
            break
    return proxy.num_faults - before


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_read_is_right_and_repeated_requests_are_counted(
    faulty_storage: Storage, s3_proxy: FaultProxy, hasty: None, fault: Fault, rate: float
) -> None:
    uri = faulty_storage.uri("folder", "object")
    faulty_storage.write_bytes(uri, contents(1))
    found = faulty_storage.stat(uri)
    assert found is not None
    s3_proxy.faults = Faults({fault: rate}, stall_seconds=1)

    def read(number: int) -> None:
        start = number * 7 % 1000
        assert faulty_storage.read_range(uri, start, 20_000, found.etag) == contents(1)[start : start + 20_000]
        if fault != "wrong_etag":  # who reads a whole object does not ask for an ETag
            assert faulty_storage.read_bytes(uri) == contents(1)

    num_faults = run_until_struck(s3_proxy, read)
    assert faulty_storage.num_retries >= num_faults >= 3  # a busy machine may run into a time limit more often


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_written_listed_and_copied_is_right(
    faulty_storage: Storage, s3_proxy: FaultProxy, hasty: None, tmp_path: Path, fault: Fault, rate: float
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    s3_proxy.faults = Faults({fault: rate}, stall_seconds=1)

    def journey(number: int) -> None:
        folder = faulty_storage.uri(f"journey-{number}")
        faulty_storage.write_bytes(f"{folder}/written", contents(number))
        assert faulty_storage.create(f"{folder}/created", contents(number + 1))
        assert not faulty_storage.create(f"{folder}/created", b"another")
        source.write_bytes(contents(number + 2))
        faulty_storage.upload(source, f"{folder}/uploaded")
        found = [(info.uri.removeprefix(folder), info.num_bytes) for info in faulty_storage.list(folder)]
        sizes = [len(contents(number + offset)) for offset in (1, 2, 0)]
        assert found == list(zip(("/created", "/uploaded", "/written"), sizes, strict=True))
        for offset, name in enumerate(("written", "created", "uploaded")):
            faulty_storage.download(f"{folder}/{name}", target)
            assert target.read_bytes() == contents(number + offset)
        faulty_storage.delete_tree(folder)
        assert faulty_storage.list(folder) == []

    assert run_until_struck(s3_proxy, journey) >= 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_of_several_parts_goes_up_and_comes_down(
    faulty_storage: Storage, s3_proxy: FaultProxy, hasty: None, tmp_path: Path, fault: Fault
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(LARGE)
    s3_proxy.faults = Faults({fault: 0.2}, stall_seconds=1)

    def copy(_: int) -> None:
        faulty_storage.upload(source, faulty_storage.uri("large"))
        faulty_storage.download(faulty_storage.uri("large"), target)
        assert target.read_bytes() == LARGE

    assert run_until_struck(s3_proxy, copy) >= 3


@pytest.mark.parametrize("s3_proxy", ["moto"], indirect=True)  # rclone ignores If-Match
def test_parts_that_never_have_one_etag_end_a_download_in_one_line(faulty_storage: Storage, s3_proxy: FaultProxy, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(LARGE)
    faulty_storage.upload(tmp_path / "source", faulty_storage.uri("large"))
    s3_proxy.faults = Faults({"wrong_etag": 1})
    with pytest.raises(StoreError, match=r"cannot download .*large: PreconditionFailed"):
        faulty_storage.download(faulty_storage.uri("large"), tmp_path / "target")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_stays_out_of_order_ends_in_one_line(
    faulty_storage: Storage, s3_proxy: FaultProxy, hasty: None, tmp_path: Path, fault: Fault
) -> None:
    uri = faulty_storage.uri("folder", "object")
    faulty_storage.write_bytes(uri, contents(1))
    s3_proxy.faults = Faults({fault: 1}, stall_seconds=2)
    begin = time.monotonic()
    if fault == "wrong_etag":
        with pytest.raises(ReplacedError, match="another object"):
            faulty_storage.read_range(uri, 0, 100, "the-right-one")
    else:
        with pytest.raises(UserError) as error:
            faulty_storage.read_bytes(uri)
        assert "\n" not in str(error.value)
        assert f"cannot read {uri}: " in str(error.value)
        assert CODES[fault] in str(error.value)
    assert time.monotonic() - begin < LIMIT_SECONDS
    assert s3_proxy.num_faults == backends.MAX_ATTEMPTS


@pytest.mark.parametrize("fault", ["slow_down", "reset", "stall"])
@pytest.mark.parametrize("name", ["write_bytes", "create", "upload", "download", "list", "stat", "delete"])
def test_every_call_names_bucket_key_and_code(
    faulty_storage: Storage, s3_proxy: FaultProxy, hasty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: Fault
) -> None:
    uri = faulty_storage.uri("folder", "object")
    (tmp_path / "file").write_bytes(b"text")
    calls: dict[str, Callable[[], object]] = {
        "write_bytes": lambda: faulty_storage.write_bytes(uri, b"text"),
        "create": lambda: faulty_storage.create(uri, b"text"),
        "upload": lambda: faulty_storage.upload(tmp_path / "file", uri),
        "download": lambda: faulty_storage.download(uri, tmp_path / "copy"),
        "list": lambda: faulty_storage.list(uri),
        "stat": lambda: faulty_storage.stat(uri),
        "delete": lambda: faulty_storage.delete(uri),
    }
    monkeypatch.setattr(backends, "READ_TIMEOUT_SECONDS", 0.1 if fault == "stall" else LIMIT_SECONDS)  # a busy server may take long
    s3_proxy.faults = Faults({fault: 1}, stall_seconds=1)
    begin = time.monotonic()
    with pytest.raises(UserError) as error:
        calls[name]()
    assert time.monotonic() - begin < LIMIT_SECONDS
    assert "\n" not in str(error.value)
    assert uri in str(error.value)
    assert CODES[fault] in str(error.value) or (fault == "slow_down" and "503" in str(error.value))  # a HEAD has no body to say a code
    assert "look the code up" not in str(error.value)
    assert not (tmp_path / "copy").exists()


@pytest.mark.slow
def test_stalls_of_half_a_minute_are_borne_with_the_timeouts_that_are_shipped(faulty_storage: Storage, s3_proxy: FaultProxy) -> None:
    uri = faulty_storage.uri("object")
    faulty_storage.write_bytes(uri, contents(1))
    s3_proxy.faults = Faults({"stall": 0.2, "stall_in_body": 0.2}, stall_seconds=30)
    begin = time.monotonic()
    run_until_struck(s3_proxy, lambda _: check_read(faulty_storage, uri))
    num_faults = s3_proxy.num_faults
    assert faulty_storage.num_retries >= num_faults >= 3  # a busy machine may run into a time limit more often
    assert time.monotonic() - begin < num_faults * (backends.READ_TIMEOUT_SECONDS + backends.LONGEST_PAUSE_SECONDS) + 10


def check_read(storage: Storage, uri: str) -> None:
    assert storage.read_bytes(uri) == contents(1)


def test_a_slow_store_is_waited_for(faulty_storage: Storage, s3_proxy: FaultProxy, hasty: None) -> None:
    uri = faulty_storage.uri("object")
    data = LARGE[:1_500_000]
    faulty_storage.write_bytes(uri, data)
    s3_proxy.faults = Faults(bytes_per_second=1_000_000)
    begin = time.monotonic()
    assert faulty_storage.read_bytes(uri) == data
    assert time.monotonic() - begin > 1.4
    assert faulty_storage.num_retries == 0
