"""The artifact store in a folder, on S3 and on Google's: the same bytes come back, and an artifact is absent or
whole."""

from __future__ import annotations

import errno
import hashlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsu_ray.errors import StorageError
from fsu_ray.storage.artifacts import Artifacts


@pytest.fixture
def store(tmp_path: Path) -> Artifacts:
    return Artifacts.open(str(tmp_path / "artifacts"))


def files(store: Artifacts) -> list[Path]:
    return [path for path in Path(store.location).rglob("*") if path.is_file()]


@dataclass(frozen=True)
class StoreFiles:
    """A store, and direct access to its files: names below its location, and their bytes."""

    store: Artifacts
    path: str
    names: Callable[[], list[str]]
    read: Callable[[str], bytes]
    write: Callable[[str, bytes], Any]


@pytest.fixture(params=["folder", "s3", "gs"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> StoreFiles:
    """A store on each supported filesystem."""
    if request.param == "folder":
        root = tmp_path / "artifacts"
        store = Artifacts.open(str(root))

        def write(name: str, data: bytes) -> None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)

        return StoreFiles(
            store,
            str(root),
            lambda: [str(path.relative_to(root)) for path in files(store)],
            lambda name: (root / name).read_bytes(),
            write,
        )
    bucket = request.getfixturevalue(f"{request.param}_bucket")
    store = Artifacts.open(bucket.uri())
    return StoreFiles(store, f"{bucket.kind}://{bucket.name}/store", bucket.names, bucket.read, bucket.write)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=2000))
def test_what_is_put_comes_back_under_its_sha256(kept: StoreFiles, data: bytes) -> None:
    store = kept.store
    digest = store.put(data)

    assert digest == hashlib.sha256(data).hexdigest()
    assert store.get(digest) == data
    assert store.has(digest)
    assert store.size(digest) == len(data)
    assert store.path(digest) == f"{kept.path}/{digest[:2]}/{digest}"
    assert kept.read(f"{digest[:2]}/{digest}") == data


def test_putting_the_same_bytes_again_writes_nothing(kept: StoreFiles) -> None:
    """A file that has the right length is left alone."""
    digest = kept.store.put(b"weights")
    kept.write(f"{digest[:2]}/{digest}", b"WEIGHTS")

    assert kept.store.put(b"weights") == digest
    assert kept.read(f"{digest[:2]}/{digest}") == b"WEIGHTS"
    assert kept.names() == [f"{digest[:2]}/{digest}"]


def test_putting_replaces_a_file_that_was_cut_short(kept: StoreFiles) -> None:
    digest = kept.store.put(b"weights")
    kept.write(f"{digest[:2]}/{digest}", b"wei")

    kept.store.put(b"weights")

    assert kept.store.get(digest) == b"weights"


def test_a_damaged_artifact_is_refused(kept: StoreFiles) -> None:
    digest = kept.store.put(b"weights")
    kept.write(f"{digest[:2]}/{digest}", b"WEIGHTS")

    with pytest.raises(StorageError, match="damaged"):
        kept.store.get(digest)


def test_a_missing_artifact_is_named(kept: StoreFiles) -> None:
    digest = hashlib.sha256(b"never put").hexdigest()

    assert not kept.store.has(digest)
    for read in (kept.store.get, kept.store.size):
        with pytest.raises(StorageError, match=f"{digest} is missing"):
            read(digest)


def test_a_deleted_artifact_is_missing(kept: StoreFiles) -> None:
    digest = kept.store.put(b"weights")
    kept.store.put(b"others")

    assert kept.store.delete(digest)
    assert not kept.store.delete(digest)
    assert not kept.store.has(digest)
    assert len(kept.names()) == 1


def test_only_artifacts_are_listed(kept: StoreFiles) -> None:
    """Files at other paths are not, such as a digest's name below Ray's checkpoints."""
    digests = {kept.store.put(data): len(data) for data in (b"weights", b"", b"others")}
    one = next(iter(digests))
    for name in (f"runs/r-1/{one}", f"runs/{one[:2]}/{one}", one, f"zz/{one}", "ab/notes.txt"):
        kept.write(name, b"x")

    listed = kept.store.digests()

    assert {digest: size for digest, (size, _) in listed.items()} == digests
    now = datetime.now(UTC)
    assert all(abs(at - now) < timedelta(minutes=1) for _, at in listed.values())


def test_old_files_of_killed_writers_are_listed(kept: StoreFiles) -> None:
    """They can be deleted; no other file is listed."""
    digest = kept.store.put(b"weights")
    for name in ("ab/.writing-0123", ".writing-4567"):
        kept.write(name, b"wei")
    written = datetime.now(UTC)

    assert kept.store.unfinished(written - timedelta(minutes=1)) == {}
    unfinished = kept.store.unfinished(written + timedelta(minutes=1))
    assert unfinished == {"ab/.writing-0123": 3, ".writing-4567": 3}
    assert all(kept.store.discard(name) for name in unfinished)
    assert not kept.store.discard(".writing-4567")
    assert kept.names() == [f"{digest[:2]}/{digest}"]


@pytest.mark.parametrize("name", ["", "abc", "../../etc/passwd", "A" * 64, "0" * 64 + "\n"])
def test_only_digests_name_artifacts(kept: StoreFiles, name: str) -> None:
    store = kept.store
    for read in (store.get, store.has, store.size, store.path):
        with pytest.raises(StorageError, match="not the digest"):
            read(name)


def test_a_store_pickles_small_and_works_on_the_other_side(kept: StoreFiles) -> None:
    store = kept.store
    digest = store.put(b"weights")

    copy = pickle.loads(pickle.dumps(store))

    assert copy == store
    assert copy.get(digest) == b"weights"
    assert len(pickle.dumps(store)) < 300


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}"])
def test_a_location_is_a_folder_or_a_uri(tmp_path: Path, form: str) -> None:
    store = Artifacts.open(form.format(tmp_path / "a" / "b"))

    digest = store.put(b"x")

    assert store.path(digest) == str(tmp_path / "a" / "b" / digest[:2] / digest)


@pytest.mark.parametrize("location", ["", "relative/folder", "nosuch://place"])
def test_a_location_that_is_neither_is_explained(location: str) -> None:
    with pytest.raises(StorageError, match="give an absolute folder or a URI"):
        Artifacts.open(location)


def test_a_place_that_cannot_be_written_to_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    for location in (tmp_path / "file" / "below", tmp_path / "file", Path("/proc/artifacts")):
        with pytest.raises(StorageError, match=r"cannot be written to \(.+\); set FSU_ARTIFACTS to") as caught:
            Artifacts.open(str(location))
        assert "\n" not in str(caught.value)


def test_a_folder_that_takes_no_files_is_not_opened() -> None:
    """The folder exists, so only the attempt to write in it shows that."""
    with pytest.raises(StorageError, match="set FSU_ARTIFACTS to"):
        Artifacts.open("/proc/self")


SMALL_FILES = """
import resource, sys
from fsu_ray.errors import StorageError
from fsu_ray.storage.artifacts import Artifacts

store = Artifacts.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    store.put(bytes(100_000))
except StorageError as error:
    print(error)
"""


def test_a_write_that_the_system_ends_leaves_nothing(store: Artifacts) -> None:
    """A separate process may write 4,096 bytes a file; in this process the limit would hit our log too."""
    store.put(b"there before")

    run = subprocess.run([sys.executable, "-c", SMALL_FILES, store.location], capture_output=True, text=True)

    assert (run.returncode, run.stderr) == (0, "")
    assert "make room there or set FSU_ARTIFACTS" in run.stdout
    assert run.stdout.count("\n") == 1
    assert [path.read_bytes() for path in files(store)] == [b"there before"]


class Interrupted:
    """A filesystem whose streams really write half of the data and then raise `error`."""

    def __init__(self, real: Any, error: BaseException) -> None:
        self.real, self.error = real, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def open_output_stream(self, path: str) -> Any:
        stream = self.real.open_output_stream(path)
        error = self.error

        class Half:
            def __enter__(self) -> Half:
                return self

            def __exit__(self, *_: object) -> None:
                stream.close()

            def write(self, data: bytes) -> None:
                stream.write(data[: len(data) // 2])
                raise error

        return Half()


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "full"), StorageError, "No space left on device"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
@pytest.mark.parametrize("before", [None, b"cut"], ids=["absent", "cut short"])
def test_an_interrupted_write_changes_nothing(
    store: Artifacts, error: BaseException, raised: type[BaseException], message: str | None, before: bytes | None
) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    if before is not None:
        store.put(b"weights")
        Path(store.path(digest)).write_bytes(before)
    place = store._place
    store.__dict__["_place"] = (Interrupted(place[0], error), place[1])

    with pytest.raises(raised, match=message):
        store.put(b"weights")

    assert [path.read_bytes() for path in files(store)] == ([] if before is None else [before])


def test_writers_of_the_same_bytes_do_not_disturb_each_other(kept: StoreFiles) -> None:
    store = kept.store
    data = bytes(range(256)) * 4000
    start = threading.Barrier(8)
    digests: list[str] = []

    def write() -> None:
        start.wait()
        digests.append(store.put(data))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(digests) == 8
    assert store.get(digests[0]) == data
    assert len(kept.names()) == 1
