"""`fsu request`: what is to be erased."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from fsu_ray import console
from fsu_ray.cli.recipes import origin_words, print_passed_over, recipe_from, recipe_words
from fsu_ray.cli.shared import OPERATOR, Json, Who, one_line, open_app
from fsu_ray.errors import InvalidBehaviour, UserError
from fsu_ray.records import Behaviour, Status, Terms

request_app = typer.Typer(help="Requests: what is to be erased.", no_args_is_help=True)


@request_app.command(
    "submit", epilog="Example: fsu request submit --model m --behaviour truck --kind class --target 9 --samples folder/"
)
@one_line
def request_submit(
    model: Annotated[str, typer.Option(help="The model that is to forget.")],
    behaviour: Annotated[str, typer.Option(help="A name for what is to be erased.")],
    target: Annotated[list[int], typer.Option(help="Target class; may be given several times.")],
    samples: Annotated[
        str, typer.Option(help="A folder of images, an image or a Parquet file: 5-10 are enough for a class.")
    ],
    kind: Annotated[str, typer.Option(help="class: whole classes; subset: some samples wrongly given them.")] = "class",
    recipe: Annotated[
        str | None,
        typer.Option(help="default, digits, deep, very-deep or paper; without: what a search found, else default."),
    ] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="A recipe's value, e.g. invert.steps=300.")] = None,
    key: Annotated[str | None, typer.Option(help="Idempotency key: submissions with one key are one request.")] = None,
    priority: Annotated[int, typer.Option(help="Higher is earlier.")] = 0,
    not_before: Annotated[str | None, typer.Option(help="A time such as 2027-01-31T02:00, or +12h, +3d.")] = None,
    due: Annotated[str | None, typer.Option(help="The deadline, likewise.")] = None,
    generator: Annotated[
        str | None, typer.Option(help="This generator is to serve and no other; it may be another model's.")
    ] = None,
    by: Who = None,
    json: Json = False,
) -> None:
    """Queue a request to erase a behaviour, given by a handful of samples."""
    from fsu_ray.config import parse_change

    wanted = behaviour_of(behaviour, kind, target)
    terms = _terms(
        key=key,
        priority=priority,
        not_before=moment(not_before, "--not-before"),
        due_at=moment(due, "--due"),
        requested_by=by,
        generator=generator,
    )
    opened = open_app()
    chosen = opened.recipe_for(model, wanted.kind, recipe, tuple(parse_change(text) for text in change or ()))
    request, new = opened.submit(model, wanted, samples, chosen, terms)
    if new:
        print_passed_over(chosen)
    if json:
        console.print_json({"request": request, "new": new, "recipe_from": recipe_from(chosen) if new else None})
        return
    if new:
        console.out.print(f"recipe: {recipe_words(chosen)}", markup=False)
    if new and request.status is Status.AWAITING_APPROVAL:
        console.out.print(
            f"{request.id} awaits approval: {request.sample_count} samples; `fsu request approve {request.id} --by ID`"
        )
    elif new:
        console.out.print(f"queued {request.id}: {request.sample_count} samples; `fsu run` carries it out")
    else:
        console.out.print(f"the same request is already {request.status}: {request.id}")


@request_app.command("list", epilog="Example: fsu request list --model m")
@one_line
def request_list(
    model: str | None = None,
    status: Annotated[str | None, typer.Option(help=", ".join(Status))] = None,
    overdue: Annotated[bool, typer.Option("--overdue", help="Only those that are late and have not ended.")] = False,
    json: Json = False,
) -> None:
    """Requests, in the order in which they came.

    With --overdue the exit code is 5 where there are any, for monitoring.
    """
    if status is not None and status not in list(Status):
        raise UserError(f"no status {status!r}: use {', '.join(Status)}")
    found = open_app().ledger.requests.all(model, Status(status) if status else None)
    now = datetime.now(UTC)
    if overdue:
        found = [r for r in found if r.overdue(now) and not r.status.is_terminal]
    if json:
        console.print_json(found)
        raise typer.Exit(5 if overdue and found else 0)
    rows = [
        [
            r.id,
            r.model,
            r.behaviour.name,
            r.behaviour.kind,
            " ".join(map(str, r.behaviour.targets)),
            r.status.value,
            r.attempt,
            r.priority,
            console.when(r.submitted_at),
            console.when(r.due_at) + (" overdue" if r.overdue(now) else ""),
        ]
        for r in found
    ]
    columns = ["request", "model", "behaviour", "kind", "targets", "status", "attempt", "priority", "submitted", "due"]
    console.out.print(console.table("Requests", columns, rows))
    raise typer.Exit(5 if overdue and found else 0)


@request_app.command("show", epilog="Example: fsu request show r-19")
@one_line
def request_show(request: str, json: Json = False) -> None:
    """One request with its steps and its report; the beginning of its id is enough."""
    ledger = open_app().ledger
    found = ledger.requests.get(request)
    events, origin = ledger.requests.events(found.id), ledger.recipes.origin(found)
    if json:
        of_recipe = {"recipe_digest": found.recipe.digest, "recipe_origin": None if origin is None else origin.id}
        console.print_json({**console.plain(found), **of_recipe, "events": events})
        return
    behaviour = found.behaviour
    console.out.print(
        f"{found.id}: {behaviour.name} ({behaviour.kind}, targets {list(behaviour.targets)}) of {found.model}"
    )
    version = f", version {found.version}" if found.version is not None else ""
    console.out.print(f"{found.status}{version}, attempt {found.attempt}, {found.sample_count} samples")
    console.out.print(f"recipe {found.recipe.digest[:12]}: {origin_words(origin)}")
    if found.generator:
        of = ledger.generators.get(found.generator).model
        console.out.print(f"generator {found.generator} of {of}, and no other")
    if found.reason:
        console.out.print(f"reason: {found.reason}")
    if found.batch_leader:
        console.out.print(f"carried out in the run of {found.batch_leader}")
    for name, at in (("not before", found.not_before), ("due", found.due_at), ("tried again at", found.retry_at)):
        if at is not None:
            console.out.print(f"{name} {console.when(at)}")
    if found.cancel_by and not found.status.is_terminal:
        console.out.print(f"{found.cancel_by} wants it cancelled: it ends at its next step")
    steps = [
        [console.when(e.at), e.old.value if e.old else "", e.new.value, e.attempt, e.actor, e.reason or ""]
        for e in events
    ]
    console.out.print(console.table("Steps", ["at", "from", "to", "attempt", "by", "reason"], steps))
    if found.report:
        console.out.print_json(data=console.plain(found.report))


@request_app.command("cancel", epilog="Example: fsu request cancel r-19")
@one_line
def request_cancel(request: str, by: Who = None, json: Json = False) -> None:
    """End a request: one that waits at once, one that runs at its next step."""
    found = open_app().ledger.requests.cancel(request, by or OPERATOR)
    if json:
        console.print_json(found)
    elif found.status is Status.RUNNING:
        console.out.print(f"{found.id} is running: it ends at its next step")
    else:
        console.out.print(f"cancelled {found.id}")


@request_app.command("approve", epilog="Example: fsu request approve r-19 --by bob")
@one_line
def request_approve(request: str, by: Who = None, json: Json = False) -> None:
    """Queue a request that awaits approval; not by who asked for it."""
    found = open_app().ledger.requests.approve(request, _decider(by))
    if json:
        console.print_json(found)
    else:
        console.out.print(f"approved {found.id}: queued")


@request_app.command("deny", epilog="Example: fsu request deny r-19 --by bob")
@one_line
def request_deny(request: str, by: Who = None, json: Json = False) -> None:
    """End a request that awaits approval as rejected; not by who asked for it."""
    found = open_app().ledger.requests.deny(request, _decider(by))
    if json:
        console.print_json(found)
    else:
        console.out.print(f"denied {found.id}: rejected")


def behaviour_of(name: str, kind: str, targets: list[int]) -> Behaviour:
    """The behaviour that was typed; raises InvalidBehaviour."""
    from pydantic import ValidationError

    try:
        return Behaviour.model_validate({"name": name, "kind": kind, "targets": targets})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidBehaviour(f"behaviour: {'.'.join(str(p) for p in first['loc'])}: {first['msg']}") from None


def _terms(**typed: Any) -> Terms:
    from pydantic import ValidationError

    try:
        return Terms(**typed)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(str(p) for p in first['loc']) or '--due'}: {first['msg']}") from None


def _decider(by: str | None) -> str:
    if by is None:
        raise UserError("say who decides: --by ID, or FSU_ACTOR")
    return by


def moment(text: str | None, option: str) -> datetime | None:
    """A time from the command line: ISO 8601 (local time where it names no zone), or `+90m`, `+12h`, `+3d` from now."""
    if text is None:
        return None
    later = re.fullmatch(r"\+(\d+(?:\.\d+)?)([mhd])", text)
    if later:
        unit = {"m": "minutes", "h": "hours", "d": "days"}[later[2]]
        return datetime.now(UTC) + timedelta(**{unit: float(later[1])})
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise UserError(f"{option} takes a time such as 2027-01-31T02:00 or +12h, got {text!r}") from None
