"""Models and their versions, what is gone from each, and the aliases that point to them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from fsu_ray.errors import AlreadyExists, InvalidConfig, NotFound, TransitionRefused, UserError
from fsu_ray.records import AliasMove, Erasure, Model, ModelSpec, ModelVersion, Policy, Recheck, Status
from fsu_ray.storage import chain, results, rows
from fsu_ray.storage.database import Part
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
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,49}")


@dataclass(frozen=True)
class Measured:
    """What one re-check of an erasure found: see `records.Recheck`."""

    erasure: str
    probes: int
    share: float | None
    passed: bool


class Lineage(Part):
    """The ledger's models."""

    def check_name_free(self, name: str) -> None:
        """Raise what `register_model` would raise for this name."""
        _check_name(name)
        with self._database.reading() as connection:
            if connection.scalar(sa.select(models.c.id).where(models.c.name == name)) is not None:
                raise AlreadyExists(f"model {name!r} exists already; choose another name")

    def register_model(
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
            results.keep_version(connection, model, None, weights, moment, actor=actor)
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
            return results.keep_version(connection, line, latest, weights, rows.now(), actor=actor)

    def models(self) -> list[Model]:
        """All models, by name."""
        with self._database.reading() as connection:
            query = sa.select(models).order_by(models.c.name)
            return [rows.to_model(row) for row in connection.execute(query).mappings()]

    def model(self, name: str) -> Model:
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
            values: dict[str, Any] = {
                "id": rows.new_id("p"),
                "model_id": line.id,
                "policy": policy.model_dump(mode="json"),
            }
            values |= {"created_at": rows.now(), "actor": actor}
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
        """What `MODEL`, `MODEL@NUMBER` or `MODEL@ALIAS` names, the latest version for the first; raises NotFound."""
        name, _, at = reference.partition("@")
        with self._database.reading() as connection:
            model = rows.fetch_model(connection, name)
            if at.isdigit():
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

    def rechecks(self, model: str, version: int | None = None) -> dict[str, Recheck]:
        """The latest re-check of each erasure of a model, by the erasure's id; with `version` on that one alone.

        Raises NotFound.
        """
        with self._database.reading() as connection:
            line = rows.fetch_model(connection, model)
            query = sa.select(rechecks).where(rechecks.c.model_id == line.id)
            if version is not None:
                query = query.where(rechecks.c.version == version)
            found = connection.execute(query.order_by(rechecks.c.created_at, rechecks.c.id)).mappings()
            return {row["erasure_id"]: rows.to_recheck(row) for row in found}

    def keep_rechecks(
        self, model: str, version: int, measured: Sequence[Measured], actor: str = OPERATOR
    ) -> list[Recheck]:
        """Record what the probes of erasures gave on a version. Raises NotFound."""
        check_actor(actor)
        with self._database.writing(f"model {model!r}") as connection:
            line = rows.fetch_model(connection, model)
            rows.fetch_version(connection, line, version)
            moment, kept = rows.now(), []
            for each in measured:
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
            return _moves(connection, rows.fetch_model(connection, model))

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
            raise UserError(f"{alias!r} is no name for an alias; use up to 50 letters, digits, '.', '_' and '-'")
        if force and reason is None:
            raise UserError("a forced move needs a reason that history can keep, such as the number of a ticket")
        with self._database.writing(f"alias {alias!r} of {model!r}") as connection:
            line = rows.fetch_model(connection, model)
            target = rows.fetch_version(connection, line, version)
            kept = _still_there(connection, line, target.number)
            if kept and not force:
                what = ", ".join(repr(each.behaviour.name) for each in kept[:3]) + (", ..." if len(kept) > 3 else "")
                raise TransitionRefused(
                    f"version {version} of {model!r} still has {what}, erased as of version {kept[0].version}; "
                    "point the alias to a later version, or give --force --reason"
                )
            before = _newest_move(connection, line, alias)
            move = AliasMove(
                model, alias, version, None if before is None else before.version, bool(kept) and force,
                None if reason is None else check_word(reason), actor, rows.now(),
            )  # fmt: skip
            values: dict[str, Any] = {"id": rows.new_id("a"), "model_id": line.id, "alias": alias, "version": version}
            values |= {"previous": move.previous, "forced": move.forced, "reason": move.reason}
            values |= {"created_at": move.created_at, "actor": actor}
            chain.insert(connection, "alias_moved", aliases_history, values, actor=actor, model=model)
            return move


def _still_there(connection: sa.Connection, model: Model, version: int) -> list[Erasure]:
    """The erasures of a model that a version has not: neither itself nor by its parents. Oldest first."""
    gone = {erasure.behaviour.name for erasure in rows.fetch_erasures(connection, model, version)}
    query = rows.ERASURES.where(erasures.c.model_id == model.id).order_by(erasures.c.version, erasures.c.id)
    every = [rows.to_erasure(row) for row in connection.execute(query).mappings()]
    return [erasure for erasure in every if erasure.behaviour.name not in gone]


def _moves(connection: sa.Connection, model: Model, alias: str | None = None) -> list[AliasMove]:
    query = sa.select(aliases_history).where(aliases_history.c.model_id == model.id)
    if alias is not None:
        query = query.where(aliases_history.c.alias == alias)
    ordered = query.order_by(aliases_history.c.created_at, aliases_history.c.id)
    return [
        AliasMove(
            model=model.name,
            alias=row["alias"],
            version=row["version"],
            previous=row["previous"],
            forced=row["forced"],
            reason=row["reason"],
            actor=row["actor"],
            created_at=row["created_at"],
        )
        for row in connection.execute(ordered).mappings()
    ]


def _newest_move(connection: sa.Connection, model: Model, alias: str) -> AliasMove | None:
    moves = _moves(connection, model, alias)
    return moves[-1] if moves else None


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidConfig(
            f"{name!r} is no name for a model; use up to 100 letters, digits, '.', '_' and '-', not a sign first"
        )
