"""Five requests in sequence through ledger, registry and gate: one shared generator against one for each request.

`shared` is the system's default. `each` has a policy that retires the generator and purges the given samples after each
erasure: every request trains its own generator with its own seed (with one seed for all it would be the same generator
of the same root), and the masks of earlier erasures are rebuilt from their probes. `each, no probes` is the paper's
form: it inverts the current version and knows nothing of earlier erasures.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fsu_ray.config import make_recipe, sqlite_url
from fsu_ray.experiments import images
from fsu_ray.experiments.catalogue import Cell, CellContext, CellType, Row, Scale, Table, Work
from fsu_ray.experiments.images import FEW
from fsu_ray.experiments.markdown import spread, table
from fsu_ray.experiments.mnist import score, target_samples
from fsu_ray.method.inputs import save_samples
from fsu_ray.method.unlearn import unlearn
from fsu_ray.pipeline import WorkerOptions, drain, run_request
from fsu_ray.records import ModelSpec, Policy
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.ledger import Ledger, open_ledger
from fsu_ray.work import BlobStore, Outcome, WorkOrder

CLASSES = (9, 4, 1, 7, 2)  # erased in this order
OPEN = {"forgotten_max": 1.0, "agreement_min": 0.0, "returned_max": 1.0, "returned_margin": 1.0}
"""A gate that refuses no result, so that a class that comes back is seen."""
VARIANTS: dict[str, tuple[dict[str, Any], Policy, dict[str, Any]]] = {
    "shared": ({}, Policy(), {}),
    "each": ({}, Policy(generators="retire-after-erasure", samples_days=0), {"reseed": True}),
    "each, no probes": ({"form": "paper"}, Policy(generators="retire-after-erasure", samples_days=0), {}),
}
"""By variant: recipe changes, the model's policy, more keys of the cell. `reseed` gives each inversion its own seed."""


def _sequence(cell: Cell, context: CellContext) -> list[Row]:
    ((original,),) = context.needs
    weights = context.store.get(original["weights"])
    with tempfile.TemporaryDirectory() as home:
        ledger = open_ledger(sqlite_url(Path(home) / "ledger.db"))
        try:
            rows = list(_requests(cell, context, original, weights, ledger, Artifacts.open(f"{home}/artifacts")))
        finally:
            ledger.close()
    return rows


def _requests(
    cell: Cell, context: CellContext, original: Row, weights: bytes, ledger: Ledger, store: Artifacts
) -> Iterator[Row]:
    def execute(order: WorkOrder, store: BlobStore, name: str, stop: threading.Event) -> Outcome:
        return unlearn(order, store, context.device)

    spec = ModelSpec.model_validate_json(original["spec"])
    same_changes = [cell["changes"], {"gate": OPEN, "relearn": {"seed": cell["seed"]}}]
    ledger.models.register("m", spec, store.put(weights))
    ledger.models.set_policy("m", Policy.model_validate(cell["policy"]))
    erased: list[int] = []
    same = {"seed": cell["seed"], "variant": cell["variant"]}
    yield {**same, "request": 0, "erased": "-", **_measured(spec, weights, list(cell["classes"]))}
    for number, label in enumerate(cell["classes"], 1):
        behaviour, pixels = target_samples(images.bench(), label, cell["seed"], FEW)
        seed = {"seed": 1000 * number + cell["seed"]}
        reseeded = {"invert": seed, "synthesize": seed} if cell.get("reseed") else {}
        recipe = make_recipe("default", [*same_changes, reseeded])
        ledger.requests.submit("m", behaviour, store.put(save_samples(pixels)), len(pixels), recipe)
        started = time.monotonic()
        (result,) = drain(
            ledger, "sequence", WorkerOptions(max_requests=1, model="m"), partial(run_request, ledger, store, execute)
        )
        row = {**same, "request": number, "erased": str(label), "seconds": time.monotonic() - started}
        if result.version is None or result.outcome is None:
            yield {**row, "reason": result.request.reason}
            return
        erased.append(label)
        row |= {"use": result.outcome.generator_use}
        yield {**row, **_measured(spec, store.get(result.version.weights), erased)}


def _measured(spec: ModelSpec, weights: bytes, erased: list[int]) -> dict[str, float]:
    """`D_r`, and `D_K` of each erased class K."""
    accuracies = score(images.bench(), spec, weights, erased, False)
    return {"D_r": accuracies["D_r"], **{f"D_{label}": accuracies[f"class {label}"] for label in erased}}


def _cells(scale: Scale, seeds: int) -> list[Work]:
    works: list[Work] = []
    for seed in range(seeds):
        original = images.classifier("class9", "lenet5", seed, scale)
        invert = images.inverter(original, scale)["invert"]
        for variant, (changes, policy, more) in VARIANTS.items():
            cell = {"classifier": original, "variant": variant, "classes": list(CLASSES), "seed": seed, **more}
            cell |= {"changes": {"invert": invert, **changes}, "policy": policy.model_dump(mode="json")}
            works.append(("sequence", cell))
    return works


def _retained(row: Row) -> float:
    return float(row["D_r"])


def _worst(row: Row) -> float:
    """The highest accuracy on an erased class; 0 before the first erasure."""
    return max((float(row[f"D_{label}"]) for label in CLASSES[: row["request"]]), default=0.0)


def _report(rows: list[Row], folder: Path) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    parts = []
    for variant in VARIANTS:
        of_variant = [row for row in rows if row["variant"] == variant and row.get("reason") is None]
        lines, numbers = [], sorted({row["request"] for row in of_variant})
        for number in numbers:
            after = [row for row in of_variant if row["request"] == number]
            worst = [_worst(row) for row in after] if number else []
            seconds = [row["seconds"] for row in after] if number else []
            uses = ", ".join(sorted({row["use"] for row in after})) if number else ""
            lines.append([after[0]["erased"], spread(r["D_r"] for r in after), spread(worst),
                          f"{max(worst, default=0):.2f}", spread(seconds, 1), uses])  # fmt: skip
        for axis, value in zip(axes, (_retained, _worst), strict=True):
            values = [[value(row) for row in of_variant if row["request"] == number] for number in numbers]
            axis.plot(numbers, [sum(v) / len(v) for v in values], "o-", label=variant)
        refused = [row["reason"] for row in rows if row["variant"] == variant and row.get("reason")]
        parts.append(f"**{variant}**")
        parts.append(table(["erased", "D_r", "worst erased class", "its highest", "seconds", "generator"], lines))
        parts += [f"A line ended: {reason}." for reason in refused]
    for axis, name in zip(axes, ("accuracy on what is kept, %", "worst erased class, %"), strict=True):
        axis.set(xlabel="requests", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(folder / "sequence.png", dpi=110)
    pyplot.close(figure)
    head = (
        f"LeNet5 on MNIST, classes {', '.join(map(str, CLASSES))} one after another, 3 % of each given; "
        f"seeds {sorted({row['seed'] for row in rows})}.\n\n![sequence](sequence.png)"
    )
    return "\n\n".join([head, *parts]) + (
        "\n`shared`: the system's default, one generator and one D'. `each`: the policy retires the generator and "
        "purges the given samples after every erasure, so each request trains its own generator and rebuilds the "
        "earlier masks from probes. `each, no probes`: the paper's form; each request inverts the current version "
        "and knows nothing of the earlier requests. The gate refused nothing, so that a class that comes back is "
        "seen here. Seconds on one CPU.\n"
    )


CELL_TYPES = {"sequence": CellType(_sequence, lambda cell: [("classifier", cell["classifier"])], gpu=True)}
TABLES = {"sequence": Table(_cells, _report)}
