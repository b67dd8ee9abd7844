"""The queue as jobs: what is sent and what is not, and whose claims end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from fsu_ray.cluster.jobs import Job, job_of, package_env, session_mark
from fsu_ray.config import read_settings
from fsu_ray.dispatch import reconcile, send, stop, variables
from fsu_ray.pipeline import WorkerOptions
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Request, Status
from fsu_ray.service import Service

MARK = session_mark("session_of_this_head")


@dataclass
class Remembering:
    """Stands for a head in tests of what the ledger makes of its words; the real one is in tests/jobs."""

    known: dict[str, Job] = field(default_factory=dict)
    sent: list[tuple[str, str, Any, Any]] = field(default_factory=list)
    mark: str = MARK

    def jobs(self) -> list[Job]:
        return list(self.known.values())

    def submit(self, entrypoint: str, name: str, env: Any, labels: Any) -> tuple[Job, bool]:
        self.sent.append((entrypoint, name, env, labels))
        return job(name, "PENDING"), True

    def stop(self, name: str) -> Job:
        self.known[name] = job(name, "STOPPED")
        return self.known[name]


def job(name: str, status: str) -> Job:
    return Job(name, status, {}, "", None, None, None, None)


@pytest.fixture
def queued(service: Service, trained: Any) -> Callable[[str], Request]:
    """Queues a request of the model `name`."""

    def make(name: str) -> Request:
        service.models.register(name, trained.spec, trained.weights)
        nine = Behaviour(name="nine", kind="class", targets=(9,))
        return service.ledger.requests.submit(name, nine, "0" * 64, 8, Recipe())[0]

    return make


def claim(service: Service, name: str, worker: str) -> Request:
    claimed = service.ledger.requests.claim(worker, 3600.0, name)
    assert claimed is not None
    return claimed


def test_what_is_sent(service: Service, queued: Callable[[str], Request]) -> None:
    """One job for the request that comes first and its attempt, with labels that say so and a check of the ledger."""
    request = queued("m")
    head: Any = Remembering()
    sent = send(service.ledger, service.settings, head, WorkerOptions(5, "m", 2, True))
    assert sent is not None
    assert (sent.request.id, sent.new) == (request.id, True)
    (entrypoint, name, env, labels) = head.sent[0]
    assert name == f"fsu-{request.id}-1"
    assert entrypoint == (
        f"python -m fsu_ray run --json --expect {request.id} --parallel 2 --model m --max 5 --coalesce"
    )
    assert labels == {"fsu_request": request.id, "fsu_attempt": "1", "fsu_model": "m"}
    assert env["env_vars"]["FSU_HOME"] == str(service.settings.home)
    assert service.ledger.requests.get(request.id).status is Status.QUEUED, "the job claims it, not who sends it"


def test_nothing_is_sent_where_nothing_is_ready(service: Service, queued: Callable[[str], Request]) -> None:
    head: Any = Remembering()
    assert send(service.ledger, service.settings, head, WorkerOptions()) is None
    queued("m")
    claim(service, "m", "w1")
    assert send(service.ledger, service.settings, head, WorkerOptions()) is None
    assert head.sent == []


def test_a_dead_job_is_retried_as_the_next_attempt(service: Service, queued: Callable[[str], Request]) -> None:
    """Its claim ends, and the job that is sent then is named for attempt 2."""
    request = queued("m")
    claim(service, "m", f"job/{MARK}/fsu-{request.id}-1/host:1")
    head: Any = Remembering({f"fsu-{request.id}-1": job(f"fsu-{request.id}-1", "FAILED")})
    sent = send(service.ledger, service.settings, head, WorkerOptions())
    assert sent is not None
    assert head.sent[0][1] == f"fsu-{request.id}-2"
    taken = claim(service, "m", "w2")
    assert (taken.attempt, taken.failures) == (2, 1)


@pytest.mark.parametrize("cancelled", [False, True])
def test_what_nobody_takes_over_keeps_nobody_waiting(
    service: Service, queued: Callable[[str], Request], cancelled: bool
) -> None:
    """The job of a request died that was to be cancelled, or for the third time: it ends, and the next one is sent."""
    first = queued("m")
    second, _ = service.ledger.requests.submit(
        "m", Behaviour(name="eight", kind="class", targets=(8,)), "1" * 64, 8, Recipe()
    )
    worker = f"job/{MARK}/a/host:1"
    head: Any = Remembering({"a": job("a", "FAILED")})
    claim(service, "m", worker)
    if cancelled:
        service.ledger.requests.cancel(first.id)
    else:
        for _ in range(2):
            reconcile(service.ledger, lambda: head)
            claim(service, "m", worker)
    sent = send(service.ledger, service.settings, head, WorkerOptions())
    assert sent is not None
    assert sent.request.id == second.id
    assert service.ledger.requests.get(first.id).status is (Status.CANCELLED if cancelled else Status.FAILED)


@pytest.mark.parametrize(
    ("worker", "status"),
    [
        ("host:1", "FAILED"),  # no job at all
        (f"job/{MARK}/other/host:1", "FAILED"),  # another job, of which the head knows nothing
        (f"job/{session_mark('another session')}/a/host:1", "FAILED"),  # a job of that name on another cluster
        (f"job/{MARK}/a/host:1", "RUNNING"),
        (f"job/{MARK}/a/host:1", "PENDING"),
    ],
)
def test_claims_of_what_may_be_alive_stay(
    service: Service, queued: Callable[[str], Request], worker: str, status: str
) -> None:
    """Two workers of one request are worse than one that waits for a lease."""
    queued("m")
    before = claim(service, "m", worker)
    head: Any = Remembering({"a": job("a", status)})
    assert reconcile(service.ledger, lambda: head) == []
    assert service.ledger.requests.get(before.id).lease_until == before.lease_until


def test_a_job_that_was_stopped_with_what_it_had(service: Service, queued: Callable[[str], Request]) -> None:
    """Where the driver was killed before it could put its request back, the claim ends all the same."""
    request = queued("m")
    claim(service, "m", f"job/{MARK}/a/host:1")
    head: Any = Remembering({"a": job("a", "RUNNING")})
    ended, had = stop(service.ledger, head, "a")
    assert (ended.status, [each.id for each in had]) == ("STOPPED", [request.id])
    assert service.ledger.requests.claimable("m")


def test_no_password_is_sent(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody who sees a cluster sees the environments of its jobs; a URL without its password is of no use there."""
    for name in ("PGPASSWORD", "PGPASSFILE"):
        monkeypatch.delenv(name, raising=False)
    plain = read_settings()
    assert variables(plain)["FSU_LEDGER"] == plain.ledger
    for url in (
        "postgresql+psycopg://me:hunter2@db/fsu",
        "postgresql+psycopg://me@db/fsu?password=hunter2",
        "postgresql+psycopg://me@db/fsu?sslpassword=hunter2",
    ):
        sent = variables(replace(plain, ledger=url))
        assert "hunter2" not in str(sent)
        assert "FSU_LEDGER" not in sent
    bare = replace(plain, ledger="postgresql+psycopg://me@db/fsu")
    assert "FSU_LEDGER" in variables(bare)
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    assert "FSU_LEDGER" not in variables(bare)
    assert variables(plain)["FSU_LEDGER"] == plain.ledger


def test_the_test_set_s_place_is_sent(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job looks for MNIST where its sender did."""
    monkeypatch.delenv("FSU_DATA", raising=False)
    assert "FSU_DATA" not in variables(read_settings())
    monkeypatch.setenv("FSU_DATA", "/shared/data")
    assert variables(read_settings())["FSU_DATA"] == "/shared/data"


def test_a_runtime_environment_lies_over_ours() -> None:
    """What is given wins, and adds to lists; the package itself always goes along."""
    env = package_env(
        {"FSU_HOME": "/a", "FSU_WORKERS": "1"}, {"env_vars": {"FSU_HOME": "/b", "N": 1}, "pip": ["boto3"]}
    )
    assert env["env_vars"] == {"FSU_HOME": "/b", "FSU_WORKERS": "1", "N": "1", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert env["pip"] == ["boto3"]
    assert [Path(each).name for each in env["py_modules"]] == ["fsu_ray"]


@pytest.mark.parametrize("worker", [None, "", "host:1", "job/x/y", "job/0123abcd/", "job/0123abcd/a"])
def test_who_is_no_job(worker: str | None) -> None:
    assert job_of(worker) is None
    assert job_of("job/0123abcd/a/host:1") == ("0123abcd", "a")
