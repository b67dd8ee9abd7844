"""A model's history as one list of events. It is derived from the rows of the ledger and stored nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from fsu_ray.records import Model, Status
from fsu_ray.storage import rows
from fsu_ray.storage.schema import (
    aliases_history,
    erasures,
    generator_retirements,
    generators,
    model_policies,
    model_versions,
    rechecks,
    removals,
    request_events,
    requests,
    seals,
    searches,
)

# The order of events with the same moment: causes before effects.
_ORDER = (
    "registered",
    "policy_set",
    "recipe_found",
    "recipe_reset",
    "version_added",
    "submitted",
    "approved",
    "denied",
    "generator_trained",
    "generator_warm_started",
    "generator_imported",
    "generator_transferred",
    "generator_reused",
    "erased",
    "rejected",
    "failed",
    "cancelled",
    "rechecked",
    "recheck_failed",
    "alias_moved",
    "generator_retired",
    "sealed",
    "purged",
)

Event = dict[str, Any]


def history(connection: sa.Connection, model: Model) -> list[Event]:
    """The events of a model, oldest first; `Models.history` documents their form."""
    sources = (
        _of_versions,
        _of_policies,
        _of_searches,
        _of_requests,
        _of_decisions,
        _of_generators,
        _of_erasures,
        _of_rechecks,
        _of_aliases,
        _of_retirements,
        _of_seals,
        _of_purges,
    )
    events = [event for source in sources for event in source(connection, model)]
    return sorted(events, key=lambda event: (event["at"], _ORDER.index(event["event"])))


def _event(at: datetime, event: str, version: int | None, request: str | None, **detail: Any) -> Event:
    return {"at": at, "event": event, "version": version, "request": request, "detail": detail}


def _behaviour(row: Mapping[Any, Any]) -> dict[str, Any]:
    name, kind, targets = (row[column] for column in rows.BEHAVIOUR)
    return {"behaviour": name, "kind": kind, "targets": targets}


def _of_versions(connection: sa.Connection, model: Model) -> list[Event]:
    query = rows.VERSIONS.where(model_versions.c.model_id == model.id, model_versions.c.request_id.is_(None))
    versions = [rows.to_version(row) for row in connection.execute(query).mappings()]
    return [
        _event(version.created_at, "registered", 1, None, weights=version.weights, arch=model.spec.arch)
        if version.number == 1
        else _event(version.created_at, "version_added", version.number, None, weights=version.weights)
        for version in versions
    ]


def _of_policies(connection: sa.Connection, model: Model) -> list[Event]:
    query = sa.select(model_policies).where(model_policies.c.model_id == model.id)
    return [
        _event(row.created_at, "policy_set", None, None, **row.policy, by=row.actor)
        for row in connection.execute(query)
    ]


def _of_searches(connection: sa.Connection, model: Model) -> list[Event]:
    query = sa.select(searches).where(searches.c.model_id == model.id)
    return [
        _event(row.created_at, "recipe_reset", None, None, kind=row.kind, by=row.actor)
        if row.recipe is None
        else _event(
            row.created_at, "recipe_found", None, None, search=row.id, kind=row.kind, score=row.score, by=row.actor
        )
        for row in connection.execute(query)
    ]


def _of_requests(connection: sa.Connection, model: Model) -> list[Event]:
    of_model = requests.c.model_id == model.id
    terms = sa.select(requests.c.id, requests.c.submitted_at, requests.c.sample_count, *_behaviour_columns(requests))
    events = [
        _event(row["submitted_at"], "submitted", None, row["id"], **_behaviour(row), sample_count=row["sample_count"])
        for row in connection.execute(terms.where(of_model).order_by(requests.c.id)).mappings()
    ]
    without_version = (Status.REJECTED, Status.FAILED, Status.CANCELLED)
    ended = sa.select(requests).where(of_model, requests.c.status.in_(without_version), ~_denied())
    for row in connection.execute(ended.order_by(requests.c.id)).mappings():
        detail = {"behaviour": row["behaviour_name"], "reason": row["reason"]}
        events.append(_event(row["finished_at"], row["status"], None, row["id"], **detail))
        generator = _reused(row["report"])
        if generator is not None:
            events.append(_event(row["finished_at"], "generator_reused", None, row["id"], generator=generator))
    return events


def _behaviour_columns(table: sa.Table) -> list[sa.Column[Any]]:
    return [table.c[name] for name in rows.BEHAVIOUR]


def _denied() -> sa.ColumnElement[bool]:
    """The condition that a person rejected a request, before any run."""
    step = (request_events.c.old == Status.AWAITING_APPROVAL, request_events.c.new == Status.REJECTED)
    return sa.exists().where(request_events.c.request_id == requests.c.id, *step)


def _reused(report: Mapping[str, Any] | None) -> str | None:
    """The generator that a request reused, from its report, where it made no erasure."""
    generator = (report or {}).get("generator", {})
    return str(generator["id"]) if generator.get("use") == "reused" else None


def _of_decisions(connection: sa.Connection, model: Model) -> list[Event]:
    """Approvals and denials of requests, and by whom."""
    query = (
        sa.select(request_events, requests.c.behaviour_name)
        .join(requests, requests.c.id == request_events.c.request_id)
        .where(requests.c.model_id == model.id, request_events.c.old == Status.AWAITING_APPROVAL)
        .where(request_events.c.new.in_((Status.QUEUED, Status.REJECTED)))
        .order_by(request_events.c.request_id)
    )
    words = {Status.QUEUED.value: "approved", Status.REJECTED.value: "denied"}
    return [
        _event(row.at, words[row.new], None, row.request_id, behaviour=row.behaviour_name, by=row.actor)
        for row in connection.execute(query)
    ]


def _of_generators(connection: sa.Connection, model: Model) -> list[Event]:
    query = sa.select(generators).where(generators.c.model_id == model.id).order_by(generators.c.id)
    events = []
    for row in connection.execute(query):
        detail = {"generator": row.id}
        source = row.warm_started_from or row.transferred_from
        if source is not None:
            detail["from"] = source
        events.append(_event(row.created_at, f"generator_{row.origin}", None, row.request_id, **detail))
    return events


def _of_erasures(connection: sa.Connection, model: Model) -> list[Event]:
    run = (erasures.c.version, erasures.c.request_id, erasures.c.created_at)
    generator = (erasures.c.generator_id, erasures.c.generator_use)
    query = sa.select(*run, *generator, rows.ORIGIN, *_behaviour_columns(erasures))
    events = []
    ordered = query.where(erasures.c.model_id == model.id).order_by(*rows.ERASURE_ORDER)
    for row in connection.execute(ordered).mappings():
        at, subject = row["created_at"], (row["version"], row["request_id"])
        if row["generator_use"] == "reused":
            events.append(_event(at, "generator_reused", *subject, generator=row["generator_id"]))
        detail = _behaviour(row)
        if row["recipe_origin"] is not None:
            detail["recipe_origin"] = row["recipe_origin"]
        events.append(_event(at, "erased", *subject, **detail))
    return events


def _of_rechecks(connection: sa.Connection, model: Model) -> list[Event]:
    """One event for all re-checks of one moment, and one for each erasure whose behaviour has come back."""
    of_model = (erasures.c.id == rechecks.c.erasure_id, erasures.c.model_id == model.id)
    at_once = (rechecks.c.created_at, rechecks.c.version, rechecks.c.actor)
    failed = sa.func.sum(sa.case((rechecks.c.passed, 0), else_=1))
    counts = sa.select(*at_once, sa.func.count().label("erasures"), failed.label("failed")).where(*of_model)
    events = [
        _event(
            row.created_at, "rechecked", row.version, None, erasures=row.erasures, failed=int(row.failed), by=row.actor
        )
        for row in connection.execute(counts.group_by(*at_once))
    ]
    returned = sa.select(rechecks, erasures.c.behaviour_name, erasures.c.request_id).where(*of_model)
    query = returned.where(rechecks.c.passed.is_(False)).order_by(*rows.ERASURE_ORDER)
    for row in connection.execute(query):
        detail = {"behaviour": row.behaviour_name, "share": row.share, "probes": row.probes}
        events.append(_event(row.created_at, "recheck_failed", row.version, row.request_id, **detail))
    return events


def _of_aliases(connection: sa.Connection, model: Model) -> list[Event]:
    query = sa.select(aliases_history).where(aliases_history.c.model_id == model.id)
    events = []
    for row in connection.execute(query):
        detail = {"alias": row.alias, "previous": row.previous, "forced": row.forced, "reason": row.reason}
        events.append(_event(row.created_at, "alias_moved", row.version, None, **detail, by=row.actor))
    return events


def _of_retirements(connection: sa.Connection, model: Model) -> list[Event]:
    pairs = generator_retirements.join(generators, generators.c.id == generator_retirements.c.generator_id)
    query = sa.select(generator_retirements).select_from(pairs).where(generators.c.model_id == model.id)
    return [
        _event(
            row.created_at, "generator_retired", None, None, generator=row.generator_id, reason=row.reason, by=row.actor
        )
        for row in connection.execute(query)
    ]


def _of_seals(connection: sa.Connection, model: Model) -> list[Event]:
    query = sa.select(seals).where(seals.c.model_id == model.id)
    return [
        _event(row.created_at, "sealed", row.version, None, generator=row.generator_id, by=row.actor)
        for row in connection.execute(query)
    ]


def _of_purges(connection: sa.Connection, model: Model) -> list[Event]:
    """Requests whose target samples were purged. All other removals follow from a retirement or a seal."""
    pairs = removals.join(requests, requests.c.id == removals.c.request_id)
    query = sa.select(removals, requests.c.behaviour_name).select_from(pairs).where(requests.c.model_id == model.id)
    return [
        _event(row.created_at, "purged", None, row.request_id, behaviour=row.behaviour_name, by=row.actor)
        for row in connection.execute(query)
    ]
