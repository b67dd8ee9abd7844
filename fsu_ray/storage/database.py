"""The database under the ledger: connecting, migrating the schema, transactions, errors.

SQLite and PostgreSQL differ here, in `triggers`, and in how `chain` reads columns as text; nowhere else.

A writing transaction runs alone on both. SQLite takes its write lock at `BEGIN IMMEDIATE`; PostgreSQL takes an advisory
lock when the transaction begins. So what a writer has read stays true until it commits, and the audit chain cannot
fork. The queue's guarded single-statement UPDATEs need no such lock. A reading transaction sees one snapshot and waits
for nobody (WAL; REPEATABLE READ).
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, InterfaceError, OperationalError

from fsu_ray.config import Timings
from fsu_ray.errors import (
    AlreadyExists,
    FsuError,
    InvalidConfig,
    LedgerUnavailable,
    StorageError,
    TransitionRefused,
    UserError,
)
from fsu_ray.records import ACTOR
from fsu_ray.storage import chain, schema
from fsu_ray.storage.columns import finite

if TYPE_CHECKING:
    from alembic.config import Config

HOW_TO_SET = "set FSU_LEDGER to sqlite:///FOLDER/ledger.db or to postgresql://USER@HOST/DATABASE"

_WRITES = "fsu_writes"  # execution option: True (the default) takes the write lock, None begins no transaction
_LOCK = "SELECT pg_advisory_xact_lock(hashtext('fsu_ray'), hashtext(current_schema()))"

# Constraint names, as PostgreSQL gives them and as SQLite words them; the error that they become, and its message.
_REFUSALS: tuple[tuple[tuple[str, str], type[FsuError], str], ...] = (
    (
        ("uq_models_name", "models is insert-only: the key is taken"),
        AlreadyExists,
        "{} exists already; choose another name",
    ),
    (
        ("uq_requests_running", "UNIQUE constraint failed: requests.model_id"),
        TransitionRefused,
        "{}: another request was faster; try again",
    ),
)


def check_actor(actor: str) -> str:
    """`actor` if it is an opaque id; raises UserError: the ledger holds no e-mail addresses and no full names."""
    if not re.fullmatch(ACTOR, actor):
        raise UserError(f"{actor!r} is no opaque id: use up to 100 letters, digits and _ . : / - (no e-mail address)")
    return actor


class Database:
    """The database of one ledger. `Database.open` makes it; `reading` and `writing` are its transactions."""

    def __init__(self, engines: Engines, timings: Timings) -> None:
        self._engines = engines
        self._flush_seconds = timings.flush
        self._flushed_at, self._has_unflushed = time.monotonic(), False

    @classmethod
    def open(cls, url: str, timings: Timings) -> Database:
        """The database at a SQLAlchemy `url`, its schema brought to `schema.REVISION`; a missing file is made.

        Raises InvalidConfig where the URL, the folder, the file or the server is unusable, or where a newer fsu_ray
        wrote the database.
        """
        engines = connect(url, timings.lock)
        database, where = cls(engines, timings), engines.where
        deadline = time.monotonic() + timings.lock
        try:
            if engines.is_sqlite:
                Path(where).parent.mkdir(parents=True, exist_ok=True)
            while not database._up_to_date():
                # Turning on WAL does not wait for a lock as other statements do, so this loop waits instead.
                if time.monotonic() > deadline:
                    raise InvalidConfig(f"ledger {where} is locked; end the program that holds it, then try again")
                time.sleep(0.02)
        except BaseException as error:
            engines.dispose()
            if isinstance(error, OSError):
                raise InvalidConfig(f"ledger {where} cannot be made ({error.strerror}); {HOW_TO_SET}") from error
            if isinstance(error, DatabaseError):
                reason = _one_line(error.orig)
                raise InvalidConfig(f"ledger {where} cannot be opened ({reason}); {HOW_TO_SET}") from error
            raise
        return database

    def close(self) -> None:
        """Flush the audit chain if steps of requests wait for it, and close every connection."""
        if self._has_unflushed:
            with contextlib.suppress(StorageError):
                self.flush()
        self._engines.dispose()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that only reads, on one snapshot."""
        with self._translated("the ledger"), self._engines.reader.begin() as connection:
            yield connection

    @contextmanager
    def writing(self, subject: str, actor: str | None = None) -> Iterator[sa.Connection]:
        """A transaction that writes, alone. It commits at the end of the block and rolls back on any exception.

        The events noted in it (`chain.note`) are appended to the audit chain before it commits. `subject` names what
        the block changes and begins the message of a refusal by a constraint. `actor` is the person who asked for the
        change, None for a worker; raises UserError where that is no opaque id.
        """
        if actor is not None:
            check_actor(actor)
        with self._translated(subject), self._engines.writer.begin() as connection:
            chain.begin(connection)
            yield connection
            chain.append_noted(connection)

    @contextmanager
    def autocommit(self, subject: str) -> Iterator[sa.Connection]:
        """Statements that each commit by themselves: guarded updates of requests, which many workers make at once.

        Their steps wait for the audit chain. About once in `Timings.flush` seconds, this method flushes them.
        """
        with self._translated(subject), self._engines.autocommit.begin() as connection:
            yield connection
        self._has_unflushed = True
        if time.monotonic() - self._flushed_at > self._flush_seconds:
            with contextlib.suppress(StorageError):  # the step is committed; a later flush tries again
                self.flush()

    def flush(self) -> None:
        """Append the waiting steps of requests to the audit chain."""
        self._flushed_at = time.monotonic()
        with self.writing("the audit chain"):
            pass
        self._has_unflushed = False

    @contextmanager
    def _translated(self, subject: str) -> Iterator[None]:
        """Raise the database's errors as errors of fsu_ray. Programming errors stay as they are."""
        try:
            yield
        except IntegrityError as error:
            constraint = violated_constraint(error)
            for names, kind, message in _REFUSALS:
                if any(name in constraint for name in names):
                    raise kind(message.format(subject)) from error
            raise
        except (DatabaseError, InterfaceError) as error:
            if isinstance(error, OperationalError | InterfaceError) or type(error) is DatabaseError:
                raise LedgerUnavailable(
                    f"ledger {self._engines.where}: {_one_line(error.orig)}; "
                    "check its disk or server and the programs that use it, then try again"
                ) from error
            raise

    def _up_to_date(self) -> bool:
        """Bring the schema up to date; False where another process holds SQLite's file: try again."""
        try:
            with self._engines.reader.connect() as connection:
                revision = self._revision(connection)
            if revision != schema.REVISION:
                self._upgrade(revision)
        except OperationalError as error:
            if self._engines.is_sqlite and "locked" in str(error.orig):
                return False
            raise
        return True

    def _revision(self, connection: sa.Connection) -> str | None:
        """The schema's revision, None in an empty database; raises InvalidConfig in another program's database."""
        tables = sa.inspect(connection).get_table_names()
        if schema.VERSION_TABLE in tables:
            return str(connection.scalar(sa.text(f"SELECT version_num FROM {schema.VERSION_TABLE}")))
        if tables:
            raise InvalidConfig(f"ledger {self._engines.where} is a database of another program; {HOW_TO_SET}")
        return None

    def _upgrade(self, revision: str | None) -> None:
        from alembic import command
        from alembic.script import ScriptDirectory

        config = migrations()
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if revision is not None and revision not in known:
            raise InvalidConfig(
                f"ledger {self._engines.where} was written by a newer fsu_ray (revision {revision}); upgrade fsu_ray"
            )
        if self._engines.is_sqlite:
            with self._engines.bare.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")  # persistent; not allowed in a transaction
        with self._engines.writer.begin() as connection:
            # A second process that opens a new ledger waits for the lock here; then nothing is left to upgrade.
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def migrations() -> Config:
    """Alembic's configuration, without a file; its commands need a connection in `attributes["connection"]`."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


@dataclass(frozen=True)
class Engines:
    """The engines of one database: for writing and for reading transactions, without a transaction of ours (`bare`),
    and for statements that commit by themselves. `where` names the database in messages."""

    writer: sa.Engine
    reader: sa.Engine
    bare: sa.Engine
    autocommit: sa.Engine
    where: str

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is a file of SQLite, rather than a PostgreSQL server."""
        return self.writer.dialect.name == "sqlite"

    def dispose(self) -> None:
        """Close every connection."""
        self.writer.dispose()


def connect(url: str, lock_seconds: float) -> Engines:
    """Engines for `url`; nothing is opened yet. A connection waits up to `lock_seconds` for another's write lock.

    Raises InvalidConfig where the URL names neither SQLite nor PostgreSQL.
    """
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise InvalidConfig(f"ledger {url!r} is not a URL; {HOW_TO_SET}") from error
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        return _sqlite(parsed, lock_seconds)
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        return _postgresql(parsed, lock_seconds)
    raise InvalidConfig(f"ledger {parsed.render_as_string()} is neither SQLite nor PostgreSQL; {HOW_TO_SET}")


def violated_constraint(error: IntegrityError) -> str:
    """The name of the constraint that refused a statement; on SQLite the whole message, which contains its columns."""
    diagnosis = getattr(error.orig, "diag", None)
    return str(getattr(diagnosis, "constraint_name", None) or error.orig)


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())


def _sqlite(url: sa.URL, lock_seconds: float) -> Engines:
    if not url.database or url.database.startswith((":memory:", "file:")):
        raise InvalidConfig(f"ledger {url.render_as_string()} does not name a file; {HOW_TO_SET}")

    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver's own BEGIN comes too late: `_sqlite_begin` sends ours
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(lock_seconds * 1000)}")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA recursive_triggers = ON")
        cursor.close()

    engine = sa.create_engine(url, json_serializer=_dumps)
    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", _sqlite_begin)
    reader = engine.execution_options(**{_WRITES: False})
    # Single statements take the write lock first here too, so that the moment they write is that of their turn.
    return Engines(engine, reader, engine.execution_options(**{_WRITES: None}), engine, url.database)


def _sqlite_begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, True)
    if writes is not None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _postgresql(url: sa.URL, lock_seconds: float) -> Engines:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise InvalidConfig("a ledger in PostgreSQL needs psycopg: pip install 'fsu_ray[postgres]'") from None
    # The queue is read in the order of its index, one row at a time. A bitmap scan would read and sort all of it.
    settings = {"timezone": "UTC", "lock_timeout": int(lock_seconds * 1000), "enable_bitmapscan": "off"}
    ours = " ".join(f"-c {name}={value}" for name, value in settings.items())
    options = f"{ours} {url.query.get('options', '')}"
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg").difference_update_query(["options"]),
        json_serializer=_dumps,
        pool_recycle=30,  # rather than a ping at each use
        connect_args={"connect_timeout": 10, "options": options, "application_name": "fsu_ray"},
    )
    event.listen(engine, "begin", _postgresql_begin)
    reader = engine.execution_options(**{_WRITES: False}, isolation_level="REPEATABLE READ", postgresql_readonly=True)
    bare = engine.execution_options(**{_WRITES: None})
    return Engines(engine, reader, bare, bare.execution_options(isolation_level="AUTOCOMMIT"), url.render_as_string())


def _postgresql_begin(connection: sa.Connection) -> None:
    if connection.get_execution_options().get(_WRITES, True):
        connection.exec_driver_sql(_LOCK)


def _dumps(value: Any) -> str:
    return json.dumps(finite(value), allow_nan=False)
