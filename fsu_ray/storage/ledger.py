"""The ledger: models, their versions, the requests to erase a behaviour, and their results.

Every method is one transaction, and the rows of history that it writes enter the audit chain in it. The claiming of
requests takes several, so that workers do not wait for each other. A model is named by its name; a request, generator
or schedule by its id or an unambiguous prefix of it. The ledger holds no images and no free text of a requester, only
digests of artifacts. Reports and metrics come back as JSON gives them: lists for tuples, text for keys that were
numbers, None for NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from fsu_ray.config import Timings
from fsu_ray.errors import TransitionRefused
from fsu_ray.records import OPERATOR, Digest, Model, ModelVersion, Request, Status
from fsu_ray.storage import chain, claims, planning, recipes, removals, rows
from fsu_ray.storage.audit import Audit
from fsu_ray.storage.database import Database
from fsu_ray.storage.generators import Generators
from fsu_ray.storage.models import Models, insert_version
from fsu_ray.storage.recipes import Recipes
from fsu_ray.storage.requests import Requests
from fsu_ray.storage.schedules import Schedules
from fsu_ray.storage.schema import erasures, generators
from fsu_ray.work import Outcome, TargetResult


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

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the ledger's connections."""
        self.database.close()

    def lineage(self, model: str) -> planning.LineageState:
        """Where a model stands: its latest version, the version that labels D', and the earlier erasures.

        Raises NotFound.
        """
        with self.database.reading() as connection:
            return planning.lineage(connection, model)

    def plan(self, request: Request) -> planning.Plan:
        """The plan of a claimed request, read in one snapshot.

        Raises GeneratorUnfit where the generator that the request names can no longer serve it.
        """
        with self.database.reading() as connection:
            return planning.plan(connection, request)

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
        """Make the version that a run brought back, in one transaction: generator, version, erasures, requests.

        `base` is the version that the run began from and must still be the latest. `generator_id` names the generator
        that was reused, `warm_started_from` the generator that a new one started from, `transferred_from` the generator
        whose weights serve with a new D'; each counts only where `outcome.generator_use` says so. `root` is the version
        that labels D', where that is not the root of `base`. `RunRecord.report_of` describes the stored report. A
        batch makes one erasure a request, all of one version.

        Raises LeaseLost where the claim has ended, TransitionRefused where `base` is not the latest version.
        """
        complete = all(target.mask and target.probes for target in outcome.targets)
        if outcome.reason is not None or outcome.weights is None or not outcome.targets or not complete:
            raise ValueError(f"request {request.id}: an outcome without a result cannot become a version")
        with self.database.writing(f"request {request.id}") as connection:
            moment, worker = rows.now(), str(request.worker)
            model = rows.fetch_model(connection, request.model)
            members = {member.id: member for member in (request, *claims.batch_members(connection, request))}
            if set(members) != {target.request for target in outcome.targets}:
                raise claims.lost(request)
            origins = recipes.origins(connection, tuple(members.values()))
            run = RunRecord.of(request, outcome, generator_id, warm_started_from, transferred_from, origins)
            for target in outcome.targets:
                claims.step_claimed(
                    connection, members[target.request], Status.SUCCEEDED, worker, moment,
                    report=run.report_of(target), version=base.number + 1, reason=None,
                )  # fmt: skip
            latest = rows.fetch_version(connection, model)
            if latest.number != base.number:
                raise TransitionRefused(
                    f"version {base.number} of {model.name!r} is no longer the latest, {latest.number} is: nothing was "
                    "written; run the request again"
                )
            run.insert_generator(connection, model, root or latest.root, moment)
            version = insert_version(connection, model, latest, outcome.weights, moment, request.id, worker)
            for target in outcome.targets:
                run.insert_erasure(connection, model, version, members[target.request], target)
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

        The arguments are those of `commit`. `outcome` is None where the run brought nothing back; `base` may be None
        then. Raises LeaseLost.
        """
        moment, worker = rows.now(), str(request.worker)
        if outcome is None or base is None:
            with self.database.autocommit(f"request {request.id}") as connection:
                return claims.step_claimed(connection, request, Status.REJECTED, worker, moment, reason=reason)
        with self.database.writing(f"request {request.id}") as connection:
            origins = recipes.origins(connection, (request,))
            run = RunRecord.of(request, outcome, generator_id, warm_started_from, transferred_from, origins)
            report = run.report_of(outcome.targets[0])
            rejected = claims.step_claimed(
                connection, request, Status.REJECTED, worker, moment, reason=reason, report=report
            )
            run.insert_generator(connection, rows.fetch_model(connection, request.model), root or base.root, moment)
            return rejected

    def discard(self, digests: Iterable[Digest], actor: str = OPERATOR) -> list[Digest]:
        """Record that unreferenced artifacts are removed; the digests to be deleted now."""
        with self.database.writing("the artifacts", actor) as connection:
            return removals.record(connection, digests, "unreferenced", actor, None)

    def references(self) -> tuple[set[Digest], set[Digest]]:
        """The digests that the ledger needs, and those that it refers to but has recorded as removed."""
        with self.database.reading() as connection:
            return removals.references(connection)


@dataclass(frozen=True)
class RunRecord:
    """A run that has ended, as the ledger records it: its leading request, its outcome and its generator's id."""

    request: Request
    outcome: Outcome
    generator: str
    warm_started_from: str | None
    transferred_from: str | None
    origins: Mapping[str, str | None]

    @classmethod
    def of(
        cls,
        request: Request,
        outcome: Outcome,
        reused: str | None,
        warm_started_from: str | None,
        transferred_from: str | None,
        origins: Mapping[str, str | None],
    ) -> RunRecord:
        """`reused`, `warm_started_from` and `transferred_from` are ids of generators; `outcome.generator_use` says
        which of them counts. A transferred generator that the gate refused becomes no generator of this model, so the
        run is recorded with that generator's own id. `origins` are the searches that found the recipe, by request.

        Raises ValueError where the id that counts is missing.
        """
        use = outcome.generator_use
        links = {"reused": reused, "warm_started": warm_started_from, "transferred": transferred_from}
        linked = links.get(use, rows.new_id("g"))
        if linked is None:
            raise ValueError(f"request {request.id}: the run {use} a generator, but its id is not given")
        if use == "warm_started":
            return cls(request, outcome, rows.new_id("g"), linked, None, origins)
        if use == "transferred" and not outcome.refused:
            return cls(request, outcome, rows.new_id("g"), None, linked, origins)
        return cls(request, outcome, linked, None, None, origins)

    def report_of(self, target: TargetResult) -> dict[str, Any]:
        """The report of one target, as the ledger stores it.

        Besides `target.report` it holds `generator` (`id`, `use`, `refused`: why the generator on offer was not
        reused, `figures`: the metrics of D' in this run), `recipe` (its `digest`, and its `origin`: the search that
        had found it when the request was submitted, None without one), `seconds` (the time of each stage) and
        `resumed` (where the run went on from a checkpoint). The report of a batch also holds `coalesced`: the ids of
        all its requests.
        """
        generator = {
            "id": self.generator,
            "use": self.outcome.generator_use,
            "refused": list(self.outcome.refused),
            "figures": dict(self.outcome.metrics),
        }
        recipe = {"digest": self.request.recipe.digest, "origin": self.origins[target.request]}  # a run has one recipe
        run: dict[str, Any] = {"seconds": dict(self.outcome.seconds), "resumed": list(self.outcome.resumed)}
        if len(self.outcome.targets) > 1:
            run["coalesced"] = [each.request for each in self.outcome.targets]
        return {**target.report, "generator": generator, "recipe": recipe, **run}

    def insert_generator(self, connection: sa.Connection, model: Model, root: int, moment: datetime) -> None:
        """Insert the generator, unless the ledger has it already or its transfer was refused."""
        use = self.outcome.generator_use
        if use == "reused" or (use == "transferred" and self.transferred_from is None):
            return
        values: dict[str, Any] = {
            "id": self.generator,
            "model_id": model.id,
            "root": root,
            "spec": model.spec.model_dump(mode="json"),
            "recipe_digest": self.request.recipe.generator_digest,
            "weights": self.outcome.generator_weights,
            "dataset": self.outcome.dataset,
            "origin": use,
            "warm_started_from": self.warm_started_from,
            "transferred_from": self.transferred_from,
            "figures": dict(self.outcome.metrics),
            "request_id": self.request.id,
            "created_at": moment,
        }
        event = f"generator_{use}"
        chain.insert(
            connection, event, generators, values,
            actor=str(self.request.worker), model=model.name, request=self.request.id,
        )  # fmt: skip

    def insert_erasure(
        self, connection: sa.Connection, model: Model, version: ModelVersion, request: Request, target: TargetResult
    ) -> None:
        """Insert the erasure of `request`, whose result `target` is, as of `version`."""
        values: dict[str, Any] = {
            "id": rows.new_id("e"),
            "model_id": model.id,
            "version": version.number,
            "request_id": request.id,
            **rows.behaviour_columns(request.behaviour),
            "samples": request.samples,
            "mask": target.mask,
            "probes": target.probes,
            "generator_id": self.generator,
            "generator_use": self.outcome.generator_use,
            "report": self.report_of(target),
            "created_at": version.created_at,
        }
        chain.insert(
            connection, "erased", erasures, values, actor=str(self.request.worker), model=model.name, request=request.id
        )
