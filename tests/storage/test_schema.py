"""The rules that stand in the database itself, tried with SQL past the ledger's own code."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from fsu_ray.records import TRANSITIONS, Status
from fsu_ray.storage import schema
from fsu_ray.storage.database import Database, migrations
from fsu_ray.storage.ledger import Ledger, open_ledger

HISTORY = ("model_versions", "generators", "erasures")


def written(file: Path) -> dict[str, list[str]]:
    """Every object of a database by its name: the lines of its SQL, in no order that matters."""
    with sqlite3.connect(file) as connection:
        found = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    connection.close()
    return {name: sorted(part.strip().rstrip(",") for part in sql.splitlines()) for name, sql in found}


def test_migrations_and_metadata_make_the_same_schema(tmp_path: Path, file: Path, ledger: Ledger) -> None:
    """Down to the text of every CHECK, partial index and trigger, which Alembic's own comparison does not see."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'metadata.db'}")
    schema.metadata.create_all(engine)
    engine.dispose()
    migrated = written(file)
    del migrated[schema.VERSION_TABLE]

    assert migrated == written(tmp_path / "metadata.db")
    assert len([name for name in migrated if migrated[name][0].startswith("CREATE TRIGGER")]) == len(schema.TRIGGERS)


def test_alembic_finds_nothing_to_migrate(ledger: Ledger, file: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{file}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": schema.VERSION_TABLE})
        assert compare_metadata(context, schema.metadata) == []
    engine.dispose()


def test_the_revision_is_the_last_of_the_migrations() -> None:
    assert ScriptDirectory.from_config(migrations()).get_current_head() == schema.REVISION


def test_connections_of_the_ledger_keep_its_rules(file: Path) -> None:
    database = Database.open(f"sqlite:///{file}")
    expected = {"foreign_keys": 1, "recursive_triggers": 1, "journal_mode": "wal", "busy_timeout": 30_000}
    with database.reading() as connection:
        assert {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in expected} == expected
    database.close()


def test_a_writer_has_the_lock_before_it_reads(file: Path) -> None:
    database = Database.open(f"sqlite:///{file}")
    other = sqlite3.connect(file, timeout=0, isolation_level=None)
    with database.writing("nothing"), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    with database.reading():
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
    other.close()
    database.close()


@pytest.mark.parametrize("table", HISTORY)
@pytest.mark.parametrize("ours", [True, False], ids=["our pragmas", "plain"])
def test_history_takes_no_update_delete_or_replace(line: Any, raw: sqlite3.Connection, table: str, ours: bool) -> None:
    line.erase()
    if ours:
        raw.execute("PRAGMA recursive_triggers = ON")
        raw.execute("PRAGMA foreign_keys = ON")
    before = raw.execute(f"SELECT * FROM {table}").fetchall()
    assert before
    columns = [row[1] for row in raw.execute(f"PRAGMA table_info({table})")]
    keys = {"model_versions": ("id", "request_id", "number")}.get(table, ("id", "request_id"))
    newest = f"WHERE created_at = (SELECT max(created_at) FROM {table})"
    attempts = [f"UPDATE {table} SET created_at = 'never'", f"DELETE FROM {table}"]
    for key in keys:
        # A row that differs in every key but one.
        others = {"id": "'x'", "request_id": "'y'", "number": "99"}
        values = [others[column] if column in others and column != key else column for column in columns]
        names = ", ".join(columns)
        attempts.append(f"INSERT OR REPLACE INTO {table} ({names}) SELECT {', '.join(values)} FROM {table} {newest}")

    for attempt in attempts:
        with pytest.raises(sqlite3.IntegrityError, match="insert-only"):
            raw.execute(attempt)
    assert raw.execute(f"SELECT * FROM {table}").fetchall() == before


def test_no_row_can_be_reached_by_a_hidden_number(raw: sqlite3.Connection) -> None:
    for table in (*HISTORY, "requests", "models"):
        with pytest.raises(sqlite3.OperationalError, match="no such column"):
            raw.execute(f"SELECT rowid FROM {table}")


def test_nothing_cascades(raw: sqlite3.Connection) -> None:
    keys = [key for table in schema.metadata.tables for key in raw.execute(f"PRAGMA foreign_key_list({table})")]

    assert len({key[2] for key in keys}) == 4
    assert {(key[5], key[6]) for key in keys} == {("NO ACTION", "NO ACTION")}


def test_foreign_keys_hold(line: Any) -> None:
    line.erase()
    database = line.ledger._database
    for broken in (
        "INSERT INTO model_versions SELECT 'x', 'nobody', number, parent, root, weights, NULL, created_at "
        "FROM model_versions WHERE number = 1",
        "INSERT INTO model_versions SELECT 'x', model_id, 9, 8, 1, weights, NULL, created_at "
        "FROM model_versions WHERE number = 1",
    ):
        with pytest.raises(sa.exc.IntegrityError, match="FOREIGN KEY"), database.writing("") as connection:
            connection.exec_driver_sql(broken)


def path_to(status: Status) -> list[Status]:
    """A shortest way from `submitted` to a state."""
    ways = [[Status.SUBMITTED]]
    for way in ways:
        if way[-1] is status:
            return way
        ways.extend([*way, after] for after in TRANSITIONS[way[-1]] if after not in way)
    raise AssertionError(status)


def step(raw: sqlite3.Connection, status: Status) -> None:
    """Move the only request to a state, with everything that the CHECKs want of that state."""
    columns = {
        "status": status.value,
        "lease_until": "2030-01-01" if status is Status.RUNNING else None,
        "worker": "w",
        "version": 2 if status is Status.SUCCEEDED else None,
        "finished_at": "2030-01-01" if status.is_terminal else None,
    }
    raw.execute(f"UPDATE requests SET {', '.join(f'{name} = :{name}' for name in columns)}", columns)


@pytest.fixture
def submitted(line: Any, raw: sqlite3.Connection) -> sqlite3.Connection:
    """A connection to a ledger with one request, which is `submitted`."""
    request = line.submit()
    row = raw.execute("SELECT * FROM requests").fetchone()
    columns = [column[1] for column in raw.execute("PRAGMA table_info(requests)")]
    values = {**dict(zip(columns, row, strict=True)), "status": "submitted"}
    raw.execute("DROP TRIGGER requests_delete")
    raw.execute("DELETE FROM requests")
    raw.execute(f"INSERT INTO requests VALUES ({', '.join(f':{name}' for name in columns)})", values)
    assert line.ledger.request(request.id).status is Status.SUBMITTED
    return raw


@pytest.mark.parametrize("old", Status)
def test_only_the_steps_of_transitions_are_taken(submitted: sqlite3.Connection, old: Status) -> None:
    for status in path_to(old)[1:]:
        step(submitted, status)
    for new in Status:
        submitted.execute("BEGIN")
        if new in TRANSITIONS[old]:
            step(submitted, new)
        else:
            with pytest.raises(sqlite3.IntegrityError, match=r"no such step|is final"):
                step(submitted, new)
        submitted.execute("ROLLBACK")


@pytest.mark.parametrize("status", [status for status in Status if status.is_terminal])
def test_a_request_that_has_ended_does_not_change(submitted: sqlite3.Connection, status: Status) -> None:
    for before in path_to(status)[1:]:
        step(submitted, before)
    for attempt in (
        "UPDATE requests SET reason = 'another one'",
        "UPDATE requests SET report = '{}'",
        "INSERT OR REPLACE INTO requests SELECT * FROM requests",
    ):
        with pytest.raises(sqlite3.IntegrityError, match=r"is final|begins as submitted"):
            submitted.execute(attempt)


def test_a_request_begins_as_submitted_and_stays(line: Any, raw: sqlite3.Connection) -> None:
    line.submit()
    columns = [column[1] for column in raw.execute("PRAGMA table_info(requests)")]
    copy = ", ".join({"id": "'x'", "idempotency_key": "'y'"}.get(name, name) for name in columns)

    with pytest.raises(sqlite3.IntegrityError, match="begins as submitted"):
        raw.execute(f"INSERT INTO requests SELECT {copy} FROM requests")
    with pytest.raises(sqlite3.IntegrityError, match="never deleted"):
        raw.execute("DELETE FROM requests")
    for column in ("id", "model_id", "behaviour_targets", "samples", "recipe", "idempotency_key", "submitted_at"):
        with pytest.raises(sqlite3.IntegrityError, match="terms of a request"):
            raw.execute(f"UPDATE requests SET {column} = 'x'")


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
def test_a_request_is_consistent(line: Any, raw: sqlite3.Connection, change: str, constraint: str) -> None:
    line.submit()

    with pytest.raises(sqlite3.IntegrityError, match=constraint):
        raw.execute(f"UPDATE requests SET {change}")


def test_one_request_runs_a_model(line: Any, raw: sqlite3.Connection) -> None:
    line.submit("nine", 9)
    line.submit("four", 4)

    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE.*requests\.model_id"):
        raw.execute("UPDATE requests SET status = 'running', worker = 'w', lease_until = '2030-01-01'")


def test_one_request_lives_a_key_and_a_model(line: Any, raw: sqlite3.Connection) -> None:
    line.submit()
    columns = [column[1] for column in raw.execute("PRAGMA table_info(requests)")]
    copy = ", ".join({"id": "'x'", "status": "'submitted'", "finished_at": "NULL"}.get(name, name) for name in columns)
    again = f"INSERT INTO requests SELECT {copy} FROM requests"

    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE.*requests\.idempotency_key"):
        raw.execute(again)
    raw.execute("UPDATE requests SET status = 'cancelled', finished_at = '2030-01-01'")
    raw.execute(again)


def test_moments_are_utc_and_sort_as_text() -> None:
    dialect = sa.create_engine("sqlite://").dialect
    instant = schema.Instant()
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


def test_json_of_the_ledger_is_json(line: Any, raw: sqlite3.Connection) -> None:
    """A diverged run brings NaN and infinities; they are null, which every JSON reader takes."""
    line.erase(report={"kl": float("nan"), "deep": [{"x": float("inf")}, 1.5]})

    (text,) = raw.execute("SELECT report FROM erasures").fetchone()
    assert raw.execute("SELECT json_valid(?)", (text,)).fetchone() == (1,)
    report = line.ledger.erasures("digits")[0].report
    assert (report["kl"], report["deep"]) == (None, [{"x": None}, 1.5])


def test_reopening_changes_nothing(file: Path, ledger: Ledger) -> None:
    before = written(file)
    open_ledger(f"sqlite:///{file}").close()

    assert written(file) == before
