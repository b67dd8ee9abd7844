"""`fsu submit` and `fsu jobs`: the queue as jobs of a Ray cluster."""

from __future__ import annotations

import json as json_
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from fsu_ray import console
from fsu_ray.cli.shared import Json, Workers, interrupted, one_line, open_app
from fsu_ray.errors import ClusterUnavailable, RunFailed, UserError

submit_app = typer.Typer()
jobs_app = typer.Typer(help="Jobs on a Ray cluster: what `fsu submit` has sent.", no_args_is_help=True)

Address = Annotated[
    str | None,
    typer.Option(
        envvar=["RAY_API_SERVER_ADDRESS"],
        help="The head's Jobs API, e.g. http://HEAD:8265. Default: that of the cluster of RAY_ADDRESS.",
    ),
]


@submit_app.command("submit", epilog="Example: fsu submit --address http://127.0.0.1:8265 --model m --max 5 --wait")
@one_line
def submit(
    address: Address = None,
    model: Annotated[str | None, typer.Option(help="Only requests of this model.")] = None,
    max_requests: Annotated[int | None, typer.Option("--max", min=1, help="End after this many requests.")] = None,
    coalesce: Annotated[bool, typer.Option("--coalesce", help="All class requests of a model in one run.")] = False,
    parallel: Annotated[int, typer.Option(min=1, help="Models side by side in this job, at most.")] = 1,
    workers: Workers = None,
    runtime_env: Annotated[
        str | None, typer.Option(help="JSON that is laid over the job's runtime environment, e.g. {'pip': ['boto3']}.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Print what the job prints, until it ends.")] = False,
    json: Json = False,
) -> None:
    """Send what `fsu run` does to a cluster, as a Ray job.

    The job is named for the request that it begins with and its attempt: sent again, it is the same job. With --wait
    the exit code is that of `fsu run`, and 1 where the job was stopped or could not begin.
    """
    from dataclasses import replace

    from fsu_ray.dispatch import send
    from fsu_ray.pipeline import WorkerOptions

    opened = open_app()
    if model is not None:
        opened.ledger.models.get(model)
    more = _runtime_env(runtime_env)
    head = _head(address)
    settings = opened.settings if workers is None else replace(opened.settings, workers=workers)
    sent = send(opened.ledger, settings, head, WorkerOptions(max_requests, model, parallel, coalesce), more)
    if sent is None:
        if json:
            console.print_json({"job": None, "new": False, "request": None, "status": None})
        else:
            console.out.print(idle(opened.ledger, model))
        return
    if not json:
        what = "sent" if sent.new else f"is {sent.job.status} already:"
        begins = f"it begins with {sent.request.behaviour.name} of {sent.request.model}"
        console.out.print(f"{what} {sent.job.id}: {begins}", markup=False)
    job = sent.job
    if wait:
        with _goes_on(job.id):
            try:
                for lines in head.follow(job.id):
                    console.err.print(lines, end="", markup=False, style="dim")
            except (ClusterUnavailable, RunFailed) as error:
                console.err.print(f"it cannot be followed ({error}): waiting for its end", markup=False)
            job = head.wait(job.id)
    if json:
        console.print_json({"job": job.id, "new": sent.new, "request": sent.request.id, "status": job.status})
    elif not wait:
        console.out.print(f"`fsu jobs logs {job.id}` shows what it prints, `fsu jobs stop {job.id}` ends it")
    if wait:
        _end(job)


@jobs_app.command("list", epilog="Example: fsu jobs list --address http://127.0.0.1:8265")
@one_line
def jobs_list(
    address: Address = None,
    every: Annotated[bool, typer.Option("--all", help="Also those that are none of fsu's.")] = False,
    json: Json = False,
) -> None:
    """The jobs of a cluster, oldest first. A head that was started again knows nothing of those before."""
    from fsu_ray.cluster.jobs import ATTEMPT, MODEL, REQUEST

    found = [job for job in _head(address).jobs() if every or REQUEST in job.labels]
    if json:
        console.print_json(found)
        return
    rows = [
        [
            job.id, job.status, *(job.labels.get(name, "") for name in (MODEL, REQUEST, ATTEMPT)),
            console.when(job.started_at), console.when(job.ended_at),
            "" if job.exit_code is None else job.exit_code,
        ]
        for job in found
    ]  # fmt: skip
    columns = ["job", "status", "model", "begins with", "attempt", "started", "ended", "exit code"]
    console.out.print(console.table("Jobs", columns, rows))


@jobs_app.command("logs", epilog="Example: fsu jobs logs fsu-r-19c0ffee-1 --address http://127.0.0.1:8265 --follow")
@one_line
def jobs_logs(
    job: str, address: Address = None, follow: Annotated[bool, typer.Option("--follow", help="Until it ends.")] = False
) -> None:
    """What a job has printed, and why it could not begin where it did not."""
    head = _head(address)
    if follow:
        with _goes_on(job):
            for lines in head.follow(job):
                console.out.print(lines, end="", markup=False)
    else:
        console.out.print(head.logs(job), end="", markup=False)
    found = head.job(job)
    if found.status == "FAILED" and found.exit_code is None:
        console.err.print(_broke(found), markup=False)


@jobs_app.command("stop", epilog="Example: fsu jobs stop fsu-r-19c0ffee-1 --address http://127.0.0.1:8265")
@one_line
def jobs_stop(job: str, address: Address = None, json: Json = False) -> None:
    """End a job at its next step: what it had is queued again, and goes on from a checkpoint of that very step."""
    from fsu_ray.dispatch import stop

    ledger = open_app().ledger
    ended, had = stop(ledger, _head(address), job)
    if json:
        console.print_json({"job": ended, "requests": had})
        return
    console.out.print(f"job {ended.id} is {ended.status}", markup=False)
    for request in had:
        console.out.print(f"request {request.id} is {request.status.value}", markup=False)


def idle(ledger: Any, model: str | None) -> str:
    """Why there was nothing to do."""
    from datetime import UTC, datetime

    waiting = [request for request in ledger.requests.all(model) if not request.status.is_terminal]
    if not waiting:
        return "nothing is queued; `fsu request submit` queues a request"
    moment = datetime.now(UTC)
    later = [at for request in waiting for at in (request.not_before, request.retry_at) if at and at > moment]
    when = f"; the next can begin at {console.when(min(later))}" if later else ""
    states = ", ".join(f"{request.id} {request.status}" for request in waiting[:3])
    return (
        f"nothing is ready: {len(waiting)} wait or run elsewhere ({states}{', ...' if len(waiting) > 3 else ''}){when}"
    )


def _head(address: str | None) -> Any:
    import os

    from fsu_ray.cluster.jobs import JobsClient

    if address is None and not os.environ.get("RAY_ADDRESS"):
        raise UserError("say which cluster: --address http://HEAD:8265, or RAY_API_SERVER_ADDRESS or RAY_ADDRESS")
    return JobsClient(address)


def _runtime_env(text: str | None) -> dict[str, Any]:
    try:
        found = json_.loads(text or "{}")
    except json_.JSONDecodeError as error:
        raise UserError(f'--runtime-env takes JSON such as \'{{"pip": ["boto3"]}}\': {error}') from None
    if not isinstance(found, dict):
        raise UserError("--runtime-env takes a JSON object")
    variables = found.get("env_vars", {})
    if not isinstance(variables, dict) or not all(isinstance(each, str | int | float) for each in variables.values()):
        raise UserError("--runtime-env: env_vars takes a JSON object of texts and numbers")
    for name in ("py_modules", "excludes"):
        items = found.get(name, [])
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise UserError(f"--runtime-env: {name} takes a list of texts")
    return found


def _message(job: Any) -> str:
    """Why a job has no exit code, in one line: of what Ray tells, the last line that names an error."""
    lines = [" ".join(line.split()) for line in (job.message or "").splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(ERROR|[\w.]*(Error|Exception|Timeout)): ", line)]
    return (named or lines or ["Ray does not say why"])[-1][:600]


def _end(job: Any) -> None:
    """End as the job ended: with its exit code, or with what kept it from having one."""
    if job.status == "SUCCEEDED":
        return
    if job.exit_code is not None and job.exit_code > 0:
        raise typer.Exit(job.exit_code)
    raise RunFailed(f"job {job.id} was stopped" if job.status == "STOPPED" else _broke(job))


def _broke(job: Any) -> str:
    """What happened to a job that has no exit code of its own."""
    if job.exit_code is not None:
        return f"job {job.id} was killed (signal {-job.exit_code}): the next `fsu submit` goes on with its request"
    return f"job {job.id} {'broke' if job.begun else 'could not begin'}: {_message(job)}"


@contextmanager
def _goes_on(job: str) -> Iterator[None]:
    """An interrupt ends the watching, not the job, in one line, whatever aiohttp was about to await."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        with interrupted(f"job {job} goes on; `fsu jobs stop {job}` ends it"):
            yield
