"""What may be asked of a model line: the rules that a new request passes before it is written."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa

from fsu_ray.errors import AlreadyErased, AlreadyExists, InvalidBehaviour
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Model, Request, Status, Terms
from fsu_ray.storage import chain, recipes, rows
from fsu_ray.storage.claims import step_waiting
from fsu_ray.storage.planning import check_compatible
from fsu_ray.storage.schema import LIVE, TERMS, generators, requests


def derived_key(behaviour: Behaviour, samples: str) -> str:
    """What makes two submissions the same where no key is given: the behaviour, and the digest of its samples."""
    return hashlib.sha256(f"{behaviour.canonical()}:{samples}".encode()).hexdigest()


def find_duplicate(
    connection: sa.Connection, model: Model, behaviour: Behaviour, samples: str, recipe: Recipe | None, terms: Terms
) -> Request | None:
    """The request that this submission repeats, if there is one; with whatever recipe where `recipe` is None.

    A key that was given stands for its request for ever, a derived one until the request has ended. Raises
    AlreadyExists where a given key stands for something else, and where a generator is asked for that the live request
    does not ask for.
    """
    key, generator = terms.key, terms.generator
    same = rows.REQUESTS.where(requests.c.model_id == model.id)
    if key is not None:
        same = same.where(requests.c.idempotency_key == key)
    else:
        derived = derived_key(behaviour, samples)
        same = same.where(requests.c.idempotency_key == derived, requests.c.status.in_(LIVE))
    row = connection.execute(same.order_by(requests.c.submitted_at.desc()).limit(1)).mappings().one_or_none()
    if row is None:
        return None
    found = rows.to_request(row)
    wanted = (behaviour, samples, recipe or found.recipe, generator)
    if key is None and generator not in (None, found.generator):
        raise AlreadyExists(
            f"request {found.id} of {model.name!r} asks for the same and is {found.status.value}, without generator "
            f"{generator}; wait for its end, or `fsu request cancel {found.id}`"
        )
    if key is not None and (found.behaviour, found.samples, found.recipe, found.generator) != wanted:
        raise AlreadyExists(
            f"the idempotency key {key!r} of {model.name!r} stands for request {found.id}, which asks for something "
            "else; give a key of its own"
        )
    return found


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
    erased = rows.fetch_gone(connection, model)
    for earlier, version in erased:
        if earlier.name == behaviour.name:
            raise AlreadyErased(
                f"behaviour {behaviour.name!r} of {model.name!r} is already erased in version {version}; "
                "give another name if this is something else"
            )
    gone = {target: version for earlier, version in erased if earlier.kind == "class" for target in earlier.targets}
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


def named_generator(connection: sa.Connection, terms: Terms) -> Terms:
    """`terms` with the whole id of the generator whose id, or the beginning of it, they name; raises NotFound."""
    if terms.generator is None:
        return terms
    found = rows.fetch_by_id(connection, rows.GENERATORS, generators, terms.generator)
    return terms.model_copy(update={"generator": found["id"]})


def check_generator(connection: sa.Connection, model: Model, recipe: Recipe, terms: Terms) -> None:
    """Raise GeneratorUnfit where the generator that `terms` name cannot serve the model now."""
    if terms.generator is not None:
        found = rows.to_generator(rows.fetch_by_id(connection, rows.GENERATORS, generators, terms.generator))
        base = rows.fetch_version(connection, model)
        check_compatible(found, model, rows.fetch_sealed_root(connection, model, base), recipe)


def insert(
    connection: sa.Connection,
    model: Model,
    behaviour: Behaviour,
    samples: str,
    sample_count: int,
    recipe: Recipe,
    terms: Terms,
    actor: str,
    approval: bool,
) -> Request:
    """Write a request as submitted and queue it, or have it wait for approval: two steps of `records.TRANSITIONS`."""
    moment = rows.now_after(recipes.newest(connection, model, behaviour.kind))
    values = {
        "id": rows.new_id("r"),
        "model_id": model.id,
        **rows.behaviour_columns(behaviour),
        "samples": samples,
        "sample_count": sample_count,
        "recipe": recipe.model_dump(mode="json"),
        "idempotency_key": terms.key or derived_key(behaviour, samples),
        "submitted_at": moment,
        "key_given": terms.key is not None,
        "priority": terms.priority,
        "not_before": terms.not_before,
        "due_at": terms.due_at,
        "requested_by": terms.requested_by,
        "generator_id": terms.generator,
    }
    counted = {"status": Status.SUBMITTED, "changes": 1, "changed_at": moment, "changed_by": actor}
    made = sa.insert(requests).values(**values, **counted).returning(requests)
    row = connection.execute(made).mappings().one()
    asked = chain.row_of(requests, values, TERMS)
    chain.note(connection, "submitted", requests, asked, actor=actor, model=model.name, request=values["id"])
    request = rows.to_request({**row, "model": model.name})
    return step_waiting(connection, request, Status.AWAITING_APPROVAL if approval else Status.QUEUED, actor, moment)


def _classes(targets: list[int] | tuple[int, ...]) -> str:
    return f"class{'es' if len(targets) > 1 else ''} {', '.join(map(str, targets))}"
