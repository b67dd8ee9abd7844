"""What may be asked of a model line: the rules that a new request passes before it is written."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa

from fsu_ray.errors import AlreadyErased, InvalidBehaviour
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Model, Request, Status
from fsu_ray.storage import rows
from fsu_ray.storage.claims import fetch
from fsu_ray.storage.schema import LIVE, requests


def idempotency_key(behaviour: Behaviour, samples: str) -> str:
    """What makes two submissions the same: the behaviour, and the digest of its samples."""
    return hashlib.sha256(f"{behaviour.canonical()}:{samples}".encode()).hexdigest()


def live_twin(connection: sa.Connection, model: Model, key: str) -> Request | None:
    """The request with this idempotency key that has not ended yet."""
    query = rows.REQUESTS.where(
        requests.c.model_id == model.id, requests.c.idempotency_key == key, requests.c.status.in_(LIVE)
    )
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else rows.to_request(row)


def check_targets(behaviour: Behaviour, model: Model) -> None:
    """Raise InvalidBehaviour where the targets are no classes of the model, or all of them."""
    classes = model.spec.classes
    outside = [target for target in behaviour.targets if target >= classes]
    if outside:
        raise InvalidBehaviour(f"{model.name!r} has no {_classes(outside)}; its classes are 0 to {classes - 1}")
    if len(behaviour.targets) == classes:
        raise InvalidBehaviour(f"all {classes} classes of {model.name!r} are targets; leave at least one that is not")


def check_line(connection: sa.Connection, behaviour: Behaviour, model: Model) -> None:
    """Raise AlreadyErased or InvalidBehaviour where what is erased as of the latest version leaves nothing to do.

    Erasing a class must leave two, a subset one that its samples may get: with fewer there is nothing to classify.
    """
    erased = rows.fetch_erasures(connection, model, rows.fetch_version(connection, model).number)
    for earlier in erased:
        if earlier.behaviour.name == behaviour.name:
            raise AlreadyErased(
                f"behaviour {behaviour.name!r} of {model.name!r} is already erased in version {earlier.version}; "
                "give another name if this is something else"
            )
    gone = {
        target: earlier.version
        for earlier in erased
        if earlier.behaviour.kind == "class"
        for target in earlier.behaviour.targets
    }
    if behaviour.kind == "class" and set(behaviour.targets) <= set(gone):
        version = max(gone[target] for target in behaviour.targets)
        raise AlreadyErased(f"{_classes(behaviour.targets)} of {model.name!r} is already erased in version {version}")
    left = model.spec.classes - len(gone.keys() | set(behaviour.targets))
    least = 2 if behaviour.kind == "class" else 1
    if left < least:
        raise InvalidBehaviour(
            f"{_classes(behaviour.targets)}: with what is erased already this leaves {left} of the "
            f"{model.spec.classes} classes of {model.name!r}, and {least} must stay; give fewer targets"
        )


def insert(
    connection: sa.Connection, model: Model, behaviour: Behaviour, samples: str, sample_count: int, recipe: Recipe
) -> Request:
    """Write a request as submitted and queue it, as two steps of `records.TRANSITIONS`."""
    request_id = rows.new_id("r")
    connection.execute(
        sa.insert(requests).values(
            id=request_id,
            model_id=model.id,
            **rows.behaviour_columns(behaviour),
            samples=samples,
            sample_count=sample_count,
            recipe=recipe.model_dump(mode="json"),
            idempotency_key=idempotency_key(behaviour, samples),
            submitted_at=rows.now(),
            status=Status.SUBMITTED,
        )
    )
    connection.execute(
        sa.update(requests)
        .where(requests.c.id == request_id, requests.c.status == Status.SUBMITTED)
        .values(status=Status.QUEUED)
    )
    return fetch(connection, request_id)


def _classes(targets: list[int] | tuple[int, ...]) -> str:
    return f"class{'es' if len(targets) > 1 else ''} {', '.join(map(str, targets))}"
