"""Which generator is offered to which run, and what a run is told of earlier erasures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fsu_ray.recipes import FilterRecipe, InvertRecipe, Recipe, RelearnRecipe, SynthesizeRecipe
from fsu_ray.storage.registry import GeneratorCandidates, earlier_erasures, offer


def offered(line: Any, recipe: Recipe | None = None) -> GeneratorCandidates:
    ledger, base = line.ledger, line.ledger.models.version(line.name)
    return offer(
        ledger, ledger.models.get(line.name), base, ledger.models.sealed_root(line.name, base), recipe or Recipe()
    )


def in_force(ledger: Any, number: int | None = None) -> Any:
    base = ledger.models.version("digits", number)
    return earlier_erasures(ledger, ledger.models.get("digits"), base, ledger.models.sealed_root("digits", base))


def test_a_new_line_is_offered_nothing(line: Any) -> None:
    assert offered(line) == GeneratorCandidates(None, None)


def test_the_generator_of_the_line_is_offered_with_its_dataset(line: Any) -> None:
    line.erase()
    (generator,) = line.ledger.generators.all()

    reuse = offered(line).reuse
    assert reuse is not None
    assert (reuse.id, reuse.weights, reuse.dataset) == (generator.id, generator.weights, generator.dataset)
    assert reuse.metrics == generator.metrics
    assert offered(line).warm == reuse


def test_the_newest_is_offered(line: Any) -> None:
    line.erase("nine", 9)
    line.erase("four", 4)

    _, newest = line.ledger.generators.all()
    found = offered(line)
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
def test_another_recipe_of_generator_or_dataset_is_not_reused(line: Any, recipe: Recipe, reused: bool) -> None:
    line.erase()
    found = offered(line, recipe)
    assert (found.reuse is not None) == reused
    assert found.warm is not None


def test_a_new_root_asks_for_a_new_dataset(line: Any) -> None:
    line.erase("nine", 9)
    line.ledger.models.add_version("digits", "from outside")
    (old,) = line.ledger.generators.all()

    found = offered(line)
    assert found.reuse is None
    assert found.warm is not None
    assert found.warm.id == old.id
    line.erase("four", 4, generator_use="warm_started", warm_started_from=old.id)
    reuse = offered(line).reuse
    assert reuse is not None
    assert reuse.id == line.ledger.generators.all()[-1].id


def test_a_generator_that_starved_a_class_is_passed_over(line: Any) -> None:
    line.erase("nine", 9)
    line.submit("four", 4)
    request = line.claim()
    outcome = line.outcome(request, metrics={"starved": [4]}, weights=None, mask=None, probes=None, reason="starved")
    line.ledger.reject(request, "starved_class", outcome, line.ledger.models.version("digits"))
    good, starved = line.ledger.generators.all()

    found = offered(line)
    assert found.reuse is not None
    assert found.warm is not None
    assert (found.reuse.id, found.warm.id) == (good.id, starved.id)


def test_generators_serve_their_own_line(line: Any, new_line: Callable[..., Any]) -> None:
    line.erase()
    assert offered(new_line("other")) == GeneratorCandidates(None, None)


@pytest.mark.parametrize("changes", [{"channels": 3}, {"height": 28}, {"classes": 11}])
def test_generators_serve_their_own_shape_and_classes(line: Any, changes: dict[str, int]) -> None:
    line.erase()
    model = line.ledger.models.get("digits")
    spec = model.spec.model_copy(update=changes)
    grown = type(model)(model.id, model.name, spec, model.test_set, model.created_at)

    base = line.ledger.models.version("digits")
    assert offer(line.ledger, grown, base, base, Recipe()) == GeneratorCandidates(None, None)


def test_the_papers_form_trains_anew(line: Any) -> None:
    line.erase(recipe=Recipe(form="paper"))
    assert offered(line, Recipe(form="paper")) == GeneratorCandidates(None, None)
    assert offered(line).reuse is None


def test_priors_are_the_erasures_in_force(line: Any) -> None:
    ledger = line.ledger
    assert in_force(ledger) == ()
    recipe = Recipe(filter=FilterRecipe(policy="knee", metric="cosine"))
    line.erase("crossed", 7, kind="subset", recipe=recipe, report={"forgetting": {"probes_in_target": 0.04}})
    (generator,) = ledger.generators.all()
    unmeasured = {"forgetting": {"probes_in_target": None}}
    line.erase("nine", 9, generator_use="reused", generator_id=generator.id, report=unmeasured)

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
