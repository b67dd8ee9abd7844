"""Requests: keys, order, approval, retries, cancelling, batches, events, and what may be read of the queue."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from fsu_ray.config import MOST_FAILURES, Timings
from fsu_ray.errors import AlreadyExists, LeaseLost, NotFound, TransitionRefused, UserError
from fsu_ray.recipes import Recipe, RelearnRecipe
from fsu_ray.records import TRANSITIONS, Behaviour, Policy, QueueStats, Status, Terms
from fsu_ray.storage import claims
from fsu_ray.storage.ledger import Ledger
from tests.storage.conftest import SPEC, digest

NOW = datetime.now(UTC)


@pytest.fixture
def ask(driver: Any) -> Callable[..., Any]:
    """Submits a class request with terms."""

    def submit(target: int, recipe: Recipe | None = None, samples: str = "", **terms: Any) -> Any:
        behaviour = Behaviour(name=f"class-{target}", kind="class", targets=(target,))
        chosen = digest(samples or f"samples of {target}")
        return driver.ledger.requests.submit("digits", behaviour, chosen, 8, recipe or Recipe(), Terms(**terms))

    return submit


def late(raw: Any) -> None:
    """Make all leases expire, without a step."""
    raw.execute("UPDATE requests SET lease_until = :then WHERE status = 'running'", {"then": _text(raw, -60)})


def _text(raw: Any, seconds: float) -> Any:
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return moment.isoformat(timespec="microseconds") if raw.engine == "sqlite" else moment


class TestKeys:
    def test_a_key_belongs_to_one_request_for_ever(self, driver: Any, ask: Callable[..., Any]) -> None:
        first, new = ask(9, key="ticket-1")
        again, second = ask(9, key="ticket-1")
        assert (new, second, again.id) == (True, False, first.id)
        driver.ledger.requests.cancel(first.id)
        ended, third = ask(9, key="ticket-1")
        assert (ended.id, ended.status, third) == (first.id, Status.CANCELLED, False)

    def test_a_different_request_under_a_used_key_is_an_error(self, driver: Any, ask: Callable[..., Any]) -> None:
        first, _ = ask(9, key="ticket-1")
        for other in (
            lambda: ask(4, key="ticket-1"),
            lambda: ask(9, key="ticket-1", samples="others"),
            lambda: ask(9, Recipe(relearn=RelearnRecipe(epochs=1)), key="ticket-1"),
        ):
            with pytest.raises(AlreadyExists, match=f"'ticket-1' of 'digits' belongs to request {first.id}"):
                other()
        assert len(driver.ledger.requests.all()) == 1

    def test_a_key_belongs_to_its_model(self, ask: Callable[..., Any], new_driver: Callable[..., Any]) -> None:
        ask(9, key="ticket-1")
        other = new_driver("other")
        behaviour = Behaviour(name="x", kind="class", targets=(1,))
        _, new = other.ledger.requests.submit("other", behaviour, digest("s"), 1, Recipe(), Terms(key="ticket-1"))
        assert new

    def test_a_derived_key_belongs_to_its_request_until_that_ends(self, driver: Any, ask: Callable[..., Any]) -> None:
        first, _ = ask(9)
        assert ask(9)[1] is False
        driver.ledger.requests.cancel(first.id)
        again, new = ask(9)
        assert new
        assert again.id != first.id

    def test_the_database_refuses_a_given_key_twice(self, driver: Any, ask: Callable[..., Any], raw: Any) -> None:
        ask(9, key="ticket-1")
        columns = raw.columns("requests")
        first = {"id": "'x'", "status": "'submitted'", "changes": "1", "lease_until": "NULL"}
        copy = ", ".join(first.get(name, name) for name in columns)
        with pytest.raises(sa.exc.IntegrityError, match=r"UNIQUE|uq_requests"):
            raw.execute(f"INSERT INTO requests SELECT {copy} FROM requests")


class TestOrder:
    def test_the_more_urgent_comes_first_and_then_the_older(self, driver: Any, ask: Callable[..., Any]) -> None:
        ids = [ask(target, priority=priority)[0].id for target, priority in ((1, 0), (2, 5), (3, 5), (4, -1))]
        claimed = []
        while (request := driver.ledger.requests.claim("w", 60)) is not None:
            claimed.append(request.id)
            driver.ledger.requests.fail(request, "no-op")
        assert claimed == [ids[1], ids[2], ids[0], ids[3]]

    def test_nothing_runs_before_its_time(self, driver: Any, ask: Callable[..., Any]) -> None:
        ask(1, not_before=NOW + timedelta(hours=1))
        ready, _ = ask(2, not_before=NOW - timedelta(seconds=1))
        assert driver.claim().id == ready.id
        driver.ledger.requests.fail(driver.ledger.requests.get(ready.id), "no-op")
        assert driver.ledger.requests.claim("w", 60) is None
        assert not driver.ledger.requests.claimable()

    def test_what_is_late_says_so(self, driver: Any, ask: Callable[..., Any]) -> None:
        overdue, _ = ask(1, due_at=NOW - timedelta(seconds=1))
        in_time, _ = ask(2, due_at=NOW + timedelta(hours=1))
        moment = datetime.now(UTC)
        assert (overdue.overdue(moment), in_time.overdue(moment)) == (True, False)
        ended = driver.ledger.requests.cancel(in_time.id)
        assert not ended.overdue(moment + timedelta(days=9)), "it had ended by then"

    def test_a_worker_has_as_many_runs_as_its_cap(self, driver: Any, new_driver: Callable[..., Any]) -> None:
        for name in ("digits", "second", "third"):
            own = driver if name == "digits" else new_driver(name)
            own.submit("nine", 9)
        claim = driver.ledger.requests.claim
        first = claim("w", 60, cap=2)
        assert claim("w", 60, cap=2) is not None
        assert claim("w", 60, cap=2) is None
        assert claim("other", 60, cap=2) is not None
        driver.ledger.requests.fail(first, "no-op")
        driver.submit("four", 4)
        assert claim("w", 60, cap=2) is not None


class TestApproval:
    @pytest.fixture(autouse=True)
    def _policy(self, driver: Any) -> None:
        driver.ledger.models.set_policy("digits", Policy(approval=True), "head")

    def test_a_request_waits_until_somebody_else_approves(self, driver: Any, ask: Callable[..., Any]) -> None:
        request, _ = ask(9, requested_by="alice")
        assert request.status is Status.AWAITING_APPROVAL
        assert driver.ledger.requests.claim("w", 60) is None
        with pytest.raises(UserError, match=f"alice asked for request {request.id}: somebody else"):
            driver.ledger.requests.approve(request.id, "alice")
        approved = driver.ledger.requests.approve(request.id, "bob")
        assert approved.status is Status.QUEUED
        assert driver.ledger.requests.events(request.id)[-1].actor == "bob"
        with pytest.raises(TransitionRefused, match="it awaits no approval"):
            driver.ledger.requests.deny(request.id, "bob")

    def test_a_denied_request_is_rejected(self, driver: Any, ask: Callable[..., Any]) -> None:
        request, _ = ask(9, requested_by="alice")
        denied = driver.ledger.requests.deny(request.id, "bob")
        assert (denied.status, denied.reason) == (Status.REJECTED, "denied")

    def test_nobody_asks_without_a_name(self, driver: Any, ask: Callable[..., Any]) -> None:
        with pytest.raises(UserError, match="say who asks"):
            ask(9)
        assert driver.ledger.requests.all() == []

    def test_an_actor_is_an_opaque_id(self, driver: Any, ask: Callable[..., Any]) -> None:
        request, _ = ask(9, requested_by="alice")
        with pytest.raises(UserError, match="no opaque id"):
            driver.ledger.requests.approve(request.id, "bob@example.org")


class TestFailures:
    def test_a_run_that_breaks_is_tried_again_later_and_later_and_then_fails(
        self, driver: Any, ask: Callable[..., Any], raw: Any
    ) -> None:
        request, _ = ask(9)
        for failure in range(1, MOST_FAILURES):
            before = datetime.now(UTC)
            waiting = driver.ledger.requests.retry(driver.claim(), f"broke {failure}")
            pause = timedelta(seconds=Timings().backoff * 2 ** (failure - 1))
            assert (waiting.status, waiting.failures) == (Status.QUEUED, failure)
            assert before + pause <= waiting.retry_at <= datetime.now(UTC) + pause
            assert driver.ledger.requests.claim("w", 60) is None
            raw.execute("UPDATE requests SET retry_at = :then", {"then": _text(raw, -1)})
        failed = driver.ledger.requests.retry(driver.claim(), "broke again")
        assert (failed.status, failed.failures, failed.reason) == (Status.FAILED, MOST_FAILURES, "broke again")
        reasons = [event.reason for event in driver.ledger.requests.events(request.id) if event.reason]
        assert reasons == ["broke 1", "broke 2", "broke again"]

    @pytest.mark.parametrize("timings", [Timings(abandoned=0.0)])
    def test_a_request_that_costs_its_workers_fails(self, driver: Any, ask: Callable[..., Any], raw: Any) -> None:
        request, _ = ask(9)
        for attempt in range(1, MOST_FAILURES + 1):
            assert driver.claim(f"w{attempt}").attempt == attempt
            late(raw)
        assert driver.ledger.requests.claim("w9", 60) is None
        ended = driver.ledger.requests.get(request.id)
        assert (ended.status, ended.attempt, ended.failures) == (Status.FAILED, MOST_FAILURES, MOST_FAILURES)
        assert ended.reason == "lease_expired: 3 workers have vanished"
        steps = [(event.actor, event.reason) for event in driver.ledger.requests.events(request.id)][3:]
        assert steps == [("w2", "lease_expired"), ("w3", "lease_expired"), ("w9", ended.reason)]

    @pytest.mark.parametrize("timings", [Timings(abandoned=3600.0)])
    def test_nobody_takes_over_a_request_that_is_given_up(self, driver: Any, ask: Callable[..., Any], raw: Any) -> None:
        """Neither a request that is to be cancelled nor one with too many failures, even before it has ended."""
        doomed, _ = ask(9)
        driver.claim()
        late(raw)
        driver.ledger.requests.cancel(doomed.id, "alice")
        assert driver.ledger.requests.claim("w2", 60) is None
        raw.execute("UPDATE requests SET cancel_by = NULL, failures = 2")
        assert driver.ledger.requests.claim("w2", 60) is None
        raw.execute("UPDATE requests SET failures = 1")
        assert driver.claim("w2").failures == 2

    def test_a_release_is_no_failure(self, driver: Any, ask: Callable[..., Any]) -> None:
        ask(9)
        for _ in range(MOST_FAILURES + 1):
            assert driver.ledger.requests.release(driver.claim(), "interrupted").failures == 0

    @pytest.mark.parametrize(
        ("reason", "expected"),
        [
            ("none at /home/alice/me.png:\n try ./other/place.db", "none at <path>: try <path>"),
            (
                "'/home/Alice Smith/x.png', [/home/alice/y] a,/home/alice/b <~/x>",
                "'<path> <path>', [<path>] a,<path> <<path>>",
            ),
            ("C:\\Users\\alice\\x.png of alice@example.org", "<path> of <address>"),
            (f"artifact /x/{digest('a')[:2]}/{digest('a')} is missing", f"artifact {digest('a')} is missing"),
            ("see /home/a/runs/r-1a20d1daddfd5b44a30-0123abcd", "see r-1a20d1daddfd5b44a30-0123abcd"),
            ("retention_lost: agreement 0.9 is below 0.97", "retention_lost: agreement 0.9 is below 0.97"),
        ],
    )
    def test_reasons_hold_no_paths(self, reason: str, expected: str) -> None:
        assert claims.without_paths(reason) == expected

    def test_reasons_are_stored_without_paths(self, driver: Any, ask: Callable[..., Any]) -> None:
        ask(9)
        assert driver.ledger.requests.fail(driver.claim(), "none at /home/alice/me.png").reason == "none at <path>"


class TestCancelling:
    def test_a_running_request_is_asked_to_stop(self, driver: Any, ask: Callable[..., Any]) -> None:
        ask(9)
        request = driver.claim()
        assert not driver.ledger.requests.cancel_requested(request)
        asked = driver.ledger.requests.cancel(request.id, "alice")
        assert (asked.status, asked.cancel_by) == (Status.RUNNING, "alice")
        assert driver.ledger.requests.cancel_requested(request)
        assert driver.ledger.requests.heartbeat(request, 60)
        stopped = driver.ledger.requests.stop(request)
        assert (stopped.status, stopped.lease_until) == (Status.CANCELLED, None)
        assert driver.ledger.requests.events(request.id)[-1].actor == "alice"
        with pytest.raises(LeaseLost):
            driver.ledger.requests.heartbeat(request, 60)

    @pytest.mark.parametrize("timings", [Timings(abandoned=0.0)])
    def test_a_request_whose_worker_died_before_it_could_stop_is_not_run_again(
        self, driver: Any, ask: Callable[..., Any], raw: Any
    ) -> None:
        ask(9)
        request = driver.claim()
        driver.ledger.requests.cancel(request.id, "alice")
        late(raw)
        assert driver.ledger.requests.claim("w2", 60) is None
        assert driver.ledger.requests.get(request.id).status is Status.CANCELLED


class TestBatches:
    @pytest.fixture
    def run(self, driver: Any, ask: Callable[..., Any]) -> Any:
        """The claim of a run of three requests; a subset, another recipe and a taken class stay behind."""
        ids = [ask(target)[0].id for target in (1, 2, 3)]
        ask(4, Recipe(relearn=RelearnRecipe(epochs=1)))
        driver.submit("crossed", 7, kind="subset")
        driver.submit("one and five", 1, 5)
        lead = driver.ledger.requests.claim("w", 60, max_batch=9)
        assert (lead.id, [each.id for each in driver.ledger.requests.batch_members(lead)]) == (ids[0], ids[1:])
        return lead

    def commit(self, driver: Any, lead: Any) -> Any:
        report = {"forgetting": {"probes_in_target": 0.02}}
        members = [driver.result(member, report=report) for member in driver.ledger.requests.batch_members(lead)]
        outcome = driver.outcome(lead, targets=(driver.result(lead), *members))
        return driver.ledger.commit(lead, outcome, driver.ledger.models.version("digits"))

    def test_they_run_as_one(self, driver: Any, run: Any) -> None:
        for each in driver.ledger.requests.batch_members(run):
            assert (each.status, each.batch_leader, each.worker, each.attempt) == (Status.RUNNING, run.id, "w", 1)
        assert driver.ledger.requests.claim("w2", 60) is None, "one run of a model at a time"
        version = self.commit(driver, run)
        assert (version.number, version.request) == (2, run.id)
        erasures = driver.ledger.models.erasures("digits")
        assert [(e.behaviour.targets, e.version) for e in erasures] == [((1,), 2), ((2,), 2), ((3,), 2)]
        assert len({e.mask for e in erasures}) == 3
        assert erasures[1].report["forgetting"] == {"probes_in_target": 0.02}
        assert erasures[1].report["coalesced"] == [e.request for e in erasures]
        ended = [driver.ledger.requests.get(e.request) for e in erasures]
        assert {(r.status, r.version) for r in ended} == {(Status.SUCCEEDED, 2)}

    def test_their_lease_is_one(self, driver: Any, run: Any, raw: Any) -> None:
        driver.ledger.requests.heartbeat(run, 3600)
        leases = {
            each.lease_until
            for each in (driver.ledger.requests.get(run.id), *driver.ledger.requests.batch_members(run))
        }
        assert len(leases) == 1
        late(raw)
        again = driver.ledger.requests.claim("w2", 60)
        assert (again.id, again.attempt, len(driver.ledger.requests.batch_members(again))) == (run.id, 2, 2)
        assert {each.worker for each in driver.ledger.requests.batch_members(again)} == {"w2"}
        with pytest.raises(LeaseLost):
            self.commit(driver, run)
        self.commit(driver, again)

    @pytest.mark.parametrize("end", ["release", "retry", "fail", "separate"])
    def test_none_is_left_behind(self, driver: Any, run: Any, end: str) -> None:
        others = [each.id for each in driver.ledger.requests.batch_members(run)]
        ended = getattr(driver.ledger.requests, end)(run, "some reason")
        assert ended.status is (Status.FAILED if end == "fail" else Status.QUEUED)
        for each in map(driver.ledger.requests.get, others):
            assert (each.status, each.batch_leader, each.worker, each.no_coalesce) == (
                Status.QUEUED,
                None,
                None,
                end == "separate",
            )
        if end == "separate":
            assert driver.ledger.requests.batch_members(driver.ledger.requests.claim("w", 60, max_batch=9)) == []

    def test_a_separated_request_joins_no_batch(self, driver: Any, run: Any, ask: Callable[..., Any]) -> None:
        driver.ledger.requests.separate(run, "coalesced run refused")
        fresh, _ = ask(0, priority=9)
        lead = driver.ledger.requests.claim("w", 60, max_batch=9)
        assert lead.id == fresh.id
        assert [each.behaviour.name for each in driver.ledger.requests.batch_members(lead)] == ["one and five"]

    def test_a_result_must_be_of_the_whole_batch(self, driver: Any, run: Any) -> None:
        """Otherwise a member would stay running for ever."""
        with pytest.raises(LeaseLost):
            driver.ledger.commit(run, driver.outcome(run), driver.ledger.models.version("digits"))
        assert len(driver.ledger.models.versions("digits")) == 1
        self.commit(driver, run)

    def test_one_of_them_is_cancelled(self, driver: Any, run: Any) -> None:
        second, third = driver.ledger.requests.batch_members(run)
        driver.ledger.requests.cancel(second.id, "alice")
        assert driver.ledger.requests.cancel_requested(run)
        assert driver.ledger.requests.stop(run).status is Status.QUEUED
        assert driver.ledger.requests.get(second.id).status is Status.CANCELLED
        assert driver.ledger.requests.get(third.id).status is Status.QUEUED

    def test_at_least_two_classes_stay(self, new_driver: Callable[..., Any]) -> None:
        small = new_driver("small", classes=4)
        for target in range(4):
            small.submit(f"class-{target}", target)
        lead = small.ledger.requests.claim("w", 60, "small", max_batch=9)
        assert len(small.ledger.requests.batch_members(lead)) == 1

    def test_a_batch_has_max_batch_members_at_most(self, driver: Any, ask: Callable[..., Any]) -> None:
        for target in (1, 2, 3):
            ask(target)
        assert len(driver.ledger.requests.batch_members(driver.ledger.requests.claim("w", 60, max_batch=1))) == 1


class TestEvents:
    def test_every_step_is_on_record(self, driver: Any, ask: Callable[..., Any]) -> None:
        request, _ = ask(9, requested_by="alice")
        driver.ledger.requests.release(driver.claim("w1"), "interrupted")
        driver.ledger.requests.fail(driver.claim("w2"), "broke")
        events = driver.ledger.requests.events(request.id)
        assert [(e.number, e.old, e.new, e.actor, e.attempt, e.reason) for e in events] == [
            (1, None, Status.SUBMITTED, "alice", 0, None),
            (2, Status.SUBMITTED, Status.QUEUED, "alice", 0, None),
            (3, Status.QUEUED, Status.RUNNING, "w1", 1, None),
            (4, Status.RUNNING, Status.QUEUED, "w1", 1, "interrupted"),
            (5, Status.QUEUED, Status.RUNNING, "w2", 2, None),
            (6, Status.RUNNING, Status.FAILED, "w2", 2, "broke"),
        ]
        assert all(event.new in TRANSITIONS[event.old] for event in events[1:])
        assert sorted(event.at for event in events) == [event.at for event in events]

    def test_a_step_without_a_count_is_refused(self, driver: Any, raw: Any) -> None:
        """By hand, past the ledger: the trigger names the missing columns."""
        driver.submit()
        with pytest.raises(sa.exc.IntegrityError, match="a step between states is counted"):
            raw.execute("UPDATE requests SET status = 'cancelled', finished_at = '2030-01-01'")

    def test_a_step_by_hand_is_on_record_too(self, driver: Any, raw: Any) -> None:
        request = driver.submit()
        by_hand = "changes = changes + 1, changed_by = 'mallory', changed_at = '2026-01-01T00:00:00.000000+00:00'"
        raw.execute(f"UPDATE requests SET status = 'cancelled', finished_at = '2030-01-01', {by_hand}")
        assert driver.ledger.requests.events(request.id)[-1].actor == "mallory"


def test_upcoming_is_what_would_be_claimed(driver: Any, new_driver: Callable[..., Any]) -> None:
    """By priority and age, of one model or of all; a request whose lease has expired comes first."""
    ledger = driver.ledger
    assert ledger.requests.upcoming() is None
    first, other = driver.submit("nine", 9), new_driver("other").submit("four", 4)
    assert ledger.requests.upcoming().id == first.id
    assert ledger.requests.upcoming("other").id == other.id
    with pytest.raises(NotFound):
        ledger.requests.upcoming("nobody")
    claimed = driver.claim(lease=-1)
    coming = ledger.requests.upcoming("digits")
    assert (coming.id, coming.attempt, coming.status) == (claimed.id, 1, Status.RUNNING)
    assert ledger.requests.get(first.id).attempt == 1, "looking changes nothing"
    again = ledger.requests.claim("w2", 60.0)
    assert (again.id, again.attempt) == (coming.id, coming.attempt + 1)
    assert ledger.requests.upcoming("digits") is None


def test_expire_ends_the_claim_of_a_dead_worker_at_once(driver: Any) -> None:
    """The next claim takes the request over, as it does after an expired lease; the dead worker has lost it."""
    driver.submit("nine", 9)
    claimed = driver.claim("dead", 3600.0)
    ledger = driver.ledger
    assert not ledger.requests.claimable()
    assert ledger.requests.expire(claimed)
    taken = ledger.requests.claim("w2", 60.0)
    assert (taken.id, taken.attempt, taken.failures, taken.worker) == (claimed.id, 2, 1, "w2")
    assert [event.reason for event in ledger.requests.events(claimed.id)][-1] == "lease_expired"
    with pytest.raises(LeaseLost):
        ledger.requests.heartbeat(claimed, 60.0)
    assert not ledger.requests.expire(claimed), "the request that was read is of another attempt"
    assert ledger.requests.get(taken.id).lease_until > datetime.now(UTC)


def test_expire_ends_the_lease_of_the_whole_batch(driver: Any) -> None:
    """A batch has one worker: all its requests are taken over together."""
    driver.submit("nine", 9)
    driver.submit("four", 4)
    claimed = driver.ledger.requests.claim("dead", 3600.0, driver.name, max_batch=5)
    assert len(driver.ledger.requests.batch_members(claimed)) == 1
    assert driver.ledger.requests.expire(claimed)
    now = datetime.now(UTC)
    assert all(each.lease_until <= now for each in driver.ledger.requests.all(status=Status.RUNNING))
    taken = driver.ledger.requests.claim("w2", 60.0, driver.name, max_batch=5)
    assert [each.worker for each in driver.ledger.requests.batch_members(taken)] == ["w2"]


def test_a_worker_that_is_alive_after_all_keeps_its_request(driver: Any) -> None:
    """Its next heartbeat renews the lease, if nobody has taken the request over."""
    driver.submit("nine", 9)
    claimed = driver.claim("alive", 3600.0)
    assert driver.ledger.requests.expire(claimed)
    driver.ledger.requests.heartbeat(claimed, 3600.0)
    assert driver.ledger.requests.claim("w2", 60.0) is None


def test_stats(driver: Any, new_driver: Callable[..., Any]) -> None:
    """Requests by model and state, requests that could begin now, and erasures by generator use."""
    other = new_driver("other")
    assert driver.ledger.requests.stats().reuse_ratio is None
    driver.erase("one", 1)
    driver.erase("two", 2, generator_use="reused", generator_id=driver.ledger.generators.all("digits")[0].id)
    driver.submit("three", 3)
    driver.claim()
    driver.submit("four", 4)
    other.submit("five", 5)
    six = other.submit("six", 6)
    later = Terms(not_before=datetime.now(UTC) + timedelta(hours=1))
    seven = six.behaviour.model_copy(update={"name": "seven", "targets": (7,)})
    driver.ledger.requests.submit("other", seven, "0" * 64, 8, six.recipe, later)
    stats = driver.ledger.requests.stats()
    assert stats.requests["digits", "succeeded"] == 2
    assert (stats.requests["digits", "running"], stats.requests["digits", "queued"]) == (1, 1)
    assert (stats.requests["other", "queued"], stats.requests["other", "failed"]) == (3, 0)
    assert len(stats.requests) == 2 * len(Status)
    assert stats.depth == {"digits": 1, "other": 2}
    assert stats.uses == {("digits", "trained"): 1, ("digits", "reused"): 1}
    assert stats.reuse_ratio == 0.5


def test_the_reuse_ratio_is_of_all_erasures() -> None:
    uses = {("m", "reused"): 3, ("m", "warm_started"): 1, ("n", "trained"): 2}
    assert QueueStats({}, {}, uses).reuse_ratio == 0.5


@pytest.mark.slow
def test_four_workers_carry_out_a_thousand_requests(ledger: Ledger, url: str, in_processes: Any) -> None:
    """1,000 no-op requests over 20 models: none lost, none twice, never two at once on a model."""
    behaviour = {"kind": "subset", "targets": (1,)}
    for number in range(20):
        ledger.models.register(f"m{number}", SPEC, digest("w"))
    for number in range(1000):
        asked = Behaviour.model_validate({"name": f"b{number}", **behaviour})
        ledger.requests.submit(f"m{number % 20}", asked, digest(f"s{number}"), 1, Recipe())
    script = """
import time
url, number = sys.argv[1:]
ledger = open_ledger(url)
idle = 0
while idle < 20:
    request = ledger.requests.claim(f"w{number}", 60)
    if request is None:
        idle += 1
        time.sleep(0.01)
        continue
    idle = 0
    assert len(ledger.requests.all(request.model, "running")) == 1
    ledger.reject(request, "no-op", None, None)
    print(request.id)
ledger.close()
"""
    answers = [answer.split() for answer in in_processes(script, url, processes=4)]
    done = [request for answer in answers for request in answer]
    requests = ledger.requests.all()
    assert sorted(done) == sorted(request.id for request in requests)
    assert {(request.status, request.attempt) for request in requests} == {(Status.REJECTED, 1)}
    assert all(len(answer) > 50 for answer in answers), "one worker did it all: the test shows nothing"
