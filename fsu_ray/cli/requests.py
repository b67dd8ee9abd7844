"""`fsu request`: what is to be erased."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from fsu_ray import console
from fsu_ray.cli.recipes import origin_words, print_ignored_settings, recipe_from, recipe_words
from fsu_ray.cli.shared import (
    OPERATOR,
    Changes,
    Json,
    OneModel,
    Who,
    behaviour_of,
    fail_as,
    one_line,
    parse_time,
)
from fsu_ray.errors import UserError
from fsu_ray.records import Request, RequestEvent, SearchedRecipe, Status, Terms
from fsu_ray.service import Service, connect

request_app = typer.Typer(help="Requests: what is to be erased.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(help="Its id, or the beginning of it.")]
MaybeWho = Annotated[str | None, typer.Option("--by", envvar="FSU_ACTOR", help="Your opaque id, for the record.")]


@request_app.command(
    "submit", epilog="Example: fsu request submit --model m --behaviour truck --kind class --target 9 --samples folder/"
)
@one_line
def request_submit(
    model: Annotated[str, typer.Option(help="The model that is to forget.")],
    behaviour: Annotated[str, typer.Option(help="A name for what is to be erased.")],
    target: Annotated[list[int], typer.Option(help="Target class; may be repeated.")],
    samples: Annotated[
        str, typer.Option(help="A folder of images, an image or a Parquet file: 5-10 are enough for a class.")
    ],
    kind: Annotated[
        str, typer.Option(help="class: whole classes. subset: some samples that are wrongly given these classes.")
    ] = "class",
    recipe: Annotated[
        str | None,
        typer.Option(help="default, digits, deep, very-deep or paper. Default: what a search found, else default."),
    ] = None,
    change: Changes = None,
    key: Annotated[
        str | None, typer.Option(help="Idempotency key: repeats with this key return the same request.")
    ] = None,
    priority: Annotated[int, typer.Option(help="Higher is earlier.")] = 0,
    not_before: Annotated[str | None, typer.Option(help="A time such as 2027-01-31T02:00, or +12h, +3d.")] = None,
    due: Annotated[str | None, typer.Option(help="The deadline: a time, likewise.")] = None,
    generator: Annotated[
        str | None, typer.Option(help="Use this generator and no other; it may be another model's.")
    ] = None,
    by: MaybeWho = None,
    json: Json = False,
) -> None:
    """Queue a request to erase a behaviour that a handful of samples show."""
    erased = behaviour_of(behaviour, kind, target)
    start, deadline = parse_time(not_before, "--not-before"), parse_time(due, "--due")
    with fail_as(UserError, "--due"):
        terms = Terms(
            key=key, priority=priority, not_before=start, due_at=deadline, requested_by=by, generator=generator
        )
    service = connect()
    resolved = service.recipes.resolve(model, erased.kind, recipe, change or ())
    request, new = service.requests.submit(model, erased, samples, resolved, terms)
    if new:
        print_ignored_settings(resolved)
    if json:
        console.print_json({"request": request, "new": new, "recipe_from": recipe_from(resolved) if new else None})
        return
    if new:
        console.out.print(f"recipe: {recipe_words(resolved)}", markup=False)
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
    model: OneModel = None,
    status: Annotated[str | None, typer.Option(help=f"One of {', '.join(Status)}.")] = None,
    overdue: Annotated[bool, typer.Option("--overdue", help="Only requests that are late and have not ended.")] = False,
    json: Json = False,
) -> None:
    """List requests in the order of their submission.

    With --overdue the exit code is 5 where there are any, for monitoring.
    """
    requests = connect().requests.all(model, status, overdue)
    if json:
        console.print_json(requests)
        raise typer.Exit(5 if overdue and requests else 0)
    now = datetime.now(UTC)
    rows = [
        [
            r.id, r.model, r.behaviour.name, r.behaviour.kind, " ".join(map(str, r.behaviour.targets)), r.status.value,
            r.attempt, r.priority, console.when(r.submitted_at),
            console.when(r.due_at) + (" overdue" if r.overdue(now) else ""),
        ]
        for r in requests
    ]  # fmt: skip
    columns = ["request", "model", "behaviour", "kind", "targets", "status", "attempt", "priority", "submitted", "due"]
    console.out.print(console.table("Requests", columns, rows))
    raise typer.Exit(5 if overdue and requests else 0)


@request_app.command("show", epilog="Example: fsu request show r-19")
@one_line
def request_show(request: Id, json: Json = False) -> None:
    """Show one request with its steps and its report."""
    service = connect()
    shown = service.requests.get(request)
    events, origin = service.requests.events(shown.id), service.requests.recipe_origin(shown)
    if json:
        of_recipe = {"recipe_digest": shown.recipe.digest, "recipe_origin": None if origin is None else origin.id}
        console.print_json({**console.plain(shown), **of_recipe, "events": events})
        return
    _print_request(service, shown, origin)
    _print_steps(events)
    if shown.report:
        console.out.print_json(data=console.plain(shown.report))


def _print_request(service: Service, request: Request, origin: SearchedRecipe | None) -> None:
    behaviour = request.behaviour
    console.out.print(
        f"{request.id}: {behaviour.name} ({behaviour.kind}, targets {list(behaviour.targets)}) of {request.model}"
    )
    version = f", version {request.version}" if request.version is not None else ""
    console.out.print(f"{request.status}{version}, attempt {request.attempt}, {request.sample_count} samples")
    console.out.print(f"recipe {request.recipe.digest[:12]}: {origin_words(origin)}")
    if request.generator:
        owner = service.generators.get(request.generator).model
        console.out.print(f"generator {request.generator} of {owner}, and no other")
    if request.reason:
        console.out.print(f"reason: {request.reason}")
    if request.batch_leader:
        console.out.print(f"carried out in the run of {request.batch_leader}")
    for name, at in (("not before", request.not_before), ("due", request.due_at), ("tried again at", request.retry_at)):
        if at is not None:
            console.out.print(f"{name} {console.when(at)}")
    if request.cancel_by and not request.status.is_terminal:
        console.out.print(f"{request.cancel_by} wants it cancelled: it ends at its next step")


def _print_steps(events: list[RequestEvent]) -> None:
    rows = [
        [console.when(e.at), e.old.value if e.old else "", e.new.value, e.attempt, e.actor, e.reason or ""]
        for e in events
    ]
    console.out.print(console.table("Steps", ["at", "from", "to", "attempt", "by", "reason"], rows))


@request_app.command("cancel", epilog="Example: fsu request cancel r-19")
@one_line
def request_cancel(request: Id, by: Who = OPERATOR, json: Json = False) -> None:
    """End a request: at once where it waits, at its next step where it runs."""
    cancelled = connect().requests.cancel(request, by)
    if json:
        console.print_json(cancelled)
    elif cancelled.status is Status.RUNNING:
        console.out.print(f"{cancelled.id} is running: it ends at its next step")
    else:
        console.out.print(f"cancelled {cancelled.id}")


@request_app.command("approve", epilog="Example: fsu request approve r-19 --by bob")
@one_line
def request_approve(request: Id, by: MaybeWho = None, json: Json = False) -> None:
    """Queue a request that awaits approval. The requester cannot approve it."""
    approved = connect().requests.approve(request, _decider(by))
    if json:
        console.print_json(approved)
    else:
        console.out.print(f"approved {approved.id}: queued")


@request_app.command("deny", epilog="Example: fsu request deny r-19 --by bob")
@one_line
def request_deny(request: Id, by: MaybeWho = None, json: Json = False) -> None:
    """End a request that awaits approval as rejected. The requester cannot deny it."""
    denied = connect().requests.deny(request, _decider(by))
    if json:
        console.print_json(denied)
    else:
        console.out.print(f"denied {denied.id}: rejected")


def _decider(by: str | None) -> str:
    if by is None:
        raise UserError("say who decides: --by ID, or FSU_ACTOR")
    return by
