"""The pieces of the tables on images: a classifier, an oracle, a generator, its D', an erasure. Each is a cell.

Each rests on the one before, so that tables share what they have in common: a generator is trained once, whatever is
done with it afterwards. A cell names what it rests on by that one's whole cell.
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
from fsu_ray.experiments.catalogue import Cell, Piece, Place, Row, Scale, Work
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

FEW, FULL = 0.03, 1.0
"""rho of few-shot and of full-shot unlearning."""
FULL_SHOT = {"relearn": {"repeats": 1}}
"""With all of D_e given there is no need to show each sample five times."""
SCENARIOS: dict[str, tuple[str, int | str, str]] = {
    "class9": ("mnist", 9, "class 9"),
    "crossed7": ("mnist", "crossed", "crossed 7"),
    "truck": ("cifar10", 9, "class 9"),
}
"""The data set, what `target_samples` calls D_e, and what `score` does."""
EPOCHS = {"lenet5": 6, "mnist": 3, "cifar10": 10}
"""Of a classifier at small scale: LeNet5's, a deep network's by its data. At the paper's scale these are 20 and 200."""


DEEP: dict[Scale, str] = {"small": "preactresnet18:8", "paper": "preactresnet18"}
"""The paper's network for MNIST."""


@functools.cache
def bench(data: str = "mnist") -> Bench:
    """`mnist` or `cifar10` from FSU_DATA, read once a process."""
    folder = Path(os.environ.get("FSU_DATA", "."))
    return read_cifar() if data == "cifar10" else read_bench(folder)


def poisoned(scenario: str) -> bool:
    """Whether the original has learned the crossed sevens with wrong labels."""
    return SCENARIOS[scenario][1] == "crossed"


def classifier(scenario: str, arch: str, seed: int, scale: Scale) -> Cell:
    """The cell of a scenario's original."""
    data = SCENARIOS[scenario][0]
    large = 200 if data == "cifar10" else 20
    epochs = large if scale == "paper" else EPOCHS["lenet5" if arch == "lenet5" else data]
    return {"scenario": scenario, "arch": arch, "epochs": epochs, "seed": seed}


def generator(original: Cell, *changes: dict[str, Any]) -> Cell:
    """The cell of an inverter of `original`, by the recipe that its network has under `changes` of `invert`."""
    seeded = {"seed": original["seed"]}
    recipe = make_recipe(_preset(original), [{"invert": change} for change in (seeded, *changes)])
    return {"classifier": original, "invert": recipe.invert.model_dump(mode="json"), "seed": original["seed"]}


def inverter(original: Cell, scale: Scale, changes: dict[str, Any] | None = None) -> Cell:
    """The cell of the inverter that tables take for `original`, but for `changes`: more channels for colours, and at
    the paper's scale its length and width."""
    colours = original["scenario"] == "truck"
    small = {"width": 16} if colours else {}
    size = {"steps": 7000, "width": 64 if colours else 16} if scale == "paper" else small
    return generator(original, size, changes or {})


def _preset(original: Cell) -> str:
    """The recipe that a network takes, whatever its width."""
    return {"lenet5": "default", "resnet50": "very-deep"}.get(original["arch"].partition(":")[0], "deep")


def dataset(inverter: Cell, changes: dict[str, Any], teacher: Cell | None = None) -> Cell:
    """The cell of D' drawn from `inverter`, labelled by the classifier that it inverts or by `labeller`."""
    recipe = make_recipe("default", [{"synthesize": {"seed": inverter["seed"], **changes}}])
    cell = {"generator": inverter, "synthesize": recipe.synthesize.model_dump(mode="json"), "seed": inverter["seed"]}
    own = teacher is None or teacher == inverter.get("classifier")
    return cell if own else {**cell, "classifier": teacher}


def gan(scenario: str, seed: int, scale: Scale) -> Cell:
    """The cell of Ours+'s generator: a GAN on what the classifier of `scenario` and `seed` has learned from."""
    width = 8 if scale == "small" else 64 if scenario == "truck" else 16
    how = asdict(GanRecipe(steps=2000 if scale == "small" else 20_000, width=width, seed=seed))
    how["betas"] = list(how["betas"])  # as JSON has it
    return {"scenario": scenario, "gan": how, "seed": seed}


def erasure(drawn: Cell, rho: float, changes: dict[str, Any], seed: int | None = None) -> Work:
    """An erasure of the scenario's D_e, of which a share `rho` is given, on D'; by the rest of the recipe that the
    network has.

    `seed` draws the share, that of D' where there is none.
    """
    recipe = make_recipe(_preset(teacher(drawn)[1]), [changes]).model_dump(mode="json")
    rest = {part: recipe[part] for part in ("form", "filter", "relearn", "gate")}
    return "erasure", {"dataset": drawn, "rho": rho, "recipe": rest, "seed": drawn["seed"] if seed is None else seed}


def _classifier(cell: Cell, place: Place) -> list[Row]:
    scenario, started = cell["scenario"], time.monotonic()
    data = bench(SCENARIOS[scenario][0])
    spec, weights = train(data, cell["arch"], poisoned(scenario), cell["epochs"], cell["seed"], place.device)
    row = {
        "seed": cell["seed"],
        "scenario": scenario,
        "arch": cell["arch"],
        "spec": spec.model_dump_json(),
        "weights": place.store.put(weights),
    }
    return [row | {"seconds": time.monotonic() - started, **measured(scenario, load(row, place))}]


def measured(scenario: str, classifier: Classifier) -> dict[str, float]:
    """Test accuracy in percent on `D_r` and `D_e`, computed where `classifier` is."""
    return graded(scenario, predict(classifier, bench(SCENARIOS[scenario][0]).test.pixels))


def graded(scenario: str, logits: Tensor) -> dict[str, float]:
    """`measured` of logits or probabilities (N, K) of the test split."""
    data, what, called = SCENARIOS[scenario]
    found = mnist.graded(bench(data), logits, [what] if isinstance(what, int) else [], poisoned(scenario))
    return {"D_r": found["D_r"], "D_e": found[called]}


def erased_of(scenario: str, rho: float, seed: int) -> Tensor:
    """(N,) bool: which images of the training set are D_e,rho; the same that `target_samples` gives."""
    name, what, _ = SCENARIOS[scenario]
    erased = torch.zeros(len(bench(name).train), dtype=torch.bool)
    erased[target_positions(bench(name), what, seed, rho)] = True
    return erased


def load(row: Row, place: Place) -> Classifier:
    """The classifier of a `classifier` row, on the cell's device."""
    found = Classifier.from_bytes(ModelSpec.model_validate_json(row["spec"]), place.store.get(row["weights"]))
    return found.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def load_generator(row: Row, spec: ModelSpec, place: Place) -> Generator:
    """The generator of a row with `weights`, on the cell's device."""
    made = read_generator(spec, place.store.get(row["weights"]))
    return made.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _oracle(cell: Cell, place: Place) -> list[Row]:
    """Trained on D_r: from the original's weights (`finetuned`, at the rate of relearning) or anew (`scratch`)."""
    ((original,),) = place.given
    scenario, started = original["scenario"], time.monotonic()
    data = bench(SCENARIOS[scenario][0])
    child = load(original, place)
    if cell["how"] == "scratch":
        torch.manual_seed(cell["seed"])
        child = Classifier(child.spec).to(place.device)
        how = TrainingSchedule(epochs=cell["epochs"], seed=cell["seed"], precision="auto")
    else:
        how = TrainingSchedule(
            cell["epochs"], 64, 0.003, weight_decay=2e-5, one_cycle=False, seed=cell["seed"], precision="auto"
        )
    rest = data.train.take(~erased_of(scenario, FULL, cell["seed"]))
    fit(child, rest.pixels, rest.labels, how, flip=child.spec.flip)
    row = {"seed": cell["seed"], "scenario": scenario, "arch": original["arch"], "how": cell["how"],
           "epochs": cell["epochs"]}  # fmt: skip
    return [row | {"seconds": time.monotonic() - started, **measured(scenario, child)}]


def _generator(cell: Cell, place: Place) -> list[Row]:
    ((original,),) = place.given
    recipe, started = Recipe.model_validate({"invert": cell["invert"]}).invert, time.monotonic()
    heard: dict[str, float] = {}
    judge = load(original, place)
    made = invert.invert(judge, recipe, invert.begin(judge, recipe), lambda step, steps, losses: heard.update(losses))
    row = {"seed": cell["seed"], "scenario": original["scenario"], "arch": original["arch"],
           "weights": place.store.put(made.to_bytes())}  # fmt: skip
    return [row | {"seconds": time.monotonic() - started, **{f"loss_{name}": value for name, value in heard.items()}}]


def _gan(cell: Cell, place: Place) -> list[Row]:
    scenario, started = cell["scenario"], time.monotonic()
    data = bench(SCENARIOS[scenario][0])
    labels = mnist.labels(data, poisoned(scenario), cell["seed"])
    spec = mnist.spec_of(data, "lenet5")  # a generator asks for its shape and classes alone
    recipe = GanRecipe(**{**cell["gan"], "betas": tuple(cell["gan"]["betas"])})
    made = train_gan(spec, data.train.pixels, labels, recipe, place.device)
    row = {"seed": cell["seed"], "scenario": scenario, "weights": place.store.put(made.to_bytes())}
    return [row | {"seconds": time.monotonic() - started}]


def _dataset(cell: Cell, place: Place) -> list[Row]:
    (original,), (inverter,) = place.given
    recipe, started = Recipe.model_validate({"synthesize": cell["synthesize"]}), time.monotonic()
    judge = load(original, place)
    made = load_generator(inverter, judge.spec, place)
    drawn, told = synthesize(judge, made, recipe.synthesize)
    every = torch.ones(len(drawn), dtype=torch.bool)
    starved = starved_classes(told["count"], recipe.synthesize)
    allowed = every[:, None].expand(-1, judge.spec.classes)
    metrics = evaluate.generator_metrics(judge, drawn, told, allowed, every, [], starved)
    keys = ("acceptance", "coverage", "bn_distance", "agreement")
    row = {"seed": cell["seed"], "scenario": original["scenario"], "arch": original["arch"],
           "generator": inverter["weights"],
           "dataset": place.store.put(drawn.to_bytes()), "starved": starved, **{key: metrics[key] for key in keys},
           "refused": "; ".join(refuse_generator(metrics, recipe.gate))}  # fmt: skip
    return [row | {"seconds": time.monotonic() - started}]


def _erasure(cell: Cell, place: Place) -> list[Row]:
    """Filter and relearn on D'; where that ends without a result, the original stands, with the reason."""
    (original,), (drawn,) = place.given
    scenario, started = original["scenario"], time.monotonic()
    data, what, _ = SCENARIOS[scenario]
    behaviour, pixels = target_samples(bench(data), what, cell["seed"], cell["rho"])
    recipe = Recipe.model_validate({**cell["recipe"], "relearn": {**cell["recipe"]["relearn"], "seed": cell["seed"]}})
    spec = ModelSpec.model_validate_json(original["spec"])
    target = ErasureTarget("cell", behaviour, place.store.put(save_samples(pixels)))
    order = WorkOrder(spec, original["weights"], original["weights"], (target,), recipe)
    saved = RunState(use="trained", generator=drawn["generator"], dataset=drawn["dataset"],
                  metrics={"starved": drawn["starved"]})  # fmt: skip
    outcome = unlearn(order, place.store, place.device, state=saved)
    refused = outcome.reason or refuse_result(outcome.targets[0].report, recipe.gate) or ""
    weights = outcome.weights or original["weights"]
    child = load({"spec": original["spec"], "weights": weights}, place)
    row = {"seed": cell["seed"], "scenario": scenario, "arch": original["arch"], "variant": cell.get("variant"),
           "rho": cell["rho"], "generator": drawn["refused"], "coverage": drawn["coverage"],
           "acceptance": drawn["acceptance"], "refused": refused.partition(":")[0], "weights": weights,
           "before_D_r": original["D_r"], "before_D_e": original["D_e"]}  # fmt: skip
    return [row | {"seconds": time.monotonic() - started, **measured(scenario, child)}]


def _fisher(cell: Cell, place: Place) -> list[Row]:
    """A row for each strength of the noise, by the information on `samples` training images that are not of D_e,rho."""
    ((original,),) = place.given
    scenario, started, judge = original["scenario"], time.monotonic(), load(original, place)
    kept = (~erased_of(scenario, cell["rho"], cell["seed"])).nonzero().flatten()
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(cell["seed"]))
    pixels = bench(SCENARIOS[scenario][0]).train.pixels
    known = fisher.information(judge, pixels[kept[order[: cell["samples"]]]])
    took = time.monotonic() - started
    rows = []
    for alpha in cell["alphas"]:
        made = fisher.scrub(judge, known, alpha, cell["seed"])
        row = {"seed": cell["seed"], "scenario": scenario, "arch": original["arch"], "rho": cell["rho"]}
        row |= {"alpha": alpha, "seconds": took}
        rows.append(row | measured(scenario, made))
    return rows


def _original(cell: Cell) -> list[Work]:
    return [("classifier", cell["classifier"])]


def teacher(drawn: Cell) -> Work:
    """The cell of the classifier that labels a D', and that an erasure on it unlearns."""
    return "classifier", drawn["classifier"] if "classifier" in drawn else drawn["generator"]["classifier"]


def _drawn_from(cell: Cell) -> list[Work]:
    return [teacher(cell), ("gan" if "gan" in cell["generator"] else "generator", cell["generator"])]


def _erased_on(cell: Cell) -> list[Work]:
    return [teacher(cell["dataset"]), ("dataset", cell["dataset"])]


PIECES = {
    "classifier": Piece(_classifier, gpu=True),
    "oracle": Piece(_oracle, _original, gpu=True),
    "fisher": Piece(_fisher, _original, gpu=True),
    "generator": Piece(_generator, _original, gpu=True),
    "gan": Piece(_gan, gpu=True),
    "dataset": Piece(_dataset, _drawn_from, gpu=True),
    "erasure": Piece(_erasure, _erased_on, gpu=True),
}
