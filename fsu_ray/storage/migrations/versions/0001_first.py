"""The first schema: models, requests, versions, generators, erasures.

It imports nothing of fsu_ray, so that later changes of the code cannot change what it does.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_STATES = "'submitted', 'awaiting_approval', 'queued', 'running', 'succeeded', 'rejected', 'failed', 'cancelled'"
_TERMINAL = "'succeeded', 'rejected', 'failed', 'cancelled'"
_LIVE = "'submitted', 'awaiting_approval', 'queued', 'running'"
_STEPS = (
    "'submitted>awaiting_approval', 'submitted>queued', 'submitted>cancelled', "
    "'awaiting_approval>queued', 'awaiting_approval>rejected', 'awaiting_approval>cancelled', "
    "'queued>running', 'queued>cancelled', "
    "'running>queued', 'running>running', 'running>succeeded', 'running>rejected', 'running>failed', "
    "'running>cancelled'"
)
_TERMS = (
    "id, model_id, behaviour_name, behaviour_kind, behaviour_targets, samples, sample_count, recipe, "
    "idempotency_key, submitted_at"
)


# PostgreSQL's triggers call a function; this one refuses with the message that the trigger gives it.
_REFUSE = """
CREATE FUNCTION fsu_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation'; END $$
"""


def upgrade() -> None:
    if not _on_sqlite():
        op.execute(_REFUSE)
    _models()
    _requests()
    _model_versions()
    _generators()
    _erasures()
    _requests_triggers()
    _insert_only("model_versions", "(model_id = NEW.model_id AND number = NEW.number) OR request_id = NEW.request_id")
    _insert_only("generators", "request_id = NEW.request_id")
    _insert_only("erasures", "request_id = NEW.request_id")


def _models() -> None:
    op.create_table(
        "models",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("test_set", sa.Text),
        _moment("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
        sa.UniqueConstraint("name", name="uq_models_name"),
        sqlite_with_rowid=False,
    )


def _requests() -> None:
    op.create_table(
        "requests",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("model_id", sa.String(40), nullable=False),
        *_behaviour(),
        sa.Column("samples", sa.String(64), nullable=False),
        sa.Column("sample_count", sa.Integer, nullable=False),
        sa.Column("recipe", sa.JSON, nullable=False),
        sa.Column("idempotency_key", sa.String(64), nullable=False),
        _moment("submitted_at"),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
        sa.Column("worker", sa.String(200)),
        _moment("lease_until", nullable=True),
        sa.Column("reason", sa.Text),
        sa.Column("version", sa.Integer),
        sa.Column("report", sa.JSON),
        _moment("started_at", nullable=True),
        _moment("finished_at", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_requests"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_requests_model_id"),
        _check("requests", "status", f"status IN ({_STATES})"),
        _check("requests", "kind", "behaviour_kind IN ('class', 'subset')"),
        _check("requests", "sample_count", "sample_count >= 1"),
        _check("requests", "attempt", "attempt >= 0"),
        _check("requests", "lease", "(status = 'running') = (lease_until IS NOT NULL)"),
        _check("requests", "worker", "status <> 'running' OR worker IS NOT NULL"),
        _check("requests", "version", "(status = 'succeeded') = (version IS NOT NULL)"),
        _check("requests", "finished", f"(status IN ({_TERMINAL})) = (finished_at IS NOT NULL)"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_requests_status_submitted_at", "requests", ["status", "submitted_at"])
    op.create_index("ix_requests_model_id_submitted_at", "requests", ["model_id", "submitted_at"])
    _unique_where("uq_requests_running", ["model_id"], "status = 'running'")
    _unique_where("uq_requests_live_key", ["model_id", "idempotency_key"], f"status IN ({_LIVE})")


def _model_versions() -> None:
    op.create_table(
        "model_versions",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("model_id", sa.String(40), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("parent", sa.Integer),
        sa.Column("root", sa.Integer, nullable=False),
        sa.Column("weights", sa.String(64), nullable=False),
        sa.Column("request_id", sa.String(40)),
        _moment("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_model_versions"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_model_versions_model_id"),
        sa.ForeignKeyConstraint(["request_id"], ["requests.id"], name="fk_model_versions_request_id"),
        sa.UniqueConstraint("request_id", name="uq_model_versions_request_id"),
        sa.UniqueConstraint("model_id", "number", name="uq_model_versions_model_id_number"),
        _of_version("model_versions", "parent"),
        _of_version("model_versions", "root"),
        _check("model_versions", "first", "(number = 1) = (parent IS NULL)"),
        _check("model_versions", "parent", "parent >= 1 AND parent < number"),
        _check("model_versions", "root", "root >= 1 AND root <= number"),
        sqlite_with_rowid=False,
    )


def _generators() -> None:
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
        sa.Column("figures", sa.JSON, nullable=False),
        sa.Column("request_id", sa.String(40), nullable=False),
        _moment("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_generators"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_generators_model_id"),
        sa.ForeignKeyConstraint(["warm_started_from"], ["generators.id"], name="fk_generators_warm_started_from"),
        sa.ForeignKeyConstraint(["request_id"], ["requests.id"], name="fk_generators_request_id"),
        sa.UniqueConstraint("request_id", name="uq_generators_request_id"),
        _of_version("generators", "root"),
        _check("generators", "origin", "origin IN ('trained', 'warm_started')"),
        _check("generators", "warm_started_from", "(origin = 'warm_started') = (warm_started_from IS NOT NULL)"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_generators_model_id_created_at", "generators", ["model_id", "created_at"])


def _erasures() -> None:
    op.create_table(
        "erasures",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("model_id", sa.String(40), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("request_id", sa.String(40), nullable=False),
        *_behaviour(),
        sa.Column("samples", sa.String(64), nullable=False),
        sa.Column("mask", sa.String(64), nullable=False),
        sa.Column("probes", sa.String(64), nullable=False),
        sa.Column("generator_id", sa.String(40), nullable=False),
        sa.Column("generator_use", sa.String(20), nullable=False),
        sa.Column("report", sa.JSON, nullable=False),
        _moment("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_erasures"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_erasures_model_id"),
        sa.ForeignKeyConstraint(["request_id"], ["requests.id"], name="fk_erasures_request_id"),
        sa.UniqueConstraint("request_id", name="uq_erasures_request_id"),
        sa.ForeignKeyConstraint(["generator_id"], ["generators.id"], name="fk_erasures_generator_id"),
        _of_version("erasures", "version"),
        _check("erasures", "kind", "behaviour_kind IN ('class', 'subset')"),
        _check("erasures", "generator_use", "generator_use IN ('trained', 'reused', 'warm_started')"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_erasures_model_id_version", "erasures", ["model_id", "version"])


def _requests_triggers() -> None:
    once = "NEW.status <> 'submitted'"
    if _on_sqlite():
        once += " OR EXISTS (SELECT 1 FROM requests WHERE id = NEW.id)"
    ended = f"OLD.status IN ({_TERMINAL})"
    step = f"NOT (OLD.status || '>' || NEW.status IN ({_STEPS}))"
    _trigger("requests_insert", "INSERT ON requests", "a request begins as submitted, once", once)
    _trigger("requests_final", "UPDATE ON requests", "a request that has ended is final", ended)
    _trigger("requests_step", "UPDATE OF status ON requests", "no such step between states of a request", step)
    _trigger("requests_terms", f"UPDATE OF {_TERMS} ON requests", "the terms of a request do not change")
    _trigger("requests_delete", "DELETE ON requests", "requests are never deleted")
    _no_truncate("requests", "requests are never deleted")


def _insert_only(table: str, keys: str) -> None:
    message = f"{table} is insert-only"
    _trigger(f"{table}_update", f"UPDATE ON {table}", message)
    _trigger(f"{table}_delete", f"DELETE ON {table}", message)
    _no_truncate(table, message)
    if _on_sqlite():  # whose INSERT OR REPLACE deletes without a DELETE trigger
        taken = f"EXISTS (SELECT 1 FROM {table} WHERE id = NEW.id OR {keys})"
        _trigger(f"{table}_replace", f"INSERT ON {table}", f"{message}: the key is taken", taken)


def _trigger(name: str, moment: str, message: str, when: str = "") -> None:
    if _on_sqlite():
        condition = f" WHEN {when}" if when else ""
        op.execute(f"CREATE TRIGGER {name} BEFORE {moment}{condition} BEGIN SELECT RAISE(ABORT, '{message}'); END")
    else:
        condition = f" WHEN ({when})" if when else ""
        call = f"FOR EACH ROW{condition} EXECUTE FUNCTION fsu_refuse('{message}')"
        op.execute(f"CREATE TRIGGER {name} BEFORE {moment} {call}")


def _no_truncate(table: str, message: str) -> None:
    if not _on_sqlite():
        call = f"FOR EACH STATEMENT EXECUTE FUNCTION fsu_refuse('{message}')"
        op.execute(f"CREATE TRIGGER {table}_truncate BEFORE TRUNCATE ON {table} {call}")


def _on_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def _moment(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True).with_variant(sa.String(32), "sqlite"), nullable=nullable)


def _behaviour() -> list[sa.Column[Any]]:
    return [
        sa.Column("behaviour_name", sa.String(100), nullable=False),
        sa.Column("behaviour_kind", sa.String(10), nullable=False),
        sa.Column("behaviour_targets", sa.JSON, nullable=False),
    ]


def _check(table: str, name: str, condition: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(condition, name=op.f(f"ck_{table}_{name}"))


def _of_version(table: str, column: str) -> sa.ForeignKeyConstraint:
    key = ["model_versions.model_id", "model_versions.number"]
    return sa.ForeignKeyConstraint(["model_id", column], key, name=f"fk_{table}_model_id_{column}")


def _unique_where(name: str, columns: list[str], where: str) -> None:
    op.create_index(
        name, "requests", columns, unique=True, sqlite_where=sa.text(where), postgresql_where=sa.text(where)
    )
