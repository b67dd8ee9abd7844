"""The folders of runs and searches that Ray keeps below `FSU_RUNS`: listing and deleting them.

The run of a request has the folder `<request>-<digest of its order>` (`pipeline.run_name`), a search has
`search-<digest>` (`search.search_name`). The folder of a run that ended early holds a half-trained generator. Folders
with other names are ignored.
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
    """A folder of Ray: its size in bytes, when it was last written to, and its run's request (None: a search)."""

    size: int
    at: datetime
    request: str | None


@dataclass(frozen=True)
class Checkpoints:
    """The folders of runs and searches below `location`, an absolute folder or a URI."""

    location: str

    def folders(self) -> dict[str, RunFolder]:
        """All folders of runs and searches, by name. Raises StorageError where `location` cannot be read."""
        filesystem, root = self._place
        folders: dict[str, RunFolder] = {}
        for info in listed(filesystem, root, f"checkpoints {places.shown(self.location)}"):
            name = info.path.removeprefix(f"{root}/").partition("/")[0]
            run = _RUN.fullmatch(name)
            if run or _SEARCH.fullmatch(name):
                folder = folders.get(name, RunFolder(0, info.mtime, run and run[1]))
                folders[name] = RunFolder(folder.size + info.size, max(folder.at, info.mtime), folder.request)
        return folders

    def delete(self, name: str) -> bool:
        """Delete a folder of `folders`; whether it still existed. Raises StorageError where it cannot be deleted."""
        assert _RUN.fullmatch(name) or _SEARCH.fullmatch(name), name
        filesystem, root = self._place
        return deleted(filesystem, filesystem.delete_dir, f"{root}/{name}", name)

    @cached_property
    def _place(self) -> tuple[Filesystem, str]:
        filesystem, root = connect(self.location)
        return filesystem, root.rstrip("/")
