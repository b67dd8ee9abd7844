"""`fsu schedule` and `fsu scheduler`: when requests are carried out, and what carries them out then."""

from __future__ import annotations

import signal
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fsu_ray import console
from fsu_ray.cli.shared import OPERATOR, Cpus, Json, OneModel, Who, announce, interrupted, one_line
from fsu_ray.errors import UserError
from fsu_ray.records import Request, Schedule, Window
from fsu_ray.service import Service, connect

if TYPE_CHECKING:
    from fsu_ray.pipeline import Result
    from fsu_ray.schedule import WindowResult

schedule_app = typer.Typer(help="Schedules: when the requests of a model are carried out.", no_args_is_help=True)
scheduler_app = typer.Typer()
"""The command `scheduler`, without a group of its own."""

Id = Annotated[str, typer.Argument(metavar="SCHEDULE", help="Its id, or the beginning of it.")]


@schedule_app.command(
    "add",
    epilog='Example: fsu schedule add --model m --cron "0 2 * * *" --timezone Europe/Berlin --max-requests 20',
)
@one_line
def schedule_add(
    model: Annotated[str, typer.Option(help="The model whose requests are carried out.")],
    cron: Annotated[str, typer.Option(help='Minute, hour, day, month, day of week: "0 2 * * *" is 02:00 each day.')],
    timezone: Annotated[str, typer.Option(help="The time zone of the cron expression, e.g. Europe/Berlin.")] = "UTC",
    max_requests: Annotated[
        int | None, typer.Option(help="At most so many attempts in a window. Default: all.")
    ] = None,
    minutes: Annotated[int | None, typer.Option(help="Begin nothing new so long after the start.")] = None,
    by: Who = OPERATOR,
    json: Json = False,
) -> None:
    """Carry out the requests of a model in the window after each time of a cron expression.

    Windows are opened by `fsu scheduler`, or by `fsu scheduler --once` every few minutes. A window that no scheduler
    opened in time is opened once, by the next scheduler that runs.
    """
    service = connect()
    added = service.schedules.add(model, cron, timezone, max_requests, minutes, by)
    if json:
        console.print_json(_document(service, added, None))
    else:
        message = f"added {added.id}: its first window starts at {_next(service, added)}; `fsu scheduler` opens it"
        console.out.print(message, markup=False)


@schedule_app.command("list", epilog="Example: fsu schedule list --model m")
@one_line
def schedule_list(model: OneModel = None, json: Json = False) -> None:
    """List schedules with their next start, in the time of their zone."""
    service = connect()
    schedules = [(each, service.schedules.last_window(each)) for each in service.schedules.all(model)]
    if json:
        console.print_json([_document(service, *each) for each in schedules])
    elif not schedules:
        console.out.print("there are no schedules; `fsu schedule add` makes one")
    else:
        rows = [
            [
                s.id, s.model, s.cron, s.timezone, s.max_requests, s.minutes, s.state, _next(service, s),
                _last(service, s, window),
            ]
            for s, window in schedules
        ]  # fmt: skip
        columns = ["schedule", "model", "cron", "time zone", "max", "minutes", "state", "next start", "last window"]
        console.out.print(console.table("Schedules", columns, rows))


@schedule_app.command("show", epilog="Example: fsu schedule show s-19")
@one_line
def schedule_show(schedule: Id, json: Json = False) -> None:
    """Show one schedule and its windows so far."""
    service = connect()
    shown = service.schedules.get(schedule)
    windows = service.schedules.windows(shown)
    if json:
        console.print_json({**_document(service, shown, windows[-1] if windows else None), "windows": windows})
        return
    count = "all that is ready" if shown.max_requests is None else f"{shown.max_requests} at most"
    length = "" if shown.minutes is None else f", nothing new after {shown.minutes} minutes"
    what = f"{shown.id} of {shown.model}: {shown.cron} ({shown.timezone}), {count}{length}, by {shown.actor}"
    console.out.print(what, markup=False)
    state = f"{shown.state} since {console.when(shown.changed_at)}"
    coming = f", next start {_next(service, shown)}" if shown.state == "active" else ""
    console.out.print(state + coming, markup=False)
    rows = [
        [service.schedules.local_time(shown, w.starts_at), w.missed, w.requests, _state(w), w.worker] for w in windows
    ]
    console.out.print(console.table("Windows", ["start", "missed before", "requests", "", "scheduler"], rows))


@schedule_app.command("pause", epilog="Example: fsu schedule pause s-19")
@one_line
def schedule_pause(schedule: Id, by: Who = OPERATOR, json: Json = False) -> None:
    """Open no window until the schedule is resumed. In an open window nothing new begins."""
    service = connect()
    _print_changed(service, service.schedules.pause(schedule, by), json)


@schedule_app.command("resume", epilog="Example: fsu schedule resume s-19")
@one_line
def schedule_resume(schedule: Id, by: Who = OPERATOR, json: Json = False) -> None:
    """Open windows again, from the next start on. Starts during the pause are not made up for."""
    service = connect()
    _print_changed(service, service.schedules.resume(schedule, by), json)


@schedule_app.command("remove", epilog="Example: fsu schedule remove s-19")
@one_line
def schedule_remove(schedule: Id, by: Who = OPERATOR, json: Json = False) -> None:
    """Open no window ever again. The schedule and its windows stay on record."""
    service = connect()
    _print_changed(service, service.schedules.remove(schedule, by), json)


@scheduler_app.command("scheduler", epilog="Example: fsu scheduler --once")
@one_line
def scheduler(
    once: Annotated[bool, typer.Option("--once", help="Look at the schedules once, e.g. from a CronJob.")] = False,
    cpus: Cpus = None,
    json: Json = False,
) -> None:
    """Open the windows of all schedules when they are due, and carry out what is ready, until interrupted.

    Several schedulers may run: each window is opened by one of them. Run --once every few minutes: the schedules say
    what is due. Its exit code is 0 where nothing was due or all succeeded, 1 where a request failed or waits to be
    tried again, 4 where the gate rejected a result.
    """
    if json and not once:
        raise UserError("--json is for --once: a scheduler that stays has no one document to print")
    service = connect()
    _heed_sigterm()
    if once:
        with interrupted(console.REQUEUED):
            fired = _one_pass(service, None, cpus, quiet=json)
        if json:
            console.print_json([_fired_document(each) for each in fired])
        elif not fired:
            console.out.print("no window is due; `fsu schedule list` shows the next starts")
        failed = [each.error.exit_code for each in fired if each.error is not None]
        raise typer.Exit(max(failed, default=console.exit_code([r for each in fired for r in each.results])))
    try:
        count = len([each for each in service.schedules.all() if each.state == "active"])
        console.err.print(f"scheduler: {count} active schedule{'' if count == 1 else 's'}; Ctrl-C or SIGTERM ends it")
        service.serve_windows(lambda moment: _one_pass(service, moment, cpus), _complain)
    except KeyboardInterrupt:
        console.err.print("scheduler ended; a running request is queued again, and its window stays open")


def _one_pass(service: Service, moment: datetime | None, cpus: int | None, quiet: bool = False) -> list[WindowResult]:
    """One pass over the schedules, with its progress and its results printed."""
    with console.watching() as watcher:

        def on_claim(request: Request) -> None:
            watcher.begin()
            announce(request)

        def on_window(schedule: Schedule, window: Window) -> None:
            missed = f", for {window.missed} missed before it too" if window.missed else ""
            at = service.schedules.local_time(schedule, window.starts_at)
            console.err.print(f"schedule {schedule.id}: window of {at}{missed} of {schedule.model}", markup=False)

        def on_results(results: list[Result]) -> None:
            for result in [] if quiet else results:
                console.print_result(result)

        fired = service.run_windows(
            moment, cpus=cpus, on_progress=watcher.tell, on_claim=on_claim, on_window=on_window, on_results=on_results
        )
    for each in [] if quiet else fired:
        _print_fired(each)
    return fired


def _print_fired(fired: WindowResult) -> None:
    """What became of a window, in a line, after the results of its requests."""
    if fired.window is not None:
        count = len(fired.results)
        how = "closed" if fired.closed else "left open"
        requests = f"{count} request{'' if count == 1 else 's'}"
        console.out.print(f"window of schedule {fired.schedule.id}: {requests} carried out, {how}", markup=False)
    if fired.error is not None:
        _complain(fired.error, f" schedule {fired.schedule.id}:")


def _complain(error: Exception, where: str = "") -> None:
    console.err.print(f"error:{where} {' '.join(str(error).split())}", style="red", markup=False)


def _heed_sigterm() -> None:
    """SIGTERM interrupts as Ctrl-C does: a running request is queued again, its window stays open."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _print_changed(service: Service, schedule: Schedule, json: bool) -> None:
    if json:
        console.print_json(_document(service, schedule, service.schedules.last_window(schedule)))
    else:
        coming = f"; its next window starts at {_next(service, schedule)}" if schedule.state == "active" else ""
        console.out.print(f"{schedule.id} of {schedule.model} is {schedule.state}{coming}", markup=False)


def _next(service: Service, schedule: Schedule) -> str:
    """The next start, in the time zone of the schedule; empty where the schedule is not active."""
    return service.schedules.local_time(schedule, service.schedules.next_start(schedule))


def _last(service: Service, schedule: Schedule, window: Window | None) -> str:
    if window is None:
        return ""
    return f"{service.schedules.local_time(schedule, window.starts_at)}: {_state(window)}, {window.requests} done"


def _state(window: Window) -> str:
    return "open" if window.finished_at is None else "closed"


def _document(service: Service, schedule: Schedule, window: Window | None) -> dict[str, Any]:
    """A schedule as `--json` prints it, with its next start (UTC) and its last window."""
    coming = service.schedules.next_start(schedule)
    document: dict[str, Any] = console.plain(schedule)
    return {**document, "next_start": console.plain(coming), "last_window": console.plain(window)}


def _fired_document(fired: WindowResult) -> dict[str, Any]:
    return {
        "schedule": console.plain(fired.schedule),
        "window": console.plain(fired.window),
        "resumed": fired.resumed,
        "closed": fired.closed,
        "results": console.results_json(fired.results),
        "error": None if fired.error is None else str(fired.error),
    }
