"""The queue's guarded updates: which request a worker may claim, and how a request steps from state to state.

`changes` is an optimistic-lock counter: an update fails if the row has moved since it was read. A claim is a running
request as `claim` returned it to its worker. It stays valid until another worker takes the request over, which only an
expired lease allows.

Several class requests of one model may share a run, a batch: the batch leader (`lead` IS NULL) stands for its members
(`lead` is the leader's id).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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
from fsu_ray.storage.schema import LIVE, models, requests

Moment = datetime | sa.ColumnElement[datetime]

MIN_CLASSES_LEFT = {"class": 2, "subset": 1}
"""How many classes of a model an erasure must leave, by its kind. Two are needed to classify; the samples of a subset
request need one class that they may get."""

_PLACE = re.compile(r"[^\s'\"<>()\[\],;=]*[/\\][^\s'\"<>()\[\],;=]*")
_ADDRESS = re.compile(r"[^\s'\"<>]+@[^\s'\"<>]+")
_KEPT = re.compile(r"(?:[0-9a-f]{64}|r-[0-9a-f]{19}(?:-[0-9a-f]{8})?)[.:]?")  # digests, names of runs


# What may be claimed: conditions on `requests` or on an alias of it.

# Literals, not parameters: only then does SQLite use a partial index.
_QUEUED: sa.ColumnElement[str] = sa.literal_column("'queued'")
_RUNNING: sa.ColumnElement[str] = sa.literal_column("'running'")
_MINE, _OTHER = requests.alias("mine").c, requests.alias("other").c
_MODEL = sa.select(models.c.name).where(models.c.id == requests.c.model_id).scalar_subquery().label("model")


def _waiting(moment: Moment, of: Any) -> tuple[sa.ColumnElement[bool], ...]:
    """Queued, its time has come, and it does not wait to be retried."""
    return of.status == _QUEUED, *(
        sa.or_(column.is_(None), column <= moment) for column in (of.not_before, of.retry_at)
    )


def _ready(moment: Moment) -> tuple[sa.ColumnElement[bool], ...]:
    """Waiting, and no other request of its model runs."""
    running = sa.and_(_OTHER.status == _RUNNING, _OTHER.lead.is_(None))
    return *_waiting(moment, _MINE), _MINE.model_id.not_in(sa.select(_OTHER.model_id).where(running))


def _expired(moment: Moment, of: Any) -> sa.ColumnElement[bool]:
    """Running, and its lease has expired."""
    return sa.and_(of.status == _RUNNING, of.lead.is_(None), of.lease_until <= moment)


def _given_up(of: Any) -> sa.ColumnElement[bool]:
    """Nobody is to take it over: it is to be cancelled, or this would be failure number `MOST_FAILURES`."""
    return sa.or_(of.cancel_by.is_not(None), of.failures + 1 >= MOST_FAILURES)


def _reclaimable(moment: Moment) -> tuple[sa.ColumnElement[bool], ...]:
    return _expired(moment, _MINE), sa.not_(_given_up(_MINE))


def of_run(request: Request) -> sa.ColumnElement[bool]:
    """The condition that a row of `requests` is `request` or another member of the batch that it leads."""
    return sa.or_(requests.c.id == request.id, requests.c.lead == request.id)


def is_live(of: Any = requests.c) -> sa.ColumnElement[bool]:
    """The condition that a request has not ended."""
    condition: sa.ColumnElement[bool] = of.status.in_(LIVE)
    return condition


# Claiming.


def claim(
    connection: sa.Connection,
    model: str | None,
    worker: str,
    lease_seconds: float,
    moment: datetime,
    cap: int | None = None,
) -> Request | None:
    """Begin the next attempt at a request, of the model of that name if given, in one UPDATE that also selects it. None
    where no request can be claimed, or where `worker` has `cap` runs already.

    A request whose lease has expired comes first, then the ready request of the highest priority, then the oldest. A
    take-over counts as a failure of the attempt before. Where two workers select different requests of one model at the
    same moment, the unique index of running requests refuses one of them.
    """
    until = moment + timedelta(seconds=lease_seconds)
    values: dict[str, Any] = {"moment": moment, "until": until, "claimant": worker, "cap": cap, "of": model}
    parameters = {name: value for name, value in values.items() if value is not None}
    row = connection.execute(_claim(model is not None, cap is not None), parameters).mappings().one_or_none()
    return None if row is None else rows.to_request(row)


@cache
def _claim(of_model: bool, capped: bool) -> ReturningUpdate[Any]:
    """The statement of `claim`, cached: building it takes longer than executing it."""
    taken_over = requests.c.status == Status.RUNNING
    moment, until = sa.bindparam("moment", type_=Instant), sa.bindparam("until", type_=Instant)
    worker = sa.bindparam("claimant", type_=sa.String)
    first = (_pick(condition, of_model) for condition in (_reclaimable(moment), _ready(moment)))
    update = (
        sa.update(requests)
        .where(requests.c.id == sa.func.coalesce(*first))
        .values(
            status=Status.RUNNING,
            attempt=requests.c.attempt + 1,
            worker=worker,
            lease_until=until,
            reason=sa.case((taken_over, "lease_expired")),
            failures=requests.c.failures + sa.case((taken_over, 1), else_=0),
            retry_at=None,
            started_at=sa.func.coalesce(requests.c.started_at, moment),
            changes=requests.c.changes + 1,
            changed_at=moment,
            changed_by=worker,
        )
        .returning(requests, _MODEL)
    )
    return update.where(_run_count(worker) < sa.bindparam("cap", type_=sa.Integer)) if capped else update


def _pick(condition: tuple[sa.ColumnElement[bool], ...], of_model: bool) -> sa.ScalarSelect[str]:
    query = sa.select(_MINE.id).where(*condition)
    if of_model:
        named = sa.select(models.c.id).where(models.c.name == sa.bindparam("of", type_=sa.String))
        query = query.where(_MINE.model_id == named.scalar_subquery())
    return _most_urgent(query).with_for_update(skip_locked=True).scalar_subquery()


def _most_urgent(query: sa.Select[Any]) -> sa.Select[Any]:
    return query.order_by(_MINE.priority.desc(), _MINE.submitted_at, _MINE.id).limit(1)


def _run_count(worker: sa.ColumnElement[str]) -> sa.ScalarSelect[int]:
    """How many runs a worker has."""
    running = (_MINE.worker == worker, _MINE.status == _RUNNING, _MINE.lead.is_(None))
    return sa.select(sa.func.count()).where(*running).scalar_subquery()


def claimable(connection: sa.Connection, model: Model | None, moment: datetime) -> bool:
    """Whether `claim` or `abandoned` would return a request."""
    condition = sa.or_(_expired(moment, _MINE), sa.and_(*_ready(moment)))
    query = sa.select(_MINE.id).where(condition).limit(1)
    return connection.scalar(query if model is None else query.where(_MINE.model_id == model.id)) is not None


def upcoming(connection: sa.Connection, model: Model | None, moment: datetime) -> Request | None:
    """The request that `claim` would return now, of one `model` or of all; nothing is changed."""
    for condition in (_reclaimable(moment), _ready(moment)):
        query = sa.select(_MINE.id).where(*condition)
        if model is not None:
            query = query.where(_MINE.model_id == model.id)
        request_id = connection.scalar(_most_urgent(query))
        if request_id is not None:
            return fetch(connection, request_id)
    return None


def ready(connection: sa.Connection, moment: datetime) -> dict[str, int]:
    """By model, how many requests could begin now if no other of the model ran; models without any are left out."""
    condition = sa.or_(_expired(moment, _MINE), sa.and_(*_waiting(moment, _MINE)))
    query = sa.select(models.c.name, sa.func.count()).where(models.c.id == _MINE.model_id, condition)
    return {name: number for name, number in connection.execute(query.group_by(models.c.name))}  # noqa: C416


def abandoned(connection: sa.Connection, moment: datetime) -> Request | None:
    """A request whose lease has expired and that nobody is to take over: it is to be cancelled, or this would be its
    failure number `MOST_FAILURES`."""
    query = rows.REQUESTS.where(_expired(moment, requests.c), _given_up(requests.c)).limit(1)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else rows.to_request(row)


def check_idle(connection: sa.Connection, model: Model, generator: str | None = None) -> None:
    """Raise TransitionRefused while a request of a model runs, or one that asks for the generator of that id."""
    using = requests.c.model_id == model.id
    if generator is not None:
        using = sa.or_(using, requests.c.generator_id == generator)
    query = rows.REQUESTS.where(using, requests.c.status == Status.RUNNING).limit(1)
    for row in connection.execute(query).mappings():
        raise TransitionRefused(f"request {row['id']} of {row['model']!r} is running; try again when it has ended")


# Batches.


def classes_left(model: Model, erased: Iterable[int], targets: Iterable[int]) -> int:
    """How many classes of a model are neither erased nor targets."""
    return model.spec.classes - len({*erased, *targets})


def batch_candidates(
    connection: sa.Connection, leader: Request, model: Model, erased: set[int], moment: datetime
) -> list[Request]:
    """The requests that can join the run of a claimed `leader`, the most urgent first and then the oldest: ready class
    requests of its `model` with its recipe, for classes other than the `erased` ones. `MIN_CLASSES_LEFT` holds.
    """
    ready = rows.REQUESTS.where(
        *_waiting(moment, requests.c),
        requests.c.behaviour_kind == "class",
        requests.c.alone.is_(False),
        requests.c.generator_id.is_(None),
        requests.c.model_id == model.id,
    ).order_by(requests.c.priority.desc(), *rows.REQUEST_ORDER)
    chosen: list[Request] = []
    names, taken = {leader.behaviour.name}, erased | set(leader.behaviour.targets)
    for row in connection.execute(ready).mappings():
        request = rows.to_request(row)
        targets = set(request.behaviour.targets)
        if request.recipe != leader.recipe or targets & taken or request.behaviour.name in names:
            continue
        if classes_left(model, taken, targets) < MIN_CLASSES_LEFT["class"]:
            continue
        chosen.append(request)
        names.add(request.behaviour.name)
        taken |= targets
    return chosen


def batch_members(connection: sa.Connection, leader: Request) -> list[Request]:
    """The other requests of the batch that `leader` leads, in the order of their submission."""
    query = rows.REQUESTS.where(requests.c.lead == leader.id, requests.c.status == Status.RUNNING)
    return [rows.to_request(row) for row in connection.execute(query.order_by(*rows.REQUEST_ORDER)).mappings()]


def join(
    connection: sa.Connection, seen: Request, leader: Request, worker: str, lease_seconds: float, moment: datetime
) -> Request | None:
    """Claim a request as a member of the batch of `leader`; None where it has changed since it was read."""
    taken_over = seen.status is Status.RUNNING
    return _step(
        connection,
        seen,
        Status.RUNNING,
        worker,
        moment,
        attempt=seen.attempt + 1,
        worker=worker,
        lease_until=moment + timedelta(seconds=lease_seconds),
        reason="lease_expired" if taken_over else None,
        failures=seen.failures + (1 if taken_over else 0),
        retry_at=None,
        lead=leader.id,
        started_at=seen.started_at or moment,
    )


# Leases.


def renew(connection: sa.Connection, request: Request, until: datetime) -> bool:
    """Renew the lease of a claimed request and of its batch members; whether one of them is to be cancelled.

    Raises LeaseLost.
    """
    update = (
        sa.update(requests)
        .where(of_run(request), requests.c.status == Status.RUNNING, requests.c.worker == request.worker)
        .values(lease_until=until)
        .returning(requests.c.id, requests.c.cancel_by, requests.c.changes)
    )
    renewed = connection.execute(update).all()
    if not any(row.id == request.id and row.changes == request.changes for row in renewed):
        raise lost(request)
    return any(row.cancel_by is not None for row in renewed)


def expire(connection: sa.Connection, seen: Request, moment: datetime) -> bool:
    """End the lease of a running request and of its batch members, if the request has not changed since it was read."""
    running = (requests.c.status == Status.RUNNING, requests.c.worker == seen.worker)
    unchanged = sa.select(_MINE.id).where(_MINE.id == seen.id, _MINE.changes == seen.changes).exists()
    update = sa.update(requests).where(of_run(seen), *running, unchanged)
    return connection.execute(update.values(lease_until=moment)).rowcount > 0


def lost(request: Request) -> LeaseLost:
    """The error for a worker whose claim has ended."""
    return LeaseLost(
        f"request {request.id} is no longer attempt {request.attempt} of {request.worker}: nothing was written; "
        f"`fsu request show {request.id}` says who has it"
    )


# Steps between states.


def step_claimed(
    connection: sa.Connection, request: Request, status: Status, actor: str, moment: datetime, **values: Any
) -> Request:
    """Move a request that this worker still holds; its `worker` stays on record. Raises LeaseLost."""
    changed = None
    if request.status is Status.RUNNING:
        changed = _step(connection, request, status, actor, moment, claimed=True, lease_until=None, **values)
    if changed is None:
        raise lost(request)
    return changed


def step_waiting(
    connection: sa.Connection, request: Request, status: Status, actor: str, moment: datetime, **values: Any
) -> Request:
    """Move a request that no worker holds; raises TransitionRefused where it has moved since it was read."""
    if status not in TRANSITIONS[request.status]:
        raise TransitionRefused(f"request {request.id} is {request.status.value}: it cannot become {status.value}")
    changed = _step(connection, request, status, actor, moment, **values)
    if changed is None:
        raise TransitionRefused(f"request {request.id} has changed meanwhile; look at it and try again")
    return changed


def without_paths(reason: str) -> str:
    """A reason as the ledger keeps it: one line without paths and e-mail addresses, but with digests and run names."""

    def shorten(path: re.Match[str]) -> str:
        last = re.split(r"[/\\]", path[0])[-1]
        return last if _KEPT.fullmatch(last) else "<path>:" if last.endswith(":") else "<path>"

    return _ADDRESS.sub("<address>", _PLACE.sub(shorten, " ".join(reason.split())))[:1000]


def fetch(connection: sa.Connection, request_id: str) -> Request:
    """The request with exactly this id, which must exist."""
    return rows.to_request(connection.execute(rows.REQUESTS.where(requests.c.id == request_id)).mappings().one())


def _step(
    connection: sa.Connection,
    request: Request,
    status: Status,
    actor: str,
    moment: datetime,
    *,
    claimed: bool = False,
    **values: Any,
) -> Request | None:
    """Move a request from the state in which it was read; None where it has moved since. With `claimed`, its worker
    must be the same too."""
    if values.get("reason") is not None:
        values["reason"] = without_paths(values["reason"])
    if status.is_terminal:
        values["finished_at"] = moment
    values |= {"status": status, "changes": request.changes + 1, "changed_at": moment, "changed_by": actor}
    was = {"was": request.id, "was_status": request.status, "was_changes": request.changes}
    if claimed:
        was["was_worker"] = request.worker
    update = _update(tuple(sorted(values)), claimed)
    row = connection.execute(update, {**was, **values}).mappings().one_or_none()
    if row is None:
        return None
    if "report" in values:  # the record has the report as JSON gives it back
        return fetch(connection, request.id)
    columns = {_FIELD_OF_COLUMN.get(name, name): value for name, value in {**row, **values}.items()}
    return replace(request, **{name: value for name, value in columns.items() if name in _FIELDS})


_FIELDS = frozenset(field.name for field in fields(Request))
_FIELD_OF_COLUMN = {"lead": "batch_leader", "alone": "no_coalesce"}
"""Columns of `requests` whose fields in `records.Request` have other names."""


@cache
def _update(names: tuple[str, ...], claimed: bool) -> ReturningUpdate[Any]:
    """The statement of `_step` that sets the columns `names` and returns the columns that may change without a step."""
    update = sa.update(requests).where(
        requests.c.id == sa.bindparam("was"),
        requests.c.status == sa.bindparam("was_status"),
        requests.c.changes == sa.bindparam("was_changes"),
    )
    if claimed:
        update = update.where(requests.c.worker == sa.bindparam("was_worker"))
    return update.values({name: sa.bindparam(name, type_=requests.c[name].type) for name in names}).returning(
        requests.c.lease_until, requests.c.cancel_by
    )
