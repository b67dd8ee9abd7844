"""One request on a real Ray of two CPUs: same result as in this process, and again after a worker was killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fsu_ray.cluster import internals, workers
from fsu_ray.errors import ClusterUnavailable, Stopped, StorageError, UserError
from fsu_ray.method.datasets import draw
from fsu_ray.method.fit import predict
from fsu_ray.method.inputs import save_samples
from fsu_ray.method.unlearn import unlearn
from fsu_ray.models.classifier import Classifier
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour
from fsu_ray.search_space import apply
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.work import ErasureTarget, GeneratorCandidates, GeneratorRef, WorkOrder
from tests.bench.local_head import free_port


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
    targets = (ErasureTarget("r-1", behaviour, samples), ErasureTarget("r-2", three, along))
    return WorkOrder(trained.spec, weights, weights, targets, recipe)


def runs_of(folder: Path) -> tuple[None, str]:
    """Where the checkpoints of a test lie."""
    return None, str(folder / "runs")


class Killer:
    """A `tell` that kills the last worker of the group (SIGKILL) once each stage in `at` has come so far; keeps what it
    hears."""

    def __init__(self, at: dict[str, int]) -> None:
        self.at, self.killed = at, list[str]()
        self.heard: list[tuple[str, int, dict[str, float]]] = []
        self._process = self.niceness = 0

    def __call__(self, stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        self.heard.append((stage, done, metrics))
        if stage == "start":
            self._process = int(metrics["pid"])
            self.niceness = os.getpriority(os.PRIO_PROCESS, self._process)
        if stage in self.at and done >= self.at[stage] and stage not in self.killed:
            self.killed.append(stage)
            os.kill(self._process, signal.SIGKILL)


def accuracy_of(trained: Any, weights: bytes) -> float:
    """Of the classes that `make_order` leaves, on the test split."""
    logits = predict(Classifier.from_bytes(trained.spec, weights), trained.test.pixels)
    kept = ~torch.isin(trained.test.labels, torch.tensor([3, 8]))
    return float((logits.argmax(1) == trained.test.labels)[kept].float().mean())


@pytest.mark.ray
def test_two_workers_come_to_what_one_does_whoever_is_killed(
    cluster: None, trained: Any, artifacts: Artifacts, quick: Recipe, tmp_path: Path
) -> None:
    """Two workers share a run; either is killed in the inversion, in the synthesis and in the relearning, and the run
    ends with the digests of one that nobody disturbed. On one and the same D', two workers' relearning is as
    accurate as one's."""
    long_enough = {
        "synthesize.per_class": 800,
        "relearn.epochs": 3,
        "relearn.batch": 256,
    }  # to be killed in each stage
    order = make_order(trained, artifacts, apply(quick, long_enough), 60)
    killer = Killer({"invert": 30, "synthesize": 1, "relearn": 1})
    disturbed = workers.execute(order, artifacts, runs_of(tmp_path), "r-1", 20, killer, workers=2)
    assert killer.killed == ["invert", "synthesize", "relearn"]
    first, *later = disturbed.resumed
    assert first in ("invert 20", "invert 40")  # it may have come to the next checkpoint before it died
    assert later == ["after invert", "after filter"]
    calm = Killer({})
    undisturbed = workers.execute(order, artifacts, runs_of(tmp_path), "r-2", 20, calm, workers=2)
    for name in ("generator_weights", "dataset", "weights", "targets"):
        assert getattr(disturbed, name) == getattr(undisturbed, name), name
    starts = [(done, metrics["threads"]) for stage, done, metrics in calm.heard if stage == "start"]
    assert starts == [(1, 1), (2, 1)]
    assert calm.niceness == os.nice(0)  # the work does not wait for Ray's own processes

    offered = GeneratorRef("g-1", undisturbed.generator_weights, undisturbed.dataset, undisturbed.metrics)
    alone = unlearn(replace(order, generators=GeneratorCandidates(reuse=offered)), artifacts, torch.device("cpu"))
    masks = [[target.mask for target in outcome.targets] for outcome in (alone, undisturbed)]
    assert (alone.generator_use, masks[0]) == ("reused", masks[1])
    one, two = (accuracy_of(trained, artifacts.get(str(made.weights))) for made in (alone, undisturbed))
    assert one == pytest.approx(two, abs=0.003)


@pytest.mark.ray
def test_a_run_whose_list_of_checkpoints_is_torn_begins_anew(
    cluster: None, trained: Any, artifacts: Artifacts, quick: Recipe, tmp_path: Path
) -> None:
    """A driver that dies while Ray writes that list must not leave a run that can never be carried out."""
    run = tmp_path / "runs" / "r-1"
    run.mkdir(parents=True)
    (run / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_results": [{"che')
    order = make_order(trained, artifacts, quick, 20)
    outcome = workers.execute(order, artifacts, runs_of(tmp_path), "r-1", 20, lambda *_: None)
    assert (outcome.resumed, len(workers.checkpoints(run))) == ((), 2)


@pytest.mark.ray
def test_a_run_that_is_stopped_keeps_the_step_that_it_was_at(
    cluster: None, trained: Any, artifacts: Artifacts, quick: Recipe, tmp_path: Path
) -> None:
    """Both workers end at the same step, with a checkpoint of it; the next attempt goes on from there."""
    order = make_order(trained, artifacts, quick, 400)
    stop, seen = threading.Event(), []

    def on_progress(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        if stage == "invert" and done > 20:
            stop.set()

    def again(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        if stage == "invert":
            seen.append(done)
            once_more.set()

    with pytest.raises(Stopped, match=r"stopped in invert at \d+ of 400") as stopped:
        workers.execute(order, artifacts, runs_of(tmp_path), "r-3", 1000, on_progress, stop, workers=2)
    step, once_more = int(str(stopped.value).split()[-3]), threading.Event()
    with pytest.raises(Stopped):
        workers.execute(order, artifacts, runs_of(tmp_path), "r-3", 1000, again, once_more, workers=2)
    assert 20 < step < seen[0] <= step + 100


@pytest.mark.ray
def test_more_workers_than_the_cluster_will_ever_have_are_refused_at_once(
    cluster: None, trained: Any, artifacts: Artifacts, quick: Recipe, tmp_path: Path
) -> None:
    """One line with both numbers, and no waiting."""
    order = make_order(trained, artifacts, quick, 10)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"3 workers take 3 CPUs, and this cluster has at most 2: ask for fewer"):
        workers.execute(order, artifacts, runs_of(tmp_path), "r-4", 20, lambda *_: None, workers=3)
    assert time.monotonic() - started < 5


@pytest.mark.ray
def test_an_error_of_ours_comes_back_as_it_was(
    cluster: None, trained: Any, artifacts: Artifacts, quick: Recipe, tmp_path: Path
) -> None:
    """A missing artifact is reported as such, at once, instead of being tried again."""
    order = make_order(trained, artifacts, quick, 10)
    Path(artifacts.path(order.targets[0].samples)).unlink()
    with pytest.raises(StorageError, match="is missing"):
        workers.execute(order, artifacts, runs_of(tmp_path), "r-5", 20, lambda *_: None)


def test_a_batch_that_does_not_go_round_is_refused_before_the_run(
    trained: Any, artifacts: Artifacts, quick: Recipe
) -> None:
    """One line with the key, where the workers would each find out for themselves, after the inversion."""
    order = make_order(trained, artifacts, apply(quick, {"relearn.batch": 16}), 10)
    workers._check_batches(order, 16)
    with pytest.raises(UserError, match=r"relearn\.batch of 16 is too small for 17 workers"):
        workers._check_batches(order, 17)
    with pytest.raises(UserError, match=r"invert\.batch of 30 is too small for 31 workers"):
        workers._check_batches(make_order(trained, artifacts, apply(quick, {"relearn.batch": 99}), 10), 31)


@pytest.mark.parametrize("own", [True, False], ids=["own", "default"])
def test_the_handler_of_sigterm_after_ray_starts(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    """`ray.init` installs a handler that exits. The caller's own handler stays; without one SIGTERM interrupts."""
    import ray

    received: list[int] = []
    before = signal.signal(signal.SIGTERM, (lambda number, _: received.append(number)) if own else signal.SIG_DFL)
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, lambda *_: os._exit(15)))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in [*workers.ENVIRONMENT, "RAY_AUTH_MODE", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_worker_niceness"]:
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    try:
        workers.connect(1)
        if own:
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM]
        else:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_cluster_that_cannot_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to do, whatever Ray raises."""
    import ray

    for error in (
        ConnectionError("Failed to connect\nat length"),
        ValueError("no address"),
        RuntimeError("2.1 != 2.2"),
    ):

        def refuse(error: Exception = error, **_: object) -> None:
            raise error

        monkeypatch.setattr(ray, "init", refuse)
        with pytest.raises(ClusterUnavailable, match=r"no cluster can be joined at RAY_ADDRESS=auto \(.*\): start one"):
            workers._join("auto")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_head_that_is_not_there_is_told_at_once(scheme: str) -> None:
    """Ray itself would try for minutes, and say so in lines of its own."""
    address, started = f"{scheme}127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(ClusterUnavailable, match=rf"RAY_ADDRESS={address} \(.*refused\): start one"):
        workers._join(address)
    assert time.monotonic() - started < 5


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    """A node as Ray lists it."""
    return {"Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "growth", "workers_of", "expected"),
    [
        ([node(CPU=8.0, GPU=2.0)], None, (2, 1), (True, {"GPU": 1, "CPU": 2})),
        ([node(CPU=1.0, GPU=1.0), node(CPU=8.0)], None, (1, 1), (True, {"GPU": 1, "CPU": 1})),
        ([node(CPU=2.0)], {"GPU": 4.0, "CPU": 16.0}, (4, 1), (True, {"GPU": 1, "CPU": 2})),  # spot nodes to come
        ([node(CPU=4.0), node(CPU=6.0), node(alive=False, CPU=99.0)], None, (1, 1), (False, {"CPU": 6})),
        ([node(CPU=4.0), node(CPU=4.0), node(CPU=4.0)], None, (4, 1), (False, {"CPU": 2})),
        ([node(CPU=8.0)], None, (2, 2), (False, {"CPU": 2})),
        ([node(CPU=2.0)], None, (1, 4), (False, {"CPU": 1})),
        ([node(CPU=2.0)], None, (3, 1), None),
        ([node(CPU=8.0, GPU=1.0)], {"GPU": 2.0}, (3, 1), None),
    ],
)
def test_what_a_worker_takes(
    monkeypatch: pytest.MonkeyPatch, nodes: Any, growth: Any, workers_of: tuple[int, int], expected: Any
) -> None:
    """GPUs where there are any or may come to be; else as many CPUs as all workers can have at once; more than there
    will ever be is refused."""
    import ray

    alive = [each["Resources"] for each in nodes if each["Alive"]]
    total = {kind: sum(each.get(kind, 0) for each in alive) for kind in ("CPU", "GPU")}
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(internals, "autoscaler_limits", lambda: growth)
    if expected is None:
        with pytest.raises(UserError, match="ask for fewer"):
            workers.resources(*workers_of)
    else:
        assert workers.resources(*workers_of) == expected
