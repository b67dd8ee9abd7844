"""The queue's guarded updates: each names the state that it expects, and fails loudly when it matches nothing.

Every step counts (`changes`), so a request as it was read stands for its state: a step from it is refused once
anybody else has moved it. A claim is a running request as `take` gave it, in the hands of its worker. It
stays good until another worker takes the request over, which only an expired lease allows.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from fsu_ray.errors import LeaseLost, TransitionRefused
from fsu_ray.records import TRANSITIONS, Model, Request, Status
from fsu_ray.storage import chain, rows
from fsu_ray.storage.schema import request_events, requests

_PATH = re.compile(r"(?:(?<=^)|(?<=[\s'\"(:=]))(?:[\w.-]*/)+[\w.-]*/([\w.-]+)")


def next_claimable(connection: sa.Connection, model: Model | None, moment: datetime) -> Request | None:
    """The request to claim: one whose lease is over, or of those that are ready, the most urgent and then the oldest.

    Ready: queued, not before its time, not waiting to be tried again, and no other of its model is running.
    """
    other = requests.alias("other")
    busy = sa.exists().where(other.c.model_id == requests.c.model_id, other.c.status == Status.RUNNING)
    expired = rows.REQUESTS.where(requests.c.status == Status.RUNNING, requests.c.lease_until <= moment)
    ready = rows.REQUESTS.where(requests.c.status == Status.QUEUED, *_ripe(moment), ~busy)
    order = (requests.c.priority.desc(), requests.c.submitted_at, requests.c.id)
    for query in (expired.where(requests.c.lead.is_(None)), ready):
        if model is not None:
            query = query.where(requests.c.model_id == model.id)
        row = connection.execute(query.order_by(*order).limit(1)).mappings().one_or_none()
        if row is not None:
            return rows.to_request(row)
    return None


def _ripe(moment: datetime) -> tuple[sa.ColumnElement[bool], ...]:
    return tuple(sa.or_(c.is_(None), c <= moment) for c in (requests.c.not_before, requests.c.retry_at))


def held(connection: sa.Connection, worker: str) -> int:
    """How many runs a worker has under way."""
    mine = sa.and_(requests.c.worker == worker, requests.c.status == Status.RUNNING, requests.c.lead.is_(None))
    return connection.execute(sa.select(sa.func.count()).where(mine)).scalar_one()


def take(
    connection: sa.Connection,
    seen: Request,
    worker: str,
    lease_seconds: float,
    moment: datetime,
    lead: str | None = None,
) -> Request | None:
    """Claim the request as `next_claimable` saw it, as part of the run of `lead` if given; None where it has changed
    since. A take-over from a worker that let its lease expire counts as a failure of the attempt before.
    """
    late = seen.status is Status.RUNNING
    # A heartbeat may have saved the lease since it was seen.
    free = sa.or_(requests.c.lease_until.is_(None), requests.c.lease_until <= moment)
    return _step(
        connection,
        seen,
        Status.RUNNING,
        worker,
        moment,
        *(() if lead else (free,)),
        attempt=seen.attempt + 1,
        worker=worker,
        lease_until=moment + timedelta(seconds=lease_seconds),
        reason="lease_expired" if late else None,
        failures=seen.failures + (1 if late else 0),
        retry_at=None,
        lead=lead,
        started_at=seen.started_at or moment,
    )


def companions(connection: sa.Connection, lead: Request, gone: set[int], moment: datetime) -> list[Request]:
    """What can run along with a claimed `lead`: ready class requests of its model with its recipe, for other classes.

    `gone` are the classes that are erased already; at least two classes stay. Oldest first.
    """
    ready = rows.REQUESTS.where(
        requests.c.status == Status.QUEUED,
        requests.c.behaviour_kind == "class",
        requests.c.alone.is_(False),
        *_ripe(moment),
        models_id_of(lead),
    ).order_by(requests.c.priority.desc(), requests.c.submitted_at, requests.c.id)
    chosen: list[Request] = []
    names, taken = {lead.behaviour.name}, set(lead.behaviour.targets)
    classes = None
    for row in connection.execute(ready).mappings():
        request = rows.to_request(row)
        targets = set(request.behaviour.targets)
        if request.recipe != lead.recipe or targets & (taken | gone) or request.behaviour.name in names:
            continue
        if classes is None:
            classes = rows.fetch_model(connection, lead.model).spec.classes
        if classes - len(gone | taken | targets) < 2:
            continue
        chosen.append(request)
        names.add(request.behaviour.name)
        taken |= targets
    return chosen


def models_id_of(request: Request) -> sa.ColumnElement[bool]:
    """The condition that a row of requests is of the same model as `request`."""
    own = requests.alias("own")
    return requests.c.model_id == sa.select(own.c.model_id).where(own.c.id == request.id).scalar_subquery()


def followers(connection: sa.Connection, lead: Request) -> list[Request]:
    """The other requests of the run that `lead` leads, in the order of their submission."""
    query = rows.REQUESTS.where(requests.c.lead == lead.id, requests.c.status == Status.RUNNING)
    ordered = query.order_by(requests.c.submitted_at, requests.c.id)
    return [rows.to_request(row) for row in connection.execute(ordered).mappings()]


def renew(connection: sa.Connection, request: Request, until: datetime) -> bool:
    """Renew the lease of a claimed request and of those that run along; whether somebody wants one of them cancelled.

    Raises LeaseLost.
    """
    own = sa.or_(requests.c.id == request.id, requests.c.lead == request.id)
    update = (
        sa.update(requests)
        .where(own, requests.c.status == Status.RUNNING, requests.c.worker == request.worker)
        .values(lease_until=until)
        .returning(requests.c.id, requests.c.cancel_by, requests.c.changes)
    )
    found = connection.execute(update).all()
    if not any(row.id == request.id and row.changes == request.changes for row in found):
        raise lost(request)
    return any(row.cancel_by is not None for row in found)


def step_claimed(
    connection: sa.Connection, request: Request, status: Status, actor: str, moment: datetime, **values: Any
) -> Request:
    """Move a request that this worker still holds; raises LeaseLost where it does not. Who ran it stays on record."""
    if status.is_terminal:
        values["finished_at"] = moment
    mine = requests.c.worker == request.worker
    changed = None
    if request.status is Status.RUNNING:
        changed = _step(connection, request, status, actor, moment, mine, lease_until=None, **values)
    if changed is None:
        raise lost(request)
    return changed


def lost(request: Request) -> LeaseLost:
    """What a worker is told whose claim has ended."""
    return LeaseLost(
        f"request {request.id} is no longer attempt {request.attempt} of {request.worker}: nothing was written; "
        f"`fsu request show {request.id}` says who has it"
    )


def step_waiting(
    connection: sa.Connection, request: Request, status: Status, actor: str, moment: datetime, **values: Any
) -> Request:
    """Move a request that nobody holds; raises TransitionRefused where it has been moved since it was read."""
    if status not in TRANSITIONS[request.status]:
        raise TransitionRefused(f"request {request.id} is {request.status.value}: it cannot become {status.value}")
    if status.is_terminal:
        values["finished_at"] = moment
    changed = _step(connection, request, status, actor, moment, **values)
    if changed is None:
        raise TransitionRefused(f"request {request.id} has changed meanwhile; look at it and try again")
    return changed


def without_paths(reason: str) -> str:
    """A reason as the ledger keeps it: one line, and of a path only its last part."""
    return _PATH.sub(r"\1", " ".join(reason.split()))[:1000]


def fetch(connection: sa.Connection, request_id: str) -> Request:
    """The request with exactly this id, which is known to be there."""
    return rows.to_request(connection.execute(rows.REQUESTS.where(requests.c.id == request_id)).mappings().one())


def note_step(connection: sa.Connection, row: sa.RowMapping, old: Status | None, model: str) -> None:
    """Note the event that the trigger has written for a step, for the audit chain."""
    values = {
        "request_id": row["id"],
        "number": row["changes"],
        "attempt": row["attempt"],
        "old": None if old is None else old.value,
        "new": row["status"],
        "at": row["changed_at"],
        "actor": row["changed_by"],
        "reason": row["reason"],
    }
    more = {} if row["report"] is None else {"report": chain.digest_of(row["report"])}
    event = chain.row_of(request_events, values)
    chain.note(
        connection,
        f"request_{row['status']}",
        request_events,
        event,
        actor=row["changed_by"],
        model=model,
        request=row["id"],
        **more,
    )


def _step(
    connection: sa.Connection,
    request: Request,
    status: Status,
    actor: str,
    moment: datetime,
    *guards: sa.ColumnElement[bool],
    **values: Any,
) -> Request | None:
    """Move a request from the state in which it was read, if `guards` hold; None where it is not so any more."""
    if values.get("reason") is not None:
        values["reason"] = without_paths(values["reason"])
    update = (
        sa.update(requests)
        .where(
            requests.c.id == request.id,
            requests.c.status == request.status,
            requests.c.changes == request.changes,
            *guards,
        )
        .values(status=status, changes=request.changes + 1, changed_at=moment, changed_by=actor, **values)
        .returning(requests)
    )
    row = connection.execute(update).mappings().one_or_none()
    if row is None:
        return None
    note_step(connection, row, request.status, request.model)
    return rows.to_request({**row, "model": request.model})
