"""Recipes that a search found for a model: which one is in force, and which requests have one of them.

A recipe that was found for a class serves class requests, a recipe for a subset serves subset requests. The newest of a
kind is in force, until a reset puts a preset in force again. Only a request's report stores the origin of its recipe:
the search that had found an equal recipe before the request was submitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, get_args

import sqlalchemy as sa

from fsu_ray.errors import UserError
from fsu_ray.recipes import Recipe
from fsu_ray.records import OPERATOR, Kind, Model, Request, SearchedRecipe
from fsu_ray.storage import chain, rows
from fsu_ray.storage.database import Database
from fsu_ray.storage.schema import models, requests, searches


class Recipes:
    """The ledger's searched recipes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def keep(
        self, model: str, kind: Kind, recipe: Recipe, score: float, evidence: Mapping[str, Any], actor: str = OPERATOR
    ) -> SearchedRecipe:
        """Put a recipe that a search found in force for the requests of one kind; the earlier ones stay on record.

        `score` is the search's own, higher is better. `evidence` is what the search measured, as JSON: metrics and
        short names, no paths and no words of a requester. Raises NotFound, and UserError for an unknown kind, an actor
        that is no opaque id, or a score that is not finite.
        """
        if not math.isfinite(score):
            raise UserError(f"the search of {model!r} has the score {score}: it measured nothing, no recipe is kept")
        columns = {"recipe": recipe.model_dump(mode="json"), "recipe_digest": recipe.digest, "score": float(score)}
        return self._insert(model, kind, "recipe_found", {**columns, "evidence": dict(evidence)}, actor)

    def reset(self, model: str, kind: Kind, actor: str = OPERATOR) -> SearchedRecipe:
        """Put a preset in force again for the requests of one kind. Submitted requests keep their recipes.

        Raises NotFound, and UserError where no searched recipe is in force, for an unknown kind, and for an actor
        that is no opaque id.
        """
        return self._insert(model, kind, "recipe_reset", {"evidence": {}}, actor)

    def _insert(self, model: str, kind: Kind, event: str, columns: dict[str, Any], actor: str) -> SearchedRecipe:
        _check_kind(kind)
        with self._database.writing(f"model {model!r}", actor) as connection:
            record = rows.fetch_model(connection, model)
            if "recipe" not in columns and _in_force(connection, record, kind) is None:
                raise UserError(f"{kind} requests of {model!r} have no searched recipe to reset: a preset serves them")
            values: dict[str, Any] = {"id": rows.new_id("s"), "model_id": record.id, "kind": kind, **columns}
            values["created_at"] = rows.now_after(_last(connection, record, kind))
            chain.insert(connection, event, searches, values, actor=actor, model=model)
            inserted = _SEARCHES.where(searches.c.id == values["id"])
            return _to_searched(connection.execute(inserted).mappings().one())

    def in_force(self, model: str, kind: Kind) -> SearchedRecipe | None:
        """The searched recipe in force for the requests of one kind, None where a preset is.

        Raises NotFound, and UserError for an unknown kind.
        """
        _check_kind(kind)
        with self._database.reading() as connection:
            return _in_force(connection, rows.fetch_model(connection, model), kind)

    def all(self, model: str) -> list[SearchedRecipe]:
        """All searched recipes of a model and the resets between them, oldest first; raises NotFound."""
        with self._database.reading() as connection:
            query = rows.of_model(connection, _SEARCHES, searches, model).order_by(*rows.oldest_first(searches))
            return [_to_searched(row) for row in connection.execute(query).mappings()]

    def origin(self, request: Request) -> SearchedRecipe | None:
        """The search that had found a request's recipe before it was submitted, None without one."""
        with self._database.reading() as connection:
            return _origin(connection, request)


def origins(connection: sa.Connection, batch: Iterable[Request]) -> dict[str, str | None]:
    """The id of each request's search (`Recipes.origin`), by the id of the request."""
    searched = {request.id: _origin(connection, request) for request in batch}
    return {request: None if origin is None else origin.id for request, origin in searched.items()}


def newest(connection: sa.Connection, model: Model, kind: str) -> datetime | None:
    """When a recipe of a kind was last found or reset: a request that is submitted now must come after it."""
    of_kind = (searches.c.model_id == model.id, searches.c.kind == kind)
    last: datetime | None = connection.scalar(sa.select(sa.func.max(searches.c.created_at)).where(*of_kind))
    return last


_SEARCHES = rows.with_model(searches)
_NEWEST_FIRST = _SEARCHES.order_by(*rows.newest_first(searches))


def _last(connection: sa.Connection, model: Model, kind: str) -> datetime | None:
    """When the last search of a kind or the last request of a model was recorded: a new search must come after it."""
    submitted = sa.select(sa.func.max(requests.c.submitted_at)).where(requests.c.model_id == model.id)
    return max(filter(None, (newest(connection, model, kind), connection.scalar(submitted))), default=None)


def _in_force(connection: sa.Connection, model: Model, kind: str) -> SearchedRecipe | None:
    query = _NEWEST_FIRST.where(searches.c.model_id == model.id, searches.c.kind == kind).limit(1)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None or row["recipe"] is None else _to_searched(row)


def _origin(connection: sa.Connection, request: Request) -> SearchedRecipe | None:
    """Compares the recipes, not their digests: a stored digest does not cover a field that was added later."""
    earlier = _NEWEST_FIRST.where(
        models.c.name == request.model,
        searches.c.kind == request.behaviour.kind,
        searches.c.created_at < request.submitted_at,
    )
    for row in connection.execute(earlier).mappings():
        searched = _to_searched(row)
        if searched.recipe == request.recipe:
            return searched
    return None


def _to_searched(row: sa.RowMapping) -> SearchedRecipe:
    return SearchedRecipe(
        id=row["id"],
        model=row["model"],
        kind=row["kind"],
        recipe=None if row["recipe"] is None else Recipe.model_validate(row["recipe"]),
        score=row["score"],
        evidence=row["evidence"],
        created_at=row["created_at"],
        actor=row["actor"],
    )


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise UserError(f"no kind {kind!r} of requests: use {' or '.join(get_args(Kind))}")
