"""Models and their versions, what is gone from each, and the aliases that point to them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from fsu_ray.errors import AlreadyExists, InvalidConfig, NotFound, TransitionRefused, UserError
from fsu_ray.records import AliasMove, Behaviour, Erasure, Model, ModelSpec, ModelVersion, Policy, Recheck, Status
from fsu_ray.storage import chain, history, rows
from fsu_ray.storage.database import Database
from fsu_ray.storage.policies import OPERATOR, check_actor, check_word, fetch_policy
from fsu_ray.storage.schema import (
    aliases_history,
    erasures,
    model_policies,
    model_versions,
    models,
    rechecks,
    requests,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_NUMBER = re.compile(r"[0-9]{1,18}")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,49}")


@dataclass(frozen=True)
class Measured:
    """What one re-check of an erasure found: see `records.Recheck`."""

    erasure: str
    probes: int
    share: float | None
    passed: bool


@dataclass(frozen=True)
class ErasureSummary:
    """An erasure in short, with its measures: the shares of target samples and of probes still in a target class as
    they were at the erasure, None where there was nothing to measure on, and the latest re-check on any version.
    `recipe_origin` is the search that found its recipe, None where none did."""

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
        """Raise what `register_model` would raise for this name."""
        _check_name(name)
        with self._database.reading() as connection:
            if connection.scalar(sa.select(models.c.id).where(models.c.name == name)) is not None:
                raise AlreadyExists(f"model {name!r} exists already; choose another name")

    def register(
        self, name: str, spec: ModelSpec, weights: str, test_set: str | None = None, actor: str = OPERATOR
    ) -> Model:
        """A new model with version 1, its own root. `weights` is the digest of an artifact, `test_set` the name
        of a labelled data set.

        Raises AlreadyExists where the name is taken, InvalidConfig where it is no name.
        """
        _check_name(name)
        check_actor(actor)
        moment = rows.now()
        model = Model(id=rows.new_id("m"), name=name, spec=spec, test_set=test_set, created_at=moment)
        with self._database.writing(f"model {name!r}") as connection:
            columns = {"id": model.id, "name": name, "test_set": test_set, "created_at": moment}
            values: dict[str, Any] = {**columns, "spec": spec.model_dump(mode="json")}
            chain.insert(connection, "registered", models, values, actor=actor, model=name)
            insert_version(connection, model, None, weights, moment, actor=actor)
        return model

    def add_version(self, model: str, weights: str, actor: str = OPERATOR) -> ModelVersion:
        """A version that was trained further outside: a child of the latest, and a root of its own.

        Raises NotFound, and TransitionRefused while a request of the model is running.
        """
        check_actor(actor)
        with self._database.writing(f"model {model!r}") as connection:
            line = rows.fetch_model(connection, model)
            running = connection.scalar(
                sa.select(requests.c.id).where(requests.c.model_id == line.id, requests.c.status == Status.RUNNING)
            )
            if running is not None:
                raise TransitionRefused(f"request {running} of {model!r} is running; add the version when it has ended")
            latest = rows.fetch_version(connection, line)
            return insert_version(connection, line, latest, weights, rows.now(), actor=actor)

    def all(self) -> list[Model]:
        """All models, by name."""
        with self._database.reading() as connection:
            query = sa.select(models).order_by(models.c.name)
            return [rows.to_model(row) for row in connection.execute(query).mappings()]

    def get(self, name: str) -> Model:
        """The model of that name; raises NotFound."""
        with self._database.reading() as connection:
            return rows.fetch_model(connection, name)

    def policy(self, model: str) -> Policy:
        """The policy of a model that is in force; raises NotFound."""
        with self._database.reading() as connection:
            return fetch_policy(connection, rows.fetch_model(connection, model))

    def set_policy(self, model: str, policy: Policy, actor: str = OPERATOR) -> Policy:
        """Put a policy in force for a model; the earlier ones stay on record. Raises NotFound."""
        check_actor(actor)
        with self._database.writing(f"model {model!r}") as connection:
            line = rows.fetch_model(connection, model)
            before = sa.select(sa.func.max(model_policies.c.created_at)).where(model_policies.c.model_id == line.id)
            values: dict[str, Any] = {
                "id": rows.new_id("p"),
                "model_id": line.id,
                "policy": policy.model_dump(mode="json"),
            }
            values |= {"created_at": rows.now_after(connection.scalar(before)), "actor": actor}
            chain.insert(connection, "policy_set", model_policies, values, actor=actor, model=model)
        return policy

    def versions(self, model: str) -> list[ModelVersion]:
        """The versions of a model by number; raises NotFound."""
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            query = rows.VERSIONS.where(model_versions.c.model_id == line.id).order_by(model_versions.c.number)
            return [rows.to_version(row) for row in connection.execute(query).mappings()]

    def version(self, model: str, number: int | None = None) -> ModelVersion:
        """One version of a model, the latest for None; raises NotFound."""
        with self._database.reading() as connection:
            return rows.fetch_version(connection, rows.fetch_model(connection, model), number)

    def resolve(self, reference: str) -> tuple[Model, ModelVersion]:
        """What `MODEL`, `MODEL@NUMBER` or `MODEL@ALIAS` names, the latest version for the first.

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
            moved = _newest_move(connection, model, at)
            if moved is None:
                raise NotFound(f"model {name!r} has no alias {at!r}; `fsu alias list {name}` shows them")
            return model, rows.fetch_version(connection, model, moved.version)

    def erasures(self, model: str, version: int | None = None) -> list[Erasure]:
        """What is gone as of a version (None: the latest), inherited along its parents, oldest first.

        Raises NotFound.
        """
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            return rows.fetch_erasures(connection, line, rows.fetch_version(connection, line, version).number)

    def all_erasures(self, model: str) -> list[Erasure]:
        """The erasures of all versions of a model, in whichever line of parents they are; raises NotFound."""
        with self._database.reading() as connection:
            query = rows.ERASURES.where(erasures.c.model_id == rows.fetch_model(connection, model).id)
            ordered = query.order_by(erasures.c.version, erasures.c.request_id)
            return [rows.to_erasure(row) for row in connection.execute(ordered).mappings()]

    def behaviours(self, model: str) -> dict[int, list[Behaviour]]:
        """What each version of a model that a request made has lost, by its number; raises NotFound."""
        found: dict[int, list[Behaviour]] = {}
        with self._database.reading() as connection:
            names = (erasures.c[name] for name in rows.BEHAVIOUR)
            query = sa.select(erasures.c.version, *names).where(
                erasures.c.model_id == rows.fetch_model(connection, model).id
            )
            for row in connection.execute(query.order_by(erasures.c.version, erasures.c.request_id)).mappings():
                found.setdefault(row["version"], []).append(rows.to_behaviour(row))
        return found

    def erased(self, model: str, version: int | None = None) -> list[ErasureSummary]:
        """`erasures` in short, with their measures then and now, for lines of thousands; raises NotFound."""
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            number = rows.fetch_version(connection, line, version).number
            return [_to_gone(row) for row in connection.execute(rows.measured(line, number)).mappings()]

    def rechecks(self, model: str, version: int | None = None) -> dict[str, Recheck]:
        """The latest re-check of each erasure of a model, by the erasure's id; with `version` on that one alone.

        Raises NotFound.
        """
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            found = connection.execute(rows.latest_rechecks(line, version)).mappings()
            return {row["erasure_id"]: rows.to_recheck(row) for row in found}

    def record_rechecks(
        self, model: str, version: int, measured: Sequence[Measured], actor: str = OPERATOR
    ) -> list[Recheck]:
        """Record what the probes of erasures gave on a version.

        Raises NotFound, also for an erasure that is not in force at that version.
        """
        check_actor(actor)
        with self._database.writing(f"model {model!r}") as connection:
            line = rows.fetch_model(connection, model)
            rows.fetch_version(connection, line, version)
            known = set(connection.scalars(sa.select(erasures.c.id).where(rows.in_force(line, version))))
            moment, kept = rows.now(), []
            for each in measured:
                if each.erasure not in known:
                    raise NotFound(f"erasure {each.erasure} is not in force at version {version} of {model!r}")
                values: dict[str, Any] = {
                    "id": rows.new_id("c"),
                    "erasure_id": each.erasure,
                    "model_id": line.id,
                    "version": version,
                }
                values |= {"probes": each.probes, "share": each.share, "passed": each.passed}
                values |= {"created_at": moment, "actor": actor}
                event = "recheck_passed" if each.passed else "recheck_failed"
                chain.insert(connection, event, rechecks, values, actor=actor, model=model)
                kept.append(Recheck(each.erasure, version, each.probes, each.share, each.passed, actor, moment))
            return kept

    def aliases(self, model: str) -> dict[str, AliasMove]:
        """Where the aliases of a model point, by name; raises NotFound."""
        newest = {move.alias: move for move in self.alias_moves(model)}
        return {alias: newest[alias] for alias in sorted(newest)}

    def alias_moves(self, model: str) -> list[AliasMove]:
        """Every move of an alias of a model, oldest first; raises NotFound."""
        with self._database.reading() as connection:
            query = _MOVES.where(aliases_history.c.model_id == rows.fetch_model(connection, model).id)
            ordered = query.order_by(aliases_history.c.created_at, aliases_history.c.id)
            return [_to_move(row) for row in connection.execute(ordered).mappings()]

    def move_alias(
        self, model: str, alias: str, version: int, actor: str = OPERATOR, *, force: bool = False,
        reason: str | None = None,
    ) -> AliasMove:  # fmt: skip
        """Have an alias point to a version.

        Raises NotFound, UserError (no such name for an alias, or a forced move without a reason), and
        TransitionRefused where the version still has a behaviour that another version of the model has lost,
        unless `force` says to do it all the same.
        """
        check_actor(actor)
        if not _ALIAS.fullmatch(alias):
            raise UserError(
                f"{alias!r} is no name for an alias; use a letter, then up to 49 letters, digits, '.', '_' and '-'"
            )
        if force and reason is None:
            raise UserError("a forced move needs a reason that history can keep, such as the number of a ticket")
        word = None if reason is None else check_word(reason)
        with self._database.writing(f"alias {alias!r} of {model!r}") as connection:
            line = rows.fetch_model(connection, model)
            target = rows.fetch_version(connection, line, version)
            kept = connection.execute(rows.still_there(line, target.number, most=4)).all()
            if kept and not force:
                what = ", ".join(repr(name) for name, _ in kept[:3]) + (", ..." if len(kept) > 3 else "")
                raise TransitionRefused(
                    f"version {version} of {model!r} still has {what}, erased as of version {kept[0].version}; "
                    "point the alias to a later version, or give --force --reason"
                )
            before = _newest_move(connection, line, alias)
            previous, moment = (None, None) if before is None else (before.version, before.created_at)
            at = rows.now_after(moment)
            move = AliasMove(model, alias, version, previous, bool(kept), word, actor, at)
            values: dict[str, Any] = {"id": rows.new_id("a"), "model_id": line.id, "alias": alias, "version": version}
            values |= {"previous": previous, "forced": move.forced, "reason": word, "created_at": at, "actor": actor}
            chain.insert(connection, "alias_moved", aliases_history, values, actor=actor, model=model)
            return move

    def sealed_root(self, model: str, base: ModelVersion) -> ModelVersion:
        """The version that labels D' for requests on top of `base`: that of its root's latest seal, else its root."""
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            return rows.fetch_sealed_root(connection, line, base)

    def history(self, model: str) -> list[dict[str, Any]]:
        """What happened to a model, oldest first; raises NotFound.

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
        - `rechecked` (erasures, failed, by): one for all measured at once, with their version; `recheck_failed`
          (behaviour, share, probes), one for each erasure that has come back;
        - `alias_moved` (alias, previous, forced, reason, by), with its version;
        - `generator_retired` (generator, reason, by), `sealed` (generator, by), with its version;
        - `purged` (behaviour, by): a request's target samples are gone.
        """
        with self._database.reading() as connection:
            return history.history(connection, rows.fetch_model(connection, model))


def _to_gone(row: sa.RowMapping) -> ErasureSummary:
    again = None
    if row["recheck_id"] is not None:
        columns = [column.name for column in rechecks.c]
        again = rows.to_recheck({name: row[f"recheck_{name}"] for name in columns})
    return ErasureSummary(
        erasure=row["id"],
        version=row["version"],
        request=row["request_id"],
        behaviour=rows.to_behaviour(row),
        created_at=row["created_at"],
        samples_in_target=row["samples_in_target"],
        probes_in_target=row["probes_in_target"],
        recheck=again,
        recipe_origin=row["recipe_origin"],
    )


_MOVES = sa.select(aliases_history, models.c.name.label("model")).join(
    models, models.c.id == aliases_history.c.model_id
)


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


def _newest_move(connection: sa.Connection, model: Model, alias: str) -> AliasMove | None:
    query = _MOVES.where(aliases_history.c.model_id == model.id, aliases_history.c.alias == alias)
    newest_first = query.order_by(aliases_history.c.created_at.desc(), aliases_history.c.id.desc()).limit(1)
    row = connection.execute(newest_first).mappings().one_or_none()
    return None if row is None else _to_move(row)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidConfig(
            f"{name!r} is no name for a model; use up to 100 letters, digits, '.', '_' and '-', not a sign first"
        )


def insert_version(
    connection: sa.Connection,
    model: Model,
    parent: ModelVersion | None,
    weights: str,
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
