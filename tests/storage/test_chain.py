"""The audit chain: what it hashes, that it cannot be changed or forked, and how breaks are reported."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from fsu_ray.config import Timings
from fsu_ray.errors import LedgerUnavailable, UserError
from fsu_ray.storage import chain
from fsu_ray.storage.chain import GENESIS, ChainHead, Event
from fsu_ray.storage.schema import erasures, rechecks, removals


def events_of(ledger: Any) -> list[Event]:
    with ledger.database.reading() as connection:
        return [Event(*row) for batch in chain.stored(connection) for row in batch]


def make_chain(count: int) -> list[Event]:
    """A chain that is stored in no ledger."""
    events, previous = [], GENESIS
    for seq in range(1, count + 1):
        at = f"2026-01-01T00:00:{seq:02}.000000+00:00"
        said = (seq, at, "removed", "digits", None, "operator", f'{{"row":{{"id":"x-{seq}"}},"table":"removals"}}')
        event = Event(*said, previous, "")
        events.append(event._replace(hash=chain.hash_of(event)))
        previous = events[-1].hash
    return events


def breaks(events: list[Event], noted: ChainHead | None = None) -> list[tuple[int, str]]:
    """The breaks that `unbroken` reports: event numbers and texts."""
    broken: list[tuple[int, str]] = []
    batches = [events[first : first + 3] for first in range(0, len(events), 3)]
    assert [e for batch in chain.unbroken(batches, lambda *what: broken.append(what), noted) for e in batch] == events
    return broken


def test_a_hash_is_that_of_plain_json(driver: Any) -> None:
    """Anybody can recompute it: sorted keys, no spaces, the SHA-256 of the text."""
    driver.erase()
    previous = GENESIS
    for event in events_of(driver.ledger):
        content = event._asdict()
        assert content.pop("previous") == previous
        previous = content.pop("hash")
        content |= {"detail": json.loads(event.detail), "previous": event.previous}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == previous


def test_values_that_json_lacks_are_recorded_as_the_row_returns_them(driver: Any) -> None:
    """NaN, numbers as keys, tuples, integers in a float column: row and event agree."""
    driver.erase(report={"kl": float("nan"), "by": {10: (1, 2), 9: float("-inf")}}, metrics={2: 0.5, 10: None})

    assert driver.ledger.audit.verify().findings == ()
    (event,) = [event for event in events_of(driver.ledger) if event.event == "erased"]
    assert json.loads(event.detail)["row"]["report"]["by"] == {"10": [1, 2], "9": None}
    assert event.detail == json.dumps(json.loads(event.detail), sort_keys=True, separators=(",", ":"))
    assert chain.row_of(rechecks, {"share": 1, "passed": 1}, ("share", "passed")) == {"share": 1.0, "passed": True}
    assert type(chain.row_of(rechecks, {"share": 1}, ("share",))["share"]) is float
    assert chain.row_of(erasures, {"report": None}, ("report",)) == {"report": None}


def test_a_whole_chain_has_no_breaks() -> None:
    assert breaks(make_chain(10)) == []
    assert breaks([]) == []
    assert breaks(make_chain(10), ChainHead(7, make_chain(10)[6].hash)) == []


@pytest.mark.parametrize("field", Event._fields)
def test_a_change_of_any_field_is_reported(field: str) -> None:
    events = make_chain(10)
    changed = {"seq": 40, "request": "r-1", "previous": GENESIS, "hash": "1" * 64}.get(field, "other")
    events[4] = events[4]._replace(**{field: changed})

    broken = breaks(events)
    assert broken[0][0] == 5
    assert len(broken) == (3 if field == "seq" else 2 if field in ("previous", "hash") else 1)


def test_the_borders_between_fields_are_part_of_the_hash() -> None:
    """Text that moves from one field into the next is reported, although the joined text is the same."""
    events = make_chain(3)
    first = events[0]._replace(event='a","model":"b', model="c")
    other = events[0]._replace(event="a", model='b","model":"c')
    assert chain.hash_of(first) != chain.hash_of(other)
    assert json.loads(first.line)["event"] == first.event
    detail = '{"row":{}},"event":"x'
    assert chain.hash_of(events[0]._replace(detail=detail, event="y")) != chain.hash_of(
        events[0]._replace(detail='{"row":{}}', event='x,"event":"y')
    )


def test_bytes_in_the_place_of_text_are_reported() -> None:
    events: Any = make_chain(3)
    events[1] = events[1]._replace(actor=b"operator")
    assert breaks(events) == [(2, "it is no event")]


def test_a_head_is_written_as_it_is_read() -> None:
    head = ChainHead(17, "ab" * 32)
    assert ChainHead.parse(str(head)) == head
    for wrong in ("17", f"17:{'ab' * 31}", f"-1:{'ab' * 32}", f"{'9' * 30}:{'ab' * 32}", f"17:{'AB' * 32}\n", ""):
        with pytest.raises(UserError, match="give SEQ:HASH"):
            ChainHead.parse(wrong)


def test_events_take_no_update_delete_or_replace(driver: Any, raw: Any) -> None:
    """On any connection: the database itself refuses."""
    before = raw.execute("SELECT * FROM audit_events").fetchall()
    attempts = ["UPDATE audit_events SET actor = 'x' WHERE seq = 1", "UPDATE audit_events SET seq = 99 WHERE seq = 1"]
    attempts += ["DELETE FROM audit_events", "DELETE FROM audit_events WHERE seq = 2"]
    columns = "seq, at, event, model, request, actor, detail, previous, hash"
    if raw.engine == "sqlite":
        for own in ("seq", "previous", "hash"):
            others = {"seq": "99", "previous": "'x'", "hash": "'y'", "actor": "'z'"}
            values = ", ".join(name if name == own else others.get(name, name) for name in columns.split(", "))
            attempts.append(f"INSERT OR REPLACE INTO audit_events SELECT {values} FROM audit_events WHERE seq = 1")
            attempts.append(
                f"INSERT INTO audit_events SELECT {values} FROM audit_events WHERE seq = 1 "
                f"ON CONFLICT ({own}) DO UPDATE SET actor = 'x'"
            )
    else:
        attempts += ["TRUNCATE audit_events", "TRUNCATE audit_events CASCADE"]
        attempts += [
            f"INSERT INTO audit_events SELECT * FROM audit_events ON CONFLICT ({own}) DO UPDATE SET actor = 'x'"
            for own in ("seq", "previous", "hash")
        ]
    for attempt in attempts:
        with pytest.raises(sa.exc.IntegrityError, match="audit_events is insert-only"):
            raw.execute(attempt)
    assert raw.execute("SELECT * FROM audit_events").fetchall() == before


def test_what_is_rolled_back_leaves_no_event(driver: Any) -> None:
    before = events_of(driver.ledger)
    with pytest.raises(ZeroDivisionError), driver.ledger.database.writing("nothing") as connection:  # noqa: PT012
        chain.note(connection, "erased", erasures, {"id": "e-0"}, actor="operator")
        raise ZeroDivisionError
    assert events_of(driver.ledger) == before
    driver.submit()
    assert driver.ledger.audit.verify().findings == ()


def test_the_last_events_enter_the_chain_when_the_ledger_is_closed(url: str, driver: Any) -> None:
    """Steps of requests wait for the next writing transaction; closing makes one."""
    from fsu_ray.storage.ledger import open_ledger

    with open_ledger(url, Timings(flush=3600.0)) as other:
        driver.submit()
        assert other.requests.claim("w9", 60.0) is not None
        assert driver.ledger.audit.verify().waiting == 1
    assert driver.ledger.audit.verify().waiting == 0
    assert events_of(driver.ledger)[-1].event == "request_running"


WRITER = """
import hashlib
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, ModelSpec
url, number = sys.argv[1:]
spec = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)
with open_ledger(url) as ledger:
    name = f"model-{number}"
    ledger.models.register(name, spec, hashlib.sha256(b"w").hexdigest())
    for turn in range(5):
        behaviour = Behaviour(name=f"b{turn}", kind="class", targets=(turn,))
        ledger.requests.submit(name, behaviour, hashlib.sha256(b"s").hexdigest(), 8, Recipe())
        claimed = ledger.requests.claim(f"host:{number}", 60.0)
        if claimed is not None:
            ledger.requests.release(claimed, "stopped")
        ledger.models.move_alias(name, "production", 1)
"""


def test_eight_processes_that_write_make_one_chain(url: str, ledger: Any, in_processes: Any) -> None:
    in_processes(WRITER, url, processes=8)

    verdict = ledger.audit.verify()
    assert (verdict.findings, verdict.waiting) == ((), 0)
    events = events_of(ledger)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert len(events) >= 8 * (2 + 5 * 4)
    assert {event.model for event in events} == {f"model-{number}" for number in range(8)}


@pytest.mark.parametrize("timings", [Timings(flush=0.0)])
def test_a_claim_survives_a_failed_flush(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker gets its claim, which is in the ledger, although appending it to the chain failed."""
    driver.submit()

    flushed = []

    def unavailable() -> None:
        flushed.append(True)
        raise LedgerUnavailable("the server closed the connection")

    monkeypatch.setattr(driver.ledger.database, "flush", unavailable)
    assert driver.claim().attempt == 1
    assert flushed


def test_a_missing_event_is_told_with_its_neighbours() -> None:
    events = make_chain(5)
    assert breaks(events[:2] + events[3:]) == [(3, "missing, 4 comes after 2")]


def test_a_head_that_the_chain_never_had_is_breaks() -> None:
    wrong = [(7, "the chain does not have the hash that was noted of it")]
    assert breaks(make_chain(10), ChainHead(7, "0" * 64)) == wrong


def test_an_event_names_the_model_the_request_and_who_acted(driver: Any) -> None:
    """The row that it records has the actor and the moment, where its table has these columns."""
    version = driver.erase()
    (erased,) = (event for event in events_of(driver.ledger) if event.event == "erased")
    assert (erased.model, erased.request) == ("digits", version.request)
    driver.ledger.models.move_alias("digits", "production", 2, "u-17")
    moved = events_of(driver.ledger)[-1]
    assert (moved.event, moved.model, moved.request, moved.actor) == ("alias_moved", "digits", None, "u-17")
    row = json.loads(moved.detail)["row"]
    move = driver.ledger.models.aliases("digits")["production"]
    assert (row["actor"], row["created_at"]) == ("u-17", move.created_at.isoformat(timespec="microseconds"))


def test_an_actor_and_a_moment_are_filled_in(driver: Any) -> None:
    """A caller need not repeat them in the row."""
    with driver.ledger.database.writing("nothing", "u-18") as connection:
        values = {"id": "x-1", "digest": "d" * 64, "reason": "unreferenced"}
        chain.insert(connection, "removed", removals, values, actor="u-18")
    row = json.loads(events_of(driver.ledger)[-1].detail)["row"]
    assert row["actor"] == "u-18"
    assert row["created_at"] is not None


def test_postgresql_gives_json_as_text() -> None:
    connection: Any = SimpleNamespace(dialect=postgresql.dialect())
    report = chain.as_text(connection, erasures.c.report)
    assert str(report.compile(dialect=connection.dialect)) == "CAST(erasures.report AS TEXT)"
