"""A model's history as one list of events, derived from the rows of the ledger: nothing is stored twice."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from fsu_ray.records import Model, Request, Status
from fsu_ray.storage import rows
from fsu_ray.storage.schema import erasures, generators, model_versions, requests

# What happens at one moment, in the order in which one leads to the other.
_ORDER = (
    "registered",
    "version_added",
    "submitted",
    "generator_trained",
    "generator_warm_started",
    "generator_reused",
    "erased",
    "rejected",
    "failed",
    "cancelled",
)


def history(connection: sa.Connection, model: Model) -> list[dict[str, Any]]:
    """The events of a model, oldest first; see `Ledger.history` for their form."""
    events = [
        *_of_versions(connection, model),
        *_of_requests(connection, model),
        *_of_generators(connection, model),
        *_of_erasures(connection, model),
    ]
    return sorted(events, key=lambda event: (event["at"], _ORDER.index(event["event"])))


def _event(at: datetime, event: str, version: int | None, request: str | None, **detail: Any) -> dict[str, Any]:
    return {"at": at, "event": event, "version": version, "request": request, "detail": detail}


def _of_versions(connection: sa.Connection, model: Model) -> list[dict[str, Any]]:
    query = rows.VERSIONS.where(model_versions.c.model_id == model.id, model_versions.c.request_id.is_(None))
    versions = [rows.to_version(row) for row in connection.execute(query).mappings()]
    return [
        _event(version.created_at, "registered", 1, None, weights=version.weights, arch=model.spec.arch)
        if version.number == 1
        else _event(version.created_at, "version_added", version.number, None, weights=version.weights)
        for version in versions
    ]


def _of_requests(connection: sa.Connection, model: Model) -> list[dict[str, Any]]:
    query = rows.REQUESTS.where(requests.c.model_id == model.id)
    events = []
    for request in [rows.to_request(row) for row in connection.execute(query).mappings()]:
        behaviour = request.behaviour
        asked = {"behaviour": behaviour.name, "kind": behaviour.kind, "targets": list(behaviour.targets)}
        events.append(
            _event(request.submitted_at, "submitted", None, request.id, **asked, sample_count=request.sample_count)
        )
        if request.finished_at is None or request.status is Status.SUCCEEDED:
            continue
        ending = {"behaviour": behaviour.name, "reason": request.reason}
        events.append(_event(request.finished_at, request.status.value, None, request.id, **ending))
        generator = _reused(request)
        if generator is not None:
            events.append(_event(request.finished_at, "generator_reused", None, request.id, generator=generator))
    return events


def _reused(request: Request) -> str | None:
    """The generator that a request without an erasure reused, from its report."""
    generator = (request.report or {}).get("generator", {})
    return str(generator["id"]) if generator.get("use") == "reused" else None


def _of_generators(connection: sa.Connection, model: Model) -> list[dict[str, Any]]:
    query = rows.GENERATORS.where(generators.c.model_id == model.id)
    events = []
    for generator in [rows.to_generator(row) for row in connection.execute(query).mappings()]:
        detail = {"generator": generator.id}
        if generator.warm_started_from is not None:
            detail["from"] = generator.warm_started_from
        events.append(_event(generator.created_at, f"generator_{generator.origin}", None, generator.request, **detail))
    return events


def _of_erasures(connection: sa.Connection, model: Model) -> list[dict[str, Any]]:
    query = rows.ERASURES.where(erasures.c.model_id == model.id)
    events = []
    for erasure in [rows.to_erasure(row) for row in connection.execute(query).mappings()]:
        if erasure.generator_use == "reused":
            detail = {"generator": erasure.generator}
            events.append(_event(erasure.created_at, "generator_reused", erasure.version, erasure.request, **detail))
        behaviour = erasure.behaviour
        gone = {"behaviour": behaviour.name, "kind": behaviour.kind, "targets": list(behaviour.targets)}
        events.append(_event(erasure.created_at, "erased", erasure.version, erasure.request, **gone))
    return events
