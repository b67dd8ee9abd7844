"""EUBO and RKL on MNIST (section 4.2): a cell is one of the two methods on a classifier with a Bayesian last layer.

A `bayes` cell has `classifier`, the cell of the original; `method`, "eubo" or "rkl"; `lambdas`, each a number or a
string like "1e-400" that no float can hold, with a row for each; `rho` and `seed`, which draw D_e,rho; `learning`, the
settings for q_full (`last_layer.Learning`); and `steps`, `samples`, `lr`, `batch` (EUBO) or `batches` (RKL).

q_full learns all of the training data, D_e with the labels that the original learned. EUBO and RKL see q_full and
D_e,rho alone. Choosing a lambda by the D_r and D_e of its row is tuning with data that no unlearner has.

A row has `D_r` and `D_e` (test accuracy in percent of the mean prediction over draws), `mean_D_r` and `mean_D_e` (of
the classifier whose last layer is q's mean), `full_D_r` and `full_D_e` (of q_full, the Bayesian original), `lambda` as
a string, `kl` (of q from q_full, nats), `worth` (RKL: effective sample size of a batch of 1,000 draws), `refused` (why
there is no q; the row is q_full's then), `seconds` of this lambda, and `learning_seconds` of features and q_full.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from decimal import Decimal
from typing import Any

from torch import Tensor

from fsu_ray.errors import InvalidConfig
from fsu_ray.experiments import images, mnist
from fsu_ray.experiments.catalogue import Cell, CellContext, CellType, Row, Work
from fsu_ray.method.baselines import last_layer
from fsu_ray.method.baselines.last_layer import Learning
from fsu_ray.method.baselines.variational import Descent, Diagonal
from fsu_ray.models.classifier import Classifier
from fsu_ray.records import ModelSpec

DRAWS = 100  # from q, for a prediction
SETTINGS: dict[str, dict[str, Any]] = {
    "eubo": {"lambdas": ["0"], "steps": 1000, "samples": 4, "lr": 0.03, "batch": 1000},
    "rkl": {"lambdas": ["0"], "batches": 100},
}
"""Default settings of a cell. The paper takes lambda = 0 for Table 2."""


def bayes_cell(original: Cell, method: str, rho: float, draw: int | None = None, **settings: Any) -> Work:
    """The cell of EUBO or RKL on `original`, given a share `rho` of D_e, drawn by `draw` or by the original's seed.

    `settings` override `SETTINGS` and, under `learning`, `Learning`. Raises InvalidConfig for an unknown method or
    setting.
    """
    if method not in SETTINGS:
        raise InvalidConfig(f"{method!r} is not a method: take eubo or rkl")
    known = SETTINGS[method] | {"learning": asdict(Learning())}
    settings["learning"] = known["learning"] | settings.get("learning", {})
    if unknown := settings.keys() - known.keys() or settings["learning"].keys() - asdict(Learning()).keys():
        raise InvalidConfig(f"{method} has no setting {min(unknown)!r}")
    seed = original["seed"] if draw is None else draw
    return "bayes", {"classifier": original, "method": method, "rho": rho, "seed": seed, **known, **settings}


def lambda_at(original: Cell, share: float) -> str:
    """A lambda for `lambdas`: it cuts EUBO's likelihood where half the squared distance from q_full is about `share`
    times D / 2 (`last_layer.cut_at`), where D is the size of the last layer."""
    channels = 3 if images.SCENARIOS[original["scenario"]][0] == "cifar10" else 1
    size = {"channels": channels, "height": 32, "width": 32, "classes": 10}
    spec = ModelSpec(arch=original["arch"], mean=(0.0,) * channels, std=(1.0,) * channels, **size)
    return f"{last_layer.cut_at(share, len(last_layer.weights(Classifier(spec)))):.6e}"


def _bayes(cell: Cell, context: CellContext) -> list[Row]:
    ((original,),) = context.needs
    scenario, seed, started = original["scenario"], cell["seed"], time.monotonic()
    data = images.bench(images.SCENARIOS[scenario][0])
    classifier = images.load(original, context)
    x, tests = (last_layer.features(classifier, split.pixels) for split in (data.train, data.test))
    y = mnist.labels(data, images.poisoned(scenario), original["seed"]).to(x.device)
    full = last_layer.posterior(x, y, last_layer.weights(classifier), Learning(**cell["learning"]), seed)
    erased = images.erased_of(scenario, cell["rho"], seed).to(x.device)
    row: Row = {"seed": seed, "scenario": scenario, "arch": original["arch"]}
    row |= {"method": cell["method"], "rho": cell["rho"]}
    row |= {"learning_seconds": time.monotonic() - started, **_named("full_", _accuracy(scenario, full, tests))}
    rows = []
    for cut in cell["lambdas"]:
        started = time.monotonic()
        unlearned = _unlearn(cell, full, x[erased], y[erased], Decimal(str(cut)))
        q, seconds = unlearned.pop("q"), time.monotonic() - started
        mean = images.measured(scenario, last_layer.install(classifier, q))
        row |= {"lambda": str(cut), "kl": float(q.kl(full)), "seconds": seconds, **_named("mean_", mean), **unlearned}
        rows.append(row | _accuracy(scenario, q, tests))
    return rows


def _unlearn(cell: Cell, full: Diagonal, x: Tensor, y: Tensor, cut: Decimal) -> dict[str, Any]:
    """`q`, the reason if it is q_full, and RKL's effective sample size."""
    try:
        if cell["method"] == "eubo":
            how = Descent(cell["steps"], cell["samples"], cell["lr"])
            q, worth = last_layer.eubo(full, x, y, cut, cell["seed"], how, cell["batch"]), None
        else:
            q, worth = last_layer.rkl(full, x, y, cut, cell["seed"], cell["batches"])
    except InvalidConfig as error:
        return {"q": full, "worth": None, "refused": str(error)}
    return {"q": q, "worth": worth, "refused": ""}


def _accuracy(scenario: str, q: Diagonal, tests: Tensor) -> dict[str, float]:
    return images.graded(scenario, last_layer.averaged(q, tests, DRAWS).cpu())


def _named(prefix: str, accuracies: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in accuracies.items()}


def _original(cell: Cell) -> list[Work]:
    return [("classifier", cell["classifier"])]


CELL_TYPES = {"bayes": CellType(_bayes, _original, gpu=True)}
