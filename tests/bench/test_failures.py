"""Parts of the fault injection: the progress actor that kills a worker, finding processes by a mark, the checks."""

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
from fsu_ray.cluster import progress
from fsu_ray.method.unlearn import unlearn
from fsu_ray.recipes import Recipe
from fsu_ray.work import BlobStore, Outcome, WorkOrder
from tests.bench.crashes import RECIPE, Subject, open_app
from tests.bench.failures import Bench, killer
from tests.bench.local_head import marked


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process for the killer."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={"MARK": f"v{os.getpid()}"})
    yield process
    process.kill()
    process.wait()


def test_a_worker_is_killed_in_the_stage_that_is_named_and_once(victim: subprocess.Popen[bytes]) -> None:
    """The kill comes at the first report of the stage, before the worker gets an answer; the driver gets a report."""
    actor = killer("filter", 0.0)()
    for word in (("start", 1, 1, {"pid": float(victim.pid)}), ("invert", 10, 60, {}), ("synthesize", 1, 10, {})):
        assert actor.tell(word) is False
    assert victim.poll() is None
    actor.tell(("filter", 0, 1, {}))
    assert victim.wait(10) == -9
    actor.tell(("filter", 0, 1, {}))  # the next worker comes through it
    assert [word[0] for word in actor.hear(False)] == ["start", "invert", "synthesize", "killed", "filter", "filter"]


def test_killers_are_independent(victim: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A killer that replaces another one acts on its own stage only."""
    monkeypatch.setattr(progress, "ProgressActor", killer("invert", 60.0))
    actor = killer("filter", 0.0)()
    for word in (("start", 1, 1, {"pid": float(victim.pid)}), ("invert", 10, 60, {}), ("filter", 0, 1, {})):
        actor.tell(word)
    assert victim.wait(10) == -9


def test_a_stage_that_has_ended_is_missed(victim: subprocess.Popen[bytes]) -> None:
    """No worker is killed in another stage than the named one."""
    actor = killer("filter", 0.2)()
    actor.tell(("start", 1, 1, {"pid": float(victim.pid)}))
    actor.tell(("filter", 0, 1, {}))
    actor.tell(("relearn", 1, 5, {}))
    time.sleep(0.6)
    assert victim.poll() is None
    assert [word[0] for word in actor.hear(False)] == ["start", "filter", "relearn", "missed"]


def test_processes_are_found_by_their_mark(victim: subprocess.Popen[bytes]) -> None:
    """The whole of NAME=VALUE must match, in the environment that a process was started with."""
    assert marked(f"MARK=v{os.getpid()}") == [victim.pid]
    assert marked(f"MARK=v{os.getpid()}0") == []


@pytest.mark.slow
def test_every_fault_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A good run has none; other weights and a missing artifact are faults."""
    app = open_app(None, tmp_path)
    bench = Bench(tmp_path, None, app, Subject.train(app, 0), "test")

    def execute(order: WorkOrder, store: BlobStore, name: str, stop: object) -> Outcome:
        return unlearn(order, store, torch.device("cpu"))

    def run(seed: int) -> str:
        quick = {"invert": {"steps": 10, "batch": 20, "width": 2}, "relearn": {"epochs": 1, "seed": seed}}
        recipe = Recipe.model_validate(RECIPE | quick)
        request = app.ledger.requests.get(bench.subject.submit(app, f"m{seed}", recipe))
        claimed = app.ledger.requests.claim("w", 60.0, request.model)
        assert claimed is not None
        pipeline.run_request(app.ledger, app.artifacts, execute, claimed)
        return request.id

    first = run(0)
    bench.note("whole", first)
    assert bench.faults == []
    line = capsys.readouterr().out
    assert line.startswith("whole: not resumed; ")
    assert "succeeded, attempt 1, failures 0, 2 versions, 1 erasure, the same weights, audit verifies" in line
    bench.note("other", run(1))
    assert "OTHER weights" in capsys.readouterr().out
    (fault,) = bench.faults
    assert fault.endswith("other weights than undisturbed")
    Path(app.artifacts.path(app.ledger.models.versions("m0")[-1].weights)).unlink()
    bench.note("gone", first)
    assert "dangling" in capsys.readouterr().out
