"""The registry on a folder and real S3 servers: complete versions or none, verified when fetched, aliases with a history."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recsys.errors import UserError
from recsys.exports.registry import AliasEntry, Registry, previous_version
from recsys.store import Storage

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40, "tokenizer/vocab.txt": b"a\nb\n"}


def _write_export(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def _read_export(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def registry(any_storage: Storage) -> Registry:
    return Registry(any_storage, "recommender")


@pytest.fixture
def versions(registry: Registry, tmp_path: Path) -> Registry:
    """Return a registry with the versions v1, v2 and v3."""
    folder = _write_export(tmp_path / "export", {"model": b"m"})
    for version in ("v1", "v2", "v3"):
        assert registry.publish(folder, version, {})[1]
    return registry


@pytest.fixture
def published(any_storage: Storage, tmp_path: Path) -> tuple[Storage, Registry, str]:
    """Return a storage, a registry with version v1, and the stored address of its model."""
    registry = Registry(any_storage, "recommender")
    manifest, _ = registry.publish(_write_export(tmp_path / "export"), "v1", {})
    return any_storage, registry, any_storage.uri("exports/recommender/versions/v1", manifest.attempt, "model.safetensors")


def test_what_is_published_comes_back(registry: Registry, tmp_path: Path) -> None:
    metadata = {"metrics": {"ndcg@10": 0.25}, "dataset": "abc"}
    manifest, is_new = registry.publish(_write_export(tmp_path / "export"), "v1", metadata)
    assert is_new
    assert registry.manifest("v1") == manifest
    assert manifest.metadata == metadata
    assert [(file.path, file.num_bytes) for file in manifest.files] == [(name, len(FILES[name])) for name in sorted(FILES)]
    folder = registry.fetch("v1", tmp_path / "cache")
    assert folder == tmp_path / "cache" / "recommender" / "v1"
    assert _read_export(folder) == FILES
    assert folder.stat().st_mode & 0o077 == 0


def test_a_version_is_never_changed(registry: Registry, any_storage: Storage, tmp_path: Path) -> None:
    first, _ = registry.publish(_write_export(tmp_path / "export"), "v1", {"try": 1})
    before = any_storage.list(any_storage.root)
    again, is_new = registry.publish(_write_export(tmp_path / "other", {"model": b"other"}), "v1", {"try": 2})
    assert (again, is_new) == (first, False)
    assert any_storage.list(any_storage.root) == before


def test_versions_are_those_with_a_manifest(versions: Registry, any_storage: Storage) -> None:
    for stray in ("v0/files-dead/model", "v4/files-dead/manifest.json", "manifest.json"):
        any_storage.write_bytes(any_storage.uri("exports/recommender/versions", stray), b"x")
    assert versions.versions() == ["v1", "v2", "v3"]
    with pytest.raises(UserError, match="no version 'v4'; published: v1, v2, v3"):
        versions.manifest("v4")
    with pytest.raises(UserError, match="published: none"):
        Registry(any_storage, "unknown").manifest("v1")


@pytest.mark.parametrize("name", ["", "..", "a/b", "-a", "a\n", ".a"])
def test_names_that_could_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    registry = Registry(Storage(str(tmp_path / "store")), "recommender")
    folder = _write_export(tmp_path / "export")
    registry.publish(folder, "v1", {})
    with pytest.raises(UserError, match="must be letters"):
        Registry(Storage(str(tmp_path)), name)
    with pytest.raises(UserError, match="must be letters"):
        registry.publish(folder, name, {})
    with pytest.raises(UserError, match="must be letters"):
        registry.promote(name, "v1", "")


def test_an_empty_folder_is_no_export(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no files to publish"):
        registry.publish(tmp_path / "nothing", "v1", {})


def test_two_publishers_of_one_version_never_mix(create_once_storage: Storage, tmp_path: Path) -> None:
    exports = [
        _write_export(tmp_path / f"export-{who}", {"a": b"%d" % who * 100, "b/c": b"%d" % who, f"only-{who}": b""}) for who in (0, 1)
    ]
    registry = Registry(create_once_storage, "recommender")
    for number in range(20):
        version = f"v{number}"
        barrier = threading.Barrier(2)

        def publish(who: int, version: str = version, barrier: threading.Barrier = barrier) -> bool:
            own = Registry(create_once_storage, "recommender")
            barrier.wait(timeout=30)
            manifest, won = own.publish(exports[who], version, {"who": who})
            assert (manifest.metadata["who"] == who) == won
            return won

        with ThreadPoolExecutor(2) as pool:
            won = list(pool.map(publish, (0, 1)))
        assert won.count(True) == 1
        assert _read_export(registry.fetch(version, tmp_path / "cache")) == _read_export(exports[won.index(True)])
        stored = create_once_storage.list(create_once_storage.uri("exports/recommender/versions", version))
        assert len(stored) == 3 + 1  # the winner's files and the manifest; the loser's files were deleted


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "sha256"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 128]), "sha256"),
        (lambda data: data[:-1], "has 10239 bytes where the manifest says 10240"),
        (lambda data: b"", "has 0 bytes"),
    ],
)
def test_fetch_finds_a_damaged_file(published: tuple[Storage, Registry, str], tmp_path: Path, damage, message: str) -> None:
    storage, registry, uri = published
    storage.write_bytes(uri, damage(FILES["model.safetensors"]))
    for _ in range(2):
        with pytest.raises(UserError, match=message) as error:
            registry.fetch("v1", tmp_path / "cache")
        assert uri in str(error.value)
        assert not (tmp_path / "cache/recommender/v1/model.safetensors").exists()


def test_fetch_finds_a_missing_file(published: tuple[Storage, Registry, str], tmp_path: Path) -> None:
    storage, registry, uri = published
    storage.delete(uri)
    with pytest.raises(UserError, match="it does not exist") as error:
        registry.fetch("v1", tmp_path / "cache")
    assert uri in str(error.value)


def test_fetch_takes_again_what_is_whole_and_mends_what_is_not(published: tuple[Storage, Registry, str], tmp_path: Path) -> None:
    storage, registry, uri = published
    folder = registry.fetch("v1", tmp_path / "cache")
    (folder / "config.json").write_bytes(b"[]")
    storage.delete(uri)
    assert _read_export(registry.fetch("v1", tmp_path / "cache")) == FILES


@pytest.mark.parametrize("path", ["../../escaped", "/tmp/escaped", "a/../../b"])
def test_fetch_refuses_a_path_that_leaves_the_folder(published: tuple[Storage, Registry, str], tmp_path: Path, path: str) -> None:
    storage, registry, _ = published
    uri = storage.uri("exports/recommender/versions/v1/manifest.json")
    storage.write_bytes(uri, storage.read_bytes(uri).replace(b'"config.json"', f'"{path}"'.encode()))
    with pytest.raises(UserError, match="segment"):
        registry.fetch("v1", tmp_path / "cache")


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"[]", b"\xff\xfe", b'{"format_version": 2}'])
def test_a_damaged_manifest_is_named(published: tuple[Storage, Registry, str], data: bytes) -> None:
    storage, registry, _ = published
    uri = storage.uri("exports/recommender/versions/v1/manifest.json")
    storage.write_bytes(uri, data)
    with pytest.raises(UserError, match="damaged or of another release") as error:
        registry.manifest("v1")
    assert uri in str(error.value)
    assert "\n" not in str(error.value)


def test_another_versions_manifest_is_refused(versions: Registry, any_storage: Storage) -> None:
    root = any_storage.uri("exports/recommender/versions")
    any_storage.write_bytes(f"{root}/v1/manifest.json", any_storage.read_bytes(f"{root}/v2/manifest.json"))
    with pytest.raises(UserError, match="is the manifest of recommender v2"):
        versions.manifest("v1")


def test_aliases_move_forward_and_back_and_remember(versions: Registry) -> None:
    assert versions.resolve("production") is None
    assert versions.history("production") == []
    for version in ("v1", "v2", "v3"):
        assert versions.promote("production", version, f"{version} is better")
    assert versions.promote("candidate", "v1", "other aliases are apart")
    assert versions.resolve("production") == "v3"
    assert versions.roll_back("production", "errors") == "v2"
    assert versions.roll_back("production", "errors too") == "v1"
    with pytest.raises(UserError, match="no earlier version; promote one of: v1, v2, v3"):
        versions.roll_back("production", "once more")
    assert versions.promote("production", "v3", "mended")
    assert [(entry.generation, entry.version, entry.action, entry.reason) for entry in versions.history("production")] == [
        (1, "v1", "promote", "v1 is better"),
        (2, "v2", "promote", "v2 is better"),
        (3, "v3", "promote", "v3 is better"),
        (4, "v2", "roll_back", "errors"),
        (5, "v1", "roll_back", "errors too"),
        (6, "v3", "promote", "mended"),
    ]
    assert versions.resolve("candidate") == "v1"


def test_promoting_what_is_promoted_changes_nothing(versions: Registry) -> None:
    assert versions.promote("production", "v1", "first")
    assert versions.promote("production", "v1", "again")
    assert len(versions.history("production")) == 1


def test_an_alias_names_only_what_is_published(versions: Registry) -> None:
    with pytest.raises(UserError, match="no version 'v9'"):
        versions.promote("production", "v9", "")
    assert versions.resolve("production") is None


def test_a_decision_made_upon_an_old_generation_is_refused(versions: Registry) -> None:
    assert versions.promote("production", "v1", "first", seen=0)
    assert not versions.promote("production", "v2", "late", seen=0)
    current = versions.current("production")
    assert current is not None
    assert versions.promote("production", "v2", "in time", seen=current.generation)
    assert versions.resolve("production") == "v2"


def test_racing_promotions_all_get_a_generation(create_once_storage: Storage, tmp_path: Path) -> None:
    folder = _write_export(tmp_path / "export", {"model": b"m"})
    registry = Registry(create_once_storage, "recommender")
    names = [f"v{number}" for number in range(6)]
    for name in names:
        registry.publish(folder, name, {})
    barrier = threading.Barrier(len(names))

    def promote(version: str) -> bool:
        barrier.wait(timeout=30)
        return registry.promote("production", version, "race")

    with ThreadPoolExecutor(len(names)) as pool:
        assert all(pool.map(promote, names))
    history = registry.history("production")
    assert [entry.generation for entry in history] == [1, 2, 3, 4, 5, 6]
    assert sorted(entry.version for entry in history) == names
    assert registry.resolve("production") == history[-1].version


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("", None),
        ("+a", None),
        ("+a +b", "a"),
        ("+a +b -a", None),
        ("+a +b +c -b", "a"),
        ("+a +b -a +c", "a"),
        ("+a +b -a +b", "a"),
        ("+a +b +a", "b"),
        ("+a +b +a -b -a", None),
    ],
)
def test_previous_version(steps: str, expected: str | None) -> None:
    history = [
        AliasEntry(generation=number, version=step[1:], action="promote" if step[0] == "+" else "roll_back", reason="", created_at="")
        for number, step in enumerate(steps.split(), start=1)
    ]
    assert previous_version(history) == expected
