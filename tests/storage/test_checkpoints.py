"""What Ray has kept of runs and searches, on a disk and in a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fsu_ray.errors import StorageError
from fsu_ray.storage.artifacts import locate
from fsu_ray.storage.checkpoints import Checkpoints

RUN, SEARCH = "r-1a217a57286c723234d-401a7e3d", "search-0123456789abcdef"


@pytest.fixture(params=["disk", "bucket"])
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where runs lie that have not begun."""
    if request.param == "disk":
        return str(tmp_path / "runs")
    bucket: Any = request.getfixturevalue("s3_bucket")
    return str(bucket.uri("store/runs"))


def test_a_folder_is_found_with_all_below_it_and_goes_as_a_whole(runs: str, tmp_path: Path) -> None:
    """By its name alone: whatever else lies there is left out, and left."""
    checkpoints = Checkpoints(runs)
    assert checkpoints.folders() == {}, "nothing was ever written"
    filesystem, root = locate(runs)
    for name in (RUN, SEARCH, "search-mine", "r-1a2", f"{RUN}-more"):
        for file in (f"{name}/checkpoint_1/state.pt", f"{name}/snapshot.json"):
            path = f"{root}/{file}"
            if filesystem is None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_bytes(b"123")
            else:
                with filesystem.open_output_stream(path) as stream:
                    stream.write(b"123")
    folders = checkpoints.folders()
    assert {name: (kept.size, kept.request) for name, kept in folders.items()} == {
        RUN: (6, "r-1a217a57286c723234d"),
        SEARCH: (6, None),
    }
    assert all(kept.at.tzinfo for kept in folders.values())
    checkpoints.delete(RUN)
    checkpoints.delete(RUN)
    assert set(checkpoints.folders()) == {SEARCH}
    with pytest.raises(AssertionError):
        checkpoints.delete("search-mine")


def test_a_place_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """One line, with what to look at."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="FSU_RUNS"):
        Checkpoints(str(tmp_path / "file")).folders()
