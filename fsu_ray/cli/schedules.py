"""`fsu schedule` and `fsu scheduler`: when requests are carried out, and what carries them out then."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from fsu_ray import console
from fsu_ray.cli.shared import Cpus, Json, interrupted, one_line, open_app
from fsu_ray.errors import UserError

schedule_app = typer.Typer(help="Schedules: when the requests of a model are carried out.", no_args_is_help=True)
scheduler_app = typer.Typer()
"""The command `scheduler`, without a group of its own."""

By = Annotated[str | None, typer.Option("--by", envvar="FSU_ACTOR", help="Who does it: an opaque id.")]
Id = Annotated[str, typer.Argument(metavar="SCHEDULE", help="Its id, or the beginning of it.")]


@schedule_app.command(
    "add",
    epilog='Example: fsu schedule add --model m --cron "0 2 * * *" --timezone Europe/Berlin --max-requests 20',
)
@one_line
def schedule_add(
    model: Annotated[str, typer.Option(help="The model whose requests are carried out.")],
    cron: Annotated[str, typer.Option(help='Minute, hour, day, month, day of week: "0 2 * * *" is 02:00 each day.')],
    timezone: Annotated[str, typer.Option(help="Whose clocks the cron goes by, e.g. Europe/Berlin.")] = "UTC",
    max_requests: Annotated[int | None, typer.Option(help="Attempts in a window, at most. Default: all.")] = None,
    minutes: Annotated[int | None, typer.Option(help="Take nothing new so long after the start.")] = None,
    by: By = None,
    json: Json = False,
) -> None:
    """Have the requests of a model carried out in the window after each time of a cron expression.

    A window that was missed, with nobody there to open it, runs once, as soon as a scheduler is back. It needs one:
    `fsu scheduler`, or `fsu scheduler --once` every few minutes.
    """
    from fsu_ray.schedule import check_schedule
    from fsu_ray.storage.database import OPERATOR

    cron = check_schedule(cron, timezone, minutes, max_requests)
    made = open_app().ledger.schedules.add(model, cron, timezone, max_requests, minutes, by or OPERATOR)
    if json:
        console.print_json(_document(made, None))
    else:
        said = f"added {made.id}: its first window starts at {_next(made)}; `fsu scheduler` opens it"
        console.out.print(said, markup=False)


@schedule_app.command("list", epilog="Example: fsu schedule list --model m")
@one_line
def schedule_list(
    model: Annotated[str | None, typer.Option(help="Only schedules of this model.")] = None, json: Json = False
) -> None:
    """Schedules with their next start, in the time of their zone."""
    ledger = open_app().ledger
    found = [(each, ledger.schedules.last_window(each.id)) for each in ledger.schedules.all(model)]
    if json:
        console.print_json([_document(*each) for each in found])
    elif not found:
        console.out.print("there are no schedules; `fsu schedule add` makes one")
    else:
        rows = [
            [
                s.id, s.model, s.cron, s.timezone, s.max_requests, s.minutes, s.state, _next(s), _last(s, window),
            ]
            for s, window in found
        ]  # fmt: skip
        columns = ["schedule", "model", "cron", "time zone", "max", "minutes", "state", "next start", "last window"]
        console.out.print(console.table("Schedules", columns, rows))


@schedule_app.command("show", epilog="Example: fsu schedule show s-19")
@one_line
def schedule_show(schedule: Id, json: Json = False) -> None:
    """One schedule and the windows that it has had."""
    from fsu_ray.schedule import local

    ledger = open_app().ledger
    found = ledger.schedules.get(schedule)
    windows = ledger.schedules.windows(found.id)
    if json:
        console.print_json({**_document(found, windows[-1] if windows else None), "windows": windows})
        return
    most = "all that is ready" if found.max_requests is None else f"{found.max_requests} at most"
    length = "" if found.minutes is None else f", nothing new after {found.minutes} minutes"
    said = f"{found.id} of {found.model}: {found.cron} ({found.timezone}), {most}{length}, by {found.actor}"
    console.out.print(said, markup=False)
    state = f"{found.state} since {console.when(found.changed_at)}"
    console.out.print(state + (f", next start {_next(found)}" if found.state == "active" else ""), markup=False)
    rows = [[local(found, w.starts_at), w.missed, w.requests, _state(w), w.worker] for w in windows]
    console.out.print(console.table("Windows", ["start", "missed before", "requests", "", "scheduler"], rows))


@schedule_app.command("pause", epilog="Example: fsu schedule pause s-19")
@one_line
def schedule_pause(schedule: Id, by: By = None, json: Json = False) -> None:
    """Open no windows until the schedule is resumed; in one that is open, nothing new begins."""
    _set(schedule, "paused", by, json)


@schedule_app.command("resume", epilog="Example: fsu schedule resume s-19")
@one_line
def schedule_resume(schedule: Id, by: By = None, json: Json = False) -> None:
    """Open windows again, from the next start on: what passed meanwhile is not made up."""
    _set(schedule, "active", by, json)


@schedule_app.command("remove", epilog="Example: fsu schedule remove s-19")
@one_line
def schedule_remove(schedule: Id, by: By = None, json: Json = False) -> None:
    """Open no windows ever again; the schedule and its windows stay on record."""
    _set(schedule, "removed", by, json)


@scheduler_app.command("scheduler", epilog="Example: fsu scheduler --once")
@one_line
def scheduler(
    once: Annotated[bool, typer.Option("--once", help="One look at the schedules, e.g. from a CronJob.")] = False,
    cpus: Cpus = None,
    json: Json = False,
) -> None:
    """Open the windows of all schedules when they are due, and carry out on Ray what is ready, until interrupted.

    Several schedulers may run: each window is opened by one of them. With --once, run every few minutes, since the
    schedules say what is due: exit code 0 where nothing was or all succeeded; 1: a request failed or is to be tried
    again; 4: one was rejected.
    """
    from fsu_ray.schedule import serve

    if json and not once:
        raise UserError("--json is for --once: a scheduler that stays has no one document to print")
    opened = open_app()
    _heed_sigterm()
    if once:
        with interrupted(console.REQUEUED):
            fired = _one_pass(opened, datetime.now(UTC), cpus, quiet=json)
        if json:
            console.print_json([_fired(each) for each in fired])
        elif not fired:
            console.out.print("no window is due; `fsu schedule list` shows the next starts")
        failed = [each.error.exit_code for each in fired if each.error is not None]
        raise typer.Exit(max(failed, default=console.exit_code([r for each in fired for r in each.results])))
    try:
        count = len([each for each in opened.ledger.schedules.all() if each.state == "active"])
        console.err.print(f"scheduler: {count} active schedule{'' if count == 1 else 's'}; Ctrl-C or SIGTERM ends it")
        serve(opened.ledger, lambda moment: _one_pass(opened, moment, cpus), _complain)
    except KeyboardInterrupt:
        console.err.print("scheduler ended; a request that ran is queued again, its window goes on with the next one")


def _one_pass(opened: Any, moment: datetime, cpus: int | None, quiet: bool = False) -> list[Any]:
    """One pass over the schedules; Ray is there from the first request on, until the pass ends."""
    from fsu_ray.app import worker_name
    from fsu_ray.schedule import local, run_due

    with ExitStack() as stack:
        ray: list[Any] = []

        def started(request: Any) -> None:
            ray[1].begin()
            name = f"{request.behaviour.name} of {request.model}"
            console.err.print(f"request {request.id}: {name}, attempt {request.attempt}", markup=False)

        def carry(wanted: Any) -> list[Any]:
            if not ray:
                watcher = stack.enter_context(console.watching())
                ray.extend((stack.enter_context(opened.on_ray(watcher.tell, cpus)), watcher))
                _heed_sigterm()  # Ray's own handler would end the process and leave the request to its lease
            results: list[Any] = opened.run(ray[0], wanted, started)
            for result in [] if quiet else results:
                console.print_result(result)
            return results

        def begun(schedule: Any, window: Any) -> None:
            missed = f", for {window.missed} missed before it too" if window.missed else ""
            at = local(schedule, window.starts_at)
            console.err.print(f"schedule {schedule.id}: window of {at}{missed} of {schedule.model}", markup=False)

        opened.reconcile()
        fired = run_due(opened.ledger, opened.artifacts, carry, worker_name(), moment, begun)
    for each in [] if quiet else fired:
        _print_fired(each)
    return fired


def _print_fired(fired: Any) -> None:
    """What became of a window, in a line, after the results of its requests."""
    if fired.window is not None:
        count = len(fired.results)
        how = "closed" if fired.closed else "left open"
        requests = f"{count} request{'' if count == 1 else 's'}"
        console.out.print(f"window of schedule {fired.schedule.id}: {requests} carried out, {how}", markup=False)
    if fired.error is not None:
        _complain(fired.error, f" schedule {fired.schedule.id}:")


def _complain(error: Exception, where: str = "") -> None:
    said = " ".join(str(error).split())
    console.err.print(f"error:{where} {said}", style="red", markup=False)


def _heed_sigterm() -> None:
    """SIGTERM interrupts as Ctrl-C does: a running request goes back into the queue, its window stays open."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _set(schedule: str, state: str, by: str | None, json: bool) -> None:
    from fsu_ray.storage.database import OPERATOR

    ledger = open_app().ledger
    changed = ledger.schedules.set_state(schedule, state, by or OPERATOR)
    if json:
        console.print_json(_document(changed, ledger.schedules.last_window(changed.id)))
    else:
        following = f"; its next window starts at {_next(changed)}" if state == "active" else ""
        console.out.print(f"{changed.id} of {changed.model} is {changed.state}{following}", markup=False)


def _next(schedule: Any) -> str:
    """When its next window starts, in its own zone; nothing where it is not active."""
    from fsu_ray.schedule import local, next_start

    return local(schedule, next_start(schedule, datetime.now(UTC))) if schedule.state == "active" else ""


def _last(schedule: Any, window: Any) -> str:
    from fsu_ray.schedule import local

    return "" if window is None else f"{local(schedule, window.starts_at)}: {_state(window)}, {window.requests} done"


def _state(window: Any) -> str:
    return "open" if window.finished_at is None else "closed"


def _document(schedule: Any, window: Any) -> dict[str, Any]:
    """A schedule as `--json` prints it, with its next start (UTC) and its last window."""
    from fsu_ray.schedule import next_start

    coming = next_start(schedule, datetime.now(UTC)) if schedule.state == "active" else None
    document: dict[str, Any] = console.plain(schedule)
    return {**document, "next_start": console.plain(coming), "last_window": console.plain(window)}


def _fired(fired: Any) -> dict[str, Any]:
    return {
        "schedule": console.plain(fired.schedule),
        "window": console.plain(fired.window),
        "resumed": fired.resumed,
        "closed": fired.closed,
        "results": console.results_json(fired.results),
        "error": None if fired.error is None else str(fired.error),
    }
