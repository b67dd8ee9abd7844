"""Audit events that `verify` recomputes in a second, of the chain alone.

    python -m tests.bench.audit_rate [--events 200000] [--url URL]

Makes an audit chain in a new ledger: a temporary SQLite file, or the empty database or schema at URL, which is left
filled.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from fsu_ray.storage import chain
from fsu_ray.storage.columns import moment_text
from fsu_ray.storage.ledger import Ledger, open_ledger
from fsu_ray.storage.schema import audit_events

BATCH = 10_000  # rows a statement


def fill(ledger: Ledger, events: int) -> None:
    """Append `events` request steps to an empty chain, without the rows that they describe."""
    started, previous = datetime.now(UTC), chain.GENESIS
    for first in range(1, events + 1, BATCH):
        links = []
        for seq in range(first, min(first + BATCH, events + 1)):
            at, request = started + timedelta(milliseconds=seq), f"r-{seq:019x}"
            step = {"request_id": request, "number": 2, "attempt": 0, "old": "submitted", "new": "queued"}
            row = {**step, "at": moment_text(at), "actor": "operator", "reason": None}
            detail = chain.canonical({"row": row, "table": "request_events"})
            columns = (seq, moment_text(at), "request_queued", "benchmark", request, "operator", detail, previous)
            event = chain.Event(*columns, hash="")
            event = event._replace(hash=chain.hash_of(event))
            links.append({**event._asdict(), "at": at})
            previous = event.hash
        with ledger.database.writing("the benchmark") as connection:
            connection.execute(sa.insert(audit_events), links)


def verify(url: str, events: int) -> None:
    """Fill the ledger at `url` and print how many events a second are recomputed."""
    with open_ledger(url) as ledger:
        fill(ledger, events)
        started, count, broken = time.perf_counter(), 0, 0

        def on_progress(_seq: int, _what: str) -> None:
            nonlocal broken
            broken += 1

        with ledger.database.reading() as connection:
            for batch in chain.unbroken(chain.stored(connection), on_progress):
                count += len(batch)
            engine = connection.dialect.name
        seconds = time.perf_counter() - started
    print(f"{engine}: {count} events in {seconds:.2f} s, {count / seconds:.0f} a second, {broken} of them broken")


def main() -> None:
    """Print the rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--url", help="an empty database or schema; it is left filled")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        verify(options.url or f"sqlite:///{folder}/ledger.db", options.events)


if __name__ == "__main__":
    main()
