"""`fsu request`: what is to be erased."""

from __future__ import annotations

from typing import Annotated

import typer

from fsu_ray import console
from fsu_ray.cli.shared import Json, one_line, open_app
from fsu_ray.errors import InvalidBehaviour, UserError
from fsu_ray.records import Behaviour, Status

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
    recipe: Annotated[str, typer.Option(help="default, digits, deep or paper.")] = "default",
    change: Annotated[list[str] | None, typer.Option("--set", help="A recipe's value, e.g. invert.steps=300.")] = None,
    json: Json = False,
) -> None:
    """Queue a request to erase a behaviour, given by a handful of samples."""
    from pydantic import ValidationError

    from fsu_ray.config import parse_change

    try:
        wanted = Behaviour.model_validate({"name": behaviour, "kind": kind, "targets": target})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidBehaviour(f"behaviour: {'.'.join(str(p) for p in first['loc'])}: {first['msg']}") from None
    opened = open_app()
    made = opened.recipe(recipe, tuple(parse_change(text) for text in change or ()))
    request, new = opened.submit(model, wanted, samples, made)
    if json:
        console.print_json({"request": request, "new": new})
    elif new:
        console.out.print(f"queued {request.id}: {request.sample_count} samples; `fsu run` carries it out")
    else:
        console.out.print(f"the same request is already {request.status}: {request.id}")


@request_app.command("list", epilog="Example: fsu request list --model m")
@one_line
def request_list(
    model: str | None = None,
    status: Annotated[str | None, typer.Option(help=", ".join(Status))] = None,
    json: Json = False,
) -> None:
    """Requests, in the order in which they came."""
    if status is not None and status not in list(Status):
        raise UserError(f"no status {status!r}: use {', '.join(Status)}")
    found = open_app().ledger.requests(model, Status(status) if status else None)
    if json:
        console.print_json(found)
        return
    rows = [
        [
            r.id,
            r.model,
            r.behaviour.name,
            r.behaviour.kind,
            " ".join(map(str, r.behaviour.targets)),
            r.status.value,
            r.attempt,
            console.when(r.submitted_at),
        ]
        for r in found
    ]
    columns = ["request", "model", "behaviour", "kind", "targets", "status", "attempt", "submitted"]
    console.out.print(console.table("Requests", columns, rows))


@request_app.command("show", epilog="Example: fsu request show r-19")
@one_line
def request_show(request: str, json: Json = False) -> None:
    """One request with its report; the beginning of its id is enough."""
    found = open_app().ledger.request(request)
    if json:
        console.print_json(found)
        return
    behaviour = found.behaviour
    console.out.print(
        f"{found.id}: {behaviour.name} ({behaviour.kind}, targets {list(behaviour.targets)}) of {found.model}"
    )
    version = f", version {found.version}" if found.version is not None else ""
    console.out.print(f"{found.status}{version}, attempt {found.attempt}, {found.sample_count} samples")
    if found.reason:
        console.out.print(f"reason: {found.reason}")
    if found.report:
        console.out.print_json(data=console.plain(found.report))


@request_app.command("cancel", epilog="Example: fsu request cancel r-19")
@one_line
def request_cancel(request: str, json: Json = False) -> None:
    """Take a request out of the queue."""
    found = open_app().ledger.cancel(request)
    if json:
        console.print_json(found)
    else:
        console.out.print(f"cancelled {found.id}")
