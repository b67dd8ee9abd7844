"""Generators and their synthetic sets D': listing, importing, retiring and sealing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import sqlalchemy as sa

from fsu_ray.errors import AlreadyExists, TransitionRefused
from fsu_ray.recipes import Recipe
from fsu_ray.records import OPERATOR, Digest, Generator, Model, ModelVersion
from fsu_ray.storage import chain, removals, rows
from fsu_ray.storage.claims import check_idle
from fsu_ray.storage.database import Database
from fsu_ray.storage.schema import erasures, generator_retirements, generators, seals

Why = Literal["operator", "erasure", "age", "seal"]
"""Why a generator is retired."""


class Generators:
    """The ledger's generators.

    An artifact that is to be destroyed is recorded as removed first and deleted afterwards. A crash between the two
    leaves a file, which `audit verify` reports and `artifacts gc` deletes.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self, model: str | None = None) -> list[Generator]:
        """Generators, oldest first; raises NotFound for an unknown model."""
        with self._database.reading() as connection:
            query = rows.GENERATORS.order_by(*rows.oldest_first(generators))
            query = rows.of_model(connection, query, generators, model)
            return [rows.to_generator(row) for row in connection.execute(query).mappings()]

    def get(self, id_or_prefix: str) -> Generator:
        """One generator; raises NotFound where the prefix fits none or several."""
        with self._database.reading() as connection:
            return rows.fetch_generator(connection, id_or_prefix)

    def uses(self, model: str | None = None) -> dict[str, int]:
        """The number of erasures in force that each generator served, by its id; raises NotFound."""
        uses: Counter[str] = Counter()
        with self._database.reading() as connection:
            for record in rows.fetch_models(connection, model):
                latest = rows.fetch_version(connection, record).number
                served = sa.select(erasures.c.generator_id).where(rows.in_force(record, latest))
                uses.update(connection.scalars(served))
        return uses

    def check_import(self, model: str, weights: Digest, recipe: Recipe) -> None:
        """Raise what `add_imported` would raise for these weights now, except for the version."""
        with self._database.reading() as connection:
            record = rows.fetch_model(connection, model)
            root = rows.fetch_sealed_root(connection, record, rows.fetch_version(connection, record))
            _check_new(connection, record, root, weights, recipe)

    def add_imported(
        self,
        model: str,
        root: ModelVersion,
        recipe: Recipe,
        weights: Digest,
        dataset: Digest,
        metrics: Mapping[str, Any],
        actor: str = OPERATOR,
    ) -> Generator:
        """Add a generator that was trained elsewhere, with the D' that was drawn from it by `recipe` and labelled by
        `root`. Requests with that recipe may reuse it like a generator of the model's own.

        Raises NotFound, AlreadyExists where a generator in use has these weights, this root and this recipe,
        TransitionRefused where another version labels D' by now.
        """
        with self._database.writing(f"the generator for {model!r}", actor) as connection:
            record = rows.fetch_model(connection, model)
            current_root = rows.fetch_sealed_root(connection, record, rows.fetch_version(connection, record))
            if current_root.number != root.number:
                raise TransitionRefused(f"version {current_root.number} of {model!r} labels D' by now; import again")
            _check_new(connection, record, root, weights, recipe)
            values: dict[str, Any] = {"id": rows.new_id("g"), "model_id": record.id, "root": root.number}
            values |= {"spec": record.spec.model_dump(mode="json"), "recipe_digest": recipe.generator_digest}
            values |= {"weights": weights, "dataset": dataset, "origin": "imported", "figures": dict(metrics)}
            values["created_at"] = rows.now()
            chain.insert(connection, "generator_imported", generators, values, actor=actor, model=record.name)
            return rows.fetch_generator(connection, values["id"])

    def due(self, model: str) -> list[tuple[Generator, Why]]:
        """The generators that the model's policy wants retired now, and why; raises NotFound."""
        with self._database.reading() as connection:
            record = rows.fetch_model(connection, model)
            policy = rows.fetch_policy(connection, record)
            query = rows.GENERATORS.where(generators.c.model_id == record.id, rows.NOT_RETIRED)
            candidates = [rows.to_generator(row) for row in connection.execute(query).mappings()]
        if policy.generators == "retire-after-erasure":
            return [(g, "erasure") for g in candidates if g.taints and g.sealed is None]
        if policy.generator_days is not None:
            oldest = rows.now() - timedelta(days=policy.generator_days)
            return [(g, "age") for g in candidates if g.created_at < oldest]
        return []

    def retire(self, id_or_prefix: str, why: Why = "operator", actor: str = OPERATOR) -> tuple[Generator, list[Digest]]:
        """Retire a generator: no request may use it any more. Also the digests of its artifacts, to be deleted now,
        except for those that another generator in use has too (a transferred generator shares its weights).

        Raises NotFound, AlreadyExists where it is retired, TransitionRefused while a request of its model runs, or a
        request that asks for it.
        """
        with self._database.writing(f"generator {id_or_prefix}", actor) as connection:
            generator = rows.fetch_generator(connection, id_or_prefix)
            if generator.retired is not None:
                raise AlreadyExists(f"generator {generator.id} is retired already ({generator.retired})")
            check_idle(connection, rows.fetch_model(connection, generator.model), generator.id)
            values: dict[str, Any] = {"id": rows.new_id("t"), "generator_id": generator.id, "reason": why}
            chain.insert(
                connection, "generator_retired", generator_retirements, values, actor=actor, model=generator.model
            )
            removed = removals.record(
                connection, _unshared(connection, generator), "retired", actor, generator.model, generator=generator.id
            )
            return rows.fetch_generator(connection, generator.id), removed

    def seal(self, generator: Generator, version: ModelVersion, dataset: Digest, actor: str = OPERATOR) -> list[Digest]:
        """Replace a generator's D' by `dataset`, D' with all masks applied; the digests to be deleted now.

        `version`, the latest, is the root of later requests: it labels and measures. The generator's weights, from
        which the erased behaviours could be drawn again, are destroyed too unless another generator in use has them,
        and so are the root's weights where the policy says so.

        Raises AlreadyExists where the generator is sealed or retired, TransitionRefused while a request of its model
        runs, or where `version` is not the latest.
        """
        with self._database.writing(f"generator {generator.id}", actor) as connection:
            record = rows.fetch_model(connection, generator.model)
            current = rows.fetch_generator(connection, generator.id)
            if current.sealed is not None or current.retired is not None:
                state = "retired" if current.retired else "sealed"
                raise AlreadyExists(f"generator {generator.id} is {state} already")
            check_idle(connection, record, generator.id)
            latest = rows.fetch_version(connection, record)
            if latest.number != version.number:
                raise TransitionRefused(f"version {version.number} is no longer the latest; seal again")
            values: dict[str, Any] = {"id": rows.new_id("s"), "generator_id": generator.id, "model_id": record.id}
            values |= {"version": version.number, "dataset": dataset}
            chain.insert(connection, "sealed", seals, values, actor=actor, model=record.name)
            destroyed = _unshared(connection, current)
            if rows.fetch_policy(connection, record).seal == "root":
                destroyed |= _root_weights(connection, record, version)
            return removals.record(connection, destroyed, "sealed", actor, record.name, generator=generator.id)


def _check_new(connection: sa.Connection, model: Model, root: ModelVersion, weights: Digest, recipe: Recipe) -> None:
    """Raise AlreadyExists where a generator of the model in use has the same weights, root and recipe."""
    same = rows.GENERATORS.where(
        generators.c.model_id == model.id,
        generators.c.weights == weights,
        generators.c.root == root.number,
        generators.c.recipe_digest == recipe.generator_digest,
        rows.NOT_RETIRED,
        rows.NOT_SEALED,
    )
    for row in connection.execute(same.limit(1)).mappings():
        raise AlreadyExists(f"generator {row['id']} of {model.name!r} has these weights already; use it")


def _unshared(connection: sa.Connection, generator: Generator) -> set[Digest]:
    """The digests of a generator's artifacts, without those that another generator in use needs too."""
    digests = {generator.weights, generator.dataset}
    columns = (generators.c.weights, generators.c.dataset, seals.c.dataset)
    others = rows.GENERATORS.where(
        generators.c.id != generator.id, rows.NOT_RETIRED, sa.or_(*(column.in_(digests) for column in columns))
    )
    for row in connection.execute(others).mappings():
        other = rows.to_generator(row)
        digests -= {other.dataset} if other.sealed else {other.dataset, other.weights}
    return digests


def _root_weights(connection: sa.Connection, model: Model, version: ModelVersion) -> set[Digest]:
    """The weights of a version's root, which still has every behaviour; empty where the version is its own root."""
    return {rows.fetch_version(connection, model, version.root).weights} - {version.weights}
