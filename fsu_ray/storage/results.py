"""What a run leaves in the ledger: its generator, its version, its erasure, its evidence. Inserts only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from fsu_ray.records import Model, ModelVersion, Request
from fsu_ray.storage import chain, rows
from fsu_ray.storage.schema import erasures, generators
from fsu_ray.work import Outcome, Part


@dataclass(frozen=True)
class RunRecord:
    """A run that has ended: what was asked, what came back, and the generator that it worked with."""

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
        """`reused`, `warm_started_from` and `transferred_from` are ids of generators; the outcome's `generator_use`
        says which one counts. One whose transfer the gate has refused is no generator of this line: its own id stands
        for it. `origins` are the searches that found the recipe, by the ids of the run's requests.

        Raises ValueError where that one is missing.
        """
        use = outcome.generator_use
        links = {"reused": reused, "warm_started": warm_started_from, "transferred": transferred_from}
        named = links.get(use, rows.new_id("g"))
        if named is None:
            raise ValueError(f"request {request.id}: the run {use} a generator, but its id is not given")
        if use == "warm_started":
            return cls(request, outcome, rows.new_id("g"), named, None, origins)
        if use == "transferred" and not outcome.refused:
            return cls(request, outcome, rows.new_id("g"), None, named, origins)
        return cls(request, outcome, named, None, None, origins)

    @property
    def report(self) -> dict[str, Any]:
        """What `report_of` says of the run's own request."""
        return self.report_of(None)

    def report_of(self, part: Part | None) -> dict[str, Any]:
        """The outcome's report, or that of a part of it, as the ledger keeps it.

        Beside what `outcome.report` says: `generator` (`id`, `use`, `refused`: why the one that was offered
        was not reused, `figures`: as measured in this run), `recipe` (its `digest`, and its `origin`: the search that
        had found it when the request was submitted, None without one), `seconds`, the time of each stage, and
        `resumed`: where the run went on from a checkpoint; of a coalesced run also `coalesced`: all of its requests.
        """
        generator = {
            "id": self.generator,
            "use": self.outcome.generator_use,
            "refused": list(self.outcome.refused),
            "figures": dict(self.outcome.metrics),
        }
        asked = self.request.id if part is None else part.request
        recipe = {"digest": self.request.recipe.digest, "origin": self.origins[asked]}  # a run has one recipe
        run: dict[str, Any] = {"seconds": dict(self.outcome.seconds), "resumed": list(self.outcome.resumed)}
        if self.outcome.also:
            run["coalesced"] = [self.request.id, *(each.request for each in self.outcome.also)]
        own = self.outcome.report if part is None else part.report
        return {**own, "generator": generator, "recipe": recipe, **run}

    def keep_generator(self, connection: sa.Connection, model: Model, root: int, moment: datetime) -> None:
        """Insert the generator, unless it is one that the ledger has already, or its transfer was refused."""
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

    def keep_erasure(
        self,
        connection: sa.Connection,
        model: Model,
        version: ModelVersion,
        request: Request,
        part: Part | None = None,
    ) -> None:
        """Insert the erasure of `request` that `version` stands for: the run's own, or `part` of a coalesced one."""
        found = part or self.outcome
        values: dict[str, Any] = {
            "id": rows.new_id("e"),
            "model_id": model.id,
            "version": version.number,
            "request_id": request.id,
            **rows.behaviour_columns(request.behaviour),
            "samples": request.samples,
            "mask": found.mask,
            "probes": found.probes,
            "generator_id": self.generator,
            "generator_use": self.outcome.generator_use,
            "report": self.report_of(part),
            "created_at": version.created_at,
        }
        chain.insert(
            connection, "erased", erasures, values, actor=str(self.request.worker), model=model.name, request=request.id
        )
