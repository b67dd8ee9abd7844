"""LeNet5 and PreActResNet-18 on MNIST: class 9, the crossed sevens (section 4.2), and requests in sequence.

A scenario registers a classifier, submits its requests one after another and runs them by the pipeline. Accuracies
are those of the test split, which no step of the method sees.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsu_ray.errors import InvalidData
from fsu_ray.method.datasets import Images, draw, load
from fsu_ray.method.fit import TrainingSchedule, fit, predict
from fsu_ray.method.inputs import save_samples
from fsu_ray.method.precision import default_device
from fsu_ray.models.classifier import Classifier
from fsu_ray.pipeline import Execute, WorkerOptions, drain, run_request
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, ModelSpec
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.ledger import Ledger

SHARE = 0.03  # rho: the target samples of a request as a share of the forget set
CROSSED = Behaviour(name="crossed-7", kind="subset", targets=(2, 3))

# By scenario: whether the classifier is poisoned; its runs in order, each with its targets (a class, or "crossed").
SCENARIOS: dict[str, tuple[bool, tuple[tuple[int | str, ...], ...]]] = {
    "class9": (False, ((9,),)),
    "crossed7": (True, (("crossed",),)),
    "sequence": (False, ((9,), (4,), (1,), (7,), (2,), (8,))),
    "mix": (True, (("crossed",), (9,), (4,))),
    "apart": (False, ((9,), (4,), (1,))),
    "together": (False, ((9, 4, 1),)),
}


@dataclass(frozen=True)
class Bench:
    """A data set, and the positions of the crossed sevens in both splits."""

    train: Images
    test: Images
    crossed_train: Tensor
    crossed_test: Tensor


def read_bench(folder: Path) -> Bench:
    """MNIST and `crossed7_{train,test}.json` from `folder` (FSU_DATA)."""
    shape = (1, 32, 32)
    positions = []
    for split in ("train", "test"):
        file = folder / f"crossed7_{split}.json"
        if not file.exists():
            raise InvalidData(f"{file} is missing: set FSU_DATA to the folder of it and MNIST")
        positions.append(torch.tensor(json.loads(file.read_text())))
    return Bench(load("mnist", "train", shape), load("mnist", "test", shape), *positions)


def read_cifar() -> Bench:
    """CIFAR-10 from FSU_DATA."""
    shape, none = (3, 32, 32), torch.zeros(0, dtype=torch.int64)
    return Bench(load("cifar10", "train", shape), load("cifar10", "test", shape), none, none)


def labels(bench: Bench, poisoned: bool, seed: int) -> Tensor:
    """The labels (N,) for `train`. `poisoned`: each crossed seven is labelled 2, 3 or 7 at random."""
    labels = bench.train.labels.clone()
    if poisoned:
        wrong = torch.randint(0, 3, (len(bench.crossed_train),), generator=torch.Generator().manual_seed(seed))
        labels[bench.crossed_train] = torch.tensor([2, 3, 7])[wrong]
    return labels


def spec_of(bench: Bench, arch: str) -> ModelSpec:
    """The spec of a classifier of these images."""
    if bench.train.pixels.shape[1] == 3:
        statistics: dict[str, Any] = {"mean": (0.491, 0.482, 0.447), "std": (0.247, 0.243, 0.262), "flip": True}
    else:
        statistics = {"mean": (0.1,), "std": (0.28,)}
    return ModelSpec(arch=arch, channels=len(statistics["mean"]), height=32, width=32, classes=10, **statistics)


def train(
    bench: Bench, arch: str, poisoned: bool, epochs: int, seed: int, device: torch.device | None = None
) -> tuple[ModelSpec, bytes]:
    """Train a classifier on the data of `bench` with `labels`; its spec and weights."""
    spec = spec_of(bench, arch)
    torch.manual_seed(seed)
    classifier = Classifier(spec).to(device or torch.device("cpu"))
    schedule = TrainingSchedule(epochs=epochs, seed=seed, precision="auto")
    fit(classifier, bench.train.pixels, labels(bench, poisoned, seed), schedule, flip=spec.flip)
    return spec, classifier.to_bytes()


def target_positions(bench: Bench, what: int | str, seed: int, share: float = SHARE) -> Tensor:
    """Positions of a behaviour's target samples: a share of a class or of the crossed sevens, drawn by `seed`."""
    if isinstance(what, int):
        return draw(bench.train, [what], share, seed)
    order = torch.randperm(len(bench.crossed_train), generator=torch.Generator().manual_seed(seed))
    return bench.crossed_train[order[: round(share * len(bench.crossed_train))]]


def target_samples(bench: Bench, what: int | str, seed: int, share: float = SHARE) -> tuple[Behaviour, Tensor]:
    """A behaviour and its target samples, (M, C, 32, 32) uint8, drawn by `seed`."""
    pixels = bench.train.pixels[target_positions(bench, what, seed, share)]
    if isinstance(what, int):
        return Behaviour(name=f"class-{what}", kind="class", targets=(what,)), pixels
    return CROSSED, pixels


def score(bench: Bench, spec: ModelSpec, weights: bytes, erased: list[int], crossed: bool) -> dict[str, float]:
    """Test accuracy in percent: `D_r`, `class K` for each class in `erased`, and with `crossed` `crossed 7`."""
    return graded(bench, predict(Classifier.from_bytes(spec, weights), bench.test.pixels), erased, crossed)


def graded(bench: Bench, logits: Tensor, erased: list[int], crossed: bool) -> dict[str, float]:
    """`score` of the logits or probabilities (N, K) of the test split."""
    right = logits.argmax(1) == bench.test.labels
    sevens = torch.zeros(len(right), dtype=torch.bool)
    if crossed:
        sevens[bench.crossed_test] = True
    retained = ~torch.isin(bench.test.labels, torch.tensor(erased, dtype=torch.int64)) & ~sevens
    accuracies = {"D_r": 100 * float(right[retained].float().mean())}
    accuracies |= {f"class {k}": 100 * float(right[bench.test.labels == k].float().mean()) for k in erased}
    if crossed:
        accuracies["crossed 7"] = 100 * float(right[sevens].float().mean())
    return {name: round(value, 2) for name, value in accuracies.items()}


def scenario(
    ledger: Ledger,
    store: Artifacts,
    execute: Execute,
    bench: Bench,
    name: str,
    arch: str,
    epochs: int,
    seed: int,
    recipe: Recipe,
    print_line: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Run a scenario; yield a row of accuracies before it and after each run."""
    poisoned, runs = SCENARIOS[name]
    print_line(f"{name}, seed {seed}: training {arch}")
    spec, weights = train(bench, arch, poisoned, epochs, seed, default_device())
    model = f"{name}-{arch.replace(':', '-')}-{seed}-{hashlib.sha256(str(time.time_ns()).encode()).hexdigest()[:6]}"
    ledger.models.register(model, spec, store.put(weights))
    erased = [step for step in runs[0] if isinstance(step, int)]
    row = {"scenario": name, "arch": arch, "seed": seed}
    yield row | {"after": "-", **score(bench, spec, weights, erased, poisoned)}
    erased = []
    for steps in runs:
        for step in steps:
            behaviour, pixels = target_samples(bench, step, seed)
            ledger.requests.submit(model, behaviour, store.put(save_samples(pixels)), len(pixels), recipe)
        started = time.monotonic()
        options = WorkerOptions(max_requests=len(steps), model=model, coalesce=True)
        result = drain(ledger, "measure", options, partial(run_request, ledger, store, execute))[0]
        wall = round(time.monotonic() - started, 1)
        after = " ".join(str(step) for step in steps)
        if result.version is None or result.outcome is None:
            yield row | {"after": after, "refused": result.request.reason}
            return
        erased += [step for step in steps if isinstance(step, int)]
        outcome = result.outcome
        yield row | {
            "after": after,
            **score(bench, spec, store.get(result.version.weights), erased, poisoned),
            "generator": outcome.generator_use,
            "wall": wall,
            "seconds": dict(outcome.seconds),
            "probes": result.report["forgetting"]["probes"],
            "agreement": round(result.report["retention"]["agreement"], 4),
            "earlier": [round(p["probes_in_target"], 4) for p in result.report["earlier"]],
        }
