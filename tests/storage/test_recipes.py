"""Searched recipes: which one is in force, the origin of a request's recipe, and what is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from fsu_ray.errors import AlreadyExists, NotFound, UserError
from fsu_ray.recipes import Recipe, RelearnRecipe, SynthesizeRecipe
from fsu_ray.records import Behaviour, Request, Terms
from fsu_ray.storage import rows
from fsu_ray.storage.rows import now
from tests.storage.conftest import digest

FOUND = Recipe(synthesize=SynthesizeRecipe(entropy_threshold=0.9), relearn=RelearnRecipe(epochs=7))
OTHER = Recipe(relearn=RelearnRecipe(epochs=8))
EVIDENCE = {"trials": 24, "default": {"score": 0.91}, "parts": {"forgetting": 0.99, "coverage": float("nan")}}


def set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set this machine's clock back by an hour."""
    monkeypatch.setattr(rows, "now", lambda: now() - timedelta(hours=1))


def chained(driver: Any, event: str) -> list[dict[str, Any]]:
    """The rows that the events of one kind recorded."""
    return [json.loads(each.detail)["row"] for each in driver.ledger.audit.log() if each.event == event]


class TestInForce:
    def test_a_kept_recipe_comes_back(self, driver: Any) -> None:
        kept = driver.ledger.recipes.keep("digits", "class", FOUND, 1, EVIDENCE, "u-1")

        assert kept.id.startswith("s-")
        assert (kept.model, kept.kind, kept.recipe, kept.score, kept.actor) == ("digits", "class", FOUND, 1.0, "u-1")
        assert kept.evidence == {**EVIDENCE, "parts": {"forgetting": 0.99, "coverage": None}}
        assert driver.ledger.recipes.in_force("digits", "class") == kept
        assert driver.ledger.recipes.all("digits") == [kept]

    def test_it_is_of_one_model_and_one_kind(self, driver: Any, new_driver: Callable[..., Any]) -> None:
        new_driver("other")
        kept = driver.ledger.recipes.keep("digits", "class", FOUND, 0.9, {})
        subset = driver.ledger.recipes.keep("digits", "subset", OTHER, 0.8, {})

        assert driver.ledger.recipes.in_force("digits", "class") == kept
        assert driver.ledger.recipes.in_force("digits", "subset") == subset
        assert (driver.ledger.recipes.in_force("other", "class"), driver.ledger.recipes.all("other")) == (None, [])

    def test_the_one_found_last_is_in_force_though_its_clock_is_slow(
        self, driver: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also with a lower score: the scores of two searches cannot be compared."""
        first = driver.ledger.recipes.keep("digits", "class", FOUND, 0.9, {})
        set_back(monkeypatch)
        second = driver.ledger.recipes.keep("digits", "class", OTHER, 0.8, {})

        assert driver.ledger.recipes.in_force("digits", "class") == second
        assert driver.ledger.recipes.all("digits") == [first, second]

    def test_a_reset_puts_presets_in_force_until_the_next_one(self, driver: Any) -> None:
        driver.ledger.recipes.keep("digits", "class", FOUND, 0.9, {})
        subset = driver.ledger.recipes.keep("digits", "subset", OTHER, 0.8, {})
        reset = driver.ledger.recipes.reset("digits", "class", "u-2")

        assert (reset.kind, reset.recipe, reset.score, reset.evidence) == ("class", None, None, {})
        assert reset.actor == "u-2"
        assert driver.ledger.recipes.in_force("digits", "class") is None
        assert driver.ledger.recipes.in_force("digits", "subset") == subset
        assert [each.recipe for each in driver.ledger.recipes.all("digits")] == [FOUND, OTHER, None]
        again = driver.ledger.recipes.keep("digits", "class", FOUND, 0.7, {})
        assert driver.ledger.recipes.in_force("digits", "class") == again

    def test_a_refused_call_records_nothing(self, driver: Any) -> None:
        ledger = driver.ledger
        for score in (float("nan"), float("inf")):
            with pytest.raises(UserError, match="it measured nothing"):
                ledger.recipes.keep("digits", "class", FOUND, score, {})
        with pytest.raises(UserError, match="no kind 'all' of requests: use class or subset"):
            ledger.recipes.keep("digits", "all", FOUND, 0.9, {})
        with pytest.raises(UserError, match="no kind 'all'"):
            ledger.recipes.in_force("digits", "all")
        with pytest.raises(UserError, match="no opaque id"):
            ledger.recipes.keep("digits", "class", FOUND, 0.9, {}, "ann@example.org")
        with pytest.raises(UserError, match="class requests of 'digits' have no searched recipe to reset"):
            ledger.recipes.reset("digits", "class")
        for asked in (
            lambda: ledger.recipes.keep("x", "class", FOUND, 0.9, {}),
            lambda: ledger.recipes.reset("x", "class"),
            lambda: ledger.recipes.in_force("x", "class"),
            lambda: ledger.recipes.all("x"),
        ):
            with pytest.raises(NotFound, match="no model 'x'"):
                asked()
        assert ledger.recipes.all("digits") == []
        assert chained(driver, "recipe_found") == chained(driver, "recipe_reset") == []

        ledger.recipes.keep("digits", "class", FOUND, 0.9, {})
        ledger.recipes.reset("digits", "class")
        with pytest.raises(UserError, match="no searched recipe to reset"):
            ledger.recipes.reset("digits", "class")

    def test_the_chain_has_both(self, driver: Any) -> None:
        driver.ledger.recipes.keep("digits", "class", FOUND, 0.9, EVIDENCE, "u-1")
        driver.ledger.recipes.reset("digits", "class", "u-2")

        (recorded,), (reset,) = chained(driver, "recipe_found"), chained(driver, "recipe_reset")
        assert (recorded["recipe"], recorded["recipe_digest"]) == (FOUND.model_dump(mode="json"), FOUND.digest)
        assert (recorded["score"], recorded["evidence"]["trials"], recorded["actor"]) == (0.9, 24, "u-1")
        assert (reset["recipe"], reset["score"], reset["kind"], reset["actor"]) == (None, None, "class", "u-2")
        assert driver.ledger.audit.verify().findings == ()

    @pytest.mark.parametrize(
        ("change", "constraint"),
        [
            ({"kind": "'all'"}, "kind"),
            ({"recipe": "NULL"}, "recipe_digest|score"),
            ({"recipe_digest": "NULL"}, "recipe_digest"),
            ({"score": "NULL"}, "score"),
            ({"evidence": "NULL"}, "evidence"),
            ({"model_id": "'nobody'"}, "(?i)foreign key"),
        ],
    )
    def test_a_row_is_consistent(self, driver: Any, raw: Any, change: dict[str, str], constraint: str) -> None:
        driver.ledger.recipes.keep("digits", "class", FOUND, 0.9, {})
        if raw.engine == "sqlite":
            raw.execute("PRAGMA foreign_keys = ON")
        chosen = ", ".join({"id": "'s-x'", **change}.get(name, name) for name in raw.columns("searches"))
        with pytest.raises(sa.exc.IntegrityError, match=constraint):
            raw.execute(f"INSERT INTO searches SELECT {chosen} FROM searches")


class TestOrigin:
    def test_the_origin_is_the_search_that_had_found_the_recipe(
        self, driver: Any, new_driver: Callable[..., Any]
    ) -> None:
        """Not a search that found it later, a search of another kind or model, or a search that found another
        recipe."""
        other = new_driver("other")
        before = driver.submit("nine", 9, recipe=FOUND)
        driver.ledger.recipes.keep("digits", "class", OTHER, 0.8, {})
        kept = driver.ledger.recipes.keep("digits", "class", FOUND, 0.9, {})
        asked = driver.submit("four", 4, recipe=FOUND)

        assert driver.ledger.recipes.origin(asked) == kept
        assert driver.ledger.recipes.origin(before) is None
        assert driver.ledger.recipes.origin(driver.submit("some", 3, kind="subset", recipe=FOUND)) is None
        assert driver.ledger.recipes.origin(other.submit("four", 4, recipe=FOUND)) is None
        assert driver.ledger.recipes.origin(driver.submit("one", 1)) is None

    def test_a_reset_changes_no_origin(self, driver: Any) -> None:
        kept = driver.ledger.recipes.keep("digits", "class", FOUND, 0.9, {})
        before = driver.submit("nine", 9, recipe=FOUND)
        driver.ledger.recipes.reset("digits", "class")

        assert driver.ledger.recipes.origin(before) == kept
        assert driver.ledger.recipes.origin(driver.submit("four", 4, recipe=FOUND)) == kept, (
            "somebody asked for that very recipe"
        )

    def test_of_two_searches_with_one_recipe_it_is_the_later(self, driver: Any) -> None:
        first = driver.ledger.recipes.keep("digits", "class", FOUND, 0.9, {})
        between = driver.submit("nine", 9, recipe=FOUND)
        second = driver.ledger.recipes.keep("digits", "class", FOUND, 0.95, {})

        assert driver.ledger.recipes.origin(between) == first
        assert driver.ledger.recipes.origin(driver.submit("four", 4, recipe=FOUND)) == second

    def test_slow_clocks_change_no_order(self, driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither the clock of the requester's machine nor that of the searching machine."""
        before = driver.submit("nine", 9, recipe=FOUND)
        set_back(monkeypatch)
        kept = driver.ledger.recipes.keep("digits", "class", FOUND, 0.9, {})
        monkeypatch.setattr(rows, "now", lambda: now() - timedelta(hours=2))
        after = driver.submit("four", 4, recipe=FOUND)

        assert driver.ledger.recipes.origin(before) is None
        assert driver.ledger.recipes.origin(after) == kept

    def test_a_recipe_from_before_a_field_was_there_is_the_same(self, driver: Any, raw: Any) -> None:
        """Recipes are compared with today's defaults, since their stored digest does not cover a new field."""
        kept = driver.ledger.recipes.keep("digits", "class", OTHER, 0.9, {})
        older = FOUND.model_dump(mode="json")
        del older["relearn"]["augment"]
        own = {"id": "'s-old'", "recipe": ":recipe", "recipe_digest": f"'{digest('of then')}'"}
        chosen = ", ".join(own.get(name, name) for name in raw.columns("searches"))
        chosen = chosen.replace(":recipe", "CAST(:recipe AS JSON)" if raw.engine == "postgresql" else ":recipe")
        raw.execute(f"INSERT INTO searches SELECT {chosen} FROM searches", {"recipe": json.dumps(older)})

        origin = driver.ledger.recipes.origin(driver.submit("nine", 9, recipe=FOUND))
        assert (origin.id, origin.recipe, origin.created_at) == ("s-old", FOUND, kept.created_at)


class TestErasures:
    def test_the_origin_is_in_the_report_the_summary_and_history(self, driver: Any) -> None:
        driver.erase("nine", 9)
        kept = driver.ledger.recipes.keep("digits", "class", FOUND, 0.9, {}, "u-1")
        driver.erase("four", 4, recipe=FOUND)
        driver.ledger.recipes.reset("digits", "class", "u-2")

        plain, searched = driver.ledger.models.erasures("digits")
        assert plain.report["recipe"] == {"digest": Recipe().digest, "origin": None}
        assert searched.report["recipe"] == {"digest": FOUND.digest, "origin": kept.id}
        assert driver.ledger.requests.get(searched.request).report == searched.report
        assert [each.recipe_origin for each in driver.ledger.models.erased("digits")] == [None, kept.id]
        (recorded,) = [row for row in chained(driver, "erased") if row["request_id"] == searched.request]
        assert recorded["report"]["recipe"]["origin"] == kept.id

        told = [(event["event"], event["request"], event["detail"]) for event in driver.ledger.models.history("digits")]
        asked = {"behaviour": "four", "kind": "class", "targets": [4]}
        assert told[4:] == [
            ("recipe_found", None, {"search": kept.id, "kind": "class", "score": 0.9, "by": "u-1"}),
            ("submitted", searched.request, {**asked, "sample_count": 8}),
            ("generator_trained", searched.request, {"generator": searched.generator}),
            ("erased", searched.request, {**asked, "recipe_origin": kept.id}),
            ("recipe_reset", None, {"kind": "class", "by": "u-2"}),
        ]
        assert told[3] == ("erased", plain.request, {"behaviour": "nine", "kind": "class", "targets": [9]})

    def test_each_request_of_a_batch_has_its_own_origin(self, driver: Any) -> None:
        """One was submitted with this recipe by hand, the other after the search had found it."""
        driver.submit("nine", 9, recipe=FOUND)
        kept = driver.ledger.recipes.keep("digits", "class", FOUND, 0.9, {})
        driver.submit("four", 4, recipe=FOUND)
        lead = driver.ledger.requests.claim("w1", 60.0, "digits", max_batch=9)
        (other,) = driver.ledger.requests.batch_members(lead)
        outcome = driver.outcome(lead, targets=(driver.result(lead), driver.result(other, report={"forgetting": {}})))
        driver.ledger.commit(lead, outcome, driver.ledger.models.version("digits"))

        origins = {each.request: each.report["recipe"]["origin"] for each in driver.ledger.models.erasures("digits")}
        assert origins == {lead.id: None, other.id: kept.id}
        assert driver.ledger.requests.get(other.id).report["recipe"]["origin"] == kept.id

    def test_a_rejected_request_shows_it_too(self, driver: Any) -> None:
        kept = driver.ledger.recipes.keep("digits", "class", FOUND, 0.9, {})
        driver.submit("nine", 9, recipe=FOUND)
        request = driver.claim()
        rejected = driver.ledger.reject(
            request, "starved_class: 4", driver.outcome(request), driver.ledger.models.version("digits")
        )
        assert rejected.report["recipe"] == {"digest": FOUND.digest, "origin": kept.id}


class TestRepeats:
    def submit(self, driver: Any, recipe: Recipe, named: bool) -> tuple[Request, bool]:
        behaviour, terms = Behaviour(name="nine", kind="class", targets=(9,)), Terms(key="t-1")
        submitted: tuple[Request, bool] = driver.ledger.requests.submit(
            "digits", behaviour, digest("samples"), 8, recipe, terms, named=named
        )
        return submitted

    def test_a_recipe_found_meanwhile_makes_no_other_request(self, driver: Any) -> None:
        """A submission with the same key and without a recipe repeats the request."""
        first, _ = self.submit(driver, Recipe(), named=False)
        driver.ledger.recipes.keep("digits", "class", FOUND, 0.9, {})

        assert self.submit(driver, FOUND, named=False) == (first, False)
        assert self.submit(driver, Recipe(), named=True) == (first, False)
        with pytest.raises(AlreadyExists, match="which asks for something else"):
            self.submit(driver, FOUND, named=True)
