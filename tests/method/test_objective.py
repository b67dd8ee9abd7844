"""The objective of the search: its parts by hand, good recipes above bad ones, and no gain from a collapse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsu_ray.method import invert
from fsu_ray.method.datasets import draw
from fsu_ray.method.inputs import save_samples
from fsu_ray.method.objective import Objective, combine, reference
from fsu_ray.method.synthesize import trustworthy
from fsu_ray.models.classifier import Classifier
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour
from fsu_ray.search_space import apply
from fsu_ray.work import ErasureTarget, WorkOrder

RECIPE = apply(
    Recipe(),
    {
        "invert.steps": 200, "invert.batch": 60, "invert.width": 4, "synthesize.per_class": 40,
        "synthesize.starved_below": 0.02, "relearn.epochs": 6, "relearn.lr": 0.003,
    },
)  # fmt: skip
CPU = torch.device("cpu")


def test_the_score_is_what_the_module_says() -> None:
    """The harmonic mean of what is forgotten and what is kept; the root of coverage below a tenth; never a division by
    nothing."""
    assert combine(1.0, 1.0, 1.0, 0.1) == 1.0
    assert combine(1.0, 0.6, 0.2, 1.0) == pytest.approx(2 * 0.5 / 1.5)
    assert combine(1.0, 1.0, 1.0, 0.025) == pytest.approx(0.5)
    assert combine(0.0, 1.0, 1.0, 1.0) == combine(1.0, 0.0, 0.0, 1.0) == combine(0.0, 0.0, 0.0, 1.0) == 0.0


class Collapsed(nn.Module):
    """A generator that knows one image a class: that of another generator's which the classifier is surest of, turned
    or not."""

    latent = 100

    def __init__(self, generator: Any, classifier: Classifier) -> None:
        super().__init__()
        z, k = (
            torch.randn((1000, generator.latent), generator=torch.Generator().manual_seed(5)),
            classifier.spec.classes,
        )
        best = []
        with torch.no_grad():
            for label in range(k):
                pixels = generator(z, torch.full((1000,), label))
                passed, logits, uncertainty = trustworthy(classifier, pixels, RECIPE.synthesize)
                uncertainty[~passed | (logits.argmax(1) != label)] += 10.0
                best.append(pixels[uncertainty.argmin()])
        self.images = nn.Parameter(torch.stack(best))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.images[y]


@pytest.fixture
def order(trained: Any, store: Any) -> WorkOrder:
    """A request to erase class 8 from 12 samples."""
    weights = store.put(trained.weights)
    samples = store.put(save_samples(trained.train.pixels[draw(trained.train, [8], 12, 0)]))
    eight = Behaviour(name="eight", kind="class", targets=(8,))
    return WorkOrder(trained.spec, weights, weights, (ErasureTarget("r-1", eight, samples),), RECIPE)


@pytest.mark.slow
def test_good_recipes_are_above_bad_ones(order: WorkOrder, store: Any) -> None:
    """One that forgets nothing, one that wrecks the classifier, one whose D' starves and one whose generator has
    collapsed to an image a class, of which the classifier is sure: all are worth less than an honest one."""
    objective = Objective(order, store, CPU, reference(order, store, CPU, RECIPE))
    run = invert.begin(objective.teacher, RECIPE.invert)
    generator = invert.invert(objective.teacher, RECIPE.invert, run)
    good = objective.score(RECIPE, generator)
    assert good.score > 0.8
    assert good.reason == ""
    assert good == objective.score(RECIPE, generator)  # the same again

    idle = objective.score(apply(RECIPE, {"relearn.lr": 1e-7, "relearn.epochs": 1}), generator)
    assert idle.forgetting < 0.2
    assert (good.passed, idle.passed) == (1.0, 0.0)  # the gate's word
    assert idle.retention > 0.99
    wrecked = objective.score(apply(RECIPE, {"relearn.lr": 1.0}), generator)
    assert wrecked.retention < 0.5
    open_gate = {"gate.agreement_min": 0.0, "gate.forgotten_max": 1.0}
    let_in = objective.score(apply(RECIPE, {"relearn.lr": 1.0, **open_gate}), generator)
    assert let_in.score > 0
    assert wrecked == replace(let_in, passed=0.0, score=0.0)
    starved = objective.score(
        apply(RECIPE, {"synthesize.entropy_threshold": 1e-9, "synthesize.starved_below": 0.1}), generator
    )
    assert starved.reason.startswith("starved classes [")
    collapsed: Any = Collapsed(generator, objective.teacher)
    sure = objective.score(RECIPE, collapsed)
    assert sure.coverage == 1.0  # by its own D', nothing is wrong with it
    for bad in (idle, wrecked, starved, sure):
        assert bad.score < good.score - 0.01, (good, bad)


def test_a_subset_must_go_to_where_it_belongs(trained: Any, order: WorkOrder, store: Any) -> None:
    """Samples of class 8 that are to be no 1 and no 8 any more: what the root sees beneath is their home, and leaving
    for any other class does not count."""
    some = Behaviour(name="some", kind="subset", targets=(1, 8))
    recipe = apply(RECIPE, {"invert.steps": 10, "synthesize.entropy_threshold": 2.3, "filter.runner_up": 0.0})
    asked = replace(order, targets=(replace(order.targets[0], behaviour=some),), recipe=recipe)
    objective = Objective(asked, store, CPU, reference(asked, store, CPU, recipe))
    held = torch.ones(12, dtype=torch.bool)
    context = objective._inputs(recipe)

    class Always(nn.Module):
        """A classifier that answers one class."""

        def __init__(self, answer: Tensor) -> None:
            super().__init__()
            self.answer = nn.Parameter(answer.float())

        def forward(self, pixels: Tensor) -> Tensor:
            return self.answer[: len(pixels)] if self.answer.dim() == 2 else self.answer.expand(len(pixels), -1)

    one = nn.functional.one_hot(torch.arange(10), 10)
    shares = [objective._measure(context, Always(one[label]), held)[:2] for label in range(10)]  # type: ignore[arg-type]
    assert shares[1] == shares[8] == (0.0, 0.0)
    for column in zip(*shares, strict=True):
        assert sum(column) == pytest.approx(1.0)  # each sample has exactly one home
