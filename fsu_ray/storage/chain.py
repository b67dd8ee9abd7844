"""The audit chain: every row that enters the ledger's history, as one event whose hash covers the one before.

The hash of an event is the SHA-256 of its canonical JSON, which holds the previous hash: sorted keys, no
spaces, moments in UTC to the microsecond. So an event that is changed, taken out or moved leaves a hash that is
not that of its content, a number that is missing, or a link to something else (`unbroken`).

Events are appended at the end of the transaction that they are about, by the only writer that there is at that
moment (`engines`), so the chain cannot fork. Steps of requests are written by a trigger, into `request_events` and
`audit_pending`, and wait there for the next such writer: a second at most while anybody works on the ledger.
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
from fsu_ray.storage.columns import Instant, moment_text
from fsu_ray.storage.engines import finite
from fsu_ray.storage.rows import now
from fsu_ray.storage.schema import TERMINAL, audit_events, audit_pending, models, request_events, requests

GENESIS = "0" * 64
"""What the first event has for a previous hash."""

_NOTED = "fsu_noted"  # the events of a transaction, in `connection.info` until its end


_BATCH = 5000  # events that are read at once


class Event(NamedTuple):
    """One link: `at` is the text of its moment, `detail` canonical JSON, `previous` and `hash` are in hex."""

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


def hash_of(event: Event) -> str:
    """The hash that an event with this content has."""
    return hashlib.sha256(event.line.encode()).hexdigest()


class ChainHead(NamedTuple):
    """The last event of a chain. Who notes it can tell later whether the chain still has all that it had then."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> ChainHead:
        """What `str` makes of a head; raises UserError."""
        found = re.fullmatch(r"([0-9]{1,18}):([0-9a-f]{64})", text)
        if found is None:
            raise UserError(f"{text!r} is no head of a chain: give SEQ:HASH as `fsu audit head` prints it")
        return cls(int(found[1]), found[2])


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
    chosen = kinds(table) if columns is None else {name: kinds(table)[name] for name in columns}
    return {name: _plain(kind, values.get(name)) for name, kind in chosen.items()}


@cache
def kinds(table: sa.Table) -> dict[str, type | None]:
    """The columns of a table, with a type for those whose values JSON has another form for: `dict` is JSON itself."""
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
    """Have an event appended when this transaction ends: `row` has come into `table`."""
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
    """Insert `values` into an insert-only table and note the event that says so."""
    connection.execute(sa.insert(table).values(**values))
    note(connection, event, table, row_of(table, values), actor=actor, model=model, request=request)


def begin(connection: sa.Connection) -> None:
    """A transaction that is alone begins: nothing is noted yet."""
    connection.info[_NOTED] = (moment_text(now()), [])


def append_noted(connection: sa.Connection) -> None:
    """Append what waits of the time before this transaction, what it has noted, and then its own steps of requests."""
    began, own = connection.info.pop(_NOTED)
    waiting = _pending(connection)
    earlier = [each for at, each in waiting if at < began]
    noted = earlier + own + [each for _, each in waiting[len(earlier) :]]
    if not noted:
        return
    seq, previous = head(connection)
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


def _pending(connection: sa.Connection) -> list[tuple[str, tuple[str, str | None, str | None, str, str]]]:
    """The steps of requests that wait for the chain, each behind its moment, oldest first; they wait no more."""
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
        step = row_of(request_events, row)
        detail = canonical({"table": request_events.name, "row": step, **more})
        noted.append((step["at"], (f"request_{row['new']}", row["model"], row["request_id"], row["actor"], detail)))
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


def head(connection: sa.Connection) -> ChainHead:
    """The last event, number 0 before the first."""
    found = connection.execute(_HEAD).one_or_none()
    return ChainHead(0, GENESIS) if found is None else ChainHead(*found)


def stored(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> Iterator[Sequence[Event]]:
    """The events of which `where` holds, in their order and in batches: rows with the columns of `Event`."""
    columns = [as_text(connection, column) if column is audit_events.c.at else column for column in _IN_ORDER]
    query = sa.select(*columns).where(*where).order_by(audit_events.c.seq)
    return connection.execute(query, execution_options={"yield_per": _BATCH}).partitions()  # type: ignore[return-value]


def as_text(connection: sa.Connection, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """A column as the chain has it: moments as their text, JSON as some text of it, the others as they are."""
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
    batches: Iterable[Sequence[Event]], tell: Callable[[int, str], None], noted: ChainHead | None = None
) -> Iterator[Sequence[Event]]:
    """Pass on events from the first one on, and `tell` the number of each that breaks the chain, and how.

    `noted` is a head that somebody noted earlier: it must still be in the chain.
    """
    due, before = 1, GENESIS
    kept = noted in (None, (0, GENESIS))
    for batch in batches:
        for seq, at, event, model, request, actor, detail, previous, link in batch:
            if seq != due:
                tell(due, f"missing, {seq} comes after {due - 1}")
            elif previous != before:
                tell(seq, f"what it has for the hash before is not that of event {seq - 1}")
            try:
                line = _line(actor, at, detail, event, model, previous, request, seq)
                if hashlib.sha256(line.encode()).hexdigest() != link:
                    tell(seq, "its hash is not that of its content")
            except TypeError:  # bytes in the place of text, as SQLite allows it
                tell(seq, "it is no event")
            due, before = seq + 1, link
        kept = kept or any((event[0], event[8]) == noted for event in batch)
        yield batch
    if noted is not None and not kept:
        tell(noted.seq, "the chain does not have the hash that was noted of it")


_IN_ORDER = [audit_events.c[name] for name in Event._fields]


def _line(
    actor: str, at: str, detail: str, event: str, model: str | None, previous: str, request: str | None, seq: int
) -> str:
    of, asked = "null" if model is None else quoted(model), "null" if request is None else quoted(request)
    return (
        f'{{"actor":{quoted(actor)},"at":{quoted(at)},"detail":{detail},"event":{quoted(event)},"model":{of},'
        f'"previous":{quoted(previous)},"request":{asked},"seq":{seq}}}'
    )


def _plain(kind: type | None, value: Any) -> Any:
    if kind is None or value is None:
        return value
    if kind is dict:
        return json.loads(canonical(value))  # as the ledger will give it back: text for keys, lists for tuples
    return moment_text(value) if kind is datetime else kind(value)
