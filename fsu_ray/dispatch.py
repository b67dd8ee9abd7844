"""The queue as Ray jobs: what `fsu run` does, sent to a cluster, and the ledger reconciled with what became of jobs.

fsu submit ──reconcile──> the next request ──> Ray job fsu-REQUEST-ATTEMPT ──> fsu run there, claims as job/...

A job is named for the request that it begins with and its attempt, so that it is one job however often it is sent. It
goes on with what else is ready. A claim bears its job, so a job that is over while the ledger says `running` is found:
its claim ends then, not with its lease.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import make_url

from fsu_ray.cluster.jobs import ATTEMPT, MODEL, REQUEST, Job, JobsClient, job_of, package_env
from fsu_ray.config import Settings
from fsu_ray.pipeline import WorkerOptions
from fsu_ray.records import Request, Status
from fsu_ray.storage.ledger import Ledger

SENDER = "submit"
"""Who ends what nobody is to take over, when a job is about to be sent."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job that carries out what is ready, the request that it begins with, and whether it was sent just now."""

    job: Job
    request: Request
    new: bool


def send(
    ledger: Ledger,
    settings: Settings,
    head: JobsClient,
    wanted: WorkerOptions,
    runtime_env: Mapping[str, Any] | None = None,
) -> SubmittedJob | None:
    """Send what `fsu run` would do now to a head; None where nothing is ready.

    `runtime_env` is laid over the job's own. Raises NotFound for a model that is not there, and what `Head.submit`
    does.
    """
    reconcile(ledger, head)
    ledger.requests.end_abandoned(SENDER)
    request = ledger.requests.upcoming(wanted.model)
    if request is None:
        return None
    attempt = request.attempt + 1
    labels = {REQUEST: request.id, ATTEMPT: str(attempt), MODEL: request.model}
    words = ["python", "-m", "fsu_ray", "run", "--json", "--expect", request.id, "--parallel", str(wanted.parallel)]
    words += [] if wanted.model is None else ["--model", wanted.model]
    words += [] if wanted.max_requests is None else ["--max", str(wanted.max_requests)]
    words += ["--coalesce"] if wanted.coalesce else []
    env = package_env(variables(settings), runtime_env)
    job, new = head.submit(shlex.join(words), f"fsu-{request.id}-{attempt}", env, labels)
    return SubmittedJob(job, request, new)


def variables(settings: Settings) -> dict[str, str]:
    """The settings as a job finds them in its environment. A ledger's URL with a password is not among them, since
    everybody who sees the cluster sees the environments of its jobs, nor one whose password this machine has in its
    environment: the nodes have FSU_LEDGER themselves."""
    found = {
        "FSU_HOME": str(settings.home),
        "FSU_ARTIFACTS": settings.artifacts,
        "FSU_RUNS": settings.runs,
        "FSU_WORKERS": str(settings.workers),
    }
    if "FSU_DATA" in os.environ:
        found["FSU_DATA"] = os.environ["FSU_DATA"]
    url = make_url(settings.ledger)
    known_here = url.get_backend_name() != "sqlite" and any(name in os.environ for name in ("PGPASSWORD", "PGPASSFILE"))
    secret = url.password is not None or known_here or any("pass" in key for key in url.query)
    return found if secret else found | {"FSU_LEDGER": settings.ledger}


def reconcile(ledger: Ledger, head: JobsClient) -> list[Request]:
    """End the claims of jobs that the head knows to be over, and return their requests: the next attempt can begin.

    A job that the head does not know, or that another head had before it was started again, may be alive on another
    cluster: its claim ends with its lease.
    """
    claimed = [request for request in ledger.requests.all(status=Status.RUNNING) if job_of(request.worker)]
    if not claimed:
        return []
    over = {(head.mark, job.id) for job in head.jobs() if job.over}
    return [r for r in claimed if r.batch_leader is None and job_of(r.worker) in over and ledger.requests.expire(r)]


def stop(ledger: Ledger, head: JobsClient, name: str) -> tuple[Job, list[Request]]:
    """Have a job end at its next step: the job, and the requests that it had, as they are then.

    Raises what `Head.stop` does.
    """
    running = ledger.requests.all(status=Status.RUNNING)
    had = [request.id for request in running if job_of(request.worker) == (head.mark, name)]
    job = head.stop(name)
    reconcile(ledger, head)
    return job, [ledger.requests.get(request) for request in had]
