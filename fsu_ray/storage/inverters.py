"""Generators and their D': which there are, when they are retired or sealed, and which artifacts are really gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa

from fsu_ray.errors import AlreadyExists, TransitionRefused
from fsu_ray.recipes import Recipe
from fsu_ray.records import Generator, Model, ModelVersion, Request, Status
from fsu_ray.storage import chain, rows
from fsu_ray.storage.database import Part
from fsu_ray.storage.policies import OPERATOR, check_actor, fetch_policy
from fsu_ray.storage.schema import (
    LIVE,
    TERMINAL,
    erasures,
    generator_retirements,
    generators,
    model_versions,
    models,
    removals,
    requests,
    seals,
)

Why = Literal["operator", "erasure", "age", "seal"]


class Inverters(Part):
    """The ledger's generators, and the artifacts that have been taken out of the store for good.

    What is to be destroyed is recorded first and deleted afterwards: a crash between the two leaves a file
    that the ledger says is gone, which `audit verify` reports and `artifacts gc` deletes.
    """

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

    def retire(self, id_or_prefix: str, why: Why = "operator", actor: str = OPERATOR) -> tuple[Generator, list[str]]:
        """Offer a generator to no request any more; also the digests of its artifacts, to be deleted now: those that
        no other generator in use has too (one that was transferred has the weights of the first).

        Raises NotFound, AlreadyExists where it is retired, TransitionRefused while a request of its model runs, or one
        that asks for it.
        """
        check_actor(actor)
        with self._database.writing(f"generator {id_or_prefix}") as connection:
            found = rows.to_generator(rows.fetch_by_id(connection, rows.GENERATORS, generators, id_or_prefix))
            if found.retired is not None:
                raise AlreadyExists(f"generator {found.id} is retired already ({found.retired})")
            _check_idle(connection, found)
            return _retire(connection, found, why, actor)

    def due_generators(self, model: str) -> list[tuple[Generator, Why]]:
        """The generators that the model's policy wants retired now, and why; raises NotFound."""
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            policy = fetch_policy(connection, line)
            query = rows.GENERATORS.where(generators.c.model_id == line.id, generator_retirements.c.id.is_(None))
            found = [rows.to_generator(row) for row in connection.execute(query).mappings()]
        if policy.generators == "retire-after-erasure":
            return [(each, "erasure") for each in found if each.taints and each.sealed is None]
        if policy.generator_days is not None:
            oldest = rows.now() - timedelta(days=policy.generator_days)
            return [(each, "age") for each in found if each.created_at < oldest]
        return []

    def seal(self, generator: Generator, version: ModelVersion, dataset: str, actor: str = OPERATOR) -> list[str]:
        """Put `dataset`, D' with all masks in it, in the place of a generator's D'; the digests to be deleted now.

        `version`, the latest, becomes what later requests label and measure with. The generator itself, which
        could draw again what was sealed away, is destroyed too, unless another generator in use has its weights, and
        the root's weights where the policy says so.
        Raises AlreadyExists where it is sealed or retired, TransitionRefused while a request of its model runs or
        where `version` is not the latest.
        """
        check_actor(actor)
        with self._database.writing(f"generator {generator.id}") as connection:
            line = rows.fetch_model(connection, generator.model)
            now_so = rows.to_generator(rows.fetch_by_id(connection, rows.GENERATORS, generators, generator.id))
            if now_so.sealed is not None or now_so.retired is not None:
                raise AlreadyExists(f"generator {generator.id} is {'retired' if now_so.retired else 'sealed'} already")
            _check_idle(connection, generator)
            latest = rows.fetch_version(connection, line)
            if latest.number != version.number:
                raise TransitionRefused(f"version {version.number} is no longer the latest; seal again")
            moment = rows.now()
            values: dict[str, Any] = {"id": rows.new_id("s"), "generator_id": generator.id, "model_id": line.id}
            values |= {"version": version.number, "dataset": dataset, "created_at": moment, "actor": actor}
            chain.insert(connection, "sealed", seals, values, actor=actor, model=line.name)
            gone = _unshared(connection, now_so)
            if fetch_policy(connection, line).seal == "root":
                gone |= _root_weights(connection, line, version)
            return _remove(connection, gone, "sealed", actor, line.name, generator=generator.id)

    def sealed_root(self, model: str, base: ModelVersion) -> ModelVersion:
        """The version that labels D' for requests on top of `base`: that of its root's latest seal, else its root."""
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            return rows.fetch_sealed_root(connection, line, base)

    def check_import(self, model: str, weights: str, recipe: Recipe) -> None:
        """Raise what `import_generator` would raise for these weights now, but for the version."""
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            root = rows.fetch_sealed_root(connection, line, rows.fetch_version(connection, line))
            _check_new(connection, line, root, weights, recipe)

    def import_generator(
        self,
        model: str,
        root: ModelVersion,
        recipe: Recipe,
        weights: str,
        dataset: str,
        figures: Mapping[str, Any],
        actor: str = OPERATOR,
    ) -> Generator:
        """Keep a generator that was trained elsewhere, with the D' that was drawn from it by `recipe` and labelled by
        `root`: requests with that recipe are offered it like one of the line's own.

        Raises NotFound, AlreadyExists where a generator in use has these weights, this root and this recipe,
        TransitionRefused where another version labels D' by now.
        """
        check_actor(actor)
        with self._database.writing(f"the generator for {model!r}") as connection:
            line = rows.fetch_model(connection, model)
            now_so = rows.fetch_sealed_root(connection, line, rows.fetch_version(connection, line))
            if now_so.number != root.number:
                raise TransitionRefused(f"version {now_so.number} of {model!r} labels D' by now; import again")
            _check_new(connection, line, root, weights, recipe)
            values: dict[str, Any] = {"id": rows.new_id("g"), "model_id": line.id, "root": root.number}
            values |= {"spec": line.spec.model_dump(mode="json"), "recipe_digest": recipe.generator_digest}
            values |= {"weights": weights, "dataset": dataset, "origin": "imported", "figures": dict(figures)}
            values["created_at"] = rows.now()
            chain.insert(connection, "generator_imported", generators, values, actor=actor, model=line.name)
            return rows.to_generator(rows.fetch_by_id(connection, rows.GENERATORS, generators, values["id"]))

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
                purged = sa.exists().where(removals.c.request_id == requests.c.id)
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
            return _remove(connection, {request.samples}, "purged", actor, request.model, request=request.id)

    def discard(self, digests: Iterable[str], actor: str = OPERATOR) -> list[str]:
        """Record that artifacts which nothing refers to are deleted; the digests to be deleted now."""
        check_actor(actor)
        with self._database.writing("the artifacts") as connection:
            return _remove(connection, digests, "unreferenced", actor, None)

    def references(self) -> tuple[set[str], set[str]]:
        """The digests that the ledger needs, and those that it refers to but has recorded as removed."""
        with self._database.reading() as connection:
            named: dict[str, datetime] = {}
            for columns, at in (
                ((model_versions.c.weights,), model_versions.c.created_at),
                ((generators.c.weights, generators.c.dataset), generators.c.created_at),
                ((erasures.c.mask, erasures.c.probes), erasures.c.created_at),
                ((requests.c.samples,), requests.c.submitted_at),
                ((seals.c.dataset,), seals.c.created_at),
            ):
                for column in columns:
                    for digest, newest in connection.execute(sa.select(column, sa.func.max(at)).group_by(column)):
                        named[digest] = max(named.get(digest, newest), newest)
            taken = sa.select(removals.c.digest, sa.func.max(removals.c.created_at)).group_by(removals.c.digest)
            gone = {row[0]: row[1] for row in connection.execute(taken)}
        removed = {digest for digest, at in named.items() if digest in gone and gone[digest] >= at}
        return set(named) - removed, removed

    def oldest_run(self) -> datetime | None:
        """When the oldest of the running requests began, None without one: what came later may be its work."""
        with self._database.reading() as connection:
            query = sa.select(sa.func.min(requests.c.started_at)).where(requests.c.status == Status.RUNNING)
            oldest: datetime | None = connection.execute(query).scalar_one()
            return oldest


def _check_idle(connection: sa.Connection, generator: Generator) -> None:
    """Raise TransitionRefused while a request runs that may be using a generator."""
    line = rows.fetch_model(connection, generator.model)
    using = sa.or_(requests.c.model_id == line.id, requests.c.generator_id == generator.id)
    found = connection.execute(rows.REQUESTS.where(using, requests.c.status == Status.RUNNING).limit(1)).mappings()
    for running in found:
        raise TransitionRefused(
            f"request {running['id']} of {running['model']!r} is running; try again when it has ended"
        )


def _check_new(connection: sa.Connection, model: Model, root: ModelVersion, weights: str, recipe: Recipe) -> None:
    """Raise AlreadyExists where a generator of the model in use has the same weights, labels and recipe."""
    same = rows.GENERATORS.where(
        generators.c.model_id == model.id,
        generators.c.weights == weights,
        generators.c.root == root.number,
        generators.c.recipe_digest == recipe.generator_digest,
        generator_retirements.c.id.is_(None),
        seals.c.id.is_(None),
    )
    for found in connection.execute(same.limit(1)).mappings():
        raise AlreadyExists(f"generator {found['id']} of {model.name!r} has these weights already; use it")


def _unshared(connection: sa.Connection, generator: Generator) -> set[str]:
    """The digests of a generator's artifacts, without those that another one in use needs too."""
    own = {generator.weights, generator.dataset}
    columns = (generators.c.weights, generators.c.dataset, seals.c.dataset)
    others = rows.GENERATORS.where(
        generators.c.id != generator.id,
        generator_retirements.c.id.is_(None),
        sa.or_(*(column.in_(own) for column in columns)),
    )
    for row in connection.execute(others).mappings():
        other = rows.to_generator(row)
        own -= {other.dataset} if other.sealed else {other.dataset, other.weights}
    return own


def _retire(connection: sa.Connection, found: Generator, why: Why, actor: str) -> tuple[Generator, list[str]]:
    values: dict[str, Any] = {"id": rows.new_id("t"), "generator_id": found.id, "reason": why}
    values |= {"created_at": rows.now(), "actor": actor}
    chain.insert(connection, "generator_retired", generator_retirements, values, actor=actor, model=found.model)
    gone = _remove(connection, _unshared(connection, found), "retired", actor, found.model, generator=found.id)
    again = rows.fetch_by_id(connection, rows.GENERATORS, generators, found.id)
    return rows.to_generator(again), gone


def _root_weights(connection: sa.Connection, model: Model, version: ModelVersion) -> set[str]:
    """The weights of a version's root, which still has everything; none where the version is its own root."""
    return {rows.fetch_version(connection, model, version.root).weights} - {version.weights}


def _remove(
    connection: sa.Connection,
    digests: Iterable[str],
    reason: str,
    actor: str,
    model: str | None,
    *,
    request: str | None = None,
    generator: str | None = None,
) -> list[str]:
    removed = sorted(set(digests))
    for digest in removed:
        values: dict[str, Any] = {"id": rows.new_id("x"), "digest": digest, "reason": reason, "request_id": request}
        values |= {"generator_id": generator, "created_at": rows.now(), "actor": actor}
        chain.insert(connection, "removed", removals, values, actor=actor, model=model, request=request)
    return removed
