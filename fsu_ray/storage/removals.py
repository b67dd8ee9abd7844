"""Which artifacts the ledger needs, and which it has recorded as removed."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from fsu_ray.records import Digest
from fsu_ray.storage import chain, rows
from fsu_ray.storage.schema import erasures, generators, model_versions, removals, requests, seals

IS_PURGED = sa.exists().where(removals.c.request_id == requests.c.id)
"""The condition that a request's target samples are recorded as removed."""


def references(connection: sa.Connection) -> tuple[set[Digest], set[Digest]]:
    """The digests that the ledger needs, and those that it refers to but has recorded as removed.

    A digest that a row names after its removal is needed again.
    """
    last_named: dict[Digest, datetime] = {}
    for columns, at in (
        ((model_versions.c.weights,), model_versions.c.created_at),
        ((generators.c.weights, generators.c.dataset), generators.c.created_at),
        ((erasures.c.mask, erasures.c.probes), erasures.c.created_at),
        ((requests.c.samples,), requests.c.submitted_at),
        ((seals.c.dataset,), seals.c.created_at),
    ):
        for column in columns:
            for digest, newest in connection.execute(sa.select(column, sa.func.max(at)).group_by(column)):
                last_named[digest] = max(last_named.get(digest, newest), newest)
    newest_removals = sa.select(removals.c.digest, sa.func.max(removals.c.created_at)).group_by(removals.c.digest)
    last_removed = {row[0]: row[1] for row in connection.execute(newest_removals)}
    removed = {digest for digest, at in last_named.items() if digest in last_removed and last_removed[digest] >= at}
    return set(last_named) - removed, removed


def record(
    connection: sa.Connection,
    digests: Iterable[Digest],
    reason: str,
    actor: str,
    model: str | None,
    *,
    request: str | None = None,
    generator: str | None = None,
) -> list[Digest]:
    """Record that artifacts are removed; their digests, sorted, for the caller to delete from the store afterwards."""
    removed = sorted(set(digests))
    for digest in removed:
        values: dict[str, Any] = {"id": rows.new_id("x"), "digest": digest, "reason": reason}
        values |= {"request_id": request, "generator_id": generator}
        chain.insert(connection, "removed", removals, values, actor=actor, model=model, request=request)
    return removed
