"""`fsu`: parse and print. What commands do is in `app`; heavy imports happen inside them."""

from __future__ import annotations

import sys
from typing import Annotated, Any

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
from fsu_ray.cli.shared import Cpus, Json, Workers, interrupted, one_line, open_app

app = typer.Typer(
    help="Make a registered classifier forget, request after request, and keep a ledger of what is gone.",
    no_args_is_help=True,
    add_completion=False,
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


@app.command(epilog="Example: fsu demo")
@one_line
def demo(json: Json = False, seed: int = 0, cpus: Cpus = None) -> None:
    """Train LeNet5 on scikit-learn's digits, then erase two classes in sequence."""
    from fsu_ray import demo as show

    opened = open_app()
    with interrupted(console.REQUEUED), console.watching() as watcher:
        shown = show.demo(opened, watcher, seed, cpus)
    if json:
        history = opened.ledger.models.history(shown.model.name)
        console.print_json({"model": shown.model, "results": console.results_json(shown.results), "history": history})
    else:
        show.print_demo(opened, shown)
    raise typer.Exit(console.exit_code(shown.results))


@app.command(epilog="Example: fsu run --model m --max 5")
@one_line
def run(
    model: Annotated[str | None, typer.Option(help="Only requests of this model.")] = None,
    max_requests: Annotated[int | None, typer.Option("--max", min=1, help="End after this many requests.")] = None,
    coalesce: Annotated[bool, typer.Option("--coalesce", help="All class requests of a model in one run.")] = False,
    parallel: Annotated[int, typer.Option(min=1, help="Models side by side in this worker, at most.")] = 1,
    workers: Workers = None,
    cpus: Cpus = None,
    expect: Annotated[str | None, typer.Option(hidden=True, help="A request that the ledger must have.")] = None,
    json: Json = False,
) -> None:
    """Claim what is ready and carry it out on Ray, one request after another.

    Exit code 0: all succeeded, or nothing was ready; 1: one failed or is to be tried again; 4: one was rejected.
    """
    from fsu_ray.pipeline import WorkerOptions

    opened = open_app()
    if model is not None:
        opened.ledger.models.get(model)
    if expect is not None:
        opened.expect(expect)
    opened.reconcile()
    results: list[Any] = []
    if opened.ledger.requests.claimable(model):
        with interrupted(console.REQUEUED), console.watching() as watcher:

            def started(request: Any) -> None:
                watcher.begin()
                console.err.print(
                    f"request {request.id}: {request.behaviour.name} of {request.model}, attempt {request.attempt}"
                )

            with opened.on_ray(watcher.tell, cpus, parallel, workers) as execute:
                results = opened.run(execute, WorkerOptions(max_requests, model, parallel, coalesce), started)
    if json:
        console.print_json(console.results_json(results))
    elif not results:
        console.out.print(idle(opened.ledger, model))
    for result in [] if json else results:
        console.print_result(result)
    if not json and len({r.request.model for r in results}) == 1:
        table = _accuracy(opened.ledger, results)
        if table is not None:
            console.out.print(table)
    raise typer.Exit(console.exit_code(results))


def _accuracy(ledger: Any, results: list[Any]) -> Any:
    """Of one model's results; what was gone before the first of them is not counted as kept."""
    name = results[0].request.model
    version = next((r.version for r in results if r.version), None)
    earlier = [each.behaviour for each in ledger.models.erased(name, version and version.parent)]
    return console.accuracy_table(results, ledger.models.get(name).spec.classes, earlier)


@app.command(epilog="Example: fsu history digits-demo")
@one_line
def history(model: str, json: Json = False) -> None:
    """What happened to MODEL, oldest first."""
    events = open_app().ledger.models.history(model)
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
