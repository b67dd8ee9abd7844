"""The search's objective against the truth, for recipes drawn from the whole search space.

    FSU_DATA=... python -m tests.bench.objective measure class9 --seed 50 --into rows.jsonl
    python -m tests.bench.objective report rows.jsonl --into FOLDER

The score (`method.objective`) sees the classifier and the target samples. The truth is the harmonic mean of the test
accuracy on D_r and of the share of D_e that is erased: 1 - accuracy for a class, accuracy for the crossed sevens. Each
row is a recipe: 8 inverters, the default one and seven random ones, each with 3 settings of filter and relearning.
`measure` skips rows that the file already holds. In the picture a colour is an inverter, and the best is top right.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fsu_ray.errors import FsuError
from fsu_ray.experiments.markdown import write_above_notes
from fsu_ray.experiments.mnist import Bench, read_bench, score, target_samples
from fsu_ray.method import invert
from fsu_ray.method.inputs import save_samples
from fsu_ray.method.objective import Objective, reference
from fsu_ray.method.synthesize import starved_classes, synthesize
from fsu_ray.method.unlearn import RunState, unlearn
from fsu_ray.models.classifier import Classifier
from fsu_ray.recipes import Recipe
from fsu_ray.search_space import INVERSION, SPACE, apply, draw
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.work import ErasureTarget, WorkOrder
from tests.bench.collect_results import RESULTS
from tests.bench.searched import classifier

INVERTERS, RELEARNINGS = 8, 3
STEPS = (40, 100, 200, 400)  # of the random inverters: some are cut short


def recipes(kind: Any, seed: int) -> Iterator[tuple[int, int, Recipe]]:
    """The recipes of a scenario: (inverter, relearning, recipe); the first of each is the default."""
    rng = random.Random(seed)
    for inverter in range(INVERTERS):
        first = draw(SPACE[kind], rng) | {"invert.steps": rng.choice(STEPS)}
        for relearning in range(RELEARNINGS):
            second = draw(SPACE[kind], rng)
            values = {k: v for k, v in first.items() if k.startswith(INVERSION) and inverter}
            values |= {k: v for k, v in second.items() if not k.startswith(INVERSION) and relearning}
            yield inverter, relearning, apply(Recipe(), values)


def truth(accuracies: dict[str, float], crossed: bool) -> float:
    """The harmonic mean of the test accuracy on D_r and of the erased share of D_e, in [0, 1]."""
    retained = accuracies["D_r"] / 100
    erased = accuracies["crossed 7"] / 100 if crossed else 1 - accuracies["class 9"] / 100
    return 2 * retained * erased / (retained + erased) if retained + erased else 0.0


def measure(bench: Bench, scenario: str, seed: int, store: Artifacts, known: set[tuple[int, int]]) -> Iterator[Any]:
    """A row for each recipe whose (inverter, relearning) is not in `known`."""
    crossed, device = scenario == "crossed7", torch.device("cpu")
    spec, weights = classifier(bench, scenario, seed, Path(store.location) / "classifiers")
    behaviour, pixels = target_samples(bench, "crossed" if crossed else 9, seed)
    root, samples = store.put(weights), store.put(save_samples(pixels))
    order = WorkOrder(spec, root, root, (ErasureTarget("objective", behaviour, samples),), Recipe())
    objective: Objective | None = None
    datasets: dict[int, Any] = {}
    judge = Classifier.from_bytes(spec, weights).to(memory_format=torch.channels_last)
    for inverter, relearning, recipe in recipes(behaviour.kind, seed):
        if (inverter, relearning) in known:
            continue
        if objective is None:
            objective = Objective(order, store, device, reference(order, store, device, Recipe()))
        if inverter not in datasets:
            generator = invert.invert(judge, recipe.invert, invert.begin(judge, recipe.invert))
            datasets[inverter] = synthesize(judge, generator, recipe.synthesize)
        started = time.monotonic()
        dataset, metrics = datasets[inverter]
        parts = objective.judge(recipe, dataset)
        seconds = time.monotonic() - started
        starved = starved_classes(metrics["count"], recipe.synthesize)
        inverted = RunState(
            use="trained", generator=root, dataset=store.put(dataset.to_bytes()), metrics={"starved": starved}
        )
        outcome = unlearn(replace(order, recipe=recipe), store, device, state=inverted)
        child = store.get(outcome.weights) if outcome.weights else weights
        accuracies = score(bench, spec, child, [] if crossed else [9], crossed)
        row = {"scenario": scenario, "seed": seed, "inverter": inverter, "relearning": relearning}
        yield row | {**asdict(parts), "rejected": outcome.reason, **accuracies, "truth": truth(accuracies, crossed),
                     "seconds": round(seconds, 1), "recipe": recipe.model_dump(mode="json")}  # fmt: skip


def report(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write `objective.md` (a table and Spearman's rho for each scenario) and `objective.png` (score against truth)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from scipy.stats import spearmanr

    names = sorted({row["scenario"] for row in rows})
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4.5), squeeze=False, layout="constrained")
    text = ["# The search's objective beside the truth", "", __doc__.split("\n\n")[2].strip().replace("\n", " "), ""]
    for name, axis in zip(names, axes[0], strict=True):
        in_scenario = sorted((row for row in rows if row["scenario"] == name), key=lambda row: -float(row["truth"]))
        rho = float(spearmanr([row["score"] for row in in_scenario], [row["truth"] for row in in_scenario]).statistic)
        useful = [row for row in in_scenario if row["score"] > 0]
        other_rho = float(spearmanr([row["score"] for row in useful], [row["truth"] for row in useful]).statistic)
        title = f"{name}, seed {in_scenario[0]['seed']}, {len(in_scenario)} recipes: Spearman {rho:.3f}"
        text_title = f"{title}; {other_rho:.3f} among the {len(useful)} that are worth more than 0"
        other = "crossed 7" if name == "crossed7" else "class 9"
        columns = ("score", "forgetting", "retention", "stability", "coverage", "passed")
        text += [f"## {text_title}", "", f"| inverter | relearning | {' | '.join(columns)} | D_r | {other} | truth | |"]
        text += ["|---" * (len(columns) + 6) + "|"]
        for row in in_scenario:
            parts = " | ".join(f"{row[column]:.4f}" for column in columns)
            reason = row["reason"] or (row["rejected"] or "").partition(":")[0]
            ids = f"{row['inverter']} | {row['relearning']}"
            text.append(f"| {ids} | {parts} | {row['D_r']} | {row[other]} | {row['truth']:.4f} | {reason} |")
        text.append("")
        distances = [[1 - row[key] for row in in_scenario] for key in ("score", "truth")]
        axis.scatter(*distances, c=[f"C{row['inverter']}" for row in in_scenario], s=70, alpha=0.5)
        axis.set(title=title, xscale="log", yscale="log", xlabel="1 - score (no real data)")
        axis.set_ylabel("1 - truth (test split)")
        axis.invert_xaxis()
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    write_above_notes(folder / "objective.md", "\n".join(text))
    figure.savefig(folder / "objective.png", dpi=110)
    pyplot.close(figure)


def main() -> int:
    """Measure or report; 0, or the error's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("scenario", choices=["class9", "crossed7"])
    measuring.add_argument("--seed", type=int, required=True)
    measuring.add_argument("--into", type=Path, required=True)
    measuring.add_argument("--artifacts", default="/tmp/fsu-objective")
    reporting = commands.add_parser("report")
    reporting.add_argument("rows", type=Path, nargs="+")
    reporting.add_argument("--into", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.command == "report":
        report([json.loads(line) for file in options.rows for line in file.read_text().splitlines()], options.into)
        return 0
    try:
        rows = [json.loads(line) for line in options.into.read_text().splitlines()] if options.into.exists() else []
        measured = [row for row in rows if (row["scenario"], row["seed"]) == (options.scenario, options.seed)]
        known = {(row["inverter"], row["relearning"]) for row in measured}
        bench = read_bench(Path(os.environ.get("FSU_DATA", ".")))
        for row in measure(bench, options.scenario, options.seed, Artifacts.open(options.artifacts), known):
            with options.into.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({k: v for k, v in row.items() if k != "recipe"}, flush=True)
    except FsuError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
