"""What a run leaves in the ledger: its generator, its version, its erasure, its evidence. Inserts only."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from fsu_ray.records import Model, ModelVersion, Outcome, Request
from fsu_ray.storage import rows
from fsu_ray.storage.schema import erasures, generators, model_versions


@dataclass(frozen=True)
class Ended:
    """A run that has ended: what was asked, what came back, and the generator that it worked with."""

    request: Request
    outcome: Outcome
    generator: str
    warm_started_from: str | None

    @classmethod
    def of(cls, request: Request, outcome: Outcome, reused: str | None, warm_started_from: str | None) -> Ended:
        """`reused` and `warm_started_from` are ids of generators; the outcome's `generator_use` says which one counts.

        Raises ValueError where that one is missing.
        """
        use = outcome.generator_use
        named = {"trained": rows.new_id("g"), "reused": reused, "warm_started": warm_started_from}[use]
        if named is None:
            raise ValueError(f"request {request.id}: the run {use} a generator, but its id is not given")
        if use == "warm_started":
            return cls(request, outcome, rows.new_id("g"), named)
        return cls(request, outcome, named, None)

    @property
    def report(self) -> dict[str, Any]:
        """The outcome's report as the ledger keeps it.

        Beside what `outcome.report` says: `generator` (`id`, `use`, `refused`: why the one that was offered
        was not reused, `figures`: as measured in this run), `seconds`, the time of each stage, and `resumed`:
        where the run went on from a checkpoint.
        """
        generator = {
            "id": self.generator,
            "use": self.outcome.generator_use,
            "refused": list(self.outcome.refused),
            "figures": dict(self.outcome.figures),
        }
        run = {"seconds": dict(self.outcome.seconds), "resumed": list(self.outcome.resumed)}
        return {**self.outcome.report, "generator": generator, **run}

    def keep_generator(self, connection: sa.Connection, model: Model, root: int, moment: datetime) -> None:
        """Insert the generator, unless it is one that the ledger has already."""
        if self.outcome.generator_use == "reused":
            return
        connection.execute(
            sa.insert(generators).values(
                id=self.generator,
                model_id=model.id,
                root=root,
                spec=model.spec.model_dump(mode="json"),
                recipe_digest=self.request.recipe.generator_digest,
                weights=self.outcome.generator_weights,
                dataset=self.outcome.dataset,
                origin=self.outcome.generator_use,
                warm_started_from=self.warm_started_from,
                figures=dict(self.outcome.figures),
                request_id=self.request.id,
                created_at=moment,
            )
        )

    def keep_erasure(self, connection: sa.Connection, model: Model, version: ModelVersion) -> None:
        """Insert the erasure that `version` stands for."""
        connection.execute(
            sa.insert(erasures).values(
                id=rows.new_id("e"),
                model_id=model.id,
                version=version.number,
                request_id=self.request.id,
                **rows.behaviour_columns(self.request.behaviour),
                samples=self.request.samples,
                mask=self.outcome.mask,
                probes=self.outcome.probes,
                generator_id=self.generator,
                generator_use=self.outcome.generator_use,
                report=self.report,
                created_at=version.created_at,
            )
        )


def keep_version(
    connection: sa.Connection,
    model: Model,
    parent: ModelVersion | None,
    weights: str,
    moment: datetime,
    request: str | None = None,
) -> ModelVersion:
    """Insert the version after `parent` and return it: of its root if a request made it, else a root of its own."""
    number = 1 if parent is None else parent.number + 1
    version = ModelVersion(
        id=rows.new_id("v"),
        model=model.name,
        number=number,
        parent=None if parent is None else parent.number,
        root=number if parent is None or request is None else parent.root,
        weights=weights,
        request=request,
        created_at=moment,
    )
    connection.execute(
        sa.insert(model_versions).values(
            id=version.id,
            model_id=model.id,
            number=version.number,
            parent=version.parent,
            root=version.root,
            weights=weights,
            request_id=request,
            created_at=moment,
        )
    )
    return version
