"""What Ray has kept of runs and searches below `FSU_RUNS`: it is found by name, and deleted by folder.

A run of a request lies in `<request>-<mark of its order>` (`pipeline.run_name`), a search in `search-<mark>`
(`search.search_name`). One that ended early holds a generator in the making. What else lies there is nobody's here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from fsu_ray.storage import places
from fsu_ray.storage.artifacts import Filesystem, connect, deleted, listed

_RUN = re.compile(r"(r-[0-9a-f]+)-[0-9a-f]{8}")
_SEARCH = re.compile(r"search-[0-9a-f]{16}")


@dataclass(frozen=True)
class RunFolder:
    """A folder of Ray's: its bytes, when it was last written to, and the request whose run it is (None: a search)."""

    size: int
    at: datetime
    request: str | None


@dataclass(frozen=True)
class Checkpoints:
    """The folders of runs and searches below `location`, an absolute folder or a URI."""

    location: str

    def folders(self) -> dict[str, RunFolder]:
        """All of them, by name. Raises StorageError where the place cannot be read."""
        filesystem, root = self._place
        folders: dict[str, RunFolder] = {}
        for info in listed(filesystem, root, f"checkpoints {places.shown(self.location)}"):
            name = info.path.removeprefix(f"{root}/").partition("/")[0]
            run = _RUN.fullmatch(name)
            if run or _SEARCH.fullmatch(name):
                before = folders.get(name, RunFolder(0, info.mtime, run and run[1]))
                folders[name] = RunFolder(before.size + info.size, max(before.at, info.mtime), before.request)
        return folders

    def delete(self, name: str) -> bool:
        """Delete one of `folders`; whether it was still there. Raises StorageError where it cannot be."""
        assert _RUN.fullmatch(name) or _SEARCH.fullmatch(name), name
        filesystem, root = self._place
        return deleted(filesystem, filesystem.delete_dir, f"{root}/{name}", name)

    @cached_property
    def _place(self) -> tuple[Filesystem, str]:
        filesystem, root = connect(self.location)
        return filesystem, root.rstrip("/")
