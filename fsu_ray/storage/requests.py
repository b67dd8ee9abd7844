"""The ledger's requests: the queue from a request's submission to its end."""

from __future__ import annotations

import hashlib
import time
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from fsu_ray.config import MOST_FAILURES, Timings
from fsu_ray.errors import AlreadyErased, AlreadyExists, InvalidBehaviour, TransitionRefused, UserError
from fsu_ray.recipes import Recipe
from fsu_ray.records import (
    OPERATOR,
    Behaviour,
    Digest,
    Generator,
    Model,
    QueueStats,
    Request,
    RequestEvent,
    Status,
    Terms,
)
from fsu_ray.storage import chain, claims, recipes, removals, rows
from fsu_ray.storage.database import Database
from fsu_ray.storage.planning import check_compatible
from fsu_ray.storage.schema import TERMINAL, TERMS, erasures, models, request_events, requests


class Requests:
    """The ledger's requests. Every step between states is on record with its actor (`events`)."""

    def __init__(self, database: Database, timings: Timings) -> None:
        self._database, self._timings = database, timings
        self._abandoned_at = -timings.abandoned  # when `claim` last looked for abandoned requests

    # Submitting.

    def check_behaviour(self, model: str, behaviour: Behaviour) -> None:
        """Raise what `submit` would raise for this behaviour, if the request were new."""
        with self._database.reading() as connection:
            record = rows.fetch_model(connection, model)
            _check_targets(behaviour, record)
            _check_not_erased(connection, behaviour, record)

    def check_generator(self, model: str, recipe: Recipe, terms: Terms) -> None:
        """Raise what `submit` would raise for the generator in `terms`."""
        if terms.generator is None:
            return
        with self._database.reading() as connection:
            generator = rows.fetch_generator(connection, terms.generator)
            _check_generator(connection, rows.fetch_model(connection, model), recipe, generator)

    def submit(
        self,
        model: str,
        behaviour: Behaviour,
        samples: Digest,
        sample_count: int,
        recipe: Recipe,
        terms: Terms | None = None,
        *,
        named: bool = True,
    ) -> tuple[Request, bool]:
        """Submit a request to erase a behaviour; the request, and whether it is new.

        `samples` is the digest of the target samples. A submission that repeats another returns that request as it is,
        with its own recipe, and False. Submissions are the same that have the same key in `terms`; without a key, those
        with the same behaviour and samples, until the request ends. A new request is queued, or waits for approval
        where the policy says so. `named` says whether the requester chose `recipe`: with False, a submission with
        another recipe can still repeat an earlier one.

        Raises NotFound, InvalidBehaviour (the targets cannot be erased), AlreadyErased (the name, or all classes of a
        class behaviour, as of the latest version), AlreadyExists (the key belongs to another request, or a live request
        has another generator than the one in `terms`), GeneratorUnfit (the generator in `terms` cannot serve this
        model), UserError (an approval is needed, and `terms` do not say who requests).
        """
        terms = terms or Terms()
        with self._database.writing(f"behaviour {behaviour.name!r} of {model!r}") as connection:
            record = rows.fetch_model(connection, model)
            _check_targets(behaviour, record)
            generator = None if terms.generator is None else rows.fetch_generator(connection, terms.generator)
            if generator is not None:  # `terms` may give a prefix of the id
                terms = terms.model_copy(update={"generator": generator.id})
            duplicate = _find_duplicate(connection, record, behaviour, samples, recipe if named else None, terms)
            if duplicate is not None:
                return duplicate, False
            _check_not_erased(connection, behaviour, record)
            if generator is not None:
                _check_generator(connection, record, recipe, generator)
            approval = rows.fetch_policy(connection, record).approval
            if approval and terms.requested_by is None:
                raise UserError(f"requests of {model!r} need an approval: say who asks (--by or FSU_ACTOR)")
            request, actor = _insert(connection, record, behaviour, samples, sample_count, recipe, terms)
            status = Status.AWAITING_APPROVAL if approval else Status.QUEUED
            return claims.step_waiting(connection, request, status, actor, request.submitted_at), True

    def approve(self, id_or_prefix: str, actor: str) -> Request:
        """Queue a request that waits for approval.

        Raises NotFound, TransitionRefused where it does not wait for one, UserError where `actor` submitted it.
        """
        return self._decide(id_or_prefix, actor, Status.QUEUED, None)

    def deny(self, id_or_prefix: str, actor: str) -> Request:
        """End a request that waits for approval as rejected; raises as `approve` does."""
        return self._decide(id_or_prefix, actor, Status.REJECTED, "denied")

    def _decide(self, id_or_prefix: str, actor: str, status: Status, reason: str | None) -> Request:
        with self._database.writing(f"request {id_or_prefix}", actor) as connection:
            request = rows.fetch_request(connection, id_or_prefix)
            if request.status is not Status.AWAITING_APPROVAL:
                raise TransitionRefused(f"request {request.id} is {request.status.value}: it awaits no approval")
            if actor == request.requested_by:
                raise UserError(f"{actor} asked for request {request.id}: somebody else must decide")
            return claims.step_waiting(connection, request, status, actor, rows.now(), reason=reason)

    # Reading.

    def get(self, id_or_prefix: str) -> Request:
        """One request; raises NotFound where the prefix fits none or several."""
        with self._database.reading() as connection:
            return rows.fetch_request(connection, id_or_prefix)

    def all(self, model: str | None = None, status: Status | None = None) -> list[Request]:
        """Requests in the order of their submission; raises NotFound for an unknown model."""
        with self._database.reading() as connection:
            query = rows.of_model(connection, rows.REQUESTS.order_by(*rows.REQUEST_ORDER), requests, model)
            if status is not None:
                query = query.where(requests.c.status == status)
            return [rows.to_request(row) for row in connection.execute(query).mappings()]

    def events(self, id_or_prefix: str) -> list[RequestEvent]:
        """The steps of one request, oldest first; raises NotFound."""
        with self._database.reading() as connection:
            of_request = request_events.c.request_id == rows.fetch_request(connection, id_or_prefix).id
            steps = sa.select(request_events).where(of_request).order_by(request_events.c.number)
            return [_to_event(row) for row in connection.execute(steps).mappings()]

    def claimable(self, model: str | None = None) -> bool:
        """Whether `claim` would return or end a request now; raises NotFound for an unknown model."""
        with self._database.reading() as connection:
            record = None if model is None else rows.fetch_model(connection, model)
            return claims.claimable(connection, record, rows.now())

    def upcoming(self, model: str | None = None) -> Request | None:
        """The request that `claim` would return now, unchanged; raises NotFound for an unknown model."""
        with self._database.reading() as connection:
            record = None if model is None else rows.fetch_model(connection, model)
            return claims.upcoming(connection, record, rows.now())

    def oldest_run(self) -> datetime | None:
        """When the oldest running request began, None where none runs. Later artifacts may belong to a run."""
        with self._database.reading() as connection:
            query = sa.select(sa.func.min(requests.c.started_at)).where(requests.c.status == Status.RUNNING)
            oldest: datetime | None = connection.execute(query).scalar_one()
            return oldest

    def stats(self) -> QueueStats:
        """Counts of requests, of requests that could begin now, and of erasures."""
        states = sa.select(models.c.name, requests.c.status, sa.func.count()).join_from(requests, models)
        uses = sa.select(models.c.name, erasures.c.generator_use, sa.func.count()).join_from(erasures, models)
        with self._database.reading() as connection:
            names = connection.scalars(sa.select(models.c.name)).all()
            by_state = connection.execute(states.group_by(models.c.name, requests.c.status)).all()
            by_use = connection.execute(uses.group_by(models.c.name, erasures.c.generator_use)).all()
            ready = claims.ready(connection, rows.now())
            return QueueStats(
                {(name, state.value): 0 for name in names for state in Status}
                | {(name, str(Status(state).value)): number for name, state, number in by_state},
                dict.fromkeys(names, 0) | ready,
                {(name, use): number for name, use, number in by_use},
            )

    # Claiming.

    def claim(
        self,
        worker: str,
        lease_seconds: float,
        model: str | None = None,
        *,
        cap: int | None = None,
        max_batch: int = 0,
    ) -> Request | None:
        """Begin the next attempt: at a request whose lease has expired, else at the ready request of the highest
        priority, the oldest first. Ready: queued, its time has come, and no other request of its model runs. None where
        there is no such request or `worker` has `cap` runs already; raises NotFound for an unknown model.

        A class request takes up to `max_batch` others of its model that can share its run (`claims.batch_candidates`).
        A request whose lease has expired too often ends as failed, and one that is to be cancelled ends as cancelled.
        The returned request is the claim: pass it to `heartbeat`, `commit` and the others.
        """
        if time.monotonic() - self._abandoned_at >= self._timings.abandoned:
            self._abandoned_at = time.monotonic()
            self.end_abandoned(worker)
        request = None
        while request is None:
            try:
                with self._database.autocommit("the queue") as connection:
                    request = claims.claim(connection, model, worker, lease_seconds, rows.now(), cap)
            except TransitionRefused:
                continue  # the unique index of running requests: another worker was faster
            if request is None:
                if model is not None:
                    with self._database.reading() as connection:
                        rows.fetch_model(connection, model)
                return None
        if request.failures or max_batch:
            self._claim_batch(request, worker, lease_seconds, max_batch)
        return request

    def _claim_batch(self, leader: Request, worker: str, lease_seconds: float, max_batch: int) -> None:
        """Claim the members of a batch that was taken over, else up to `max_batch` candidates."""
        with self._database.writing(f"request {leader.id}") as connection:
            members = claims.batch_members(connection, leader)
            if not members and max_batch:
                members = _batch_candidates(connection, leader)[:max_batch]
            for member in members:
                claims.join(connection, member, leader, worker, lease_seconds, rows.now())

    def end_abandoned(self, actor: str) -> None:
        """End the requests whose lease has expired and that nobody is to take over: they are to be cancelled, or
        `MOST_FAILURES` attempts have failed. Until then other requests of their models wait.

        `claim` does this once in `Timings.abandoned` seconds.
        """
        with self._database.reading() as connection:
            if claims.abandoned(connection, rows.now()) is None:
                return
        with self._database.writing("the queue") as connection:
            while (request := claims.abandoned(connection, rows.now())) is not None:
                _end_abandoned(connection, request, actor)

    def batch_members(self, request: Request) -> list[Request]:
        """The other requests of a claimed request's batch, oldest first."""
        with self._database.reading() as connection:
            return claims.batch_members(connection, request)

    def cancel_requested(self, request: Request) -> bool:
        """Whether a claimed request or a member of its batch is to be cancelled."""
        with self._database.reading() as connection:
            cancelled = sa.select(requests.c.id).where(claims.of_run(request), requests.c.cancel_by.is_not(None))
            return connection.scalar(cancelled.where(requests.c.status == Status.RUNNING)) is not None

    def heartbeat(self, request: Request, lease_seconds: float) -> bool:
        """Renew the lease; True where the request or a member of its batch is to be cancelled: stop then.

        Raises LeaseLost where another attempt has begun or the request has ended.
        """
        with self._database.autocommit(f"request {request.id}") as connection:
            return claims.renew(connection, request, rows.now() + timedelta(seconds=lease_seconds))

    def expire(self, request: Request) -> bool:
        """End the lease of a running request whose worker is known to be dead: the next claim takes it over at once and
        counts the failure. False where the request has changed since it was read.

        A worker that is alive after all renews its lease, as long as nobody has taken the request over.
        """
        with self._database.autocommit(f"request {request.id}") as connection:
            return claims.expire(connection, request, rows.now())

    # Ending an attempt.

    def release(self, request: Request, reason: str) -> Request:
        """Put a claimed request and its batch back into the queue; raises LeaseLost."""
        with self._database.writing(f"request {request.id}") as connection:
            return _requeue(connection, request, reason)

    def separate(self, request: Request, reason: str) -> Request:
        """Put the requests of a batch back into the queue, each to run alone from now on; raises LeaseLost."""
        with self._database.writing(f"request {request.id}") as connection:
            return _requeue(connection, request, reason, alone=True)

    def retry(self, request: Request, reason: str) -> Request:
        """Put a claimed request whose run failed back into the queue, or end it as failed after `MOST_FAILURES`
        failures.

        It is retried after `Timings.backoff` seconds, doubled at each further failure. Raises LeaseLost.
        """
        failures = request.failures + 1
        if failures >= MOST_FAILURES:
            return self.fail(request, reason)
        with self._database.writing(f"request {request.id}") as connection:
            retry_at = rows.now() + timedelta(seconds=self._timings.backoff * 2 ** (failures - 1))
            return _requeue(connection, request, reason, failures=failures, retry_at=retry_at)

    def fail(self, request: Request, reason: str) -> Request:
        """End a claimed request as failed; the members of its batch are queued again. Raises LeaseLost."""
        with self._database.writing(f"request {request.id}") as connection:
            _free_batch_members(connection, request, reason)
            return claims.step_claimed(
                connection, request, Status.FAILED, str(request.worker), rows.now(),
                reason=reason, failures=request.failures + 1,
            )  # fmt: skip

    def stop(self, request: Request) -> Request:
        """Stop a claimed request's run: each request of the batch that is to be cancelled ends as cancelled, the others
        are queued again. Raises LeaseLost.
        """
        with self._database.writing(f"request {request.id}") as connection:
            current = claims.fetch(connection, request.id)
            if current.cancel_by is None:
                return _requeue(connection, request, "stopped with its run")
            _free_batch_members(connection, request, "stopped with its run")
            return claims.step_claimed(
                connection, request, Status.CANCELLED, current.cancel_by, rows.now(), reason="cancelled while running"
            )

    def cancel(self, id_or_prefix: str, actor: str = OPERATOR) -> Request:
        """End a waiting request at once. Ask the worker of a running one to stop, which it does at its next step.

        Raises NotFound, TransitionRefused where the request has ended.
        """
        with self._database.writing(f"request {id_or_prefix}", actor) as connection:
            request = rows.fetch_request(connection, id_or_prefix)
            if request.status.is_terminal:
                raise TransitionRefused(
                    f"request {request.id} is {request.status.value}: only one that has not ended can be cancelled"
                )
            if request.status is not Status.RUNNING:
                return claims.step_waiting(connection, request, Status.CANCELLED, actor, rows.now())
            unchanged = (requests.c.id == request.id, requests.c.changes == request.changes)
            connection.execute(sa.update(requests).where(*unchanged).values(cancel_by=actor))
            return claims.fetch(connection, request.id)

    # Purging target samples.

    def due_samples(self, model: str | None = None) -> list[Request]:
        """The requests whose target samples their model's policy wants purged now; raises NotFound.

        Samples that a live request needs too are kept.
        """
        moment, due = rows.now(), []
        with self._database.reading() as connection:
            for record in rows.fetch_models(connection, model):
                days = rows.fetch_policy(connection, record).samples_days
                if days is None:
                    continue
                other = requests.alias("other").c
                needed = sa.exists().where(other.samples == requests.c.samples, claims.is_live(other))
                query = rows.REQUESTS.where(
                    requests.c.model_id == record.id,
                    requests.c.status.in_(TERMINAL),
                    requests.c.finished_at <= moment - timedelta(days=days),
                    ~needed,
                    ~removals.IS_PURGED,
                ).order_by(*rows.REQUEST_ORDER)
                due += [rows.to_request(row) for row in connection.execute(query).mappings()]
        return due

    def purge(self, request: Request, actor: str = OPERATOR) -> list[Digest]:
        """Record that a request's target samples are purged; the digests to be deleted now.

        The request keeps their digest; the synthetic probes are kept. Raises TransitionRefused while a live request
        needs the samples.
        """
        with self._database.writing(f"request {request.id}", actor) as connection:
            needed = sa.select(requests.c.id).where(requests.c.samples == request.samples, claims.is_live())
            other = connection.scalar(needed)
            if other is not None:
                raise TransitionRefused(f"the samples of request {request.id} are needed by {other}")
            return removals.record(connection, {request.samples}, "purged", actor, request.model, request=request.id)


def _check_targets(behaviour: Behaviour, model: Model) -> None:
    """Raise InvalidBehaviour where the targets are no classes of the model, or all of its classes."""
    classes = model.spec.classes
    outside = [target for target in behaviour.targets if target >= classes]
    if outside:
        raise InvalidBehaviour(f"{model.name!r} has no {_class_list(outside)}; its classes are 0 to {classes - 1}")
    if len(behaviour.targets) == classes:
        raise InvalidBehaviour(f"all {classes} classes of {model.name!r} are targets; leave at least one that is not")


def _check_not_erased(connection: sa.Connection, behaviour: Behaviour, model: Model) -> None:
    """Raise AlreadyErased where the latest version lacks the behaviour already, InvalidBehaviour where too few classes
    would stay (`claims.MIN_CLASSES_LEFT`)."""
    erased = rows.fetch_erased(connection, model)
    for earlier, version in erased:
        if earlier.name == behaviour.name:
            raise AlreadyErased(
                f"behaviour {behaviour.name!r} of {model.name!r} is already erased in version {version}; "
                "give another name if this is something else"
            )
    erased_classes = _erased_classes(erased)
    if behaviour.kind == "class" and set(behaviour.targets) <= set(erased_classes):
        version = max(erased_classes[target] for target in behaviour.targets)
        raise AlreadyErased(
            f"{_class_list(behaviour.targets)} of {model.name!r} is already erased in version {version}"
        )
    left, least = claims.classes_left(model, erased_classes, behaviour.targets), claims.MIN_CLASSES_LEFT[behaviour.kind]
    if left < least:
        raise InvalidBehaviour(
            f"{_class_list(behaviour.targets)}: with what is erased already this leaves {left} of the "
            f"{model.spec.classes} classes of {model.name!r}, and {least} must stay; give fewer targets"
        )


def _erased_classes(erased: list[tuple[Behaviour, int]]) -> dict[int, int]:
    """The classes that were erased as a whole, each with the version that erased it."""
    return {
        target: version for behaviour, version in erased if behaviour.kind == "class" for target in behaviour.targets
    }


def _class_list(targets: list[int] | tuple[int, ...]) -> str:
    return f"class{'es' if len(targets) > 1 else ''} {', '.join(map(str, targets))}"


def _check_generator(connection: sa.Connection, model: Model, recipe: Recipe, generator: Generator) -> None:
    """Raise GeneratorUnfit where a generator cannot serve the model now."""
    base = rows.fetch_version(connection, model)
    check_compatible(generator, model, rows.fetch_sealed_root(connection, model, base), recipe)


def _derived_key(behaviour: Behaviour, samples: Digest) -> str:
    """The idempotency key of a submission without one: a hash of the behaviour and the digest of its samples."""
    return hashlib.sha256(f"{behaviour.canonical()}:{samples}".encode()).hexdigest()


def _find_duplicate(
    connection: sa.Connection, model: Model, behaviour: Behaviour, samples: Digest, recipe: Recipe | None, terms: Terms
) -> Request | None:
    """The request that this submission repeats, None without one; its recipe may be any where `recipe` is None.

    With a key in `terms`, repeats always return the same request. Without one, duplicates are matched by behaviour and
    sample digest until the request ends. Raises AlreadyExists where the key belongs to another request, and where
    `terms` name a generator that the live request does not have.
    """
    key, generator = terms.key, terms.generator
    same = rows.REQUESTS.where(requests.c.model_id == model.id)
    if key is not None:
        same = same.where(requests.c.idempotency_key == key)
    else:
        same = same.where(requests.c.idempotency_key == _derived_key(behaviour, samples), claims.is_live())
    row = connection.execute(same.order_by(requests.c.submitted_at.desc()).limit(1)).mappings().one_or_none()
    if row is None:
        return None
    earlier = rows.to_request(row)
    if key is None and generator not in (None, earlier.generator):
        raise AlreadyExists(
            f"request {earlier.id} of {model.name!r} asks for the same and is {earlier.status.value}, without "
            f"generator {generator}; wait for its end, or `fsu request cancel {earlier.id}`"
        )
    content = (behaviour, samples, recipe or earlier.recipe, generator)
    if key is not None and (earlier.behaviour, earlier.samples, earlier.recipe, earlier.generator) != content:
        raise AlreadyExists(
            f"the idempotency key {key!r} of {model.name!r} belongs to request {earlier.id}, which asks for something "
            "else; give another key"
        )
    return earlier


def _insert(
    connection: sa.Connection,
    model: Model,
    behaviour: Behaviour,
    samples: Digest,
    sample_count: int,
    recipe: Recipe,
    terms: Terms,
) -> tuple[Request, str]:
    """Insert a request as submitted; the request and its actor."""
    actor = terms.requested_by or OPERATOR
    moment = rows.now_after(recipes.newest(connection, model, behaviour.kind))
    values = {
        "id": rows.new_id("r"),
        "model_id": model.id,
        **rows.behaviour_columns(behaviour),
        "samples": samples,
        "sample_count": sample_count,
        "recipe": recipe.model_dump(mode="json"),
        "idempotency_key": terms.key or _derived_key(behaviour, samples),
        "submitted_at": moment,
        "key_given": terms.key is not None,
        "priority": terms.priority,
        "not_before": terms.not_before,
        "due_at": terms.due_at,
        "requested_by": terms.requested_by,
        "generator_id": terms.generator,
    }
    step = {"status": Status.SUBMITTED, "changes": 1, "changed_at": moment, "changed_by": actor}
    insert = sa.insert(requests).values(**values, **step).returning(requests)
    row = connection.execute(insert).mappings().one()
    recorded = chain.row_of(requests, values, TERMS)
    chain.note(connection, "submitted", requests, recorded, actor=actor, model=model.name, request=values["id"])
    return rows.to_request({**row, "model": model.name}), actor


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


def _end_abandoned(connection: sa.Connection, seen: Request, worker: str) -> None:
    """End a request that `claims.abandoned` returned, as cancelled or as failed."""
    _free_batch_members(connection, seen, "lease_expired")
    failures, moment = seen.failures + 1, rows.now()
    if seen.cancel_by is not None:
        claims.step_waiting(connection, seen, Status.CANCELLED, seen.cancel_by, moment, lease_until=None)
        return
    reason = f"lease_expired: {failures} workers have vanished"
    values: dict[str, Any] = {"lease_until": None, "failures": failures, "reason": reason}
    claims.step_waiting(connection, seen, Status.FAILED, worker, moment, **values)


def _batch_candidates(connection: sa.Connection, leader: Request) -> list[Request]:
    if leader.behaviour.kind != "class" or leader.no_coalesce or leader.generator is not None:
        return []
    model = rows.fetch_model(connection, leader.model)
    erased = _erased_classes(rows.fetch_erased(connection, model))
    return claims.batch_candidates(connection, leader, model, set(erased), rows.now())


def _requeue(connection: sa.Connection, request: Request, reason: str, **values: Any) -> Request:
    """Put a claimed request back into the queue, and the members of its batch, which wait for no retry."""
    _free_batch_members(connection, request, reason, **({"alone": True} if values.get("alone") else {}))
    values = {"worker": None, "lead": None, "reason": reason, **values}
    return claims.step_claimed(connection, request, Status.QUEUED, str(request.worker), rows.now(), **values)


def _free_batch_members(connection: sa.Connection, leader: Request, reason: str, **values: Any) -> None:
    """Queue the members of a batch again; those that are to be cancelled end as cancelled."""
    for member in claims.batch_members(connection, leader):
        if member.cancel_by is None:
            changes: dict[str, Any] = {"worker": None, "lead": None, "lease_until": None, "reason": reason, **values}
            claims.step_waiting(connection, member, Status.QUEUED, str(leader.worker), rows.now(), **changes)
        else:
            claims.step_waiting(connection, member, Status.CANCELLED, member.cancel_by, rows.now(), lease_until=None)
