"""What Ray has kept of runs and searches below `FSU_RUNS`: it is found by name, and deleted by folder.

A run of a request lies in `<request>-<mark of its order>` (`pipeline.run_name`), a search in `search-<mark>`
(`search.search_name`). One that ended early holds a generator in the making. What else lies there is nobody's here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

import pyarrow as pa
from pyarrow import fs

from fsu_ray.errors import StorageError
from fsu_ray.storage import places
from fsu_ray.storage.artifacts import Filesystem, connect

_RUN = re.compile(r"(r-[0-9a-f]+)-[0-9a-f]{8}")
_SEARCH = re.compile(r"search-[0-9a-f]{16}")


@dataclass(frozen=True)
class Kept:
    """A folder of Ray's: its bytes, when it was last written to, and the request whose run it is (None: a search)."""

    size: int
    at: datetime
    request: str | None


@dataclass(frozen=True)
class Checkpoints:
    """The folders of runs and searches below `location`, an absolute folder or a URI."""

    location: str

    def folders(self) -> dict[str, Kept]:
        """All of them, by name. Raises StorageError where the place cannot be read."""
        filesystem, root = self._place
        try:
            found = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        except (OSError, pa.ArrowException) as error:
            raise self._error("listed", error) from error
        folders: dict[str, Kept] = {}
        for info in found:
            name = info.path.removeprefix(f"{root.rstrip('/')}/").partition("/")[0]
            run = _RUN.fullmatch(name)
            if not info.is_file or not (run or _SEARCH.fullmatch(name)):
                continue
            before = folders.get(name, Kept(0, info.mtime, run and run[1]))
            folders[name] = Kept(before.size + info.size, max(before.at, info.mtime), before.request)
        return folders

    def delete(self, name: str) -> None:
        """Delete one of `folders`, if it is still there. Raises StorageError where it cannot be."""
        assert _RUN.fullmatch(name) or _SEARCH.fullmatch(name), name
        filesystem, root = self._place
        try:
            filesystem.delete_dir(f"{root.rstrip('/')}/{name}")
        except FileNotFoundError:
            return
        except (OSError, pa.ArrowException) as error:
            raise self._error("cleared", error) from error

    @cached_property
    def _place(self) -> tuple[Filesystem, str]:
        return connect(self.location)

    def _error(self, what: str, error: Exception) -> StorageError:
        return StorageError(
            f"checkpoints {places.shown(self.location)} cannot be {what} ({places.cause(error)}); check FSU_RUNS"
        )
