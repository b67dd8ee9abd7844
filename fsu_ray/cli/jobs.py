"""`fsu submit` and `fsu jobs`: the queue as jobs of a Ray cluster."""

from __future__ import annotations

import json as json_
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fsu_ray import console
from fsu_ray.cli.shared import Coalesce, Json, MaxRequests, Parallel, Workers, interrupted, one_line
from fsu_ray.errors import ClusterUnavailable, RunFailed, UserError
from fsu_ray.service import Service, connect
from fsu_ray.service.cluster import Cluster

if TYPE_CHECKING:
    from fsu_ray.cluster.jobs import Job

submit_app = typer.Typer()
jobs_app = typer.Typer(help="Show and stop the jobs that `fsu submit` has sent.", no_args_is_help=True)

Address = Annotated[
    str | None,
    typer.Option(
        envvar=["RAY_API_SERVER_ADDRESS"],
        help="The head's Jobs API, e.g. http://HEAD:8265. Default: that of the cluster of RAY_ADDRESS.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Its full id.")]


@submit_app.command("submit", epilog="Example: fsu submit --address http://127.0.0.1:8265 --model m --max 5 --wait")
@one_line
def submit(
    address: Address = None,
    model: Annotated[str | None, typer.Option(help="Only requests of this model.")] = None,
    max_requests: MaxRequests = None,
    coalesce: Coalesce = False,
    parallel: Parallel = 1,
    workers: Workers = None,
    runtime_env: Annotated[
        str | None, typer.Option(help='JSON to lay over the job\'s runtime environment, e.g. \'{"pip": ["boto3"]}\'.')
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Print what the job prints, until it ends.")] = False,
    json: Json = False,
) -> None:
    """Send to a cluster, as a Ray job, what `fsu run` would do here.

    The job is named for its first request and the attempt: sent twice, it is one job. With --wait the exit code is
    that of `fsu run`, and 1 where the job was stopped or could not begin.
    """
    service = connect()
    cluster = service.cluster(address)
    sent = cluster.submit(
        model=model, max_requests=max_requests, parallel=parallel, coalesce=coalesce, workers=workers,
        runtime_env=_runtime_env(runtime_env),
    )  # fmt: skip
    if sent is None:
        if json:
            console.print_json({"job": None, "new": False, "request": None, "status": None})
        else:
            console.out.print(idle(service, model))
        return
    if not json:
        what = "sent" if sent.new else f"is {sent.job.status} already:"
        begins = f"it begins with {sent.request.behaviour.name} of {sent.request.model}"
        console.out.print(f"{what} {sent.job.id}: {begins}", markup=False)
    job = _followed(cluster, sent.job) if wait else sent.job
    if json:
        console.print_json({"job": job.id, "new": sent.new, "request": sent.request.id, "status": job.status})
    elif not wait:
        console.out.print(f"`fsu jobs logs {job.id}` shows what it prints, `fsu jobs stop {job.id}` ends it")
    if wait:
        _end(job)


def _followed(cluster: Cluster, job: Job) -> Job:
    """The job once it has ended; until then what it prints is printed."""
    with _goes_on(job.id):
        try:
            for text in cluster.follow(job.id):
                console.err.print(text, end="", markup=False, style="dim")
        except (ClusterUnavailable, RunFailed) as error:
            console.err.print(f"it cannot be followed ({error}): waiting for its end", markup=False)
        return cluster.wait(job.id)


@jobs_app.command("list", epilog="Example: fsu jobs list --address http://127.0.0.1:8265")
@one_line
def jobs_list(
    address: Address = None,
    every: Annotated[bool, typer.Option("--all", help="Also jobs that `fsu submit` has not sent.")] = False,
    json: Json = False,
) -> None:
    """List the jobs of a cluster, oldest first. A head that was restarted knows no earlier jobs."""
    from fsu_ray.cluster.jobs import ATTEMPT, MODEL, REQUEST

    jobs = _cluster(address).jobs(foreign=every)
    if json:
        console.print_json(jobs)
        return
    rows = [
        [
            job.id, job.status, *(job.labels.get(name, "") for name in (MODEL, REQUEST, ATTEMPT)),
            console.when(job.started_at), console.when(job.ended_at),
            "" if job.exit_code is None else job.exit_code,
        ]
        for job in jobs
    ]  # fmt: skip
    columns = ["job", "status", "model", "begins with", "attempt", "started", "ended", "exit code"]
    console.out.print(console.table("Jobs", columns, rows))


@jobs_app.command("logs", epilog="Example: fsu jobs logs fsu-r-19c0ffee-1 --address http://127.0.0.1:8265 --follow")
@one_line
def jobs_logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends.")] = False,
) -> None:
    """Print what a job has printed, or why it could not begin."""
    cluster = _cluster(address)
    if follow:
        with _goes_on(job):
            for text in cluster.follow(job):
                console.out.print(text, end="", markup=False)
    else:
        console.out.print(cluster.logs(job), end="", markup=False)
    shown = cluster.job(job)
    if shown.status == "FAILED" and shown.exit_code is None:
        console.err.print(_broke(shown), markup=False)


@jobs_app.command("stop", epilog="Example: fsu jobs stop fsu-r-19c0ffee-1 --address http://127.0.0.1:8265")
@one_line
def jobs_stop(job: JobId, address: Address = None, json: Json = False) -> None:
    """End a job at its next step. Its request is queued again, and later continues from a checkpoint of that step."""
    stopped, requests = connect().cluster(address).stop(job)
    if json:
        console.print_json({"job": stopped, "requests": requests})
        return
    console.out.print(f"job {stopped.id} is {stopped.status}", markup=False)
    for request in requests:
        console.out.print(f"request {request.id} is {request.status.value}", markup=False)


def idle(service: Service, model: str | None) -> str:
    """Why nothing is ready."""
    waiting = [request for request in service.requests.all(model) if not request.status.is_terminal]
    if not waiting:
        return "nothing is queued; `fsu request submit` queues a request"
    now = datetime.now(UTC)
    later = [at for request in waiting for at in (request.not_before, request.retry_at) if at and at > now]
    when = f"; the next can begin at {console.when(min(later))}" if later else ""
    states = ", ".join(f"{request.id} {request.status}" for request in waiting[:3])
    return (
        f"nothing is ready: {len(waiting)} wait or run elsewhere ({states}{', ...' if len(waiting) > 3 else ''}){when}"
    )


def _cluster(address: str | None) -> Cluster:
    """A cluster that is asked without a ledger."""
    return Service().cluster(address)


def _runtime_env(text: str | None) -> dict[str, Any]:
    try:
        runtime_env = json_.loads(text or "{}")
    except json_.JSONDecodeError as error:
        raise UserError(f'--runtime-env takes JSON such as \'{{"pip": ["boto3"]}}\': {error}') from None
    if not isinstance(runtime_env, dict):
        raise UserError("--runtime-env takes a JSON object")
    return runtime_env


def _message(job: Job) -> str:
    """Why a job has no exit code: of what Ray says, the last line that names an error."""
    lines = [" ".join(line.split()) for line in (job.message or "").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|[\w.]*(Error|Exception|Timeout)): ", line)]
    return (errors or lines or ["Ray does not say why"])[-1][:600]


def _end(job: Job) -> None:
    """End as the job ended: with its exit code, or with what kept it from having one."""
    if job.status == "SUCCEEDED":
        return
    if job.exit_code is not None and job.exit_code > 0:
        raise typer.Exit(job.exit_code)
    raise RunFailed(f"job {job.id} was stopped" if job.status == "STOPPED" else _broke(job))


def _broke(job: Job) -> str:
    """What happened to a job that has no exit code of its own."""
    if job.exit_code is not None:
        return f"job {job.id} was killed (signal {-job.exit_code}): the next `fsu submit` goes on with its request"
    return f"job {job.id} {'broke' if job.begun else 'could not begin'}: {_message(job)}"


@contextmanager
def _goes_on(job: str) -> Iterator[None]:
    """An interrupt ends the watching in one line, not the job. A coroutine that aiohttp had begun is not warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        with interrupted(f"job {job} goes on; `fsu jobs stop {job}` ends it"):
            yield
