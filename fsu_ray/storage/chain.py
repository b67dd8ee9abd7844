"""The audit chain: every row that enters the ledger's history, as one event whose hash covers the event before.

The hash of an event is the SHA-256 of its canonical JSON (sorted keys, no spaces, moments in UTC to the microsecond),
which contains the previous event's hash. So a changed event has a hash that does not match its content; a removed or
moved event leaves a missing number or a wrong previous hash (`unbroken`).

Events are appended at the end of the transaction that they describe. Writing transactions run one at a time
(`database`), so the chain cannot fork. Single-statement steps of requests are recorded by a trigger in `request_events`
and `audit_pending`; the next writing transaction appends them, at most about a second later while a process works.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, NamedTuple

import sqlalchemy as sa

from fsu_ray.errors import UserError
from fsu_ray.records import Digest
from fsu_ray.storage import rows
from fsu_ray.storage.columns import Instant, finite, moment_text
from fsu_ray.storage.schema import TERMINAL, audit_events, audit_pending, models, request_events, requests

GENESIS = "0" * 64
"""The previous hash of the first event."""

_NOTED = "fsu_noted"  # key in `connection.info`: the events noted in this transaction

_BATCH = 5000  # events read at once


class Event(NamedTuple):
    """One event of the chain: `at` is the text of its moment, `detail` canonical JSON, `previous` and `hash` hex."""

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
        """The event as canonical JSON without its own hash: the text that is hashed."""
        return _line(self.actor, self.at, self.detail, self.event, self.model, self.previous, self.request, self.seq)


def hash_of(event: Event) -> str:
    """The hash that an event with this content must have."""
    return _sha256(event.line)


class ChainHead(NamedTuple):
    """Number and hash of a chain's last event. A head noted elsewhere shows later whether the chain was cut or
    replaced."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> ChainHead:
        """The head that `str` wrote as `text`; raises UserError."""
        match = re.fullmatch(r"([0-9]{1,18}):([0-9a-f]{64})", text)
        if match is None:
            raise UserError(f"{text!r} is no head of a chain: give SEQ:HASH as `fsu audit head` prints it")
        return cls(int(match[1]), match[2])


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, null for NaN and infinities."""
    try:
        return _ENCODER.encode(value)
    except ValueError:
        return _ENCODER.encode(finite(value))


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(value: Any) -> Digest:
    """The SHA-256 of a value's canonical JSON."""
    return Digest(_sha256(canonical(value)))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def row_of(table: sa.Table, values: Mapping[Any, Any], columns: Iterable[str] | None = None) -> dict[str, Any]:
    """A row of `table` as an event records it: every column (or those of `columns`) in JSON types."""
    chosen = kinds(table) if columns is None else {name: kinds(table)[name] for name in columns}
    return {name: _plain(kind, values.get(name)) for name, kind in chosen.items()}


@cache
def kinds(table: sa.Table) -> dict[str, type | None]:
    """By column of a table, the type of its values where JSON needs a conversion, else None; `dict` is a JSON
    column."""
    special = {Instant: datetime, sa.Boolean: bool, sa.Float: float, sa.JSON: dict}
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
    """Note an event, to be appended at the end of this transaction: `row` was inserted into `table`."""
    detail = canonical({"table": table.name, "row": row, **more})
    connection.info[_NOTED][1].append((event, model, request, actor, detail))


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
    """Insert `values` into an insert-only table and note the event that records the row.

    Where the table has a column `actor`, `actor` is written there; `created_at` is the present moment if it is missing.
    """
    filled = dict(values)
    if "actor" in table.c:
        filled["actor"] = actor
        filled.setdefault("created_at", rows.now())
    connection.execute(sa.insert(table).values(**filled))
    note(connection, event, table, row_of(table, filled), actor=actor, model=model, request=request)


def begin(connection: sa.Connection) -> None:
    """Prepare a writing transaction that has just begun: no event is noted yet."""
    connection.info[_NOTED] = (moment_text(rows.now()), [])


def append_noted(connection: sa.Connection) -> None:
    """Append the waiting steps from before this transaction, the events noted in it, then its own steps of requests."""
    began, noted = connection.info.pop(_NOTED)
    waiting = _take_pending(connection)
    earlier = [content for at, content in waiting if at < began]
    contents = earlier + noted + [content for _, content in waiting[len(earlier) :]]
    if not contents:
        return
    seq, previous = head(connection)
    moment = rows.now()
    at = moment_text(moment)
    events = []
    for event, model, request, actor, detail in contents:
        seq += 1
        own_hash = _sha256(_line(actor, at, detail, event, model, previous, request, seq))
        events.append(
            {"seq": seq, "at": moment, "event": event, "model": model, "request": request, "actor": actor,
             "detail": detail, "previous": previous, "hash": own_hash}
        )  # fmt: skip
        previous = own_hash
    connection.execute(_APPEND, events)


def _take_pending(connection: sa.Connection) -> list[tuple[str, tuple[str, str | None, str | None, str, str]]]:
    """Take the waiting steps of requests out of `audit_pending`: the moment and the content of each, oldest first."""
    if connection.dialect.name == "sqlite":  # no other writer comes between the two statements
        steps = list(connection.execute(_STEPS).mappings())
        if steps:
            connection.execute(sa.delete(audit_pending))
    else:
        steps = list(connection.execute(_TAKE).mappings())
    steps.sort(key=lambda row: (row["at"], row["request_id"], row["number"]))
    contents = []
    for row in steps:
        more = {} if row["report"] is None else {"report": digest_of(row["report"])}
        step = row_of(request_events, row)
        detail = canonical({"table": request_events.name, "row": step, **more})
        contents.append((step["at"], (f"request_{row['new']}", row["model"], row["request_id"], row["actor"], detail)))
    return contents


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


def head(connection: sa.Connection) -> ChainHead:
    """The head of the stored chain; number 0 before the first event."""
    row = connection.execute(_HEAD).one_or_none()
    return ChainHead(0, GENESIS) if row is None else ChainHead(*row)


def stored(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> Iterator[Sequence[Event]]:
    """The stored events for which `where` holds, in order and in batches: rows with the columns of `Event`."""
    columns = [as_text(connection, column) if column is audit_events.c.at else column for column in _IN_ORDER]
    query = sa.select(*columns).where(*where).order_by(audit_events.c.seq)
    return connection.execute(query, execution_options={"yield_per": _BATCH}).partitions()  # type: ignore[return-value]


def as_text(connection: sa.Connection, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """A column as SQL that gives moments and JSON as text, and SQLite's booleans as integers."""
    kind, sqlite = type(column.type), connection.dialect.name == "sqlite"
    if kind is Instant and not sqlite:
        utc = sa.func.timezone("UTC", column)
        return sa.func.to_char(utc, 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"', type_=sa.Text).label(column.name)
    if kind is sa.JSON and not sqlite:
        return sa.cast(column, sa.Text).label(column.name)
    if sqlite and kind in (Instant, sa.JSON):
        return sa.type_coerce(column, sa.Text()).label(column.name)
    return sa.type_coerce(column, sa.Integer()).label(column.name) if sqlite and kind is sa.Boolean else column


def unbroken(
    batches: Iterable[Sequence[Event]], report: Callable[[int, str], None], noted: ChainHead | None = None
) -> Iterator[Sequence[Event]]:
    """Pass on events that begin with the first one; `report` each event number that breaks the chain, and how.

    `noted` is a head from earlier that the chain must still contain.
    """
    next_seq, last_hash = 1, GENESIS
    has_noted = noted in (None, (0, GENESIS))
    for batch in batches:
        for seq, at, event, model, request, actor, detail, previous, own_hash in batch:
            if seq != next_seq:
                report(next_seq, f"missing, {seq} comes after {next_seq - 1}")
            elif previous != last_hash:
                report(seq, f"its previous hash is not that of event {seq - 1}")
            try:
                if _sha256(_line(actor, at, detail, event, model, previous, request, seq)) != own_hash:
                    report(seq, "its hash is not that of its content")
            except TypeError:  # bytes in the place of text, which SQLite allows
                report(seq, "it is no event")
            next_seq, last_hash = seq + 1, own_hash
        has_noted = has_noted or any((event[0], event[8]) == noted for event in batch)
        yield batch
    if noted is not None and not has_noted:
        report(noted.seq, "the chain does not have the hash that was noted of it")


_IN_ORDER = [audit_events.c[name] for name in Event._fields]


def _line(
    actor: str, at: str, detail: str, event: str, model: str | None, previous: str, request: str | None, seq: int
) -> str:
    """Canonical JSON of an event without its hash, as `canonical` would write it, but faster."""
    model_json, request_json = ("null" if name is None else quoted(name) for name in (model, request))
    return (
        f'{{"actor":{quoted(actor)},"at":{quoted(at)},"detail":{detail},"event":{quoted(event)},"model":{model_json},'
        f'"previous":{quoted(previous)},"request":{request_json},"seq":{seq}}}'
    )


def _plain(kind: type | None, value: Any) -> Any:
    if kind is None or value is None:
        return value
    if kind is dict:
        return json.loads(canonical(value))  # as the ledger returns it: text for keys, lists for tuples
    return moment_text(value) if kind is datetime else kind(value)
