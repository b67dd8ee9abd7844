"""Imported generators, which no request made, and generators that a request names, which may be another model's
(transferred). Existing rows and the audit chain stay as they are.

SQLite cannot change a CHECK or NOT NULL of an existing table. Such a table is created again and filled from a copy, in
the transaction of the migration; references to its rows are checked when that commits.

It imports nothing of fsu_ray, so that later changes of the code cannot change what it does.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_TERMS = (
    "id", "model_id", "behaviour_name", "behaviour_kind", "behaviour_targets", "samples", "sample_count", "recipe",
    "idempotency_key", "submitted_at", "key_given", "priority", "not_before", "due_at", "requested_by", "generator_id",
)  # fmt: skip
_GENERATORS = {
    "origin": "origin IN ('trained', 'warm_started', 'transferred', 'imported')",
    "warm_started_from": "(origin = 'warm_started') = (warm_started_from IS NOT NULL)",
    "request_id": "(origin = 'imported') = (request_id IS NULL)",
    "transferred_from": "(origin = 'transferred') = (transferred_from IS NOT NULL)",
}
_USE = "generator_use IN ('trained', 'reused', 'warm_started', 'transferred')"


def upgrade() -> None:
    op.add_column("requests", sa.Column("generator_id", sa.String(40)))
    op.execute("DROP TRIGGER requests_terms" + ("" if _on_sqlite() else " ON requests"))
    _refuse("requests_terms", f"UPDATE OF {', '.join(_TERMS)} ON requests", "the terms of a request do not change")
    if _on_sqlite():
        op.execute("PRAGMA defer_foreign_keys = ON")
        _again("generators", _make_generators)
        _again("erasures", _make_erasures)
        return
    op.add_column("generators", sa.Column("transferred_from", sa.String(40)))
    op.create_foreign_key("fk_generators_transferred_from", "generators", "generators", ["transferred_from"], ["id"])
    op.alter_column("generators", "request_id", nullable=True)
    op.drop_constraint(op.f("ck_generators_origin"), "generators")
    for name in ("origin", "request_id", "transferred_from"):
        op.create_check_constraint(op.f(f"ck_generators_{name}"), "generators", _GENERATORS[name])
    op.drop_constraint(op.f("ck_erasures_generator_use"), "erasures")
    op.create_check_constraint(op.f("ck_erasures_generator_use"), "erasures", _USE)


def _again(table: str, make: Any) -> None:
    """Create a table of SQLite again, with all its rows and triggers."""
    names = ", ".join(column["name"] for column in sa.inspect(op.get_bind()).get_columns(table))
    op.execute(f"CREATE TABLE {table}_before AS SELECT {names} FROM {table}")
    op.drop_table(table)  # and with it its indexes and triggers, none of which fires
    make()
    op.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM {table}_before")
    op.drop_table(f"{table}_before")
    message = f"{table} is insert-only"
    taken = f"EXISTS (SELECT 1 FROM {table} WHERE id = NEW.id OR request_id = NEW.request_id)"
    _refuse(f"{table}_update", f"UPDATE ON {table}", message)
    _refuse(f"{table}_delete", f"DELETE ON {table}", message)
    _refuse(f"{table}_replace", f"INSERT ON {table}", f"{message}: the key is taken", taken)


def _make_generators() -> None:
    op.create_table(
        "generators",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("model_id", sa.String(40), nullable=False),
        sa.Column("root", sa.Integer, nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("recipe_digest", sa.String(64), nullable=False),
        sa.Column("weights", sa.String(64), nullable=False),
        sa.Column("dataset", sa.String(64), nullable=False),
        sa.Column("origin", sa.String(20), nullable=False),
        sa.Column("warm_started_from", sa.String(40)),
        sa.Column("transferred_from", sa.String(40)),
        sa.Column("figures", sa.JSON, nullable=False),
        sa.Column("request_id", sa.String(40)),
        _moment("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_generators"),
        _to("generators", "model_id", "models.id"),
        _to("generators", "warm_started_from", "generators.id"),
        _to("generators", "transferred_from", "generators.id"),
        _to("generators", "request_id", "requests.id"),
        sa.UniqueConstraint("request_id", name="uq_generators_request_id"),
        _of_version("generators", "root"),
        *(_check("generators", name, condition) for name, condition in _GENERATORS.items()),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_generators_model_id_created_at", "generators", ["model_id", "created_at"])


def _make_erasures() -> None:
    op.create_table(
        "erasures",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("model_id", sa.String(40), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("request_id", sa.String(40), nullable=False),
        sa.Column("behaviour_name", sa.String(100), nullable=False),
        sa.Column("behaviour_kind", sa.String(10), nullable=False),
        sa.Column("behaviour_targets", sa.JSON, nullable=False),
        sa.Column("samples", sa.String(64), nullable=False),
        sa.Column("mask", sa.String(64), nullable=False),
        sa.Column("probes", sa.String(64), nullable=False),
        sa.Column("generator_id", sa.String(40), nullable=False),
        sa.Column("generator_use", sa.String(20), nullable=False),
        sa.Column("report", sa.JSON, nullable=False),
        _moment("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_erasures"),
        _to("erasures", "model_id", "models.id"),
        _to("erasures", "request_id", "requests.id"),
        sa.UniqueConstraint("request_id", name="uq_erasures_request_id"),
        _to("erasures", "generator_id", "generators.id"),
        _of_version("erasures", "version"),
        _check("erasures", "kind", "behaviour_kind IN ('class', 'subset')"),
        _check("erasures", "generator_use", _USE),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_erasures_model_id_version", "erasures", ["model_id", "version"])


def _refuse(name: str, moment: str, message: str, when: str = "") -> None:
    if _on_sqlite():
        condition = f" WHEN {when}" if when else ""
        op.execute(f"CREATE TRIGGER {name} BEFORE {moment}{condition} BEGIN SELECT RAISE(ABORT, '{message}'); END")
    else:
        op.execute(f"CREATE TRIGGER {name} BEFORE {moment} FOR EACH ROW EXECUTE FUNCTION fsu_refuse('{message}')")


def _on_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def _moment(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True).with_variant(sa.String(32), "sqlite"), nullable=False)


def _check(table: str, name: str, condition: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(condition, name=op.f(f"ck_{table}_{name}"))


def _to(table: str, column: str, target: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [target], name=f"fk_{table}_{column}")


def _of_version(table: str, column: str) -> sa.ForeignKeyConstraint:
    key = ["model_versions.model_id", "model_versions.number"]
    return sa.ForeignKeyConstraint(["model_id", column], key, name=f"fk_{table}_model_id_{column}")
