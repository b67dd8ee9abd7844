"""The ledger's tables as they are now; `migrations` says how a database gets there.

The rules of the ledger stand in the database: one running request a model and one live request an
idempotency key (partial unique indexes), one erasure a request, no cascade into history, and triggers
that keep history insert-only and requests on the paths of `records.TRANSITIONS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

from fsu_ray.records import TRANSITIONS, Status

REVISION = "0001"
"""The revision in `migrations` that `metadata` describes."""

VERSION_TABLE = "fsu_revision"
"""Where Alembic notes the revision: a name of our own, so that no other program's is mistaken for it."""

TERMINAL = tuple(status.value for status in Status if status.is_terminal)
LIVE = tuple(status.value for status in Status if not status.is_terminal)


class Instant(TypeDecorator[datetime]):
    """A moment, always an aware `datetime` in UTC. SQLite has no such type: there it is ISO text that sorts by time."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(sa.String(32) if dialect.name == "sqlite" else sa.DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"the ledger takes no time without a zone: {value.isoformat()}")
        moment = value.astimezone(UTC)
        return moment.isoformat(timespec="microseconds") if dialect.name == "sqlite" else moment

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        return moment.astimezone(UTC)


metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)


def _among(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


def _unique_where(name: str, columns: tuple[str, ...], where: str) -> sa.Index:
    return sa.Index(name, *columns, unique=True, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def _table(name: str, *parts: sa.schema.SchemaItem) -> sa.Table:
    # Without a rowid: a hidden second key would let INSERT OR REPLACE reach a row past the triggers below.
    return sa.Table(name, metadata, *parts, sqlite_with_rowid=False)


def _json(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.JSON(none_as_null=True), nullable=nullable)


models = _table(
    "models",
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("name", sa.String(100), nullable=False, unique=True),
    _json("spec"),
    sa.Column("test_set", sa.Text),
    sa.Column("created_at", Instant, nullable=False),
)

requests = _table(
    "requests",
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("model_id", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("behaviour_name", sa.String(100), nullable=False),
    sa.Column("behaviour_kind", sa.String(10), nullable=False),
    _json("behaviour_targets"),
    sa.Column("samples", sa.String(64), nullable=False),
    sa.Column("sample_count", sa.Integer, nullable=False),
    _json("recipe"),
    sa.Column("idempotency_key", sa.String(64), nullable=False),
    sa.Column("submitted_at", Instant, nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("worker", sa.String(200)),
    sa.Column("lease_until", Instant),
    sa.Column("reason", sa.Text),
    sa.Column("version", sa.Integer),
    _json("report", nullable=True),
    sa.Column("started_at", Instant),
    sa.Column("finished_at", Instant),
    sa.CheckConstraint(_among("status", tuple(status.value for status in Status)), name="status"),
    sa.CheckConstraint(_among("behaviour_kind", ("class", "subset")), name="kind"),
    sa.CheckConstraint("sample_count >= 1", name="sample_count"),
    sa.CheckConstraint("attempt >= 0", name="attempt"),
    sa.CheckConstraint("(status = 'running') = (lease_until IS NOT NULL)", name="lease"),
    sa.CheckConstraint("status <> 'running' OR worker IS NOT NULL", name="worker"),
    sa.CheckConstraint("(status = 'succeeded') = (version IS NOT NULL)", name="version"),
    sa.CheckConstraint(f"({_among('status', TERMINAL)}) = (finished_at IS NOT NULL)", name="finished"),
    sa.Index("ix_requests_status_submitted_at", "status", "submitted_at"),
    sa.Index("ix_requests_model_id_submitted_at", "model_id", "submitted_at"),
    _unique_where("uq_requests_running", ("model_id",), "status = 'running'"),
    _unique_where("uq_requests_live_key", ("model_id", "idempotency_key"), _among("status", LIVE)),
)

model_versions = _table(
    "model_versions",
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("model_id", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("parent", sa.Integer),
    sa.Column("root", sa.Integer, nullable=False),
    sa.Column("weights", sa.String(64), nullable=False),
    sa.Column("request_id", sa.ForeignKey("requests.id"), unique=True),
    sa.Column("created_at", Instant, nullable=False),
    sa.UniqueConstraint("model_id", "number"),
    sa.ForeignKeyConstraint(["model_id", "parent"], ["model_versions.model_id", "model_versions.number"]),
    sa.ForeignKeyConstraint(["model_id", "root"], ["model_versions.model_id", "model_versions.number"]),
    sa.CheckConstraint("(number = 1) = (parent IS NULL)", name="first"),
    sa.CheckConstraint("parent >= 1 AND parent < number", name="parent"),
    sa.CheckConstraint("root >= 1 AND root <= number", name="root"),
)

generators = _table(
    "generators",
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("model_id", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("root", sa.Integer, nullable=False),
    _json("spec"),
    sa.Column("recipe_digest", sa.String(64), nullable=False),
    sa.Column("weights", sa.String(64), nullable=False),
    sa.Column("dataset", sa.String(64), nullable=False),
    sa.Column("origin", sa.String(20), nullable=False),
    sa.Column("warm_started_from", sa.ForeignKey("generators.id")),
    _json("figures"),
    sa.Column("request_id", sa.ForeignKey("requests.id"), nullable=False, unique=True),
    sa.Column("created_at", Instant, nullable=False),
    sa.ForeignKeyConstraint(["model_id", "root"], ["model_versions.model_id", "model_versions.number"]),
    sa.CheckConstraint(_among("origin", ("trained", "warm_started")), name="origin"),
    sa.CheckConstraint("(origin = 'warm_started') = (warm_started_from IS NOT NULL)", name="warm_started_from"),
    sa.Index("ix_generators_model_id_created_at", "model_id", "created_at"),
)

erasures = _table(
    "erasures",
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("model_id", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("request_id", sa.ForeignKey("requests.id"), nullable=False, unique=True),
    sa.Column("behaviour_name", sa.String(100), nullable=False),
    sa.Column("behaviour_kind", sa.String(10), nullable=False),
    _json("behaviour_targets"),
    sa.Column("samples", sa.String(64), nullable=False),
    sa.Column("mask", sa.String(64), nullable=False),
    sa.Column("probes", sa.String(64), nullable=False),
    sa.Column("generator_id", sa.ForeignKey("generators.id"), nullable=False),
    sa.Column("generator_use", sa.String(20), nullable=False),
    _json("report"),
    sa.Column("created_at", Instant, nullable=False),
    sa.ForeignKeyConstraint(["model_id", "version"], ["model_versions.model_id", "model_versions.number"]),
    sa.CheckConstraint(_among("behaviour_kind", ("class", "subset")), name="kind"),
    sa.CheckConstraint(_among("generator_use", ("trained", "reused", "warm_started")), name="generator_use"),
    sa.Index("ix_erasures_model_id_version", "model_id", "version"),
)


@dataclass(frozen=True)
class Trigger:
    """A refusal: `moment` on `table` ends with `message` (where `when` holds), on one engine or on both."""

    name: str
    moment: str
    table: str
    message: str
    when: str | None = None
    engine: str | None = None

    def sql(self, engine: str) -> str:
        """The statement that makes it on `sqlite` or `postgresql`."""
        begin = f"CREATE TRIGGER {self.name} BEFORE {self.moment} ON {self.table}"
        if engine == "sqlite":
            condition = f" WHEN {self.when}" if self.when else ""
            return f"{begin}{condition} BEGIN SELECT RAISE(ABORT, '{self.message}'); END"
        each = "STATEMENT" if self.moment == "TRUNCATE" else "ROW"
        condition = f" WHEN ({self.when})" if self.when else ""
        return f"{begin} FOR EACH {each}{condition} EXECUTE FUNCTION fsu_refuse('{self.message}')"


REFUSE = """
CREATE FUNCTION fsu_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation'; END $$
"""
"""The function behind PostgreSQL's triggers."""


def _insert_only(table: sa.Table, keys: str) -> list[Trigger]:
    """What refuses UPDATE, DELETE, TRUNCATE and, in whatever connection, SQLite's INSERT OR REPLACE over `keys`."""
    name = table.name
    message = f"{name} is insert-only"
    taken = f"EXISTS (SELECT 1 FROM {name} WHERE {keys})"
    return [
        Trigger(f"{name}_update", "UPDATE", name, message),
        Trigger(f"{name}_delete", "DELETE", name, message),
        Trigger(f"{name}_truncate", "TRUNCATE", name, message, engine="postgresql"),
        Trigger(f"{name}_replace", "INSERT", name, f"{message}: the key is taken", taken, "sqlite"),
    ]


def _requests_triggers() -> list[Trigger]:
    """What keeps a request on the paths of `records.TRANSITIONS`, and its terms as submitted."""
    steps = tuple(f"{old}>{new}" for old in Status for new in Status if new in TRANSITIONS[old])
    fixed = ", ".join(column.name for column in requests.columns if column.name not in _CHANGING)
    start, once = f"NEW.status <> '{Status.SUBMITTED}'", "a request begins as submitted, once"
    again = f"{start} OR EXISTS (SELECT 1 FROM requests WHERE id = NEW.id)"
    terms = "the terms of a request do not change"
    ended = _among("OLD.status", TERMINAL)
    step = f"NOT ({_among(_STEP, steps)})"
    return [
        Trigger("requests_insert", "INSERT", "requests", once, again, "sqlite"),
        Trigger("requests_insert", "INSERT", "requests", once, start, "postgresql"),
        Trigger("requests_final", "UPDATE", "requests", "a request that has ended is final", ended),
        Trigger("requests_step", "UPDATE OF status", "requests", "no such step between states of a request", step),
        Trigger("requests_terms", f"UPDATE OF {fixed}", "requests", terms),
        Trigger("requests_delete", "DELETE", "requests", "requests are never deleted"),
        Trigger("requests_truncate", "TRUNCATE", "requests", "requests are never deleted", engine="postgresql"),
    ]


_STEP = "OLD.status || '>' || NEW.status"
_CHANGING = frozenset(
    {"status", "attempt", "worker", "lease_until", "reason", "version", "report", "started_at", "finished_at"}
)

TRIGGERS = (
    *_requests_triggers(),
    *_insert_only(
        model_versions,
        "id = NEW.id OR (model_id = NEW.model_id AND number = NEW.number) OR request_id = NEW.request_id",
    ),
    *_insert_only(generators, "id = NEW.id OR request_id = NEW.request_id"),
    *_insert_only(erasures, "id = NEW.id OR request_id = NEW.request_id"),
)


def triggers(engine: str) -> list[str]:
    """The statements that make the triggers on `sqlite` or `postgresql`, in order."""
    made = [trigger.sql(engine) for trigger in TRIGGERS if trigger.engine in (None, engine)]
    return made if engine == "sqlite" else [REFUSE, *made]


for _engine in ("sqlite", "postgresql"):
    for _sql in triggers(_engine):
        _ddl = sa.DDL(_sql.replace("%", "%%")).execute_if(dialect=_engine)  # type: ignore[no-untyped-call]
        sa.event.listen(metadata, "after_create", _ddl)
