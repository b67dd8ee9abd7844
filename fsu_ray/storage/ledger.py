"""The ledger: models, their versions, the requests to erase a behaviour, and what came of them.

Every method is one transaction. Models are named by their name, requests and generators by their id or
a prefix of it that fits only one. Digests point into the artifacts; the ledger itself holds no images
and no words of a requester. Reports and figures come back as JSON gives them: tuples as lists, numbers
as keys as text, NaN as None.
"""

from __future__ import annotations

import re
from datetime import timedelta
from types import TracebackType
from typing import Any

import sqlalchemy as sa

from fsu_ray.errors import AlreadyExists, InvalidConfig, TransitionRefused
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Erasure, Generator, Model, ModelSpec, ModelVersion, Outcome, Request, Status
from fsu_ray.storage import claims, results, rows, submissions
from fsu_ray.storage import history as events
from fsu_ray.storage.database import Database
from fsu_ray.storage.schema import generators, model_versions, models, requests

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def open_ledger(url: str) -> Ledger:
    """The ledger at a SQLAlchemy `url` such as `sqlite:///folder/ledger.db`, made where it is missing.

    Raises InvalidConfig where the folder or file is unusable, or was written by a newer fsu_ray.
    """
    return Ledger(Database.open(url))


class Ledger:
    """The system of record. `open_ledger` makes it; it may be shared by threads, not by processes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the ledger's connections."""
        self._database.close()

    def check_name_free(self, name: str) -> None:
        """Raise what `register_model` would raise for this name."""
        _check_name(name)
        with self._database.reading() as connection:
            if connection.scalar(sa.select(models.c.id).where(models.c.name == name)) is not None:
                raise AlreadyExists(f"model {name!r} exists already; choose another name")

    def register_model(self, name: str, spec: ModelSpec, weights: str, test_set: str | None = None) -> Model:
        """A new model with version 1, its own root. `weights` is the digest of an artifact, `test_set` the name
        of a labelled data set.

        Raises AlreadyExists where the name is taken, InvalidConfig where it is no name.
        """
        _check_name(name)
        moment = rows.now()
        model = Model(id=rows.new_id("m"), name=name, spec=spec, test_set=test_set, created_at=moment)
        with self._database.writing(f"model {name!r}") as connection:
            columns = {"id": model.id, "name": name, "test_set": test_set, "created_at": moment}
            connection.execute(sa.insert(models).values(spec=spec.model_dump(mode="json"), **columns))
            results.keep_version(connection, model, None, weights, moment)
        return model

    def add_version(self, model: str, weights: str) -> ModelVersion:
        """A version that was trained further outside: a child of the latest, and a root of its own.

        Raises NotFound, and TransitionRefused while a request of the model is running.
        """
        with self._database.writing(f"model {model!r}") as connection:
            line = rows.fetch_model(connection, model)
            running = connection.scalar(
                sa.select(requests.c.id).where(requests.c.model_id == line.id, requests.c.status == Status.RUNNING)
            )
            if running is not None:
                raise TransitionRefused(f"request {running} of {model!r} is running; add the version when it has ended")
            return results.keep_version(connection, line, rows.fetch_version(connection, line), weights, rows.now())

    def models(self) -> list[Model]:
        """All models, by name."""
        with self._database.reading() as connection:
            query = sa.select(models).order_by(models.c.name)
            return [rows.to_model(row) for row in connection.execute(query).mappings()]

    def model(self, name: str) -> Model:
        """The model of that name; raises NotFound."""
        with self._database.reading() as connection:
            return rows.fetch_model(connection, name)

    def versions(self, model: str) -> list[ModelVersion]:
        """The versions of a model by number; raises NotFound."""
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            query = rows.VERSIONS.where(model_versions.c.model_id == line.id).order_by(model_versions.c.number)
            return [rows.to_version(row) for row in connection.execute(query).mappings()]

    def version(self, model: str, number: int | None = None) -> ModelVersion:
        """One version of a model, the latest for None; raises NotFound."""
        with self._database.reading() as connection:
            return rows.fetch_version(connection, rows.fetch_model(connection, model), number)

    def check_behaviour(self, model: str, behaviour: Behaviour) -> None:
        """Raise what `submit` would raise for this behaviour, if it were new."""
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            submissions.check_targets(behaviour, line)
            submissions.check_line(connection, behaviour, line)

    def submit(
        self, model: str, behaviour: Behaviour, samples: str, sample_count: int, recipe: Recipe
    ) -> tuple[Request, bool]:
        """Ask for a behaviour to be erased: the request, and whether it is new.

        `samples` is the digest of the target samples. A request for the same behaviour and samples
        that has not ended is returned as it is, with its own recipe, and False. A new one is queued.

        Raises NotFound, InvalidBehaviour (targets that cannot be erased) and AlreadyErased (the name, or
        all classes of a class behaviour, by an erasure of the latest version's line).
        """
        with self._database.writing(f"behaviour {behaviour.name!r} of {model!r}") as connection:
            line = rows.fetch_model(connection, model)
            submissions.check_targets(behaviour, line)
            twin = submissions.live_twin(connection, line, submissions.idempotency_key(behaviour, samples))
            if twin is not None:
                return twin, False
            submissions.check_line(connection, behaviour, line)
            return submissions.insert(connection, line, behaviour, samples, sample_count, recipe), True

    def request(self, id_or_prefix: str) -> Request:
        """One request; raises NotFound where the prefix fits none or several."""
        with self._database.reading() as connection:
            return rows.to_request(rows.fetch_by_id(connection, rows.REQUESTS, requests, id_or_prefix))

    def requests(self, model: str | None = None, status: Status | None = None) -> list[Request]:
        """Requests in the order of their submission; raises NotFound for a model that is not there."""
        query = rows.REQUESTS.order_by(requests.c.submitted_at, requests.c.id)
        with self._database.reading() as connection:
            if model is not None:
                query = query.where(requests.c.model_id == rows.fetch_model(connection, model).id)
            if status is not None:
                query = query.where(requests.c.status == status)
            return [rows.to_request(row) for row in connection.execute(query).mappings()]

    def claimable(self, model: str | None = None) -> bool:
        """Whether `claim` would find something now; raises NotFound for a model that is not there."""
        with self._database.reading() as connection:
            line = None if model is None else rows.fetch_model(connection, model)
            return claims.next_claimable(connection, line, rows.now()) is not None

    def claim(self, worker: str, lease_seconds: float, model: str | None = None) -> Request | None:
        """Begin the next attempt: of the oldest queued request whose model has none running, or of one whose
        lease is over. None where there is nothing to do; raises NotFound for a model that is not there.

        The request that comes back is the claim: hand it to `heartbeat`, `commit` and the others.
        """
        while True:
            try:
                with self._database.writing("the queue") as connection:
                    line = None if model is None else rows.fetch_model(connection, model)
                    moment = rows.now()
                    seen = claims.next_claimable(connection, line, moment)
                    if seen is None:
                        return None
                    request = claims.take(connection, seen, worker, lease_seconds, moment)
            except TransitionRefused:
                continue  # the index of running requests: another worker was faster
            if request is not None:
                return request

    def heartbeat(self, request: Request, lease_seconds: float) -> None:
        """Renew the lease; raises LeaseLost where another attempt has begun or the request has ended."""
        with self._database.writing(f"request {request.id}") as connection:
            until = rows.now() + timedelta(seconds=lease_seconds)
            claims.change_claimed(connection, request, lease_until=until)

    def release(self, request: Request, reason: str) -> Request:
        """Put a claimed request back into the queue; raises LeaseLost."""
        with self._database.writing(f"request {request.id}") as connection:
            return claims.change_claimed(
                connection, request, status=Status.QUEUED, lease_until=None, worker=None, reason=reason
            )

    def fail(self, request: Request, reason: str) -> Request:
        """End a claimed request whose run broke; raises LeaseLost."""
        with self._database.writing(f"request {request.id}") as connection:
            return claims.end_claimed(connection, request, Status.FAILED, rows.now(), reason=reason)

    def cancel(self, id_or_prefix: str) -> Request:
        """End a request that is not running yet; raises NotFound, TransitionRefused where it runs or has ended."""
        with self._database.writing(f"request {id_or_prefix}") as connection:
            request = rows.to_request(rows.fetch_by_id(connection, rows.REQUESTS, requests, id_or_prefix))
            return claims.cancel(connection, request, rows.now())

    def commit(
        self,
        request: Request,
        outcome: Outcome,
        base: ModelVersion,
        *,
        generator_id: str | None = None,
        warm_started_from: str | None = None,
    ) -> ModelVersion:
        """Make the version that a run brought back, in one transaction: generator, version, erasure, request.

        `base` is the version that the run began from and must still be the latest. `generator_id` names
        the generator that was reused, `warm_started_from` the one that a new one began with; each counts
        only where `outcome.generator_use` says so. The report is kept as `results.Ended.report` describes.

        Raises LeaseLost where the claim has ended, TransitionRefused where `base` is not the latest version.
        """
        if outcome.reason is not None or outcome.weights is None or outcome.mask is None or outcome.probes is None:
            raise ValueError(f"request {request.id}: an outcome without a result cannot become a version")
        ended = results.Ended.of(request, outcome, generator_id, warm_started_from)
        with self._database.writing(f"request {request.id}") as connection:
            moment = rows.now()
            model = rows.fetch_model(connection, request.model)
            done = {"version": base.number + 1, "report": ended.report}
            claims.end_claimed(connection, request, Status.SUCCEEDED, moment, **done)
            latest = rows.fetch_version(connection, model)
            if latest.number != base.number:
                raise TransitionRefused(
                    f"version {base.number} of {model.name!r} is no longer the latest, {latest.number} is: nothing was "
                    "written; run the request again"
                )
            ended.keep_generator(connection, model, latest.root, moment)
            version = results.keep_version(connection, model, latest, outcome.weights, moment, request.id)
            ended.keep_erasure(connection, model, version)
            return version

    def reject(
        self,
        request: Request,
        reason: str,
        outcome: Outcome | None,
        base: ModelVersion,
        *,
        generator_id: str | None = None,
        warm_started_from: str | None = None,
    ) -> Request:
        """End a claimed request whose result was refused: no version, but its generator and report are kept.

        The arguments are those of `commit`; `outcome` is None where the run brought nothing back. Raises LeaseLost.
        """
        ended = None if outcome is None else results.Ended.of(request, outcome, generator_id, warm_started_from)
        with self._database.writing(f"request {request.id}") as connection:
            moment = rows.now()
            report = None if ended is None else ended.report
            rejected = claims.end_claimed(connection, request, Status.REJECTED, moment, reason=reason, report=report)
            if ended is not None:
                ended.keep_generator(connection, rows.fetch_model(connection, request.model), base.root, moment)
            return rejected

    def erasures(self, model: str, version: int | None = None) -> list[Erasure]:
        """What is gone as of a version (None: the latest), inherited along its parents, oldest first.

        Raises NotFound.
        """
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            return rows.fetch_erasures(connection, line, rows.fetch_version(connection, line, version).number)

    def generators(self, model: str | None = None) -> list[Generator]:
        """Generators, oldest first; raises NotFound for a model that is not there."""
        query = rows.GENERATORS.order_by(generators.c.created_at, generators.c.id)
        with self._database.reading() as connection:
            if model is not None:
                query = query.where(generators.c.model_id == rows.fetch_model(connection, model).id)
            return [rows.to_generator(row) for row in connection.execute(query).mappings()]

    def generator(self, id_or_prefix: str) -> Generator:
        """One generator; raises NotFound where the prefix fits none or several."""
        with self._database.reading() as connection:
            return rows.to_generator(rows.fetch_by_id(connection, rows.GENERATORS, generators, id_or_prefix))

    def history(self, model: str) -> list[dict[str, Any]]:
        """What happened to a model, oldest first; raises NotFound.

        Each event is `{"at": datetime, "event": str, "version": int | None, "request": str | None,
        "detail": dict}`. The events and their details:

        - `registered` (weights, arch) and `version_added` (weights): a version from outside;
        - `submitted` (behaviour, kind, targets, sample_count);
        - `generator_trained`, `generator_warm_started` (generator; from), `generator_reused` (generator);
        - `erased` (behaviour, kind, targets), with its version;
        - `rejected`, `failed`, `cancelled` (behaviour, reason).
        """
        with self._database.reading() as connection:
            return events.history(connection, rows.fetch_model(connection, model))


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidConfig(
            f"{name!r} is no name for a model; use up to 100 letters, digits, '.', '_' and '-', not a sign first"
        )
