"""The checkpoint folders of runs and searches, on a disk and in a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fsu_ray.errors import StorageError
from fsu_ray.pipeline import run_name
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Digest, ModelSpec
from fsu_ray.search import SearchOptions, search_name
from fsu_ray.search_space import SPACE
from fsu_ray.storage.artifacts import locate
from fsu_ray.storage.checkpoints import Checkpoints
from fsu_ray.storage.rows import new_id
from fsu_ray.work import ErasureTarget, WorkOrder

RUN, SEARCH = "r-1a217a57286c723234d-401a7e3d", "search-0123456789abcdef"


@pytest.fixture(params=["disk", "bucket"])
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty location for runs."""
    if request.param == "disk":
        return str(tmp_path / "runs")
    bucket: Any = request.getfixturevalue("s3_bucket")
    return str(bucket.uri("store/runs"))


def test_a_folder_is_listed_and_deleted_with_everything_below_it(runs: str, tmp_path: Path) -> None:
    """By its name; other folders are neither listed nor deleted."""
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
    assert checkpoints.delete(RUN)
    if filesystem is None:
        assert not checkpoints.delete(RUN), "a bucket does not say"
    assert set(checkpoints.folders()) == {SEARCH}
    with pytest.raises(AssertionError):
        checkpoints.delete("search-mine")


def test_the_names_of_runs_and_searches_are_those_that_are_looked_for(tmp_path: Path) -> None:
    """The modules that name them do not import this one."""
    eight = Behaviour(name="eight", kind="class", targets=(8,))
    spec = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10, mean=(0.1,), std=(0.3,))
    targets = (ErasureTarget(new_id("r"), eight, Digest("0" * 64)),)
    order = WorkOrder(spec, Digest("0" * 64), Digest("0" * 64), targets, Recipe())
    names = {run_name(order): targets[0].request, search_name(order, SearchOptions(SPACE["class"], 2, False, 0)): None}
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").write_bytes(b"1")
    assert {name: kept.request for name, kept in Checkpoints(str(tmp_path)).folders().items()} == names


def test_a_place_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """On one line, with what to check."""
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageError, match=r"checkpoints .*/file. cannot be listed \(.*\); check that place and try again"
    ):
        Checkpoints(str(tmp_path / "file")).folders()
