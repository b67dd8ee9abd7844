"""The two databases that a ledger may lie in: how to connect, how a transaction begins, what a refusal says.

Most writers are alone on both: SQLite takes its write lock at `BEGIN IMMEDIATE`, PostgreSQL an advisory lock with
the transaction. So what a writer has read stays true until it commits, and nothing that is appended to in an
order can fork. A single guarded UPDATE, as the queue makes them, needs no such lock. A reader sees one snapshot
and waits for nobody (WAL; REPEATABLE READ).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError

from fsu_ray.errors import InvalidConfig

BUSY_SECONDS = 30.0
"""How long a connection waits for another one's write lock."""

ELSEWHERE = "set FSU_LEDGER to sqlite:///FOLDER/ledger.db or to postgresql://USER@HOST/DATABASE"

_WRITES = "fsu_writes"  # the execution option that says whether a transaction takes the write lock; the default is yes
_LOCK = "SELECT pg_advisory_xact_lock(hashtext('fsu_ray'), hashtext(current_schema()))"


@dataclass(frozen=True)
class Engines:
    """One database for writers, for readers, without any transaction of ours, and for single statements that commit
    themselves; `where` names it for people."""

    writer: sa.Engine
    reader: sa.Engine
    bare: sa.Engine
    stepper: sa.Engine
    where: str

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file of SQLite, rather than a PostgreSQL server."""
        return self.writer.dialect.name == "sqlite"

    def dispose(self) -> None:
        """Close every connection."""
        self.writer.dispose()


def connect(url: str) -> Engines:
    """Engines for `url`; nothing is opened yet. Raises InvalidConfig where it names neither database."""
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise InvalidConfig(f"ledger {url!r} is not a URL; {ELSEWHERE}") from error
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        return _sqlite(parsed)
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        return _postgresql(parsed)
    raise InvalidConfig(f"ledger {parsed.render_as_string()} is neither SQLite nor PostgreSQL; {ELSEWHERE}")


def violated(error: BaseException | None) -> str:
    """The name of the constraint that refused a statement, or what SQLite says in its stead."""
    diagnosis = getattr(error, "diag", None)
    return str(getattr(diagnosis, "constraint_name", None) or error)


def said(error: BaseException | None) -> str:
    """What a driver says, on one line."""
    return " ".join(str(error).split())


def _sqlite(url: sa.URL) -> Engines:
    if not url.database or url.database.startswith((":memory:", "file:")):
        raise InvalidConfig(f"ledger {url.render_as_string()} does not name a file; {ELSEWHERE}")
    engine = sa.create_engine(url, json_serializer=_dumps)
    event.listen(engine, "connect", _sqlite_connected)
    event.listen(engine, "begin", _sqlite_begun)
    reader = engine.execution_options(**{_WRITES: False})
    # A single statement takes the lock first here too, so that the moment it writes is that of its turn.
    return Engines(engine, reader, engine.execution_options(**{_WRITES: None}), engine, url.database)


def _sqlite_connected(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late: `_sqlite_begun` sends ours
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA recursive_triggers = ON")
    cursor.close()


def _sqlite_begun(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, True)
    if writes is not None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _postgresql(url: sa.URL) -> Engines:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise InvalidConfig("a ledger in PostgreSQL needs psycopg: pip install 'fsu_ray[postgres]'") from None
    # The queue is read in the order of its index, one row at a time: a bitmap would read and sort all of it.
    settings = {"timezone": "UTC", "lock_timeout": int(BUSY_SECONDS * 1000), "enable_bitmapscan": "off"}
    given = " ".join(f"-c {name}={value}" for name, value in settings.items())
    options = f"{given} {url.query.get('options', '')}"
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg").difference_update_query(["options"]),
        json_serializer=_dumps,
        pool_recycle=30,  # rather than a ping at each use
        connect_args={"connect_timeout": 10, "options": options, "application_name": "fsu_ray"},
    )
    event.listen(engine, "begin", _postgresql_begun)
    reader = engine.execution_options(**{_WRITES: False}, isolation_level="REPEATABLE READ", postgresql_readonly=True)
    bare = engine.execution_options(**{_WRITES: None})
    stepper = bare.execution_options(isolation_level="AUTOCOMMIT")
    return Engines(engine, reader, bare, stepper, url.render_as_string())


def _postgresql_begun(connection: sa.Connection) -> None:
    if connection.get_execution_options().get(_WRITES, True):
        connection.exec_driver_sql(_LOCK)


def _dumps(value: Any) -> str:
    return json.dumps(finite(value), allow_nan=False)


def finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, which JSON has no words for."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
