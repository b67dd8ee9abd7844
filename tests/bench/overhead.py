"""Seconds that ledger and Ray add to the method: a request through the system against the same recipe in one process.

    python -m tests.bench.overhead [--runs 3] [--recipe digits] [--set KEY=VALUE]

The request erases class 8 of a LeNet5 that has learned the digits. Each run is measured both ways, in turn: `plain` is
`method.unlearn` called in this process; `system` is what `fsu run` does from connecting to Ray until it has left Ray,
split into parts. The first run of each is a warm-up and is not printed. Not included: the start of Python and its
imports (some seconds of each `fsu run`). `method` is the worker's sum over its stages, checkpoints included.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fsu_ray.cluster import workers
from fsu_ray.config import CHECKPOINT_STEPS, make_recipe, parse_change, sqlite_url
from fsu_ray.method.datasets import draw, load
from fsu_ray.method.fit import TrainingSchedule, fit
from fsu_ray.method.inputs import save_samples
from fsu_ray.method.unlearn import unlearn
from fsu_ray.models.classifier import Classifier
from fsu_ray.pipeline import WorkerOptions, drain, run_request
from fsu_ray.records import Behaviour, ModelSpec, Request
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.ledger import Ledger, open_ledger
from fsu_ray.work import BlobStore, Outcome, WorkOrder

PARTS = ("ray starts", "workers start", "method", "reports", "run ends", "ledger", "ray ends")


@dataclass(frozen=True)
class App:
    """A ledger, its artifacts and the folder of Ray's checkpoints."""

    ledger: Ledger
    artifacts: Artifacts
    runs: Path


def plain(app: App, request: Request) -> float:
    """Seconds of the method alone, for the order of a queued request."""
    plan = app.ledger.plan(request)
    started = time.monotonic()
    unlearn(plan.order, app.artifacts, torch.device("cpu"))
    return time.monotonic() - started


def system(app: App) -> dict[str, float]:
    """Seconds of the steps of `fsu run` on the queued request, by part; `whole` is their sum."""
    marks: dict[str, float] = {"started": time.monotonic()}
    workers.connect()
    marks["connected"] = time.monotonic()

    def execute(order: WorkOrder, store: BlobStore, name: str, stop: threading.Event) -> Outcome:
        marks["sent"] = time.monotonic()

        def on_progress(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
            marks.setdefault("working" if stage == "start" else stage, time.monotonic())
            marks["last report"] = time.monotonic()

        try:
            return workers.execute(order, store, (None, str(app.runs)), name, CHECKPOINT_STEPS, on_progress, stop)
        finally:
            marks["returned"] = time.monotonic()

    options = WorkerOptions(max_requests=1)
    (result,) = drain(app.ledger, "overhead", options, partial(run_request, app.ledger, app.artifacts, execute))
    marks["written"] = time.monotonic()
    workers.disconnect()
    marks["disconnected"] = time.monotonic()
    assert result.outcome is not None
    method = sum(result.outcome.seconds.values())
    driver = marks["sent"] - marks["connected"] + marks["written"] - marks["returned"]
    seconds = (
        marks["connected"] - marks["started"],
        marks["working"] - marks["sent"],
        method,
        marks["last report"] - marks["working"] - method,
        marks["returned"] - marks["last report"],
        driver,
        marks["disconnected"] - marks["written"],
    )
    return {**dict(zip(PARTS, seconds, strict=True)), "whole": marks["disconnected"] - marks["started"]}


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ledger = open_ledger(sqlite_url(Path(folder) / "ledger.db"))
        app = App(ledger, Artifacts.open(f"{folder}/artifacts"), Path(folder) / "runs")
        spec = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10, mean=(0.3,), std=(0.37,))
        images = load("digits", "train", spec.shape)
        torch.manual_seed(0)
        classifier = Classifier(spec)
        fit(classifier, images.pixels, images.labels, TrainingSchedule(epochs=30, batch=64))
        weights = app.artifacts.put(classifier.to_bytes())
        samples = app.artifacts.put(save_samples(images.pixels[draw(images, [8], 8, 0)]))
        recipe = make_recipe(options.recipe, [parse_change(text) for text in options.changes])
        for number in range(options.runs + 1):
            name = f"m{number}"
            ledger.models.register(name, spec, weights, "digits")
            behaviour = Behaviour(name="class-8", kind="class", targets=(8,))
            request, _ = ledger.requests.submit(name, behaviour, samples, 8, recipe)
            method_alone, seconds = plain(app, request), system(app)
            if number:
                parts = ", ".join(f"{part} {seconds[part]:.1f}" for part in PARTS)
                whole, added = seconds["whole"], seconds["whole"] - method_alone
                print(f"plain {method_alone:.1f} s, system {whole:.1f} s: {added:.1f} s more ({parts})", flush=True)


if __name__ == "__main__":
    main()
