"""The storage adapter on a folder, moto and rclone: the same behavior on each, and errors that say what to do."""

import os
import pickle
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ClientError

from recsys.config.storage import StorageConfig
from recsys.errors import UserError
from recsys.store import ObjectInfo, Storage, backends, join, private_folder, sha256_of
from tests.conftest import S3Server


def _race(attempt: Callable[[int], bool], num_threads: int = 8) -> list[bool]:
    barrier = threading.Barrier(num_threads)

    def run(index: int) -> bool:
        barrier.wait(timeout=30)
        return attempt(index)

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(run, range(num_threads)))


def _one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_join_appends_segments() -> None:
    assert join("s3://bucket/prefix/", "a", "b/c.bin") == "s3://bucket/prefix/a/b/c.bin"
    assert join("/data", "x") == "/data/x"
    assert join("/", "x") == "/x"


@pytest.mark.parametrize("part", ["", "/etc/passwd", "..", "a/../b", "a//b", "./a", "a/"])
def test_join_refuses_what_could_leave_the_folder(part: str) -> None:
    with pytest.raises(UserError, match="segment"):
        join("/data", part)


@pytest.mark.parametrize(
    "uri", ["relative/path", "gs://bucket/key", "file:///data", "", "s3://", "s3:///key", "s3://bucket/a/../b", "s3://bucket//a"]
)
def test_addresses_that_cannot_work_are_refused(uri: str) -> None:
    with pytest.raises(UserError):
        Storage("/data").locate(uri)


def test_a_bucket_alone_is_no_object() -> None:
    with pytest.raises(UserError, match="is a bucket, not an object"):
        Storage("/data").read_bytes("s3://bucket")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "ftp://host", "http://", "http://host:port", "http://host/path", "http://["])
def test_endpoints_that_cannot_work_are_refused(endpoint: str) -> None:
    with pytest.raises(UserError, match=r"storage\.endpoint"):
        Storage("s3://bucket", endpoint)


def test_an_endpoint_with_a_password_is_refused_without_repeating_it() -> None:
    with pytest.raises(UserError) as error:
        Storage("s3://bucket", "http://user:hunter2@host:9000")
    assert "hunter2" not in str(error.value)


def test_from_config_makes_the_root_absolute_and_knows_the_standard_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert Storage.from_config(StorageConfig(root="store")) == Storage(str(tmp_path / "store"))
    assert Storage.from_config(StorageConfig(root="s3://bucket/a/")).root == "s3://bucket/a"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert Storage.from_config(StorageConfig(root="s3://bucket")).endpoint == "http://127.0.0.1:1"
    assert Storage.from_config(StorageConfig(root="s3://bucket", endpoint="http://127.0.0.1:2")).endpoint == "http://127.0.0.1:2"


def test_bytes_come_back_as_written_and_are_overwritten_whole(any_storage: Storage) -> None:
    uri = any_storage.uri("a", "b.bin")
    assert not any_storage.exists(uri)
    any_storage.write_bytes(uri, b"first, longer")
    any_storage.write_bytes(uri, b"second")
    assert any_storage.exists(uri)
    assert any_storage.read_bytes(uri) == b"second"
    assert not any_storage.exists(any_storage.uri("a"))  # a folder is not an object


def test_readers_see_the_old_or_the_new_content_never_half(create_once_storage: Storage) -> None:
    contents = (b"a" * 2_000_000, b"b" * 1_000_000)
    uri = create_once_storage.uri("file")
    create_once_storage.write_bytes(uri, contents[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [create_once_storage.write_bytes(uri, contents[number % 2]) for number in range(20)])
        while not writing.done():
            assert create_once_storage.read_bytes(uri) in contents
        writing.result()


class _CuttingHandler(BaseHTTPRequestHandler):
    """Answers every GET with the same object, but closes the connection in the middle of the first `num_cuts` answers."""

    num_cuts = 0
    body = b"0123456789" * 1000

    def do_GET(self) -> None:
        is_cut = type(self).num_cuts > 0
        type(self).num_cuts -= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[:5000] if is_cut else self.body)

    def log_message(self, format: str, *_: object) -> None:
        pass


def test_a_body_that_breaks_off_is_read_again_and_for_ever_broken_is_named(aws_environment: None) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _CuttingHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        storage = Storage("s3://bucket", f"http://127.0.0.1:{server.server_port}")
        _CuttingHandler.num_cuts = 3
        assert storage.read_bytes("s3://bucket/key") == _CuttingHandler.body
        _CuttingHandler.num_cuts = 1000
        with pytest.raises(UserError, match="failed in all retries") as error:
            storage.read_bytes("s3://bucket/key")
        assert "s3://bucket/key" in _one_line(error)
        server.shutdown()


def test_a_download_with_another_objects_tail_is_repeated(s3_storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3_storage.uri("file")
    s3_storage.write_bytes(uri, b"new")
    client = s3_storage._s3._client
    transfer, tails = client.download_fileobj, [b"tail of the old"]

    def leave_a_tail(bucket: str, key: str, file: BinaryIO) -> None:
        transfer(bucket, key, file)
        file.write(tails.pop() if tails else b"")

    monkeypatch.setattr(client, "download_fileobj", leave_a_tail)
    s3_storage.download(uri, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert tails == []


@pytest.mark.parametrize("num_bytes", [0, 1, 20 * 2**20])
def test_files_go_up_and_come_down_unchanged(any_storage: Storage, tmp_path: Path, num_bytes: int) -> None:
    source, target = tmp_path / "source.bin", tmp_path / "new" / "target.bin"
    source.write_bytes(os.urandom(num_bytes))
    uri = any_storage.uri("large", "file.bin")
    any_storage.upload(source, uri)
    any_storage.download(uri, target)
    assert sha256_of(target) == sha256_of(source)
    assert any_storage.read_bytes(uri) == source.read_bytes()
    assert [found.num_bytes for found in any_storage.list(any_storage.uri("large"))] == [num_bytes]
    assert [path.name for path in target.parent.iterdir()] == ["target.bin"]


def test_a_failed_download_leaves_the_old_file_and_nothing_else(any_storage: Storage, tmp_path: Path) -> None:
    any_storage.write_bytes(any_storage.uri("there"), b"x")
    target = tmp_path / "folder" / "target.bin"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(UserError, match="it does not exist"):
        any_storage.download(any_storage.uri("missing"), target)
    assert {path.name: path.read_bytes() for path in target.parent.iterdir()} == {"target.bin": b"old"}


def test_pickle_carries_the_fields_and_no_connection(any_storage: Storage) -> None:
    any_storage.write_bytes(any_storage.uri("a"), b"1")
    filesystem, _ = any_storage.locate(any_storage.uri("a"))
    pickled = pickle.dumps(any_storage)
    copy = pickle.loads(pickled)
    assert (copy, hash(copy)) == (any_storage, hash(any_storage))
    assert set(vars(copy)) == {"root", "endpoint", "region"}
    assert not any(secret in pickled for secret in (b"AKIDTEST", b"secret-of-the-tests"))
    assert copy.read_bytes(copy.uri("a")) == b"1"
    assert any_storage.locate(any_storage.uri("b"))[0] is filesystem


def test_tables_are_read_through_the_located_filesystem(any_storage: Storage, tmp_path: Path) -> None:
    table = pa.table({"item": [3, 1, 2]})
    pq.write_table(table, tmp_path / "table.parquet")
    any_storage.upload(tmp_path / "table.parquet", any_storage.uri("t", "uploaded.parquet"))
    filesystem, path = any_storage.locate(any_storage.uri("t", "written.parquet"))
    pq.write_table(table, path, filesystem=filesystem)
    for found in any_storage.list(any_storage.uri("t")):
        filesystem, path = any_storage.locate(found.uri)
        assert pq.read_table(path, filesystem=filesystem).equals(table)


def test_list_is_recursive_sorted_and_blind_to_what_is_no_object(any_storage: Storage, tmp_path: Path) -> None:
    names = ["z", "a/2", "a/10", "a-b", "weird key+%20é", "a/deep/er/x", ".hidden"]
    for name in names:
        any_storage.write_bytes(any_storage.uri("folder", name), name.encode())
    any_storage.write_bytes(any_storage.uri("folder-beside", "no"), b"no")
    if any_storage.endpoint is None:
        (tmp_path / "store" / "folder" / f"{backends.TEMP_PREFIX}left-by-a-killed-writer").write_bytes(b"half")
        (tmp_path / "store" / "folder" / "empty").mkdir()
    found = any_storage.list(any_storage.uri("folder"))
    assert [info.uri for info in found] == sorted(any_storage.uri("folder", name) for name in names)
    assert all(info.num_bytes == len(info.uri.removeprefix(any_storage.uri("folder") + "/").encode()) and info.etag for info in found)
    assert any_storage.list(any_storage.uri("folder") + "/") == found
    assert any_storage.list(any_storage.uri("nowhere")) == []


def test_list_leaves_out_directory_markers_and_delete_tree_takes_them(moto_server: S3Server) -> None:
    storage = moto_server.fresh_storage()
    filesystem, path = storage.locate(storage.uri("folder", "marker"))
    filesystem.create_dir(path)
    client, bucket = storage._s3._client, storage.root.split("/")[2]
    assert storage.list(storage.uri("folder")) == []
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] > 0
    storage.delete_tree(storage.uri("folder"))
    assert [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket).get("Contents", []) if "folder" in entry["Key"]] == []


def test_list_goes_past_the_first_page(moto_server: S3Server) -> None:
    storage = moto_server.fresh_storage()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: storage.write_bytes(storage.uri("many", f"{number:04d}"), b""), range(1005)))
    assert [info.uri[-4:] for info in storage.list(storage.uri("many"))] == [f"{number:04d}" for number in range(1005)]
    storage.delete_tree(storage.uri("many"))
    assert storage.list(storage.uri("many")) == []


def test_etag_changes_with_the_content(any_storage: Storage) -> None:
    uri = any_storage.uri("a")
    any_storage.write_bytes(uri, b"one")
    before = any_storage.expand(uri)
    assert any_storage.expand(uri) == before
    any_storage.write_bytes(uri, b"two")
    assert any_storage.expand(uri)[0].etag != before[0].etag


def test_expand_takes_a_file_or_a_folder(any_storage: Storage) -> None:
    any_storage.write_bytes(any_storage.uri("in", "1"), b"x")
    any_storage.write_bytes(any_storage.uri("in", "2"), b"y")
    both = any_storage.expand(any_storage.uri("in"))
    assert [info.uri for info in both] == [any_storage.uri("in", "1"), any_storage.uri("in", "2")]
    assert any_storage.expand(any_storage.uri("in", "2")) == [both[1]] == [ObjectInfo(both[1].uri, 1, both[1].etag)]
    with pytest.raises(UserError) as error:
        any_storage.expand(any_storage.uri("out"))
    assert any_storage.uri("out") in _one_line(error)


def test_create_is_refused_when_there_is_an_object(any_storage: Storage) -> None:
    uri = any_storage.uri("deep", "once")
    assert any_storage.create(uri, b"first")
    assert not any_storage.create(uri, b"second")
    assert any_storage.read_bytes(uri) == b"first"
    assert [info.uri for info in any_storage.list(any_storage.uri("deep"))] == [uri]


def test_create_is_won_by_exactly_one_of_many(create_once_storage: Storage) -> None:
    for number in range(10):
        uri = create_once_storage.uri("race", str(number))
        won = _race(lambda index, uri=uri: create_once_storage.create(uri, str(index).encode()))
        assert won.count(True) == 1
        assert create_once_storage.read_bytes(uri) == str(won.index(True)).encode()


def test_create_is_won_when_only_the_answer_was_lost(moto_server: S3Server) -> None:
    storage = moto_server.fresh_storage()
    lost: list[int] = []

    def lose_the_first_answer(response: tuple[AWSResponse, object], **_: object) -> int | None:
        if lost:
            return None
        lost.append(response[0].status_code)
        return 0  # seconds to wait before the retry

    storage._s3._client.meta.events.register_first("needs-retry.s3.PutObject", lose_the_first_answer)
    assert storage.create(storage.uri("once"), b"mine")
    assert lost == [200]
    assert not storage.create(storage.uri("once"), b"other")


def test_a_transfer_with_a_damaged_part_is_repeated_and_no_other_error_is() -> None:
    codes = ["InvalidPart", "PreconditionFailed"]

    def transfer() -> str:
        if codes:
            raise ClientError({"Error": {"Code": codes.pop()}}, "CompleteMultipartUpload")
        return "done"

    assert backends._repeat_if_damaged(transfer) == "done"
    codes.append("AccessDenied")
    with pytest.raises(ClientError, match="AccessDenied"):
        backends._repeat_if_damaged(transfer)


def test_delete_and_delete_tree(any_storage: Storage) -> None:
    for name in ("keep", "tree/a", "tree/b/c", "tree-beside"):
        any_storage.write_bytes(any_storage.uri(name), b"x")
    any_storage.delete(any_storage.uri("keep"))
    any_storage.delete(any_storage.uri("keep"))
    any_storage.delete_tree(any_storage.uri("tree"))
    any_storage.delete_tree(any_storage.uri("tree"))
    assert [info.uri for info in any_storage.list(any_storage.root)] == [any_storage.uri("tree-beside")]


def test_delete_tree_stays_below_the_root(any_storage: Storage) -> None:
    any_storage.write_bytes(any_storage.uri("a"), b"x")
    parent, _, name = any_storage.root.rpartition("/")
    for uri in (any_storage.root, any_storage.root + "/", parent, any_storage.root + "/../" + name, any_storage.root + "-beside"):
        with pytest.raises(UserError, match=r"is not below storage\.root"):
            any_storage.delete_tree(uri)
    assert any_storage.exists(any_storage.uri("a"))


def test_a_wrong_bucket_is_named_by_every_operation(s3_storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    uri = "s3://no-such-bucket/key"
    operations: list[Callable[[], object]] = [
        lambda: s3_storage.exists(uri),
        lambda: s3_storage.read_bytes(uri),
        lambda: s3_storage.write_bytes(uri, b""),
        lambda: s3_storage.create(uri, b""),
        lambda: s3_storage.upload(tmp_path / "file", uri),
        lambda: s3_storage.download(uri, tmp_path / "copy"),
        lambda: s3_storage.list(uri),
        lambda: s3_storage.expand(uri),
        lambda: s3_storage.delete(uri),
    ]
    for operation in operations:
        with pytest.raises(UserError) as error:
            operation()
        assert uri in _one_line(error)
        assert "NoSuchBucket" in str(error.value)
        assert "create the bucket" in str(error.value)


def test_wrong_credentials_are_named_and_not_repeated(rclone_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = rclone_server.fresh_storage().uri("a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    with pytest.raises(UserError, match="check the credentials") as error:
        Storage("s3://bucket", rclone_server.endpoint).read_bytes(uri)
    assert "a-wrong-secret" not in _one_line(error)


def test_missing_credentials_are_named(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=r"NoCredentialsError.*set AWS_ACCESS_KEY_ID") as error:
        Storage("s3://bucket", moto_server.endpoint).read_bytes("s3://bucket/key")
    assert "s3://bucket/key" in _one_line(error)


def test_an_endpoint_that_does_not_answer_is_named(aws_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "MAX_ATTEMPTS", 1)
    with pytest.raises(UserError, match=r"EndpointConnectionError.*http://127\.0\.0\.1:9.*check storage\.endpoint") as error:
        Storage("s3://bucket", "http://127.0.0.1:9").read_bytes("s3://bucket/key")
    assert "s3://bucket/key" in _one_line(error)


def test_local_errors_are_one_line_too(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes(storage.uri("file"), b"x")
    with pytest.raises(UserError, match="ENOENT") as error:
        storage.read_bytes(storage.uri("missing"))
    assert storage.uri("missing") in _one_line(error)
    with pytest.raises(UserError, match="cannot write"):
        storage.write_bytes(storage.uri("file", "below"), b"x")
    assert not storage.exists(storage.uri("file", "below"))


def test_private_folder_is_open_to_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "private"
    for _ in range(2):
        assert private_folder(folder) == folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o755)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="private folder"):
        private_folder(tmp_path / "file")
