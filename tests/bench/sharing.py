"""Relearning by one worker and by two workers on the same D': test accuracy on D_r and D_e of both.

    FSU_DATA=... python -m tests.bench.sharing class9 crossed7 --seed 40 --seeds 2 --home FOLDER

A Ray Train run of one worker trains a generator for a LeNet5 that has learned MNIST and draws D'. Then one worker, and
after that two workers, compute a mask and relearn on that D'. Prints a JSON line for each. For whole runs of two
workers use `FSU_WORKERS=2 python -m jobs.measure`: their generator differs by rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fsu_ray.cluster import workers
from fsu_ray.config import CHECKPOINT_STEPS
from fsu_ray.errors import FsuError, RunFailed
from fsu_ray.experiments.mnist import Bench, read_bench, score, target_samples
from fsu_ray.method.inputs import save_samples
from fsu_ray.recipes import Recipe
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.work import ErasureTarget, GeneratorCandidates, GeneratorRef, Outcome, WorkOrder
from tests.bench.searched import classifier


def rows(bench: Bench, scenario: str, seed: int, home: Path) -> Iterator[dict[str, Any]]:
    """Rows for the classifier before, the run that makes D', and relearning on D' by one and by two workers."""
    crossed, store = scenario == "crossed7", Artifacts.open(str(home / "artifacts"))
    erased = [] if crossed else [9]
    spec, weights = classifier(bench, scenario, seed, home / "classifiers")
    behaviour, pixels = target_samples(bench, "crossed" if crossed else 9, seed)
    root = store.put(weights)
    target = ErasureTarget("sharing", behaviour, store.put(save_samples(pixels)))
    order = WorkOrder(spec, root, root, (target,), Recipe())
    row: dict[str, Any] = {"scenario": scenario, "seed": seed}
    yield {**row, "what": "before", **score(bench, spec, weights, erased, crossed)}

    def run(what: str, order: WorkOrder, number: int) -> tuple[Outcome, dict[str, Any]]:
        name = f"{scenario}-{seed}-{what.replace(' ', '-')}"
        runs = (None, str(home / "runs"))
        outcome = workers.execute(order, store, runs, name, CHECKPOINT_STEPS, lambda *_: None, workers=number)
        if outcome.weights is None:
            raise RunFailed(f"the gate rejected {name}: {outcome.reason}")
        origin = {"what": what, "generator": outcome.generator_use, "mask": str(outcome.targets[0].mask)[:12]}
        return outcome, {**row, **origin, **score(bench, spec, store.get(outcome.weights), erased, crossed)}

    first, first_row = run("trained", order, 1)
    yield first_row
    generator = GeneratorRef("g", first.generator_weights, first.dataset, first.metrics)
    for number in (1, 2):
        yield run(f"relearned by {number}", replace(order, generators=GeneratorCandidates(reuse=generator)), number)[1]


def main() -> int:
    """Print the rows; 0, or the error's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="+", choices=["class9", "crossed7"])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--home", type=Path, required=True, help="a new folder for classifiers, artifacts and runs")
    options = parser.parse_args()
    try:
        bench = read_bench(Path(os.environ.get("FSU_DATA", ".")))
        workers.connect()
        for seed in range(options.seed, options.seed + options.seeds):
            for scenario in options.scenarios:
                for row in rows(bench, scenario, seed, options.home.resolve()):
                    print(json.dumps(row), flush=True)
    except FsuError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
