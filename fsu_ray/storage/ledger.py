"""The ledger: models, their versions, the requests to erase a behaviour, and their results.

Every method is one transaction, and the rows of history that it writes enter the audit chain in it. A model is named by
its name; a request, generator or schedule by its id or an unambiguous prefix of it. The ledger holds no images and no
free text of a requester, only digests of artifacts. Reports and metrics come back as JSON gives them: lists for tuples,
text for keys that were numbers, None for NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from fsu_ray.config import Timings
from fsu_ray.errors import TransitionRefused
from fsu_ray.records import Digest, ModelVersion, Request, Status
from fsu_ray.storage import claims, recipes, removals, results, rows
from fsu_ray.storage.audit import Audit
from fsu_ray.storage.database import OPERATOR, Database
from fsu_ray.storage.generators import Generators
from fsu_ray.storage.models import Models, insert_version
from fsu_ray.storage.recipes import Recipes
from fsu_ray.storage.requests import Requests
from fsu_ray.storage.schedules import Schedules
from fsu_ray.work import Outcome


def open_ledger(url: str, timings: Timings | None = None) -> Ledger:
    """The ledger at a SQLAlchemy `url` such as `sqlite:///folder/ledger.db`, created if it is missing.

    Raises InvalidConfig where the folder, the file or the server is unusable, or where a newer fsu_ray wrote the
    ledger.
    """
    timings = timings or Timings()
    return Ledger(Database.open(url, timings), timings)


class Ledger:
    """The system of record. `open_ledger` opens it. Threads may share it, processes may not."""

    def __init__(self, database: Database, timings: Timings) -> None:
        self.database = database
        self.models = Models(database)
        self.requests = Requests(database, timings)
        self.generators = Generators(database)
        self.schedules = Schedules(database)
        self.recipes = Recipes(database)
        self.audit = Audit(database)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the ledger's connections."""
        self.database.close()

    def commit(
        self,
        request: Request,
        outcome: Outcome,
        base: ModelVersion,
        *,
        generator_id: str | None = None,
        warm_started_from: str | None = None,
        transferred_from: str | None = None,
        root: int | None = None,
    ) -> ModelVersion:
        """Make the version that a run brought back, in one transaction: generator, version, erasure, request.

        `base` is the version that the run began from and must still be the latest. `generator_id` names
        the generator that was reused, `warm_started_from` the one that a new one began with, `transferred_from` the
        one whose weights serve with a new D'; each counts only where `outcome.generator_use` says so. `root` is the
        version that labels D', where that is not the root of `base` (`sealed_root`). The report is kept as
        `results.Ended.report_of` describes; a coalesced run makes one erasure a request, all of one version.

        Raises LeaseLost where the claim has ended, TransitionRefused where `base` is not the latest version.
        """
        if outcome.reason is not None or outcome.weights is None or outcome.mask is None or outcome.probes is None:
            raise ValueError(f"request {request.id}: an outcome without a result cannot become a version")
        with self.database.writing(f"request {request.id}") as connection:
            moment, worker = rows.now(), str(request.worker)
            model = rows.fetch_model(connection, request.model)
            along = {each.id: each for each in claims.batch_members(connection, request)}
            if set(along) != {part.request for part in outcome.also}:
                raise claims.lost(request)
            origins = recipes.origins(connection, (request, *along.values()))
            ended = results.RunRecord.of(request, outcome, generator_id, warm_started_from, transferred_from, origins)
            done = {"version": base.number + 1, "reason": None}
            claims.step_claimed(connection, request, Status.SUCCEEDED, worker, moment, report=ended.report, **done)
            for part in outcome.also:
                claims.step_claimed(
                    connection, along[part.request], Status.SUCCEEDED, worker, moment,
                    report=ended.report_of(part), **done,
                )  # fmt: skip
            latest = rows.fetch_version(connection, model)
            if latest.number != base.number:
                raise TransitionRefused(
                    f"version {base.number} of {model.name!r} is no longer the latest, {latest.number} is: nothing was "
                    "written; run the request again"
                )
            ended.keep_generator(connection, model, root or latest.root, moment)
            version = insert_version(connection, model, latest, Digest(outcome.weights), moment, request.id, worker)
            ended.keep_erasure(connection, model, version, request)
            for part in outcome.also:
                ended.keep_erasure(connection, model, version, along[part.request], part)
            return version

    def reject(
        self,
        request: Request,
        reason: str,
        outcome: Outcome | None,
        base: ModelVersion | None,
        *,
        generator_id: str | None = None,
        warm_started_from: str | None = None,
        transferred_from: str | None = None,
        root: int | None = None,
    ) -> Request:
        """End a claimed request whose result was refused: no version, but its generator and report are kept.

        The arguments are those of `commit`; `outcome` is None where the run brought nothing back, and `base` may be
        then. Raises LeaseLost.
        """
        moment, worker = rows.now(), str(request.worker)
        if outcome is None or base is None:
            with self.database.autocommit(f"request {request.id}") as connection:
                return claims.step_claimed(connection, request, Status.REJECTED, worker, moment, reason=reason)
        with self.database.writing(f"request {request.id}") as connection:
            origins = recipes.origins(connection, (request,))
            ended = results.RunRecord.of(request, outcome, generator_id, warm_started_from, transferred_from, origins)
            rejected = claims.step_claimed(
                connection, request, Status.REJECTED, worker, moment, reason=reason, report=ended.report
            )
            ended.keep_generator(connection, rows.fetch_model(connection, request.model), root or base.root, moment)
            return rejected

    def discard(self, digests: Iterable[Digest], actor: str = OPERATOR) -> list[Digest]:
        """Record that unreferenced artifacts are removed; the digests to be deleted now."""
        with self.database.writing("the artifacts", actor) as connection:
            return removals.record(connection, digests, "unreferenced", actor, None)

    def references(self) -> tuple[set[Digest], set[Digest]]:
        """The digests that the ledger needs, and those that it refers to but has recorded as removed."""
        with self.database.reading() as connection:
            return removals.references(connection)
