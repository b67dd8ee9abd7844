"""Every table of history is insert-only in the database itself: tested with SQL past the ledger."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from fsu_ray.storage import triggers
from fsu_ray.storage.columns import metadata
from fsu_ray.storage.ledger import Ledger
from tests.storage.test_audit import fill


def test_no_table_of_history_takes_an_update_a_delete_or_a_replacement(ledger: Ledger, raw: Any) -> None:
    """UPDATE, DELETE, TRUNCATE, INSERT OR REPLACE, ON CONFLICT DO UPDATE, each on a table with rows."""
    fill(ledger)
    ledger.database.flush()
    for name in (table.name for table in triggers.HISTORY):
        before = raw.execute(f"SELECT count(*) FROM {name}").scalar()
        assert before, f"no rows in {name}: the test would show nothing"
        key = metadata.tables[name].primary_key.columns.keys()
        attempts = [f"UPDATE {name} SET {key[0]} = {key[0]}", f"DELETE FROM {name}"]
        if raw.engine == "sqlite":
            attempts.append(f"INSERT OR REPLACE INTO {name} SELECT * FROM {name} LIMIT 1")
        else:
            again = f"ON CONFLICT ({', '.join(key)}) DO UPDATE SET {key[0]} = EXCLUDED.{key[0]}"
            attempts += [f"INSERT INTO {name} SELECT * FROM {name} LIMIT 1 {again}", f"TRUNCATE {name} CASCADE"]
        for attempt in attempts:
            with pytest.raises(sa.exc.IntegrityError, match=r"is insert-only|are never deleted"):
                raw.execute(attempt)
        assert raw.execute(f"SELECT count(*) FROM {name}").scalar() == before


def test_every_table_is_history_or_is_known_to_change() -> None:
    """A new table must be added to one of the two."""
    assert set(metadata.tables) == {
        *(table.name for table in triggers.HISTORY),
        "requests",
        "schedule_windows",
        "audit_pending",
    }
