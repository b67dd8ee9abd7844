"""What all commands share: opening the app, `--json`, errors as one line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer

from fsu_ray import console
from fsu_ray.errors import FsuError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Who = Annotated[
    str | None, typer.Option("--by", envvar="FSU_ACTOR", help="Your opaque id, for the record; not an e-mail address.")
]
Cpus = Annotated[int | None, typer.Option(min=1, help="CPUs of the Ray of this process. Default: all.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Workers that share each run. Default: FSU_WORKERS, or one.")]
OPERATOR = "operator"
F = TypeVar("F", bound=Callable[..., Any])


def one_line(command: F) -> F:
    """End a command with an error's own exit code and its one line, without a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except FsuError as error:
            console.err.print(f"[red]error:[/] {_escaped(str(error))}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            console.err.print("interrupted", style="yellow")
            raise typer.Exit(130) from None

    return wrapped  # type: ignore[return-value]


@contextmanager
def interrupted(words: str) -> Iterator[None]:
    """Say what an interrupt of this block means for what it was at, and end with 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.err.print(f"interrupted: {words}", style="yellow", markup=False)
        raise typer.Exit(130) from None


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))


def open_app() -> Any:
    from fsu_ray.app import App

    return App.open()
