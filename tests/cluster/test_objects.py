"""A work order on a real Ray with artifacts and checkpoints in a bucket: a worker is killed, another goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fsu_ray.cluster import workers
from fsu_ray.method.datasets import draw
from fsu_ray.method.inputs import save_samples
from fsu_ray.method.unlearn import unlearn
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour
from fsu_ray.storage.artifacts import Artifacts, locate
from fsu_ray.work import ErasureTarget, WorkOrder


@pytest.fixture
def cluster(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray of its own with two CPUs, with the credentials of this process and as many threads as CPUs."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # what a test process among others has
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # digests depend on it
    workers.connect(2)
    yield
    workers.disconnect()
    torch.set_num_threads(before)


def workers_of_this_process() -> list[int]:
    """The processes of Ray's train workers below this one."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:  # it has ended
            continue

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    return [pid for pid, name in names.items() if name.startswith("ray::RayTrainWorker") and ours(pid)]


@pytest.mark.ray
def test_a_worker_killed_in_the_inversion_goes_on_from_a_checkpoint_in_the_bucket(
    cluster: None, trained: Any, s3_bucket: Any, quick: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing lies on this machine, the digests are those of a run without Ray, and what Ray keeps is no artifact."""
    monkeypatch.chdir(tmp_path)
    artifacts = Artifacts.open(s3_bucket.uri())
    runs = locate(s3_bucket.uri("store/runs"))
    recipe = quick.model_copy(update={"invert": quick.invert.model_copy(update={"steps": 120})})
    eight = Behaviour(name="eight", kind="class", targets=(8,))
    samples = artifacts.put(save_samples(trained.train.pixels[draw(trained.train, [8], 8, 0)]))
    weights = artifacts.put(trained.weights)
    order = WorkOrder(trained.spec, weights, weights, (ErasureTarget("r-1", eight, samples),), recipe)
    heard: list[tuple[str, int]] = []
    threads: set[float] = set()
    killed: list[int] = []

    def on_progress(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        heard.append((stage, done))
        threads.update({metrics["threads"]} if stage == "start" else ())
        if stage == "invert" and done >= 40 and not killed:
            killed.extend(workers_of_this_process())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    outcome = workers.execute(order, artifacts, runs, "r-1", 20, on_progress)

    assert killed
    assert threads == {2}, "one worker has all CPUs"
    assert {"invert", "synthesize", "filter", "relearn", "evaluate"} <= {stage for stage, _ in heard}
    starts = [number for number, (stage, _) in enumerate(heard) if stage == "start"]
    assert len(starts) == 2
    assert next(done for stage, done in heard[starts[1] :] if stage == "invert") > 20, "it did not begin again"
    plain = unlearn(order, artifacts, torch.device("cpu"))
    assert (outcome.weights, outcome.targets, outcome.dataset) == (plain.weights, plain.targets, plain.dataset)
    assert any(name.startswith("r-1/checkpoint_") for name in s3_bucket.names("store/runs"))
    assert list(tmp_path.iterdir()) == []
    assert {order.root_weights, samples, outcome.weights, outcome.dataset} <= artifacts.digests().keys()
    assert len(artifacts.digests()) == sum(not name.startswith("runs/") for name in s3_bucket.names())
