"""The database under the ledger: opening, bringing the schema up to date, transactions, errors.

What is different between SQLite and PostgreSQL is in `engines`, and in `triggers`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, IntegrityError, InterfaceError, OperationalError

from fsu_ray.errors import AlreadyExists, FsuError, InvalidConfig, LedgerUnavailable, StorageError, TransitionRefused
from fsu_ray.storage import chain, engines, schema
from fsu_ray.storage.engines import BUSY_SECONDS, ELSEWHERE, Engines

SEAL_SECONDS = 1.0
"""How long a step of a request waits for the audit chain while this process makes others."""

if TYPE_CHECKING:
    from alembic.config import Config

# The constraint, by its name or in SQLite's words, that refuses: whose fault it is, and what to tell them.
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


class Part:
    """Some of the ledger's methods, on the database that all its parts share."""

    def __init__(self, database: Database) -> None:
        self._database = database


class Database:
    """One ledger's database. `Database.open` makes it; `reading` and `writing` are its transactions."""

    def __init__(self, connected: Engines) -> None:
        self._engines = connected
        self._sealed_at, self._unsealed = time.monotonic(), False

    @classmethod
    def open(cls, url: str) -> Database:
        """The database at a SQLAlchemy `url`, its schema brought to `schema.REVISION`; a missing file is made.

        Raises InvalidConfig where the URL, the folder, the file or the server is unusable, or of a newer fsu_ray.
        """
        connected = engines.connect(url)
        database, where = cls(connected), connected.where
        deadline = time.monotonic() + BUSY_SECONDS
        try:
            if connected.is_sqlite:
                Path(where).parent.mkdir(parents=True, exist_ok=True)
            while not database._up_to_date():
                # Turning on WAL does not wait for a lock as other statements do, so this waits instead.
                if time.monotonic() > deadline:
                    raise InvalidConfig(f"ledger {where} is locked; end the program that holds it, then try again")
                time.sleep(0.02)
        except BaseException as error:
            connected.dispose()
            if isinstance(error, OSError):
                raise InvalidConfig(f"ledger {where} cannot be made ({error.strerror}); {ELSEWHERE}") from error
            if isinstance(error, DatabaseError):
                reason = engines.said(error.orig)
                raise InvalidConfig(f"ledger {where} cannot be opened ({reason}); {ELSEWHERE}") from error
            raise
        return database

    def close(self) -> None:
        """Close every connection, after a last look at what waits for the audit chain."""
        if self._unsealed:
            with contextlib.suppress(StorageError):
                self.flush()
        self._engines.dispose()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that only reads, on one snapshot."""
        with self._translated("the ledger"), self._engines.reader.begin() as connection:
            yield connection

    @contextmanager
    def writing(self, subject: str) -> Iterator[sa.Connection]:
        """A transaction that writes, alone: committed at the end of the block, rolled back on any exception.

        What it notes (`chain.note`) is appended to the audit chain with it.

        `subject` is what the block is about, in words that a refusal by a constraint can start with.
        """
        with self._translated(subject), self._engines.writer.begin() as connection:
            chain.begin(connection)
            yield connection
            chain.append_noted(connection)

    @contextmanager
    def autocommit(self, subject: str) -> Iterator[sa.Connection]:
        """Statements that each stand for themselves: guarded updates of requests, which many make at once.

        What they change waits for the audit chain (`chain`): about once a second one of these takes it there.
        """
        with self._translated(subject), self._engines.stepper.begin() as connection:
            yield connection
        self._unsealed = True
        if time.monotonic() - self._sealed_at > SEAL_SECONDS:
            with contextlib.suppress(StorageError):  # the step is made; the next one tries again
                self.flush()

    def flush(self) -> None:
        """Append the steps of requests that wait for it to the audit chain."""
        self._sealed_at = time.monotonic()
        with self.writing("the audit chain"):
            pass
        self._unsealed = False

    @contextmanager
    def _translated(self, subject: str) -> Iterator[None]:
        """Errors of the database as errors of fsu_ray; those of broken code stay what they are."""
        try:
            yield
        except IntegrityError as error:
            violated = engines.violated(error.orig)
            for names, kind, message in _REFUSALS:
                if any(name in violated for name in names):
                    raise kind(message.format(subject)) from error
            raise
        except (DatabaseError, InterfaceError) as error:
            if isinstance(error, OperationalError | InterfaceError) or type(error) is DatabaseError:
                raise LedgerUnavailable(
                    f"ledger {self._engines.where}: {engines.said(error.orig)}; "
                    "check its disk or server and the programs that use it, then try again"
                ) from error
            raise

    def _up_to_date(self) -> bool:
        """Bring the schema up to date; False where another process held the file, so that it must be tried again."""
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
        """The schema's revision, None in an empty database; raises InvalidConfig in somebody else's."""
        tables = sa.inspect(connection).get_table_names()
        if schema.VERSION_TABLE in tables:
            return str(connection.scalar(sa.text(f"SELECT version_num FROM {schema.VERSION_TABLE}")))
        if tables:
            raise InvalidConfig(f"ledger {self._engines.where} is a database of another program; {ELSEWHERE}")
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
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")  # for good; not within a transaction
        with self._engines.writer.begin() as connection:
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
