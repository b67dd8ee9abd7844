"""The audit: whether the ledger's rows match the audit chain, and the artifacts match the ledger.

`verify` reads one snapshot and changes nothing. It recomputes the chain, compares every row of every audited table with
the event that recorded it, every request with its last step, and every artifact with its digest.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import sqlalchemy as sa

from fsu_ray.errors import AuditFailed, StorageError
from fsu_ray.records import Digest
from fsu_ray.storage import chain, removals, rows, schema, triggers
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.chain import ChainHead, Event
from fsu_ray.storage.database import Database
from fsu_ray.storage.schema import LATER, TERMINAL, audit_events, audit_pending, erasures, request_events, requests

MAX_FINDINGS = 100
"""How many findings are reported; the others are only counted."""

AUDITED = {
    table.name: table
    for table in (
        *(table for table in triggers.HISTORY if table is not audit_events),
        requests,
        schema.schedule_windows,
    )
}
"""The tables of which every row has an event, by name."""

_BATCH = 2000  # rows read at once
_CHAIN, _RECORDED, _UNRECORDED, _REQUESTS, _ARTIFACTS = range(5)  # ranks of findings, in the order of their report


class Findings:
    """The findings of an audit: their number, and the first of them by rank and place."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[tuple[int, int, str]] = []

    def add(self, rank: int, place: int, text: str) -> None:
        """Add a finding: its rank, its place within the rank, its text."""
        self.count += 1
        self._kept.append((rank, place, text))
        if len(self._kept) > 10 * MAX_FINDINGS:
            self._kept = self._sorted[:MAX_FINDINGS]

    def chain(self, seq: int, text: str) -> None:
        """Add a finding about an event of the chain."""
        self.add(_CHAIN, seq, f"{audit_events.name} {seq}: {text}")

    @property
    def first(self) -> tuple[str, ...]:
        """The texts of the first `MAX_FINDINGS` findings."""
        return tuple(text for _, _, text in self._sorted[:MAX_FINDINGS])

    @property
    def _sorted(self) -> list[tuple[int, int, str]]:
        return sorted(self._kept, key=itemgetter(0, 1))


@dataclass(frozen=True)
class Verdict:
    """The result of an audit: the number of `events`, their `head`, how many steps of requests are `waiting` for the
    chain, how many `artifacts` were checked (None: artifacts were not audited), how many findings there are (`found`),
    and the first of them."""

    events: int
    head: ChainHead
    waiting: int
    artifacts: int | None
    found: int
    findings: tuple[str, ...]
    seconds: float

    def check(self) -> None:
        """Raise AuditFailed with the first finding, if there is one."""
        if self.found:
            more = f" (and {self.found - 1} more)" if self.found > 1 else ""
            raise AuditFailed(f"{self.findings[0]}{more}")


class Audit:
    """The audit of a ledger."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def verify(self, artifacts: Artifacts | None = None, noted: ChainHead | None = None) -> Verdict:
        """Audit the ledger, and `artifacts` if given. `noted` is a head from earlier that must still be in the
        chain."""
        started, findings = time.perf_counter(), Findings()
        with self._database.reading() as connection:
            recorded, count, head = _Recorded(findings), 0, ChainHead(0, chain.GENESIS)
            for batch in chain.unbroken(chain.stored(connection), findings.chain, noted):
                for event in batch:
                    recorded.take(event)
                count, head = count + len(batch), ChainHead(batch[-1][0], batch[-1][8])
            waiting = {f"{row[0]} {row[1]}" for row in connection.execute(sa.select(audit_pending))}
            for table in AUDITED.values():
                _compare(connection, table, recorded, waiting if table is request_events else set(), findings)
            _check_requests(connection, recorded.reports, findings)
        artifact_count = None if artifacts is None else _check_artifacts(self._database, artifacts, findings)
        seconds = time.perf_counter() - started
        return Verdict(count, head, len(waiting), artifact_count, findings.count, findings.first, seconds)

    def head(self) -> ChainHead:
        """The head of the chain after everything until now was appended: what an auditor notes elsewhere."""
        with self.snapshot() as connection:
            return chain.head(connection)

    def log(self, model: str | None = None, request: str | None = None, last: int | None = None) -> list[Event]:
        """The `last` events, oldest first, None for all; only those of a model, or of the request whose id begins with
        `request`.

        Raises NotFound.
        """
        where = []
        with self._database.reading() as connection:
            if model is not None:
                where.append(audit_events.c.model == rows.fetch_model(connection, model).name)
            if request is not None:
                where.append(audit_events.c.request == rows.fetch_request(connection, request).id)
        with self.snapshot() as connection:
            if last is not None:
                newest = sa.select(audit_events.c.seq).where(*where).order_by(audit_events.c.seq.desc()).limit(last)
                where.append(audit_events.c.seq.in_(newest.scalar_subquery()))
            return [Event(*row) for batch in chain.stored(connection, *where) for row in batch]

    @contextmanager
    def snapshot(self) -> Iterator[sa.Connection]:
        """A snapshot of the database whose chain contains everything until now."""
        self._database.flush()
        with self._database.reading() as connection:
            yield connection


def count_of(connection: sa.Connection, model: str) -> int:
    """How many events a model has; raises NotFound for an unknown model."""
    rows.fetch_model(connection, model)
    query = sa.select(sa.func.count()).select_from(audit_events).where(audit_events.c.model == model)
    return int(connection.scalar(query) or 0)


class _Entry(NamedTuple):
    """A row as an event recorded it: the number of the event, the columns, the digest of their values."""

    seq: int
    columns: tuple[str, ...]
    digest: bytes


class _Recorded:
    """The rows that the chain recorded, by table and key, and the digest of each request's report."""

    def __init__(self, findings: Findings) -> None:
        self.rows: dict[str, dict[str, _Entry]] = {name: {} for name in AUDITED}
        self.columns: dict[str, set[str]] = {name: set() for name in AUDITED}
        self.reports: dict[str, tuple[int, str | None]] = {}
        self._findings = findings
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}

    def take(self, event: Sequence[Any]) -> None:
        """Add the row that an event recorded."""
        seq, name = event[0], event[2]
        try:
            detail = json.loads(event[6])
            table, row = detail["table"], detail["row"]
            key = _key(AUDITED[table], row)
            columns = tuple(row)
            entry = _Entry(seq, self._known.setdefault(columns, columns), _digest(row))
        except (ValueError, KeyError, TypeError):
            self._findings.chain(seq, "its detail names no row of the ledger")
            return
        before = self.rows[table].setdefault(key, entry)
        if before is not entry:
            self._findings.add(_RECORDED, seq, f"{table} {key}: event {seq} records it again, after {before.seq}")
        self.columns[table].update(columns)
        # A migration adopted the rows from before the chain; such an event may have no digest of a report.
        if table == request_events.name and row.get("new") in TERMINAL and (name != "adopted" or "report" in detail):
            self.reports[row["request_id"]] = (seq, detail.get("report"))


def _key(table: sa.Table, row: Mapping[str, Any]) -> str:
    return " ".join(str(row[column.name]) for column in table.primary_key)


def _digest(row: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(chain.canonical(row).encode(), digest_size=16).digest()


def _compare(
    connection: sa.Connection, table: sa.Table, recorded: _Recorded, waiting: set[str], findings: Findings
) -> None:
    """Compare the rows of a table with their events, in the columns that were recorded; the rows in `waiting` have no
    event yet."""
    known = recorded.rows[table.name]
    columns = recorded.columns[table.name].union(LATER.get(table.name, ()))
    for number, row in enumerate(_rows(connection, table, columns)):
        key = _key(table, row)
        entry = known.pop(key, None)
        if entry is None:
            if key not in waiting:
                findings.add(_UNRECORDED, number, f"{table.name} {key}: no event has recorded it")
        elif key in waiting:
            findings.add(_RECORDED, entry.seq, f"{table.name} {key}: waits for the chain, and is in event {entry.seq}")
        elif not _same(table, row, entry):
            where = "" if findings.count > MAX_FINDINGS else _difference(connection, table, row, entry.seq)
            findings.add(
                _RECORDED, entry.seq, f"{table.name} {key}: {where or 'it'} is not what event {entry.seq} recorded"
            )
    for key, entry in known.items():
        findings.add(_RECORDED, entry.seq, f"{table.name} {key}: missing, event {entry.seq} has recorded it")


def _rows(connection: sa.Connection, table: sa.Table, names: set[str]) -> Iterator[dict[str, Any]]:
    """The rows of a table in their key columns and the columns `names`, values as `chain.as_text` gives them."""
    chosen = [column for column in table.c if column.primary_key or column.name in names]
    query = sa.select(*(chain.as_text(connection, column) for column in chosen))
    keys = [column.name for column in chosen]
    for batch in connection.execute(query, execution_options={"yield_per": _BATCH}).partitions():
        for values in batch:
            yield dict(zip(keys, values, strict=True))


def _same(table: sa.Table, row: Mapping[str, Any], entry: _Entry) -> bool:
    kinds = chain.kinds(table)
    if any(row[name] is not None for name in LATER.get(table.name, ()) if name not in entry.columns):
        return False
    try:
        return _digest({name: _value(kinds[name], row[name]) for name in entry.columns}) == entry.digest
    except (ValueError, KeyError, TypeError):  # invalid JSON, unknown column, or bytes in the place of text
        return False


def _value(kind: type | None, value: Any) -> Any:
    """A value that `chain.as_text` read, as the chain has it."""
    if value is None:
        return None
    return json.loads(value) if kind is dict else bool(value) if kind is bool else value


def _difference(connection: sa.Connection, table: sa.Table, row: Mapping[str, Any], seq: int) -> str:
    """The first column of a row that differs from its event; empty where the event does not show one."""
    detail = connection.scalar(sa.select(audit_events.c.detail).where(audit_events.c.seq == seq))
    recorded: dict[str, Any] = json.loads(str(detail))["row"]
    for name, value in recorded.items():
        try:
            if chain.canonical(_value(chain.kinds(table)[name], row[name])) == chain.canonical(value):
                continue
        except (ValueError, KeyError, TypeError):
            pass
        return f"column {name}"
    later = (name for name in LATER.get(table.name, ()) if name not in recorded and row[name] is not None)
    return next((f"column {name}" for name in later), "")


def _check_requests(connection: sa.Connection, reports: dict[str, tuple[int, str | None]], findings: Findings) -> None:
    """Compare the changing columns of each request with its last step, its erasure, and the digest of its report."""
    last, newer = request_events.alias("last"), request_events.alias("newer")
    newest = sa.select(sa.func.max(newer.c.number)).where(newer.c.request_id == requests.c.id).scalar_subquery()
    ended = sa.case((requests.c.status.in_(TERMINAL), chain.as_text(connection, last.c.at)))
    pairs = {
        "status": (requests.c.status, last.c.new),
        "changes": (requests.c.changes, last.c.number),
        "attempt": (requests.c.attempt, last.c.attempt),
        # An adopted step has "adopted" as its reason.
        "reason": (requests.c.reason, sa.case((last.c.reason == "adopted", requests.c.reason), else_=last.c.reason)),
        "finished_at": (chain.as_text(connection, requests.c.finished_at), ended),
        "version": (requests.c.version, erasures.c.version),
    }
    joined = requests.outerjoin(last, sa.and_(last.c.request_id == requests.c.id, last.c.number == newest))
    joined = joined.outerjoin(erasures, erasures.c.request_id == requests.c.id)
    report = chain.as_text(connection, requests.c.report)
    columns = [column.label(f"c{i}") for i, column in enumerate(column for pair in pairs.values() for column in pair)]
    query = sa.select(requests.c.id, report, *columns).select_from(joined)
    number = 0
    for batch in connection.execute(query, execution_options={"yield_per": _BATCH}).partitions():
        for request, report_text, *values in batch:
            number += 1
            for name, column, expected in zip(pairs, values[::2], values[1::2], strict=True):
                if column != expected:
                    other = "its erasure" if name == "version" else "its last step"
                    findings.add(_REQUESTS, number, f"requests {request}: column {name} is not that of {other}")
                    break
            seq, digest = reports.get(request, (0, None))
            if seq and _report_digest(report_text) != digest:
                findings.add(_REQUESTS, number, f"requests {request}: column report is not what event {seq} recorded")


def _report_digest(text: str | None) -> str | None:
    try:
        return None if text is None else chain.digest_of(json.loads(text))
    except (ValueError, TypeError):
        return "no JSON"


def _check_artifacts(database: Database, artifacts: Artifacts, findings: Findings) -> int:
    """Check the artifacts that the ledger needs, and that removed ones are deleted; how many it needs."""
    with database.reading() as connection:
        needed, removed = removals.references(connection)
    wrong = {digest: fault for digest in needed if (fault := _fault(artifacts, digest)) is not None}
    undeleted = removed & artifacts.digests().keys()
    if wrong or undeleted:  # artifacts may have been removed, or needed again, since the ledger was read
        with database.reading() as connection:
            needed_now, removed_now = removals.references(connection)
        wrong = {digest: fault for digest, fault in wrong.items() if digest in needed_now}
        undeleted = {digest for digest in undeleted & removed_now if artifacts.has(digest)}
    wrong |= dict.fromkeys(undeleted, "is on record as removed, and still there")
    for number, digest in enumerate(sorted(wrong)):
        findings.add(_ARTIFACTS, number, f"artifact {digest}: {wrong[digest]}")
    return len(needed)


def _fault(artifacts: Artifacts, digest: Digest) -> str | None:
    """What is wrong with an artifact, None if nothing is."""
    try:
        if not artifacts.has(digest):
            return "missing"
        artifacts.get(digest)
    except StorageError as error:
        return "its content is not that of its name" if error.__cause__ is None else "cannot be read"
    return None
