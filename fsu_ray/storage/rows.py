"""Rows of the ledger as records, and the queries that fetch them.

Records name a model by its name, which never changes; rows refer to its id.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from fsu_ray.errors import NotFound
from fsu_ray.recipes import Recipe
from fsu_ray.records import (
    Behaviour,
    Digest,
    Erasure,
    Generator,
    Model,
    ModelSpec,
    ModelVersion,
    Policy,
    Recheck,
    Request,
    Status,
)
from fsu_ray.storage.schema import (
    erasures,
    generator_retirements,
    generators,
    model_policies,
    model_versions,
    models,
    rechecks,
    requests,
    seals,
)


def with_model(table: sa.Table) -> sa.Select[Any]:
    """The rows of a table that has a `model_id`, each with the name of its model as `model`."""
    return sa.select(table, models.c.name.label("model")).join(models, models.c.id == table.c.model_id)


def newest_first(table: sa.FromClause) -> tuple[sa.ColumnElement[Any], sa.ColumnElement[Any]]:
    """The order of a history table's rows from the newest to the oldest; the id decides within one moment."""
    return table.c.created_at.desc(), table.c.id.desc()


def oldest_first(table: sa.Table) -> tuple[sa.ColumnElement[Any], sa.ColumnElement[Any]]:
    """The reverse of `newest_first`."""
    return table.c.created_at, table.c.id


VERSIONS = with_model(model_versions)
REQUESTS = with_model(requests)
ERASURES = with_model(erasures)

ERASURE_ORDER = (erasures.c.version, erasures.c.request_id)
"""The order of erasures from the oldest to the newest."""

REQUEST_ORDER = (requests.c.submitted_at, requests.c.id)
"""The order of requests from the oldest to the newest."""


def _generators() -> sa.Select[Any]:
    """Generators, each with the reason of its retirement, its seal, and the number of erasures since."""
    taints = (
        sa.select(sa.func.count())
        .where(
            erasures.c.model_id == generators.c.model_id,
            erasures.c.created_at >= generators.c.created_at,
            sa.or_(seals.c.version.is_(None), erasures.c.version > seals.c.version),
        )
        .correlate(generators, seals)
        .scalar_subquery()
    )
    return (
        with_model(generators)
        .outerjoin(generator_retirements, generator_retirements.c.generator_id == generators.c.id)
        .outerjoin(seals, seals.c.generator_id == generators.c.id)
        .add_columns(
            generator_retirements.c.reason.label("retired"),
            seals.c.version.label("sealed"),
            seals.c.dataset.label("sealed_dataset"),
            taints.label("taints"),
        )
    )


GENERATORS = _generators()
NOT_RETIRED = generator_retirements.c.id.is_(None)
"""The condition, in `GENERATORS`, that a generator is not retired: it may serve requests."""
NOT_SEALED = seals.c.id.is_(None)
"""The condition, in `GENERATORS`, that a generator is not sealed: it still has its weights."""

_LARGEST = 2**31 - 1


def new_id(prefix: str) -> str:
    """A unique id such as `r-19a1b2c3d4e5f6a7b8c`: milliseconds as 11 hex digits, then 8 random hex digits."""
    return f"{prefix}-{time.time_ns() // 1_000_000:011x}{secrets.token_hex(4)}"


def now() -> datetime:
    """The present moment, in UTC."""
    return datetime.now(UTC)


def now_after(before: datetime | None) -> datetime:
    """The present moment, but after `before` also where the clocks of two machines disagree: the row that is written
    last stays the last by its time."""
    return now() if before is None else max(now(), before + timedelta(microseconds=1))


BEHAVIOUR = ("behaviour_name", "behaviour_kind", "behaviour_targets")
"""The columns of requests and erasures that hold a behaviour."""


def behaviour_columns(behaviour: Behaviour) -> dict[str, Any]:
    """A behaviour as the values of the columns `BEHAVIOUR`."""
    return {
        "behaviour_name": behaviour.name,
        "behaviour_kind": behaviour.kind,
        "behaviour_targets": list(behaviour.targets),
    }


def to_behaviour(row: Mapping[Any, Any]) -> Behaviour:
    """The behaviour in the columns `BEHAVIOUR` of a row."""
    return Behaviour(name=row["behaviour_name"], kind=row["behaviour_kind"], targets=tuple(row["behaviour_targets"]))


def to_model(row: sa.RowMapping) -> Model:
    return Model(
        id=row["id"],
        name=row["name"],
        spec=ModelSpec.model_validate(row["spec"]),
        test_set=row["test_set"],
        created_at=row["created_at"],
    )


def to_version(row: sa.RowMapping) -> ModelVersion:
    return ModelVersion(
        id=row["id"],
        model=row["model"],
        number=row["number"],
        parent=row["parent"],
        root=row["root"],
        weights=Digest(row["weights"]),
        request=row["request_id"],
        created_at=row["created_at"],
    )


def to_request(row: Mapping[Any, Any]) -> Request:
    return Request(
        id=row["id"],
        model=row["model"],
        behaviour=to_behaviour(row),
        samples=Digest(row["samples"]),
        sample_count=row["sample_count"],
        recipe=Recipe.model_validate(row["recipe"]),
        status=Status(row["status"]),
        attempt=row["attempt"],
        worker=row["worker"],
        lease_until=row["lease_until"],
        reason=row["reason"],
        version=row["version"],
        report=row["report"],
        submitted_at=row["submitted_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        key=row["idempotency_key"],
        priority=row["priority"],
        not_before=row["not_before"],
        due_at=row["due_at"],
        requested_by=row["requested_by"],
        generator=row["generator_id"],
        batch_leader=row["lead"],
        no_coalesce=row["alone"],
        failures=row["failures"],
        retry_at=row["retry_at"],
        cancel_by=row["cancel_by"],
        changes=row["changes"],
    )


def to_recheck(row: Mapping[Any, Any]) -> Recheck:
    return Recheck(
        erasure=row["erasure_id"],
        version=row["version"],
        probes=row["probes"],
        share=row["share"],
        passed=row["passed"],
        actor=row["actor"],
        created_at=row["created_at"],
    )


def to_generator(row: sa.RowMapping) -> Generator:
    return Generator(
        id=row["id"],
        model=row["model"],
        root=row["root"],
        spec=ModelSpec.model_validate(row["spec"]),
        recipe_digest=Digest(row["recipe_digest"]),
        weights=Digest(row["weights"]),
        dataset=Digest(row["sealed_dataset"] or row["dataset"]),
        origin=row["origin"],
        warm_started_from=row["warm_started_from"],
        transferred_from=row["transferred_from"],
        metrics=row["figures"],
        request=row["request_id"],
        created_at=row["created_at"],
        retired=row["retired"],
        sealed=row["sealed"],
        taints=row["taints"],
    )


def to_erasure(row: sa.RowMapping) -> Erasure:
    return Erasure(
        id=row["id"],
        model=row["model"],
        version=row["version"],
        request=row["request_id"],
        behaviour=to_behaviour(row),
        samples=Digest(row["samples"]),
        mask=Digest(row["mask"]),
        probes=Digest(row["probes"]),
        generator=row["generator_id"],
        generator_use=row["generator_use"],
        report=row["report"],
        created_at=row["created_at"],
    )


def fetch_model(connection: sa.Connection, name: str) -> Model:
    """The model of that name; raises NotFound."""
    row = connection.execute(sa.select(models).where(models.c.name == name)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no model {name!r}; `fsu model list` shows the names")
    return to_model(row)


def fetch_models(connection: sa.Connection, name: str | None = None) -> list[Model]:
    """The model of that name (raises NotFound), or all models by name."""
    if name is not None:
        return [fetch_model(connection, name)]
    return [to_model(row) for row in connection.execute(sa.select(models).order_by(models.c.name)).mappings()]


def of_model(connection: sa.Connection, query: sa.Select[Any], table: sa.Table, name: str | None) -> sa.Select[Any]:
    """`query` on `table` for the model of that name, unchanged for None; raises NotFound."""
    return query if name is None else query.where(table.c.model_id == fetch_model(connection, name).id)


def fetch_policy(connection: sa.Connection, model: Model) -> Policy:
    """The policy of a model in force: the last that was set, else the default."""
    policies = sa.select(model_policies.c.policy).where(model_policies.c.model_id == model.id)
    newest = connection.execute(policies.order_by(*newest_first(model_policies)).limit(1)).scalar_one_or_none()
    return Policy() if newest is None else Policy.model_validate(newest)


def fetch_version(connection: sa.Connection, model: Model, number: int | None = None) -> ModelVersion:
    """Version `number` of a model, None for the latest; raises NotFound."""
    versions = VERSIONS.where(model_versions.c.model_id == model.id)
    newest = versions.order_by(model_versions.c.number.desc()).limit(1)
    query = newest if number is None else newest.where(model_versions.c.number == number)
    in_range = number is None or number <= _LARGEST  # neither database compares a column with a larger number
    row = connection.execute(query).mappings().one_or_none() if in_range else None
    if row is None:
        latest = connection.execute(newest).mappings().one()["number"]
        raise NotFound(f"model {model.name!r} has no version {number}; its latest is {latest}")
    return to_version(row)


def fetch_sealed_root(connection: sa.Connection, model: Model, base: ModelVersion) -> ModelVersion:
    """The version that labels D' for requests on top of `base`: that of its root's latest seal, else its root."""
    of_root = (seals.c.model_id == model.id, seals.c.version >= base.root, seals.c.version <= base.number)
    sealed = connection.scalar(sa.select(sa.func.max(seals.c.version)).where(*of_root))
    return fetch_version(connection, model, base.root if sealed is None else sealed)


def fetch_by_id(connection: sa.Connection, query: sa.Select[Any], table: sa.Table, id_or_prefix: str) -> sa.RowMapping:
    """The one row of `query` on `table` whose id is, or begins with, `id_or_prefix`.

    Raises NotFound where no row or several rows fit.
    """
    noun = table.name.removesuffix("s")
    fitting = query.where(table.c.id.startswith(id_or_prefix, autoescape=True)).order_by(table.c.id).limit(2)
    rows = connection.execute(fitting).mappings().all() if id_or_prefix else []
    if len(rows) == 1 or (rows and rows[0]["id"] == id_or_prefix):
        return rows[0]
    if rows:
        raise NotFound(f"more than one {noun} begins with {id_or_prefix!r}; give more of the id")
    raise NotFound(f"no {noun} {id_or_prefix!r}; `fsu {noun} list` shows the ids")


def fetch_request(connection: sa.Connection, id_or_prefix: str) -> Request:
    """One request, by its id or a prefix of it; raises NotFound."""
    return to_request(fetch_by_id(connection, REQUESTS, requests, id_or_prefix))


def fetch_generator(connection: sa.Connection, id_or_prefix: str) -> Generator:
    """One generator, by its id or a prefix of it; raises NotFound."""
    return to_generator(fetch_by_id(connection, GENERATORS, generators, id_or_prefix))


def ancestry(model: Model, number: int) -> sa.CTE:
    """The numbers of a version and of its parents up to the first, as a recursive query.

    A subquery looks up each parent's own parent. PostgreSQL may plan a join, before it has statistics of the table,
    that reads the whole model once for each version.
    """
    versions = (
        sa.select(model_versions.c.number, model_versions.c.parent)
        .where(model_versions.c.model_id == model.id, model_versions.c.number == number)
        .cte("ancestry", recursive=True)
    )
    above = model_versions.alias("above")
    parent = sa.select(above.c.parent).where(above.c.model_id == model.id, above.c.number == versions.c.parent)
    step = sa.select(versions.c.parent, parent.correlate(versions).scalar_subquery())
    return versions.union_all(step.where(versions.c.parent.is_not(None)))


def in_force(model: Model, number: int) -> sa.ColumnElement[bool]:
    """The condition that an erasure belongs to a version or to one of its parents.

    With `IS TRUE` PostgreSQL computes the ancestry once and looks versions up by hash, however long it estimates it to
    be.
    """
    numbers = sa.select(ancestry(model, number).c.number)
    return sa.and_(erasures.c.model_id == model.id, erasures.c.version.in_(numbers).is_(True))


def inherited(model: Model, number: int) -> sa.Select[Any]:
    """The erasures in force at a version, oldest first."""
    return ERASURES.where(in_force(model, number)).order_by(*ERASURE_ORDER)


def fetch_erasures(connection: sa.Connection, model: Model, number: int) -> list[Erasure]:
    """The erasures in force at a version: its own and those of its parents up to the first, oldest first."""
    return [to_erasure(row) for row in connection.execute(inherited(model, number)).mappings()]


def fetch_erased(connection: sa.Connection, model: Model) -> list[tuple[Behaviour, int]]:
    """The behaviours erased as of a model's latest version, each with the version that erased it, oldest first.

    Unlike `fetch_erasures`, this reads no reports.
    """
    number = fetch_version(connection, model).number
    query = sa.select(erasures.c.version, *(erasures.c[name] for name in BEHAVIOUR)).where(in_force(model, number))
    erased = connection.execute(query.order_by(*ERASURE_ORDER)).mappings()
    return [(to_behaviour(row), row["version"]) for row in erased]


def still_there(model: Model, number: int, limit: int) -> sa.Select[Any]:
    """Name and version of the first `limit` erasures of a model whose behaviour a version still has, oldest first."""
    erased = sa.select(erasures.c.behaviour_name).where(in_force(model, number))
    others = sa.select(erasures.c.behaviour_name, erasures.c.version).where(
        erasures.c.model_id == model.id, erasures.c.behaviour_name.not_in(erased)
    )
    return others.order_by(*ERASURE_ORDER).limit(limit)


def newest_recheck(version: int | None = None) -> sa.ScalarSelect[Any]:
    """The id of an erasure's latest re-check; with `version`, of its latest on that version."""
    newest = rechecks.alias("newest")
    query = sa.select(newest.c.id).where(newest.c.erasure_id == erasures.c.id)
    if version is not None:
        query = query.where(newest.c.version == version)
    return query.order_by(*newest_first(newest)).limit(1).correlate(erasures).scalar_subquery()


def latest_rechecks(model: Model, version: int | None = None) -> sa.Select[Any]:
    """The latest re-check of each erasure of a model that has one; with `version`, the latest on that version."""
    pairs = erasures.join(rechecks, rechecks.c.id == newest_recheck(version))
    return sa.select(rechecks).select_from(pairs).where(erasures.c.model_id == model.id)


ORIGIN = erasures.c.report[("recipe", "origin")].as_string().label("recipe_origin")
"""The search that an erasure's recipe comes from, from its report; NULL without one."""


def measured(model: Model, number: int) -> sa.Select[Any]:
    """The erasures in force at a version, oldest first, each with its latest re-check in columns `recheck_...`.

    Of each report the query reads two metrics and the recipe's origin only.
    """
    metrics = [
        erasures.c.report[("forgetting", name)].as_float().label(name)
        for name in ("samples_in_target", "probes_in_target")
    ]
    left_out = ("report", "samples", "mask", "probes", "model_id")
    columns = [column for column in erasures.c if column.name not in left_out]
    recheck = [column.label(f"recheck_{column.name}") for column in rechecks.c]
    pairs = erasures.outerjoin(rechecks, rechecks.c.id == newest_recheck())
    query = sa.select(*columns, *metrics, ORIGIN, *recheck).select_from(pairs).where(in_force(model, number))
    return query.order_by(*ERASURE_ORDER)
