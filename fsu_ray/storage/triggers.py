"""The triggers of the database: which statements they refuse, and how they record the steps of requests.

The rules are the same on SQLite and PostgreSQL.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from fsu_ray.records import TRANSITIONS, Status
from fsu_ray.storage import schema
from fsu_ray.storage.columns import in_list, metadata
from fsu_ray.storage.schema import TERMINAL, TERMS


@dataclass(frozen=True)
class Trigger:
    """A trigger that refuses a statement: `moment` (e.g. UPDATE) on `table` fails with `message`, where `when` holds,
    on one engine or on both."""

    name: str
    moment: str
    table: str
    message: str
    when: str | None = None
    engine: str | None = None

    def sql(self, engine: str) -> str:
        """The CREATE TRIGGER statement for `sqlite` or `postgresql`."""
        begin = f"CREATE TRIGGER {self.name} BEFORE {self.moment} ON {self.table}"
        if engine == "sqlite":
            condition = f" WHEN {self.when}" if self.when else ""
            return f"{begin}{condition} BEGIN SELECT RAISE(ABORT, '{self.message}'); END"
        scope = "STATEMENT" if self.moment == "TRUNCATE" else "ROW"
        condition = f" WHEN ({self.when})" if self.when else ""
        return f"{begin} FOR EACH {scope}{condition} EXECUTE FUNCTION fsu_refuse('{self.message}')"


REFUSE = """
CREATE FUNCTION fsu_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation'; END $$
"""
"""The function that PostgreSQL's refusing triggers call."""

_EVENT = (
    "INSERT INTO request_events (request_id, number, attempt, old, new, at, actor, reason) "
    "VALUES (NEW.id, NEW.changes, NEW.attempt, {old}, NEW.status, NEW.changed_at, NEW.changed_by, NEW.reason); "
    "INSERT INTO audit_pending (request_id, number) VALUES (NEW.id, NEW.changes)"
)
_SUBMITTED, _STEPPED = _EVENT.format(old="NULL"), _EVENT.format(old="OLD.status")
_FUNCTION = "CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$\nBEGIN {body}; RETURN NULL; END $$"
RECORD = {
    "sqlite": (
        f"CREATE TRIGGER requests_born AFTER INSERT ON requests BEGIN {_SUBMITTED}; END",
        f"CREATE TRIGGER requests_stepped AFTER UPDATE OF status ON requests BEGIN {_STEPPED}; END",
    ),
    "postgresql": (
        _FUNCTION.format(name="fsu_request_born", body=_SUBMITTED),
        _FUNCTION.format(name="fsu_request_stepped", body=_STEPPED),
        "CREATE TRIGGER requests_born AFTER INSERT ON requests FOR EACH ROW EXECUTE FUNCTION fsu_request_born()",
        "CREATE TRIGGER requests_stepped AFTER UPDATE OF status ON requests "
        "FOR EACH ROW EXECUTE FUNCTION fsu_request_stepped()",
    ),
}
"""The triggers that write `request_events` and `audit_pending`, by engine."""


def _insert_only(table: sa.Table, keys: str) -> list[Trigger]:
    """The triggers that refuse UPDATE, DELETE, TRUNCATE, and SQLite's INSERT OR REPLACE over `keys` on any
    connection."""
    name = table.name
    message = f"{name} is insert-only"
    taken = f"EXISTS (SELECT 1 FROM {name} WHERE {keys})"
    return [
        Trigger(f"{name}_update", "UPDATE", name, message),
        Trigger(f"{name}_delete", "DELETE", name, message),
        Trigger(f"{name}_truncate", "TRUNCATE", name, message, engine="postgresql"),
        Trigger(f"{name}_replace", "INSERT", name, f"{message}: the key is taken", taken, "sqlite"),
    ]


def _never_deleted(table: str, message: str) -> list[Trigger]:
    return [
        Trigger(f"{table}_delete", "DELETE", table, message),
        Trigger(f"{table}_truncate", "TRUNCATE", table, message, engine="postgresql"),
    ]


def _requests() -> list[Trigger]:
    """The triggers that keep a request on the paths of `records.TRANSITIONS`, its terms unchanged, and each step
    counted."""
    steps = tuple(f"{old}>{new}" for old in Status for new in Status if new in TRANSITIONS[old])
    start, once = f"NEW.status <> '{Status.SUBMITTED}' OR NEW.changes <> 1", "a request begins as submitted, once"
    again = f"{start} OR EXISTS (SELECT 1 FROM requests WHERE id = NEW.id)"
    step = f"NOT ({in_list(_STEP, steps)})"
    counted = "a step between states is counted: set changes, changed_at and changed_by"
    return [
        Trigger("requests_insert", "INSERT", "requests", once, again, "sqlite"),
        Trigger("requests_insert", "INSERT", "requests", once, start, "postgresql"),
        Trigger(
            "requests_final", "UPDATE", "requests", "a request that has ended is final", in_list("OLD.status", TERMINAL)
        ),
        Trigger("requests_step", "UPDATE OF status", "requests", "no such step between states of a request", step),
        Trigger("requests_uncounted", "UPDATE OF status", "requests", counted, "NEW.changes <> OLD.changes + 1"),
        Trigger("requests_terms", f"UPDATE OF {', '.join(TERMS)}", "requests", "the terms of a request do not change"),
        *_never_deleted("requests", "requests are never deleted"),
    ]


_STEP = "OLD.status || '>' || NEW.status"
_KEYS = {
    schema.models: "id = NEW.id OR name = NEW.name",
    schema.model_policies: "id = NEW.id",
    schema.request_events: "request_id = NEW.request_id AND number = NEW.number",
    schema.model_versions: (
        "id = NEW.id OR (model_id = NEW.model_id AND number = NEW.number) OR request_id = NEW.request_id"
    ),
    schema.generators: "id = NEW.id OR request_id = NEW.request_id",
    schema.erasures: "id = NEW.id OR request_id = NEW.request_id",
    schema.aliases_history: "id = NEW.id",
    schema.rechecks: "id = NEW.id",
    schema.generator_retirements: "id = NEW.id OR generator_id = NEW.generator_id",
    schema.seals: (
        "id = NEW.id OR generator_id = NEW.generator_id OR (model_id = NEW.model_id AND version = NEW.version)"
    ),
    schema.removals: "id = NEW.id",
    schema.schedules: "id = NEW.id",
    schema.schedule_events: "id = NEW.id",
    schema.searches: "id = NEW.id",
    schema.audit_events: "seq = NEW.seq OR previous = NEW.previous OR hash = NEW.hash",
}
HISTORY = tuple(_KEYS)
"""The insert-only tables."""

_WINDOW = "EXISTS (SELECT 1 FROM schedule_windows WHERE schedule_id = NEW.schedule_id AND starts_at = NEW.starts_at)"
TRIGGERS = (
    *_requests(),
    *(trigger for table, keys in _KEYS.items() for trigger in _insert_only(table, keys)),
    *_never_deleted("schedule_windows", "windows are never deleted"),
    Trigger("schedule_windows_again", "INSERT", "schedule_windows", "this window has been fired", _WINDOW, "sqlite"),
    Trigger(
        "schedule_windows_terms", "UPDATE OF schedule_id, starts_at, missed, fired_at", "schedule_windows",
        "what was fired does not change",
    ),
)  # fmt: skip


def triggers(engine: str) -> list[str]:
    """The statements that create the triggers on `sqlite` or `postgresql`, in order."""
    refusals = [trigger.sql(engine) for trigger in TRIGGERS if trigger.engine in (None, engine)]
    return [*([] if engine == "sqlite" else [REFUSE]), *refusals, *RECORD[engine]]


for _engine in ("sqlite", "postgresql"):
    for _sql in triggers(_engine):
        _ddl = sa.DDL(_sql.replace("%", "%%")).execute_if(dialect=_engine)  # type: ignore[no-untyped-call]
        sa.event.listen(metadata, "after_create", _ddl)
