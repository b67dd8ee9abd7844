"""The artifact store: content-addressed bytes on any filesystem of pyarrow (a folder, s3://, gs://, or another URI).

An artifact's name is the SHA-256 of its bytes, its path `<first two digits>/<digest>`. An artifact is absent or whole:
a file is written under a temporary name and moved, and an object in a bucket appears only when its upload is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

import pyarrow as pa
from pyarrow import fs

from fsu_ray.errors import StorageError
from fsu_ray.records import Digest
from fsu_ray.storage import places

_ONE_PUT = 5 * 2**20  # bytes; longer artifacts are uploaded in parts
_DIGEST = re.compile(r"[0-9a-f]{64}")
_WRITING = ".writing-"
_BUCKETS = {"s3": "s3", "gcs": "gs"}  # pyarrow's type name of a filesystem, and the scheme of its URIs

Filesystem = Any
"""A filesystem of pyarrow."""


@dataclass(frozen=True)
class Retries:
    """How long the clients of buckets try, in seconds. Tests pass shorter times.

    Amazon's client makes up to `attempts` attempts at a request after errors of the service or the network; each waits
    `connect` for a connection and `silence` for the next byte. Google's client retries for `total` seconds.
    """

    attempts: int = 4
    connect: float = 5.0
    silence: float = 10.0
    total: float = 45.0


@dataclass(frozen=True)
class Artifacts:
    """A store of immutable bytes, named by their SHA-256. Implements `work.BlobStore`.

    Its only state are its `location` and `retries`, so it pickles to other processes and machines that see the same
    folder or URI. Use `Artifacts.open` for a location that has not been tested yet.
    """

    location: str
    retries: Retries = Retries()

    @classmethod
    def open(cls, location: str, retries: Retries = Retries()) -> Artifacts:
        """The store at `location`, an absolute folder or a URI; creates the folder and writes a test file in it.

        The store's own `location` includes what the environment adds to a URI (region, endpoint). Raises StorageError
        where the location is not understood, or cannot be created or written to.
        """
        bucket = _bucket(location)
        store = cls(bucket.uri if bucket else location, retries)
        _check_writable(*store._place, f"artifacts {places.shown(location)}", "FSU_ARTIFACTS")
        return store

    def put(self, data: bytes) -> Digest:
        """Write `data` and return its SHA-256 in hex; an artifact that exists is not written again.

        Raises StorageError where it cannot be written. The artifact is absent or whole afterwards, also after an
        exception, and no temporary file stays.
        """
        digest = Digest(hashlib.sha256(data).hexdigest())
        filesystem, _ = self._place
        target = self._file(digest)
        folder = target.rpartition("/")[0]
        try:
            if _length(filesystem, target) == len(data):
                return digest
            if _is_bucket(filesystem):
                _send(filesystem if len(data) <= _ONE_PUT else self._in_parts, target, data)
                return digest
            filesystem.create_dir(folder, recursive=True)
            _write(filesystem, f"{folder}/{_temporary()}", data, keep_as=target)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"artifact {digest[:12]} cannot be written to {places.shown(self.location)} ({places.cause(error)}); "
                f"{'check that bucket' if _is_bucket(filesystem) else 'make room there'} "
                "or set FSU_ARTIFACTS to another place"
            ) from error
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of an artifact; raises StorageError where it is missing or does not match its digest."""
        data: bytes = self._read(digest, _contents)
        if hashlib.sha256(data).hexdigest() != digest:
            raise StorageError(f"artifact {self.path(digest)} is damaged; put a good copy in its place")
        return data

    def has(self, digest: str) -> bool:
        """Whether an artifact exists; its bytes are not checked."""
        return self._read(digest, _length) is not None

    def size(self, digest: str) -> int:
        """The size of an artifact in bytes; raises StorageError where it is missing."""
        length = self._read(digest, _length)
        if length is None:
            raise self._missing(digest)
        return int(length)

    def delete(self, digest: str) -> bool:
        """Delete an artifact; whether it existed. Raises StorageError where it cannot be deleted."""
        return self._delete(self._file(digest), f"artifact {self.path(digest)}")

    def digests(self) -> dict[Digest, tuple[int, datetime]]:
        """By digest, every artifact's size in bytes and the time it was written. Raises StorageError."""
        return {Digest(info.base_name): (info.size, info.mtime) for info in self._files()
                if _DIGEST.fullmatch(info.base_name) and info.path == self._file(info.base_name)}  # fmt: skip

    def unfinished(self, before: datetime) -> dict[str, int]:
        """By name, the sizes in bytes of temporary files older than `before`, left by killed writers. Raises
        StorageError."""
        root = self._place[1]
        return {info.path.removeprefix(f"{root}/"): info.size for info in self._files()
                if info.base_name.startswith(_WRITING) and info.mtime < before}  # fmt: skip

    def discard(self, name: str) -> bool:
        """Delete a file of `unfinished`; whether it still existed. Raises StorageError where it cannot be deleted."""
        assert name.rpartition("/")[2].startswith(_WRITING), name
        return self._delete(f"{self._place[1]}/{name}", name)

    def path(self, digest: str) -> str:
        """The path of an artifact for messages: a local path, or `type://path` on another filesystem."""
        return _named(self._place[0], self._file(digest))

    @cached_property
    def _place(self) -> tuple[Filesystem, str]:
        return connect(self.location, self.retries, allow_delayed_open=True)

    @cached_property
    def _in_parts(self) -> Filesystem:
        """The filesystem for uploads in parts. With delayed open, an upload whose beginning fails would leave an empty
        object under the name."""
        return connect(self.location, self.retries, allow_delayed_open=False)[0]

    def __reduce__(self) -> tuple[type[Artifacts], tuple[str, Retries]]:
        return (Artifacts, (self.location, self.retries))

    def _files(self) -> list[Any]:
        """Every file below the location, in one listing: in a bucket that is one request for 1,000 objects, while
        folder by folder would take 256 requests. Ray's checkpoints below it are about as many as the artifacts."""
        return listed(*self._place, f"artifacts {places.shown(self.location)}")

    def _delete(self, file: str, name: str) -> bool:
        filesystem, _ = self._place
        return deleted(filesystem, filesystem.delete_file, file, name)

    def _file(self, digest: str) -> str:
        if not _DIGEST.fullmatch(digest):
            raise StorageError(f"{digest!r} is not the digest of an artifact; give 64 hexadecimal digits")
        return f"{self._place[1]}/{digest[:2]}/{digest}"

    def _read(self, digest: str, read: Callable[[Any, str], Any]) -> Any:
        file = self._file(digest)
        try:
            return read(self._place[0], file)
        except FileNotFoundError as error:
            raise self._missing(digest) from error
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"artifact {self.path(digest)} cannot be read ({places.cause(error)}); check that place and try again"
            ) from error

    def _missing(self, digest: str) -> StorageError:
        return StorageError(f"artifact {self.path(digest)} is missing; check FSU_ARTIFACTS or put a copy there")


def listed(filesystem: Filesystem, root: str, what: str) -> list[Any]:
    """Every file below `root`, none where that does not exist. Raises StorageError about `what`."""
    try:
        infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"{what} cannot be listed ({places.cause(error)}); check that place and try again"
        ) from error
    return [info for info in infos if info.is_file]


def deleted(filesystem: Filesystem, delete: Callable[[str], None], path: str, name: str) -> bool:
    """Call `delete(path)` and sync its folder; whether the path still existed. Raises StorageError about `name`."""
    try:
        delete(path)
        _sync(filesystem, path.rpartition("/")[0])
    except FileNotFoundError:
        return False
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"{name} cannot be deleted ({places.cause(error)}); check that place and try again"
        ) from error
    return True


def locate(location: str) -> tuple[Filesystem | None, str]:
    """Where Ray keeps checkpoints: a filesystem (None: the local one) and a path on it.

    `location` is an absolute folder or a URI; a test file is written in it. Raises StorageError.
    """
    filesystem, path = connect(location, allow_delayed_open=True, check_directory_existence_before_creation=True)
    _check_writable(filesystem, path, f"checkpoints {places.shown(location)}", "FSU_RUNS")
    return (None if filesystem.type_name == "local" else filesystem), path


def _bucket(location: str) -> places.Bucket | None:
    """The bucket that `location` names, with its region; None where it names no bucket."""
    bucket = places.read(location)
    if bucket is None or bucket.kind != "s3" or bucket.region:
        return bucket
    if bucket.endpoint:
        return replace(bucket, region="us-east-1")  # the default of S3 servers other than Amazon's
    try:
        return replace(bucket, region=fs.resolve_s3_region(bucket.path.partition("/")[0]))
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"the region of {places.shown(location)} cannot be found ({places.cause(error)}); "
            "check the bucket's name, or set AWS_REGION"
        ) from error


def connect(location: str, retries: Retries = Retries(), **options: bool) -> tuple[Filesystem, str]:
    """A filesystem and a path on it; `options` are those of S3. Raises StorageError."""
    bucket = _bucket(location)
    try:
        if bucket is None:
            return fs.FileSystem.from_uri(location)  # type: ignore[no-any-return]
        if bucket.kind == "s3":
            return fs.S3FileSystem(
                region=bucket.region,
                endpoint_override=bucket.endpoint,
                scheme=bucket.scheme,
                connect_timeout=retries.connect,
                request_timeout=retries.silence,
                retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=retries.attempts),
                tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE"),
                **options,
            ), bucket.path
        return fs.GcsFileSystem(
            anonymous=bucket.anonymous,
            endpoint_override=bucket.endpoint,
            scheme=bucket.scheme,
            retry_time_limit=timedelta(seconds=retries.total),
        ), bucket.path
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StorageError(
            f"location {places.shown(location)} is not understood ({places.cause(error)}); "
            "give an absolute folder or a URI such as file:///data/artifacts or s3://BUCKET/PREFIX"
        ) from error


def _check_writable(filesystem: Filesystem, root: str, what: str, setting: str) -> None:
    """Create the folder `root` and write a test file in it. Raises StorageError about `what`."""
    try:
        if _is_bucket(filesystem):
            _send(filesystem, f"{root}/.writable", b"")  # kept: deleting it would cost a request
            return
        filesystem.create_dir(root, recursive=True)
        _write(filesystem, f"{root}/{_temporary()}", b"", keep_as=None)
    except (OSError, pa.ArrowException) as error:
        first = "check the bucket, the credentials and the endpoint, or " if _is_bucket(filesystem) else ""
        raise StorageError(
            f"{what} cannot be written to ({places.cause(error)}); {first}set {setting} to a writable folder or URI"
        ) from error


def _write(filesystem: Filesystem, temporary: str, data: bytes, keep_as: str | None) -> None:
    """Write `data` to `temporary` and move it to `keep_as` (None: delete it). `temporary` never stays."""
    try:
        with filesystem.open_output_stream(temporary) as stream:
            stream.write(data)
        if keep_as is not None:
            _sync(filesystem, temporary)
            filesystem.move(temporary, keep_as)
            _sync(filesystem, keep_as.rpartition("/")[0])
            return
        filesystem.delete_file(temporary)
    except BaseException:
        with contextlib.suppress(OSError, pa.ArrowException):
            filesystem.delete_file(temporary)
        raise


def _send(filesystem: Filesystem, target: str, data: bytes) -> None:
    """Upload `data` as the object `target`.

    A separate thread uploads, since an interrupt never reaches it: a stream that is closed early or garbage-collected
    would create an object with only a part of the data.
    """

    def send() -> None:
        stream = filesystem.open_output_stream(target)
        stream.write(data)
        stream.close()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(send).result()


def _sync(filesystem: Filesystem, path: str) -> None:
    """Wait until a local file or folder is on disk, before rows of the ledger name it. Buckets need no sync."""
    if filesystem.type_name == "local":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _temporary() -> str:
    """A file name that no other process, thread or machine uses."""
    return f"{_WRITING}{uuid.uuid4().hex}"


def _is_bucket(filesystem: Filesystem) -> bool:
    """Whether objects are stored: without folders or renaming, and visible only when their upload is complete."""
    return filesystem.type_name in _BUCKETS


def _named(filesystem: Filesystem, path: str) -> str:
    """A path for messages."""
    kind = filesystem.type_name
    return path if kind == "local" else f"{_BUCKETS.get(kind, kind)}://{path}"


def _length(filesystem: Filesystem, file: str) -> int | None:
    """The size of a file in bytes, None where it does not exist."""
    if filesystem.type_name != "s3":  # with Google's client, opening a file would begin to read it
        info = filesystem.get_file_info(file)
        return int(info.size) if info.is_file else None
    try:
        with filesystem.open_input_file(file) as stream:  # one request; `get_file_info` would also look for a folder
            return int(stream.size())
    except FileNotFoundError:
        return None


def _contents(filesystem: Filesystem, file: str) -> bytes:
    with filesystem.open_input_file(file) as stream:
        return bytes(stream.read())
