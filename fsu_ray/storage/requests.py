"""The queue of the ledger: requests from their submission to their end."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from fsu_ray.config import BACKOFF_SECONDS, MOST_FAILURES
from fsu_ray.errors import TransitionRefused, UserError
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, QueueStats, Request, RequestEvent, Status, Terms
from fsu_ray.storage import claims, removals, rows, schema, submissions
from fsu_ray.storage.database import Database
from fsu_ray.storage.policies import OPERATOR, check_actor, fetch_policy
from fsu_ray.storage.schema import LIVE, TERMINAL, erasures, models, request_events, requests

LOOK_SECONDS = 5.0
"""How often a worker that claims looks for requests that nobody is to take over."""


class Requests:
    """The ledger's requests. Every change of state is on record with who made it (`events`)."""

    def __init__(self, database: Database) -> None:
        self._database = database

    _looked_at = -LOOK_SECONDS

    def check_behaviour(self, model: str, behaviour: Behaviour) -> None:
        """Raise what `submit` would raise for this behaviour, if it were new."""
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            submissions.check_targets(behaviour, line)
            submissions.check_line(connection, behaviour, line)

    def check_generator(self, model: str, recipe: Recipe, terms: Terms) -> None:
        """Raise what `submit` would raise for the generator that `terms` name."""
        with self._database.reading() as connection:
            submissions.check_generator(connection, rows.fetch_model(connection, model), recipe, terms)

    def submit(
        self,
        model: str,
        behaviour: Behaviour,
        samples: str,
        sample_count: int,
        recipe: Recipe,
        terms: Terms | None = None,
        *,
        named: bool = True,
    ) -> tuple[Request, bool]:
        """Ask for a behaviour to be erased: the request, and whether it is new.

        `samples` is the digest of the target samples. A submission that repeats another one (the key in
        `terms`, or without one the same behaviour and samples while it lives) gets that request as it is,
        with its own recipe, and False. A new one is queued, or waits for approval where the policy says so.
        `named` says whether somebody asked for this recipe: one that is merely in force now tells no two submissions
        with one key apart.

        Raises NotFound, InvalidBehaviour (targets that cannot be erased), AlreadyErased (the name, or all classes
        of a class behaviour, by an erasure of the latest version's line), AlreadyExists (the key stands for
        something else, or a live request has another generator than the one in `terms`), GeneratorUnfit (that one can
        serve no request of this model), UserError (an approval is needed, and nobody says who asks).
        """
        terms = terms or Terms()
        with self._database.writing(f"behaviour {behaviour.name!r} of {model!r}") as connection:
            line = rows.fetch_model(connection, model)
            submissions.check_targets(behaviour, line)
            terms = submissions.named_generator(connection, terms)
            found = submissions.find_duplicate(connection, line, behaviour, samples, recipe if named else None, terms)
            if found is not None:
                return found, False
            submissions.check_line(connection, behaviour, line)
            submissions.check_generator(connection, line, recipe, terms)
            approval = fetch_policy(connection, line).approval
            if approval and terms.requested_by is None:
                raise UserError(f"requests of {model!r} need an approval: say who asks (--by or FSU_ACTOR)")
            actor = terms.requested_by or OPERATOR
            asked = (behaviour, samples, sample_count, recipe, terms, actor, approval)
            return submissions.insert(connection, line, *asked), True

    def get(self, id_or_prefix: str) -> Request:
        """One request; raises NotFound where the prefix fits none or several."""
        with self._database.reading() as connection:
            return rows.to_request(rows.fetch_by_id(connection, rows.REQUESTS, requests, id_or_prefix))

    def all(self, model: str | None = None, status: Status | None = None) -> list[Request]:
        """Requests in the order of their submission; raises NotFound for a model that is not there."""
        query = rows.REQUESTS.order_by(requests.c.submitted_at, requests.c.id)
        with self._database.reading() as connection:
            if model is not None:
                query = query.where(requests.c.model_id == rows.fetch_model(connection, model).id)
            if status is not None:
                query = query.where(requests.c.status == status)
            return [rows.to_request(row) for row in connection.execute(query).mappings()]

    def events(self, id_or_prefix: str) -> list[RequestEvent]:
        """The steps of one request, oldest first; raises NotFound."""
        with self._database.reading() as connection:
            request = rows.fetch_by_id(connection, rows.REQUESTS, requests, id_or_prefix)["id"]
            of_request = request_events.c.request_id == request
            steps = sa.select(request_events).where(of_request).order_by(request_events.c.number)
            return [_to_event(row) for row in connection.execute(steps).mappings()]

    def claimable(self, model: str | None = None) -> bool:
        """Whether `claim` would find something now; raises NotFound for a model that is not there."""
        with self._database.reading() as connection:
            line = None if model is None else rows.fetch_model(connection, model)
            return claims.claimable(connection, line, rows.now())

    def claim(
        self,
        worker: str,
        lease_seconds: float,
        model: str | None = None,
        *,
        cap: int | None = None,
        max_batch: int = 0,
    ) -> Request | None:
        """Begin the next attempt: of a request whose lease is over, or of the most urgent and then oldest one that is
        ready and whose model has none running. None where there is nothing to do, or where `worker` has `cap`
        runs under way already; raises NotFound for a model that is not there.

        A class request takes `along` up to that many others of its model that can share its run (`companions`).
        A request whose lease has ended too often fails, one that was to be cancelled is. The request that comes
        back is the claim: hand it to `heartbeat`, `commit` and the others.
        """
        if time.monotonic() - self._looked_at >= LOOK_SECONDS:
            self._looked_at = time.monotonic()
            self.end_abandoned(worker)
        request = None
        while request is None:
            try:
                with self._database.autocommit("the queue") as connection:
                    request = claims.claim(connection, model, worker, lease_seconds, rows.now(), cap)
            except TransitionRefused:
                continue  # the index of running requests: another worker was faster
            if request is None:
                if model is not None:
                    with self._database.reading() as connection:
                        rows.fetch_model(connection, model)
                return None
        if request.failures or max_batch:
            self._take_along(request, worker, lease_seconds, max_batch)
        return request

    def end_abandoned(self, actor: str) -> None:
        """End the requests whose lease is over and that nobody is to take over: they were to be cancelled, or have cost
        too many workers. `claim` does so every few seconds; until then others of their models wait for them."""
        with self._database.reading() as connection:
            if claims.abandoned(connection, rows.now()) is None:
                return
        with self._database.writing("the queue") as connection:
            while (request := claims.abandoned(connection, rows.now())) is not None:
                _abandon(connection, request, actor)

    def _take_along(self, request: Request, worker: str, lease_seconds: float, most: int) -> None:
        with self._database.writing(f"request {request.id}") as connection:
            others = claims.batch_members(connection, request)
            if not others and most:
                others = _batch_candidates(connection, request)[:most]
            for other in others:
                claims.join(connection, other, request, worker, lease_seconds, rows.now())

    def batch_members(self, request: Request) -> list[Request]:
        """The other requests that run along with a claimed one, oldest first."""
        with self._database.reading() as connection:
            return claims.batch_members(connection, request)

    def cancel_requested(self, request: Request) -> bool:
        """Whether somebody wants a claimed request, or one that runs along, cancelled."""
        with self._database.reading() as connection:
            own = sa.or_(requests.c.id == request.id, requests.c.lead == request.id)
            wanted = sa.select(requests.c.id).where(own, requests.c.cancel_by.is_not(None))
            return connection.scalar(wanted.where(requests.c.status == Status.RUNNING)) is not None

    def heartbeat(self, request: Request, lease_seconds: float) -> bool:
        """Renew the lease; True where somebody wants the request, or one that runs along, cancelled: stop then.

        Raises LeaseLost where another attempt has begun or the request has ended.
        """
        with self._database.autocommit(f"request {request.id}") as connection:
            return claims.renew(connection, request, rows.now() + timedelta(seconds=lease_seconds))

    def release(self, request: Request, reason: str) -> Request:
        """Put a claimed request, and those that run along, back into the queue; raises LeaseLost."""
        with self._database.writing(f"request {request.id}") as connection:
            return _requeue(connection, request, reason)

    def separate(self, request: Request, reason: str) -> Request:
        """Put a coalesced run's requests back into the queue, each to run alone from now on; raises LeaseLost."""
        with self._database.writing(f"request {request.id}") as connection:
            return _requeue(connection, request, reason, alone=True)

    def retry(self, request: Request, reason: str) -> Request:
        """Put a claimed request whose run broke back into the queue, to be tried again after a while that doubles
        each time; after `config.MOST_FAILURES` failures it ends as failed. Raises LeaseLost.
        """
        failures = request.failures + 1
        if failures >= MOST_FAILURES:
            return self.fail(request, reason)
        with self._database.writing(f"request {request.id}") as connection:
            later = rows.now() + timedelta(seconds=BACKOFF_SECONDS * 2 ** (failures - 1))
            return _requeue(connection, request, reason, failures=failures, retry_at=later)

    def fail(self, request: Request, reason: str) -> Request:
        """End a claimed request whose run broke for good; those that run along are queued again. Raises LeaseLost."""
        with self._database.writing(f"request {request.id}") as connection:
            _free_batch_members(connection, request, reason)
            return claims.step_claimed(
                connection, request, Status.FAILED, str(request.worker), rows.now(),
                reason=reason, failures=request.failures + 1,
            )  # fmt: skip

    def stop(self, request: Request) -> Request:
        """End a claimed request that somebody wants cancelled, and those along that somebody does; the others are
        queued again. Raises LeaseLost.
        """
        with self._database.writing(f"request {request.id}") as connection:
            _free_batch_members(connection, request, "stopped with its run")
            current = claims.fetch(connection, request.id)
            if current.cancel_by is None:
                return _requeue(connection, request, "stopped with its run")
            return claims.step_claimed(
                connection, request, Status.CANCELLED, current.cancel_by, rows.now(), reason="cancelled while running"
            )

    def cancel(self, id_or_prefix: str, actor: str = OPERATOR) -> Request:
        """End a request that waits, at once; ask the worker of one that runs to stop, which its next step does.

        Raises NotFound, TransitionRefused where it has ended.
        """
        check_actor(actor)
        with self._database.writing(f"request {id_or_prefix}") as connection:
            request = rows.to_request(rows.fetch_by_id(connection, rows.REQUESTS, requests, id_or_prefix))
            if request.status.is_terminal:
                raise TransitionRefused(
                    f"request {request.id} is {request.status.value}: only one that has not ended can be cancelled"
                )
            if request.status is not Status.RUNNING:
                return claims.step_waiting(connection, request, Status.CANCELLED, actor, rows.now())
            asked = sa.update(requests).where(requests.c.id == request.id, requests.c.changes == request.changes)
            connection.execute(asked.values(cancel_by=actor))
            return claims.fetch(connection, request.id)

    def approve(self, id_or_prefix: str, actor: str) -> Request:
        """Queue a request that waits for approval.

        Raises NotFound, TransitionRefused where it does not wait, UserError where `actor` asked for it.
        """
        return self._decide(id_or_prefix, actor, Status.QUEUED, None)

    def deny(self, id_or_prefix: str, actor: str) -> Request:
        """End a request that waits for approval as rejected; raises as `approve` does."""
        return self._decide(id_or_prefix, actor, Status.REJECTED, "denied")

    def _decide(self, id_or_prefix: str, actor: str, status: Status, reason: str | None) -> Request:
        check_actor(actor)
        with self._database.writing(f"request {id_or_prefix}") as connection:
            request = rows.to_request(rows.fetch_by_id(connection, rows.REQUESTS, requests, id_or_prefix))
            if request.status is not Status.AWAITING_APPROVAL:
                raise TransitionRefused(f"request {request.id} is {request.status.value}: it awaits no approval")
            if actor == request.requested_by:
                raise UserError(f"{actor} asked for request {request.id}: somebody else must decide")
            return claims.step_waiting(connection, request, status, actor, rows.now(), reason=reason)

    def due_samples(self, model: str | None = None) -> list[Request]:
        """The requests whose target samples their model's policy wants purged now; raises NotFound.

        Samples that another request, which has not ended, needs too are kept for it.
        """
        moment, due = rows.now(), []
        with self._database.reading() as connection:
            named = sa.select(models) if model is None else sa.select(models).where(models.c.name == model)
            lines = [rows.to_model(row) for row in connection.execute(named).mappings()]
            if model is not None and not lines:
                rows.fetch_model(connection, model)
            for line in lines:
                days = fetch_policy(connection, line).samples_days
                if days is None:
                    continue
                other = requests.alias("other")
                needed = sa.exists().where(other.c.samples == requests.c.samples, other.c.status.in_(LIVE))
                purged = sa.exists().where(schema.removals.c.request_id == requests.c.id)
                ended = rows.REQUESTS.where(
                    requests.c.model_id == line.id,
                    requests.c.status.in_(TERMINAL),
                    requests.c.finished_at <= moment - timedelta(days=days),
                    ~needed,
                    ~purged,
                ).order_by(requests.c.submitted_at, requests.c.id)
                due += [rows.to_request(row) for row in connection.execute(ended).mappings()]
        return due

    def purge(self, request: Request, actor: str = OPERATOR) -> list[str]:
        """Record that a request's target samples are purged; the digests to be deleted now.

        Its digest stays, and so do the synthetic probes. Raises TransitionRefused while a request needs them.
        """
        check_actor(actor)
        with self._database.writing(f"request {request.id}") as connection:
            needed = sa.select(requests.c.id).where(requests.c.samples == request.samples, requests.c.status.in_(LIVE))
            other = connection.scalar(needed)
            if other is not None:
                raise TransitionRefused(f"the samples of request {request.id} are needed by {other}")
            return removals.record(connection, {request.samples}, "purged", actor, request.model, request=request.id)

    def oldest_run(self) -> datetime | None:
        """When the oldest of the running requests began, None without one: what came later may be its work."""
        with self._database.reading() as connection:
            query = sa.select(sa.func.min(requests.c.started_at)).where(requests.c.status == Status.RUNNING)
            oldest: datetime | None = connection.execute(query).scalar_one()
            return oldest

    def upcoming(self, model: str | None = None) -> Request | None:
        """The request that `claim` would begin now, as it is; raises NotFound for a model that is not there."""
        with self._database.reading() as connection:
            line = None if model is None else rows.fetch_model(connection, model)
            return claims.upcoming(connection, line, rows.now())

    def expire(self, request: Request) -> bool:
        """End the lease of a running request, as it was read, whose worker is known to be dead: the next claim takes it
        over at once, and counts the failure. False where it has gone on or ended meanwhile.

        A worker that lives after all renews its lease, as long as nobody has taken the request over.
        """
        with self._database.autocommit(f"request {request.id}") as connection:
            return claims.expire(connection, request, rows.now())

    def stats(self) -> QueueStats:
        """How many requests and erasures of each sort there are."""
        states = sa.select(models.c.name, requests.c.status, sa.func.count()).join_from(requests, models)
        uses = sa.select(models.c.name, erasures.c.generator_use, sa.func.count()).join_from(erasures, models)
        with self._database.reading() as connection:
            names = connection.scalars(sa.select(models.c.name)).all()
            stated = connection.execute(states.group_by(models.c.name, requests.c.status)).all()
            used = connection.execute(uses.group_by(models.c.name, erasures.c.generator_use)).all()
            ready = claims.ready(connection, rows.now())
            return QueueStats(
                {(name, state.value): 0 for name in names for state in Status}
                | {(name, str(Status(state).value)): number for name, state, number in stated},
                dict.fromkeys(names, 0) | ready,
                {(name, use): number for name, use, number in used},
            )


def _to_event(row: sa.RowMapping) -> RequestEvent:
    return RequestEvent(
        request=row["request_id"],
        number=row["number"],
        attempt=row["attempt"],
        old=None if row["old"] is None else Status(row["old"]),
        new=Status(row["new"]),
        at=row["at"],
        actor=row["actor"],
        reason=row["reason"],
    )


def _abandon(connection: sa.Connection, seen: Request, worker: str) -> None:
    """End a request whose lease is over for good: it was to be cancelled, or has cost too many workers already."""
    _free_batch_members(connection, seen, "lease_expired")
    failures, moment = seen.failures + 1, rows.now()
    if seen.cancel_by is not None:
        claims.step_waiting(connection, seen, Status.CANCELLED, seen.cancel_by, moment, lease_until=None)
        return
    reason = f"lease_expired: {failures} workers have vanished"
    ended: dict[str, Any] = {"lease_until": None, "failures": failures, "reason": reason}
    claims.step_waiting(connection, seen, Status.FAILED, worker, moment, **ended)


def _batch_candidates(connection: sa.Connection, request: Request) -> list[Request]:
    if request.behaviour.kind != "class" or request.no_coalesce or request.generator is not None:
        return []
    line = rows.fetch_model(connection, request.model)
    gone = {target for each, _ in rows.fetch_gone(connection, line) if each.kind == "class" for target in each.targets}
    return claims.batch_candidates(connection, request, line, gone, rows.now())


def _requeue(connection: sa.Connection, request: Request, reason: str, **values: Any) -> Request:
    """A claimed request back into the queue, and with it those that run along, which are to wait for nothing."""
    _free_batch_members(connection, request, reason, **({"alone": True} if values.get("alone") else {}))
    back = {"worker": None, "lead": None, "reason": reason, **values}
    return claims.step_claimed(connection, request, Status.QUEUED, str(request.worker), rows.now(), **back)


def _free_batch_members(connection: sa.Connection, lead: Request, reason: str, **values: Any) -> None:
    for other in claims.batch_members(connection, lead):
        back: dict[str, Any] = {"worker": None, "lead": None, "lease_until": None, "reason": reason, **values}
        if other.cancel_by is None:
            claims.step_waiting(connection, other, Status.QUEUED, str(lead.worker), rows.now(), **back)
        else:
            claims.step_waiting(connection, other, Status.CANCELLED, other.cancel_by, rows.now(), lease_until=None)
