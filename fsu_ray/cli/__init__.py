"""`fsu`: parse and print. What commands do is in `fsu_ray.service`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fsu_ray import console
from fsu_ray.cli.artifacts import artifacts_app
from fsu_ray.cli.audit import audit_app
from fsu_ray.cli.generators import generator_app
from fsu_ray.cli.jobs import idle, jobs_app, submit_app
from fsu_ray.cli.lineage import alias_app, lineage_app
from fsu_ray.cli.models import model_app
from fsu_ray.cli.recipes import recipe_app
from fsu_ray.cli.reproduce import reproduce_app
from fsu_ray.cli.requests import request_app
from fsu_ray.cli.schedules import schedule_app, scheduler_app
from fsu_ray.cli.search import search_app
from fsu_ray.cli.shared import (
    Coalesce,
    Cpus,
    Json,
    MaxRequests,
    ModelName,
    Parallel,
    Workers,
    announce,
    interrupted,
    one_line,
)
from fsu_ray.records import Request
from fsu_ray.service import Service, connect

if TYPE_CHECKING:
    from rich.table import Table

    from fsu_ray.pipeline import Result

app = typer.Typer(
    help="Make a registered classifier forget, request after request, and keep a ledger of what is erased.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(model_app, name="model")
app.add_typer(request_app, name="request")
app.add_typer(recipe_app, name="recipe")
app.add_typer(generator_app, name="generator")
app.add_typer(artifacts_app, name="artifacts")
app.add_typer(audit_app, name="audit")
app.add_typer(alias_app, name="alias")
app.add_typer(lineage_app)
app.add_typer(schedule_app, name="schedule")
app.add_typer(scheduler_app)
app.add_typer(search_app)
app.add_typer(submit_app)
app.add_typer(jobs_app, name="jobs")
app.add_typer(reproduce_app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            said = version("fsu_ray")
        except PackageNotFoundError:  # a Ray job got the folder of the package alone
            said = "of unknown version: the package is not installed here, it was sent to this machine"
        console.out.print(f"fsu_ray {said}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Options of `fsu` itself."""


@app.command(epilog="Example: fsu demo")
@one_line
def demo(
    json: Json = False,
    seed: Annotated[int, typer.Option(help="Of the training and of the samples.")] = 0,
    cpus: Cpus = None,
) -> None:
    """Train LeNet5 on scikit-learn's digits, then erase two classes, one after the other."""
    from fsu_ray import demo as digits

    service = connect()
    with interrupted(console.REQUEUED), console.watching() as watcher:
        done = digits.demo(service, watcher, seed, cpus)
    if json:
        history = service.models.history(done.model.name)
        console.print_json({"model": done.model, "results": console.results_json(done.results), "history": history})
    else:
        digits.print_demo(service, done)
    raise typer.Exit(console.exit_code(done.results))


@app.command(epilog="Example: fsu run --model m --max 5")
@one_line
def run(
    model: Annotated[str | None, typer.Option(help="Only requests of this model.")] = None,
    max_requests: MaxRequests = None,
    coalesce: Coalesce = False,
    parallel: Parallel = 1,
    workers: Workers = None,
    cpus: Cpus = None,
    expect: Annotated[str | None, typer.Option(hidden=True, help="A request that the ledger must have.")] = None,
    json: Json = False,
) -> None:
    """Claim the requests that are ready and carry them out on Ray, until none is ready.

    Exit code 0: all succeeded, or none was ready. 1: a request failed, or waits to be tried again. 4: the gate
    rejected a result.
    """
    service = connect()
    if expect is not None:
        service.requests.check_known(expect)
    with interrupted(console.REQUEUED), console.watching() as watcher:

        def on_claim(request: Request) -> None:
            watcher.begin()
            announce(request)

        results = service.run(
            model=model, max_requests=max_requests, parallel=parallel, coalesce=coalesce, workers=workers, cpus=cpus,
            on_progress=watcher.tell, on_claim=on_claim,
        )  # fmt: skip
    if json:
        console.print_json(console.results_json(results))
    elif not results:
        console.out.print(idle(service, model))
    else:
        _print_results(service, results)
    raise typer.Exit(console.exit_code(results))


def _print_results(service: Service, results: Sequence[Result]) -> None:
    for result in results:
        console.print_result(result)
    if len({result.request.model for result in results}) == 1:
        accuracy = _accuracy(service, results)
        if accuracy is not None:
            console.out.print(accuracy)


def _accuracy(service: Service, results: Sequence[Result]) -> Table | None:
    """The accuracy by class over the results of one model; classes that were erased before count as erased."""
    name = results[0].request.model
    parent = next((result.version.parent for result in results if result.version), None)
    earlier = [erasure.behaviour for erasure in service.models.erased(name, parent)]
    return console.accuracy_table(results, service.models.get(name).spec.classes, earlier)


@app.command(epilog="Example: fsu history digits-demo")
@one_line
def history(model: ModelName, json: Json = False) -> None:
    """Show what happened to MODEL, oldest first."""
    events = connect().models.history(model)
    if json:
        console.print_json(events)
    else:
        console.out.print(console.history_table(model, events))


def main() -> None:
    """The entry point of `fsu`."""
    try:
        app()
    except BrokenPipeError:  # `fsu history m | head`
        sys.stderr.close()
        sys.exit(0)
