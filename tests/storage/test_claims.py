"""The queue: claims, leases, take-overs and races."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsu_ray.errors import (
    AlreadyErased,
    LeaseLost,
    NotFound,
    TransitionRefused,
)
from fsu_ray.recipes import Recipe
from fsu_ray.records import TRANSITIONS, Behaviour, ModelSpec, Request, Status
from fsu_ray.storage import claims
from fsu_ray.storage.ledger import Ledger

SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)
STEP = "changes = changes + 1, changed_by = 'faster', changed_at = '2026-01-01T00:00:00.000000+00:00'"
IN_ONE_LEDGER = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


class TestClaiming:
    def test_the_oldest_is_claimed_first(self, driver: Any) -> None:
        first, second = driver.submit("nine", 9), driver.submit("four", 4)
        before = datetime.now(UTC)
        assert driver.ledger.requests.claimable()
        claimed = driver.claim("w1", 60)

        assert (claimed.id, claimed.status, claimed.attempt, claimed.worker) == (first.id, Status.RUNNING, 1, "w1")
        assert claimed.started_at is not None
        assert claimed.lease_until == claimed.started_at + timedelta(seconds=60)
        assert before <= claimed.started_at
        assert not driver.ledger.requests.claimable("digits"), "one request of a model runs at a time"
        assert driver.ledger.requests.claim("w2", 60) is None
        driver.ledger.requests.fail(claimed, "broke")
        assert driver.claim("w2").id == second.id

    def test_models_run_side_by_side(self, driver: Any) -> None:
        driver.ledger.models.register("other", SPEC, "w")
        driver.submit("nine", 9)
        driver.submit("four", 4)
        elsewhere, _ = driver.ledger.requests.submit(
            "other", Behaviour(name="x", kind="class", targets=(1,)), "s", 1, Recipe()
        )
        driver.claim()

        claimed = driver.ledger.requests.claim("w2", 60)
        assert claimed is not None
        assert claimed.id == elsewhere.id

    def test_a_claim_may_be_for_one_model(self, driver: Any) -> None:
        driver.ledger.models.register("other", SPEC, "w")
        driver.submit()
        assert not driver.ledger.requests.claimable("other")
        assert driver.ledger.requests.claim("w", 60, "other") is None

    def test_an_expired_lease_is_taken_over_as_the_next_attempt(self, driver: Any) -> None:
        driver.submit()
        first = driver.claim("w1", lease=0)
        assert driver.ledger.requests.claimable()
        second = driver.claim("w2")

        assert (second.id, second.attempt, second.worker) == (first.id, 2, "w2")
        assert second.started_at == first.started_at
        for late in (
            lambda: driver.ledger.requests.heartbeat(first, 60),
            lambda: driver.ledger.requests.release(first, "x"),
            lambda: driver.ledger.requests.fail(first, "x"),
            lambda: driver.ledger.reject(first, "x", None, driver.ledger.models.version("digits")),
            lambda: driver.ledger.commit(first, driver.outcome(first), driver.ledger.models.version("digits")),
        ):
            with pytest.raises(LeaseLost, match=f"request {first.id} is no longer attempt 1 of w1"):
                late()
        assert driver.ledger.requests.get(first.id) == second
        assert len(driver.ledger.models.versions("digits")) == 1
        assert driver.ledger.generators.all() == []

    def test_a_worker_that_takes_over_its_own_request_loses_the_earlier_claim(self, driver: Any) -> None:
        driver.submit()
        first = driver.claim("w1", lease=0)
        driver.claim("w1")
        with pytest.raises(LeaseLost):
            driver.ledger.requests.heartbeat(first, 60)

    def test_another_worker_cannot_use_a_claim(self, driver: Any) -> None:
        driver.submit()
        with pytest.raises(LeaseLost, match="of w2"):
            driver.ledger.requests.heartbeat(replace(driver.claim("w1"), worker="w2"), 60)

    def test_a_heartbeat_saves_the_lease(self, driver: Any) -> None:
        driver.submit()
        request = driver.claim(lease=0)
        driver.ledger.requests.heartbeat(request, 60)

        assert not driver.ledger.requests.claimable()
        assert driver.ledger.requests.claim("w2", 60) is None
        renewed = driver.ledger.requests.get(request.id)
        assert renewed.lease_until > datetime.now(UTC) + timedelta(seconds=50)
        driver.ledger.commit(request, driver.outcome(request), driver.ledger.models.version("digits"))

    def test_a_released_request_waits_again(self, driver: Any) -> None:
        driver.submit()
        released = driver.ledger.requests.release(driver.claim(), "the cluster went away")

        assert (released.status, released.worker, released.lease_until) == (Status.QUEUED, None, None)
        assert released.reason == "the cluster went away"
        again = driver.claim()
        assert (again.attempt, again.reason) == (2, None)

    def test_a_failed_request_keeps_its_reason(self, driver: Any) -> None:
        driver.submit()
        failed = driver.ledger.requests.fail(driver.claim("w1"), "out of memory")

        assert (failed.status, failed.reason, failed.worker) == (Status.FAILED, "out of memory", "w1")
        assert failed.lease_until is None
        assert failed.finished_at >= failed.started_at
        with pytest.raises(LeaseLost):
            driver.ledger.requests.fail(failed, "again")

    def test_a_request_that_waits_is_cancelled_at_once(self, driver: Any) -> None:
        waiting, other = driver.submit("nine", 9), driver.submit("four", 4)
        cancelled = driver.ledger.requests.cancel(waiting.id)
        running = driver.claim()

        assert (cancelled.status, running.id) == (Status.CANCELLED, other.id)
        assert cancelled.finished_at is not None
        with pytest.raises(TransitionRefused, match=f"{waiting.id} is cancelled: only one that has not ended"):
            driver.ledger.requests.cancel(waiting.id)
        with pytest.raises(NotFound):
            driver.ledger.requests.cancel("r-nobody")

    def test_processes_never_claim_the_same(self, ledger: Ledger, url: str, in_processes: Any) -> None:
        """Three processes empty a queue of 30 requests over 5 models; one request in ten is dropped by its worker."""
        for number in range(30):
            if number < 5:
                ledger.models.register(f"m{number}", SPEC, "w")
            behaviour = Behaviour(name=f"b{number}", kind="class", targets=(number // 5,))
            ledger.requests.submit(f"m{number % 5}", behaviour, "s", 1, Recipe())
        script = """
import time
url, number = sys.argv[1:]
ledger = open_ledger(url)
claims = 0
while any(not request.status.is_terminal for request in ledger.requests.all()):
    request = ledger.requests.claim(f"w{number}", 30)
    if request is None:
        time.sleep(0.005)
        continue
    claims += 1
    print(request.id, request.attempt)
    time.sleep(0.003)
    end = ledger.requests.release if claims % 10 == 0 else ledger.requests.fail
    end(request, "no-op")
"""
        answers = in_processes(script, url, processes=3)

        claimed = [claim for answer in answers for claim in answer.splitlines()]
        assert len(set(claimed)) == len(claimed)
        requests = ledger.requests.all()
        expected = {f"{request.id} {attempt + 1}" for request in requests for attempt in range(request.attempt)}
        assert set(claimed) == expected
        assert {request.status for request in requests} == {Status.FAILED}
        assert sum(bool(answer) for answer in answers) > 1, "one process did it all: nothing was shown"

    def test_threads_share_a_ledger(self, driver: Any) -> None:
        for number in range(8):
            driver.ledger.models.register(f"m{number}", SPEC, "w")
            behaviour = Behaviour(name="b", kind="class", targets=(1,))
            driver.ledger.requests.submit(f"m{number}", behaviour, "s", 1, Recipe())
        start = threading.Barrier(8)
        claimed: list[str] = []

        def work() -> None:
            start.wait()
            request = driver.ledger.requests.claim(threading.current_thread().name, 60)
            claimed.append(request.id)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(claimed)) == 8

    def test_a_race_lost_to_another_request_of_the_model_is_run_again(self, driver: Any) -> None:
        """Two workers select different requests of one model: the unique index of running requests refuses one."""
        first = driver.submit("nine", 9)
        driver.submit("four", 4)
        ran: list[str] = []

        def cut_in(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            if statement.startswith("UPDATE requests SET status="):
                ran.append(statement)
                if len(ran) == 1:
                    raise sa.exc.IntegrityError(statement, None, Exception("uq_requests_running"))

        sa.event.listen(driver.ledger.database._engines.autocommit, "before_cursor_execute", cut_in)
        assert driver.claim().id == first.id
        assert len(ran) == 2


OPERATIONS = ("submit", "claim", "expire", "heartbeat", "release", "fail", "reject", "commit", "cancel", "add version")
FRESH = (f"p{number}" for number in itertools.count())


def call(driver: Any, operation: str, number: int, claims: list[Request]) -> None:
    """One call with one of four behaviours or one of the earlier claims, which may have ended."""
    ledger, base = driver.ledger, driver.ledger.models.version(driver.name)
    requests = ledger.requests.all(driver.name)
    held = claims[number % len(claims)] if claims else None
    if operation == "submit":
        driver.submit(f"b{number}", number)
    elif operation in ("claim", "expire"):
        claimed = ledger.requests.claim(f"w{number}", 0 if operation == "expire" else 60, driver.name)
        claims.extend([claimed] if claimed else [])
    elif operation == "cancel" and requests:
        ledger.requests.cancel(requests[number % len(requests)].id)
    elif operation == "add version":
        ledger.models.add_version(driver.name, "w")
    elif held is not None and operation == "heartbeat":
        ledger.requests.heartbeat(held, 60)
    elif held is not None and operation in ("release", "fail"):
        getattr(ledger.requests, operation)(held, "some reason")
    elif held is not None and operation == "reject":
        ledger.reject(held, "some reason", driver.outcome(held), base)
    elif held is not None and operation == "commit":
        ledger.commit(held, driver.outcome(held), base)


@IN_ONE_LEDGER
@given(steps=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 3)), max_size=25))
def test_whatever_is_called_the_ledger_keeps_its_invariants(
    new_driver: Callable[..., Any], steps: list[tuple[str, int]]
) -> None:
    """In any order, with stale claims: states move along TRANSITIONS, or the call is refused and changes nothing."""
    driver = new_driver(next(FRESH))
    claims: list[Request] = []
    before: dict[str, Request] = {}
    for operation, number in steps:
        refused = None
        try:
            call(driver, operation, number, claims)
        except (TransitionRefused, AlreadyErased) as error:
            refused = error
        after = {request.id: request for request in driver.ledger.requests.all(driver.name)}
        if refused:
            assert after == before
        for request in after.values():
            old = before.get(request.id)
            if old is not None and old != request:
                assert request.status in TRANSITIONS[old.status]
        versions = driver.ledger.models.versions(driver.name)
        made = [request.version for request in after.values() if request.status is Status.SUCCEEDED]
        assert [version.number for version in versions] == list(range(1, len(versions) + 1))
        assert sorted(made) == [version.number for version in versions if version.request]
        assert [erasure.version for erasure in driver.ledger.models.erasures(driver.name)] == sorted(made)
        assert sum(request.status is Status.RUNNING for request in after.values()) <= 1
        before = after


def test_a_claim_ends_the_wait_after_a_failure(driver: Any, raw: Any) -> None:
    """A request that is tried again has no moment to wait for any more."""
    driver.submit()
    assert driver.ledger.requests.retry(driver.claim(), "broke").retry_at is not None
    raw.execute(f"UPDATE requests SET retry_at = '2020-01-01T00:00:00.000000+00:00', {STEP}")
    claimed = driver.claim()
    assert (claimed.retry_at, claimed.attempt, claimed.failures) == (None, 2, 1)


def test_a_running_request_keeps_its_own_model_from_a_new_version(driver: Any) -> None:
    """And no other model."""
    version = driver.ledger.models.version("digits")
    driver.ledger.models.register("other", driver.ledger.models.get("digits").spec, version.weights)
    driver.submit()
    driver.claim()
    assert driver.ledger.models.add_version("other", version.weights).number == 2
    with pytest.raises(TransitionRefused, match="is running"):
        driver.ledger.models.add_version("digits", version.weights)


def test_the_members_of_a_batch_are_claimed_and_taken_over_as_its_leader_is(driver: Any) -> None:
    """One lease; a take-over counts as a failure of each, a first claim as none."""
    for target in (1, 2):
        driver.submit(f"b{target}", target)
    for worker, lease, expected in (("w1", -1.0, (1, 0, None)), ("w2", 60.0, (2, 1, "lease_expired"))):
        leader = driver.ledger.requests.claim(worker, lease, max_batch=5)
        (member,) = driver.ledger.requests.batch_members(leader)
        for request in (leader, member):
            assert (request.attempt, request.failures, request.reason) == expected
            assert request.worker == worker
        assert abs((member.lease_until - leader.lease_until).total_seconds()) < 1
        assert leader.started_at is not None
        assert member.started_at is not None


def test_a_step_returns_the_request_as_the_ledger_has_it(driver: Any) -> None:
    """Its report too, which has lists for tuples."""
    driver.submit()
    claimed = driver.claim()
    outcome = driver.outcome(claimed, report={"counts": (1, 2)})
    rejected = driver.ledger.reject(claimed, "not_forgotten", outcome, driver.ledger.models.version("digits"))
    assert rejected == driver.ledger.requests.get(claimed.id)
    assert rejected.report is not None
    assert rejected.report["counts"] == [1, 2]


def test_a_member_names_its_leader(driver: Any) -> None:
    first, second = driver.submit("b1", 1), driver.submit("b2", 2)
    leader = driver.claim()
    assert leader.id == first.id
    with driver.ledger.database.writing("nothing", "w1") as connection:
        member = claims.join(connection, second, leader, "w1", 60.0, datetime.now(UTC))
    assert member is not None
    assert member.batch_leader == leader.id
    assert member == driver.ledger.requests.get(second.id)
