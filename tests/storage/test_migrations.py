"""Ledgers of earlier revisions are migrated with all their rows and go on working."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from fsu_ray.config import Timings
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, ModelSpec, Policy, Status
from fsu_ray.storage.audit import AUDITED
from fsu_ray.storage.chain import ChainHead
from fsu_ray.storage.database import Database, connect, migrations
from fsu_ray.storage.ledger import Ledger, open_ledger
from fsu_ray.storage.schema import LATER
from fsu_ray.work import Outcome, TargetResult

SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)
REPORT = {"forgetting": {"probes_in_target": 1e-07, "samples_in_target": 0.0}, "by": [0.1, None, "ä"], "n": 3}
AT = "2026-01-0{}T10:00:00.123456+00:00"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class First:
    """A database of revision 0001, filled by plain SQL as the fsu_ray of that time did."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, table: str, **values: Any) -> None:
        plain = {name: json.dumps(v) if isinstance(v, dict | list) else v for name, v in values.items()}
        names = ", ".join(plain)
        marks = ", ".join(f":{name}" for name in plain)
        self._connection.execute(sa.text(f"INSERT INTO {table} ({names}) VALUES ({marks})"), plain)

    def request(self, number: int, *steps: dict[str, Any]) -> str:
        """A request for one class, taken through `steps`."""
        request = f"r-{number:019x}"
        self.insert(
            "requests", id=request, model_id="m-1", **behaviour(number), samples=digest(f"samples {number}"),
            sample_count=8, recipe=Recipe().model_dump(mode="json"), idempotency_key=digest(f"key {number}"),
            submitted_at=AT.format(number), status="submitted",
        )  # fmt: skip
        for step in ({"status": "queued"}, *steps):
            plain = {name: json.dumps(v) if isinstance(v, dict) else v for name, v in step.items()}
            change = ", ".join(f"{name} = :{name}" for name in plain)
            self._connection.execute(sa.text(f"UPDATE requests SET {change} WHERE id = :id"), {**plain, "id": request})
        return request


def behaviour(number: int) -> dict[str, Any]:
    return {"behaviour_name": f"class {number}", "behaviour_kind": "class", "behaviour_targets": [number]}


def running(until: str = AT.format(9)) -> dict[str, Any]:
    return {"status": "running", "attempt": 1, "worker": "host:1", "lease_until": until, "started_at": AT.format(8)}


def ended(status: str, **values: Any) -> dict[str, Any]:
    return {"status": status, "lease_until": None, "finished_at": AT.format(9), **values}


@pytest.fixture
def first(url: str) -> str:
    """The URL of a ledger of the first revision: a model, two versions, requests in every state but approval."""
    connected = connect(url, Timings().lock)
    with connected.writer.begin() as connection:
        config = migrations()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        made = First(connection)
        spec = SPEC.model_dump(mode="json")
        made.insert("models", id="m-1", name="digits", spec=spec, test_set="digits", created_at=AT.format(1))
        version: dict[str, Any] = {"model_id": "m-1", "root": 1, "created_at": AT.format(1)}
        made.insert("model_versions", id="v-1", number=1, parent=None, weights=digest("w1"), request_id=None, **version)
        succeeded = made.request(1, running(), ended("succeeded", version=2, report=REPORT))
        made.request(2, running(), ended("rejected", reason="not_forgotten", report=REPORT))
        made.request(3, running(), ended("failed", reason="RuntimeError: broke"))
        made.request(4, ended("cancelled"))
        made.request(5)
        made.request(6, running())
        made.insert(
            "model_versions", id="v-2", number=2, parent=1, weights=digest("w2"), request_id=succeeded, **version
        )
        made.insert(
            "generators", id="g-1", model_id="m-1", root=1, spec=spec, recipe_digest=Recipe().generator_digest,
            weights=digest("g"), dataset=digest("d"), origin="trained", figures={"agreement": 0.99, "starved": []},
            request_id=succeeded, created_at=AT.format(9),
        )  # fmt: skip
        made.insert(
            "erasures", id="e-1", model_id="m-1", version=2, request_id=succeeded, **behaviour(1),
            samples=digest("samples 1"), mask=digest("mask"), probes=digest("probes"), generator_id="g-1",
            generator_use="trained", report=REPORT, created_at=AT.format(9),
        )  # fmt: skip
    connected.dispose()
    return url


def test_everything_is_there_and_adopted(first: str, raw: Any) -> None:
    with open_ledger(first) as ledger:
        states = [request.status.value for request in ledger.requests.all("digits")]
        assert states == ["succeeded", "rejected", "failed", "cancelled", "queued", "running"]
        assert [version.number for version in ledger.models.versions("digits")] == [1, 2]
        assert ledger.models.erasures("digits")[0].report == ledger.requests.all("digits")[1].report == REPORT
        assert ledger.generators.all("digits")[0].metrics == {"agreement": 0.99, "starved": []}
        assert all(len(ledger.requests.events(request.id)) == 1 for request in ledger.requests.all())

        verdict = ledger.audit.verify()
        assert verdict.findings == ()
        events = ledger.audit.log()
        rows = sum(raw.execute(f"SELECT count(*) FROM {table}").scalar() for table in AUDITED)
        assert {event.event for event in events} == {"adopted"}
        assert len(events) == verdict.events == rows == 17
        assert verdict.waiting == 0


def test_a_migrated_ledger_goes_on_working(first: str) -> None:
    """A running request is taken over, a queued one is claimed, and new events enter the same chain."""
    with open_ledger(first) as ledger:
        taken = ledger.requests.claim("w1", 60.0)
        assert taken is not None
        assert (taken.behaviour.name, taken.attempt) == ("class 6", 2)
        ledger.requests.release(taken, "stopped")
        ledger.requests.submit("digits", Behaviour(name="seven", kind="class", targets=(7,)), digest("s"), 8, Recipe())
        claimed = ledger.requests.claim("w1", 60.0, "digits")
        assert claimed is not None
        assert claimed.behaviour.name == "class 5"
        outcome = Outcome(
            reason=None, generator_use="reused", generator_weights=digest("g"), dataset=digest("d"),
            metrics={"agreement": 0.99}, refused=(), weights=digest("w3"),
            targets=(TargetResult(claimed.id, digest("m3"), digest("p3"), REPORT),), seconds={"relearn": 1.0},
        )  # fmt: skip
        ledger.commit(claimed, outcome, ledger.models.version("digits"), generator_id="g-1")

        assert ledger.requests.get(claimed.id).status is Status.SUCCEEDED
        assert [erasure.version for erasure in ledger.models.erasures("digits")] == [2, 3]
    with open_ledger(first) as ledger:
        verdict = ledger.audit.verify()
        assert (verdict.findings, verdict.waiting) == ((), 0)
        assert verdict.events > 17


def test_what_was_adopted_cannot_change_unnoticed(first: str, raw: Any) -> None:
    with open_ledger(first) as ledger:
        name = "erasures_update"
        raw.execute(f"DROP TRIGGER {name}" + ("" if raw.engine == "sqlite" else " ON erasures"))
        raw.execute("UPDATE erasures SET report = '{}'")
        (said,) = ledger.audit.verify().findings
        assert said.startswith("erasures e-1: column report is not what event ")


THEN = (
    "audit_events", "erasures", "generators", "model_policies", "model_versions", "models", "request_events", "requests"
)  # fmt: skip


@pytest.fixture
def third(first: str) -> str:
    """That ledger at revision 0003: adopted rows, and steps that its chain recorded."""
    connected = connect(first, Timings().lock)
    with connected.writer.begin() as connection:
        config = migrations()
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
        connection.exec_driver_sql(
            "ALTER TABLE requests ADD COLUMN generator_id VARCHAR(40)"
        )  # today's code asks for it
    with Ledger(Database(connected, Timings()), Timings()) as ledger:  # which nothing has brought up to date
        ledger.models.set_policy("digits", Policy(samples_days=30.0))
        taken = ledger.requests.claim("w1", 60.0)
        assert taken is not None
        ledger.requests.fail(taken, "RuntimeError: broke")
        assert ledger.requests.claim("w1", -1.0) is not None
    engine = sa.create_engine(first)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE requests DROP COLUMN generator_id")
    engine.dispose()
    return first


def every_row(url: str, tables: tuple[str, ...] = THEN) -> dict[str, Any]:
    """The rows of every table of revision 0003, without columns that were added later."""
    engine, contents = sa.create_engine(url), {}
    with engine.connect() as connection:
        for name in tables:
            columns = (column["name"] for column in sa.inspect(connection).get_columns(name))
            kept = ", ".join(sorted(column for column in columns if column not in LATER.get(name, ())))
            rows = connection.exec_driver_sql(f"SELECT {kept} FROM {name}").fetchall()
            contents[name] = sorted(rows, key=str)
    engine.dispose()
    return contents


def test_a_ledger_of_the_third_revision_keeps_all_rows_and_its_chain(third: str) -> None:
    """A head noted earlier is still in it: no row is adopted again, and the chain goes on."""
    before = every_row(third)
    assert all(before.values())
    with open_ledger(third) as ledger:
        assert every_row(third) == before
        events = ledger.audit.log()
        verdict = ledger.audit.verify(None, ChainHead(events[-1].seq, events[-1].hash))
        assert (verdict.findings, verdict.waiting, verdict.events) == ((), 0, len(before["audit_events"]))
        assert ledger.recipes.all("digits") == []
        assert [each.recipe_origin for each in ledger.models.erased("digits")] == [None]
        assert (
            "recipe_origin" not in next(e for e in ledger.models.history("digits") if e["event"] == "erased")["detail"]
        )


def test_what_was_asked_for_before_searches_has_none_for_its_origin(third: str) -> None:
    """Although a search finds an equal recipe before it has ended; later requests have an origin."""
    with open_ledger(third) as ledger:
        kept = ledger.recipes.keep("digits", "class", Recipe(), 0.9, {})
        behaviour = Behaviour(name="seven", kind="class", targets=(7,))
        ledger.requests.submit("digits", behaviour, digest("s"), 8, Recipe())
        for number in (3, 4):
            claimed = ledger.requests.claim("w1", 60.0, "digits")
            assert claimed is not None
            outcome = Outcome(
                reason=None, generator_use="reused", generator_weights=digest("g"), dataset=digest("d"), metrics={},
                refused=(), weights=digest(f"w{number}"),
                targets=(TargetResult(claimed.id, digest("m"), digest("p"), REPORT),), seconds={},
            )  # fmt: skip
            ledger.commit(claimed, outcome, ledger.models.version("digits"), generator_id="g-1")
        gone = [(each.behaviour.name, each.recipe_origin) for each in ledger.models.erased("digits")]
        assert gone == [("class 1", None), ("class 5", None), ("seven", kept.id)]
        verdict = ledger.audit.verify()
        assert (verdict.findings, verdict.waiting) == ((), 0)


@pytest.fixture
def fourth(first: str) -> str:
    """That ledger at revision 0004, with rows that refer to its generators and its erasure."""
    connected = connect(first, Timings().lock)
    with connected.writer.begin() as connection:
        config = migrations()
        config.attributes["connection"] = connection
        command.upgrade(config, "0004")
        made, old = First(connection), {"created_at": AT.format(9), "actor": "operator"}
        rejected = connection.scalar(sa.text("SELECT id FROM requests WHERE status = 'rejected'"))
        made.insert(
            "generators", id="g-2", model_id="m-1", root=1, spec=SPEC.model_dump(mode="json"),
            recipe_digest=Recipe().generator_digest, weights=digest("g2"), dataset=digest("d2"), origin="warm_started",
            warm_started_from="g-1", figures={"starved": []}, request_id=rejected, created_at=AT.format(9),
        )  # fmt: skip
        made.insert("generator_retirements", id="t-1", generator_id="g-2", reason="operator", **old)
        made.insert(
            "rechecks", id="k-1", erasure_id="e-1", model_id="m-1", version=2, probes=9, share=0.0, passed=True, **old
        )
    connected.dispose()
    return first


def test_tables_that_are_created_again_keep_rows_references_and_triggers(fourth: str, raw: Any) -> None:
    """Generators and erasures of revision 0004, and the rows that refer to them."""
    tables = (*THEN, "generator_retirements", "rechecks")
    before = every_row(fourth, tables)
    with open_ledger(fourth) as ledger:
        assert every_row(fourth, tables) == before
        kept, retired = ledger.generators.all("digits")
        assert (kept.origin, kept.transferred_from, kept.retired) == ("trained", None, None)
        assert (retired.warm_started_from, retired.retired) == ("g-1", "operator")
        assert {request.generator for request in ledger.requests.all()} == {None}
    if raw.engine == "sqlite":
        assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
        assert not [name for (name,) in raw.execute("SELECT name FROM sqlite_master") if name.endswith("_before")]
        raw.execute("PRAGMA foreign_keys = ON")
    for table in ("generators", "erasures"):
        for broken in (f"UPDATE {table} SET root = 2" if table == "generators" else "UPDATE erasures SET version = 1",
                       f"DELETE FROM {table}"):  # fmt: skip
            with pytest.raises(sa.exc.DatabaseError, match=f"{table} is insert-only"):
                raw.execute(broken)
    orphan = "INSERT INTO generator_retirements VALUES ('t-2', 'g-none', 'operator', :at, 'operator')"
    with pytest.raises(sa.exc.IntegrityError):
        raw.execute(orphan, {"at": AT.format(9)})


@pytest.mark.parametrize(
    ("table", "column"),
    [("requests", "generator_id"), ("generators", "transferred_from")],
    ids=["asked", "transferred"],
)
def test_a_later_column_stays_null_in_earlier_rows(fourth: str, raw: Any, table: str, column: str) -> None:
    """The audit reports a value in a column that was added after the row was recorded."""
    with open_ledger(fourth) as ledger:
        trigger = {"requests": "requests_terms", "generators": "generators_update"}[table]
        raw.execute(f"DROP TRIGGER {trigger}" + ("" if raw.engine == "sqlite" else f" ON {table}"))
        if table == "generators" and raw.engine == "sqlite":
            raw.execute("PRAGMA ignore_check_constraints = ON")
        elif table == "generators":
            raw.execute("ALTER TABLE generators DROP CONSTRAINT ck_generators_transferred_from")
        known = set(ledger.audit.verify().findings)  # g-2, which no ledger of that time wrote
        where = "id = 'g-1'" if table == "generators" else "behaviour_name = 'class 5'"
        raw.execute(f"UPDATE {table} SET {column} = 'g-2' WHERE {where}")
        (said,) = set(ledger.audit.verify().findings) - known
        assert said.startswith(f"{table} ")
        assert f"column {column} is not what event " in said


def test_an_empty_ledger_of_the_first_revision_has_an_empty_chain(url: str) -> None:
    connected = connect(url, Timings().lock)
    with connected.writer.begin() as connection:
        config = migrations()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    connected.dispose()
    with open_ledger(url) as ledger:
        assert ledger.audit.verify().events == 0
