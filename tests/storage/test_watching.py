"""What is asked of the ledger from outside a run: what comes next, how much there is, whose worker is dead."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fsu_ray.errors import LeaseLost, NotFound
from fsu_ray.records import QueueStats, Status, Terms


def test_what_comes_next_is_what_would_be_claimed(driver: Any, new_driver: Callable[..., Any]) -> None:
    """By priority and age, of one model or of all, and a request whose lease is over comes first."""
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


def test_the_claim_of_a_dead_worker_ends_at_once(driver: Any) -> None:
    """The next claim takes over, as it does when a lease has run out; the dead worker has lost it."""
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
    assert not ledger.requests.expire(claimed), "as it was read, it is of another attempt"
    assert ledger.requests.get(taken.id).lease_until > datetime.now(UTC)


def test_those_that_run_along_come_with_it(driver: Any) -> None:
    """A coalesced run has one worker: all its requests are taken over together."""
    driver.submit("nine", 9)
    driver.submit("four", 4)
    claimed = driver.ledger.requests.claim("dead", 3600.0, driver.name, max_batch=5)
    assert len(driver.ledger.requests.batch_members(claimed)) == 1
    assert driver.ledger.requests.expire(claimed)
    now = datetime.now(UTC)
    assert all(each.lease_until <= now for each in driver.ledger.requests.all(status=Status.RUNNING))
    taken = driver.ledger.requests.claim("w2", 60.0, driver.name, max_batch=5)
    assert [each.worker for each in driver.ledger.requests.batch_members(taken)] == ["w2"]


def test_a_worker_that_lives_after_all_keeps_its_request(driver: Any) -> None:
    """Its next heartbeat renews the lease, as long as nobody was faster."""
    driver.submit("nine", 9)
    claimed = driver.claim("alive", 3600.0)
    assert driver.ledger.requests.expire(claimed)
    driver.ledger.requests.heartbeat(claimed, 3600.0)
    assert driver.ledger.requests.claim("w2", 60.0) is None


def test_figures(driver: Any, new_driver: Callable[..., Any]) -> None:
    """Every state of every model, what could begin now, and what generators were used for."""
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
    found = driver.ledger.requests.stats()
    assert found.requests["digits", "succeeded"] == 2
    assert (found.requests["digits", "running"], found.requests["digits", "queued"]) == (1, 1)
    assert (found.requests["other", "queued"], found.requests["other", "failed"]) == (3, 0)
    assert len(found.requests) == 2 * len(Status)
    assert found.depth == {"digits": 1, "other": 2}
    assert found.uses == {("digits", "trained"): 1, ("digits", "reused"): 1}
    assert found.reuse_ratio == 0.5


def test_the_reuse_ratio_is_of_all_erasures() -> None:
    uses = {("m", "reused"): 3, ("m", "warm_started"): 1, ("n", "trained"): 2}
    assert QueueStats({}, {}, uses).reuse_ratio == 0.5
