"""The queue's guarded updates: each names the state that it expects, and fails loudly when it matches nothing.

A claim is the pair (worker, attempt) on a running request. It stays good until another worker takes the
request over, which only an expired lease allows.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from fsu_ray.errors import LeaseLost, TransitionRefused
from fsu_ray.records import TRANSITIONS, Model, Request, Status
from fsu_ray.storage import rows
from fsu_ray.storage.schema import requests


def next_claimable(connection: sa.Connection, model: Model | None, moment: datetime) -> sa.RowMapping | None:
    """The request to claim: the oldest that is queued with none running of its model, or whose lease is over."""
    other = requests.alias("other")
    busy = sa.exists().where(other.c.model_id == requests.c.model_id, other.c.status == Status.RUNNING)
    query = (
        sa.select(requests.c.id, requests.c.status, requests.c.attempt)
        .where(
            sa.or_(
                sa.and_(requests.c.status == Status.QUEUED, ~busy),
                sa.and_(requests.c.status == Status.RUNNING, requests.c.lease_until <= moment),
            )
        )
        .order_by(requests.c.submitted_at, requests.c.id)
        .limit(1)
    )
    if model is not None:
        query = query.where(requests.c.model_id == model.id)
    return connection.execute(query).mappings().one_or_none()


def take(
    connection: sa.Connection, seen: sa.RowMapping, worker: str, lease_seconds: float, moment: datetime
) -> Request | None:
    """Claim the request as `next_claimable` saw it; None where it has changed since."""
    update = (
        sa.update(requests)
        .where(
            requests.c.id == seen["id"],
            requests.c.status == seen["status"],
            requests.c.attempt == seen["attempt"],
            # A heartbeat may have saved the lease since it was seen.
            sa.or_(requests.c.lease_until.is_(None), requests.c.lease_until <= moment),
        )
        .values(
            status=Status.RUNNING,
            attempt=requests.c.attempt + 1,
            worker=worker,
            lease_until=moment + timedelta(seconds=lease_seconds),
            reason=None,
            started_at=sa.func.coalesce(requests.c.started_at, sa.bindparam("now", moment, requests.c.started_at.type)),
        )
    )
    if connection.execute(update).rowcount != 1:
        return None
    return fetch(connection, seen["id"])


def change_claimed(connection: sa.Connection, request: Request, **values: Any) -> Request:
    """Change a request that this worker still holds; raises LeaseLost where it does not."""
    update = (
        sa.update(requests)
        .where(
            requests.c.id == request.id,
            requests.c.status == Status.RUNNING,
            requests.c.worker == request.worker,
            requests.c.attempt == request.attempt,
        )
        .values(**values)
    )
    if connection.execute(update).rowcount != 1:
        raise LeaseLost(
            f"request {request.id} is no longer attempt {request.attempt} of {request.worker}: nothing was written; "
            f"`fsu request show {request.id}` says who has it"
        )
    return fetch(connection, request.id)


def end_claimed(
    connection: sa.Connection, request: Request, status: Status, moment: datetime, **values: Any
) -> Request:
    """End a request that this worker still holds; raises LeaseLost where it does not. Who ran it stays on record."""
    return change_claimed(connection, request, status=status, lease_until=None, finished_at=moment, **values)


def cancel(connection: sa.Connection, request: Request, moment: datetime) -> Request:
    """End a request that waits; raises TransitionRefused where it runs or has ended."""
    waiting = [status for status in Status if Status.CANCELLED in TRANSITIONS[status] and status is not Status.RUNNING]
    update = (
        sa.update(requests)
        .where(requests.c.id == request.id, requests.c.status.in_(waiting))
        .values(status=Status.CANCELLED, finished_at=moment)
    )
    if connection.execute(update).rowcount != 1:
        raise TransitionRefused(
            f"request {request.id} is {request.status.value}: only a request that waits can be cancelled"
        )
    return fetch(connection, request.id)


def fetch(connection: sa.Connection, request_id: str) -> Request:
    """The request with exactly this id, which is known to be there."""
    return rows.to_request(connection.execute(rows.REQUESTS.where(requests.c.id == request_id)).mappings().one())
