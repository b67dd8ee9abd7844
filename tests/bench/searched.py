"""The default recipe against the recipe of a search, on the same classifier.

    FSU_DATA=... python -m tests.bench.searched class9 --seed 40 --seeds 3 --trials 8 --home FOLDER

For each seed a LeNet5 learns MNIST and a search runs for it, which sees the request's target samples and no other data.
Then two models with the same weights erase the behaviour through the whole system, one with the default recipe and one
with the recipe of the search. Prints a JSON line for each: D_r and D_e on the test split, and the seconds. Searches
(`search.search_name`) and classifiers that are already in the home folder are reused.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fsu_ray.cluster import workers
from fsu_ray.config import CHECKPOINT_STEPS, sqlite_url
from fsu_ray.errors import FsuError
from fsu_ray.experiments.mnist import Bench, read_bench, score, target_samples, train
from fsu_ray.method.inputs import save_samples
from fsu_ray.pipeline import WorkerOptions, drain, run_request
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Digest, ModelSpec
from fsu_ray.search import SearchOptions, search
from fsu_ray.search_space import SPACE
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.ledger import Ledger, open_ledger
from fsu_ray.work import BlobStore, ErasureTarget, Outcome, WorkOrder


def classifier(bench: Bench, scenario: str, seed: int, folder: Path) -> tuple[ModelSpec, bytes]:
    """The LeNet5 of a scenario and seed, trained once and stored in `folder`."""
    spec = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10, mean=(0.1,), std=(0.28,))
    file = folder / f"{scenario}-{seed}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(train(bench, "lenet5", scenario == "crossed7", 6, seed)[1])
    return spec, file.read_bytes()


def compare(
    ledger: Ledger, store: Artifacts, execute: Any, runs: str, bench: Bench, home: Path, scenario: str, seed: int,
    trials: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row before the erasure, one for the default recipe, one for the searched recipe, one for the search."""
    crossed = scenario == "crossed7"
    erased = [] if crossed else [9]
    spec, weights = classifier(bench, scenario, seed, home)
    behaviour, pixels = target_samples(bench, "crossed" if crossed else 9, seed)
    root, samples = store.put(weights), store.put(save_samples(pixels))
    row = {"scenario": scenario, "seed": seed}
    yield row | {"recipe": "-", **score(bench, spec, weights, erased, crossed)}
    model = f"{scenario}-{seed}-{time.time_ns():x}"
    ledger.models.register(model, spec, root)
    order = ledger.lineage(model).order((ErasureTarget("search", behaviour, samples),), Recipe())
    result = search(
        order, store, (None, runs), SearchOptions(SPACE[behaviour.kind], trials=trials, seed=seed), _print_progress
    )
    for name, recipe in (("default", Recipe()), ("searched", result.recipe)):
        outcome = _erase(ledger, store, execute, f"{model}-{name}", spec, root, behaviour, samples, len(pixels), recipe)
        if "weights" in outcome:
            outcome |= score(bench, spec, store.get(outcome.pop("weights")), erased, crossed)
        objective = result.evidence["best" if name == "searched" else "initial"]["score"]
        yield row | {"recipe": name, "score": objective, **outcome}
    yield row | {"recipe": "search", "evidence": dict(result.evidence)}


def _erase(
    ledger: Ledger, store: Artifacts, execute: Any, model: str, spec: ModelSpec, root: Digest, behaviour: Behaviour,
    samples: Digest, number: int, recipe: Recipe,
) -> dict[str, Any]:  # fmt: skip
    ledger.models.register(model, spec, root)
    ledger.requests.submit(model, behaviour, samples, number, recipe)
    started = time.monotonic()
    (result,) = drain(
        ledger, "searched", WorkerOptions(max_requests=1, model=model), partial(run_request, ledger, store, execute)
    )
    wall = round(time.monotonic() - started, 1)
    if result.version is None:
        return {"refused": result.request.reason, "wall": wall}
    return {"weights": result.version.weights, "wall": wall}


def _print_progress(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
    print(
        f"  {stage} {done}/{total} " + " ".join(f"{k} {v:.4g}" for k, v in metrics.items()), file=sys.stderr, flush=True
    )


def main() -> int:
    """Print the rows; 0, or the error's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=["class9", "crossed7"])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--home", type=Path, required=True, help="a folder for classifiers, ledger and artifacts")
    options = parser.parse_args()
    home = options.home.resolve()
    try:
        bench, store = read_bench(Path(os.environ.get("FSU_DATA", "."))), Artifacts.open(str(home / "artifacts"))
        ledger = open_ledger(sqlite_url(home / "ledger.db"))
        workers.connect()

        def execute(order: WorkOrder, store: BlobStore, name: str, stop: Any) -> Outcome:
            return workers.execute(
                order, store, (None, str(home / "runs")), name, CHECKPOINT_STEPS, lambda *_: None, stop
            )

        for seed in range(options.seed, options.seed + options.seeds):
            arguments = (home / "classifiers", options.scenario, seed, options.trials)
            for row in compare(ledger, store, execute, str(home / "runs"), bench, *arguments):
                print(json.dumps(row), flush=True)
    except FsuError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
