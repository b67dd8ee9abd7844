"""One request on a real Ray of two CPUs: same result as in this process, and again after a worker was killed."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fsu_ray.cluster import workers
from fsu_ray.errors import StorageError
from fsu_ray.method.context import save_samples
from fsu_ray.method.datasets import draw
from fsu_ray.method.unlearn import unlearn
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.work import Asked, WorkOrder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of its own with two CPUs."""
    workers.connect(2)
    yield
    workers.disconnect()


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts.open(str(tmp_path / "artifacts"))


def make_order(trained: Any, artifacts: Artifacts, recipe: Recipe, steps: int) -> WorkOrder:
    """A request to erase class 8, with one for class 3 along, whose inversion takes `steps`."""
    weights = artifacts.put(trained.weights)
    samples = artifacts.put(save_samples(trained.train.pixels[draw(trained.train, [8], 8, 0)]))
    recipe = recipe.model_copy(update={"invert": recipe.invert.model_copy(update={"steps": steps})})
    behaviour = Behaviour(name="eight", kind="class", targets=(8,))
    three = Behaviour(name="three", kind="class", targets=(3,))
    along = artifacts.put(save_samples(trained.train.pixels[draw(trained.train, [3], 8, 0)]))
    also = (Asked("r-2", three, along),)
    return WorkOrder("r-1", trained.spec, weights, weights, behaviour, samples, recipe, also=also)


@pytest.mark.ray
def test_a_killed_worker_ends_with_the_weights_of_an_undisturbed_run(
    cluster: None, trained: Any, artifacts: Artifacts, quick: Recipe, tmp_path: Path
) -> None:
    """SIGKILL in the inversion, behind a checkpoint: Ray restarts the worker, which goes on from there. All of
    the CPUs are used, progress arrives in this process, and the digests are those of a run without Ray."""
    order = make_order(trained, artifacts, quick, 120)
    heard: list[tuple[str, int, dict[str, float]]] = []
    killed: list[int] = []

    def tell(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        heard.append((stage, done, figures))
        if stage == "invert" and done >= 40 and not killed:
            killed.append(done)
            subprocess.run(["pkill", f"-{signal.SIGKILL.value}", "-f", "ray::RayTrainWorker"], check=True)

    outcome = workers.execute(order, artifacts, (None, str(tmp_path / "runs")), "r-1", 20, tell)
    plain = unlearn(order, artifacts, torch.device("cpu"))
    assert killed
    assert [s for s, _, _ in heard].count("start") == 2
    assert {f["threads"] for s, _, f in heard if s == "start"} == {2}
    assert {"invert", "synthesize", "filter", "relearn", "evaluate"} <= {s for s, _, _ in heard}
    again = [i for i, h in enumerate(heard) if h[0] == "start"][1]
    first_after = next(d for s, d, _ in heard[again:] if s == "invert")
    assert first_after > 20  # it did not begin again
    assert (outcome.weights, outcome.mask, outcome.dataset) == (plain.weights, plain.mask, plain.dataset)
    assert outcome.also == plain.also
    assert [part.request for part in outcome.also] == ["r-2"]


@pytest.mark.ray
def test_an_error_of_ours_comes_back_as_it_was(
    cluster: None, trained: Any, artifacts: Artifacts, quick: Recipe, tmp_path: Path
) -> None:
    """A missing artifact is reported as such, at once, instead of being tried again."""
    order = make_order(trained, artifacts, quick, 10)
    Path(artifacts.path(order.samples)).unlink()
    with pytest.raises(StorageError, match="is missing"):
        workers.execute(order, artifacts, (None, str(tmp_path / "runs")), "r-2", 20, lambda *_: None)


def test_a_gpu_is_used_where_the_cluster_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU and two CPUs a worker; without one all CPUs of the largest living node."""
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert workers.resources() == (True, {"GPU": 1, "CPU": 2})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 6.0}},
        {"Alive": False, "Resources": {"CPU": 99.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert workers.resources() == (False, {"CPU": 6})
