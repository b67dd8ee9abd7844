"""Which generator is offered to which run, and what a run is told of earlier erasures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fsu_ray.recipes import FilterRecipe, InvertRecipe, Recipe, RelearnRecipe, SynthesizeRecipe
from fsu_ray.storage.registry import GeneratorCandidates, earlier_erasures, offer


def offered(driver: Any, recipe: Recipe | None = None) -> GeneratorCandidates:
    ledger, base = driver.ledger, driver.ledger.models.version(driver.name)
    return offer(
        ledger, ledger.models.get(driver.name), base, ledger.models.sealed_root(driver.name, base), recipe or Recipe()
    )


def in_force(ledger: Any, number: int | None = None) -> Any:
    base = ledger.models.version("digits", number)
    return earlier_erasures(ledger, ledger.models.get("digits"), base, ledger.models.sealed_root("digits", base))


def test_a_new_line_is_offered_nothing(driver: Any) -> None:
    assert offered(driver) == GeneratorCandidates(None, None)


def test_the_generator_of_the_line_is_offered_with_its_dataset(driver: Any) -> None:
    driver.erase()
    (generator,) = driver.ledger.generators.all()

    reuse = offered(driver).reuse
    assert reuse is not None
    assert (reuse.id, reuse.weights, reuse.dataset) == (generator.id, generator.weights, generator.dataset)
    assert reuse.metrics == generator.metrics
    assert offered(driver).warm == reuse


def test_the_newest_is_offered(driver: Any) -> None:
    driver.erase("nine", 9)
    driver.erase("four", 4)

    _, newest = driver.ledger.generators.all()
    found = offered(driver)
    assert found.reuse == found.warm
    assert found.reuse is not None
    assert found.reuse.id == newest.id


@pytest.mark.parametrize(
    ("recipe", "reused"),
    [
        (Recipe(relearn=RelearnRecipe(epochs=2), filter=FilterRecipe(metric="l2")), True),
        (Recipe(invert=InvertRecipe(seed=1)), False),
        (Recipe(synthesize=SynthesizeRecipe(per_class=7)), False),
    ],
    ids=["relearning and filter", "inversion", "synthesis"],
)
def test_another_recipe_of_generator_or_dataset_is_not_reused(driver: Any, recipe: Recipe, reused: bool) -> None:
    driver.erase()
    found = offered(driver, recipe)
    assert (found.reuse is not None) == reused
    assert found.warm is not None


def test_a_new_root_asks_for_a_new_dataset(driver: Any) -> None:
    driver.erase("nine", 9)
    driver.ledger.models.add_version("digits", "from outside")
    (old,) = driver.ledger.generators.all()

    found = offered(driver)
    assert found.reuse is None
    assert found.warm is not None
    assert found.warm.id == old.id
    driver.erase("four", 4, generator_use="warm_started", warm_started_from=old.id)
    reuse = offered(driver).reuse
    assert reuse is not None
    assert reuse.id == driver.ledger.generators.all()[-1].id


def test_a_generator_that_starved_a_class_is_passed_over(driver: Any) -> None:
    driver.erase("nine", 9)
    driver.submit("four", 4)
    request = driver.claim()
    outcome = driver.outcome(request, metrics={"starved": [4]}, weights=None, mask=None, probes=None, reason="starved")
    driver.ledger.reject(request, "starved_class", outcome, driver.ledger.models.version("digits"))
    good, starved = driver.ledger.generators.all()

    found = offered(driver)
    assert found.reuse is not None
    assert found.warm is not None
    assert (found.reuse.id, found.warm.id) == (good.id, starved.id)


def test_generators_serve_their_own_line(driver: Any, new_driver: Callable[..., Any]) -> None:
    driver.erase()
    assert offered(new_driver("other")) == GeneratorCandidates(None, None)


@pytest.mark.parametrize("changes", [{"channels": 3}, {"height": 28}, {"classes": 11}])
def test_generators_serve_their_own_shape_and_classes(driver: Any, changes: dict[str, int]) -> None:
    driver.erase()
    model = driver.ledger.models.get("digits")
    spec = model.spec.model_copy(update=changes)
    grown = type(model)(model.id, model.name, spec, model.test_set, model.created_at)

    base = driver.ledger.models.version("digits")
    assert offer(driver.ledger, grown, base, base, Recipe()) == GeneratorCandidates(None, None)


def test_the_papers_form_trains_anew(driver: Any) -> None:
    driver.erase(recipe=Recipe(form="paper"))
    assert offered(driver, Recipe(form="paper")) == GeneratorCandidates(None, None)
    assert offered(driver).reuse is None


def test_priors_are_the_erasures_in_force(driver: Any) -> None:
    ledger = driver.ledger
    assert in_force(ledger) == ()
    recipe = Recipe(filter=FilterRecipe(policy="knee", metric="cosine"))
    driver.erase("crossed", 7, kind="subset", recipe=recipe, report={"forgetting": {"probes_in_target": 0.04}})
    (generator,) = ledger.generators.all()
    unmeasured = {"forgetting": {"probes_in_target": None}}
    driver.erase("nine", 9, generator_use="reused", generator_id=generator.id, report=unmeasured)

    first, second = ledger.models.erasures("digits")
    found = in_force(ledger)

    assert [(prior.request, prior.behaviour, prior.samples) for prior in found] == [
        (erasure.request, erasure.behaviour, erasure.samples) for erasure in (first, second)
    ]
    assert [(prior.mask, prior.probes) for prior in found] == [(e.mask, e.probes) for e in (first, second)]
    assert [prior.filter for prior in found] == [recipe.filter, FilterRecipe()]
    assert [prior.dataset for prior in found] == [generator.dataset] * 2
    assert [prior.recorded for prior in found] == [0.04, 0.0]
    assert in_force(ledger, 2) == found[:1]
