"""Schedules and their windows: each window is fired once, held by one scheduler, and closed once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fsu_ray import schedule as module
from fsu_ray.config import Timings
from fsu_ray.errors import LeaseLost, LedgerUnavailable, NotFound, RunFailed, TransitionRefused, UserError
from fsu_ray.pipeline import Result, WorkerOptions, drain, run_request
from fsu_ray.records import Request, Schedule, Status, Window
from fsu_ray.schedule import RunQueue, WindowResult, run_due
from fsu_ray.storage import rows
from fsu_ray.storage import schedules as windows
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.ledger import Ledger

DAY = timedelta(days=1)
on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
"""For what no database decides: half the time."""


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime | None], None]:
    """Sets the clock of the ledger; None restores the real clock."""
    real = rows.now

    def set_clock(moment: datetime | None) -> None:
        monkeypatch.setattr(rows, "now", real if moment is None else lambda: moment)

    return set_clock


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts.open(str(tmp_path / "artifacts"))


@pytest.fixture
def add(driver: Any, at: Callable[..., None]) -> Callable[..., Schedule]:
    """Adds a schedule, some `days` ago."""

    def make(cron: str = "0 2 * * *", days: float = 0, **changes: Any) -> Schedule:
        at(datetime.now(UTC) - days * DAY)
        terms = {"timezone": "Europe/Berlin", "max_requests": None, "minutes": None, **changes}
        made: Schedule = driver.ledger.schedules.add(driver.name, cron, **terms)
        at(None)
        return made

    return make


@pytest.fixture
def carry(driver: Any) -> Callable[..., RunQueue]:
    """A function that carries requests out: it commits, or calls another function."""

    def make(run: Callable[[Request], list[Result]] | None = None, worker: str = "w1") -> RunQueue:
        def commit(request: Request) -> list[Result]:
            ledger = driver.ledger
            version = ledger.commit(request, driver.outcome(request), ledger.models.version(driver.name))
            return [Result(ledger.requests.get(request.id), version, None)]

        return lambda wanted: drain(driver.ledger, worker, wanted, lambda request, _: (run or commit)(request))

    return make


@pytest.fixture
def one_pass(driver: Any, artifacts: Artifacts, carry: Callable[..., RunQueue]) -> Callable[..., list[WindowResult]]:
    """One pass of a scheduler, by default at the present moment."""

    def make(
        run: Any = None, worker: str = "w1", moment: datetime | None = None, timings: Timings = Timings()
    ) -> list[WindowResult]:
        now = moment or datetime.now(UTC)
        return run_due(driver.ledger, artifacts, carry(run, worker), worker, now, timings=timings)

    return make


def the(fired: list[WindowResult]) -> WindowResult:
    assert len(fired) == 1
    return fired[0]


def window_of(ledger: Ledger, schedule: Schedule) -> Window:
    window = ledger.schedules.last_window(schedule.id)
    assert window is not None
    return window


class TestSchedules:
    def test_it_is_paused_resumed_and_removed(self, driver: Any, add: Callable[..., Schedule]) -> None:
        made = add(max_requests=20, minutes=240, actor="alice")
        terms = (made.model, made.cron, made.timezone, made.max_requests, made.minutes, made.state, made.actor)
        assert terms == ("digits", "0 2 * * *", "Europe/Berlin", 20, 240, "active", "alice")
        ledger = driver.ledger
        paused = ledger.schedules.set_state(made.id[:6], "paused", "bob")
        assert (paused.state, paused.changed_at > made.changed_at) == ("paused", True)
        assert ledger.schedules.set_state(made.id, "active").state == "active"
        assert ledger.schedules.set_state(made.id, "removed").state == "removed"
        assert ledger.schedules.all() == []
        assert [each.state for each in ledger.schedules.all("digits", removed=True)] == ["removed"]
        assert ledger.schedules.get(made.id).state == "removed", "it stays on record"

    @on_sqlite
    def test_the_present_state_is_refused(self, driver: Any, add: Callable[..., Schedule]) -> None:
        made = add()
        with pytest.raises(TransitionRefused, match="is active already"):
            driver.ledger.schedules.set_state(made.id, "active")
        driver.ledger.schedules.set_state(made.id, "removed")
        with pytest.raises(TransitionRefused, match="is removed; `fsu schedule add` makes another"):
            driver.ledger.schedules.set_state(made.id, "active")

    @on_sqlite
    def test_the_last_state_stays_the_last_where_clocks_disagree(
        self, driver: Any, add: Callable[..., Schedule], at: Callable[..., None]
    ) -> None:
        made = add()
        at(datetime.now(UTC) - DAY)
        assert driver.ledger.schedules.set_state(made.id, "paused").state == "paused"

    @on_sqlite
    def test_unknown_schedules_and_actors_with_full_names_are_refused(
        self, driver: Any, add: Callable[..., Schedule]
    ) -> None:
        made = add()
        for wrong in (lambda: driver.ledger.schedules.get("s-none"), lambda: driver.ledger.schedules.all("nobody")):
            with pytest.raises(NotFound):
                wrong()
        with pytest.raises(UserError, match="no opaque id"):
            driver.ledger.schedules.set_state(made.id, "paused", "a@example.org")

    def test_schedules_are_in_the_audit_chain(self, driver: Any, add: Callable[..., Schedule], raw: Any) -> None:
        made = add()
        driver.ledger.schedules.fire(made, datetime(2027, 1, 1, 2, tzinfo=UTC), 0, "w1", 60)
        driver.ledger.schedules.set_state(made.id, "paused", "bob")
        events = raw.execute("SELECT event, actor, model FROM audit_events WHERE event LIKE '%_d' ORDER BY seq").all()
        known = [tuple(row) for row in events if row.event in ("schedule_added", "schedule_paused", "window_fired")]
        assert known == [
            ("schedule_added", "operator", "digits"), ("window_fired", "w1", "digits"),
            ("schedule_paused", "bob", "digits"),
        ]  # fmt: skip


class TestFiring:
    START = datetime(2027, 1, 2, 1, tzinfo=UTC)

    def test_a_window_is_fired_once(self, driver: Any, add: Callable[..., Schedule]) -> None:
        made = add()
        fired = driver.ledger.schedules.fire(made, self.START, 3, "w1", 60)
        assert fired is not None
        assert (fired.starts_at, fired.missed, fired.worker, fired.requests) == (self.START, 3, "w1", 0)
        assert driver.ledger.schedules.windows(made.id) == [fired]
        driver.ledger.schedules.close_window(fired, 5)
        assert driver.ledger.schedules.fire(made, self.START, 0, "w2", 60) is None

    def test_the_database_itself_refuses_a_window_that_was_fired(
        self, driver: Any, add: Callable[..., Schedule], raw: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without the check in `fire`, and from any other program."""
        made = add()
        driver.ledger.schedules.fire(made, self.START, 0, "w1", 60)
        monkeypatch.setattr(windows, "_may_fire", lambda *_: True)
        assert driver.ledger.schedules.fire(made, self.START, 0, "w2", 60) is None
        for verb in ("INSERT", "INSERT OR REPLACE") if raw.engine == "sqlite" else ("INSERT",):
            again = f"{verb} INTO schedule_windows SELECT * FROM schedule_windows"
            with pytest.raises(sa.exc.IntegrityError):
                raw.execute(again)
        assert window_of(driver.ledger, made).worker == "w1"

    def test_an_older_window_is_not_fired_after_a_newer_one(self, driver: Any, add: Callable[..., Schedule]) -> None:
        """A scheduler whose clock is late does not fire a missed window that a newer one counts."""
        made = add()
        driver.ledger.schedules.close_window(driver.ledger.schedules.fire(made, self.START, 1, "w1", 60), 0)
        assert driver.ledger.schedules.fire(made, self.START - DAY, 0, "w2", 60) is None
        assert driver.ledger.schedules.fire(made, self.START + DAY, 0, "w2", 60) is not None

    def test_one_window_of_a_schedule_is_open_at_a_time(self, driver: Any, add: Callable[..., Schedule]) -> None:
        made = add()
        driver.ledger.schedules.fire(made, self.START, 0, "w1", 60)
        assert driver.ledger.schedules.fire(made, self.START + DAY, 0, "w2", 60) is None

    @pytest.mark.parametrize("state", ["paused", "removed"])
    def test_a_schedule_that_was_stopped_meanwhile_fires_nothing(
        self, driver: Any, add: Callable[..., Schedule], state: str
    ) -> None:
        seen = add()
        driver.ledger.schedules.set_state(seen.id, state)
        assert driver.ledger.schedules.fire(seen, self.START, 0, "w1", 60) is None

    def test_an_abandoned_window_is_resumed_by_one(self, driver: Any, add: Callable[..., Schedule]) -> None:
        """Its first scheduler has lost it, if it comes back."""
        ledger, made = driver.ledger, add()
        first = ledger.schedules.fire(made, self.START, 2, "w1", 60)
        assert ledger.schedules.resume_window(made, "w2", 60) is None
        ledger.schedules.renew_window(first, 0, requests=4)
        second = ledger.schedules.resume_window(made, "w2", 60)
        assert (second.worker, second.requests, second.missed, second.fired_at) == ("w2", 4, 2, first.fired_at)
        assert ledger.schedules.resume_window(made, "w3", 60) is None
        for late in (
            lambda: ledger.schedules.renew_window(first, 60),
            lambda: ledger.schedules.release_window(first, 1),
            lambda: ledger.schedules.close_window(first, 1),
        ):
            with pytest.raises(LeaseLost, match=r"the window of 2027-01-02 01:00 UTC.*another scheduler"):
                late()
        ledger.schedules.close_window(second, 5)
        assert window_of(ledger, made).requests == 5
        assert ledger.schedules.resume_window(made, "w3", 60) is None
        with pytest.raises(LeaseLost):
            ledger.schedules.close_window(second, 6)

    def test_a_change_of_state_closes_an_abandoned_window(self, driver: Any, add: Callable[..., Schedule]) -> None:
        """Otherwise a window from before a pause would go on as soon as the schedule is resumed."""
        ledger, made = driver.ledger, add()
        ledger.schedules.fire(made, self.START, 0, "w1", 60)
        ledger.schedules.set_state(made.id, "paused")
        assert window_of(ledger, made).finished_at is None, "its scheduler closes it"
        ledger.schedules.renew_window(window_of(ledger, made), 0)
        ledger.schedules.set_state(made.id, "active")
        assert window_of(ledger, made).finished_at is not None


class TestPasses:
    def test_requests_are_collected_and_carried_out_in_the_window(
        self, driver: Any, add: Callable[..., Schedule], one_pass: Callable[..., list[WindowResult]]
    ) -> None:
        made = add(max_requests=3)
        waiting = [driver.submit(f"b{k}", k) for k in range(4)]
        assert one_pass() == []
        assert driver.ledger.requests.all(status=Status.RUNNING) == [], "by day nothing runs"

        night = datetime.now(UTC) + 2 * DAY
        fired = the(one_pass(moment=night))
        assert [each.request.id for each in fired.results] == [each.id for each in waiting[:3]]
        assert (fired.closed, fired.resumed, fired.error) == (True, False, None)
        closed = window_of(driver.ledger, made)
        assert (closed.requests, closed.lease_until, closed.worker) == (3, None, "w1")
        assert closed.finished_at is not None
        assert one_pass(moment=night) == [], "the window has been"
        assert len(the(one_pass(moment=night + DAY)).results) == 1, "the fourth one has waited for the next"

    def test_a_missed_window_runs_once(
        self, driver: Any, add: Callable[..., Schedule], one_pass: Callable[..., list[WindowResult]]
    ) -> None:
        """Four nights without a scheduler: one window, also where its minutes are long over."""
        made = add(days=4.5, minutes=1)
        driver.submit()
        fired = the(one_pass())
        assert fired.window is not None
        assert fired.window.missed in (3, 4)
        assert len(fired.results) == 1
        assert one_pass() == []
        assert len(driver.ledger.schedules.windows(made.id)) == 1

    def test_half_past_two_fires_once_on_the_days_the_clocks_change(
        self,
        driver: Any,
        add: Callable[..., Schedule],
        at: Callable[..., None],
        one_pass: Callable[..., list[WindowResult]],
    ) -> None:
        """Passes every half hour through both nights in Berlin."""
        starts = []
        for midnight in (datetime(2027, 3, 27, 23, tzinfo=UTC), datetime(2027, 10, 30, 22, tzinfo=UTC)):
            at(midnight)
            made = driver.ledger.schedules.add(driver.name, "30 2 * * *", "Europe/Berlin", None, None)
            for halves in range(12):
                one_pass(moment=midnight + timedelta(minutes=30 * halves))
            driver.ledger.schedules.set_state(made.id, "removed")
            starts += [[window.starts_at.isoformat() for window in driver.ledger.schedules.windows(made.id)]]
        assert starts == [["2027-03-28T01:00:00+00:00"], ["2027-10-31T00:30:00+00:00"]]

    @on_sqlite
    def test_nothing_new_begins_after_the_end_of_a_window(
        self, driver: Any, add: Callable[..., Schedule], artifacts: Artifacts, at: Callable[..., None]
    ) -> None:
        """An abandoned window ends when its minutes are over, and is closed with its count."""
        made = add(days=2, minutes=30)
        driver.submit()
        start = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
        at(start)
        driver.ledger.schedules.renew_window(driver.ledger.schedules.fire(made, start, 0, "gone", 0), 0, requests=7)
        at(None)
        fired = run_due(
            driver.ledger, artifacts, lambda _: pytest.fail("it is over"), "w1", start + timedelta(minutes=1)
        )
        assert (the(fired).resumed, the(fired).closed) == (True, True)
        assert window_of(driver.ledger, made).requests == 7

    @on_sqlite
    def test_claims_are_limited_by_the_window(
        self, driver: Any, add: Callable[..., Schedule], artifacts: Artifacts
    ) -> None:
        """One request at a time, of its model only, none after its end."""
        made, asked = add(minutes=60), []
        driver.submit()

        def nothing(wanted: WorkerOptions) -> list[Result]:
            asked.append(wanted)
            return []

        fired = the(run_due(driver.ledger, artifacts, nothing, "w1", datetime.now(UTC) + 2 * DAY))
        end = window_of(driver.ledger, made).starts_at + timedelta(minutes=60)
        assert asked == [WorkerOptions(max_requests=1, model="digits", until=end)]
        assert not fired.closed, "somebody was faster: the next pass looks again"

    @on_sqlite
    def test_nothing_is_started_where_nothing_is_ready(
        self, driver: Any, add: Callable[..., Schedule], artifacts: Artifacts
    ) -> None:
        """Ray starts with the first call of `carry`."""
        add()
        fired = run_due(
            driver.ledger, artifacts, lambda _: pytest.fail("nothing is ready"), "w1", datetime.now(UTC) + 2 * DAY
        )
        assert (the(fired).closed, the(fired).results) == (True, ())

    @on_sqlite
    def test_a_paused_schedule_begins_nothing_more_in_its_window(
        self,
        driver: Any,
        add: Callable[..., Schedule],
        one_pass: Callable[..., list[WindowResult]],
        carry: Callable[..., RunQueue],
    ) -> None:
        made = add(days=2)
        for k in range(3):
            driver.submit(f"b{k}", k)

        def pausing(request: Request) -> list[Result]:
            driver.ledger.schedules.set_state(made.id, "paused")
            return [Result(driver.ledger.requests.fail(request, "x"), None, None)]

        fired = the(one_pass(pausing))
        assert (len(fired.results), fired.closed) == (1, True)
        assert one_pass(moment=datetime.now(UTC) + 2 * DAY) == []
        driver.ledger.schedules.set_state(made.id, "active")
        assert one_pass() == [], "what passed meanwhile is not made up"

    def test_an_interrupted_window_goes_on_where_it_was(
        self,
        driver: Any,
        add: Callable[..., Schedule],
        one_pass: Callable[..., list[WindowResult]],
        artifacts: Artifacts,
    ) -> None:
        """The request is queued again, the count is kept, and the next scheduler need not wait for the lease."""
        made = add(days=2, max_requests=3)
        for k in range(4):
            driver.submit(f"b{k}", k)
        seen: list[Request] = []

        def interrupted(request: Request) -> list[Result]:
            seen.append(request)
            if len(seen) == 1:
                return [Result(driver.ledger.requests.fail(request, "x"), None, None)]
            return run_request(driver.ledger, artifacts, _ctrl_c, request)

        with pytest.raises(KeyboardInterrupt):
            one_pass(interrupted)
        assert driver.ledger.requests.get(seen[1].id).status is Status.QUEUED
        left = window_of(driver.ledger, made)
        assert (left.finished_at, left.requests) == (None, 1)

        fired = the(one_pass(worker="w2"))
        assert (fired.resumed, fired.closed, len(fired.results)) == (True, True, 2)
        assert window_of(driver.ledger, made).requests == 3
        assert len(driver.ledger.schedules.windows(made.id)) == 1

    @on_sqlite
    def test_a_window_stays_open_for_a_retry(
        self,
        driver: Any,
        add: Callable[..., Schedule],
        one_pass: Callable[..., list[WindowResult]],
        at: Callable[..., None],
    ) -> None:
        """A failed run is not put off until the next night."""
        made = add(days=2)
        driver.submit()
        fired = the(one_pass(lambda request: [Result(driver.ledger.requests.retry(request, "broke"), None, None)]))
        assert (fired.closed, fired.results[0].request.status) == (False, Status.QUEUED)
        at(datetime.now(UTC) + timedelta(minutes=1))
        again = the(one_pass(worker="w2"))
        assert (again.resumed, again.closed, again.results[0].request.status) == (True, True, Status.SUCCEEDED)
        assert window_of(driver.ledger, made).requests == 2

    @on_sqlite
    def test_a_window_waits_for_a_request_that_runs_elsewhere(
        self, driver: Any, add: Callable[..., Schedule], one_pass: Callable[..., list[WindowResult]]
    ) -> None:
        """One request of a model runs at a time: the requests behind it keep their window."""
        add(days=2)
        driver.submit("first", 1)
        elsewhere = driver.claim("somebody")
        driver.submit("second", 2)
        assert not the(one_pass()).closed
        driver.ledger.requests.fail(elsewhere, "x")
        fired = the(one_pass())
        assert [each.request.behaviour.name for each in fired.results] == ["second"]

    @on_sqlite
    @pytest.mark.parametrize("error", [LedgerUnavailable("away"), ConnectionError("no Ray")])
    def test_an_error_in_one_schedule_does_not_stop_the_others(
        self, driver: Any, add: Callable[..., Schedule], new_driver: Callable[..., Any], artifacts: Artifacts,
        carry: Callable[..., RunQueue], error: Exception,
    ) -> None:  # fmt: skip
        bad, other = add(days=2), new_driver("other")
        good = driver.ledger.schedules.add("other", "0 2 * * *", "UTC", None, None)
        driver.submit()
        other.submit()

        def breaking(wanted: WorkerOptions) -> list[Result]:
            if wanted.model == "digits":
                raise error
            return carry()(wanted)

        fired = run_due(driver.ledger, artifacts, breaking, "w1", datetime.now(UTC) + 2 * DAY)
        assert [(each.schedule.id, each.closed) for each in fired] == [(bad.id, False), (good.id, True)]
        assert str(error) in str(fired[0].error)
        assert isinstance(fired[0].error, LedgerUnavailable | RunFailed)
        resumed = run_due(driver.ledger, artifacts, carry(), "w2", datetime.now(UTC))
        assert (the(resumed).resumed, the(resumed).closed) == (True, True)

    @on_sqlite
    def test_the_lease_of_a_window_is_renewed_while_it_works(
        self, driver: Any, add: Callable[..., Schedule], one_pass: Callable[..., list[WindowResult]]
    ) -> None:
        """No other scheduler takes over a window whose work takes longer than a lease."""
        made = add(days=2)
        driver.submit()

        def slow(request: Request) -> list[Result]:
            module.time.sleep(1.0)
            assert driver.ledger.schedules.resume_window(made, "w2", 60) is None
            return [
                Result(
                    driver.ledger.reject(request, "nothing_found", None, driver.ledger.models.version("digits")),
                    None,
                    None,
                )
            ]

        assert the(one_pass(slow, timings=Timings(lease=0.6, poll=0.05))).closed

    @on_sqlite
    def test_a_scheduler_that_lost_its_window_takes_nothing_more(
        self, driver: Any, add: Callable[..., Schedule], one_pass: Callable[..., list[WindowResult]]
    ) -> None:
        made = add(days=2)
        for k in range(2):
            driver.submit(f"b{k}", k)

        def losing(request: Request) -> list[Result]:
            driver.ledger.schedules.renew_window(window_of(driver.ledger, made), 0)
            assert driver.ledger.schedules.resume_window(made, "w2", 60) is not None
            return [Result(driver.ledger.requests.fail(request, "x"), None, None)]

        fired = the(one_pass(losing))
        assert isinstance(fired.error, LeaseLost)
        assert (len(fired.results), fired.closed) == (1, False)
        assert window_of(driver.ledger, made).worker == "w2"

    @on_sqlite
    def test_afterwards_the_policies_are_carried_out(
        self, driver: Any, add: Callable[..., Schedule], one_pass: Callable[..., list[WindowResult]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Of every model, once a window was closed; not at each look at the schedules."""
        calls: list[Any] = []
        monkeypatch.setattr(module, "tidy", lambda *given: calls.append(given))
        add(days=2)
        one_pass()
        one_pass()
        assert len(calls) == 1


def _ctrl_c(*_: Any) -> Any:
    raise KeyboardInterrupt


_RACE = """
import time
from datetime import datetime
from fsu_ray.pipeline import Result, drain
from fsu_ray.schedule import run_due
from fsu_ray.storage.artifacts import Artifacts
url, folder, moment, number = sys.argv[1:]
worker = "w" + number
with open_ledger(url) as ledger:
    def run(request, _):
        return [Result(ledger.reject(request, "nothing_found", None, ledger.models.version(request.model)), None, None)]
    fired = run_due(ledger, Artifacts.open(folder), lambda wanted: drain(ledger, worker, wanted, run), worker,
                    datetime.fromisoformat(moment))
    assert not [each.error for each in fired if each.error], fired
    print(len([each for each in fired if not each.resumed]), sum(len(each.results) for each in fired))
"""


def test_two_schedulers_in_two_processes_fire_each_window_once(
    driver: Any,
    add: Callable[..., Schedule],
    url: str,
    tmp_path: Path,
    in_processes: Callable[..., list[str]],
    raw: Any,
) -> None:
    """Six schedules, due at one moment, two processes at once: six windows, and each request carried out once."""
    made = [add(days=3, timezone=zone) for zone in ("Europe/Berlin", "UTC", "Asia/Tokyo") for _ in range(2)]
    for k in range(5):
        driver.submit(f"b{k}", k)
    folder = str(tmp_path / "artifacts")
    answers = in_processes(_RACE, url, folder, datetime.now(UTC).isoformat(), processes=2)
    counts = [tuple(map(int, answer.split()[-2:])) for answer in answers]
    assert (sum(n for n, _ in counts), sum(n for _, n in counts)) == (6, 5)
    assert [len(driver.ledger.schedules.windows(each.id)) for each in made] == [1] * 6
    assert sum(w.requests for each in made for w in driver.ledger.schedules.windows(each.id)) == 5
    assert raw.execute("SELECT count(*) FROM audit_events WHERE event = 'window_fired'").scalar() == 6
    assert raw.execute("SELECT max(attempt) FROM requests").scalar() == 1
