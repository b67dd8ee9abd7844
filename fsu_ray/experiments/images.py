"""The cells of the tables on images: classifier, oracle, Fisher noise, generator, GAN, D', erasure.

A cell contains the whole cells that it needs, so that tables share cells: a generator is trained once for all tables.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsu_ray.config import make_recipe
from fsu_ray.experiments import mnist
from fsu_ray.experiments.catalogue import Cell, CellContext, CellType, Row, Scale, Work
from fsu_ray.experiments.mnist import Bench, read_bench, read_cifar, target_positions, target_samples, train
from fsu_ray.gate import refuse_generator, refuse_result
from fsu_ray.method import evaluate, invert
from fsu_ray.method.baselines import fisher
from fsu_ray.method.baselines.gan import GanRecipe
from fsu_ray.method.baselines.gan import train as train_gan
from fsu_ray.method.fit import TrainingSchedule, fit, predict
from fsu_ray.method.generators import read_generator
from fsu_ray.method.inputs import save_samples
from fsu_ray.method.synthesize import starved_classes, synthesize
from fsu_ray.method.unlearn import RunState, unlearn
from fsu_ray.models.classifier import Classifier
from fsu_ray.models.generator import Generator
from fsu_ray.recipes import Recipe
from fsu_ray.records import ModelSpec
from fsu_ray.work import ErasureTarget, WorkOrder

FEW, FULL = 0.03, 1.0  # rho of few-shot and of full-shot unlearning
FULL_SHOT = {"relearn": {"repeats": 1}}
"""Recipe changes for full-shot: with all of D_e, relearning does not repeat the given samples."""
SCENARIOS: dict[str, tuple[str, int | str, str]] = {
    "class9": ("mnist", 9, "class 9"),
    "crossed7": ("mnist", "crossed", "crossed 7"),
    "truck": ("cifar10", 9, "class 9"),
}
"""By scenario: the data set, D_e's name in `target_samples`, and D_e's name in `score`."""
EPOCHS = {"lenet5": 6, "mnist": 3, "cifar10": 10}
"""Epochs of a classifier at small scale: LeNet5's, and deep networks' by data set. At the paper's scale 20 and 200."""

DEEP: dict[Scale, str] = {"small": "preactresnet18:8", "paper": "preactresnet18"}
"""The paper's network for MNIST, by scale."""


@functools.cache
def bench(data: str = "mnist") -> Bench:
    """The data of `mnist` or `cifar10` from FSU_DATA, read once in a process."""
    folder = Path(os.environ.get("FSU_DATA", "."))
    return read_cifar() if data == "cifar10" else read_bench(folder)


def poisoned(scenario: str) -> bool:
    """Whether the scenario's original learned the crossed sevens with wrong labels."""
    return SCENARIOS[scenario][1] == "crossed"


def classifier(scenario: str, arch: str, seed: int, scale: Scale) -> Cell:
    """The cell of a scenario's original."""
    data = SCENARIOS[scenario][0]
    large = 200 if data == "cifar10" else 20
    epochs = large if scale == "paper" else EPOCHS["lenet5" if arch == "lenet5" else data]
    return {"scenario": scenario, "arch": arch, "epochs": epochs, "seed": seed}


def generator(original: Cell, *changes: dict[str, Any]) -> Cell:
    """The cell of an inverter of `original`: its network's recipe with `changes` of the section `invert`."""
    seed = {"seed": original["seed"]}
    recipe = make_recipe(_preset(original), [{"invert": change} for change in (seed, *changes)])
    return {"classifier": original, "invert": recipe.invert.model_dump(mode="json"), "seed": original["seed"]}


def inverter(original: Cell, scale: Scale, changes: dict[str, Any] | None = None) -> Cell:
    """The cell of the tables' inverter of `original`, with `changes`.

    It is wider for colour images. At the paper's scale it has the paper's steps and width.
    """
    colours = original["scenario"] == "truck"
    small = {"width": 16} if colours else {}
    size = {"steps": 7000, "width": 64 if colours else 16} if scale == "paper" else small
    return generator(original, size, changes or {})


def _preset(original: Cell) -> str:
    """The name of the recipe for a network of any width."""
    return {"lenet5": "default", "resnet50": "very-deep"}.get(original["arch"].partition(":")[0], "deep")


def dataset(inverter: Cell, changes: dict[str, Any], teacher: Cell | None = None) -> Cell:
    """The cell of a D' drawn from `inverter`, labelled by `teacher` or else by the classifier that was inverted."""
    recipe = make_recipe("default", [{"synthesize": {"seed": inverter["seed"], **changes}}])
    cell = {"generator": inverter, "synthesize": recipe.synthesize.model_dump(mode="json"), "seed": inverter["seed"]}
    by_inverted = teacher is None or teacher == inverter.get("classifier")
    return cell if by_inverted else {**cell, "classifier": teacher}


def gan(scenario: str, seed: int, scale: Scale) -> Cell:
    """The cell of Ours+'s generator: a GAN on the training data of the classifier of `scenario` and `seed`."""
    width = 8 if scale == "small" else 64 if scenario == "truck" else 16
    recipe = asdict(GanRecipe(steps=2000 if scale == "small" else 20_000, width=width, seed=seed))
    recipe["betas"] = list(recipe["betas"])  # JSON has no tuples
    return {"scenario": scenario, "gan": recipe, "seed": seed}


def erasure(drawn: Cell, rho: float, changes: dict[str, Any], seed: int | None = None) -> Work:
    """An erasure of D_e on the D' of cell `drawn`, given a share `rho` of D_e, by the network's recipe with `changes`.

    `seed` draws the share and seeds relearning; default: the seed of D'.
    """
    recipe = make_recipe(_preset(teacher(drawn)[1]), [changes]).model_dump(mode="json")
    sections = {part: recipe[part] for part in ("form", "filter", "relearn", "gate")}
    return "erasure", {
        "dataset": drawn,
        "rho": rho,
        "recipe": sections,
        "seed": drawn["seed"] if seed is None else seed,
    }


def _classifier(cell: Cell, context: CellContext) -> list[Row]:
    scenario, started = cell["scenario"], time.monotonic()
    data = bench(SCENARIOS[scenario][0])
    spec, weights = train(data, cell["arch"], poisoned(scenario), cell["epochs"], cell["seed"], context.device)
    row = {
        "seed": cell["seed"],
        "scenario": scenario,
        "arch": cell["arch"],
        "spec": spec.model_dump_json(),
        "weights": context.store.put(weights),
    }
    return [row | {"seconds": time.monotonic() - started, **measured(scenario, load(row, context))}]


def measured(scenario: str, classifier: Classifier) -> dict[str, float]:
    """Test accuracy in percent on `D_r` and `D_e`, computed on the classifier's device."""
    return graded(scenario, predict(classifier, bench(SCENARIOS[scenario][0]).test.pixels))


def graded(scenario: str, logits: Tensor) -> dict[str, float]:
    """`measured` of logits or probabilities (N, K) of the test split."""
    data, what, name = SCENARIOS[scenario]
    accuracies = mnist.graded(bench(data), logits, [what] if isinstance(what, int) else [], poisoned(scenario))
    return {"D_r": accuracies["D_r"], "D_e": accuracies[name]}


def erased_of(scenario: str, rho: float, seed: int) -> Tensor:
    """(N,) bool: the training images of D_e,rho, the same that `target_samples` draws."""
    name, what, _ = SCENARIOS[scenario]
    erased = torch.zeros(len(bench(name).train), dtype=torch.bool)
    erased[target_positions(bench(name), what, seed, rho)] = True
    return erased


def load(row: Row, context: CellContext) -> Classifier:
    """The classifier of a `classifier` row, on the cell's device."""
    classifier = Classifier.from_bytes(ModelSpec.model_validate_json(row["spec"]), context.store.get(row["weights"]))
    return classifier.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def load_generator(row: Row, spec: ModelSpec, context: CellContext) -> Generator:
    """The generator of a row with `weights`, on the cell's device."""
    generator = read_generator(spec, context.store.get(row["weights"]))
    return generator.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _oracle(cell: Cell, context: CellContext) -> list[Row]:
    """Train on D_r: from the original's weights (`finetuned`, at relearning's rate) or anew (`scratch`)."""
    ((original,),) = context.needs
    scenario, started = original["scenario"], time.monotonic()
    data = bench(SCENARIOS[scenario][0])
    child = load(original, context)
    if cell["how"] == "scratch":
        torch.manual_seed(cell["seed"])
        child = Classifier(child.spec).to(context.device)
        schedule = TrainingSchedule(epochs=cell["epochs"], seed=cell["seed"], precision="auto")
    else:
        schedule = TrainingSchedule(
            cell["epochs"], 64, 0.003, weight_decay=2e-5, one_cycle=False, seed=cell["seed"], precision="auto"
        )
    retained = data.train.take(~erased_of(scenario, FULL, cell["seed"]))
    fit(child, retained.pixels, retained.labels, schedule, flip=child.spec.flip)
    row = {"seed": cell["seed"], "scenario": scenario, "arch": original["arch"], "how": cell["how"],
           "epochs": cell["epochs"]}  # fmt: skip
    return [row | {"seconds": time.monotonic() - started, **measured(scenario, child)}]


def _generator(cell: Cell, context: CellContext) -> list[Row]:
    ((original,),) = context.needs
    recipe, started = Recipe.model_validate({"invert": cell["invert"]}).invert, time.monotonic()
    last_losses: dict[str, float] = {}
    classifier = load(original, context)
    run = invert.begin(classifier, recipe)
    generator = invert.invert(classifier, recipe, run, lambda step, steps, losses: last_losses.update(losses))
    row = {"seed": cell["seed"], "scenario": original["scenario"], "arch": original["arch"],
           "weights": context.store.put(generator.to_bytes())}  # fmt: skip
    return [
        row | {"seconds": time.monotonic() - started, **{f"loss_{name}": value for name, value in last_losses.items()}}
    ]


def _gan(cell: Cell, context: CellContext) -> list[Row]:
    scenario, started = cell["scenario"], time.monotonic()
    data = bench(SCENARIOS[scenario][0])
    labels = mnist.labels(data, poisoned(scenario), cell["seed"])
    spec = mnist.spec_of(data, "lenet5")  # a generator depends on shape and classes alone
    recipe = GanRecipe(**{**cell["gan"], "betas": tuple(cell["gan"]["betas"])})
    generator = train_gan(spec, data.train.pixels, labels, recipe, context.device)
    row = {"seed": cell["seed"], "scenario": scenario, "weights": context.store.put(generator.to_bytes())}
    return [row | {"seconds": time.monotonic() - started}]


def _dataset(cell: Cell, context: CellContext) -> list[Row]:
    (original,), (inverter,) = context.needs
    recipe, started = Recipe.model_validate({"synthesize": cell["synthesize"]}), time.monotonic()
    classifier = load(original, context)
    generator = load_generator(inverter, classifier.spec, context)
    drawn, synthesis = synthesize(classifier, generator, recipe.synthesize)
    every = torch.ones(len(drawn), dtype=torch.bool)
    starved = starved_classes(synthesis["count"], recipe.synthesize)
    allowed = every[:, None].expand(-1, classifier.spec.classes)
    metrics = evaluate.generator_metrics(classifier, drawn, synthesis, allowed, every, [], starved)
    keys = ("acceptance", "coverage", "bn_distance", "agreement")
    row = {"seed": cell["seed"], "scenario": original["scenario"], "arch": original["arch"],
           "generator": inverter["weights"],
           "dataset": context.store.put(drawn.to_bytes()), "starved": starved, **{key: metrics[key] for key in keys},
           "refused": "; ".join(refuse_generator(metrics, recipe.gate))}  # fmt: skip
    return [row | {"seconds": time.monotonic() - started}]


def _erasure(cell: Cell, context: CellContext) -> list[Row]:
    """Filter and relearn on D'. Where that ends without weights, the row has the original's, and the reason."""
    (original,), (drawn,) = context.needs
    scenario, started = original["scenario"], time.monotonic()
    data, what, _ = SCENARIOS[scenario]
    behaviour, pixels = target_samples(bench(data), what, cell["seed"], cell["rho"])
    recipe = Recipe.model_validate({**cell["recipe"], "relearn": {**cell["recipe"]["relearn"], "seed": cell["seed"]}})
    spec = ModelSpec.model_validate_json(original["spec"])
    target = ErasureTarget("cell", behaviour, context.store.put(save_samples(pixels)))
    order = WorkOrder(spec, original["weights"], original["weights"], (target,), recipe)
    saved = RunState(use="trained", generator=drawn["generator"], dataset=drawn["dataset"],
                  metrics={"starved": drawn["starved"]})  # fmt: skip
    outcome = unlearn(order, context.store, context.device, state=saved)
    refused = outcome.reason or refuse_result(outcome.targets[0].report, recipe.gate) or ""
    weights = outcome.weights or original["weights"]
    child = load({"spec": original["spec"], "weights": weights}, context)
    row = {"seed": cell["seed"], "scenario": scenario, "arch": original["arch"], "variant": cell.get("variant"),
           "rho": cell["rho"], "generator": drawn["refused"], "coverage": drawn["coverage"],
           "acceptance": drawn["acceptance"], "refused": refused.partition(":")[0], "weights": weights,
           "before_D_r": original["D_r"], "before_D_e": original["D_e"]}  # fmt: skip
    return [row | {"seconds": time.monotonic() - started, **measured(scenario, child)}]


def _fisher(cell: Cell, context: CellContext) -> list[Row]:
    """A row for each strength of the noise, by the information on `samples` training images outside D_e,rho."""
    ((original,),) = context.needs
    scenario, started, classifier = original["scenario"], time.monotonic(), load(original, context)
    retained = (~erased_of(scenario, cell["rho"], cell["seed"])).nonzero().flatten()
    order = torch.randperm(len(retained), generator=torch.Generator().manual_seed(cell["seed"]))
    pixels = bench(SCENARIOS[scenario][0]).train.pixels
    information = fisher.information(classifier, pixels[retained[order[: cell["samples"]]]])
    seconds = time.monotonic() - started
    rows = []
    for alpha in cell["alphas"]:
        scrubbed = fisher.scrub(classifier, information, alpha, cell["seed"])
        row = {"seed": cell["seed"], "scenario": scenario, "arch": original["arch"], "rho": cell["rho"]}
        row |= {"alpha": alpha, "seconds": seconds}
        rows.append(row | measured(scenario, scrubbed))
    return rows


def _original(cell: Cell) -> list[Work]:
    return [("classifier", cell["classifier"])]


def teacher(drawn: Cell) -> Work:
    """The classifier that labels a D' and that an erasure on this D' unlearns."""
    return "classifier", drawn["classifier"] if "classifier" in drawn else drawn["generator"]["classifier"]


def _drawn_from(cell: Cell) -> list[Work]:
    return [teacher(cell), ("gan" if "gan" in cell["generator"] else "generator", cell["generator"])]


def _erased_on(cell: Cell) -> list[Work]:
    return [teacher(cell["dataset"]), ("dataset", cell["dataset"])]


CELL_TYPES = {
    "classifier": CellType(_classifier, gpu=True),
    "oracle": CellType(_oracle, _original, gpu=True),
    "fisher": CellType(_fisher, _original, gpu=True),
    "generator": CellType(_generator, _original, gpu=True),
    "gan": CellType(_gan, gpu=True),
    "dataset": CellType(_dataset, _drawn_from, gpu=True),
    "erasure": CellType(_erasure, _erased_on, gpu=True),
}
