"""Recipes that a search has found for a model line: which one is in force, and which requests have one of them.

A recipe that was found for a class serves class requests, one for a subset serves subset requests. The newest of a
kind is in force, until a reset says that a preset serves again. Where a request's recipe is from is stored nowhere
but in its report: it is the search that had found this very recipe when the request was submitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, get_args

import sqlalchemy as sa

from fsu_ray.errors import UserError
from fsu_ray.recipes import Recipe
from fsu_ray.records import Kind, Model, Request, SearchedRecipe
from fsu_ray.storage import chain, rows
from fsu_ray.storage.database import Database
from fsu_ray.storage.policies import OPERATOR, check_actor
from fsu_ray.storage.schema import models, requests, searches


class Recipes:
    """The ledger's searched recipes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def keep(
        self, model: str, kind: Kind, recipe: Recipe, score: float, evidence: Mapping[str, Any], actor: str = OPERATOR
    ) -> SearchedRecipe:
        """Put a recipe that a search found in force for the requests of one kind; the earlier ones stay on record.

        `score` is the search's own, higher is better; `evidence` is JSON, what it measured: figures and short names,
        no paths and no words of a requester. Raises NotFound, and UserError for a kind that is none, an actor that
        is no opaque id, or a score that is no number.
        """
        if not math.isfinite(score):
            raise UserError(f"the search of {model!r} has the score {score}: it measured nothing, no recipe is kept")
        found = {"recipe": recipe.model_dump(mode="json"), "recipe_digest": recipe.digest, "score": float(score)}
        return self._keep(model, kind, "recipe_found", {**found, "evidence": dict(evidence)}, actor)

    def reset(self, model: str, kind: Kind, actor: str = OPERATOR) -> SearchedRecipe:
        """Have a preset serve the requests of one kind again. Requests that have a recipe already keep it.

        Raises NotFound, and UserError where no searched recipe is in force, for a kind that is none, and for an actor
        that is no opaque id.
        """
        return self._keep(model, kind, "recipe_reset", {"evidence": {}}, actor)

    def _keep(self, model: str, kind: Kind, event: str, found: dict[str, Any], actor: str) -> SearchedRecipe:
        _check_kind(kind)
        check_actor(actor)
        with self._database.writing(f"model {model!r}") as connection:
            line = rows.fetch_model(connection, model)
            if "recipe" not in found and _in_force(connection, line, kind) is None:
                raise UserError(f"{kind} requests of {model!r} have no searched recipe to reset: a preset serves them")
            values: dict[str, Any] = {"id": rows.new_id("s"), "model_id": line.id, "kind": kind, **found}
            values |= {"created_at": rows.now_after(_last(connection, line, kind)), "actor": actor}
            chain.insert(connection, event, searches, values, actor=actor, model=model)
            kept = _SEARCHES.where(searches.c.id == values["id"])
            return _to_searched(connection.execute(kept).mappings().one())

    def in_force(self, model: str, kind: Kind) -> SearchedRecipe | None:
        """The searched recipe in force for the requests of one kind, None where a preset serves.

        Raises NotFound, and UserError for a kind that is none.
        """
        _check_kind(kind)
        with self._database.reading() as connection:
            return _in_force(connection, rows.fetch_model(connection, model), kind)

    def all(self, model: str) -> list[SearchedRecipe]:
        """All recipes that were found for a model, and the resets between them, oldest first; raises NotFound."""
        with self._database.reading() as connection:
            query = _SEARCHES.where(searches.c.model_id == rows.fetch_model(connection, model).id)
            ordered = query.order_by(searches.c.created_at, searches.c.id)
            return [_to_searched(row) for row in connection.execute(ordered).mappings()]

    def origin(self, request: Request) -> SearchedRecipe | None:
        """The search that had found a request's recipe when it was submitted, None without one."""
        with self._database.reading() as connection:
            return _origin(connection, request)


def origins(connection: sa.Connection, asked: Iterable[Request]) -> dict[str, str | None]:
    """The id of each request's `Searches.origin`, by the request's own."""
    found = {request.id: _origin(connection, request) for request in asked}
    return {request: None if search is None else search.id for request, search in found.items()}


def newest(connection: sa.Connection, model: Model, kind: str) -> datetime | None:
    """When the last recipe of a kind was found or reset: what is submitted now comes after it."""
    of_kind = (searches.c.model_id == model.id, searches.c.kind == kind)
    last: datetime | None = connection.scalar(sa.select(sa.func.max(searches.c.created_at)).where(*of_kind))
    return last


_SEARCHES = sa.select(searches, models.c.name.label("model")).join(models, models.c.id == searches.c.model_id)
_NEWEST_FIRST = _SEARCHES.order_by(searches.c.created_at.desc(), searches.c.id.desc())


def _last(connection: sa.Connection, model: Model, kind: str) -> datetime | None:
    """The last moment that what is found now comes after: of a search of this kind, or of a request."""
    asked = sa.select(sa.func.max(requests.c.submitted_at)).where(requests.c.model_id == model.id)
    return max(filter(None, (newest(connection, model, kind), connection.scalar(asked))), default=None)


def _in_force(connection: sa.Connection, model: Model, kind: str) -> SearchedRecipe | None:
    query = _NEWEST_FIRST.where(searches.c.model_id == model.id, searches.c.kind == kind).limit(1)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None or row["recipe"] is None else _to_searched(row)


def _origin(connection: sa.Connection, request: Request) -> SearchedRecipe | None:
    """The recipes themselves are compared: a digest that was stored says nothing of a field that came later."""
    earlier = _NEWEST_FIRST.where(
        models.c.name == request.model,
        searches.c.kind == request.behaviour.kind,
        searches.c.created_at < request.submitted_at,
    )
    for row in connection.execute(earlier).mappings():
        found = _to_searched(row)
        if found.recipe == request.recipe:
            return found
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
