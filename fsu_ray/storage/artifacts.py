"""Content-addressed bytes on any filesystem of pyarrow: a folder, or a URI.

An artifact's name is the SHA-256 of its bytes, its place `<first two digits>/<digest>`. It is written
under another name and moved, so under its own name there is either nothing or the whole of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import pyarrow as pa
from pyarrow import fs

from fsu_ray.errors import StorageError

_DIGEST = re.compile(r"[0-9a-f]{64}")


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

        Raises StorageError where the location cannot be understood, made or written to.
        """
        store = cls(location)
        filesystem, root = store._place
        try:
            filesystem.create_dir(root, recursive=True)
            store._write(f"{root}/{_temporary()}", b"", keep_as=None)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"artifacts {location!r} cannot be written to ({_cause(error)}); "
                "set FSU_ARTIFACTS to a writable folder or URI"
            ) from error
        return store

    def put(self, data: bytes) -> str:
        """Write `data` once and return its SHA-256 in hex; what is there already is not written again.

        Raises StorageError where it cannot be written. Whatever ends the writing, the artifact is
        absent or whole afterwards, and nothing else is left behind.
        """
        digest = hashlib.sha256(data).hexdigest()
        filesystem, _ = self._place
        target = self._file(digest)
        folder = target.rpartition("/")[0]
        try:
            info = filesystem.get_file_info(target)
            if info.is_file and info.size == len(data):
                return digest
            filesystem.create_dir(folder, recursive=True)
            self._write(f"{folder}/{_temporary()}", data, keep_as=target)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"artifact {digest[:12]} cannot be written to {self.location} ({_cause(error)}); "
                "make room there or set FSU_ARTIFACTS to another place"
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
        return bool(self._read(digest, lambda filesystem, file: filesystem.get_file_info(file).is_file))

    def size(self, digest: str) -> int:
        """The length of `digest` in bytes; raises StorageError where it is missing."""
        info = self._read(digest, lambda filesystem, file: filesystem.get_file_info(file))
        if not info.is_file:
            raise self._missing(digest)
        return int(info.size)

    def delete(self, digest: str) -> bool:
        """Take `digest` out of the store; whether it was there. Raises StorageError where it cannot be."""
        filesystem, _ = self._place
        file = self._file(digest)
        try:
            if not filesystem.get_file_info(file).is_file:
                return False
            filesystem.delete_file(file)
            self._settle(file.rpartition("/")[0])
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"artifact {self.path(digest)} cannot be deleted ({_cause(error)}); check that place and try again"
            ) from error
        return True

    def digests(self) -> dict[str, tuple[int, datetime]]:
        """Every artifact in the store: its size in bytes and when it was written. Raises StorageError."""
        filesystem, root = self._place
        try:
            found = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"artifacts {self.location} cannot be listed ({_cause(error)}); check that place and try again"
            ) from error
        return {info.base_name: (info.size, info.mtime) for info in found
                if info.is_file and _DIGEST.fullmatch(info.base_name)}  # fmt: skip

    def path(self, digest: str) -> str:
        """Where `digest` lies, for people to read: a file's path, or `type://path` off this machine."""
        filesystem, _ = self._place
        file = self._file(digest)
        return file if filesystem.type_name == "local" else f"{filesystem.type_name}://{file}"

    @cached_property
    def _place(self) -> tuple[Any, str]:
        try:
            filesystem, root = fs.FileSystem.from_uri(self.location)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"artifacts location {self.location!r} is not understood ({_cause(error)}); "
                "give an absolute folder or a URI such as file:///data/artifacts"
            ) from error
        return filesystem, root

    def __reduce__(self) -> tuple[type[Artifacts], tuple[str]]:
        return (Artifacts, (self.location,))

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
                f"artifact {self.path(digest)} cannot be read ({_cause(error)}); check that place and try again"
            ) from error

    def _missing(self, digest: str) -> StorageError:
        return StorageError(f"artifact {self.path(digest)} is missing; check FSU_ARTIFACTS or put a copy there")

    def _write(self, temporary: str, data: bytes, keep_as: str | None) -> None:
        """Write `data` to `temporary` and move it to `keep_as`; whatever happens, `temporary` is gone then."""
        filesystem, _ = self._place
        try:
            with filesystem.open_output_stream(temporary) as stream:
                stream.write(data)
            if keep_as is not None:
                self._settle(temporary)
                filesystem.move(temporary, keep_as)
                self._settle(keep_as.rpartition("/")[0])
                return
            filesystem.delete_file(temporary)
        except BaseException:
            with contextlib.suppress(OSError, pa.ArrowException):
                filesystem.delete_file(temporary)
            raise

    def _settle(self, path: str) -> None:
        """Wait until a local file or folder is on the disk: the ledger's rows that name it are, too."""
        if self._place[0].type_name == "local":
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _temporary() -> str:
    """A file name that no other process, thread or machine will think of."""
    return f".writing-{uuid.uuid4().hex}"


def _contents(filesystem: Any, file: str) -> bytes:
    with filesystem.open_input_file(file) as stream:
        return bytes(stream.read())


def _cause(error: Exception) -> str:
    """What went wrong, in the system's words and on one line."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else str(error).splitlines()[0]
