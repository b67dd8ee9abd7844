"""The queue as Ray jobs: submit to a cluster what `fsu run` does, and update the ledger from the state of jobs.

fsu submit ──reconcile──> the next request ──> Ray job fsu-REQUEST-ATTEMPT ──> fsu run there, claims as job/...

A job is named for the first request that it carries out and the number of that attempt, so submitting it twice gives
one job. It goes on with whatever else is ready. A claim names its job: if the ledger says `running` and the job has
ended, `reconcile` ends the claim at once instead of waiting for its lease.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import make_url

from fsu_ray.cluster.jobs import ATTEMPT, MODEL, REQUEST, Job, JobsClient, job_of, package_env
from fsu_ray.config import Settings
from fsu_ray.pipeline import WorkerOptions
from fsu_ray.records import Request, Status
from fsu_ray.storage.ledger import Ledger

SENDER = "submit"
"""The actor in the ledger that ends requests which nobody may take over, before a job is submitted."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job, the first request that it carries out, and whether the job is new (False: it was submitted before)."""

    job: Job
    request: Request
    new: bool


def send(
    ledger: Ledger,
    settings: Settings,
    head: JobsClient,
    options: WorkerOptions,
    runtime_env: Mapping[str, Any] | None = None,
) -> SubmittedJob | None:
    """Submit to a head what `fsu run` would do now; None if no request is ready.

    `runtime_env` is merged into the job's runtime environment and wins. Raises NotFound for an unknown model, and
    what `JobsClient.submit` raises.
    """
    reconcile(ledger, lambda: head)
    ledger.requests.end_abandoned(SENDER)
    request = ledger.requests.upcoming(options.model)
    if request is None:
        return None
    attempt = request.attempt + 1
    labels = {REQUEST: request.id, ATTEMPT: str(attempt), MODEL: request.model}
    command = ["python", "-m", "fsu_ray", "run", "--json", "--expect", request.id, "--parallel", str(options.parallel)]
    command += [] if options.model is None else ["--model", options.model]
    command += [] if options.max_requests is None else ["--max", str(options.max_requests)]
    command += ["--coalesce"] if options.coalesce else []
    env = package_env(variables(settings), runtime_env)
    job, new = head.submit(shlex.join(command), f"fsu-{request.id}-{attempt}", env, labels)
    return SubmittedJob(job, request, new)


def variables(settings: Settings) -> dict[str, str]:
    """The environment variables that give a job these settings.

    FSU_LEDGER is left out if its URL has a password, or if this process has one in PGPASSWORD or PGPASSFILE: whoever
    sees the cluster sees the environments of its jobs. The nodes must have FSU_LEDGER themselves then.
    """
    environment = {
        "FSU_HOME": str(settings.home),
        "FSU_ARTIFACTS": settings.artifacts,
        "FSU_RUNS": settings.runs,
        "FSU_WORKERS": str(settings.workers),
    }
    if "FSU_DATA" in os.environ:
        environment["FSU_DATA"] = os.environ["FSU_DATA"]
    url = make_url(settings.ledger)
    password_here = url.get_backend_name() != "sqlite" and any(
        name in os.environ for name in ("PGPASSWORD", "PGPASSFILE")
    )
    secret = url.password is not None or password_here or any("pass" in key for key in url.query)
    return environment if secret else environment | {"FSU_LEDGER": settings.ledger}


def reconcile(ledger: Ledger, connect: Callable[[], JobsClient]) -> list[Request]:
    """End the claims of jobs that have ended, so that the next attempt can begin. Returns their requests. `connect` is
    called only where a job has a claim.

    A job that the head does not know may still run on another cluster, also one of before a restart of the head: its
    claim ends with its lease.
    """
    claimed = [request for request in ledger.requests.all(status=Status.RUNNING) if job_of(request.worker)]
    if not claimed:
        return []
    head = connect()
    ended = {(head.mark, job.id) for job in head.jobs() if job.over}
    return [r for r in claimed if r.batch_leader is None and job_of(r.worker) in ended and ledger.requests.expire(r)]


def stop(ledger: Ledger, head: JobsClient, name: str) -> tuple[Job, list[Request]]:
    """Stop a job at its next step. Returns the job and the requests that it was running, as they are afterwards.

    Raises what `JobsClient.stop` raises.
    """
    running = ledger.requests.all(status=Status.RUNNING)
    claimed = [request.id for request in running if job_of(request.worker) == (head.mark, name)]
    job = head.stop(name)
    reconcile(ledger, lambda: head)
    return job, [ledger.requests.get(request) for request in claimed]
