"""What a run leaves in the ledger, and the history that is told of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from fsu_ray.errors import (
    LeaseLost,
    TransitionRefused,
)
from fsu_ray.records import ModelSpec, Status
from fsu_ray.storage.triggers import Trigger

SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)


class TestResults:
    def test_a_commit_makes_version_erasure_generator_and_ends_the_request(self, driver: Any) -> None:
        driver.submit("nine", 9)
        request = driver.claim("w1")
        outcome = driver.outcome(request, refused=("agreement 0.9 < 0.95",))
        base = driver.ledger.models.version("digits")
        version = driver.ledger.commit(request, outcome, base)

        assert (version.number, version.parent, version.root) == (2, 1, 1)
        assert (version.weights, version.request) == (outcome.weights, request.id)
        assert driver.ledger.models.versions("digits") == [base, version]
        (generator,) = driver.ledger.generators.all()
        assert (generator.model, generator.root, generator.spec) == ("digits", 1, SPEC)
        assert (generator.weights, generator.dataset) == (outcome.generator_weights, outcome.dataset)
        assert generator.recipe_digest == request.recipe.generator_digest
        assert (generator.origin, generator.warm_started_from) == ("trained", None)
        assert (generator.metrics, generator.request) == (outcome.metrics, request.id)
        (erasure,) = driver.ledger.models.erasures("digits")
        assert (erasure.model, erasure.version, erasure.request) == ("digits", 2, request.id)
        assert (erasure.behaviour, erasure.samples) == (request.behaviour, request.samples)
        assert (erasure.mask, erasure.probes) == (outcome.targets[0].mask, outcome.targets[0].probes)
        assert (erasure.generator, erasure.generator_use) == (generator.id, "trained")
        ended = driver.ledger.requests.get(request.id)
        assert (ended.status, ended.version, ended.worker) == (Status.SUCCEEDED, 2, "w1")
        assert ended.lease_until is None
        assert ended.finished_at == version.created_at == erasure.created_at
        assert ended.report == erasure.report
        assert ended.report == {
            **outcome.targets[0].report,
            "generator": {
                "id": generator.id,
                "use": "trained",
                "refused": ["agreement 0.9 < 0.95"],
                "figures": outcome.metrics,
            },
            "recipe": {"digest": request.recipe.digest, "origin": None},
            "seconds": {"invert": 60.0},
            "resumed": [],
        }
        assert driver.ledger.generators.get(generator.id[:-1]) == generator

    def test_a_reused_generator_makes_no_new_row(self, driver: Any) -> None:
        driver.erase("nine", 9)
        (generator,) = driver.ledger.generators.all("digits")
        driver.erase("four", 4, generator_use="reused", generator_id=generator.id, warm_started_from=generator.id)

        assert driver.ledger.generators.all("digits") == [replace(generator, taints=2)]
        uses = [(erasure.generator, erasure.generator_use) for erasure in driver.ledger.models.erasures("digits")]
        assert uses == [(generator.id, "trained"), (generator.id, "reused")]

    def test_a_warm_started_generator_names_the_first_one(self, driver: Any) -> None:
        driver.erase("nine", 9)
        (first,) = driver.ledger.generators.all()
        driver.erase("four", 4, generator_use="warm_started", generator_id=first.id, warm_started_from=first.id)
        driver.erase("one", 1, warm_started_from=first.id)

        origins = [(made.origin, made.warm_started_from) for made in driver.ledger.generators.all()]
        assert origins == [("trained", None), ("warm_started", first.id), ("trained", None)]

    @pytest.mark.parametrize(
        "changes",
        [{"generator_use": "reused"}, {"generator_use": "warm_started"}, {"reason": "nothing_found"}]
        + [{name: None} for name in ("weights", "mask", "probes")],
    )
    def test_an_outcome_that_lacks_something_is_no_version(self, driver: Any, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="request r-"):
            driver.erase(**changes)
        assert driver.ledger.requests.all()[0].status is Status.RUNNING

    @pytest.mark.parametrize("table", ["generators", "model_versions", "erasures"])
    def test_a_commit_is_whole_or_nothing(self, driver: Any, raw: Any, table: str) -> None:
        driver.submit()
        request = driver.claim()
        raw.execute(Trigger("broken", "INSERT", table, "broken").sql(raw.engine))
        base = driver.ledger.models.version("digits")

        with pytest.raises(sa.exc.IntegrityError, match="broken"):
            driver.ledger.commit(request, driver.outcome(request), base)

        assert driver.ledger.requests.get(request.id) == request
        assert driver.ledger.models.versions("digits") == [base]
        assert (driver.ledger.generators.all(), driver.ledger.models.erasures("digits")) == ([], [])
        raw.execute("DROP TRIGGER broken" + (f" ON {table}" if raw.engine == "postgresql" else ""))
        assert driver.ledger.commit(request, driver.outcome(request), base).number == 2

    def test_a_commit_upon_an_older_version_is_refused(self, driver: Any) -> None:
        base = driver.ledger.models.version("digits")
        driver.erase("nine", 9)
        driver.submit("four", 4)
        request = driver.claim()

        with pytest.raises(TransitionRefused, match="version 1 of 'digits' is no longer the latest, 2 is") as caught:
            driver.ledger.commit(request, driver.outcome(request), base)
        assert not isinstance(caught.value, LeaseLost)
        assert driver.ledger.requests.get(request.id) == request
        assert len(driver.ledger.models.versions("digits")) == 2

    def test_a_second_commit_is_refused(self, driver: Any) -> None:
        base = driver.ledger.models.version("digits")
        driver.submit()
        request = driver.claim()
        driver.ledger.commit(request, driver.outcome(request), base)

        with pytest.raises(LeaseLost):
            driver.ledger.commit(request, driver.outcome(request), base)
        assert len(driver.ledger.models.erasures("digits")) == 1

    def test_a_rejected_request_keeps_its_evidence_and_makes_no_version(self, driver: Any) -> None:
        driver.submit()
        request = driver.claim()
        outcome = driver.outcome(request, reason="starved_class: 4", weights=None, mask=None, probes=None)
        rejected = driver.ledger.reject(request, "starved_class: 4", outcome, driver.ledger.models.version("digits"))

        assert (rejected.status, rejected.reason, rejected.version) == (Status.REJECTED, "starved_class: 4", None)
        (generator,) = driver.ledger.generators.all()
        assert generator.request == request.id
        assert rejected.report["generator"]["id"] == generator.id
        assert rejected.report["forgetting"] == outcome.targets[0].report["forgetting"]
        assert len(driver.ledger.models.versions("digits")) == 1
        assert driver.ledger.models.erasures("digits") == []
        assert driver.submit().status is Status.QUEUED, "it may be asked for again"

    def test_a_request_may_be_rejected_without_an_outcome(self, driver: Any) -> None:
        driver.submit()
        rejected = driver.ledger.reject(driver.claim(), "nothing_found", None, driver.ledger.models.version("digits"))
        assert (rejected.status, rejected.report) == (Status.REJECTED, None)
        assert driver.ledger.generators.all() == []

    def test_erasures_are_inherited_along_the_parents(self, driver: Any) -> None:
        driver.erase("nine", 9)
        driver.ledger.models.add_version("digits", "from outside")
        driver.erase("four", 4)
        driver.ledger.models.register("other", SPEC, "w")

        names = lambda version=None: [gone.behaviour.name for gone in driver.ledger.models.erasures("digits", version)]  # noqa: E731
        assert [names(number) for number in (1, 2, 3, 4)] == [[], ["nine"], ["nine"], ["nine", "four"]]
        assert names() == ["nine", "four"]
        assert driver.ledger.models.erasures("other") == []

    def test_a_sibling_does_not_inherit(self, driver: Any, raw: Any) -> None:
        """No method makes branches yet; the query follows parents, not numbers, all the same."""
        driver.erase("nine", 9)
        raw.execute(
            "INSERT INTO model_versions SELECT 'v-x', model_id, 3, 1, 1, weights, NULL, created_at "
            "FROM model_versions WHERE number = 1"
        )
        assert driver.ledger.models.erasures("digits", 3) == []


class TestHistory:
    def test_tells_everything_in_its_order(self, driver: Any) -> None:
        first = driver.erase("nine", 9).request
        (generator,) = driver.ledger.generators.all()
        second = driver.erase("four", 4, generator_use="reused", generator_id=generator.id).request
        driver.ledger.models.add_version("digits", "from outside")
        third = driver.erase("one", 1, generator_use="warm_started", warm_started_from=generator.id).request
        cancelled = driver.submit("two", 2)
        driver.ledger.requests.cancel(cancelled.id)
        failed = driver.submit("three", 3)
        driver.ledger.requests.fail(driver.claim(), "out of memory")
        rejected = driver.submit("five", 5)
        request, base = driver.claim(), driver.ledger.models.version("digits")
        outcome = driver.outcome(request, generator_use="reused")
        driver.ledger.reject(request, "retention_lost", outcome, base, generator_id=generator.id)
        driver.ledger.models.register("other", SPEC, "w")

        events = driver.ledger.models.history("digits")

        assert [(event["event"], event["version"], event["request"]) for event in events] == [
            ("registered", 1, None),
            ("submitted", None, first),
            ("generator_trained", None, first),
            ("erased", 2, first),
            ("submitted", None, second),
            ("generator_reused", 3, second),
            ("erased", 3, second),
            ("version_added", 4, None),
            ("submitted", None, third),
            ("generator_warm_started", None, third),
            ("erased", 5, third),
            ("submitted", None, cancelled.id),
            ("cancelled", None, cancelled.id),
            ("submitted", None, failed.id),
            ("failed", None, failed.id),
            ("submitted", None, rejected.id),
            ("generator_reused", None, rejected.id),
            ("rejected", None, rejected.id),
        ]
        assert [event["at"] for event in events] == sorted(event["at"] for event in events)
        details = {(event["event"], event["request"]): event["detail"] for event in events}
        assert details["registered", None] == {
            "weights": driver.ledger.models.version("digits", 1).weights,
            "arch": "lenet5",
        }
        asked = {"behaviour": "nine", "kind": "class", "targets": [9]}
        assert details["submitted", first] == {**asked, "sample_count": 8}
        assert details["erased", first] == asked
        assert details["generator_reused", second] == {"generator": generator.id}
        assert details["generator_warm_started", third]["from"] == generator.id
        assert details["failed", failed.id] == {"behaviour": "three", "reason": "out of memory"}
        assert details["rejected", rejected.id]["reason"] == "retention_lost"
