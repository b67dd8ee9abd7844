"""The audit chain: every row that enters the ledger's history, as one event whose hash covers the one before.

The hash of an event is the SHA-256 of its canonical JSON, which holds the previous hash: sorted keys, no
spaces, moments in UTC to the microsecond. Events are appended at the end of the transaction that they are
about, by the only writer that there is at that moment (`engines`), so the chain cannot fork. Steps of requests
are written by a trigger, into `request_events` and `audit_pending`, and wait there for the next such writer: a
second at most while anybody works on the ledger.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa

from fsu_ray.storage.columns import Instant, moment_text
from fsu_ray.storage.engines import finite
from fsu_ray.storage.rows import now
from fsu_ray.storage.schema import TERMINAL, audit_events, audit_pending, models, request_events, requests

GENESIS = "0" * 64
"""What the first event has for a previous hash."""

_NOTED = "fsu_noted"  # the events of a transaction, in `connection.info` until its end


@dataclass(frozen=True)
class Event:
    """One link: `detail` is canonical JSON, `previous` and `hash` are in hex."""

    seq: int
    at: str
    event: str
    model: str | None
    request: str | None
    actor: str
    detail: str
    previous: str
    hash: str

    @property
    def line(self) -> str:
        """The event as canonical JSON, without its own hash: what that hash is of."""
        return _line(self.actor, self.at, self.detail, self.event, self.model, self.previous, self.request, self.seq)

    @property
    def holds(self) -> bool:
        """Whether the hash is that of the event."""
        return hashlib.sha256(self.line.encode()).hexdigest() == self.hash


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, null for what is not finite."""
    try:
        return _ENCODER.encode(value)
    except ValueError:
        return _ENCODER.encode(finite(value))


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(value: Any) -> str:
    """The SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def row_of(table: sa.Table, values: Mapping[Any, Any], columns: Iterable[str] | None = None) -> dict[str, Any]:
    """A row of `table` as the chain keeps it: every column (or those of `columns`) as JSON has it."""
    chosen = _columns(table) if columns is None else {name: _columns(table)[name] for name in columns}
    return {name: _plain(kind, values.get(name)) for name, kind in chosen.items()}


@cache
def _columns(table: sa.Table) -> dict[str, type | None]:
    """The columns of a table, and what JSON has no type for."""
    special = {Instant: datetime, sa.Boolean: bool}
    return {column.name: special.get(type(column.type)) for column in table.columns}


def note(
    connection: sa.Connection,
    event: str,
    table: sa.Table,
    row: Mapping[str, Any],
    *,
    actor: str,
    model: str | None = None,
    request: str | None = None,
    **more: Any,
) -> None:
    """Have an event appended when this transaction ends: `row` has come into `table`."""
    detail = canonical({"table": table.name, "row": row, **more})
    connection.info[_NOTED].append((event, model, request, actor, detail))


def insert(
    connection: sa.Connection,
    event: str,
    table: sa.Table,
    values: Mapping[str, Any],
    *,
    actor: str,
    model: str | None = None,
    request: str | None = None,
) -> None:
    """Insert `values` into an insert-only table and note the event that says so."""
    connection.execute(sa.insert(table).values(**values))
    note(connection, event, table, row_of(table, values), actor=actor, model=model, request=request)


def begin(connection: sa.Connection) -> None:
    """A transaction that is alone begins: it takes the steps of requests that are not in the chain yet along."""
    connection.info[_NOTED] = _pending(connection)


def append_noted(connection: sa.Connection) -> None:
    """Append what this transaction has noted, in that order, and then its own steps of requests."""
    noted = connection.info.pop(_NOTED) + _pending(connection)
    if not noted:
        return
    head = connection.execute(_HEAD).one_or_none()
    seq, previous = (0, GENESIS) if head is None else head
    moment = now()
    at = moment_text(moment)
    links = []
    for event, model, request, actor, detail in noted:
        seq += 1
        line = _line(actor, at, detail, event, model, previous, request, seq)
        link = hashlib.sha256(line.encode()).hexdigest()
        links.append(
            {"seq": seq, "at": moment, "event": event, "model": model, "request": request, "actor": actor,
             "detail": detail, "previous": previous, "hash": link}
        )  # fmt: skip
        previous = link
    connection.execute(_APPEND, links)


def _pending(connection: sa.Connection) -> list[tuple[str, str | None, str | None, str, str]]:
    """The steps of requests that wait for the chain, oldest first; they wait no more."""
    if connection.dialect.name == "sqlite":  # nobody else writes between the two
        found = list(connection.execute(_STEPS).mappings())
        if found:
            connection.execute(sa.delete(audit_pending))
    else:
        found = list(connection.execute(_TAKE).mappings())
    found.sort(key=lambda row: (row["at"], row["request_id"], row["number"]))
    noted = []
    for row in found:
        more = {} if row["report"] is None else {"report": digest_of(row["report"])}
        detail = canonical({"table": request_events.name, "row": row_of(request_events, row), **more})
        noted.append((f"request_{row['new']}", row["model"], row["request_id"], row["actor"], detail))
    return noted


_COLUMNS = (
    *request_events.c,
    models.c.name.label("model"),
    sa.case((request_events.c.new.in_(TERMINAL), requests.c.report)).label("report"),
)
_JOINED = (
    request_events.c.request_id == audit_pending.c.request_id,
    request_events.c.number == audit_pending.c.number,
    requests.c.id == audit_pending.c.request_id,
    models.c.id == requests.c.model_id,
)
_STEPS = sa.select(*_COLUMNS).where(*_JOINED)
_TAKE = sa.delete(audit_pending).where(*_JOINED).returning(*_COLUMNS)
_HEAD = sa.select(audit_events.c.seq, audit_events.c.hash).order_by(audit_events.c.seq.desc()).limit(1)
_APPEND = sa.insert(audit_events)


def _line(
    actor: str, at: str, detail: str, event: str, model: str | None, previous: str, request: str | None, seq: int
) -> str:
    of, asked = "null" if model is None else f'"{model}"', "null" if request is None else f'"{request}"'
    who = json.dumps(actor)
    return (
        f'{{"actor":{who},"at":"{at}","detail":{detail},"event":"{event}","model":{of},"previous":"{previous}",'
        f'"request":{asked},"seq":{seq}}}'
    )


def _plain(kind: type | None, value: Any) -> Any:
    if kind is None or value is None:
        return value
    return moment_text(value) if kind is datetime else bool(value)
