"""What many commands share: options, errors in one line, and input of people turned into records."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, ParamSpec, TypeVar

import typer
from pydantic import ValidationError

from fsu_ray import console
from fsu_ray.errors import FsuError, InvalidBehaviour, UserError
from fsu_ray.recipes import first_fault
from fsu_ray.records import OPERATOR as OPERATOR
from fsu_ray.records import Behaviour, Request

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Who = Annotated[
    str, typer.Option("--by", envvar="FSU_ACTOR", help="Your opaque id, for the record; not an e-mail address.")
]
"""With the default `OPERATOR`."""
Cpus = Annotated[int | None, typer.Option(min=1, help="CPUs of the Ray that this process starts. Default: all.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes of each run. Default: FSU_WORKERS, or one.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a value of the recipe, e.g. invert.steps=300; may be repeated."),
]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="The name of the model.")]
OneModel = Annotated[str | None, typer.Option(help="Only of this model.")]
MaxRequests = Annotated[int | None, typer.Option("--max", min=1, help="End after this many requests.")]
Coalesce = Annotated[bool, typer.Option("--coalesce", help="Erase all class requests of a model in one run.")]
Parallel = Annotated[int, typer.Option(min=1, help="Work on up to this many models at a time.")]

P = ParamSpec("P")
R = TypeVar("R")


def one_line(command: Callable[P, R]) -> Callable[P, R]:
    """End a command with the exit code and the one line of an error, without a traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except FsuError as error:
            console.err.print(f"[red]error:[/] {_escaped(str(error))}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            console.err.print("interrupted", style="yellow")
            raise typer.Exit(130) from None

    paragraphs = (command.__doc__ or "").split("\n\n")  # the help, whose line breaks `rich` would keep
    wrapped.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return wrapped


@contextmanager
def interrupted(consequence: str) -> Iterator[None]:
    """Say what an interrupt of this block means for the work in it, and end with 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.err.print(f"interrupted: {consequence}", style="yellow", markup=False)
        raise typer.Exit(130) from None


@contextmanager
def fail_as(error_type: type[FsuError], whole: str, subject: str = "", options: bool = False) -> Iterator[None]:
    """Turn the error of a record that does not validate into one line; see `recipes.first_fault` for `whole`.

    `subject` comes before it, such as `behaviour: `.
    `options`: the fields of the record are options of the command, and are named so (`samples_days`: --samples-days).
    """
    try:
        yield
    except ValidationError as error:
        fault = first_fault(error, whole)
        if options and error.errors()[0]["loc"]:
            field, _, rest = fault.partition(":")
            fault = f"--{field.replace('_', '-')}:{rest}"
        raise error_type(subject + fault) from None


def behaviour_of(name: str, kind: str, targets: list[int]) -> Behaviour:
    """The behaviour that was typed; raises InvalidBehaviour."""
    with fail_as(InvalidBehaviour, "value", "behaviour: "):
        return Behaviour.model_validate({"name": name, "kind": kind, "targets": targets})


def parse_time(text: str | None, option: str) -> datetime | None:
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


def announce(request: Request) -> None:
    """Say on standard error which request a worker has begun."""
    name = f"{request.behaviour.name} of {request.model}"
    console.err.print(f"request {request.id}: {name}, attempt {request.attempt}", markup=False)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))
