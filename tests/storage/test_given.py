"""Generators that are given, as the ledger keeps them: imported, transferred, and asked for."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from fsu_ray.errors import AlreadyExists, GeneratorUnfit, NotFound, TransitionRefused, UserError
from fsu_ray.recipes import Recipe, SynthesizeRecipe
from fsu_ray.records import Behaviour, Generator, Request, Terms
from fsu_ray.storage.planning import check_compatible, find_candidates, named_candidate

OTHER = Recipe(synthesize=SynthesizeRecipe(per_class=7))
FIGURES = {"acceptance": 0.9, "starved": []}


def imported(driver: Any, weights: str = "g", recipe: Recipe | None = None, root: int = 1) -> Generator:
    digests = [f"{text}{'0' * 64}"[:64] for text in (weights, f"d{weights}")]
    ledger = driver.ledger
    made: Generator = ledger.generators.add_imported(
        driver.name, ledger.models.version(driver.name, root), recipe or Recipe(), *digests, FIGURES, "alice"
    )
    return made


def asked(driver: Any, generator: str | None, name: str = "four", target: int = 4, **terms: Any) -> Request:
    behaviour = Behaviour(name=name, kind="class", targets=(target,))
    found: Request = driver.ledger.requests.submit(
        driver.name, behaviour, "5" * 64, 8, Recipe(), Terms(generator=generator, **terms)
    )[0]
    return found


def test_an_import_is_on_record_with_who_made_it(driver: Any) -> None:
    """In the chain and in the history; nothing of it is a request's."""
    made = imported(driver)
    assert driver.ledger.generators.all() == [made]
    assert (made.origin, made.request, made.root, made.metrics) == ("imported", None, 1, FIGURES)
    event = driver.ledger.audit.log()[-1]
    assert (event.event, event.model, event.request, event.actor) == ("generator_imported", "digits", None, "alice")
    assert driver.ledger.models.history("digits")[-1]["detail"] == {"generator": made.id}
    assert driver.ledger.audit.verify().findings == ()
    root = driver.ledger.models.version("digits")
    with driver.ledger.database.reading() as connection:
        found = find_candidates(connection, driver.ledger.models.get("digits"), root, Recipe())
    assert found.reuse is not None
    assert found.reuse.id == made.id


def test_what_an_import_is_refused_for(driver: Any) -> None:
    """The same again, a root that labels D' no more, an actor that is a person."""
    made = imported(driver)
    with pytest.raises(AlreadyExists, match=f"generator {made.id} of 'digits' has these weights already"):
        imported(driver)
    with pytest.raises(AlreadyExists):
        driver.ledger.generators.check_import("digits", made.weights, Recipe())
    imported(driver, recipe=OTHER)
    driver.ledger.models.add_version("digits", "f" * 64)
    with pytest.raises(TransitionRefused, match="version 2 of 'digits' labels D' by now"):
        imported(driver, "h")
    with pytest.raises(UserError):
        driver.ledger.generators.add_imported(
            "digits", driver.ledger.models.version("digits"), Recipe(), *("ab"), {}, "a@b.c"
        )
    assert len(driver.ledger.generators.all()) == 2
    assert imported(driver, root=2).root == 2, "the same weights under another root"


@pytest.mark.parametrize(
    "columns",
    [
        {"origin": "imported", "request_id": "asked"},
        {"origin": "trained"},
        {"origin": "transferred", "request_id": "asked"},
        {"origin": "warm_started", "request_id": "asked", "transferred_from": "first", "warm_started_from": "first"},
        {"origin": "drawn", "request_id": "asked"},
    ],
    ids=["imported for a request", "trained for none", "transferred from nowhere", "both", "no such origin"],
)
def test_the_database_knows_what_origins_mean(driver: Any, raw: Any, columns: dict[str, str]) -> None:
    first, request = imported(driver), driver.submit()
    values = {name: {"asked": request.id, "first": first.id}.get(value, value) for name, value in columns.items()}
    taken = {"id": "g-x", "weights": "a" * 64, **values}
    names = [name for name in raw.columns("generators") if name not in ("request_id", "warm_started_from",
                                                                     "transferred_from") or name in taken]  # fmt: skip
    chosen = ", ".join(f":{name}" if name in taken else name for name in names)
    with pytest.raises(sa.exc.IntegrityError, match=r"ck_generators|CHECK constraint"):
        raw.execute(f"INSERT INTO generators ({', '.join(names)}) SELECT {chosen} FROM generators", taken)


def test_a_request_keeps_the_generator_that_it_asks_for(driver: Any, raw: Any) -> None:
    """By its whole id, as one of its terms: in the chain, and never another one."""
    made = imported(driver)
    request = asked(driver, made.id[:-2])
    assert request.generator == driver.ledger.requests.get(request.id).generator == made.id
    assert f'"generator_id":"{made.id}"' in driver.ledger.audit.log(request=request.id)[0].detail
    with pytest.raises(sa.exc.IntegrityError, match="the terms of a request do not change"):
        raw.execute("UPDATE requests SET generator_id = NULL")
    claimed = driver.claim()
    assert claimed.generator == made.id
    assert driver.ledger.requests.release(claimed, "stopped").generator == made.id
    assert driver.ledger.audit.verify().findings == ()


def test_the_audit_sees_another_generator_in_a_request(driver: Any, raw: Any) -> None:
    made, request = imported(driver), None
    request = asked(driver, made.id)
    raw.execute("DROP TRIGGER requests_terms" + ("" if raw.engine == "sqlite" else " ON requests"))
    raw.execute("UPDATE requests SET generator_id = 'g-other'")
    (said,) = driver.ledger.audit.verify().findings
    assert said.startswith(f"requests {request.id}: column generator_id is not what event ")


def test_what_is_submitted_again(driver: Any) -> None:
    """A live request cannot get another generator; a key stands for its generator too."""
    made = imported(driver)
    first = asked(driver, None)
    with pytest.raises(AlreadyExists, match=f"request {first.id} of 'digits' asks for the same and is queued, without"):
        asked(driver, made.id)
    keyed = asked(driver, made.id, "five", 5, key="k")
    assert asked(driver, made.id, "five", 5, key="k") == keyed
    with pytest.raises(AlreadyExists, match="asks for something else"):
        asked(driver, None, "five", 5, key="k")
    with pytest.raises(NotFound, match="no generator 'g-none'"):
        asked(driver, "g-none")


def test_how_a_generator_would_serve(driver: Any, new_driver: Any) -> None:
    """With its D' where that is what the recipe would draw and the root label; else with its weights alone."""
    made, ledger = imported(driver), driver.ledger
    model, root = ledger.models.get("digits"), ledger.models.version("digits")
    other, small = (
        new_driver(name, **changes).ledger.models.get(name) for name, changes in (("o", {}), ("s", {"classes": 5}))
    )
    assert check_compatible(made, model, root, Recipe()) == "reuse"
    assert check_compatible(made, model, root, OTHER) == "transfer"
    assert check_compatible(made, model, root, Recipe(form="paper")) == "transfer"
    assert check_compatible(made, other, ledger.models.version("o"), Recipe()) == "transfer"
    assert check_compatible(made, model, ledger.models.add_version("digits", "f" * 64), Recipe()) == "transfer"
    with pytest.raises(GeneratorUnfit, match=r"draws 10 classes of 1x32x32, 's' takes 5 classes of 1x32x32"):
        check_compatible(made, small, ledger.models.version("s"), Recipe())
    with ledger.database.reading() as connection:
        candidates = named_candidate(connection, other, ledger.models.version("o"), Recipe(), made.id)
    assert (candidates.reuse, candidates.warm, candidates.required) == (None, None, True)
    assert candidates.transfer is not None
    assert candidates.transfer.id == made.id
    ledger.generators.retire(made.id)
    with pytest.raises(GeneratorUnfit, match="is retired"), ledger.database.reading() as connection:
        named_candidate(connection, other, ledger.models.version("o"), Recipe(), made.id)


def test_a_transfer_makes_a_generator_of_the_line(driver: Any, new_driver: Any) -> None:
    """With the source's weights and its own D'; who of the two is retired first leaves the other its weights."""
    source, other = imported(driver), new_driver("o")
    request = asked(other, source.id)
    claimed = other.claim()
    outcome = other.outcome(request, generator_use="transferred", generator_weights=source.weights)
    other.ledger.commit(claimed, outcome, other.ledger.models.version("o"), transferred_from=source.id)
    (own,) = other.ledger.generators.all("o")
    assert (own.origin, own.transferred_from, own.weights) == ("transferred", source.id, source.weights)
    (erasure,) = other.ledger.models.erasures("o")
    assert (erasure.generator, erasure.generator_use) == (own.id, "transferred")
    details = {event["event"]: event["detail"] for event in other.ledger.models.history("o")}
    assert details["generator_transferred"] == {"generator": own.id, "from": source.id}

    assert driver.ledger.generators.retire(source.id)[1] == [source.dataset]
    needed, removed = driver.ledger.references()
    assert {own.weights, own.dataset} <= needed
    assert removed == {source.dataset}
    assert set(driver.ledger.generators.retire(own.id)[1]) == {own.weights, own.dataset}
    assert driver.ledger.references()[1] == {own.weights, own.dataset, source.dataset}
    assert driver.ledger.audit.verify().findings == ()


def test_a_transfer_that_the_gate_refused_leaves_no_generator(driver: Any, new_driver: Any) -> None:
    """The report names the source, and why."""
    source, other = imported(driver), new_driver("o")
    asked(other, source.id)
    claimed = other.claim()
    outcome = other.outcome(
        claimed, generator_use="transferred", refused=("coverage 0.1 < 0.3",), reason="generator_refused", report={}
    )
    base = other.ledger.models.version("o")
    ended = other.ledger.reject(claimed, "generator_refused", outcome, base, transferred_from=source.id)
    assert other.ledger.generators.all("o") == []
    assert ended.report is not None
    said = ended.report["generator"]
    assert (said["id"], said["refused"]) == (source.id, ["coverage 0.1 < 0.3"])
    asked(other, source.id, "five", 5)
    claimed = other.claim()
    with pytest.raises(ValueError, match="the run transferred a generator, but its id is not given"):
        other.ledger.reject(claimed, "x", outcome, base)


def test_a_generator_in_use_is_left_alone(driver: Any, new_driver: Any) -> None:
    """Also where the request that runs and asks for it is another model's."""
    source, other = imported(driver), new_driver("o")
    asked(other, source.id)
    claimed = other.claim()
    with pytest.raises(TransitionRefused, match=f"request {claimed.id} of 'o' is running"):
        driver.ledger.generators.retire(source.id)
    with pytest.raises(TransitionRefused, match=f"request {claimed.id} of 'o' is running"):
        driver.ledger.generators.seal(source, driver.ledger.models.version("digits"), "5" * 64)


def test_who_asks_for_a_generator_runs_alone(driver: Any) -> None:
    """Neither as the leader of a coalesced run nor as part of one."""
    made = imported(driver)
    for number, generator in ((4, None), (5, made.id), (6, None)):
        asked(driver, generator, f"c{number}", number)
    led = driver.ledger.requests.claim("w", 60.0, max_batch=9)
    assert [each.behaviour.name for each in driver.ledger.requests.batch_members(led)] == ["c6"]
    driver.ledger.requests.cancel(led.id)
    driver.ledger.requests.stop(led)
    led = driver.ledger.requests.claim("w", 60.0, max_batch=9)
    assert (led.behaviour.name, driver.ledger.requests.batch_members(led)) == ("c5", [])
