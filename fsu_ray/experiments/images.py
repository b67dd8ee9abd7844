"""The pieces of the tables on MNIST: a classifier, an oracle, a generator, its D', an erasure. Each is a cell.

Each rests on the one before, so that tables share what they have in common: a generator is trained once, whatever is
done with it afterwards. A cell names what it rests on by that one's whole cell.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fsu_ray.config import make_recipe
from fsu_ray.experiments.catalogue import Cell, Piece, Place, Row, Scale, Work
from fsu_ray.experiments.mnist import Bench, read_bench, score, target_positions, target_samples, train
from fsu_ray.gate import refuse_generator, refuse_result
from fsu_ray.method import evaluate, invert
from fsu_ray.method.baselines import fisher
from fsu_ray.method.context import Saved, save_samples
from fsu_ray.method.fit import Schedule, fit
from fsu_ray.method.networks import Classifier, Generator
from fsu_ray.method.synthesize import starved_classes, synthesize
from fsu_ray.method.unlearn import unlearn
from fsu_ray.recipes import Recipe
from fsu_ray.records import ModelSpec
from fsu_ray.work import WorkOrder

FEW, FULL = 0.03, 1.0
"""rho of few-shot and of full-shot unlearning."""
DE = {"class9": "class 9", "crossed7": "crossed 7"}
"""What `score` calls D_e of a scenario."""
EPOCHS = {"small": 6, "paper": 20}
"""Of a classifier."""
INVERT: dict[str, dict[str, Any]] = {"small": {}, "paper": {"steps": 7000, "width": 16}}
"""What differs from the default inversion: the paper's length and width at its scale."""


@functools.cache
def bench() -> Bench:
    """MNIST from FSU_DATA, read once a process."""
    return read_bench(Path(os.environ.get("FSU_DATA", ".")))


def classifier(scenario: str, arch: str, seed: int, scale: Scale) -> Cell:
    """The cell of a scenario's original."""
    return {"scenario": scenario, "arch": arch, "epochs": EPOCHS[scale], "seed": seed}


def generator(original: Cell, changes: dict[str, Any]) -> Cell:
    """The cell of an inverter of `original`, by the default `invert` under `changes`."""
    recipe = make_recipe("default", [{"invert": {"seed": original["seed"], **changes}}])
    return {"classifier": original, "invert": recipe.invert.model_dump(mode="json"), "seed": original["seed"]}


def dataset(inverter: Cell, changes: dict[str, Any]) -> Cell:
    """The cell of D' drawn from `inverter`."""
    recipe = make_recipe("default", [{"synthesize": {"seed": inverter["seed"], **changes}}])
    return {"generator": inverter, "synthesize": recipe.synthesize.model_dump(mode="json"), "seed": inverter["seed"]}


def erasure(drawn: Cell, rho: float, changes: dict[str, Any]) -> Work:
    """An erasure of the scenario's D_e, of which a share `rho` is given, on D'; by the rest of the recipe."""
    recipe = make_recipe("default", [changes]).model_dump(mode="json")
    rest = {part: recipe[part] for part in ("form", "filter", "relearn", "gate")}
    return "erasure", {"dataset": drawn, "rho": rho, "recipe": rest, "seed": drawn["seed"]}


def _classifier(cell: Cell, place: Place) -> list[Row]:
    scenario, started = cell["scenario"], time.monotonic()
    spec, weights = train(bench(), cell["arch"], scenario == "crossed7", cell["epochs"], cell["seed"], place.device)
    row = {
        "seed": cell["seed"],
        "scenario": scenario,
        "spec": spec.model_dump_json(),
        "weights": place.store.put(weights),
    }
    return [row | {"seconds": time.monotonic() - started, **measured(scenario, spec, weights)}]


def measured(scenario: str, spec: ModelSpec, weights: bytes) -> dict[str, float]:
    """Test accuracy in percent on `D_r` and `D_e`."""
    crossed = scenario == "crossed7"
    found = score(bench(), spec, weights, [] if crossed else [9], crossed)
    return {"D_r": found["D_r"], "D_e": found[DE[scenario]]}


def erased_of(scenario: str, rho: float, seed: int) -> Tensor:
    """(N,) bool: which images of the training set are D_e,rho; the same that `target_samples` gives."""
    data, erased = bench(), torch.zeros(len(bench().train), dtype=torch.bool)
    erased[target_positions(data, "crossed" if scenario == "crossed7" else 9, seed, rho)] = True
    return erased


def _load(row: Row, place: Place) -> Classifier:
    found = Classifier.from_bytes(ModelSpec.model_validate_json(row["spec"]), place.store.get(row["weights"]))
    return found.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _oracle(cell: Cell, place: Place) -> list[Row]:
    """Trained on D_r: from the original's weights (`finetuned`, at the rate of relearning) or anew (`scratch`)."""
    ((original,),) = place.given
    scenario, data, started = original["scenario"], bench(), time.monotonic()
    child = _load(original, place)
    if cell["how"] == "scratch":
        torch.manual_seed(cell["seed"])
        child = Classifier(child.spec).to(place.device)
        how = Schedule(epochs=cell["epochs"], seed=cell["seed"], precision="auto")
    else:
        how = Schedule(
            cell["epochs"], 64, 0.003, weight_decay=2e-5, one_cycle=False, seed=cell["seed"], precision="auto"
        )
    rest = data.train.take(~erased_of(scenario, FULL, cell["seed"]))
    fit(child, rest.pixels, rest.labels, how)
    row = {"seed": cell["seed"], "scenario": scenario, "how": cell["how"], "epochs": cell["epochs"]}
    return [row | {"seconds": time.monotonic() - started, **measured(scenario, child.spec, child.to_bytes())}]


def _generator(cell: Cell, place: Place) -> list[Row]:
    ((original,),) = place.given
    recipe, started = Recipe.model_validate({"invert": cell["invert"]}).invert, time.monotonic()
    heard: dict[str, float] = {}
    judge = _load(original, place)
    made = invert.invert(judge, recipe, invert.begin(judge, recipe), lambda step, steps, losses: heard.update(losses))
    tensors = {name: t.detach().cpu().contiguous() for name, t in made.state_dict().items()}
    row = {"seed": cell["seed"], "scenario": original["scenario"], "weights": place.store.put(save_tensors(tensors))}
    return [row | {"seconds": time.monotonic() - started, **{f"loss_{name}": value for name, value in heard.items()}}]


def _dataset(cell: Cell, place: Place) -> list[Row]:
    (original,), (inverter,) = place.given
    recipe, started = Recipe.model_validate({"synthesize": cell["synthesize"]}), time.monotonic()
    shape = Recipe.model_validate({"invert": cell["generator"]["invert"]}).invert
    judge = _load(original, place)
    made = Generator(judge.spec, shape.width, shape.latent)
    made.load_state_dict(load_tensors(place.store.get(inverter["weights"])))
    drawn, told = synthesize(judge, made.to(place.device, memory_format=torch.channels_last), recipe.synthesize)  # type: ignore[call-overload]
    every = torch.ones(len(drawn), dtype=torch.bool)
    starved = starved_classes(told["count"], recipe.synthesize)
    allowed = every[:, None].expand(-1, judge.spec.classes)
    figures = evaluate.generator_figures(judge, drawn, told, allowed, every, [], starved)
    keys = ("acceptance", "coverage", "bn_distance", "agreement")
    row = {"seed": cell["seed"], "scenario": inverter["scenario"], "generator": inverter["weights"],
           "dataset": place.store.put(drawn.to_bytes()), "starved": starved, **{key: figures[key] for key in keys},
           "refused": "; ".join(refuse_generator(figures, recipe.gate))}  # fmt: skip
    return [row | {"seconds": time.monotonic() - started}]


def _erasure(cell: Cell, place: Place) -> list[Row]:
    """Filter and relearn on D'; where that ends without a result, the original stands, with the reason."""
    (original,), (drawn,) = place.given
    scenario, started = original["scenario"], time.monotonic()
    what = "crossed" if scenario == "crossed7" else 9
    behaviour, pixels = target_samples(bench(), what, cell["seed"], cell["rho"])
    recipe = Recipe.model_validate({**cell["recipe"], "relearn": {**cell["recipe"]["relearn"], "seed": cell["seed"]}})
    spec = ModelSpec.model_validate_json(original["spec"])
    order = WorkOrder("cell", spec, original["weights"], original["weights"], behaviour,
                      place.store.put(save_samples(pixels)), recipe)  # fmt: skip
    saved = Saved(use="trained", generator=drawn["generator"], dataset=drawn["dataset"],
                  figures={"starved": drawn["starved"]})  # fmt: skip
    outcome = unlearn(order, place.store, place.device, saved=saved)
    refused = outcome.reason or refuse_result(outcome.report, recipe.gate) or ""
    weights = outcome.weights or original["weights"]
    row = {"seed": cell["seed"], "scenario": scenario, "variant": cell.get("variant"), "rho": cell["rho"],
           "refused": refused.partition(":")[0], "weights": weights,
           "before_D_r": original["D_r"], "before_D_e": original["D_e"]}  # fmt: skip
    return [row | {"seconds": time.monotonic() - started, **measured(scenario, spec, place.store.get(weights))}]


def _fisher(cell: Cell, place: Place) -> list[Row]:
    """A row for each strength of the noise, by the information on `samples` training images that are not of D_e,rho."""
    ((original,),) = place.given
    scenario, started, judge = original["scenario"], time.monotonic(), _load(original, place)
    kept = (~erased_of(scenario, cell["rho"], cell["seed"])).nonzero().flatten()
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(cell["seed"]))
    known = fisher.information(judge, bench().train.pixels[kept[order[: cell["samples"]]]])
    took = time.monotonic() - started
    rows = []
    for alpha in cell["alphas"]:
        made = fisher.scrub(judge, known, alpha, cell["seed"])
        row = {"seed": cell["seed"], "scenario": scenario, "rho": cell["rho"], "alpha": alpha, "seconds": took}
        rows.append(row | measured(scenario, judge.spec, made.to_bytes()))
    return rows


def _original(cell: Cell) -> list[Work]:
    return [("classifier", cell["classifier"])]


def _drawn_from(cell: Cell) -> list[Work]:
    return [("classifier", cell["generator"]["classifier"]), ("generator", cell["generator"])]


def _erased_on(cell: Cell) -> list[Work]:
    return [("classifier", cell["dataset"]["generator"]["classifier"]), ("dataset", cell["dataset"])]


PIECES = {
    "classifier": Piece(_classifier, gpu=True),
    "oracle": Piece(_oracle, _original, gpu=True),
    "fisher": Piece(_fisher, _original, gpu=True),
    "generator": Piece(_generator, _original, gpu=True),
    "dataset": Piece(_dataset, _drawn_from, gpu=True),
    "erasure": Piece(_erasure, _erased_on, gpu=True),
}
