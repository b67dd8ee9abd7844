"""Generators and their D': which there are, when they are retired or sealed, and which artifacts are really gone."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import sqlalchemy as sa

from fsu_ray.errors import AlreadyExists, TransitionRefused
from fsu_ray.recipes import Recipe
from fsu_ray.records import Generator, Model, ModelVersion, Status
from fsu_ray.storage import chain, removals, rows
from fsu_ray.storage.database import Database
from fsu_ray.storage.policies import OPERATOR, check_actor, fetch_policy
from fsu_ray.storage.schema import (
    generator_retirements,
    generators,
    requests,
    seals,
)

Why = Literal["operator", "erasure", "age", "seal"]


class Generators:
    """The ledger's generators, and the artifacts that have been taken out of the store for good.

    What is to be destroyed is recorded first and deleted afterwards: a crash between the two leaves a file
    that the ledger says is gone, which `audit verify` reports and `artifacts gc` deletes.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self, model: str | None = None) -> list[Generator]:
        """Generators, oldest first; raises NotFound for a model that is not there."""
        query = rows.GENERATORS.order_by(generators.c.created_at, generators.c.id)
        with self._database.reading() as connection:
            if model is not None:
                query = query.where(generators.c.model_id == rows.fetch_model(connection, model).id)
            return [rows.to_generator(row) for row in connection.execute(query).mappings()]

    def get(self, id_or_prefix: str) -> Generator:
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

    def due(self, model: str) -> list[tuple[Generator, Why]]:
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
            return removals.record(connection, gone, "sealed", actor, line.name, generator=generator.id)

    def check_import(self, model: str, weights: str, recipe: Recipe) -> None:
        """Raise what `import_generator` would raise for these weights now, but for the version."""
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            root = rows.fetch_sealed_root(connection, line, rows.fetch_version(connection, line))
            _check_new(connection, line, root, weights, recipe)

    def add_imported(
        self,
        model: str,
        root: ModelVersion,
        recipe: Recipe,
        weights: str,
        dataset: str,
        metrics: Mapping[str, Any],
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
            values |= {"weights": weights, "dataset": dataset, "origin": "imported", "figures": dict(metrics)}
            values["created_at"] = rows.now()
            chain.insert(connection, "generator_imported", generators, values, actor=actor, model=line.name)
            return rows.to_generator(rows.fetch_by_id(connection, rows.GENERATORS, generators, values["id"]))


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
    gone = removals.record(connection, _unshared(connection, found), "retired", actor, found.model, generator=found.id)
    again = rows.fetch_by_id(connection, rows.GENERATORS, generators, found.id)
    return rows.to_generator(again), gone


def _root_weights(connection: sa.Connection, model: Model, version: ModelVersion) -> set[str]:
    """The weights of a version's root, which still has everything; none where the version is its own root."""
    return {rows.fetch_version(connection, model, version.root).weights} - {version.weights}
