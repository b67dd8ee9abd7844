"""The database under the ledger: opening, bringing the schema up to date, transactions, errors.

All that only SQLite needs is here and in the triggers of `schema`: writers take the write lock at
`BEGIN IMMEDIATE`, so what they read stays true until they commit; readers see one snapshot and wait
for nobody (WAL).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, OperationalError

from fsu_ray.errors import AlreadyExists, FsuError, InvalidConfig, StorageError, TransitionRefused
from fsu_ray.storage import schema

if TYPE_CHECKING:
    from alembic.config import Config

BUSY_SECONDS = 30.0
"""How long a connection waits for another one's write lock."""

_BEGIN = "fsu_begin"  # the execution option that says how a transaction begins; writers do not set it

# What SQLite says when a constraint refuses: whose fault it is, and what to tell them.
_REFUSALS: tuple[tuple[str, type[FsuError], str], ...] = (
    ("UNIQUE constraint failed: models.name", AlreadyExists, "{} exists already; choose another name"),
    ("UNIQUE constraint failed: requests.model_id", TransitionRefused, "{}: another request was faster; try again"),
)


class Database:
    """One ledger's database. `Database.open` makes it; `reading` and `writing` are its transactions."""

    def __init__(self, engine: sa.Engine, where: str) -> None:
        self._engine = engine
        self._reader = engine.execution_options(**{_BEGIN: "BEGIN"})
        self._where = where

    @classmethod
    def open(cls, url: str) -> Database:
        """The database at a SQLAlchemy `url`, made where it is missing, its schema brought to `schema.REVISION`.

        Raises InvalidConfig where the URL, the folder or the file is unusable, or of a newer fsu_ray.
        """
        engine, where = _engine(url)
        database = cls(engine, where)
        deadline = time.monotonic() + BUSY_SECONDS
        try:
            Path(where).parent.mkdir(parents=True, exist_ok=True)
            while not database._up_to_date():
                # Turning on WAL does not wait for a lock as other statements do, so this waits instead.
                if time.monotonic() > deadline:
                    raise InvalidConfig(f"ledger {where} is locked; end the program that holds it, then try again")
                time.sleep(0.02)
        except BaseException as error:
            engine.dispose()
            if isinstance(error, OSError):
                raise InvalidConfig(f"ledger {where} cannot be made ({error.strerror}); {_ELSEWHERE}") from error
            if isinstance(error, DatabaseError):
                raise InvalidConfig(f"ledger {where} cannot be opened ({error.orig}); {_ELSEWHERE}") from error
            raise
        return database

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that only reads, on one snapshot."""
        with self._translated("the ledger"), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def writing(self, subject: str) -> Iterator[sa.Connection]:
        """A transaction that writes: committed at the end of the block, rolled back on any exception.

        `subject` is what the block is about, in words that a refusal by a constraint can start with.
        """
        with self._translated(subject), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _translated(self, subject: str) -> Iterator[None]:
        """Errors of the database as errors of fsu_ray; those of broken code stay what they are."""
        try:
            yield
        except IntegrityError as error:
            for said, kind, message in _REFUSALS:
                if said in str(error.orig):
                    raise kind(message.format(subject)) from error
            raise
        except DatabaseError as error:
            if isinstance(error, OperationalError) or type(error) is DatabaseError:
                raise StorageError(
                    f"ledger {self._where}: {error.orig}; check its disk and the programs that use it, then try again"
                ) from error
            raise

    def _up_to_date(self) -> bool:
        """Bring the schema up to date; False where another process held the file, so that it must be tried again."""
        try:
            with self._reader.connect() as connection:
                revision = self._revision(connection)
            if revision != schema.REVISION:
                self._upgrade(revision)
        except OperationalError as error:
            if "locked" in str(error.orig):
                return False
            raise
        return True

    def _revision(self, connection: sa.Connection) -> str | None:
        """The schema's revision, None in an empty database; raises InvalidConfig in somebody else's."""
        tables = sa.inspect(connection).get_table_names()
        if schema.VERSION_TABLE in tables:
            return str(connection.scalar(sa.text(f"SELECT version_num FROM {schema.VERSION_TABLE}")))
        if tables:
            raise InvalidConfig(f"ledger {self._where} is a database of another program; {_ELSEWHERE}")
        return None

    def _upgrade(self, revision: str | None) -> None:
        from alembic import command
        from alembic.script import ScriptDirectory

        config = migrations()
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if revision is not None and revision not in known:
            raise InvalidConfig(
                f"ledger {self._where} was written by a newer fsu_ray (revision {revision}); upgrade fsu_ray"
            )
        with self._engine.execution_options(**{_BEGIN: None}).connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")  # for good; not within a transaction
        with self._engine.begin() as connection:
            # A second process that opens a new ledger waits for the lock in this line, and finds the work done.
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def migrations() -> Config:
    """Alembic's configuration, without a file; its commands want a connection in `attributes["connection"]`."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


_ELSEWHERE = "set FSU_LEDGER to sqlite:///FOLDER/ledger.db in a folder that you can write to"


def _engine(url: str) -> tuple[sa.Engine, str]:
    """An engine for `url`, and the file that it names."""
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise InvalidConfig(f"ledger {url!r} is not a URL; {_ELSEWHERE}") from error
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise InvalidConfig(f"ledger {parsed.render_as_string()} is not SQLite; {_ELSEWHERE}")
    if not parsed.database or parsed.database.startswith((":memory:", "file:")):
        raise InvalidConfig(f"ledger {url!r} does not name a file; {_ELSEWHERE}")
    engine = sa.create_engine(parsed, json_serializer=lambda value: json.dumps(_finite(value), allow_nan=False))
    event.listen(engine, "connect", _connected)
    event.listen(engine, "begin", _begun)
    return engine, parsed.database


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, which JSON has no words for."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _connected(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late: `_begun` sends ours
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA recursive_triggers = ON")
    cursor.close()


def _begun(connection: sa.Connection) -> None:
    begin = connection.get_execution_options().get(_BEGIN, "BEGIN IMMEDIATE")
    if begin:
        connection.exec_driver_sql(begin)
