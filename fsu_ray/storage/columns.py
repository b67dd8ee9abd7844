"""Building blocks of the tables in `schema`: constraint names, column types, partial indexes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine


class Instant(TypeDecorator[datetime]):
    """A moment as an aware `datetime` in UTC. SQLite has no such type: it stores ISO text that sorts by time."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(sa.String(32) if dialect.name == "sqlite" else sa.DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"the ledger takes no time without a zone: {value.isoformat()}")
        return moment_text(value) if dialect.name == "sqlite" else value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        return moment.astimezone(UTC)


def moment_text(moment: datetime) -> str:
    """A moment as the ledger's text form of it: UTC, to the microsecond, sorted by time."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def finite(value: Any) -> Any:
    """`value` with None for NaN and infinities, which JSON cannot express."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)


def in_list(column: str, values: tuple[str, ...]) -> str:
    """`column IN (values)` as SQL."""
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


def unique_where(name: str, columns: tuple[str, ...], where: str) -> sa.Index:
    """A unique index over the rows for which `where` holds."""
    return sa.Index(name, *columns, unique=True, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def table(name: str, *parts: sa.schema.SchemaItem) -> sa.Table:
    """A table without SQLite's rowid: through that second key INSERT OR REPLACE could reach a row past the triggers."""
    return sa.Table(name, metadata, *parts, sqlite_with_rowid=False)


def key() -> sa.Column[Any]:
    """The primary key `id`: an id of `rows.new_id`."""
    return sa.Column("id", sa.String(40), primary_key=True)


def foreign_key(name: str, target: str, *, nullable: bool = False, unique: bool = False) -> sa.Column[Any]:
    """A foreign key to `target`, e.g. `models.id`."""
    return sa.Column(name, sa.ForeignKey(target), nullable=nullable, unique=unique or None)


def version_foreign_key(column: str) -> sa.ForeignKeyConstraint:
    """The foreign key of `model_id` and `column` to a version."""
    return sa.ForeignKeyConstraint(["model_id", column], ["model_versions.model_id", "model_versions.number"])


def digest(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    """The SHA-256 of an artifact or a recipe, in hex."""
    return sa.Column(name, sa.String(64), nullable=nullable)


def json(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    """Any JSON; None is NULL."""
    return sa.Column(name, sa.JSON(none_as_null=True), nullable=nullable)


def moment(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    """An `Instant`."""
    return sa.Column(name, Instant, nullable=nullable)


def audit_columns() -> tuple[sa.Column[Any], sa.Column[Any]]:
    """When a row was written, and by whom: an opaque id."""
    return moment("created_at"), sa.Column("actor", sa.String(100), nullable=False)
