"""The audit chain. The rows that exist already enter it as events named `adopted`; later changes of them are detected.

It imports nothing of fsu_ray, so that later changes of the code cannot change what it does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_TERMS = (
    "id", "model_id", "behaviour_name", "behaviour_kind", "behaviour_targets", "samples", "sample_count", "recipe",
    "idempotency_key", "submitted_at", "key_given", "priority", "not_before", "due_at", "requested_by",
)  # fmt: skip


def upgrade() -> None:
    _audit_events()
    _adopt()
    message = "audit_events is insert-only"
    _refuse("audit_events_update", "UPDATE ON audit_events", message)
    _refuse("audit_events_delete", "DELETE ON audit_events", message)
    _no_truncate("audit_events", message)
    if _on_sqlite():  # whose INSERT OR REPLACE deletes without a DELETE trigger
        taken = "EXISTS (SELECT 1 FROM audit_events WHERE seq = NEW.seq OR previous = NEW.previous OR hash = NEW.hash)"
        _refuse("audit_events_replace", "INSERT ON audit_events", f"{message}: the key is taken", taken)


def _audit_events() -> None:
    op.create_table(
        "audit_events",
        sa.Column("seq", sa.Integer, autoincrement=False, nullable=False),
        _moment("at"),
        sa.Column("event", sa.String(40), nullable=False),
        sa.Column("model", sa.String(100)),
        sa.Column("request", sa.String(40)),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_audit_events"),
        sa.UniqueConstraint("previous", name="uq_audit_events_previous"),
        sa.UniqueConstraint("hash", name="uq_audit_events_hash"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_audit_events_model_seq", "audit_events", ["model", "seq"])


def _adopt() -> None:
    bind = op.get_bind()
    moment = datetime.now(UTC)
    links, previous = [], "0" * 64
    for seq, (model, request, detail) in enumerate(_rows(bind), 1):
        at = _text(moment)
        event = {
            "actor": "migration", "at": at, "detail": detail, "event": "adopted", "model": model,
            "previous": previous, "request": request, "seq": seq,
        }  # fmt: skip
        link = hashlib.sha256(_canonical(event).encode()).hexdigest()
        links.append({**event, "at": moment if bind.dialect.name != "sqlite" else at, "hash": link,
                      "detail": _canonical(detail)})  # fmt: skip
        previous = link
    if links:
        bind.execute(sa.insert(_reflected(bind, "audit_events")), links)


def _rows(bind: sa.Connection) -> Iterator[tuple[str | None, str | None, dict[str, Any]]]:
    names: dict[str, str] = {}  # of models, and of the models of requests
    reports: dict[str, str] = {}  # of requests that have ended
    for name in ("models", "requests", "request_events", "model_versions", "generators", "erasures"):
        table = _reflected(bind, name)
        columns = _TERMS if name == "requests" else table.columns.keys()
        for row in bind.execute(sa.select(table).order_by(*table.primary_key)).mappings():
            if name == "models":
                names[row["id"]] = row["name"]
            if name == "requests":
                names[row["id"]] = names[row["model_id"]]
                if row["report"] is not None:
                    reports[row["id"]] = hashlib.sha256(_canonical(row["report"]).encode()).hexdigest()
            request = row["id"] if name == "requests" else row.get("request_id")
            model = row["name"] if name == "models" else names[row.get("model_id", request)]
            recorded = {"row": {c: _text(row[c]) for c in columns}, "table": name}
            if name == "request_events" and request in reports:
                recorded["report"] = reports[request]
            yield model, request, recorded


def _reflected(bind: sa.Connection, name: str) -> sa.Table:
    return sa.Table(name, sa.MetaData(), autoload_with=bind, resolve_fks=False)


def _text(value: Any) -> Any:
    return value.astimezone(UTC).isoformat(timespec="microseconds") if isinstance(value, datetime) else value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _refuse(name: str, moment: str, message: str, when: str = "") -> None:
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
