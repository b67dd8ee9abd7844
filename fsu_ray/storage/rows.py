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
    Erasure,
    Generator,
    Model,
    ModelSpec,
    ModelVersion,
    Recheck,
    Request,
    Status,
)
from fsu_ray.storage.schema import (
    erasures,
    generator_retirements,
    generators,
    model_versions,
    models,
    rechecks,
    requests,
    seals,
)


def _with_model(table: sa.Table) -> sa.Select[Any]:
    return sa.select(table, models.c.name.label("model")).join(models, models.c.id == table.c.model_id)


VERSIONS = _with_model(model_versions)
REQUESTS = _with_model(requests)
ERASURES = _with_model(erasures)


def _generators() -> sa.Select[Any]:
    """Generators with what has become of them: why they were retired, the seal of their D', the erasures since."""
    since = (
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
        _with_model(generators)
        .outerjoin(generator_retirements, generator_retirements.c.generator_id == generators.c.id)
        .outerjoin(seals, seals.c.generator_id == generators.c.id)
        .add_columns(
            generator_retirements.c.reason.label("retired"),
            seals.c.version.label("sealed"),
            seals.c.dataset.label("sealed_dataset"),
            since.label("taints"),
        )
    )


GENERATORS = _generators()

_LARGEST = 2**31 - 1


def new_id(prefix: str) -> str:
    """An id that nobody else will make, such as `r-19a1b2c3d4e5f6a7b8c`: 11 digits of milliseconds, 8 of chance."""
    return f"{prefix}-{time.time_ns() // 1_000_000:011x}{secrets.token_hex(4)}"


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)


def now_after(before: datetime | None) -> datetime:
    """This moment, or the next one after `before` where the clocks of two machines disagree: what comes last stays
    the last by its time."""
    return now() if before is None else max(now(), before + timedelta(microseconds=1))


BEHAVIOUR = ("behaviour_name", "behaviour_kind", "behaviour_targets")
"""The columns that requests and erasures keep of a behaviour."""


def behaviour_columns(behaviour: Behaviour) -> dict[str, Any]:
    """A behaviour as the three columns that requests and erasures keep of it."""
    return {
        "behaviour_name": behaviour.name,
        "behaviour_kind": behaviour.kind,
        "behaviour_targets": list(behaviour.targets),
    }


def to_behaviour(row: Mapping[Any, Any]) -> Behaviour:
    """The behaviour whose columns `behaviour_columns` gives."""
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
        weights=row["weights"],
        request=row["request_id"],
        created_at=row["created_at"],
    )


def to_request(row: Mapping[Any, Any]) -> Request:
    return Request(
        id=row["id"],
        model=row["model"],
        behaviour=to_behaviour(row),
        samples=row["samples"],
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
        recipe_digest=row["recipe_digest"],
        weights=row["weights"],
        dataset=row["sealed_dataset"] or row["dataset"],
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
        samples=row["samples"],
        mask=row["mask"],
        probes=row["probes"],
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


def fetch_version(connection: sa.Connection, model: Model, number: int | None = None) -> ModelVersion:
    """Version `number` of a model, None for the latest; raises NotFound."""
    of_model = VERSIONS.where(model_versions.c.model_id == model.id)
    newest_first = of_model.order_by(model_versions.c.number.desc()).limit(1)
    query = newest_first if number is None else newest_first.where(model_versions.c.number == number)
    known = number is None or number <= _LARGEST  # neither database compares with more
    row = connection.execute(query).mappings().one_or_none() if known else None
    if row is None:
        latest = connection.execute(newest_first).mappings().one()["number"]
        raise NotFound(f"model {model.name!r} has no version {number}; its latest is {latest}")
    return to_version(row)


def fetch_sealed_root(connection: sa.Connection, model: Model, base: ModelVersion) -> ModelVersion:
    """The version that labels D' for requests on top of `base`: that of its root's latest seal, else its root."""
    of_root = (seals.c.model_id == model.id, seals.c.version >= base.root, seals.c.version <= base.number)
    number = connection.scalar(sa.select(sa.func.max(seals.c.version)).where(*of_root))
    return fetch_version(connection, model, base.root if number is None else number)


def fetch_by_id(connection: sa.Connection, query: sa.Select[Any], table: sa.Table, id_or_prefix: str) -> sa.RowMapping:
    """The one row of `query` on `table` whose id is, or begins with, `id_or_prefix`; raises NotFound."""
    what = table.name.removesuffix("s")
    fitting = query.where(table.c.id.startswith(id_or_prefix, autoescape=True)).order_by(table.c.id).limit(2)
    rows = connection.execute(fitting).mappings().all() if id_or_prefix else []
    if len(rows) == 1 or (rows and rows[0]["id"] == id_or_prefix):
        return rows[0]
    if rows:
        raise NotFound(f"more than one {what} begins with {id_or_prefix!r}; give more of the id")
    raise NotFound(f"no {what} {id_or_prefix!r}; `fsu {what} list` shows the ids")


def line_of(model: Model, number: int) -> sa.CTE:
    """The numbers of a version and of its parents up to the first, as a recursive query.

    Each parent's own parent is looked up in a subquery: of a join PostgreSQL may make, before it has seen the table
    filled, one that reads the whole model once a version.
    """
    line = (
        sa.select(model_versions.c.number, model_versions.c.parent)
        .where(model_versions.c.model_id == model.id, model_versions.c.number == number)
        .cte("line", recursive=True)
    )
    above = model_versions.alias("above")
    parent = sa.select(above.c.parent).where(above.c.model_id == model.id, above.c.number == line.c.parent)
    step = sa.select(line.c.parent, parent.correlate(line).scalar_subquery()).where(line.c.parent.is_not(None))
    return line.union_all(step)


def in_force(model: Model, number: int) -> sa.ColumnElement[bool]:
    """The condition that an erasure is of a version or of one of its parents.

    `IS TRUE` has the line computed once and looked up in by hash, whatever PostgreSQL thinks of its length.
    """
    line = sa.select(line_of(model, number).c.number)
    return sa.and_(erasures.c.model_id == model.id, erasures.c.version.in_(line).is_(True))


def inherited(model: Model, number: int) -> sa.Select[Any]:
    """What is gone as of a version, oldest first."""
    return ERASURES.where(in_force(model, number)).order_by(erasures.c.version, erasures.c.request_id)


def fetch_erasures(connection: sa.Connection, model: Model, number: int) -> list[Erasure]:
    """What is gone as of a version: the erasures of it and of its parents up to the first, oldest first."""
    return [to_erasure(row) for row in connection.execute(inherited(model, number)).mappings()]


def fetch_gone(connection: sa.Connection, model: Model) -> list[tuple[Behaviour, int]]:
    """The behaviours that are gone as of a model's latest version, each with the version as of which, oldest first:
    `fetch_erasures` without their reports."""
    number = fetch_version(connection, model).number
    query = sa.select(erasures.c.version, *(erasures.c[name] for name in BEHAVIOUR)).where(in_force(model, number))
    found = connection.execute(query.order_by(erasures.c.version, erasures.c.request_id)).mappings()
    return [(to_behaviour(row), row["version"]) for row in found]


def still_there(model: Model, number: int, most: int) -> sa.Select[Any]:
    """Name and version of the first `most` erasures of a model whose behaviour a version still has, oldest first."""
    gone = sa.select(erasures.c.behaviour_name).where(in_force(model, number))
    others = sa.select(erasures.c.behaviour_name, erasures.c.version).where(
        erasures.c.model_id == model.id, erasures.c.behaviour_name.not_in(gone)
    )
    return others.order_by(erasures.c.version, erasures.c.request_id).limit(most)


def newest_recheck(version: int | None = None) -> sa.ScalarSelect[Any]:
    """The id of an erasure's latest re-check, with `version` on that one alone."""
    newest = rechecks.alias("newest")
    query = sa.select(newest.c.id).where(newest.c.erasure_id == erasures.c.id)
    if version is not None:
        query = query.where(newest.c.version == version)
    return query.order_by(newest.c.created_at.desc(), newest.c.id.desc()).limit(1).correlate(erasures).scalar_subquery()


def latest_rechecks(model: Model, version: int | None = None) -> sa.Select[Any]:
    """The latest re-check of each erasure of a model that has one, with `version` on that one alone."""
    pairs = erasures.join(rechecks, rechecks.c.id == newest_recheck(version))
    return sa.select(rechecks).select_from(pairs).where(erasures.c.model_id == model.id)


ORIGIN = erasures.c.report[("recipe", "origin")].as_string().label("recipe_origin")  # a search, see `results`


def measured(model: Model, number: int) -> sa.Select[Any]:
    """What is gone as of a version, oldest first: of each erasure's report two figures and the recipe's origin only,
    and its latest re-check, whose columns are named `recheck_...`."""
    metrics = [
        erasures.c.report[("forgetting", name)].as_float().label(name)
        for name in ("samples_in_target", "probes_in_target")
    ]
    small = [column for column in erasures.c if column.name not in ("report", "samples", "mask", "probes", "model_id")]
    again = [column.label(f"recheck_{column.name}") for column in rechecks.c]
    pairs = erasures.outerjoin(rechecks, rechecks.c.id == newest_recheck())
    query = sa.select(*small, *metrics, ORIGIN, *again).select_from(pairs).where(in_force(model, number))
    return query.order_by(erasures.c.version, erasures.c.request_id)
