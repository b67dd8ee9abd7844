"""The queue's guarded updates: each names the state that it expects, and fails loudly when it matches nothing.

Every step counts (`changes`), so a request as it was read stands for its state: a step from it is refused once
anybody else has moved it. A claim is a running request as `claim` gave it, in the hands of its worker. It
stays good until another worker takes the request over, which only an expired lease allows.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.dml import ReturningUpdate

from fsu_ray.config import MOST_FAILURES
from fsu_ray.errors import LeaseLost, TransitionRefused
from fsu_ray.records import TRANSITIONS, Model, Request, Status
from fsu_ray.storage import rows
from fsu_ray.storage.columns import Instant
from fsu_ray.storage.schema import models, requests

Moment = datetime | sa.ColumnElement[datetime]
_PLACE = re.compile(r"[^\s'\"<>()\[\],;=]*[/\\][^\s'\"<>()\[\],;=]*")
_ADDRESS = re.compile(r"[^\s'\"<>]+@[^\s'\"<>]+")
_KEPT = re.compile(r"(?:[0-9a-f]{64}|r-[0-9a-f]{19}(?:-[0-9a-f]{8})?)[.:]?")


def claim(
    connection: sa.Connection,
    model: str | None,
    worker: str,
    lease_seconds: float,
    moment: datetime,
    cap: int | None = None,
) -> Request | None:
    """Begin the next attempt at a request, of the model of that name if given: one UPDATE, which picks it too. None
    where there is nothing to do.

    First one whose lease is over; else, of those that are ready, the most urgent and then the oldest. Ready: queued,
    not before its time, not waiting to be tried again, and no other of its model is running. A take-over counts as a
    failure of the attempt before. Two workers that pick different requests of one model at the same moment meet in
    the index of running requests.
    """
    until = moment + timedelta(seconds=lease_seconds)
    known: dict[str, Any] = {"moment": moment, "until": until, "claimant": worker, "cap": cap, "of": model}
    wanted = {name: value for name, value in known.items() if value is not None}
    row = connection.execute(_claim(model is not None, cap is not None), wanted).mappings().one_or_none()
    return None if row is None else rows.to_request(row)


@cache
def _claim(of_model: bool, capped: bool) -> ReturningUpdate[Any]:
    """The statement of `claim`; building one takes longer than the database takes for it."""
    late = requests.c.status == Status.RUNNING
    moment, until = sa.bindparam("moment", type_=Instant), sa.bindparam("until", type_=Instant)
    worker = sa.bindparam("claimant", type_=sa.String)
    picked = (_pick(wanted, of_model) for wanted in (_expired(moment), _ready(moment)))
    update = (
        sa.update(requests)
        .where(requests.c.id == sa.func.coalesce(*picked))
        .values(
            status=Status.RUNNING,
            attempt=requests.c.attempt + 1,
            worker=worker,
            lease_until=until,
            reason=sa.case((late, "lease_expired")),
            failures=requests.c.failures + sa.case((late, 1), else_=0),
            retry_at=None,
            started_at=sa.func.coalesce(requests.c.started_at, moment),
            changes=requests.c.changes + 1,
            changed_at=moment,
            changed_by=worker,
        )
        .returning(requests, _MODEL)
    )
    return update.where(_held(worker) < sa.bindparam("cap", type_=sa.Integer)) if capped else update


def claimable(connection: sa.Connection, model: Model | None, moment: datetime) -> bool:
    """Whether `claim` or `abandoned` would find something."""
    found = sa.or_(_late(moment), sa.and_(*_ready(moment)))
    query = sa.select(_MINE.id).where(found).limit(1)
    return connection.scalar(query if model is None else query.where(_MINE.model_id == model.id)) is not None


def upcoming(connection: sa.Connection, model: Model | None, moment: datetime) -> Request | None:
    """What `claim` would begin now, of one `model` or of all; nothing is changed."""
    for wanted in (_expired(moment), _ready(moment)):
        query = sa.select(_MINE.id).where(*wanted)
        if model is not None:
            query = query.where(_MINE.model_id == model.id)
        found = connection.scalar(query.order_by(_MINE.priority.desc(), _MINE.submitted_at, _MINE.id).limit(1))
        if found is not None:
            return fetch(connection, found)
    return None


def ready(connection: sa.Connection, moment: datetime) -> dict[str, int]:
    """How many requests of each model could begin now, but for others of it; models without any are not there."""
    ripe = sa.and_(_MINE.status == _QUEUED, *_ripe(moment, _MINE))
    query = sa.select(models.c.name, sa.func.count()).where(models.c.id == _MINE.model_id, sa.or_(_late(moment), ripe))
    return {name: number for name, number in connection.execute(query.group_by(models.c.name))}  # noqa: C416


def expire(connection: sa.Connection, seen: Request, moment: datetime) -> bool:
    """End the lease of a running request, where it and those that run along are as they were seen."""
    own = sa.or_(requests.c.id == seen.id, requests.c.lead == seen.id)
    update = sa.update(requests).where(own, requests.c.status == Status.RUNNING, requests.c.worker == seen.worker)
    unchanged = sa.select(_MINE.id).where(_MINE.id == seen.id, _MINE.changes == seen.changes).exists()
    return connection.execute(update.where(unchanged).values(lease_until=moment)).rowcount > 0


def abandoned(connection: sa.Connection, moment: datetime) -> Request | None:
    """A request whose lease is over and that is not to be taken over: it is to be cancelled, or has cost
    `MOST_FAILURES` workers."""
    late = sa.and_(requests.c.status == _RUNNING, requests.c.lead.is_(None), requests.c.lease_until <= moment)
    over = sa.or_(requests.c.cancel_by.is_not(None), requests.c.failures + 1 >= MOST_FAILURES)
    row = connection.execute(rows.REQUESTS.where(late, over).limit(1)).mappings().one_or_none()
    return None if row is None else rows.to_request(row)


def _late(moment: Moment) -> sa.ColumnElement[bool]:
    return sa.and_(_MINE.status == _RUNNING, _MINE.lead.is_(None), _MINE.lease_until <= moment)


def _expired(moment: Moment) -> tuple[sa.ColumnElement[bool], ...]:
    return (_late(moment), _MINE.cancel_by.is_(None), _MINE.failures + 1 < MOST_FAILURES)


def _ready(moment: Moment) -> tuple[sa.ColumnElement[bool], ...]:
    running = sa.and_(_OTHER.status == _RUNNING, _OTHER.lead.is_(None))
    free = _MINE.model_id.not_in(sa.select(_OTHER.model_id).where(running))
    return (_MINE.status == _QUEUED, *_ripe(moment, _MINE), free)


def _pick(wanted: tuple[sa.ColumnElement[bool], ...], of_model: bool) -> sa.ScalarSelect[str]:
    query = sa.select(_MINE.id).where(*wanted)
    if of_model:
        named = sa.select(models.c.id).where(models.c.name == sa.bindparam("of", type_=sa.String))
        query = query.where(_MINE.model_id == named.scalar_subquery())
    first = query.order_by(_MINE.priority.desc(), _MINE.submitted_at, _MINE.id).limit(1)
    return first.with_for_update(skip_locked=True).scalar_subquery()


# Literals, not parameters: only so does SQLite see that an index over some of the rows will do.
_QUEUED: sa.ColumnElement[str] = sa.literal_column("'queued'")
_RUNNING: sa.ColumnElement[str] = sa.literal_column("'running'")
_MINE, _OTHER = requests.alias("mine").c, requests.alias("other").c
_MODEL = sa.select(models.c.name).where(models.c.id == requests.c.model_id).scalar_subquery().label("model")


def _ripe(moment: Moment, of: Any) -> tuple[sa.ColumnElement[bool], ...]:
    return tuple(sa.or_(column.is_(None), column <= moment) for column in (of.not_before, of.retry_at))


def _held(worker: sa.ColumnElement[str]) -> sa.ScalarSelect[int]:
    """How many runs a worker has under way."""
    mine = (_MINE.worker == worker, _MINE.status == _RUNNING, _MINE.lead.is_(None))
    return sa.select(sa.func.count()).where(*mine).scalar_subquery()


def join(
    connection: sa.Connection, seen: Request, lead: Request, worker: str, lease_seconds: float, moment: datetime
) -> Request | None:
    """Claim a request as part of the run of `lead`; None where it has changed since it was seen."""
    late = seen.status is Status.RUNNING
    return _step(
        connection,
        seen,
        Status.RUNNING,
        worker,
        moment,
        attempt=seen.attempt + 1,
        worker=worker,
        lease_until=moment + timedelta(seconds=lease_seconds),
        reason="lease_expired" if late else None,
        failures=seen.failures + (1 if late else 0),
        retry_at=None,
        lead=lead.id,
        started_at=seen.started_at or moment,
    )


def batch_candidates(
    connection: sa.Connection, lead: Request, line: Model, gone: set[int], moment: datetime
) -> list[Request]:
    """What can run along with a claimed `lead`: ready class requests of its model `line` with its recipe, for others
    than the `gone` classes. At least two classes stay. Oldest first.
    """
    ready = rows.REQUESTS.where(
        requests.c.status == Status.QUEUED,
        requests.c.behaviour_kind == "class",
        requests.c.alone.is_(False),
        requests.c.generator_id.is_(None),
        *_ripe(moment, requests.c),
        requests.c.model_id == line.id,
    ).order_by(requests.c.priority.desc(), requests.c.submitted_at, requests.c.id)
    chosen: list[Request] = []
    names, taken = {lead.behaviour.name}, set(lead.behaviour.targets)
    for row in connection.execute(ready).mappings():
        request = rows.to_request(row)
        targets = set(request.behaviour.targets)
        if request.recipe != lead.recipe or targets & (taken | gone) or request.behaviour.name in names:
            continue
        if line.spec.classes - len(gone | taken | targets) < 2:
            continue
        chosen.append(request)
        names.add(request.behaviour.name)
        taken |= targets
    return chosen


def batch_members(connection: sa.Connection, lead: Request) -> list[Request]:
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
    changed = None
    if request.status is Status.RUNNING:
        changed = _step(connection, request, status, actor, moment, mine=True, lease_until=None, **values)
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
    """A reason as the ledger keeps it: one line, without places and addresses, but with digests and runs."""

    def place(found: re.Match[str]) -> str:
        last = re.split(r"[/\\]", found[0])[-1]
        return last if _KEPT.fullmatch(last) else "<path>:" if last.endswith(":") else "<path>"

    return _ADDRESS.sub("<address>", _PLACE.sub(place, " ".join(reason.split())))[:1000]


def fetch(connection: sa.Connection, request_id: str) -> Request:
    """The request with exactly this id, which is known to be there."""
    return rows.to_request(connection.execute(rows.REQUESTS.where(requests.c.id == request_id)).mappings().one())


def _step(
    connection: sa.Connection,
    request: Request,
    status: Status,
    actor: str,
    moment: datetime,
    *,
    mine: bool = False,
    **values: Any,
) -> Request | None:
    """Move a request from the state in which it was read, and if it is `mine` from its worker; None where it is not so
    any more."""
    if values.get("reason") is not None:
        values["reason"] = without_paths(values["reason"])
    values |= {"status": status, "changes": request.changes + 1, "changed_at": moment, "changed_by": actor}
    was = {"was": request.id, "was_status": request.status, "was_changes": request.changes}
    if mine:
        was["was_worker"] = request.worker
    update = _update(tuple(sorted(values)), mine)
    row = connection.execute(update, {**was, **values}).mappings().one_or_none()
    if row is None:
        return None
    if "report" in values:  # which the database has in JSON's terms
        return fetch(connection, request.id)
    columns = {_FIELD_OF_COLUMN.get(name, name): value for name, value in {**row, **values}.items()}
    return replace(request, **{name: value for name, value in columns.items() if name in _FIELDS})


_FIELDS = frozenset(field.name for field in fields(Request))
_FIELD_OF_COLUMN = {"lead": "batch_leader", "alone": "no_coalesce"}
"""Columns of `requests` whose fields in `records.Request` have other names."""


@cache
def _update(names: tuple[str, ...], mine: bool) -> ReturningUpdate[Any]:
    """The statement of `_step` that sets the columns `names`, and gives what others may have set without a step."""
    update = sa.update(requests).where(
        requests.c.id == sa.bindparam("was"),
        requests.c.status == sa.bindparam("was_status"),
        requests.c.changes == sa.bindparam("was_changes"),
    )
    if mine:
        update = update.where(requests.c.worker == sa.bindparam("was_worker"))
    return update.values({name: sa.bindparam(name, type_=requests.c[name].type) for name in names}).returning(
        requests.c.lease_until, requests.c.cancel_by
    )
