"""The experiment's own parts: the line that kills a worker in a stage, processes by their mark, what is found amiss."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fsu_ray import pipeline
from fsu_ray.cluster import line as line_of_workers
from fsu_ray.experiments.crashes import RECIPE, Subject, open_app
from fsu_ray.experiments.failures import Bench, killer
from fsu_ray.experiments.heads import marked
from fsu_ray.method.unlearn import unlearn
from fsu_ray.recipes import Recipe
from fsu_ray.work import BlobStore, Outcome, WorkOrder


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is to be killed."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={"MARK": f"v{os.getpid()}"})
    yield process
    process.kill()
    process.wait()


def test_a_worker_is_killed_in_the_stage_that_is_named_and_once(victim: subprocess.Popen[bytes]) -> None:
    """At the first word of the stage, before the worker hears an answer; the driver hears of it."""
    line = killer("filter", 0.0)()
    for word in (("start", 1, 1, {"pid": victim.pid}), ("invert", 10, 60, {}), ("synthesize", 1, 10, {})):
        assert line.tell(word) is False
    assert victim.poll() is None
    line.tell(("filter", 0, 1, {}))
    assert victim.wait(10) == -9
    line.tell(("filter", 0, 1, {}))  # the next worker comes through it
    assert [word[0] for word in line.hear(False)] == ["start", "invert", "synthesize", "killed", "filter", "filter"]


def test_a_killer_that_comes_after_another_is_its_own(
    victim: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take turns in the place of the line; what the one before was told to do is over."""
    monkeypatch.setattr(line_of_workers, "Line", killer("invert", 60.0))
    line = killer("filter", 0.0)()
    for word in (("start", 1, 1, {"pid": victim.pid}), ("invert", 10, 60, {}), ("filter", 0, 1, {})):
        line.tell(word)
    assert victim.wait(10) == -9


def test_a_stage_that_was_over_is_missed(victim: subprocess.Popen[bytes]) -> None:
    """Nobody is killed in another stage than the one that is named."""
    line = killer("filter", 0.2)()
    line.tell(("start", 1, 1, {"pid": victim.pid}))
    line.tell(("filter", 0, 1, {}))
    line.tell(("relearn", 1, 5, {}))
    time.sleep(0.6)
    assert victim.poll() is None
    assert [word[0] for word in line.hear(False)] == ["start", "filter", "relearn", "missed"]


def test_processes_are_found_by_their_mark(victim: subprocess.Popen[bytes]) -> None:
    """By all of NAME=VALUE, in the environment that they began with."""
    assert marked(f"MARK=v{os.getpid()}") == [victim.pid]
    assert marked(f"MARK=v{os.getpid()}0") == []


@pytest.mark.slow
def test_what_is_amiss_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A request that ended well, one whose weights are others, one that did not end, and an artifact that is gone."""
    app = open_app(None, tmp_path)
    bench = Bench(tmp_path, None, app, Subject.train(app, 0), "test")

    def execute(order: WorkOrder, store: BlobStore, name: str, stop: object) -> Outcome:
        return unlearn(order, store, torch.device("cpu"))

    def run(seed: int) -> str:
        quick = {"invert": {"steps": 10, "batch": 20, "width": 2}, "relearn": {"epochs": 1, "seed": seed}}
        recipe = Recipe.model_validate(RECIPE | quick)
        request = app.ledger.requests.get(bench.subject.ask(app, f"m{seed}", recipe))
        claimed = app.ledger.requests.claim("w", 60.0, request.model)
        assert claimed is not None
        pipeline.run_request(app.ledger, app.artifacts, execute, claimed)
        return request.id

    first = run(0)
    bench.note("whole", first)
    assert bench.wrong == []
    line = capsys.readouterr().out
    assert line.startswith("whole: not resumed; ")
    assert "succeeded, attempt 1, failures 0, 2 versions, 1 erasure, the same weights, audit verifies" in line
    bench.note("other", run(1))
    assert "OTHER weights" in capsys.readouterr().out
    (wrong,) = bench.wrong
    assert wrong.endswith("other weights than undisturbed")
    Path(app.artifacts.path(app.ledger.models.versions("m0")[-1].weights)).unlink()
    bench.note("gone", first)
    assert "dangling" in capsys.readouterr().out
