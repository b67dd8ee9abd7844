"""Which generator is offered to which run, and what a run is told of earlier erasures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from fsu_ray.errors import NotFound
from fsu_ray.recipes import FilterRecipe, InvertRecipe, Recipe, RelearnRecipe, SynthesizeRecipe
from fsu_ray.records import Behaviour, Terms
from fsu_ray.storage import planning
from fsu_ray.work import ErasureTarget, GeneratorCandidates
from tests.storage.conftest import digest


def candidates_for(driver: Any, recipe: Recipe | None = None) -> GeneratorCandidates:
    with driver.ledger.database.reading() as connection:
        state = planning.lineage(connection, driver.name)
        return planning.find_candidates(connection, state.model, state.root, recipe or Recipe())


def in_force(ledger: Any, number: int | None = None) -> Any:
    with ledger.database.reading() as connection:
        return planning.lineage(connection, "digits", number).earlier_erasures


def test_a_new_line_is_offered_nothing(driver: Any) -> None:
    assert candidates_for(driver) == GeneratorCandidates()


def test_the_generator_of_the_line_is_offered_with_its_dataset(driver: Any) -> None:
    driver.erase()
    (generator,) = driver.ledger.generators.all()

    reuse = candidates_for(driver).reuse
    assert reuse is not None
    assert (reuse.id, reuse.weights, reuse.dataset) == (generator.id, generator.weights, generator.dataset)
    assert reuse.metrics == generator.metrics
    assert candidates_for(driver).warm == reuse


def test_the_newest_is_candidates_for(driver: Any) -> None:
    driver.erase("nine", 9)
    driver.erase("four", 4)

    _, newest = driver.ledger.generators.all()
    found = candidates_for(driver)
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
    found = candidates_for(driver, recipe)
    assert (found.reuse is not None) == reused
    assert found.warm is not None


def test_a_new_root_asks_for_a_new_dataset(driver: Any) -> None:
    driver.erase("nine", 9)
    driver.ledger.models.add_version("digits", "from outside")
    (old,) = driver.ledger.generators.all()

    found = candidates_for(driver)
    assert found.reuse is None
    assert found.warm is not None
    assert found.warm.id == old.id
    driver.erase("four", 4, generator_use="warm_started", warm_started_from=old.id)
    reuse = candidates_for(driver).reuse
    assert reuse is not None
    assert reuse.id == driver.ledger.generators.all()[-1].id


def test_a_generator_that_starved_a_class_is_passed_over(driver: Any) -> None:
    driver.erase("nine", 9)
    driver.submit("four", 4)
    request = driver.claim()
    outcome = driver.outcome(request, metrics={"starved": [4]}, weights=None, mask=None, probes=None, reason="starved")
    driver.ledger.reject(request, "starved_class", outcome, driver.ledger.models.version("digits"))
    good, starved = driver.ledger.generators.all()

    found = candidates_for(driver)
    assert found.reuse is not None
    assert found.warm is not None
    assert (found.reuse.id, found.warm.id) == (good.id, starved.id)


def test_generators_serve_their_own_line(driver: Any, new_driver: Callable[..., Any]) -> None:
    driver.erase()
    assert candidates_for(new_driver("other")) == GeneratorCandidates()


@pytest.mark.parametrize("changes", [{"channels": 3}, {"height": 28}, {"classes": 11}])
def test_generators_serve_their_own_shape_and_classes(driver: Any, changes: dict[str, int]) -> None:
    driver.erase()
    model = driver.ledger.models.get("digits")
    spec = model.spec.model_copy(update=changes)
    grown = type(model)(model.id, model.name, spec, model.test_set, model.created_at)

    base = driver.ledger.models.version("digits")
    with driver.ledger.database.reading() as connection:
        assert planning.find_candidates(connection, grown, base, Recipe()) == GeneratorCandidates()


def test_the_papers_form_trains_anew(driver: Any) -> None:
    driver.erase(recipe=Recipe(form="paper"))
    assert candidates_for(driver, Recipe(form="paper")) == GeneratorCandidates()
    assert candidates_for(driver).reuse is None


def test_earlier_erasures_are_those_in_force(driver: Any) -> None:
    ledger = driver.ledger
    assert in_force(ledger) == ()
    recipe = Recipe(filter=FilterRecipe(policy="knee", metric="cosine"))
    driver.erase("crossed", 7, kind="subset", recipe=recipe, report={"forgetting": {"probes_in_target": 0.04}})
    (generator,) = ledger.generators.all()
    unmeasured = {"forgetting": {"probes_in_target": None}}
    driver.erase("nine", 9, generator_use="reused", generator_id=generator.id, report=unmeasured)

    first, second = ledger.models.erasures("digits")
    found = in_force(ledger)

    assert [(erasure.request, erasure.behaviour, erasure.samples) for erasure in found] == [
        (erasure.request, erasure.behaviour, erasure.samples) for erasure in (first, second)
    ]
    assert [(erasure.mask, erasure.probes) for erasure in found] == [(e.mask, e.probes) for e in (first, second)]
    assert [erasure.filter for erasure in found] == [recipe.filter, FilterRecipe()]
    assert [erasure.dataset for erasure in found] == [generator.dataset] * 2
    assert [erasure.recorded for erasure in found] == [0.04, 0.0]
    assert in_force(ledger, 2) == found[:1]


class Counted:
    """Counts the reading transactions of a database."""

    def __init__(self, database: Any) -> None:
        self._reading, self.count = database.reading, 0

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        self.count += 1
        with self._reading() as connection:
            yield connection


@pytest.mark.parametrize("named", [False, True])
def test_planning_takes_one_transaction(driver: Any, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is what the parts say, of one snapshot: no writer can come between them."""
    ledger = driver.ledger
    driver.erase("nine", 9)
    (generator,) = ledger.generators.all()
    if named:
        behaviour, terms = Behaviour(name="four", kind="class", targets=(4,)), Terms(generator=generator.id)
        ledger.requests.submit("digits", behaviour, digest("samples of four"), 8, Recipe(), terms)
    else:
        driver.submit("four", 4)
        driver.submit("one", 1)
    request = ledger.requests.claim("w1", 60.0, "digits", max_batch=9)
    members = [request, *ledger.requests.batch_members(request)]
    assert len(members) == (1 if named else 2)

    counted = Counted(ledger.database)
    monkeypatch.setattr(ledger.database, "reading", counted.reading)
    plan = ledger.plan(request)
    assert counted.count == 1

    base = ledger.models.version("digits")
    assert (plan.lineage.base, plan.lineage.root) == (base, ledger.models.version("digits", 1))
    order = plan.order
    assert order.targets == tuple(ErasureTarget(each.id, each.behaviour, each.samples) for each in members)
    assert (order.current_weights, order.root_weights) == (base.weights, plan.lineage.root.weights)
    assert (order.test_set, order.recipe, order.spec) == ("digits", request.recipe, plan.lineage.model.spec)
    assert order.earlier_erasures == in_force(ledger)
    assert [erasure.behaviour.name for erasure in order.earlier_erasures] == ["nine"]
    assert order.generators.reuse is not None
    assert order.generators.reuse.id == generator.id
    assert (order.generators.required, order.generators.warm is None) == (named, named)


def test_the_lineage_of_a_sealed_model(driver: Any) -> None:
    """The version of the seal labels D', and what was erased before is sealed in it."""
    ledger = driver.ledger
    driver.erase("nine", 9)
    (generator,) = ledger.generators.all()
    sealed_at = ledger.models.version("digits")
    ledger.generators.seal(generator, sealed_at, digest("sealed"))
    driver.erase("four", 4, generator_use="reused", generator_id=generator.id)

    state = ledger.lineage("digits")
    assert (state.base, state.root) == (ledger.models.version("digits"), sealed_at)
    assert [erasure.sealed for erasure in state.earlier_erasures] == [True, False]
    assert {erasure.dataset for erasure in state.earlier_erasures} == {digest("sealed")}
    with pytest.raises(NotFound, match="no model 'letters'"):
        ledger.lineage("letters")
