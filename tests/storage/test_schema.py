"""The constraints of the database, tested with SQL past the ledger's code."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from fsu_ray.config import Timings
from fsu_ray.records import TRANSITIONS, Status
from fsu_ray.storage import columns, schema, triggers
from fsu_ray.storage.database import Database, migrations
from fsu_ray.storage.ledger import Ledger, open_ledger

HISTORY = ("model_versions", "generators", "erasures")
STEP = "changes = changes + 1, changed_by = 'tester', changed_at = '2030-01-01T00:00:00.000000+00:00'"


CATALOGUE = (
    "SELECT 'table ' || c.table_name || '.' || c.column_name, concat_ws(' ', data_type, character_maximum_length, "
    "is_nullable, column_default) FROM information_schema.columns c WHERE table_schema = current_schema()",
    "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE connamespace = current_schema()::regnamespace",
    "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = current_schema()",
    "SELECT tgname, pg_get_triggerdef(t.oid) FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid "
    "WHERE NOT tgisinternal AND relnamespace = current_schema()::regnamespace",
    "SELECT proname, prosrc FROM pg_proc WHERE pronamespace = current_schema()::regnamespace",
)


def written(url: str) -> dict[str, list[str]]:
    """By name, the sorted parts of the SQL of every object of a database."""
    engine = sa.create_engine(url)
    sqlite = engine.dialect.name == "sqlite"
    queries = ("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL",) if sqlite else CATALOGUE
    with engine.connect() as connection:
        place = "" if sqlite else f"{connection.exec_driver_sql('SELECT current_schema()').scalar()}."
        statements = [row for query in queries for row in connection.exec_driver_sql(query)]
    engine.dispose()
    return {
        name: sorted(_parts(sql.replace(place, ""))) for name, sql in statements if schema.VERSION_TABLE not in name
    }


def _parts(sql: str) -> list[str]:
    """The columns and constraints of a CREATE TABLE; another statement as a whole."""
    if not sql.startswith("CREATE TABLE"):
        return [" ".join(sql.split())]
    head, _, rest = sql.partition("(")
    body, _, tail = rest.rpartition(")")
    parts, depth, part = [], 0, ""
    for sign in body:
        depth += {"(": 1, ")": -1}.get(sign, 0)
        if sign == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += sign
    return [" ".join(each.split()) for each in (head, tail, *parts, part)]


@pytest.fixture
def other(request: pytest.FixtureRequest, url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of a second, empty database on the same engine."""
    if url.startswith("sqlite"):
        yield f"sqlite:///{tmp_path / 'metadata.db'}"
        return
    name = f"{url.rpartition('%3D')[2]}_other"
    server = request.getfixturevalue("server")
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
        yield f"{url.rpartition('%3D')[0]}%3D{name}"
        connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")


def test_migrations_and_metadata_make_the_same_schema(url: str, other: str, ledger: Ledger) -> None:
    """With the text of every CHECK, partial index and trigger, which Alembic's own comparison ignores."""
    engine = sa.create_engine(other)
    columns.metadata.create_all(engine)
    guards = triggers.triggers(engine.dialect.name)
    engine.dispose()
    migrated = written(url)

    assert migrated == written(other)
    made = [name for name, sql in migrated.items() if any("CREATE TRIGGER" in part for part in sql)]
    assert len(made) == len([sql for sql in guards if sql.startswith("CREATE TRIGGER")])


@pytest.mark.filterwarnings("ignore:autogenerate skipping metadata-specified expression-based index")
def test_alembic_finds_nothing_to_migrate(ledger: Ledger, url: str) -> None:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        # Alembic cannot compare an index that descends; the test above does, by its text.
        opts = {
            "version_table": schema.VERSION_TABLE,
            "include_name": lambda name, kind, parents: name != "ix_requests_queue",
            "include_object": lambda item, name, kind, reflected, other: name != "ix_requests_queue",
        }
        context = MigrationContext.configure(connection, opts=opts)
        assert compare_metadata(context, columns.metadata) == []
    engine.dispose()


def test_the_revision_is_the_last_of_the_migrations() -> None:
    assert ScriptDirectory.from_config(migrations()).get_current_head() == schema.REVISION


def test_connections_of_the_ledger_keep_its_rules(file: Path) -> None:
    database = Database.open(f"sqlite:///{file}", Timings())
    expected = {"foreign_keys": 1, "recursive_triggers": 1, "journal_mode": "wal", "busy_timeout": 30_000}
    with database.reading() as connection:
        assert {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in expected} == expected
    database.close()


def test_a_writer_has_the_lock_before_it_reads(file: Path) -> None:
    database = Database.open(f"sqlite:///{file}", Timings())
    other = sqlite3.connect(file, timeout=0, isolation_level=None)
    with database.writing("nothing"), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    with database.reading():
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
    other.close()
    database.close()


def test_a_postgresql_writer_is_alone_and_a_reader_waits_for_nobody(postgresql: str) -> None:
    database = Database.open(postgresql, Timings())
    second = sa.create_engine(postgresql)
    lock = "SELECT pg_try_advisory_xact_lock(hashtext('fsu_ray'), hashtext(current_schema()))"
    with database.writing("nothing"), second.begin() as other, database.reading():
        assert other.exec_driver_sql(lock).scalar() is False
    with second.begin() as other:
        assert other.exec_driver_sql(lock).scalar() is True
    second.dispose()
    with pytest.raises(sa.exc.InternalError, match="read-only"), database.reading() as connection:
        connection.exec_driver_sql("DELETE FROM requests")
    database.close()


@pytest.mark.parametrize("table", HISTORY)
@pytest.mark.parametrize("ours", [True, False], ids=["our pragmas", "plain"])
def test_history_takes_no_update_delete_or_replace(driver: Any, raw: Any, table: str, ours: bool) -> None:
    driver.erase()
    if ours and raw.engine == "sqlite":
        raw.execute("PRAGMA recursive_triggers = ON")
        raw.execute("PRAGMA foreign_keys = ON")
    before = raw.execute(f"SELECT * FROM {table}").fetchall()
    assert before
    columns = raw.columns(table)
    keys = {"model_versions": ("id", "request_id", "number")}.get(table, ("id", "request_id"))
    newest = f"WHERE created_at = (SELECT max(created_at) FROM {table})"
    attempts = [f"UPDATE {table} SET id = 'x'", f"DELETE FROM {table}"]
    names = ", ".join(columns)
    if raw.engine == "sqlite":
        for key in keys:
            # A row that differs in every key but one.
            others = {"id": "'x'", "request_id": "'y'", "number": "99"}
            values = [others[column] if column in others and column != key else column for column in columns]
            attempts.append(
                f"INSERT OR REPLACE INTO {table} ({names}) SELECT {', '.join(values)} FROM {table} {newest}"
            )
    else:
        upsert = f"INSERT INTO {table} SELECT * FROM {table} {newest} ON CONFLICT (id) DO UPDATE SET id = 'x'"
        attempts += [upsert, f"TRUNCATE {table} CASCADE"]

    for attempt in attempts:
        with pytest.raises(sa.exc.IntegrityError, match="insert-only"):
            raw.execute(attempt)
    assert raw.execute(f"SELECT * FROM {table}").fetchall() == before


def test_no_row_can_be_reached_by_a_hidden_number(ledger: Ledger, raw: Any) -> None:
    for table in (*HISTORY, "requests", "models"):
        with pytest.raises((sa.exc.OperationalError, sa.exc.ProgrammingError), match=r"no such column|does not exist"):
            raw.execute(f"SELECT rowid FROM {table}")


def test_nothing_cascades(ledger: Ledger, raw: Any) -> None:
    inspector = sa.inspect(raw.connection)
    keys = [key for table in columns.metadata.tables for key in inspector.get_foreign_keys(table)]

    assert {key["referred_table"] for key in keys} == {
        "models", "requests", "model_versions", "generators", "erasures", "schedules"
    }  # fmt: skip
    assert all(not key["options"] for key in keys)


def test_foreign_keys_hold(driver: Any) -> None:
    driver.erase()
    database = driver.ledger.database
    for broken in (
        "INSERT INTO model_versions SELECT 'x', 'nobody', number, parent, root, weights, NULL, created_at "
        "FROM model_versions WHERE number = 1",
        "INSERT INTO model_versions SELECT 'x', model_id, 9, 8, 1, weights, NULL, created_at "
        "FROM model_versions WHERE number = 1",
    ):
        with pytest.raises(sa.exc.IntegrityError, match=r"FOREIGN KEY|foreign key"), database.writing("") as connection:
            connection.exec_driver_sql(broken)


def path_to(status: Status) -> list[Status]:
    """A shortest path from `submitted` to a state."""
    ways = [[Status.SUBMITTED]]
    for way in ways:
        if way[-1] is status:
            return way
        ways.extend([*way, after] for after in TRANSITIONS[way[-1]] if after not in way)
    raise AssertionError(status)


def step(raw: Any, status: Status) -> None:
    """Move the only request to a state, with the columns that the CHECKs require."""
    columns = {
        "status": status.value,
        "lease_until": "2030-01-01" if status is Status.RUNNING else None,
        "worker": "w",
        "version": 2 if status is Status.SUCCEEDED else None,
        "finished_at": "2030-01-01" if status.is_terminal else None,
    }
    raw.execute(f"UPDATE requests SET {STEP}, {', '.join(f'{name} = :{name}' for name in columns)}", columns)


@pytest.fixture
def submitted(driver: Any, raw: Any) -> Any:
    """A connection to a ledger with one request, which is `submitted`."""
    request = driver.submit()
    for trigger, table in (("requests_delete", "requests"), ("request_events_delete", "request_events")):
        raw.execute(f"DROP TRIGGER {trigger}" + (f" ON {table}" if raw.engine == "postgresql" else ""))
    raw.execute("DELETE FROM request_events")
    raw.execute("CREATE TEMPORARY TABLE copied AS SELECT * FROM requests")
    raw.execute("UPDATE copied SET status = 'submitted', changes = 1")
    raw.execute("DELETE FROM requests")
    raw.execute("INSERT INTO requests SELECT * FROM copied")
    assert driver.ledger.requests.get(request.id).status is Status.SUBMITTED
    return raw


@pytest.mark.parametrize("old", Status)
def test_only_the_steps_of_transitions_are_taken(submitted: Any, old: Status) -> None:
    for status in path_to(old)[1:]:
        step(submitted, status)
    for new in Status:
        submitted.execute("BEGIN")
        if new in TRANSITIONS[old]:
            step(submitted, new)
        else:
            with pytest.raises(sa.exc.IntegrityError, match=r"no such step|is final"):
                step(submitted, new)
        submitted.execute("ROLLBACK")


@pytest.mark.parametrize("status", [status for status in Status if status.is_terminal])
def test_a_request_that_has_ended_does_not_change(submitted: Any, status: Status) -> None:
    for before in path_to(status)[1:]:
        step(submitted, before)
    for attempt in (
        "UPDATE requests SET reason = 'another one'",
        "UPDATE requests SET report = '{}'",
        "INSERT OR REPLACE INTO requests SELECT * FROM requests"
        if submitted.engine == "sqlite"
        else "INSERT INTO requests SELECT * FROM requests ON CONFLICT (id) DO UPDATE SET reason = 'x'",
    ):
        with pytest.raises(sa.exc.IntegrityError, match=r"is final|begins as submitted"):
            submitted.execute(attempt)


def test_a_request_begins_as_submitted_and_stays(driver: Any, raw: Any) -> None:
    driver.submit()
    columns = raw.columns("requests")
    copy = ", ".join({"id": "'x'", "idempotency_key": "'y'"}.get(name, name) for name in columns)

    with pytest.raises(sa.exc.IntegrityError, match="begins as submitted"):
        raw.execute(f"INSERT INTO requests SELECT {copy} FROM requests")
    with pytest.raises(sa.exc.IntegrityError, match="never deleted"):
        raw.execute("DELETE FROM requests")
    for column in ("id", "model_id", "behaviour_targets", "samples", "recipe", "idempotency_key", "submitted_at"):
        with pytest.raises(sa.exc.IntegrityError, match="terms of a request"):
            raw.execute(f"UPDATE requests SET {column} = {column}")


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ("status = 'asleep'", "status|no such step"),
        ("attempt = -1", "attempt"),
        ("status = 'running', worker = 'w'", "lease"),
        ("lease_until = '2030-01-01'", "lease"),
        ("status = 'running', lease_until = '2030-01-01'", "worker"),
        ("status = 'cancelled'", "finished"),
        ("finished_at = '2030-01-01'", "finished"),
        ("version = 2", "version"),
    ],
)
def test_a_request_is_consistent(driver: Any, raw: Any, change: str, constraint: str) -> None:
    driver.submit()

    with pytest.raises(sa.exc.IntegrityError, match=constraint):
        raw.execute(f"UPDATE requests SET {STEP}, {change}")


def test_one_request_runs_a_model(driver: Any, raw: Any) -> None:
    driver.submit("nine", 9)
    driver.submit("four", 4)

    with pytest.raises(sa.exc.IntegrityError, match=r"UNIQUE.*requests\.model_id|uq_requests_running"):
        raw.execute(f"UPDATE requests SET {STEP}, status = 'running', worker = 'w', lease_until = '2030-01-01'")


def test_one_request_lives_a_key_and_a_model(driver: Any, raw: Any) -> None:
    driver.submit()
    columns = raw.columns("requests")
    copy = ", ".join(
        {"id": "'x'", "status": "'submitted'", "finished_at": "NULL", "changes": "1"}.get(name, name)
        for name in columns
    )
    again = f"INSERT INTO requests SELECT {copy} FROM requests"

    with pytest.raises(sa.exc.IntegrityError, match=r"UNIQUE.*requests\.idempotency_key|uq_requests_live_key"):
        raw.execute(again)
    raw.execute(f"UPDATE requests SET {STEP}, status = 'cancelled', finished_at = '2030-01-01'")
    raw.execute(again)


def test_moments_are_utc_and_sort_as_text() -> None:
    dialect = sa.create_engine("sqlite://").dialect
    instant = columns.Instant()
    berlin = datetime(2026, 3, 29, 1, 30, tzinfo=timezone(timedelta(hours=1)))
    whole = berlin.astimezone(UTC)
    later = whole + timedelta(microseconds=1)

    texts = [instant.process_bind_param(moment, dialect) for moment in (berlin, whole, later)]

    assert texts[0] == texts[1] < texts[2]
    back = instant.process_result_value(texts[0], dialect)
    assert back == berlin
    assert back is not None
    assert back.tzinfo is UTC
    with pytest.raises(ValueError, match="without a zone"):
        instant.process_bind_param(datetime(2026, 3, 29), dialect)


def test_json_of_the_ledger_is_json(driver: Any, raw: Any) -> None:
    """NaN and infinities of a diverged run are stored as null, which every JSON reader accepts."""
    driver.erase(report={"kl": float("nan"), "deep": [{"x": float("inf")}, 1.5]})

    (text,) = raw.execute("SELECT report FROM erasures").fetchone()
    assert "NaN" not in json.dumps(text)
    if raw.engine == "sqlite":
        assert raw.execute("SELECT json_valid(:text)", {"text": text}).fetchone() == (1,)
    report = driver.ledger.models.erasures("digits")[0].report
    assert (report["kl"], report["deep"]) == (None, [{"x": None}, 1.5])


def test_reopening_changes_nothing(url: str, ledger: Ledger) -> None:
    before = written(url)
    open_ledger(url).close()

    assert written(url) == before
