"""The audit: an unchanged ledger passes, and every change made outside the ledger is reported."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fsu_ray.config import Timings
from fsu_ray.errors import AuditFailed
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, ModelSpec, Policy, Request, Status, Terms
from fsu_ray.storage import audit, chain, schema
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.chain import ChainHead
from fsu_ray.storage.columns import Instant, metadata
from fsu_ray.storage.ledger import Ledger, open_ledger
from fsu_ray.storage.models import Measured
from fsu_ray.work import Outcome, TargetResult

SECRET = "/home/alice/Pictures/me.png"
SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Filled:
    """A full ledger whose triggers the owner of the database has dropped."""

    ledger: Ledger
    connection: sa.Connection
    name: str = "digits"

    @property
    def engine(self) -> str:
        return self.connection.dialect.name

    def raw(self, sql: str, **parameters: Any) -> Any:
        return self.connection.execute(sa.text(sql if parameters else sql.replace(":", "\\:")), parameters)

    def execute(self, sql: str, **parameters: Any) -> None:
        assert self.raw(sql, **parameters).rowcount != 0, "nothing was changed"

    def one(self, sql: str) -> Any:
        return self.raw(sql).fetchone()[0]

    @contextmanager
    def undone(self, *tables: str) -> Iterator[None]:
        """A block after which these tables are as they were before."""
        for table in tables:
            self.raw(f"CREATE TEMPORARY TABLE kept_{table} AS SELECT * FROM {table}")
        try:
            yield
        finally:
            for table in tables:
                self.raw(f"DELETE FROM {table}")
                self.raw(f"INSERT INTO {table} SELECT * FROM kept_{table}")
                self.raw(f"DROP TABLE kept_{table}")


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    """One for all tests on an engine; each test undoes its changes."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('filled')}/ledger.db"
    else:
        server, schema_name = request.getfixturevalue("server"), f"fsu_test_{secrets.token_hex(6)}"
        with server.connect() as connection:
            connection.exec_driver_sql(f"CREATE SCHEMA {schema_name}")
        place = server.url.render_as_string(hide_password=False)
        url = f"{place}?options=-csearch_path%3D{schema_name}"
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with open_ledger(url) as ledger, engine.connect() as connection:
        fill(ledger)
        filled = Filled(ledger, connection)
        if request.param == "sqlite":
            for (name,) in filled.raw("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                filled.raw(f"DROP TRIGGER {name}")
        else:
            filled.raw("SET session_replication_role = replica")  # no triggers, and no foreign keys either
        yield filled
    engine.dispose()
    if request.param == "postgresql":
        with server.connect() as connection:
            connection.exec_driver_sql(f"DROP SCHEMA {schema_name} CASCADE")


def outcome(request: Request, use: str = "trained") -> Outcome:
    return Outcome(
        reason=None,
        generator_use=use,
        generator_weights=digest(f"generator of {request.id}"),
        dataset=digest(f"dataset of {request.id}"),
        metrics={"agreement": 0.99, "starved": []},
        refused=(),
        weights=digest(f"weights of {request.id}"),
        targets=(
            TargetResult(
                request.id,
                digest(f"mask of {request.id}"),
                digest(f"probes of {request.id}"),
                {"forgetting": {"probes_in_target": 0.01}, "retention": {"agreement": 0.98}},
            ),
        ),
        seconds={"invert": 60.0},
    )


def submit(ledger: Ledger, what: str, *targets: int, kind: Any = "class", **terms: Any) -> Request:
    behaviour = Behaviour(name=what, kind=kind, targets=targets)
    return ledger.requests.submit("digits", behaviour, digest(f"samples of {what}"), 8, Recipe(), Terms(**terms))[0]


def claim(ledger: Ledger, worker: str = "host-1:77", lease: float = 60.0) -> Request:
    request = ledger.requests.claim(worker, lease, "digits")
    assert request is not None
    return request


def fill(ledger: Ledger) -> None:
    """Call every writing method, so that every audited table has rows."""
    name, past = "digits", datetime.now(UTC) - timedelta(hours=1)
    ledger.models.register(name, SPEC, digest("weights"), "digits")
    ledger.models.set_policy(name, Policy(approval=True, samples_days=0.0), "admin-1")
    due = past + timedelta(days=9)
    asked = submit(ledger, "nine", 9, key="ticket-1", requested_by="u-17", priority=3, not_before=past, due_at=due)
    ledger.requests.approve(asked.id, "u-18")
    first = claim(ledger)
    ledger.commit(first, outcome(first), ledger.models.version(name))
    ledger.requests.deny(submit(ledger, "eight", 8, requested_by="u-17").id, "u-18")
    ledger.models.set_policy(name, Policy(generators="max-age", generator_days=30.0), "admin-1")
    trained = ledger.generators.all(name)[0]
    ledger.recipes.keep(name, "class", Recipe(), 0.9, {"trials": 24, "parts": [{"part": "coverage"}]}, "u-24")
    submit(ledger, "four", 4)
    second = claim(ledger)
    ledger.commit(second, outcome(second, "reused"), ledger.models.version(name), generator_id=trained.id)
    ledger.recipes.reset(name, "class", "u-24")
    submit(ledger, "some", 2, 3, kind="subset")
    third = claim(ledger)
    ledger.commit(third, outcome(third, "warm_started"), ledger.models.version(name), warm_started_from=trained.id)

    submit(ledger, "three", 3)
    ledger.requests.retry(claim(ledger), f"FileNotFoundError: {SECRET}: no such file")
    submit(ledger, "two", 2)
    ledger.requests.fail(claim(ledger), f"RuntimeError: cannot read '{SECRET}'")
    submit(ledger, "one", 1)
    refused = claim(ledger)
    ledger.reject(refused, "not_forgotten", outcome(refused), ledger.models.version(name))
    submit(ledger, "zero", 0)
    claim(ledger, lease=-1.0)
    late = claim(ledger, "host-2:78")
    ledger.requests.cancel(late.id, "u-19")
    ledger.requests.stop(late)
    submit(ledger, "six", 6)
    ledger.requests.release(claim(ledger), "stopped")

    ledger.models.move_alias(name, "production", 4, "u-20")
    ledger.models.move_alias(name, "production", 2, "u-20", force=True, reason="OPS-12")
    erased = ledger.models.erasures(name)
    shares = (Measured(erased[0].id, 450, 0.0125, True), Measured(erased[1].id, 0, None, False))
    ledger.models.record_rechecks(name, 4, shares, "u-21")
    ledger.requests.purge(ledger.requests.get(first.id), "policy")
    ledger.generators.retire(ledger.generators.all(name)[1].id, "operator", "u-22")
    ledger.generators.seal(trained, ledger.models.version(name), digest("sealed"), "u-22")
    ledger.discard([digest("stray")], "policy")
    schedule = ledger.schedules.add(name, "0 2 * * *", "Europe/Berlin", 5, 60, "u-23")
    window = ledger.schedules.fire(schedule, past, 1, "host-1:79", 60.0)
    assert window is not None
    ledger.schedules.close_window(window, 1)
    ledger.schedules.set_state(schedule.id, "paused", "u-23")
    ledger.database.flush()


def findings(driver: Any, *arguments: Any) -> tuple[str, ...]:
    verdict = driver.ledger.audit.verify(*arguments)
    assert verdict.found == len(verdict.findings)
    return verdict.findings


def test_an_unchanged_ledger_has_no_findings(filled: Filled) -> None:
    """With rows in every audited table."""
    verdict = filled.ledger.audit.verify()

    verdict.check()
    assert verdict.findings == ()
    assert verdict.events == filled.one("SELECT count(*) FROM audit_events") > 50
    assert verdict.head == filled.ledger.audit.head()
    for table in audit.AUDITED:
        assert filled.one(f"SELECT count(*) FROM {table}"), table


# Of each table: a change that its constraints allow, and the column whose name is then to be told.
CHANGES = {
    "models": ("test_set = 'mnist'", "test_set"),
    "model_policies": ("actor = 'somebody'", "actor"),
    "requests": ("sample_count = sample_count + 1", "sample_count"),
    "request_events": ("actor = 'somebody'", "actor"),
    "model_versions": ("created_at = '2020-01-01T00:00:00.000000+00:00'", "created_at"),
    "generators": ("figures = '{\"agreement\": 1}'", "figures"),
    "erasures": ('report = \'{"forgetting": {"probes_in_target": 0.0}}\'', "report"),
    "aliases_history": ("forced = NOT forced", "forced"),
    "rechecks": ("share = coalesce(share, 0) + 1e-9", "share"),
    "generator_retirements": ("reason = 'age'", "reason"),
    "seals": ("dataset = 'x'", "dataset"),
    "removals": ("digest = 'x'", "digest"),
    "searches": ("score = score + 1e-9", "score"),
    "schedules": ("minutes = NULL", "minutes"),
    "schedule_events": ("state = 'active', actor = 'somebody'", "state|actor"),
    "schedule_windows": ("missed = missed + 1", "missed"),
}


def a_key(filled: Filled, table: str) -> tuple[str, str]:
    """The condition that fits one row of a table, and how a finding names that row."""
    keys = [column.name for column in metadata.tables[table].primary_key]
    row = filled.raw(f"SELECT {', '.join(keys)} FROM {table} ORDER BY {', '.join(keys)} LIMIT 1").fetchone()
    shown = [str(value) for value in row]
    if isinstance(row[-1], datetime):
        shown[-1] = row[-1].isoformat(timespec="microseconds")
    return " AND ".join(f"{name} = '{value}'" for name, value in zip(keys, row, strict=True)), " ".join(shown)


def test_a_changed_or_deleted_row_is_reported(filled: Filled) -> None:
    """In every audited table."""
    assert set(CHANGES) == set(audit.AUDITED)
    for table, (change, column) in CHANGES.items():
        where, key = a_key(filled, table)
        with filled.undone(table):
            filled.execute(f"UPDATE {table} SET {change} WHERE {where}")
            first = findings(filled)[0]
            pattern = rf"{table} {re.escape(key)}: column ({column}) is not what event \d+ recorded"
            assert re.fullmatch(pattern, first), (pattern, first)
        with filled.undone(table):
            filled.execute(f"DELETE FROM {table} WHERE {where}")
            first = findings(filled)[0]
            assert re.fullmatch(rf"{table} {re.escape(key)}: missing, event \d+ has recorded it", first), first
    assert findings(filled) == ()


def test_a_change_between_json_values_that_python_calls_equal_is_reported(filled: Filled) -> None:
    """Python compares 0, 0.0 and False as equal."""
    for metrics in ('{"agreement": 0.99, "starved": false}', '{"agreement": "0.99", "starved": []}', "[1"):
        if metrics == "[1" and filled.engine != "sqlite":
            continue  # PostgreSQL takes nothing but JSON
        with filled.undone("generators"):
            filled.execute("UPDATE generators SET figures = :figures", figures=metrics)
            assert ": column figures is not what event" in findings(filled)[0]
    with filled.undone("schedule_events"):
        filled.execute("UPDATE schedule_events SET actor = ' u-23'")
        assert ": column actor is not what event" in findings(filled)[0]


def test_a_row_without_an_event_is_reported(filled: Filled) -> None:
    copies = {"rechecks": {"id": "'c-0'"}, "request_events": {"number": "99"}, "erasures": {"id": "'e-0'"}}
    for table, others in copies.items():
        names = [column.name for column in metadata.tables[table].columns]
        chosen = ", ".join(others.get(name, name) for name in names)
        where, key = a_key(filled, table)
        with filled.undone(table):
            filled.execute(f"CREATE TEMPORARY TABLE copied AS SELECT {chosen} FROM {table} WHERE {where}")
            if table == "erasures":  # one a request: it takes the place of another one
                filled.execute(f"DELETE FROM erasures WHERE {where}")
            filled.execute(f"INSERT INTO {table} SELECT * FROM copied")
            filled.raw("DROP TABLE copied")
            said = findings(filled)
        new = f"{key.split()[0]} 99" if table == "request_events" else others["id"].strip("'")
        assert f"{table} {new}: no event has recorded it" in said


def test_a_request_is_in_the_state_of_its_last_step(filled: Filled) -> None:
    where = "status = 'rejected' AND report IS NOT NULL"
    request = filled.one(f"SELECT id FROM requests WHERE {where}")
    step, report = "is not that of its last step", r"is not what event \d+ recorded"
    for change, words in {
        "status = 'queued', finished_at = NULL": f"column status {step}",
        "attempt = attempt + 1": f"column attempt {step}",
        "changes = changes + 1": f"column changes {step}",
        "reason = 'fine'": f"column reason {step}",
        "finished_at = '2020-01-01T00:00:00.000000+00:00'": f"column finished_at {step}",
        "report = '{}'": f"column report {report}",
        "report = NULL": f"column report {report}",
    }.items():
        with filled.undone("requests"):
            filled.execute(f"UPDATE requests SET {change} WHERE {where}")
            assert re.fullmatch(f"requests {request}: {words}", findings(filled)[0]), change


def test_the_version_of_a_request_is_that_of_its_erasure(filled: Filled) -> None:
    with filled.undone("requests"):
        filled.execute("UPDATE requests SET version = 4 WHERE version = 2")
        assert findings(filled)[0].endswith(": column version is not that of its erasure")


def test_a_changed_event_is_reported(filled: Filled) -> None:
    """In every column, and no other event is reported."""
    for column, value in {
        "at": "2020-01-01T00:00:00.000000+00:00",
        "event": "erased",
        "model": "other",
        "request": "r-0",
        "actor": "somebody",
        "previous": "0" * 63 + "1",
        "hash": "0" * 63 + "1",
    }.items():
        with filled.undone("audit_events"):
            filled.execute(f"UPDATE audit_events SET {column} = :value WHERE seq = 17", value=value)
            said = [words for words in findings(filled) if words.startswith("audit_events")]
        first = "its hash is not that of its content"
        if column == "previous":
            first = "its previous hash is not that of event 16"
        assert said[0] == f"audit_events 17: {first}"
        assert len(said) == (2 if column in ("hash", "previous") else 1)
    with filled.undone("audit_events"):
        filled.execute("UPDATE audit_events SET detail = replace(detail, 'digits', 'other') WHERE seq = 1")
        assert findings(filled)[0] == "audit_events 1: its hash is not that of its content"
    with filled.undone("audit_events"):
        filled.execute("UPDATE audit_events SET detail = '{}' WHERE seq = 17")
        assert findings(filled)[:2] == (
            "audit_events 17: its hash is not that of its content",
            "audit_events 17: its detail names no row of the ledger",
        )


def test_an_event_with_a_hash_of_its_own_breaks_the_next_one(filled: Filled) -> None:
    """Whoever changes an event and its hash must change all that follow, and the row that it is about."""
    with filled.ledger.database.reading() as connection:
        events = [event for batch in chain.stored(connection) for event in batch]
    event = chain.Event(*events[16])._replace(actor="somebody")
    link = chain.hash_of(event)
    with filled.undone("audit_events"):
        filled.execute("UPDATE audit_events SET actor = 'somebody', hash = :link WHERE seq = 17", link=link)
        assert findings(filled) == ("audit_events 18: its previous hash is not that of event 17",)


def test_a_second_event_of_the_same_row_is_reported(filled: Filled) -> None:
    """If the later event counted, a changed row could be covered by a new event."""
    with filled.ledger.database.reading() as connection:
        events = [chain.Event(*event) for batch in chain.stored(connection) for event in batch]
        at = connection.scalar(sa.select(schema.audit_events.c.at).where(schema.audit_events.c.seq == 17))
    again = events[16]._replace(seq=len(events) + 1, previous=events[-1].hash)
    again = again._replace(hash=chain.hash_of(again))
    with filled.undone("audit_events"):
        filled.connection.execute(sa.insert(schema.audit_events).values({**again._asdict(), "at": at}))
        (said,) = findings(filled)
    assert said.endswith(f": event {again.seq} records it again, after 17")


def test_a_deleted_event_is_reported(filled: Filled) -> None:
    """In the middle it leaves a gap in the numbers, at the end a row without an event."""
    last = filled.one("SELECT max(seq) FROM audit_events")
    with filled.undone("audit_events"):
        filled.execute("DELETE FROM audit_events WHERE seq = 17")
        assert findings(filled)[0] == "audit_events 17: missing, 18 comes after 16"
    with filled.undone("audit_events"):
        filled.execute(f"DELETE FROM audit_events WHERE seq = {last}")
        (said,) = findings(filled)
        assert re.fullmatch(r"\w+ \S+: no event has recorded it", said)
    noted = filled.ledger.audit.head()
    assert findings(filled, None, noted) == ()
    with filled.undone("audit_events"):
        filled.execute(f"DELETE FROM audit_events WHERE seq = {last}")
        assert findings(filled, None, noted)[0] == (
            f"audit_events {last}: the chain does not have the hash that was noted of it"
        )


def test_swapped_events_are_reported(filled: Filled) -> None:
    """Their numbers are swapped, or their contents."""
    with filled.undone("audit_events"):
        for old, new in ((16, -1), (17, 16), (-1, 17)):
            filled.execute(f"UPDATE audit_events SET seq = {new} WHERE seq = {old}")
        assert findings(filled)[0].startswith("audit_events 16: ")
    with filled.undone("audit_events"):
        said = "at, event, model, request, actor, detail"
        filled.execute(f"CREATE TEMPORARY TABLE two AS SELECT 33 - seq AS seq, {said} FROM audit_events "
                          "WHERE seq IN (16, 17)")  # fmt: skip
        values = ", ".join(f"{name} = (SELECT {name} FROM two WHERE two.seq = audit_events.seq)"
                           for name in said.split(", "))  # fmt: skip
        filled.execute(f"UPDATE audit_events SET {values} WHERE seq IN (16, 17)")
        assert findings(filled)[0] == "audit_events 16: its hash is not that of its content"


def test_a_noted_head_must_be_in_the_chain(filled: Filled) -> None:
    with filled.ledger.database.reading() as connection:
        events = [event for batch in chain.stored(connection) for event in batch]
    assert findings(filled, None, ChainHead(7, events[6].hash)) == ()
    assert findings(filled, None, ChainHead(0, chain.GENESIS)) == ()
    for wrong in (ChainHead(7, events[7].hash), ChainHead(10_000, events[6].hash), ChainHead(0, events[0].hash)):
        (said,) = findings(filled, None, wrong)
        assert said == f"audit_events {wrong.seq}: the chain does not have the hash that was noted of it"


def test_the_error_names_the_first_finding_and_counts_the_others(filled: Filled) -> None:
    with filled.undone("audit_events", "rechecks"):
        filled.execute("UPDATE audit_events SET actor = 'somebody' WHERE seq IN (17, 20)")
        filled.execute("UPDATE rechecks SET version = 2")
        with pytest.raises(AuditFailed) as caught:
            filled.ledger.audit.verify().check()
    assert str(caught.value) == "audit_events 17: its hash is not that of its content (and 3 more)"


@pytest.mark.parametrize("timings", [Timings(flush=3600.0)])
def test_steps_that_wait_for_the_chain_are_no_finding(driver: Any, raw: Any) -> None:
    """An audit before the flush changes nothing and counts the waiting steps."""
    driver.submit()
    driver.claim()

    verdict = driver.ledger.audit.verify()
    assert (verdict.found, verdict.waiting) == (0, 1)
    assert driver.ledger.audit.verify().waiting == 1
    assert driver.ledger.audit.head().seq == verdict.events + 1
    assert driver.ledger.audit.verify().waiting == 0
    raw.execute("INSERT INTO audit_pending SELECT request_id, number FROM request_events WHERE number = 3")
    assert findings(driver)[0].endswith(f" 3: waits for the chain, and is in event {verdict.events + 1}")


def test_many_findings_are_counted_and_the_first_kept(filled: Filled, monkeypatch: Any) -> None:
    monkeypatch.setattr(audit, "MAX_FINDINGS", 2)
    with filled.undone("audit_events"):
        filled.execute("UPDATE audit_events SET actor = 'somebody'")
        verdict = filled.ledger.audit.verify()
    assert verdict.found == verdict.events
    assert verdict.findings == tuple(f"audit_events {n}: its hash is not that of its content" for n in (1, 2))


@pytest.fixture
def stored(filled: Filled, tmp_path: Path) -> Artifacts:
    """All artifacts that `filled` needs."""
    store = Artifacts.open(str(tmp_path / "artifacts"))
    behaviours = ("nine", "eight", "four", "some", "three", "two", "one", "zero", "six")
    texts = {f"samples of {name}" for name in behaviours} | {"weights", "sealed"}
    for request in filled.ledger.requests.all():
        texts |= {f"{what} of {request.id}" for what in ("generator", "dataset", "weights", "mask", "probes")}
    needed, _ = filled.ledger.references()
    kept = {store.put(text.encode()) for text in texts if digest(text) in needed}
    assert kept == needed
    return store


def test_artifacts_are_compared_with_their_digests(filled: Filled, stored: Artifacts) -> None:
    verdict = filled.ledger.audit.verify(stored)
    assert (verdict.found, verdict.artifacts) == (0, len(stored.digests()))
    needed, removed = filled.ledger.references()
    changed, missing = sorted(needed)[:2]

    Path(stored.path(changed)).write_bytes(b"something else")
    stored.delete(missing)
    back = stored.put(b"samples of nine")  # purged, and on record as such

    assert back in removed
    assert set(findings(filled, stored)) == {
        f"artifact {changed}: its content is not that of its name",
        f"artifact {missing}: missing",
        f"artifact {back}: is on record as removed, and still there",
    }
    assert findings(filled) == ()


def test_an_artifact_that_is_purged_during_the_audit_is_no_finding(
    filled: Filled, stored: Artifacts, monkeypatch: Any
) -> None:
    request = next(each for each in filled.ledger.requests.all() if each.behaviour.name == "four")
    has = Artifacts.has

    def purged(self: Artifacts, name: str) -> bool:
        if name == request.samples and has(self, name):
            for gone in filled.ledger.requests.purge(request, "policy"):
                self.delete(gone)
        return has(self, name)

    monkeypatch.setattr(Artifacts, "has", purged)
    with filled.undone("audit_events", "removals"):
        assert findings(filled, stored) == ()
        assert not has(stored, request.samples)


def test_the_log_is_of_a_model_a_request_or_the_latest(driver: Any, new_driver: Any) -> None:
    driver.erase()
    other = new_driver("other").submit()
    ledger = driver.ledger

    assert {event.model for event in ledger.audit.log("other")} == {"other"}
    assert next(event.event for event in ledger.audit.log(request=other.id[:15])) == "submitted"
    assert {event.request for event in ledger.audit.log(request=other.id)} == {other.id}
    everything = ledger.audit.log()
    assert ledger.audit.log(last=3) == everything[-3:]
    assert [event.seq for event in everything] == list(range(1, len(everything) + 1))


ID, DIGEST = r"[a-z]-[0-9a-f]{19}", r"[0-9a-f]{64}"
ACTOR, WORD = r"(operator|policy|[a-z]+-\d+|host-\d:\d+|w1)", r"[a-z][a-z0-9_-]{0,30}"
STATUS = f"({'|'.join(Status)})"
REASON = (
    r"lease_expired|stopped|denied|not_forgotten|cancelled while running"
    r"|FileNotFoundError: <path>: no such file|RuntimeError: cannot read '<path>'"
)
NAMES = {  # what is called the same is the same in every table
    "id": ID, "model_id": ID, "request_id": ID, "generator_id": ID, "erasure_id": ID, "schedule_id": ID, "lead": ID,
    "transferred_from": ID, "warm_started_from": ID, "samples": DIGEST, "weights": DIGEST, "dataset": DIGEST,
    "mask": DIGEST, "probes": DIGEST,
    "recipe_digest": DIGEST, "digest": DIGEST, "actor": ACTOR, "worker": ACTOR, "requested_by": ACTOR,
    "cancel_by": ACTOR, "changed_by": ACTOR, "behaviour_name": "[A-Za-z0-9][A-Za-z0-9_. -]*",
    "behaviour_kind": "class|subset", "behaviour_targets": "",
    "generator_use": "trained|reused|warm_started|transferred",
}  # fmt: skip
GRAMMAR = {  # of every column that holds text; for JSON, of every text in it
    "models.name": WORD, "models.spec": WORD, "models.test_set": "digits", "model_policies.policy": WORD,
    "requests.recipe": WORD, "requests.idempotency_key": rf"{DIGEST}|{WORD}", "requests.status": STATUS,
    "requests.reason": REASON, "requests.report": rf"{ID}|{WORD}|{DIGEST}",
    "request_events.old": STATUS, "request_events.new": STATUS, "request_events.reason": REASON,
    "generators.origin": "trained|warm_started|transferred|imported",
    "generators.spec": WORD, "generators.figures": WORD,
    "erasures.report": rf"{ID}|{WORD}|{DIGEST}", "aliases_history.alias": WORD, "aliases_history.reason": r"OPS-\d+",
    "generator_retirements.reason": "operator|erasure|age|seal",
    "removals.reason": "purged|retired|sealed|unreferenced",
    "searches.kind": "class|subset", "searches.recipe": WORD, "searches.evidence": WORD,
    "schedules.cron": r"[0-9*/, -]+", "schedules.timezone": "[A-Z][a-z]+/[A-Z][a-z]+",
    "schedule_events.state": "active|paused|removed", "audit_events.event": WORD, "audit_events.model": WORD,
    "audit_events.request": ID, "audit_events.previous": DIGEST, "audit_events.hash": DIGEST,
}  # fmt: skip


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from texts_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner)
    elif isinstance(value, str):
        yield value


def check_text(table: str, column: str, value: Any) -> None:
    """Every text of a value matches its column's pattern and is no path."""
    pattern = GRAMMAR.get(f"{table}.{column}", NAMES.get(column))
    assert pattern is not None, f"{table}.{column} has no grammar"
    for text in texts_of(value):
        assert re.fullmatch(pattern, text), f"{table}.{column}: {text}"
        assert not re.search(r"(^|[^\w])[/\\~]\w", text), f"{table}.{column}: {text}"


def test_no_personal_data_in_any_table(filled: Filled) -> None:
    """Every text in the ledger is an id, a digest, a name, one of a few words, or a sentence of our own; a column
    that is new must say which."""
    closed = (sa.Integer, sa.Boolean, sa.Float, Instant)
    with filled.ledger.database.reading() as connection:
        for table in metadata.tables.values():
            assert not any(isinstance(column.type, sa.LargeBinary) for column in table.columns)
            for row in connection.execute(sa.select(table)).mappings():
                for column in table.columns:
                    value = row[column.name]
                    if column is schema.audit_events.c.detail:
                        detail = json.loads(value)
                        assert detail.keys() <= {"table", "row", "report"}
                        about = metadata.tables[detail["table"]]
                        assert re.fullmatch(DIGEST, detail.get("report", "0" * 64))
                        for name, inner in detail["row"].items():
                            if not isinstance(about.c[name].type, closed):
                                check_text(about.name, name, inner)
                    elif not isinstance(column.type, closed):
                        assert not isinstance(value, bytes)
                        check_text(table.name, column.name, value)
    for table in metadata.tables.values():
        for column in table.columns:
            if not isinstance(column.type, closed) and column is not schema.audit_events.c.detail:
                check_text(table.name, column.name, None)


def test_the_ledgers_own_file_has_no_path_in_it(filled: Filled) -> None:
    """Neither in its pages nor in its write-ahead log."""
    if filled.engine == "sqlite":
        file = Path(str(filled.connection.engine.url.database))
        data = b"".join(each.read_bytes() for each in file.parent.glob("ledger.db*"))
        assert b"<path>" in data
        assert b"me.png" not in data
        assert b"alice" not in data


def test_a_report_that_no_step_recorded_is_named(filled: Filled) -> None:
    """The last step of a request that failed says that there was none."""
    request = filled.one("SELECT id FROM requests WHERE status = 'failed' AND report IS NULL")
    with filled.undone("requests"):
        filled.execute(f"UPDATE requests SET report = '{{}}' WHERE id = '{request}'")
        (finding,) = findings(filled)
    assert re.fullmatch(rf"requests {request}: column report is not what event \d+ recorded", finding)


def test_a_column_that_is_younger_than_an_event_must_be_empty(filled: Filled) -> None:
    """An event that knows no `generator_id` stands for a row that has none."""
    request = filled.one("SELECT id FROM requests ORDER BY submitted_at LIMIT 1")
    event = f"event = 'submitted' AND request = '{request}'"
    detail = json.loads(filled.one(f"SELECT detail FROM audit_events WHERE {event}"))
    assert detail["row"].pop("generator_id") is None
    with filled.undone("audit_events", "requests"):
        filled.execute(f"UPDATE audit_events SET detail = :detail WHERE {event}", detail=json.dumps(detail))
        (broken,) = findings(filled)
        assert broken.endswith(": its hash is not that of its content")
        generator = filled.one("SELECT id FROM generators LIMIT 1")
        filled.execute(f"UPDATE requests SET generator_id = '{generator}' WHERE id = '{request}'")
        _, finding = findings(filled)
    assert re.fullmatch(rf"requests {request}: column generator_id is not what event \d+ recorded", finding)


def test_a_finding_names_its_column_while_it_may_be_told(filled: Filled, monkeypatch: Any) -> None:
    """The row that is compared last has the earliest event: it is the one finding that is told."""
    monkeypatch.setattr(audit, "MAX_FINDINGS", 1)
    where, key = a_key(filled, "requests")
    with filled.undone("requests", "erasures"):
        erasure, _ = a_key(filled, "erasures")
        filled.execute(f"UPDATE erasures SET {CHANGES['erasures'][0]} WHERE {erasure}")
        filled.execute(f"UPDATE requests SET {CHANGES['requests'][0]} WHERE {where}")
        verdict = filled.ledger.audit.verify()
    assert verdict.found == 2
    assert verdict.findings[0].startswith(f"requests {key}: column sample_count is not")
