"""When a window begins: cron expressions, time zones, daylight saving, what was missed. Nothing here runs."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsu_ray.config import Timings
from fsu_ray.errors import FsuError, LedgerUnavailable, UserError
from fsu_ray.records import Schedule, Window
from fsu_ray.schedule import check_schedule, due, ends_at, local, next_start, pause, serve
from fsu_ray.storage.ledger import open_ledger

BERLIN = ZoneInfo("Europe/Berlin")
LONG_AGO = datetime(2027, 1, 1, tzinfo=UTC)


def schedule(cron: str = "0 2 * * *", timezone: str = "Europe/Berlin", **changes: Any) -> Schedule:
    known: dict[str, Any] = {
        "id": "s-1", "model": "m", "cron": cron, "timezone": timezone, "max_requests": None, "minutes": None,
        "state": "active", "actor": "operator", "created_at": LONG_AGO, "changed_at": LONG_AGO,
    }  # fmt: skip
    return Schedule(**{**known, **changes})


def window(starts_at: datetime, fired_at: datetime) -> Window:
    return Window("s-1", starts_at, 0, fired_at, "w", None, None, 0)


def at(*clock: int, fold: int = 0) -> datetime:
    """A moment by the clocks of Berlin, in UTC."""
    return datetime(*clock, fold=fold, tzinfo=BERLIN).astimezone(UTC)  # type: ignore[arg-type,misc]


def fired_by_the_minute(daily: Schedule, start: datetime, end: datetime) -> list[datetime]:
    """The windows of a scheduler that makes a pass every minute, after a last window at `start`."""
    fired, moment = [], start
    while moment <= end:
        window = due(daily, fired[-1] if fired else start, moment)
        if window is not None:
            assert window[1] == 0, "a scheduler that passes every minute misses nothing"
            fired.append(window[0])
        moment += timedelta(minutes=1)
    return fired


@pytest.mark.parametrize(
    ("cron", "timezone", "minutes", "most", "words"),
    [
        ("0 2 * *", "UTC", None, None, "give five fields"),
        ("", "UTC", None, None, "give five fields"),
        ("@daily", "UTC", None, None, "give five fields"),
        ("0 0 2 * * *", "UTC", None, None, "give five fields"),
        ("0 25 * * *", "UTC", None, None, "does not parse: bad hour"),
        ("0 2 * * MOO", "UTC", None, None, "does not parse: bad day-of-week"),
        ("*/0 2 * * *", "UTC", None, None, "does not parse: bad minute"),
        ("0 2 30 2 *", "UTC", None, None, "does not parse: bad day-of-month"),
        ("0 2 */31 2 MON#5", "UTC", None, None, "never comes"),
        (f"{','.join(map(str, range(40)))} 2 * * *", "UTC", None, None, "longer than 100"),
        ("0 2 * * *", "Europe/Berln", None, None, "no time zone 'Europe/Berln' .*did you mean Europe/Berlin"),
        ("0 2 * * *", "Europe", None, None, "no time zone 'Europe'"),
        ("0 2 * * *", "../UTC", None, None, "no time zone"),
        ("0 2 * * *", "", None, None, "no time zone ''"),
        ("0 2 * * *", "UTC", 0, None, "--minutes 0: the window ends before it starts"),
        ("0 2 * * *", "UTC", -5, None, "--minutes -5: the window ends before it starts"),
        ("0 2 * * *", "UTC", 2**40, None, "at most 10080"),
        ("0 2 * * *", "UTC", None, 0, "--max-requests 0"),
        ("0 2 * * *", "UTC", None, 2**40, "--max-requests"),
    ],
)  # fmt: skip
def test_invalid_schedules_are_refused_in_one_line(
    cron: str, timezone: str, minutes: int | None, most: int | None, words: str
) -> None:
    with pytest.raises(UserError, match=words.replace("'", ".")) as refused:
        check_schedule(cron, timezone, minutes, most)
    assert "\n" not in str(refused.value)


def test_a_valid_expression_is_returned_with_single_spaces() -> None:
    assert check_schedule(" 0  2 * *\t* ", "Europe/Berlin", 240, 20) == "0 2 * * *"


def test_a_window_is_due_from_its_start_on_and_not_before() -> None:
    before = (at(2027, 6, 1, 2), at(2027, 6, 2, 1, 59))
    assert due(schedule(), *before) is None
    assert due(schedule(), before[0], at(2027, 6, 2, 2)) == (at(2027, 6, 2, 2), 0)
    assert due(schedule(), at(2027, 6, 2, 2), at(2027, 6, 2, 23)) is None, "it has been fired"


def test_a_window_that_was_missed_runs_once_not_n_times() -> None:
    """Three nights without a scheduler are one window, whether or not it has an end."""
    for minutes in (None, 60):
        tested = schedule(minutes=minutes)
        start, missed = due(tested, at(2027, 6, 1, 2), at(2027, 6, 4, 9)) or (None, None)
        assert (start, missed) == (at(2027, 6, 4, 2), 2)
        assert due(tested, start, at(2027, 6, 4, 9)) is None


def test_starts_before_it_was_added_or_during_a_pause_are_not_made_up() -> None:
    resumed = schedule(changed_at=at(2027, 6, 4, 8))
    assert due(resumed, at(2027, 6, 1, 2), at(2027, 6, 4, 9)) is None
    assert due(resumed, None, at(2027, 6, 5, 9)) == (at(2027, 6, 5, 2), 0)


@pytest.mark.parametrize(
    ("day", "starts_at"),
    [((2027, 3, 28), at(2027, 3, 28, 3)), ((2027, 10, 31), at(2027, 10, 31, 2, 30))],
    ids=["skipped hour", "repeated hour"],
)
def test_half_past_two_in_berlin_comes_once_on_the_days_the_clocks_change(
    day: tuple[int, int, int], starts_at: datetime
) -> None:
    """In March 02:30 is skipped: right after the gap, at 03:00. In October it comes twice: the first time."""
    noon = at(*day, 12)
    assert fired_by_the_minute(schedule("30 2 * * *"), noon - timedelta(days=1), noon) == [starts_at]
    assert starts_at.astimezone(BERLIN).utcoffset() == timedelta(hours=2)


@pytest.mark.parametrize(("day", "hours"), [((2027, 3, 28), 23), ((2027, 10, 31), 25)])
def test_each_hour_of_a_day_on_which_the_clocks_change_is_one(day: tuple[int, int, int], hours: int) -> None:
    """`0 * * * *` goes by the real time: 23 and 25 windows, an hour apart."""
    start = at(*day, 0)
    fired = fired_by_the_minute(
        schedule("0 * * * *"), start - timedelta(minutes=1), start + timedelta(hours=hours, minutes=-1)
    )
    assert len(fired) == hours
    assert {b - a for a, b in pairwise(fired)} == {timedelta(hours=1)}


def test_the_next_start_in_a_repeated_hour_is_tomorrow() -> None:
    """At the second 02:10, the first 02:30 has been."""
    coming = next_start(schedule("30 2 * * *"), at(2027, 10, 31, 2, 10, fold=1))
    assert coming == at(2027, 11, 1, 2, 30)
    assert local(schedule(), coming) == "2027-11-01 02:30 CET"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cron=st.sampled_from(["0 2 * * *", "30 2 * * *", "*/15 * * * *", "15,45 1-3 * * *", "0 */3 * * 1-5", "5 0 1 * *"]),
    zone=st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "UTC"]),
    hours=st.integers(0, 24 * 365),
    gap=st.integers(1, 60 * 24 * 10),
)
def test_due_and_next_start_agree(cron: str, zone: str, hours: int, gap: int) -> None:
    """From one window to any later moment: what is due counts every start between, and the next one lies after."""
    tested = schedule(cron, zone)
    fired = next_start(tested, LONG_AGO + timedelta(hours=hours))
    moment = fired + timedelta(minutes=gap)
    starts, start = [], next_start(tested, fired)
    while start <= moment:
        starts.append(start)
        start = next_start(tested, start)
    assert starts == sorted(set(starts))
    assert due(tested, fired, moment) == ((starts[-1], len(starts) - 1) if starts else None)


def test_a_window_ends_its_minutes_after_its_start() -> None:
    start = at(2027, 6, 1, 2)
    tested = schedule(minutes=60)
    assert ends_at(schedule(), window(start, start)) is None
    assert ends_at(tested, window(start, start)) == at(2027, 6, 1, 3)
    assert ends_at(tested, window(start, at(2027, 6, 1, 2, 59))) == at(2027, 6, 1, 3), "late, but in time"


def test_a_window_that_was_over_before_it_was_fired_gets_its_minutes_then() -> None:
    """It runs once, late, rather than not at all."""
    start = at(2027, 6, 1, 2)
    assert ends_at(schedule(minutes=60), window(start, at(2027, 6, 1, 9))) == at(2027, 6, 1, 10)
    assert ends_at(schedule(minutes=60), window(start, at(2027, 6, 1, 3))) == at(2027, 6, 1, 4)


def test_the_scheduler_sleeps_until_the_next_start_but_at_most_half_a_minute() -> None:
    daily, paused = schedule(), schedule("* * * * *", state="paused")
    unknown = schedule("* * * * *", "Mars/Olympus")
    start = at(2027, 6, 1, 2)

    def seconds(before: float, passed: float | None = None) -> float:
        moment = start - timedelta(seconds=before)
        return pause([daily, paused, unknown], start - timedelta(seconds=passed or before), moment)

    assert seconds(3600) == 30
    assert seconds(12) == 12
    assert seconds(-5, passed=5) == 0.05, "the start came during the pass"
    assert pause([], start, start) == 30
    assert pause([], start, start, timings=Timings(scheduler_pass=5)) == 5


def test_a_resident_scheduler_survives_an_unavailable_ledger(new_ledger: Path, tmp_path: Path) -> None:
    """The error of a pass is reported and the next pass follows; an interrupt ends the scheduler."""
    passes: list[datetime] = []
    errors: list[FsuError] = []
    slept: list[float] = []

    def one_pass(moment: datetime) -> None:
        passes.append(moment)
        if len(passes) == 1:
            raise LedgerUnavailable("away")
        if len(passes) == 3:
            raise KeyboardInterrupt

    shutil.copy(new_ledger, tmp_path / "ledger.db")
    with open_ledger(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger, pytest.raises(KeyboardInterrupt):
        serve(ledger, one_pass, errors.append, timings=Timings(scheduler_pass=7), sleep=slept.append)
    assert (len(passes), [str(error) for error in errors], slept) == (3, ["away"], [7, 7])
