"""Content-addressed bytes on any filesystem of pyarrow: a folder, s3://, gs://, or another URI.

An artifact's name is the SHA-256 of its bytes, its place `<first two digits>/<digest>`. Under it there is either
nothing or the whole of it: a file is written under another name and moved, an object of a bucket appears as it ends.
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

ATTEMPTS = 4
"""How often a request to a bucket is made: what the service or the network is to blame for is tried again."""

CONNECT_SECONDS, SILENCE_SECONDS = 5.0, 10.0
"""How long an attempt waits for a connection, and for the next byte."""

RETRY_SECONDS = 45.0
"""How long Google's client tries again."""

_ONE_PUT = 5 * 2**20  # what is longer is sent in parts
_DIGEST = re.compile(r"[0-9a-f]{64}")
_WRITING = ".writing-"
_BUCKETS = {"s3": "s3", "gcs": "gs"}  # pyarrow's word for the filesystem, and that of its URIs

Filesystem = Any
"""One of pyarrow's."""


@dataclass(frozen=True)
class Artifacts:
    """A store of immutable bytes, found again by their SHA-256. Implements `records.BlobStore`.

    It holds nothing but its `location`, so it pickles to other processes and machines that see the
    same folder or URI. Use `Artifacts.open` for a location that has not been tested yet.
    """

    location: str

    @classmethod
    def open(cls, location: str) -> Artifacts:
        """The store at `location`, an absolute folder or a URI; makes the folder and tries to write in it.

        What the environment adds to a URI (region, endpoint) is in the store's location then. Raises StorageError
        where the location cannot be understood, made or written to.
        """
        bucket = _bucket(location)
        store = cls(bucket.uri if bucket else location)
        _try_out(*store._place, f"artifacts {places.shown(location)}", "FSU_ARTIFACTS")
        return store

    def put(self, data: bytes) -> Digest:
        """Write `data` once and return its SHA-256 in hex; what is there already is not written again.

        Raises StorageError where it cannot be written. Whatever ends the writing, the artifact is
        absent or whole afterwards, and nothing else is left behind.
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
        """The bytes of `digest`; raises StorageError where they are missing or are not what it says."""
        data: bytes = self._read(digest, _contents)
        if hashlib.sha256(data).hexdigest() != digest:
            raise StorageError(f"artifact {self.path(digest)} is damaged; put a good copy in its place")
        return data

    def has(self, digest: str) -> bool:
        """Whether `digest` is there; its bytes are not looked at."""
        return self._read(digest, _length) is not None

    def size(self, digest: str) -> int:
        """The length of `digest` in bytes; raises StorageError where it is missing."""
        length = self._read(digest, _length)
        if length is None:
            raise self._missing(digest)
        return int(length)

    def delete(self, digest: str) -> bool:
        """Take `digest` out of the store; whether it was there. Raises StorageError where it cannot be."""
        return self._delete(self._file(digest), f"artifact {self.path(digest)}")

    def digests(self) -> dict[str, tuple[int, datetime]]:
        """Every artifact in the store: its size in bytes and when it was written. Raises StorageError."""
        return {info.base_name: (info.size, info.mtime) for info in self._files()
                if _DIGEST.fullmatch(info.base_name) and info.path == self._file(info.base_name)}  # fmt: skip

    def unfinished(self, before: datetime) -> dict[str, int]:
        """What writers that were killed have left before a moment: names, and their bytes. Raises StorageError."""
        root = self._place[1]
        return {info.path.removeprefix(f"{root}/"): info.size for info in self._files()
                if info.base_name.startswith(_WRITING) and info.mtime < before}  # fmt: skip

    def discard(self, name: str) -> bool:
        """Delete one of `unfinished`; whether it was still there. Raises StorageError where it cannot be."""
        assert name.rpartition("/")[2].startswith(_WRITING), name
        return self._delete(f"{self._place[1]}/{name}", name)

    def path(self, digest: str) -> str:
        """Where `digest` lies, for people to read: a file's path, or `type://path` off this machine."""
        return _named(self._place[0], self._file(digest))

    @cached_property
    def _place(self) -> tuple[Filesystem, str]:
        return connect(self.location, allow_delayed_open=True)

    @cached_property
    def _in_parts(self) -> Filesystem:
        """A filesystem for what is not sent at once. One that opens objects late, where the beginning fails, leaves an
        empty object under the name."""
        return connect(self.location, allow_delayed_open=False)[0]

    def __reduce__(self) -> tuple[type[Artifacts], tuple[str]]:
        return (Artifacts, (self.location,))

    def _files(self) -> list[Any]:
        """Every file below the location. One listing of all: of a bucket, it is a request for 1,000 objects, where
        folder by folder would take 256, and Ray's checkpoints below it are about as many as the artifacts."""
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
    """Every file below `root`, none where it was never made. Raises StorageError about `what`."""
    try:
        found = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"{what} cannot be listed ({places.cause(error)}); check that place and try again"
        ) from error
    return [info for info in found if info.is_file]


def deleted(filesystem: Filesystem, delete: Callable[[str], None], path: str, name: str) -> bool:
    """`delete(path)`, for good; whether it was still there. Raises StorageError about `name`."""
    try:
        delete(path)
        _settle(filesystem, path.rpartition("/")[0])
    except FileNotFoundError:
        return False
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"{name} cannot be deleted ({places.cause(error)}); check that place and try again"
        ) from error
    return True


def locate(location: str) -> tuple[Filesystem | None, str]:
    """Where Ray is to keep checkpoints: the pair of a filesystem (None: that of this machine) and a path on it.

    `location` is an absolute folder or a URI; it is tried out as that of artifacts is. Raises StorageError.
    """
    filesystem, path = connect(location, allow_delayed_open=True, check_directory_existence_before_creation=True)
    _try_out(filesystem, path, f"checkpoints {places.shown(location)}", "FSU_RUNS")
    return (None if filesystem.type_name == "local" else filesystem), path


def _bucket(location: str) -> places.Bucket | None:
    """The bucket that `location` names, if it does, with its region."""
    bucket = places.read(location)
    if bucket is None or bucket.kind != "s3" or bucket.region:
        return bucket
    if bucket.endpoint:
        return replace(bucket, region="us-east-1")  # what servers other than Amazon's go by
    try:
        return replace(bucket, region=fs.resolve_s3_region(bucket.path.partition("/")[0]))
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"the region of {places.shown(location)} cannot be found ({places.cause(error)}); "
            "check the bucket's name, or set AWS_REGION"
        ) from error


def connect(location: str, **options: bool) -> tuple[Filesystem, str]:
    """The pair of a filesystem and a path on it; `options` are for S3 alone."""
    bucket = _bucket(location)
    try:
        if bucket is None:
            return fs.FileSystem.from_uri(location)  # type: ignore[no-any-return]
        if bucket.kind == "s3":
            return fs.S3FileSystem(
                region=bucket.region,
                endpoint_override=bucket.endpoint,
                scheme=bucket.scheme,
                connect_timeout=CONNECT_SECONDS,
                request_timeout=SILENCE_SECONDS,
                retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
                tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE"),
                **options,
            ), bucket.path
        return fs.GcsFileSystem(
            anonymous=bucket.anonymous,
            endpoint_override=bucket.endpoint,
            scheme=bucket.scheme,
            retry_time_limit=timedelta(seconds=RETRY_SECONDS),
        ), bucket.path
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StorageError(
            f"location {places.shown(location)} is not understood ({places.cause(error)}); "
            "give an absolute folder or a URI such as file:///data/artifacts or s3://BUCKET/PREFIX"
        ) from error


def _try_out(filesystem: Filesystem, root: str, what: str, setting: str) -> None:
    """Make the folder `root` if it is one, and write in it."""
    try:
        if _is_bucket(filesystem):
            _send(filesystem, f"{root}/.writable", b"")  # kept: a request less than to delete it again
            return
        filesystem.create_dir(root, recursive=True)
        _write(filesystem, f"{root}/{_temporary()}", b"", keep_as=None)
    except (OSError, pa.ArrowException) as error:
        first = "check the bucket, the credentials and the endpoint, or " if _is_bucket(filesystem) else ""
        raise StorageError(
            f"{what} cannot be written to ({places.cause(error)}); {first}set {setting} to a writable folder or URI"
        ) from error


def _write(filesystem: Filesystem, temporary: str, data: bytes, keep_as: str | None) -> None:
    """Write `data` to `temporary` and move it to `keep_as`; whatever happens, `temporary` is gone then."""
    try:
        with filesystem.open_output_stream(temporary) as stream:
            stream.write(data)
        if keep_as is not None:
            _settle(filesystem, temporary)
            filesystem.move(temporary, keep_as)
            _settle(filesystem, keep_as.rpartition("/")[0])
            return
        filesystem.delete_file(temporary)
    except BaseException:
        with contextlib.suppress(OSError, pa.ArrowException):
            filesystem.delete_file(temporary)
        raise


def _send(filesystem: Filesystem, target: str, data: bytes) -> None:
    """Send `data` to the object `target`.

    In a thread of its own, where no interrupt comes between: a stream that is closed early, or forgotten, makes an
    object of what it has got until then.
    """

    def send() -> None:
        stream = filesystem.open_output_stream(target)
        stream.write(data)
        stream.close()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(send).result()


def _settle(filesystem: Filesystem, path: str) -> None:
    """Wait until a local file or folder is on the disk: the ledger's rows that name it are, too."""
    if filesystem.type_name == "local":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _temporary() -> str:
    """A file name that no other process, thread or machine will think of."""
    return f"{_WRITING}{uuid.uuid4().hex}"


def _is_bucket(filesystem: Filesystem) -> bool:
    """Whether there are no folders and no renaming, and an object is there once it has been sent to its end."""
    return filesystem.type_name in _BUCKETS


def _named(filesystem: Filesystem, path: str) -> str:
    kind = filesystem.type_name
    return path if kind == "local" else f"{_BUCKETS.get(kind, kind)}://{path}"


def _length(filesystem: Filesystem, file: str) -> int | None:
    """The bytes of a file, None where there is none."""
    if filesystem.type_name != "s3":  # on Google's, opening it would begin to read it
        info = filesystem.get_file_info(file)
        return int(info.size) if info.is_file else None
    try:
        with filesystem.open_input_file(file) as stream:  # one request, where the above looks for a folder too
            return int(stream.size())
    except FileNotFoundError:
        return None


def _contents(filesystem: Filesystem, file: str) -> bytes:
    with filesystem.open_input_file(file) as stream:
        return bytes(stream.read())
