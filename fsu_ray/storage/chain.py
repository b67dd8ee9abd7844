"""The audit chain: every row that enters the ledger's history, as one event whose hash covers the one before.

The hash of an event is the SHA-256 of its canonical JSON, which holds the previous hash: sorted keys, no
spaces, moments in UTC to the microsecond. Events are appended at the end of the transaction that they are
about, by the only writer that there is at that moment (`engines`), so the chain cannot fork.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from fsu_ray.storage.columns import Instant, moment_text
from fsu_ray.storage.engines import finite
from fsu_ray.storage.rows import now
from fsu_ray.storage.schema import audit_events

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
    return json.dumps(finite(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(value: Any) -> str:
    """The SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def row_of(table: sa.Table, values: Mapping[str, Any], columns: Iterable[str] | None = None) -> dict[str, Any]:
    """A row of `table` as the chain keeps it: every column (or those of `columns`) as JSON has it."""
    chosen = table.columns.keys() if columns is None else columns
    return {name: _plain(table.c[name], values.get(name)) for name in chosen}


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
    """A transaction begins: nothing is noted yet."""
    connection.info[_NOTED] = []


def append_noted(connection: sa.Connection) -> None:
    """Append what this transaction has noted, in that order."""
    noted = connection.info.pop(_NOTED)
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


def _plain(column: sa.Column[Any], value: Any) -> Any:
    if isinstance(column.type, Instant) and isinstance(value, datetime):
        return moment_text(value)
    if isinstance(column.type, sa.Boolean):
        return bool(value)
    return finite(value)
