"""When requests are carried out: the windows of cron schedules, each opened once.

schedule ──due──> fire (the ledger decides who) ──> the model's requests, one after another ──> close ──> tidy

Requests wait until a time of the schedule's cron. From then on, in a window, ready requests are carried out until none
is ready, `max_requests` attempts were made, or the window has ended. Cron times follow Debian's cron in the schedule's
time zone (`cronsim`): a time skipped by daylight saving comes right after the gap, a repeated time comes once, and an
expression with a star for its minute or hour follows real time.
"""

from __future__ import annotations

import time
import zoneinfo
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import partial
from threading import Event
from typing import Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from fsu_ray.config import Timings
from fsu_ray.errors import FsuError, RunFailed, UserError
from fsu_ray.pipeline import Heartbeat, Result, WorkerOptions, retry_while_unavailable
from fsu_ray.records import Schedule, Status, Window
from fsu_ray.retention import tidy
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.ledger import Ledger

MOST_MINUTES = 7 * 24 * 60
MOST_REQUESTS = 1_000_000
MOST_CHARACTERS = 100  # of a cron expression, in the ledger
TIMINGS = Timings()

Remaining = Literal["ready", "later", "nothing"]
"""What is left for a window: a request that can begin, one that may begin later, or nothing."""

RunQueue = Callable[[WorkerOptions], list[Result]]
"""Claims and carries out requests by the given options, e.g. on Ray. It is called only if a request is ready."""


@dataclass(frozen=True)
class WindowResult:
    """What a pass did with one schedule.

    `window`: the window, with its count of requests; None if the pass failed before one was open. `resumed`: an earlier
    scheduler had opened it. `results`: of its requests in this pass. `error`: what ended it early.
    """

    schedule: Schedule
    window: Window | None
    resumed: bool
    results: tuple[Result, ...]
    closed: bool
    error: FsuError | None


def check_schedule(cron: str, timezone: str, minutes: int | None = None, max_requests: int | None = None) -> str:
    """`cron` with single spaces; raises UserError if no schedule can be made of these values."""
    expression = " ".join(cron.split())
    if len(expression.split()) != 5:
        raise UserError(
            f"--cron {cron!r}: give five fields (minute, hour, day of month, month, day of week), such as '0 2 * * *'"
        )
    if len(expression) > MOST_CHARACTERS:
        raise UserError(f"--cron is longer than {MOST_CHARACTERS} characters: use ranges (1-5) and steps (*/2)")
    zone = _zone(timezone)
    try:
        next(CronSim(expression, datetime.now(zone)))
    except CronSimError as error:
        reason = f"{str(error)[:1].lower()}{str(error)[1:]}"
        raise UserError(f"--cron {cron!r} does not parse: {reason}; '0 2 * * *' is 02:00 each day") from None
    except StopIteration:
        raise UserError(f"--cron {cron!r} never comes: correct its day of month or its month") from None
    if minutes is not None and minutes < 1:
        raise UserError(f"--minutes {minutes}: the window ends before it starts; give 1 or more, or leave it out")
    if minutes is not None and minutes > MOST_MINUTES:
        raise UserError(f"--minutes {minutes}: a window takes at most {MOST_MINUTES} (a week); leave it out for no end")
    if max_requests is not None and not 1 <= max_requests <= MOST_REQUESTS:
        raise UserError(f"--max-requests {max_requests}: give 1 to {MOST_REQUESTS}, or leave it out for all")
    return expression


def due(schedule: Schedule, fired: datetime | None, moment: datetime) -> tuple[datetime, int] | None:
    """The window to open at `moment`: its start, and how many earlier starts it replaces; None if none is due.

    The start is the latest cron time up to `moment` that is later than `fired` (the start of the last window) and than
    the time at which the schedule was added or resumed: what passed during a pause is not made up. All missed times
    together give one window, even if their minutes are over (`ends_at` says how long it lasts).
    """
    after = schedule.changed_at if fired is None else max(fired, schedule.changed_at)
    latest, count = None, 0
    for start in _times(schedule, after):
        if start > moment:
            break
        latest, count = start, count + 1
    return None if latest is None else (latest, count - 1)


def next_start(schedule: Schedule, moment: datetime) -> datetime:
    """The first time of the cron after `moment`, in UTC."""
    return next(_times(schedule, moment))


def ends_at(schedule: Schedule, window: Window) -> datetime | None:
    """The time from which a window begins no more requests, None for no end. A request that runs then is completed.

    `minutes` count from the window's start, even if it was opened late. A window that was opened after that end has its
    minutes from then on: requests missed at night are better carried out by day than a day late. Pause a schedule that
    must not make up for missed windows.
    """
    if schedule.minutes is None:
        return None
    length = timedelta(minutes=schedule.minutes)
    end = window.starts_at + length
    return end if window.fired_at < end else window.fired_at + length


def local(schedule: Schedule, moment: datetime) -> str:
    """`moment` on the clocks of the schedule's time zone, to the minute."""
    return moment.astimezone(_zone(schedule.timezone)).strftime("%Y-%m-%d %H:%M %Z")


def run_due(
    ledger: Ledger,
    artifacts: Artifacts,
    run_queue: RunQueue,
    worker: str,
    moment: datetime,
    on_window: Callable[[Schedule, Window], object] | None = None,
    *,
    timings: Timings = TIMINGS,
) -> list[WindowResult]:
    """One pass over the active schedules: continue windows that were left open, open those that are due at `moment`.

    A window is left open for the next pass while a request of its model waits for a retry or runs elsewhere, and after
    an error. An error in one schedule is in its result and does not affect the others. `on_window` is called with each
    window. After a window was closed, the policies of all models are applied (`retention.tidy`). An interrupt leaves
    the window open, and another scheduler may continue it at once.
    """
    passes: list[WindowResult] = []
    for schedule in ledger.schedules.all():
        while schedule.state == "active":
            try:
                taken = _take(ledger, schedule, worker, moment, timings.lease)
            except FsuError as error:
                passes.append(WindowResult(schedule, None, False, (), False, error))
                break
            if taken is None:
                break
            window, resumed = taken
            if on_window is not None:
                on_window(schedule, window)
            passes.append(_work(ledger, run_queue, schedule, window, resumed, timings))
            if not passes[-1].closed:
                break
    if any(result.closed for result in passes):
        retry_while_unavailable(lambda: tidy(ledger, artifacts))
    return passes


def serve(
    ledger: Ledger,
    one_pass: Callable[[datetime], object],
    on_error: Callable[[FsuError], None],
    *,
    timings: Timings = TIMINGS,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Make passes until an interrupt. `on_error` is called with what ended a pass, such as an unavailable database."""
    while True:
        moment, seconds = datetime.now(UTC), timings.scheduler_pass
        try:
            one_pass(moment)
            seconds = pause(ledger.schedules.all(), moment, datetime.now(UTC), timings=timings)
        except FsuError as error:
            on_error(error)
        sleep(seconds)


def pause(schedules: list[Schedule], passed: datetime, moment: datetime, *, timings: Timings = TIMINGS) -> float:
    """The seconds from `moment` to the first start after the pass of `passed`, at most `timings.scheduler_pass`."""
    seconds = timings.scheduler_pass
    for schedule in schedules:
        with suppress(UserError):  # a time zone that this machine does not know: the pass reports it
            if schedule.state == "active":
                seconds = min(seconds, (next_start(schedule, passed) - moment).total_seconds())
    return max(seconds, 0.05)


def _take(
    ledger: Ledger, schedule: Schedule, worker: str, moment: datetime, lease: float
) -> tuple[Window, bool] | None:
    """The window to work in, and whether it was opened before; None if there is none."""
    last = ledger.schedules.last_window(schedule.id)
    if last is not None and last.finished_at is None:
        window = ledger.schedules.resume_window(schedule, worker, lease)
        return None if window is None else (window, True)
    start = due(schedule, None if last is None else last.starts_at, moment)
    window = None if start is None else ledger.schedules.fire(schedule, *start, worker, lease)
    return None if window is None else (window, False)


def _work(
    ledger: Ledger, run_queue: RunQueue, schedule: Schedule, window: Window, resumed: bool, timings: Timings
) -> WindowResult:
    """Carry out requests in a window that this worker holds, then close it or leave it open."""
    results: list[Result] = []
    stop = Event()
    try:
        renew = partial(ledger.schedules.renew_window, window, timings.lease)
        with Heartbeat(renew, stop=stop, timings=timings):
            remaining = retry_while_unavailable(lambda: _remaining(ledger, schedule, window, 0))
            while remaining == "ready" and not stop.is_set():
                remaining = _run_next(ledger, run_queue, schedule, window, results, timings.lease)
        closed, count = remaining == "nothing", window.requests + len(results)
        release = ledger.schedules.close_window if closed else ledger.schedules.release_window
        retry_while_unavailable(lambda: release(window, count))
        return WindowResult(schedule, replace(window, requests=count), resumed, tuple(results), closed, None)
    except Exception as error:
        failure = error if isinstance(error, FsuError) else RunFailed(f"{type(error).__name__}: {error}")
        _leave_open(ledger, window, results)
        left_at = replace(window, requests=window.requests + len(results))
        return WindowResult(schedule, left_at, resumed, tuple(results), False, failure)
    except BaseException:
        _leave_open(ledger, window, results)
        raise


def _run_next(
    ledger: Ledger, run_queue: RunQueue, schedule: Schedule, window: Window, results: list[Result], lease: float
) -> Remaining:
    """Carry out the next request of a window, add its result and record the count: what is left then."""
    ended = run_queue(WorkerOptions(max_requests=1, model=schedule.model, until=ends_at(schedule, window)))
    results += ended
    count = window.requests + len(results)
    retry_while_unavailable(lambda: ledger.schedules.renew_window(window, lease, count))
    remaining = retry_while_unavailable(lambda: _remaining(ledger, schedule, window, len(results)))
    return "later" if remaining == "ready" and not ended else remaining  # another worker was faster


def _remaining(ledger: Ledger, schedule: Schedule, window: Window, done: int) -> Remaining:
    """What is left for a window in which `done` requests were carried out since it was opened or resumed."""
    moment, end = datetime.now(UTC), ends_at(schedule, window)
    if end is not None and moment >= end:
        return "nothing"
    if schedule.max_requests is not None and window.requests + done >= schedule.max_requests:
        return "nothing"
    if ledger.schedules.get(schedule.id).state != "active":
        return "nothing"
    if ledger.requests.claimable(schedule.model):
        return "ready"
    if ledger.requests.all(schedule.model, Status.RUNNING):
        return "later"
    queued = ledger.requests.all(schedule.model, Status.QUEUED)
    retried = any(each.retry_at and (each.not_before is None or each.not_before <= moment) for each in queued)
    return "later" if retried else "nothing"


def _leave_open(ledger: Ledger, window: Window, results: list[Result]) -> None:
    """Leave a window open for the next pass. If the ledger is unavailable, the end of the lease does so."""
    with suppress(FsuError):
        retry_while_unavailable(
            lambda: ledger.schedules.release_window(window, window.requests + len(results)), seconds=5
        )


def _times(schedule: Schedule, after: datetime) -> Iterator[datetime]:
    """The times of the cron after `after`, in UTC, each later than the last."""
    for at in CronSim(schedule.cron, after.astimezone(_zone(schedule.timezone))):
        start = at.astimezone(UTC)
        if start > after:  # in a repeated hour, cronsim begins with the first passage
            yield start
            after = start


def _zone(name: str) -> ZoneInfo:
    """The time zone of that name; raises UserError."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # ZoneInfoNotFoundError is a KeyError
        similar = get_close_matches(name, zoneinfo.available_timezones(), n=1)
        instead = f"did you mean {similar[0]}?" if similar else "use a name such as Europe/Berlin or UTC"
        raise UserError(f"no time zone {name!r} on this machine: {instead}") from None
