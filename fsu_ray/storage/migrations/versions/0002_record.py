"""The ledger as system of record: events of requests by trigger, policies, aliases, re-checks, schedules.

It imports nothing of fsu_ray, so that later changes of the code cannot change what it does.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_TERMINAL = "'succeeded', 'rejected', 'failed', 'cancelled'"
_TERMS = (
    "id", "model_id", "behaviour_name", "behaviour_kind", "behaviour_targets", "samples", "sample_count", "recipe",
    "idempotency_key", "submitted_at", "key_given", "priority", "not_before", "due_at", "requested_by",
)  # fmt: skip
_STEPS = (
    "'submitted>awaiting_approval', 'submitted>queued', 'submitted>cancelled', "
    "'awaiting_approval>queued', 'awaiting_approval>rejected', 'awaiting_approval>cancelled', "
    "'queued>running', 'queued>cancelled', "
    "'running>queued', 'running>running', 'running>succeeded', 'running>rejected', 'running>failed', "
    "'running>cancelled'"
)
_EVENT = (
    "INSERT INTO request_events (request_id, number, attempt, old, new, at, actor, reason) "
    "VALUES (NEW.id, NEW.changes, NEW.attempt, {old}, NEW.status, NEW.changed_at, NEW.changed_by, NEW.reason); "
    "INSERT INTO audit_pending (request_id, number) VALUES (NEW.id, NEW.changes)"
)


def upgrade() -> None:
    for name in ("requests_insert", "requests_final", "requests_step", "requests_terms"):
        op.execute(f"DROP TRIGGER {name}" + ("" if _on_sqlite() else " ON requests"))
    _requests()
    _request_events()
    _policies_and_aliases()
    _rechecks()
    _generators()
    _removals()
    _schedules()
    _windows()
    _count()
    _requests_triggers()
    _history_triggers()


def _requests() -> None:
    for column in (
        sa.Column("key_given", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
        _moment("not_before", nullable=True),
        _moment("due_at", nullable=True),
        sa.Column("requested_by", sa.String(100)),
        sa.Column("lead", sa.String(40)),
        sa.Column("alone", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
        _moment("retry_at", nullable=True),
        sa.Column("cancel_by", sa.String(100)),
        sa.Column("changes", sa.Integer, nullable=False, server_default="0"),
        _moment("changed_at", nullable=True),
        sa.Column("changed_by", sa.String(200)),
    ):
        op.add_column("requests", column)
    op.drop_index("ix_requests_status_submitted_at", "requests")
    op.drop_index("uq_requests_running", "requests")
    queued = sa.text("status = 'queued'")
    order: list[Any] = [sa.text("priority DESC"), "submitted_at", "id"]
    op.create_index("ix_requests_queue", "requests", order, sqlite_where=queued, postgresql_where=queued)
    led = sa.text("lead IS NOT NULL")
    op.create_index("ix_requests_lead", "requests", ["lead"], sqlite_where=led, postgresql_where=led)
    _unique_where("uq_requests_running", ["model_id"], "status = 'running' AND lead IS NULL")
    _unique_where("uq_requests_given_key", ["model_id", "idempotency_key"], "key_given")


def _request_events() -> None:
    op.create_table(
        "request_events",
        sa.Column("request_id", sa.String(40), nullable=False),
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("old", sa.String(20)),
        sa.Column("new", sa.String(20), nullable=False),
        _moment("at"),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("reason", sa.Text),
        sa.PrimaryKeyConstraint("request_id", "number", name="pk_request_events"),
        _to("request_events", "request_id", "requests.id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "audit_pending",
        sa.Column("request_id", sa.String(40), nullable=False),
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("request_id", "number", name="pk_audit_pending"),
        _to("audit_pending", "request_id", "requests.id"),
        sqlite_with_rowid=False,
    )


def _policies_and_aliases() -> None:
    _create(
        "model_policies",
        sa.Column("model_id", sa.String(40), nullable=False),
        sa.Column("policy", sa.JSON, nullable=False),
        *_made(),
        _to("model_policies", "model_id", "models.id"),
    )
    op.create_index("ix_model_policies_model_id_created_at", "model_policies", ["model_id", "created_at"])
    _create(
        "aliases_history",
        sa.Column("model_id", sa.String(40), nullable=False),
        sa.Column("alias", sa.String(50), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("previous", sa.Integer),
        sa.Column("forced", sa.Boolean, nullable=False),
        sa.Column("reason", sa.String(100)),
        *_made(),
        _to("aliases_history", "model_id", "models.id"),
        _of_version("aliases_history", "version"),
    )
    op.create_index(
        "ix_aliases_history_model_id_alias_created_at", "aliases_history", ["model_id", "alias", "created_at"]
    )


def _rechecks() -> None:
    _create(
        "rechecks",
        sa.Column("erasure_id", sa.String(40), nullable=False),
        sa.Column("model_id", sa.String(40), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("probes", sa.Integer, nullable=False),
        sa.Column("share", sa.Float),
        sa.Column("passed", sa.Boolean, nullable=False),
        *_made(),
        _to("rechecks", "erasure_id", "erasures.id"),
        _to("rechecks", "model_id", "models.id"),
        _of_version("rechecks", "version"),
    )
    op.create_index("ix_rechecks_erasure_id_created_at", "rechecks", ["erasure_id", "created_at"])


def _generators() -> None:
    _create(
        "generator_retirements",
        sa.Column("generator_id", sa.String(40), nullable=False),
        sa.Column("reason", sa.String(20), nullable=False),
        *_made(),
        _to("generator_retirements", "generator_id", "generators.id"),
        sa.UniqueConstraint("generator_id", name="uq_generator_retirements_generator_id"),
        _check("generator_retirements", "reason", "reason IN ('operator', 'erasure', 'age', 'seal')"),
    )
    _create(
        "seals",
        sa.Column("generator_id", sa.String(40), nullable=False),
        sa.Column("model_id", sa.String(40), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("dataset", sa.String(64), nullable=False),
        *_made(),
        _to("seals", "generator_id", "generators.id"),
        _to("seals", "model_id", "models.id"),
        _of_version("seals", "version"),
        sa.UniqueConstraint("generator_id", name="uq_seals_generator_id"),
        sa.UniqueConstraint("model_id", "version", name="uq_seals_model_id_version"),
    )


def _removals() -> None:
    _create(
        "removals",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("reason", sa.String(20), nullable=False),
        sa.Column("request_id", sa.String(40)),
        sa.Column("generator_id", sa.String(40)),
        *_made(),
        _to("removals", "request_id", "requests.id"),
        _to("removals", "generator_id", "generators.id"),
        _check("removals", "reason", "reason IN ('purged', 'retired', 'sealed', 'unreferenced')"),
    )
    op.create_index("ix_removals_digest", "removals", ["digest"])
    op.create_index("ix_removals_request_id", "removals", ["request_id"])


def _schedules() -> None:
    _create(
        "schedules",
        sa.Column("model_id", sa.String(40), nullable=False),
        sa.Column("cron", sa.String(100), nullable=False),
        sa.Column("timezone", sa.String(64), nullable=False),
        sa.Column("max_requests", sa.Integer),
        sa.Column("minutes", sa.Integer),
        *_made(),
        _to("schedules", "model_id", "models.id"),
        _check("schedules", "max_requests", "max_requests >= 1"),
        _check("schedules", "minutes", "minutes >= 1"),
    )
    _create(
        "schedule_events",
        sa.Column("schedule_id", sa.String(40), nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        *_made(),
        _to("schedule_events", "schedule_id", "schedules.id"),
        _check("schedule_events", "state", "state IN ('active', 'paused', 'removed')"),
    )
    op.create_index("ix_schedule_events_schedule_id_created_at", "schedule_events", ["schedule_id", "created_at"])


def _windows() -> None:
    op.create_table(
        "schedule_windows",
        sa.Column("schedule_id", sa.String(40), nullable=False),
        _moment("starts_at"),
        sa.Column("missed", sa.Integer, nullable=False),
        _moment("fired_at"),
        sa.Column("worker", sa.String(200), nullable=False),
        _moment("lease_until", nullable=True),
        _moment("finished_at", nullable=True),
        sa.Column("requests", sa.Integer, nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("schedule_id", "starts_at", name="pk_schedule_windows"),
        _to("schedule_windows", "schedule_id", "schedules.id"),
        _check("schedule_windows", "lease", "(lease_until IS NULL) = (finished_at IS NOT NULL)"),
        sqlite_with_rowid=False,
    )


def _count() -> None:
    """What the first revision left behind: one event a request."""
    op.execute(
        "UPDATE requests SET changes = 1, changed_at = coalesce(finished_at, started_at, submitted_at), "
        "changed_by = 'migration'"
    )
    op.execute(
        "INSERT INTO request_events (request_id, number, attempt, old, new, at, actor, reason) "
        "SELECT id, changes, attempt, NULL, status, changed_at, changed_by, 'adopted' FROM requests"
    )


def _requests_triggers() -> None:
    start = "NEW.status <> 'submitted' OR NEW.changes <> 1"
    if _on_sqlite():
        start += " OR EXISTS (SELECT 1 FROM requests WHERE id = NEW.id)"
    ended = f"OLD.status IN ({_TERMINAL})"
    step = f"NOT (OLD.status || '>' || NEW.status IN ({_STEPS}))"
    counted = "a step between states is counted: set changes, changed_at and changed_by"
    terms = f"UPDATE OF {', '.join(_TERMS)} ON requests"
    _refuse("requests_insert", "INSERT ON requests", "a request begins as submitted, once", start)
    _refuse("requests_final", "UPDATE ON requests", "a request that has ended is final", ended)
    _refuse("requests_step", "UPDATE OF status ON requests", "no such step between states of a request", step)
    _refuse("requests_uncounted", "UPDATE OF status ON requests", counted, "NEW.changes <> OLD.changes + 1")
    _refuse("requests_terms", terms, "the terms of a request do not change")
    _record("born", "INSERT", _EVENT.format(old="NULL"))
    _record("stepped", "UPDATE OF status", _EVENT.format(old="OLD.status"))


def _record(name: str, moment: str, does: str) -> None:
    if _on_sqlite():
        op.execute(f"CREATE TRIGGER requests_{name} AFTER {moment} ON requests BEGIN {does}; END")
        return
    op.execute(
        f"CREATE FUNCTION fsu_request_{name}() RETURNS trigger LANGUAGE plpgsql AS $$\n"
        f"BEGIN {does}; RETURN NULL; END $$"
    )
    op.execute(
        f"CREATE TRIGGER requests_{name} AFTER {moment} ON requests FOR EACH ROW EXECUTE FUNCTION fsu_request_{name}()"
    )


def _history_triggers() -> None:
    for table in ("model_policies", "aliases_history", "rechecks", "removals", "schedules", "schedule_events"):
        _insert_only(table, "id = NEW.id")
    _insert_only("models", "id = NEW.id OR name = NEW.name")
    _insert_only("request_events", "request_id = NEW.request_id AND number = NEW.number")
    _insert_only("generator_retirements", "id = NEW.id OR generator_id = NEW.generator_id")
    sealed = "id = NEW.id OR generator_id = NEW.generator_id OR (model_id = NEW.model_id AND version = NEW.version)"
    _insert_only("seals", sealed)
    windows = "schedule_windows"
    _refuse(f"{windows}_delete", f"DELETE ON {windows}", "windows are never deleted")
    _no_truncate(windows, "windows are never deleted")
    if _on_sqlite():
        same = "schedule_id = NEW.schedule_id AND starts_at = NEW.starts_at"
        again = f"EXISTS (SELECT 1 FROM {windows} WHERE {same})"
        _refuse(f"{windows}_again", f"INSERT ON {windows}", "this window has been fired", again)
    fixed = f"UPDATE OF schedule_id, starts_at, missed, fired_at ON {windows}"
    _refuse(f"{windows}_terms", fixed, "what was fired does not change")


def _insert_only(table: str, keys: str) -> None:
    message = f"{table} is insert-only"
    _refuse(f"{table}_update", f"UPDATE ON {table}", message)
    _refuse(f"{table}_delete", f"DELETE ON {table}", message)
    _no_truncate(table, message)
    if _on_sqlite():  # whose INSERT OR REPLACE deletes without a DELETE trigger
        taken = f"EXISTS (SELECT 1 FROM {table} WHERE {keys})"
        _refuse(f"{table}_replace", f"INSERT ON {table}", f"{message}: the key is taken", taken)


def _refuse(name: str, moment: str, message: str, when: str = "") -> None:
    condition = "" if not when else f" WHEN {when}" if _on_sqlite() else f" WHEN ({when})"
    call = f"FOR EACH ROW{condition} EXECUTE FUNCTION fsu_refuse('{message}')"
    if _on_sqlite():
        call = f"{condition} BEGIN SELECT RAISE(ABORT, '{message}'); END".strip()
    op.execute(f"CREATE TRIGGER {name} BEFORE {moment} {call}")


def _no_truncate(table: str, message: str) -> None:
    if not _on_sqlite():
        call = f"FOR EACH STATEMENT EXECUTE FUNCTION fsu_refuse('{message}')"
        op.execute(f"CREATE TRIGGER {table}_truncate BEFORE TRUNCATE ON {table} {call}")


def _on_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def _create(table: str, *parts: Any) -> None:
    key = sa.PrimaryKeyConstraint("id", name=f"pk_{table}")
    op.create_table(table, sa.Column("id", sa.String(40), nullable=False), *parts, key, sqlite_with_rowid=False)


def _moment(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True).with_variant(sa.String(32), "sqlite"), nullable=nullable)


def _made() -> tuple[sa.Column[Any], sa.Column[Any]]:
    return _moment("created_at"), sa.Column("actor", sa.String(100), nullable=False)


def _check(table: str, name: str, condition: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(condition, name=op.f(f"ck_{table}_{name}"))


def _to(table: str, column: str, target: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [target], name=f"fk_{table}_{column}")


def _of_version(table: str, column: str) -> sa.ForeignKeyConstraint:
    key = ["model_versions.model_id", "model_versions.number"]
    return sa.ForeignKeyConstraint(["model_id", column], key, name=f"fk_{table}_model_id_{column}")


def _unique_where(name: str, columns: list[str], where: str) -> None:
    op.create_index(
        name, "requests", columns, unique=True, sqlite_where=sa.text(where), postgresql_where=sa.text(where)
    )
