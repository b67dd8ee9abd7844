"""When requests are carried out: the windows of cron schedules, each fired once.

schedule ──due──> fire (the ledger decides who) ──> the model's requests, one after another ──> close ──> tidy

Requests are collected until a time of the schedule's cron comes; from then on, in its window, what is ready is
carried out, until nothing is, `max_requests` attempts were made or the window has ended. Cron times are those of
Debian's cron in the schedule's time zone (`cronsim`): a time that daylight saving skips comes right after the gap,
one that it repeats comes once, and an expression with a star for its minute or its hour goes by the real time.
"""

from __future__ import annotations

import time
import zoneinfo
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from threading import Event
from typing import Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from fsu_ray.config import LEASE_SECONDS
from fsu_ray.errors import FsuError, RunFailed, UserError
from fsu_ray.pipeline import Heartbeat, Result, WorkerOptions, retry_while_unavailable
from fsu_ray.records import Schedule, Status, Window
from fsu_ray.retention import tidy
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.ledger import Ledger

PASS_SECONDS = 30.0
"""A resident scheduler looks at the schedules at least this often."""

MOST_MINUTES = 7 * 24 * 60
MOST_REQUESTS = 1_000_000
MOST_CHARACTERS = 100  # of a cron expression, in the ledger

Remaining = Literal["ready", "later", "nothing"]
RunQueue = Callable[[WorkerOptions], list[Result]]
"""Claims and carries out what a `Drain` wants, e.g. on Ray; it is only called where something is ready."""


@dataclass(frozen=True)
class WindowResult:
    """What a pass did with one schedule: its `window` (None where it came to none), whether an earlier scheduler had
    opened it, the results of its requests, whether it was `closed`, and the error that ended it early."""

    schedule: Schedule
    window: Window | None
    resumed: bool
    results: tuple[Result, ...]
    closed: bool
    error: FsuError | None


def check_schedule(cron: str, timezone: str, minutes: int | None = None, max_requests: int | None = None) -> str:
    """`cron` with single spaces, where a schedule can be made of these; raises UserError."""
    given = " ".join(cron.split())
    if len(given.split()) != 5:
        raise UserError(
            f"--cron {cron!r}: give five fields (minute, hour, day of month, month, day of week), such as '0 2 * * *'"
        )
    if len(given) > MOST_CHARACTERS:
        raise UserError(f"--cron is longer than {MOST_CHARACTERS} characters: use ranges (1-5) and steps (*/2)")
    zone = _zone(timezone)
    try:
        next(CronSim(given, datetime.now(zone)))
    except CronSimError as error:
        reason = f"{str(error)[:1].lower()}{str(error)[1:]}"
        raise UserError(f"--cron {cron!r} does not parse: {reason}; '0 2 * * *' is 02:00 each day") from None
    except StopIteration:
        raise UserError(f"--cron {cron!r} never comes: mend its day of month or its month") from None
    if minutes is not None and minutes < 1:
        raise UserError(f"--minutes {minutes}: the window ends before it starts; give 1 or more, or leave it out")
    if minutes is not None and minutes > MOST_MINUTES:
        raise UserError(f"--minutes {minutes}: a window takes at most {MOST_MINUTES} (a week); leave it out for no end")
    if max_requests is not None and not 1 <= max_requests <= MOST_REQUESTS:
        raise UserError(f"--max-requests {max_requests}: give 1 to {MOST_REQUESTS}, or leave it out for all")
    return given


def due(schedule: Schedule, fired: datetime | None, moment: datetime) -> tuple[datetime, int] | None:
    """The window to fire at `moment`: its start and how many earlier ones it stands for; None where none is due.

    It is the latest time of the cron up to `moment` that lies after `fired`, the start of the last window, and after
    the schedule was added or resumed: what passed while it was paused is not made up. However many times were missed,
    and whether or not their minutes are over: they are one window (`ends_at` says how long that one lasts).
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
    """When a window takes no more requests; a request that runs then goes on to its end. None: it has no end.

    `minutes` count from the window's start, also where it was fired late but in time. Only a window that was over
    already when it was fired gets its minutes from then on: requests that nobody carried out at night had better be
    carried out by day than a day late. Pause a schedule that must not make up for what it missed.
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
    carry: RunQueue,
    worker: str,
    moment: datetime,
    begun: Callable[[Schedule, Window], None] | None = None,
) -> list[WindowResult]:
    """One pass over the active schedules: go on with windows that were left open, fire those that are due at `moment`.

    A window is left open for the next pass while a request of its model waits to be tried again or runs elsewhere, and
    where something broke. What breaks in one schedule is in its `error` and keeps none of the others. `begun` hears of
    each window. Once a window was closed, what the policies want gone is destroyed (`upkeep.tidy`), of every model. An
    interrupt leaves the window open, to be resumed at once.
    """
    fired: list[WindowResult] = []
    for schedule in ledger.schedules.all():
        while schedule.state == "active":
            try:
                taken = _take(ledger, schedule, worker, moment)
            except FsuError as error:
                fired.append(WindowResult(schedule, None, False, (), False, error))
                break
            if taken is None:
                break
            window, resumed = taken
            if begun is not None:
                begun(schedule, window)
            fired.append(_work(ledger, carry, schedule, window, resumed))
            if not fired[-1].closed:
                break
    if any(each.closed for each in fired):
        retry_while_unavailable(lambda: tidy(ledger, artifacts))
    return fired


def serve(ledger: Ledger, one_pass: Callable[[datetime], object], on_progress: Callable[[FsuError], None]) -> None:
    """Pass after pass, until an interrupt; `tell` hears what kept one from its end, such as a database that is away."""
    while True:
        moment, seconds = datetime.now(UTC), PASS_SECONDS
        try:
            one_pass(moment)
            seconds = pause(ledger.schedules.all(), moment, datetime.now(UTC))
        except FsuError as error:
            on_progress(error)
        time.sleep(seconds)


def pause(schedules: list[Schedule], passed: datetime, moment: datetime) -> float:
    """The seconds from `moment` to the first start since the pass of `passed`, `PASS_SECONDS` at most."""
    seconds = PASS_SECONDS
    for schedule in schedules:
        with suppress(UserError):  # a time zone that this machine does not know: its pass says so
            if schedule.state == "active":
                seconds = min(seconds, (next_start(schedule, passed) - moment).total_seconds())
    return max(seconds, 0.05)


def _take(ledger: Ledger, schedule: Schedule, worker: str, moment: datetime) -> tuple[Window, bool] | None:
    """The window to work in, and whether it was opened before."""
    last = ledger.schedules.last_window(schedule.id)
    if last is not None and last.finished_at is None:
        window = ledger.schedules.resume_window(schedule, worker, LEASE_SECONDS)
        return None if window is None else (window, True)
    found = due(schedule, None if last is None else last.starts_at, moment)
    fired = None if found is None else ledger.schedules.fire(schedule, *found, worker, LEASE_SECONDS)
    return None if fired is None else (fired, False)


def _work(ledger: Ledger, carry: RunQueue, schedule: Schedule, window: Window, resumed: bool) -> WindowResult:
    """RunQueue out requests in a window that this worker holds, then close it or leave it open."""
    results: list[Result] = []
    stop = Event()
    try:
        with Heartbeat(lambda: ledger.schedules.renew_window(window, LEASE_SECONDS), stop=stop):
            left = retry_while_unavailable(lambda: _left(ledger, schedule, window, 0))
            while left == "ready" and not stop.is_set():
                left = _one(ledger, carry, schedule, window, results)
        over, count = left == "nothing", window.requests + len(results)
        leave = ledger.schedules.close_window if over else ledger.schedules.release_window
        retry_while_unavailable(lambda: leave(window, count))
        return WindowResult(schedule, replace(window, requests=count), resumed, tuple(results), over, None)
    except Exception as error:
        failure = error if isinstance(error, FsuError) else RunFailed(f"{type(error).__name__}: {error}")
        _leave(ledger, window, results)
        left_at = replace(window, requests=window.requests + len(results))
        return WindowResult(schedule, left_at, resumed, tuple(results), False, failure)
    except BaseException:
        _leave(ledger, window, results)
        raise


def _one(ledger: Ledger, carry: RunQueue, schedule: Schedule, window: Window, results: list[Result]) -> Remaining:
    """RunQueue out the next request of a window, add its result, keep the count in the ledger: what is left then."""
    ended = carry(WorkerOptions(max_requests=1, model=schedule.model, until=ends_at(schedule, window)))
    results += ended
    count = window.requests + len(results)
    retry_while_unavailable(lambda: ledger.schedules.renew_window(window, LEASE_SECONDS, count))
    left = retry_while_unavailable(lambda: _left(ledger, schedule, window, len(results)))
    return "later" if left == "ready" and not ended else left  # another worker was faster


def _left(ledger: Ledger, schedule: Schedule, window: Window, done: int) -> Remaining:
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
    again = any(each.retry_at and (each.not_before is None or each.not_before <= moment) for each in queued)
    return "later" if again else "nothing"


def _leave(ledger: Ledger, window: Window, results: list[Result]) -> None:
    """Leave a window open for the next pass; where the ledger is away, that can have it when its lease is over."""
    with suppress(FsuError):
        retry_while_unavailable(
            lambda: ledger.schedules.release_window(window, window.requests + len(results)), seconds=5
        )


def _times(schedule: Schedule, after: datetime) -> Iterator[datetime]:
    """The times of the cron after `after`, in UTC, each later than the one before."""
    for at in CronSim(schedule.cron, after.astimezone(_zone(schedule.timezone))):
        start = at.astimezone(UTC)
        if start > after:  # in a repeated hour, cronsim begins with its first passage
            yield start
            after = start


def _zone(name: str) -> ZoneInfo:
    """The time zone of a name; raises UserError."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # ZoneInfoNotFoundError is a KeyError
        near = get_close_matches(name, zoneinfo.available_timezones(), n=1)
        instead = f"did you mean {near[0]}?" if near else "use a name such as Europe/Berlin or UTC"
        raise UserError(f"no time zone {name!r} on this machine: {instead}") from None
