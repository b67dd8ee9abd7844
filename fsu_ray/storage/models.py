"""Models, their versions, the erasures in force at each version, re-checks, policies and aliases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from fsu_ray.errors import AlreadyExists, InvalidConfig, NotFound, TransitionRefused, UserError
from fsu_ray.records import (
    OPERATOR,
    AliasMove,
    Behaviour,
    Digest,
    Erasure,
    Model,
    ModelSpec,
    ModelVersion,
    Policy,
    Recheck,
)
from fsu_ray.storage import chain, history, rows
from fsu_ray.storage.claims import check_idle
from fsu_ray.storage.database import Database
from fsu_ray.storage.schema import aliases_history, erasures, model_policies, model_versions, models, rechecks

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_NUMBER = re.compile(r"[0-9]{1,18}")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,49}")
_REASON = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:#/-]{0,99}")


@dataclass(frozen=True)
class Measured:
    """The result of re-checking one erasure; the fields are those of `records.Recheck`."""

    erasure: str
    probes: int
    share: float | None
    passed: bool


@dataclass(frozen=True)
class ErasureSummary:
    """An erasure without its report.

    `samples_in_target` and `probes_in_target` are the shares of target samples and of probes that the new version put
    in a target class, None where nothing was measured. `recheck` is the latest re-check on any version. `recipe_origin`
    is the search that found the recipe, None without one.
    """

    erasure: str
    version: int
    request: str
    behaviour: Behaviour
    created_at: datetime
    samples_in_target: float | None
    probes_in_target: float | None
    recheck: Recheck | None
    recipe_origin: str | None


class Models:
    """The ledger's models."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def check_name_free(self, name: str) -> None:
        """Raise what `register` would raise for this name."""
        _check_name(name)
        with self._database.reading() as connection:
            if connection.scalar(sa.select(models.c.id).where(models.c.name == name)) is not None:
                raise AlreadyExists(f"model {name!r} exists already; choose another name")

    def register(
        self, name: str, spec: ModelSpec, weights: Digest, test_set: str | None = None, actor: str = OPERATOR
    ) -> Model:
        """A new model with version 1, its own root. `test_set` is the name of a labelled data set.

        Raises AlreadyExists where the name is taken, InvalidConfig where it is no valid name.
        """
        _check_name(name)
        moment = rows.now()
        model = Model(id=rows.new_id("m"), name=name, spec=spec, test_set=test_set, created_at=moment)
        with self._database.writing(f"model {name!r}", actor) as connection:
            values: dict[str, Any] = {"id": model.id, "name": name, "test_set": test_set, "created_at": moment}
            values["spec"] = spec.model_dump(mode="json")
            chain.insert(connection, "registered", models, values, actor=actor, model=name)
            insert_version(connection, model, None, weights, moment, actor=actor)
        return model

    def get(self, name: str) -> Model:
        """The model of that name; raises NotFound."""
        with self._database.reading() as connection:
            return rows.fetch_model(connection, name)

    def all(self) -> list[Model]:
        """All models, by name."""
        with self._database.reading() as connection:
            return rows.fetch_models(connection)

    def policy(self, model: str) -> Policy:
        """The policy of a model in force; raises NotFound."""
        with self._database.reading() as connection:
            return rows.fetch_policy(connection, rows.fetch_model(connection, model))

    def set_policy(self, model: str, policy: Policy, actor: str = OPERATOR) -> Policy:
        """Put a policy in force for a model; the earlier ones stay on record. Raises NotFound."""
        with self._database.writing(f"model {model!r}", actor) as connection:
            record = rows.fetch_model(connection, model)
            newest = sa.select(sa.func.max(model_policies.c.created_at)).where(model_policies.c.model_id == record.id)
            values: dict[str, Any] = {"id": rows.new_id("p"), "model_id": record.id}
            values |= {
                "policy": policy.model_dump(mode="json"),
                "created_at": rows.now_after(connection.scalar(newest)),
            }
            chain.insert(connection, "policy_set", model_policies, values, actor=actor, model=model)
        return policy

    # Versions.

    def add_version(self, model: str, weights: Digest, actor: str = OPERATOR) -> ModelVersion:
        """Add a version that was trained further elsewhere: a child of the latest, and its own root.

        Raises NotFound, and TransitionRefused while a request of the model is running.
        """
        with self._database.writing(f"model {model!r}", actor) as connection:
            record = rows.fetch_model(connection, model)
            check_idle(connection, record)
            latest = rows.fetch_version(connection, record)
            return insert_version(connection, record, latest, weights, rows.now(), actor=actor)

    def version(self, model: str, number: int | None = None) -> ModelVersion:
        """One version of a model, the latest for None; raises NotFound."""
        with self._database.reading() as connection:
            return rows.fetch_version(connection, rows.fetch_model(connection, model), number)

    def versions(self, model: str) -> list[ModelVersion]:
        """The versions of a model by number; raises NotFound."""
        with self._database.reading() as connection:
            query = rows.of_model(connection, rows.VERSIONS.order_by(model_versions.c.number), model_versions, model)
            return [rows.to_version(row) for row in connection.execute(query).mappings()]

    def resolve(self, reference: str) -> tuple[Model, ModelVersion]:
        """The version that `MODEL` (its latest), `MODEL@NUMBER` or `MODEL@ALIAS` names.

        Raises NotFound, and UserError for an `@` with nothing behind it.
        """
        name, sign, at = reference.partition("@")
        if sign and not at:
            raise UserError(f"{reference!r} names no version: give MODEL, MODEL@NUMBER or MODEL@ALIAS")
        with self._database.reading() as connection:
            model = rows.fetch_model(connection, name)
            if _NUMBER.fullmatch(at):
                return model, rows.fetch_version(connection, model, int(at))
            if not at:
                return model, rows.fetch_version(connection, model)
            move = _newest_move(connection, model, at)
            if move is None:
                raise NotFound(f"model {name!r} has no alias {at!r}; `fsu alias list {name}` shows them")
            return model, rows.fetch_version(connection, model, move.version)

    # Erasures and their re-checks.

    def erasures(self, model: str, version: int | None = None) -> list[Erasure]:
        """The erasures in force at a version (None: the latest), its parents' included, oldest first.

        Raises NotFound.
        """
        with self._database.reading() as connection:
            record = rows.fetch_model(connection, model)
            return rows.fetch_erasures(connection, record, rows.fetch_version(connection, record, version).number)

    def erased(self, model: str, version: int | None = None) -> list[ErasureSummary]:
        """`erasures` without reports, each with its latest re-check: quick for thousands. Raises NotFound."""
        with self._database.reading() as connection:
            record = rows.fetch_model(connection, model)
            number = rows.fetch_version(connection, record, version).number
            return [_to_summary(row) for row in connection.execute(rows.measured(record, number)).mappings()]

    def all_erasures(self, model: str) -> list[Erasure]:
        """The erasures of all versions of a model, oldest first; raises NotFound."""
        with self._database.reading() as connection:
            query = rows.of_model(connection, rows.ERASURES.order_by(*rows.ERASURE_ORDER), erasures, model)
            return [rows.to_erasure(row) for row in connection.execute(query).mappings()]

    def behaviours(self, model: str) -> dict[int, list[Behaviour]]:
        """By number, the behaviours that each version of a model erased; raises NotFound."""
        by_version: dict[int, list[Behaviour]] = {}
        with self._database.reading() as connection:
            columns = (erasures.c[name] for name in rows.BEHAVIOUR)
            query = sa.select(erasures.c.version, *columns).order_by(*rows.ERASURE_ORDER)
            for row in connection.execute(rows.of_model(connection, query, erasures, model)).mappings():
                by_version.setdefault(row["version"], []).append(rows.to_behaviour(row))
        return by_version

    def rechecks(self, model: str, version: int | None = None) -> dict[str, Recheck]:
        """By erasure id, the latest re-check of each erasure of a model; with `version`, the latest on that version.

        Raises NotFound.
        """
        with self._database.reading() as connection:
            query = rows.latest_rechecks(rows.fetch_model(connection, model), version)
            return {row["erasure_id"]: rows.to_recheck(row) for row in connection.execute(query).mappings()}

    def record_rechecks(
        self, model: str, version: int, measured: Sequence[Measured], actor: str = OPERATOR
    ) -> list[Recheck]:
        """Record the re-checks of erasures on a version.

        Raises NotFound, also for an erasure that is not in force at that version.
        """
        with self._database.writing(f"model {model!r}", actor) as connection:
            record = rows.fetch_model(connection, model)
            rows.fetch_version(connection, record, version)
            in_force = set(connection.scalars(sa.select(erasures.c.id).where(rows.in_force(record, version))))
            moment, recorded = rows.now(), []
            for result in measured:
                if result.erasure not in in_force:
                    raise NotFound(f"erasure {result.erasure} is not in force at version {version} of {model!r}")
                values: dict[str, Any] = {"id": rows.new_id("c"), "erasure_id": result.erasure, "model_id": record.id}
                values |= {"version": version, "probes": result.probes, "share": result.share, "passed": result.passed}
                values["created_at"] = moment
                event = "recheck_passed" if result.passed else "recheck_failed"
                chain.insert(connection, event, rechecks, values, actor=actor, model=model)
                recorded.append(
                    Recheck(result.erasure, version, result.probes, result.share, result.passed, actor, moment)
                )
            return recorded

    # Aliases.

    def aliases(self, model: str) -> dict[str, AliasMove]:
        """The latest move of each alias of a model, by name; raises NotFound."""
        newest = {move.alias: move for move in self.alias_moves(model)}
        return {alias: newest[alias] for alias in sorted(newest)}

    def alias_moves(self, model: str) -> list[AliasMove]:
        """Every move of an alias of a model, oldest first; raises NotFound."""
        with self._database.reading() as connection:
            query = _MOVES.order_by(*rows.oldest_first(aliases_history))
            query = rows.of_model(connection, query, aliases_history, model)
            return [_to_move(row) for row in connection.execute(query).mappings()]

    def move_alias(
        self, model: str, alias: str, version: int, actor: str = OPERATOR, *, force: bool = False,
        reason: str | None = None,
    ) -> AliasMove:  # fmt: skip
        """Point an alias to a version.

        Raises NotFound, UserError (no valid alias, or a forced move without a reason), and TransitionRefused where the
        version still has a behaviour that another version of the model erased, unless `force` is given.
        """
        if not _ALIAS.fullmatch(alias):
            raise UserError(
                f"{alias!r} is no name for an alias; use a letter, then up to 49 letters, digits, '.', '_' and '-'"
            )
        if force and reason is None:
            raise UserError("a forced move needs a reason that history can keep, such as the number of a ticket")
        if reason is not None:
            _check_reason(reason)
        with self._database.writing(f"alias {alias!r} of {model!r}", actor) as connection:
            record = rows.fetch_model(connection, model)
            target = rows.fetch_version(connection, record, version)
            not_erased = connection.execute(rows.still_there(record, target.number, limit=4)).all()
            if not_erased and not force:
                names = ", ".join(repr(name) for name, _ in not_erased[:3]) + (", ..." if len(not_erased) > 3 else "")
                raise TransitionRefused(
                    f"version {version} of {model!r} still has {names}, erased as of version {not_erased[0].version}; "
                    "point the alias to a later version, or give --force --reason"
                )
            before = _newest_move(connection, record, alias)
            previous, moment = (None, None) if before is None else (before.version, before.created_at)
            at = rows.now_after(moment)
            move = AliasMove(model, alias, version, previous, bool(not_erased), reason, actor, at)
            values: dict[str, Any] = {"id": rows.new_id("a"), "model_id": record.id, "alias": alias}
            values |= {"version": version, "previous": previous, "forced": move.forced, "reason": reason}
            values["created_at"] = at
            chain.insert(connection, "alias_moved", aliases_history, values, actor=actor, model=model)
            return move

    def history(self, model: str) -> list[dict[str, Any]]:
        """The events of a model, oldest first; raises NotFound.

        Each event is `{"at": datetime, "event": str, "version": int | None, "request": str | None,
        "detail": dict}`. The events and their details:

        - `registered` (weights, arch) and `version_added` (weights): a version from outside;
        - `submitted` (behaviour, kind, targets, sample_count);
        - `generator_trained`, `generator_warm_started` and `generator_transferred` (generator; from),
          `generator_imported` (generator; no request), `generator_reused` (generator);
        - `erased` (behaviour, kind, targets; recipe_origin where a search found its recipe), with its version;
        - `rejected`, `failed`, `cancelled` (behaviour, reason);
        - `policy_set` (the policy's fields, by);
        - `recipe_found` (search, kind, score, by), `recipe_reset` (kind, by);
        - `approved`, `denied` (behaviour, by): a denied request has no `rejected` besides;
        - `rechecked` (erasures, failed, by): one for all erasures measured at once, with their version;
          `recheck_failed` (behaviour, share, probes), one for each erasure whose behaviour has come back;
        - `alias_moved` (alias, previous, forced, reason, by), with its version;
        - `generator_retired` (generator, reason, by), `sealed` (generator, by), with its version;
        - `purged` (behaviour, by): a request's target samples were purged."""
        with self._database.reading() as connection:
            return history.history(connection, rows.fetch_model(connection, model))


def insert_version(
    connection: sa.Connection,
    model: Model,
    parent: ModelVersion | None,
    weights: Digest,
    moment: datetime,
    request: str | None = None,
    actor: str = OPERATOR,
) -> ModelVersion:
    """Insert the version after `parent` and return it. A version that a request made keeps its parent's root; any
    other is a root of its own."""
    number = 1 if parent is None else parent.number + 1
    version = ModelVersion(
        id=rows.new_id("v"),
        model=model.name,
        number=number,
        parent=None if parent is None else parent.number,
        root=number if parent is None or request is None else parent.root,
        weights=weights,
        request=request,
        created_at=moment,
    )
    values = {
        "id": version.id,
        "model_id": model.id,
        "number": version.number,
        "parent": version.parent,
        "root": version.root,
        "weights": weights,
        "request_id": request,
        "created_at": moment,
    }
    chain.insert(connection, "version_added", model_versions, values, actor=actor, model=model.name, request=request)
    return version


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidConfig(
            f"{name!r} is no name for a model; use up to 100 letters, digits, '.', '_' and '-', not a sign first"
        )


def _check_reason(reason: str) -> None:
    """Raise UserError where `reason` is not one word: history holds no free text."""
    if not _REASON.fullmatch(reason):
        raise UserError(f"{reason!r} is no reason that history can keep: give one word, such as the number of a ticket")


def _to_summary(row: sa.RowMapping) -> ErasureSummary:
    recheck = None
    if row["recheck_id"] is not None:
        recheck = rows.to_recheck({column.name: row[f"recheck_{column.name}"] for column in rechecks.c})
    return ErasureSummary(
        erasure=row["id"],
        version=row["version"],
        request=row["request_id"],
        behaviour=rows.to_behaviour(row),
        created_at=row["created_at"],
        samples_in_target=row["samples_in_target"],
        probes_in_target=row["probes_in_target"],
        recheck=recheck,
        recipe_origin=row["recipe_origin"],
    )


_MOVES = rows.with_model(aliases_history)


def _newest_move(connection: sa.Connection, model: Model, alias: str) -> AliasMove | None:
    query = _MOVES.where(aliases_history.c.model_id == model.id, aliases_history.c.alias == alias)
    row = connection.execute(query.order_by(*rows.newest_first(aliases_history)).limit(1)).mappings().one_or_none()
    return None if row is None else _to_move(row)


def _to_move(row: sa.RowMapping) -> AliasMove:
    return AliasMove(
        model=row["model"],
        alias=row["alias"],
        version=row["version"],
        previous=row["previous"],
        forced=row["forced"],
        reason=row["reason"],
        actor=row["actor"],
        created_at=row["created_at"],
    )
