"""Models, versions and requests as callers of the ledger see them."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import Any

import pytest

from fsu_ray.errors import (
    AlreadyErased,
    AlreadyExists,
    InvalidBehaviour,
    InvalidConfig,
    NotFound,
    TransitionRefused,
)
from fsu_ray.recipes import Recipe, RelearnRecipe
from fsu_ray.records import Behaviour, ModelSpec, Status
from fsu_ray.storage.ledger import Ledger

SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)


class TestModels:
    def test_a_new_model_has_one_version_that_is_its_own_root(self, ledger: Ledger) -> None:
        before = datetime.now(UTC)
        model = ledger.models.register("m-1.a", SPEC, "w" * 64, "mnist")

        assert ledger.models.get("m-1.a") == model
        assert (model.spec, model.test_set) == (SPEC, "mnist")
        assert before <= model.created_at <= datetime.now(UTC)
        (first,) = ledger.models.versions("m-1.a")
        assert (first.model, first.number, first.parent, first.root) == ("m-1.a", 1, None, 1)
        assert (first.weights, first.request) == ("w" * 64, None)

    def test_a_name_is_taken_once(self, ledger: Ledger) -> None:
        ledger.models.check_name_free("m")
        ledger.models.register("m", SPEC, "w")
        for refused in (lambda: ledger.models.register("m", SPEC, "other"), lambda: ledger.models.check_name_free("m")):
            with pytest.raises(AlreadyExists, match=r"^model 'm' exists already; choose another name$"):
                refused()
        assert [version.weights for version in ledger.models.versions("m")] == ["w"]

    @pytest.mark.parametrize("name", ["", ".m", "-m", "a b", "a/b", "m\n", "ä", "m" * 101])
    def test_an_invalid_name_is_refused(self, ledger: Ledger, name: str) -> None:
        for refused in (lambda: ledger.models.register(name, SPEC, "w"), lambda: ledger.models.check_name_free(name)):
            with pytest.raises(InvalidConfig, match="no name for a model"):
                refused()
        assert ledger.models.all() == []

    def test_models_come_by_name(self, ledger: Ledger) -> None:
        for name in ("b", "c", "a"):
            ledger.models.register(name, SPEC, "w")
        assert [model.name for model in ledger.models.all()] == ["a", "b", "c"]

    def test_not_found_errors_say_how_to_list(self, driver: Any) -> None:
        ledger = driver.ledger
        behaviour = Behaviour(name="x", kind="class", targets=(1,))
        for missing in (
            lambda: ledger.models.get("x"),
            lambda: ledger.models.versions("x"),
            lambda: ledger.models.version("x"),
            lambda: ledger.models.add_version("x", "w"),
            lambda: ledger.requests.all("x"),
            lambda: ledger.models.erasures("x"),
            lambda: ledger.generators.all("x"),
            lambda: ledger.models.history("x"),
            lambda: ledger.requests.claim("w", 1, "x"),
            lambda: ledger.requests.claimable("x"),
            lambda: ledger.requests.check_behaviour("x", behaviour),
            lambda: ledger.requests.submit("x", behaviour, "s", 1, Recipe()),
        ):
            with pytest.raises(NotFound, match="no model 'x'; `fsu model list`"):
                missing()
        for missing in (lambda: ledger.models.version("digits", 7), lambda: ledger.models.erasures("digits", 7)):
            with pytest.raises(NotFound, match="'digits' has no version 7; its latest is 1"):
                missing()

    def test_a_version_trained_outside_is_a_child_and_a_root(self, driver: Any) -> None:
        driver.erase()
        added = driver.ledger.models.add_version("digits", "from outside")

        assert (added.number, added.parent, added.root, added.request) == (3, 2, 3, None)
        assert driver.ledger.models.version("digits") == added
        assert driver.erase("four", 4).root == 3

    def test_no_version_is_added_under_a_running_request(self, driver: Any) -> None:
        request = driver.submit()
        driver.claim()

        with pytest.raises(TransitionRefused, match=f"request {request.id} of 'digits' is running"):
            driver.ledger.models.add_version("digits", "w")
        assert len(driver.ledger.models.versions("digits")) == 1


class TestSubmitting:
    def test_a_new_request_is_queued(self, driver: Any) -> None:
        behaviour = Behaviour(name="nine", kind="class", targets=(9,))
        recipe = Recipe(relearn=RelearnRecipe(epochs=3))
        request, new = driver.ledger.requests.submit("digits", behaviour, "s" * 64, 7, recipe)

        assert new
        assert driver.ledger.requests.get(request.id) == request
        assert (request.model, request.behaviour, request.samples, request.sample_count, request.recipe) == (
            "digits",
            behaviour,
            "s" * 64,
            7,
            recipe,
        )
        assert (request.status, request.attempt, request.worker, request.lease_until) == (Status.QUEUED, 0, None, None)
        assert (request.reason, request.version, request.report) == (None, None, None)
        assert (request.started_at, request.finished_at) == (None, None)

    def test_the_same_again_is_the_same_request_until_it_has_ended(self, driver: Any) -> None:
        behaviour = Behaviour(name="nine", kind="class", targets=(9,))
        submit = lambda samples: driver.ledger.requests.submit("digits", behaviour, samples, 7, Recipe())  # noqa: E731
        first, _ = submit("a")

        assert submit("a") == (first, False)
        assert submit("b")[1], "other samples make another request"
        driver.claim()
        assert submit("a")[1] is False
        driver.ledger.requests.fail(driver.ledger.requests.get(first.id), "broke")
        again, new = submit("a")
        assert new
        assert again.id != first.id

    def test_the_same_for_another_model_is_another_request(self, driver: Any) -> None:
        driver.ledger.models.register("other", SPEC, "w")
        behaviour = Behaviour(name="nine", kind="class", targets=(9,))

        assert all(
            driver.ledger.requests.submit(model, behaviour, "a", 7, Recipe())[1] for model in ("digits", "other")
        )

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            ((10,), r"'digits' has no class 10; its classes are 0 to 9"),
            ((3, 10, 12), r"has no classes 10, 12;"),
            (tuple(range(10)), r"all 10 classes of 'digits' are targets"),
            (tuple(range(9)), r"leaves 1 of the 10 classes of 'digits', and 2 must stay"),
        ],
    )
    def test_targets_must_be_classes_and_leave_some(self, driver: Any, targets: tuple[int, ...], message: str) -> None:
        behaviour = Behaviour(name="x", kind="class", targets=targets)
        for refused in (
            lambda: driver.ledger.requests.check_behaviour("digits", behaviour),
            lambda: driver.ledger.requests.submit("digits", behaviour, "s", 1, Recipe()),
        ):
            with pytest.raises(InvalidBehaviour, match=message):
                refused()
        assert driver.ledger.requests.all() == []

    def test_earlier_erasures_count_when_classes_must_be_left(self, driver: Any) -> None:
        driver.erase("seven of them", *range(7))

        with pytest.raises(InvalidBehaviour, match="classes 7, 8: with what is erased already this leaves 1 of"):
            driver.submit("two more", 7, 8)
        driver.submit("one more", 7)
        driver.submit("samples", 7, 8, kind="subset")
        with pytest.raises(InvalidBehaviour, match="leaves 0 of the 10 classes of 'digits', and 1 must stay"):
            driver.submit("all samples", 7, 8, 9, kind="subset")

    def test_a_subset_takes_no_class_away(self, driver: Any) -> None:
        driver.erase("crossed", *range(9), kind="subset")
        driver.submit("others", *range(8))

    def test_a_class_is_erased_once(self, driver: Any) -> None:
        driver.erase("four", 4)
        driver.erase("nine", 9)
        driver.erase("crossed seven", 7, kind="subset")

        for targets, gone in (((9,), "class 9"), ((4, 9), "classes 4, 9")):
            with pytest.raises(AlreadyErased, match=f"^{gone} of 'digits' is already erased in version 3$"):
                driver.submit("again", *targets)
        driver.submit("nine and more", 9, 1)
        driver.submit("all sevens", 7)
        driver.submit("nines here and there", 9, kind="subset")

    def test_a_name_is_erased_once(self, driver: Any) -> None:
        driver.erase("nine", 9)
        behaviour = Behaviour(name="nine", kind="subset", targets=(1,))
        with pytest.raises(AlreadyErased, match="'nine' of 'digits' is already erased in version 2; give another name"):
            driver.ledger.requests.check_behaviour("digits", behaviour)


class TestLookingUp:
    def test_an_unambiguous_prefix_of_an_id_is_enough(self, driver: Any) -> None:
        first, second = driver.submit("nine", 9), driver.submit("four", 4)
        same = len(
            [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first.id, second.id, strict=True))]
        )

        assert driver.ledger.requests.get(second.id) == second
        assert driver.ledger.requests.get(second.id[: same + 1]) == second
        with pytest.raises(NotFound, match="more than one request begins with"):
            driver.ledger.requests.get(second.id[:same])
        for nobody in ("r-zzz", "", "%", "_" * len(first.id)):
            with pytest.raises(NotFound, match=r"no request .*; `fsu request list`"):
                driver.ledger.requests.get(nobody)

    def test_requests_come_in_the_order_of_their_submission(self, driver: Any) -> None:
        driver.ledger.models.register("other", SPEC, "w")
        made = [driver.submit(f"b{number}", number) for number in range(5)]
        elsewhere, _ = driver.ledger.requests.submit("other", made[0].behaviour, "s", 1, Recipe())
        claimed = driver.claim()

        assert [request.id for request in driver.ledger.requests.all()] == [
            *(request.id for request in made),
            elsewhere.id,
        ]
        assert driver.ledger.requests.all("other") == [elsewhere]
        assert driver.ledger.requests.all(status=Status.RUNNING) == [claimed]
        assert driver.ledger.requests.all("digits", Status.QUEUED) == made[1:]

    def test_ids_are_made_in_the_order_of_time(self, driver: Any) -> None:
        ids = [driver.submit(f"b{number}", number).id for number in range(9)]
        assert len(set(ids)) == 9
        assert [id[:13] for id in ids] == sorted(id[:13] for id in ids)
