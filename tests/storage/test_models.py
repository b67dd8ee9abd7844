"""Aliases, re-checks and inherited erasures, and the indexes that their queries use."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from fsu_ray.errors import AlreadyExists, InvalidConfig, NotFound, TransitionRefused, UserError
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Policy, Terms
from fsu_ray.storage import rows
from fsu_ray.storage.ledger import Ledger
from fsu_ray.storage.models import Measured
from fsu_ray.storage.rows import now
from tests.bench.lineage import fill

BRANCH = (
    "INSERT INTO model_versions (id, model_id, number, parent, root, weights, request_id, created_at) "
    "SELECT 'v-x', model_id, {number}, {parent}, 1, weights, NULL, created_at FROM model_versions WHERE number = 1"
)


def chained(ledger: Ledger, event: str) -> list[dict[str, Any]]:
    """The rows that the events of one kind recorded."""
    with ledger.database.reading() as connection:
        query = sa.text("SELECT detail, actor FROM audit_events WHERE event = :event ORDER BY seq")
        return [json.loads(detail)["row"] | {"by": by} for detail, by in connection.execute(query, {"event": event})]


def set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set this machine's clock back by an hour."""
    monkeypatch.setattr(rows, "now", lambda: now() - timedelta(hours=1))


class TestAliases:
    def test_the_first_move_and_one_forward(self, driver: Any) -> None:
        driver.erase("nine", 9)
        first = driver.ledger.models.move_alias("digits", "production", 2, "ann")
        driver.erase("four", 4)
        second = driver.ledger.models.move_alias("digits", "production", 3, "bob", reason="T-7")

        assert (first.model, first.alias, first.version, first.previous) == ("digits", "production", 2, None)
        assert (first.forced, first.reason, first.actor) == (False, None, "ann")
        assert (second.version, second.previous, second.forced, second.reason) == (3, 2, False, "T-7")
        assert driver.ledger.models.alias_moves("digits") == [first, second]
        assert driver.ledger.models.aliases("digits") == {"production": second}
        assert [row["version"] for row in chained(driver.ledger, "alias_moved")] == [2, 3]

    def test_aliases_and_models_do_not_mix(self, driver: Any, new_driver: Callable[..., Any]) -> None:
        other = new_driver("other")
        driver.ledger.models.add_version("digits", "w")
        candidate = driver.ledger.models.move_alias("digits", "candidate", 2)
        production = driver.ledger.models.move_alias("digits", "production", 1)
        elsewhere = driver.ledger.models.move_alias("other", "production", 1)

        assert driver.ledger.models.aliases("digits") == {"candidate": candidate, "production": production}
        assert other.ledger.models.aliases("other") == {"production": elsewhere}
        assert elsewhere.previous is None

    def test_a_version_that_still_has_a_behaviour_is_refused(self, driver: Any) -> None:
        for number, name in enumerate(("nine", "four", "one", "two", "three"), 2):
            driver.erase(name, number)
        driver.ledger.models.move_alias("digits", "production", 6)

        with pytest.raises(TransitionRefused, match="version 5 of 'digits' still has 'three', erased as of version 6;"):
            driver.ledger.models.move_alias("digits", "production", 5)
        with pytest.raises(
            TransitionRefused, match=r"'nine', 'four', 'one', \.\.\., erased as of version 2; .*--force"
        ):
            driver.ledger.models.move_alias("digits", "production", 1)
        assert driver.ledger.models.resolve("digits@production")[1].number == 6
        assert len(driver.ledger.models.alias_moves("digits")) == len(chained(driver.ledger, "alias_moved")) == 1

    def test_a_forced_move_is_on_record(self, driver: Any) -> None:
        driver.erase("nine", 9)
        driver.ledger.models.move_alias("digits", "production", 2)
        forced = driver.ledger.models.move_alias("digits", "production", 1, "ann", force=True, reason="INC-42")

        assert (forced.version, forced.previous, forced.forced, forced.reason) == (1, 2, True, "INC-42")
        assert driver.ledger.models.aliases("digits")["production"] == forced
        row = chained(driver.ledger, "alias_moved")[-1]
        assert (row["forced"], row["reason"], row["actor"], row["by"]) == (True, "INC-42", "ann", "ann")
        needless = driver.ledger.models.move_alias("digits", "production", 2, force=True, reason="INC-43")
        assert not needless.forced, "nothing stood against it"

    def test_a_version_from_outside_has_lost_what_its_parents_have(self, driver: Any) -> None:
        driver.erase("nine", 9)
        driver.ledger.models.add_version("digits", "from outside")
        assert driver.ledger.models.move_alias("digits", "production", 3).version == 3

    def test_a_sibling_still_has_it(self, driver: Any, raw: Any) -> None:
        driver.erase("nine", 9)
        raw.execute(BRANCH.format(number=3, parent=1))
        with pytest.raises(TransitionRefused, match="version 3 of 'digits' still has 'nine', erased as of version 2"):
            driver.ledger.models.move_alias("digits", "production", 3)

    def test_a_reason_is_one_word(self, driver: Any) -> None:
        for force, reason in itertools.product((True, False), ("two words", "a@b.example", "", "ä", "x" * 101)):
            with pytest.raises(UserError, match="no reason that history can keep"):
                driver.ledger.models.move_alias("digits", "production", 1, force=force, reason=reason)
        assert driver.ledger.models.alias_moves("digits") == []

    def test_force_needs_a_reason_and_an_actor_is_opaque(self, driver: Any) -> None:
        with pytest.raises(UserError, match="a forced move needs a reason"):
            driver.ledger.models.move_alias("digits", "production", 1, force=True)
        with pytest.raises(UserError, match="no opaque id"):
            driver.ledger.models.move_alias("digits", "production", 1, "ann@example.org")
        assert driver.ledger.models.alias_moves("digits") == []

    def test_an_invalid_alias_is_refused(self, driver: Any) -> None:
        for alias in ("", "7", "7up", "a b", "a@b", "-a", "ä", "a" * 51, "a\n"):
            with pytest.raises(UserError, match="is no name for an alias"):
                driver.ledger.models.move_alias("digits", alias, 1)
        assert driver.ledger.models.move_alias("digits", "a" * 50, 1).alias == "a" * 50

    def test_unknown_models_and_versions_are_refused(self, driver: Any) -> None:
        for version in (0, 2, -1, 2**31, 10**30):
            with pytest.raises(NotFound, match=f"'digits' has no version {version}; its latest is 1"):
                driver.ledger.models.move_alias("digits", "production", version)
        for missing in (
            driver.ledger.models.aliases,
            driver.ledger.models.alias_moves,
            driver.ledger.models.erased,
            driver.ledger.models.behaviours,
        ):
            with pytest.raises(NotFound, match="no model 'x'"):
                missing("x")

    def test_the_last_move_counts_though_its_clock_is_slow(self, driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The clocks of two machines may differ; the alias points to the version of the last move."""
        driver.ledger.models.add_version("digits", "w")
        driver.ledger.models.move_alias("digits", "production", 1)
        set_back(monkeypatch)
        last = driver.ledger.models.move_alias("digits", "production", 2)

        assert driver.ledger.models.aliases("digits") == {"production": last}
        assert driver.ledger.models.resolve("digits@production")[1].number == 2
        assert [move.version for move in driver.ledger.models.alias_moves("digits")] == [1, 2]


def test_a_reference_names_a_version(driver: Any) -> None:
    driver.ledger.models.add_version("digits", "w")
    driver.ledger.models.move_alias("digits", "production", 1)

    resolved = {
        each: driver.ledger.models.resolve(each)[1].number for each in ("digits", "digits@1", "digits@2", "digits@02")
    }
    assert resolved == {"digits": 2, "digits@1": 1, "digits@2": 2, "digits@02": 2}
    model, version = driver.ledger.models.resolve("digits@production")
    assert (model, version) == (driver.ledger.models.get("digits"), driver.ledger.models.version("digits", 1))
    for missing in ("digits@staging", "digits@²", "digits@1.0", f"digits@{'9' * 5000}"):
        with pytest.raises(NotFound, match=r"model 'digits' has no alias .*; `fsu alias list digits`"):
            driver.ledger.models.resolve(missing)
    for missing in ("digits@3", "digits@99999999999"):
        with pytest.raises(NotFound, match="'digits' has no version"):
            driver.ledger.models.resolve(missing)
    with pytest.raises(UserError, match="'digits@' names no version"):
        driver.ledger.models.resolve("digits@")


def test_the_policy_set_last_is_in_force_though_its_clock_is_slow(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.ledger.models.set_policy("digits", Policy(approval=True))
    set_back(monkeypatch)
    driver.ledger.models.set_policy("digits", Policy(samples_days=3))
    assert driver.ledger.models.policy("digits") == Policy(samples_days=3)


class TestRechecks:
    def test_the_latest_of_each_erasure(self, driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        driver.erase("nine", 9)
        driver.erase("four", 4)
        nine, four = driver.ledger.models.erasures("digits")
        driver.ledger.models.record_rechecks("digits", 2, [Measured(nine.id, 5, 0.0, True)])
        both = [Measured(nine.id, 5, 0.4, False), Measured(four.id, 0, None, True)]
        kept = driver.ledger.models.record_rechecks("digits", 3, both, "ann")

        assert driver.ledger.models.rechecks("digits") == {nine.id: kept[0], four.id: kept[1]}
        assert {id: each.version for id, each in driver.ledger.models.rechecks("digits", 2).items()} == {nine.id: 2}
        assert driver.ledger.models.rechecks("digits", 1) == {}
        assert (kept[0].share, kept[0].passed, kept[0].actor, kept[1].share) == (0.4, False, "ann", None)
        assert [len(chained(driver.ledger, f"recheck_{word}")) for word in ("passed", "failed")] == [2, 1]
        (failed,) = chained(driver.ledger, "recheck_failed")
        assert (failed["erasure_id"], failed["share"], failed["by"]) == (nine.id, 0.4, "ann")

    def test_only_erasures_in_force_are_recorded(self, driver: Any, new_driver: Callable[..., Any]) -> None:
        """An erasure of a later version or of another model is refused, and no re-check is recorded."""
        driver.erase("nine", 9)
        driver.erase("four", 4)
        new_driver("other").erase("one", 1)
        nine, four = driver.ledger.models.erasures("digits")
        (one,) = driver.ledger.models.erasures("other")
        for stranger in (four, one):
            measured = [Measured(each.id, 5, 0.0, True) for each in (nine, stranger)]
            with pytest.raises(NotFound, match=f"erasure {stranger.id} is not in force at version 2 of 'digits'"):
                driver.ledger.models.record_rechecks("digits", 2, measured)
        assert driver.ledger.models.rechecks("digits") == {}


class TestErased:
    def test_erased_has_the_metrics_of_the_erasure_and_of_the_latest_recheck(self, driver: Any) -> None:
        driver.erase("nine", 9, report={"forgetting": {"samples_in_target": 0.25, "probes_in_target": 0.125}})
        driver.erase("crossed", 2, 3, kind="subset", report={"forgetting": {"samples_in_target": None}})
        driver.ledger.models.add_version("digits", "from outside")
        nine, crossed = driver.ledger.models.erasures("digits")
        driver.ledger.models.record_rechecks("digits", 2, [Measured(nine.id, 5, 0.0, True)])
        (again,) = driver.ledger.models.record_rechecks("digits", 4, [Measured(nine.id, 5, 0.5, False)])

        first, second = driver.ledger.models.erased("digits")
        assert (first.erasure, first.version, first.request) == (nine.id, 2, nine.request)
        assert (first.behaviour, first.created_at) == (nine.behaviour, nine.created_at)
        assert (first.samples_in_target, first.probes_in_target, first.recheck) == (0.25, 0.125, again)
        assert (second.erasure, second.behaviour) == (crossed.id, crossed.behaviour)
        assert (second.samples_in_target, second.probes_in_target, second.recheck) == (None, None, None)
        assert [[each.version for each in driver.ledger.models.erased("digits", number)] for number in (1, 2, 3)] == [
            [],
            [2],
            [2, 3],
        ]

    def test_erasures_of_all_branches(self, driver: Any, raw: Any) -> None:
        """`erasures` follows the parents of a version; `all_erasures` and `behaviours` do not."""
        driver.erase("nine", 9)
        raw.execute(BRANCH.format(number=3, parent=1))
        nine = Behaviour(name="nine", kind="class", targets=(9,))

        assert (driver.ledger.models.erased("digits"), driver.ledger.models.erasures("digits")) == ([], [])
        assert driver.ledger.models.behaviours("digits") == {2: [nine]}
        assert [each.behaviour for each in driver.ledger.models.all_erasures("digits")] == [nine]


def plan(ledger: Ledger, query: sa.Select[Any]) -> list[str]:
    """The query plan of the database, which uses an index wherever one fits."""
    with ledger.database.reading() as connection:
        text = query.compile(connection, compile_kwargs={"literal_binds": True})
        if connection.dialect.name == "sqlite":
            return [row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        return [row[0] for row in connection.exec_driver_sql(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {text}")]


@pytest.mark.parametrize("analysed", [False, True], ids=["fresh", "analysed"])
def test_inherited_erasures_are_read_by_indexes(ledger: Ledger, raw: Any, analysed: bool) -> None:
    """On a filled ledger no query reads a table from end to end, and none reads the whole model once a version: also
    where the database has not yet seen how long it is, and plans as if it were short."""
    fill(ledger, "long", 300)
    if analysed:
        raw.execute("ANALYZE")
    model = ledger.models.get("long")
    checks, erased, once = "ix_rechecks_erasure_id_created_at", "ix_erasures_model_id_version", "hashed SubPlan"
    parents = "AND (number = ancestry"
    if raw.engine == "sqlite":
        once, parents = "LIST SUBQUERY", "SEARCH above USING INDEX sqlite_autoindex_model_versions_"
    queries: tuple[tuple[sa.Select[Any], set[str]], ...] = (
        (rows.inherited(model, 300), {parents, erased, once}),
        (rows.measured(model, 300), {parents, erased, once, checks}),
        (rows.still_there(model, 300, 4), {parents, erased, once}),
        (rows.latest_rechecks(model), {erased, checks}),
        (rows.latest_rechecks(model, 300), {erased, checks}),
    )
    for query, expected in queries:
        steps = plan(ledger, query)
        whole = "\n".join(steps)
        read = [step for step in steps if "Seq Scan" in step or (step.startswith("SCAN") and step != "SCAN ancestry")]
        assert not read, whole
        assert not [words for words in expected if words not in whole], whole
    assert len(ledger.models.erased("long")) == len(ledger.models.rechecks("long")) == 299


class TestHistory:
    def test_history_has_decisions_and_removals(self, driver: Any) -> None:
        ledger = driver.ledger
        behaviours = {name: Behaviour(name=name, kind="class", targets=(n,)) for name, n in (("four", 4), ("one", 1))}
        driver.erase("nine", 9)
        (nine,) = ledger.models.erasures("digits")
        ledger.models.set_policy("digits", Policy(approval=True, samples_days=0), "ann")
        terms = Terms(requested_by="bob")
        ask = [ledger.requests.submit("digits", each, "a" * 64, 8, Recipe(), terms)[0] for each in behaviours.values()]
        ledger.requests.deny(ask[0].id, "ann")
        ledger.requests.approve(ask[1].id, "ann")
        ledger.requests.cancel(ask[1].id, "bob")
        ledger.models.record_rechecks("digits", 2, [Measured(nine.id, 5, 0.5, False)], "cron")
        ledger.models.move_alias("digits", "production", 2, "ann")
        ledger.models.move_alias("digits", "production", 1, "ann", force=True, reason="T-1")
        ledger.requests.purge(ledger.requests.get(ask[0].id), "ann")
        (generator,) = ledger.generators.all("digits")
        ledger.generators.seal(generator, ledger.models.version("digits"), "d" * 64, "ann")
        ledger.models.register("other", driver.ledger.models.get("digits").spec, "w")
        ledger.models.set_policy("other", Policy(approval=True))
        ledger.models.move_alias("other", "production", 1)

        events = ledger.models.history("digits")

        told = [(event["event"], event["version"], event["request"]) for event in events]
        assert told[:4] == [
            ("registered", 1, None),
            ("submitted", None, nine.request),
            ("generator_trained", None, nine.request),
            ("erased", 2, nine.request),
        ]
        assert told[4:] == [
            ("policy_set", None, None),
            ("submitted", None, ask[0].id),
            ("submitted", None, ask[1].id),
            ("denied", None, ask[0].id),
            ("approved", None, ask[1].id),
            ("cancelled", None, ask[1].id),
            ("rechecked", 2, None),
            ("recheck_failed", 2, nine.request),
            ("alias_moved", 2, None),
            ("alias_moved", 1, None),
            ("purged", None, ask[0].id),
            ("sealed", 2, None),
        ]
        details = {event["event"]: event["detail"] for event in events}
        assert details["policy_set"] == {**Policy(approval=True, samples_days=0).model_dump(mode="json"), "by": "ann"}
        assert details["denied"] == {"behaviour": "four", "by": "ann"}
        assert details["approved"] == {"behaviour": "one", "by": "ann"}
        assert details["rechecked"] == {"erasures": 1, "failed": 1, "by": "cron"}
        assert details["recheck_failed"] == {"behaviour": "nine", "share": 0.5, "probes": 5}
        moved = {"alias": "production", "previous": 2, "forced": True, "reason": "T-1", "by": "ann"}
        assert details["alias_moved"] == moved
        assert details["purged"] == {"behaviour": "four", "by": "ann"}
        assert details["sealed"] == {"generator": generator.id, "by": "ann"}

    def test_cancelling_before_an_approval_is_no_decision(self, driver: Any) -> None:
        driver.ledger.models.set_policy("digits", Policy(approval=True))
        behaviour, terms = Behaviour(name="four", kind="class", targets=(4,)), Terms(requested_by="bob")
        driver.ledger.requests.cancel(
            driver.ledger.requests.submit("digits", behaviour, "a" * 64, 8, Recipe(), terms)[0].id, "bob"
        )
        told = [event["event"] for event in driver.ledger.models.history("digits")]
        assert told == ["registered", "policy_set", "submitted", "cancelled"]

    def test_history_has_retirements(self, driver: Any) -> None:
        driver.erase("nine", 9)
        (generator,) = driver.ledger.generators.all("digits")
        driver.ledger.generators.retire(generator.id, "age", "policy")
        last = driver.ledger.models.history("digits")[-1]
        assert (last["event"], last["version"], last["request"]) == ("generator_retired", None, None)
        assert last["detail"] == {"generator": generator.id, "reason": "age", "by": "policy"}

    def test_history_sums_up_the_rechecks_of_one_moment(self, driver: Any) -> None:
        for number, name in enumerate(("nine", "four", "one")):
            driver.erase(name, number)
        measured = [Measured(each.id, 5, 0.0, True) for each in driver.ledger.models.erasures("digits")]
        driver.ledger.models.record_rechecks("digits", 4, measured)
        driver.ledger.models.record_rechecks("digits", 4, measured[:2])
        rechecked = [event["detail"] for event in driver.ledger.models.history("digits") if "recheck" in event["event"]]
        assert [(each["erasures"], each["failed"]) for each in rechecked] == [(3, 0), (2, 0)]


def test_moments_of_history_are_aware(driver: Any) -> None:
    driver.ledger.models.move_alias("digits", "production", 1)
    assert all(event["at"].tzinfo is UTC for event in driver.ledger.models.history("digits"))
    assert driver.ledger.models.aliases("digits")["production"].created_at <= datetime.now(UTC)


def test_a_name_is_checked_before_a_model_is_registered(driver: Any) -> None:
    """`check_name_free` refuses what `register` would refuse, and registers nothing."""
    driver.ledger.models.check_name_free("other")
    with pytest.raises(AlreadyExists, match="choose another name"):
        driver.ledger.models.check_name_free("digits")
    with pytest.raises(InvalidConfig, match="two words"):
        driver.ledger.models.check_name_free("two words")
    assert [model.name for model in driver.ledger.models.all()] == ["digits"]


def test_a_registration_is_an_event_of_its_model(driver: Any) -> None:
    model = driver.ledger.models.get("digits")
    driver.ledger.models.register("other", model.spec, driver.ledger.models.version("digits").weights, actor="u-17")
    (event,) = (each for each in driver.ledger.audit.log(model="other") if each.event == "registered")
    assert (event.model, event.actor, json.loads(event.detail)["table"]) == ("other", "u-17", "models")


@pytest.mark.parametrize(("number", "names"), [(3, "'b1', 'b2', 'b3',"), (4, "'b1', 'b2', 'b3', ...,")])
def test_a_refused_alias_names_three_behaviours_that_are_still_there(driver: Any, number: int, names: str) -> None:
    for target in range(1, number + 1):
        driver.erase(f"b{target}", target)
    with pytest.raises(TransitionRefused) as refused:
        driver.ledger.models.move_alias("digits", "production", 1)
    assert f"still has {names} erased as of version 2;" in str(refused.value)


def test_a_recheck_is_an_event_of_its_model(driver: Any) -> None:
    driver.erase()
    (erasure,) = driver.ledger.models.erasures("digits")
    driver.ledger.models.record_rechecks("digits", 2, [Measured(erasure.id, 5, 0.0, True)], "u-17")
    event = driver.ledger.audit.log(model="digits")[-1]
    assert (event.event, event.model, event.actor) == ("recheck_passed", "digits", "u-17")


def test_an_erased_version_keeps_its_root_and_one_from_outside_is_its_own(driver: Any) -> None:
    erased = driver.erase()
    outside = driver.ledger.models.add_version("digits", erased.weights)
    later = driver.erase("four", 4)
    assert [(v.number, v.parent, v.root) for v in driver.ledger.models.versions("digits")] == [
        (1, None, 1), (2, 1, 1), (3, 2, 3), (4, 3, 3)
    ]  # fmt: skip
    assert (erased.root, outside.root, later.root) == (1, 3, 3)
    events = [event.request for event in driver.ledger.audit.log(model="digits") if event.event == "version_added"]
    assert events == [None, erased.request, None, later.request]
