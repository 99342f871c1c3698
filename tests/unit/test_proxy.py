"""The fault-injecting proxy: unchanged requests, each fault as the client sees it, and correct counts."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError

from recsys.store import Storage
from tests.proxy import FAULTS, WRONG_ETAG, Fault, FaultProxy, Faults

BODY = bytes(range(256)) * 1000
KEY = "folder/object"


@pytest.fixture
def bucket(faulty_storage: Storage) -> str:
    faulty_storage.write_bytes(f"s3://{_bucket_of(faulty_storage)}/{KEY}", BODY)
    return _bucket_of(faulty_storage)


@pytest.fixture
def client(bucket: str, s3_proxy: FaultProxy) -> Iterator[Any]:
    s3_proxy.counts.clear()
    yield _client(s3_proxy, patience_seconds=30)
    s3_proxy.faults = Faults()


def _client(proxy: FaultProxy, patience_seconds: float) -> Any:
    """Return a client without retries, so that it sees each fault."""
    config = Config(
        retries={"total_max_attempts": 1},
        read_timeout=patience_seconds,
        s3={"addressing_style": "path"},
        response_checksum_validation="when_required",
    )
    return boto3.Session().client("s3", endpoint_url=proxy.endpoint, region_name="us-east-1", config=config)


def _bucket_of(storage: Storage) -> str:
    return storage.root.removeprefix("s3://").partition("/")[0]


def _get(client: Any, bucket: str) -> bytes:
    return bytes(client.get_object(Bucket=bucket, Key=KEY)["Body"].read())


def test_a_request_has_at_most_one_fault_and_rates_are_shares_of_requests() -> None:
    faults = Faults({"error": 0.2, "cut": 0.3})
    drawn = [faults.draw(number / 1000) for number in range(1000)]
    assert [drawn.count(fault) for fault in ("error", "cut", None)] == [200, 300, 500]


def test_signed_requests_go_through_unchanged(client: Any, bucket: str, s3_proxy: FaultProxy) -> None:
    client.put_object(Bucket=bucket, Key="other/ä b", Body=b"text", Metadata={"writer": "me"})
    assert client.get_object(Bucket=bucket, Key="other/ä b")["Body"].read() == b"text"
    assert client.head_object(Bucket=bucket, Key=KEY)["ContentLength"] == len(BODY)
    assert client.get_object(Bucket=bucket, Key=KEY, Range="bytes=1000-1999")["Body"].read() == BODY[1000:2000]
    assert [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket)["Contents"]] == [KEY, "other/ä b"]
    client.delete_object(Bucket=bucket, Key="other/ä b")
    assert s3_proxy.counts == {"requests": 6}


def test_many_requests_over_many_connections(client: Any, bucket: str, s3_proxy: FaultProxy) -> None:
    s3_proxy.faults = Faults({"error": 0.1, "reset": 0.05, "cut": 0.05})

    def is_whole(_: int) -> bool:
        try:
            return _get(client, bucket) == BODY
        except (ClientError, HTTPClientError, IncompleteReadError):
            return False

    with ThreadPoolExecutor(8) as pool:
        num_whole = sum(pool.map(is_whole, range(400)))
    assert s3_proxy.counts["requests"] == 400
    assert num_whole == 400 - s3_proxy.num_faults
    assert 40 < s3_proxy.num_faults < 130


@pytest.mark.parametrize(("fault", "code"), [("error", "InternalError"), ("slow_down", "SlowDown")])
def test_refusals_carry_a_code_and_leave_the_connection_usable(
    client: Any, bucket: str, s3_proxy: FaultProxy, fault: Fault, code: str
) -> None:
    s3_proxy.faults = Faults({fault: 1})
    with pytest.raises(ClientError) as error:
        client.put_object(Bucket=bucket, Key=KEY, Body=b"other")
    assert error.value.response["Error"]["Code"] == code
    s3_proxy.faults = Faults()
    assert _get(client, bucket) == BODY  # the refused request was not executed


def test_a_reset_comes_after_the_work(client: Any, bucket: str, s3_proxy: FaultProxy) -> None:
    s3_proxy.faults = Faults({"reset": 1})
    with pytest.raises(HTTPClientError):
        client.put_object(Bucket=bucket, Key=KEY, Body=b"other")
    address = urlsplit(s3_proxy.endpoint)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=5) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    s3_proxy.faults = Faults()
    assert _get(client, bucket) == b"other"
    assert s3_proxy.counts["reset"] == 2


@pytest.mark.parametrize("fault", ["stall", "stall_in_body"])
def test_a_stall_outlasts_the_clients_patience_and_a_short_one_is_borne(
    client: Any, bucket: str, s3_proxy: FaultProxy, fault: Fault
) -> None:
    s3_proxy.faults = Faults({fault: 1}, stall_seconds=3)
    with pytest.raises(HTTPClientError, match=r"timeout|timed out"):
        _get(_client(s3_proxy, patience_seconds=1), bucket)
    s3_proxy.faults = Faults({fault: 1}, stall_seconds=0.2)
    begin = time.monotonic()
    assert _get(client, bucket) == BODY
    assert time.monotonic() - begin >= 0.2
    assert s3_proxy.counts[fault] == 2


def test_a_cut_body_is_shorter_than_its_header_says(client: Any, bucket: str, s3_proxy: FaultProxy) -> None:
    s3_proxy.faults = Faults({"cut": 1})
    answer = client.get_object(Bucket=bucket, Key=KEY)
    assert answer["ContentLength"] == len(BODY)
    with pytest.raises((HTTPClientError, IncompleteReadError)):
        answer["Body"].read()


def test_a_wrong_etag_is_on_get_and_head_alone(client: Any, bucket: str, s3_proxy: FaultProxy) -> None:
    s3_proxy.faults = Faults({"wrong_etag": 1})
    assert client.get_object(Bucket=bucket, Key=KEY)["ETag"] == client.head_object(Bucket=bucket, Key=KEY)["ETag"] == WRONG_ETAG
    assert client.put_object(Bucket=bucket, Key=KEY, Body=b"other")["ETag"] != WRONG_ETAG
    assert s3_proxy.counts == {"requests": 3, "wrong_etag": 2}


def test_all_connections_share_one_bandwidth(client: Any, bucket: str, s3_proxy: FaultProxy) -> None:
    s3_proxy.faults = Faults(bytes_per_second=1_000_000)
    begin = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        assert all(body == BODY for body in pool.map(lambda _: _get(client, bucket), range(4)))
    assert 0.9 < time.monotonic() - begin < 15  # four objects, 1,024,000 bytes in total


def test_a_listing_is_shuffled_and_has_strays(client: Any, bucket: str, s3_proxy: FaultProxy) -> None:
    for number in range(20):
        client.put_object(Bucket=bucket, Key=f"many/{number:02d}", Body=b"")
    s3_proxy.faults = Faults(shuffles_listings=True, stray_names=("_SUCCESS", "folder/"))
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket, Prefix="many/")["Contents"]]
    assert sorted(keys) == [*(f"many/{number:02d}" for number in range(20)), "many/_SUCCESS", "many/folder/"]
    assert keys != sorted(keys)


def test_the_same_seed_draws_the_same_faults(rclone_server: Any) -> None:
    draws = []
    for seed in (1, 1, 2):
        with FaultProxy(rclone_server.endpoint, seed) as proxy:
            proxy.faults = Faults(dict.fromkeys(FAULTS, 0.1))
            draws.append([proxy.draw() for _ in range(50)])
    assert draws[0] == draws[1] != draws[2]
