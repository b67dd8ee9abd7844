"""Ray's Jobs API: submit jobs to a head, list, read and stop them; and the name under which a job claims requests.

A driver that runs as a job claims requests as `job/MARK/JOB/PROCESS` (`claimant`). MARK stands for the head's session:
two clusters may have jobs of the same name, and a restarted head does not know the jobs it had before.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fsu_ray.cluster import internals
from fsu_ray.errors import ClusterUnavailable, NotFound, RunFailed, TransitionRefused, UserError

STOP_SECONDS = 60
"""How long a stopped job has for its next step and the checkpoint of that step; Ray's default is 3 s."""

REQUEST, ATTEMPT, MODEL = "fsu_request", "fsu_attempt", "fsu_model"
"""Keys in a job's metadata: the request it begins with, the number of that attempt, and the request's model."""

_CLAIMANT = re.compile(r"job/([0-9a-f]{8})/([^/]+)/.*")
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A job as its head knows it. `status` is Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""

    id: str
    status: str
    labels: Mapping[str, str]
    entrypoint: str
    started_at: datetime | None
    ended_at: datetime | None
    exit_code: int | None
    message: str | None
    begun: bool = True
    """Whether the job's process was ever started."""

    @property
    def over(self) -> bool:
        """Whether the job has ended, in whatever way."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class JobsClient:
    """The Jobs API of the head at an `address` such as http://HEAD:8265; without one, of the cluster of RAY_ADDRESS.

    It sends the authentication token if RAY_AUTH_MODE=token, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH is set.
    `answer_seconds`: how long to wait for a connection and for an answer. `agent_seconds`: how long a head that has
    just started may lack the agent that starts jobs. `stop_seconds`: how long a stopped job may take to end.

    The constructor raises UserError for a malformed address and for a Ray of another version. The constructor and
    every method raise ClusterUnavailable if no head answers or the head refuses the token.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        answer_seconds: tuple[float, float] = (10.0, 60.0),
        agent_seconds: float = 60.0,
        stop_seconds: float = STOP_SECONDS + 30.0,
    ) -> None:
        if address is not None and not re.fullmatch(r"https?://[^/\s@]+/?", address):
            raise UserError("--address takes the URL of a head's Jobs API, such as http://127.0.0.1:8265")
        internals.check_version()
        if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        self.address = address or "the cluster of RAY_ADDRESS"
        self._agent_seconds, self._stop_seconds = agent_seconds, stop_seconds
        with _override_address(address):
            self._client: Any = self._call(partial(self._connect, address, answer_seconds))
        self.mark = session_mark(self._call(partial(internals.session_name, self._client)))

    def submit(
        self, entrypoint: str, name: str, runtime_env: Mapping[str, Any], labels: Mapping[str, str]
    ) -> tuple[Job, bool]:
        """Submit a job called `name`. Return the job, and whether it is new: a job of that name that has not ended is
        returned as it is.

        If the job of that name has ended, the new one is called `name.2`, and so on: Ray never reuses a name. Raises
        UserError for an invalid `runtime_env`.
        """
        _check_keys(runtime_env)
        number, deadline = 1, time.monotonic() + self._agent_seconds
        while True:
            job_name = name if number == 1 else f"{name}.{number}"
            job = self._find(job_name)
            if job is not None and not job.over:
                return job, False
            if job is not None:
                number += 1
                continue
            try:
                self._call(
                    partial(
                        self._client.submit_job,
                        entrypoint=entrypoint,
                        submission_id=job_name,
                        runtime_env=dict(runtime_env),
                        metadata=dict(labels),
                    )
                )
                return self.job(job_name), True
            except (TypeError, ValueError) as error:
                raise UserError(f"--runtime-env: {_one_line(error)}") from None
            except RunFailed as error:
                if self._find(job_name) is not None:  # another process has submitted it meanwhile
                    continue
                refusal = error.__cause__
                if not (isinstance(refusal, internals.RequestRefused) and internals.lacks_agent(refusal)):
                    raise
                if time.monotonic() > deadline:
                    raise ClusterUnavailable(
                        f"{self.address} has no agent that starts jobs: check the head's logs"
                    ) from None
                time.sleep(1)  # the head has just started

    def jobs(self) -> list[Job]:
        """All submitted jobs that the head knows, oldest first."""
        jobs = [_job(details) for details in self._call(self._client.list_jobs) if details.submission_id]
        return sorted(jobs, key=lambda job: (job.started_at or datetime.max.replace(tzinfo=UTC), job.id))

    def job(self, name: str) -> Job:
        """The job of that name; raises NotFound."""
        job = self._find(name)
        if job is None:
            raise NotFound(f"{self.address} has no job {name!r}; `fsu jobs list` shows its jobs")
        return job

    def logs(self, name: str) -> str:
        """The output of a job so far; raises NotFound."""
        self.job(name)
        output: str = self._call(partial(self._client.get_job_logs, name))
        return output

    def follow(self, name: str) -> Iterator[str]:
        """The output of a job in pieces, until the job ends; raises NotFound."""
        while self.job(name).status == "PENDING":
            time.sleep(0.5)
        pieces, loop = self._client.tail_job_logs(name), asyncio.new_event_loop()

        async def next_piece() -> str | None:
            return await anext(pieces, None)

        async def close() -> None:  # after an interrupt, `next_piece` is still pending
            pending = asyncio.all_tasks() - {asyncio.current_task()}
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            await pieces.aclose()

        try:
            while (piece := self._call(lambda: loop.run_until_complete(next_piece()))) is not None:
                yield piece
        finally:
            loop.run_until_complete(close())
            loop.close()

    def wait(self, name: str, seconds: float | None = None) -> Job:
        """The job once it has ended, or as it is after `seconds`. Raises NotFound."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not (job := self.job(name)).over and (deadline is None or time.monotonic() < deadline):
            time.sleep(0.5)
        return job

    def stop(self, name: str) -> Job:
        """Stop a job at its next step and wait until it has ended.

        Raises NotFound, TransitionRefused if the job has ended already, and RunFailed if it does not end in time.
        """
        job = self.job(name)
        if job.over:
            raise TransitionRefused(f"job {name} is {job.status} already")
        self._call(partial(self._client.stop_job, name))
        job = self.wait(name, self._stop_seconds)
        if not job.over:
            raise RunFailed(f"job {name} was told to stop and is still {job.status}: see `fsu jobs logs {name}`")
        return job

    def _connect(self, address: str | None, answer_seconds: tuple[float, float]) -> Any:
        """Ray's client; Ray raises untyped errors here for a token or a RAY_ADDRESS that it cannot use."""
        try:
            return internals.jobs_client(address, answer_seconds)
        except ValueError as error:
            raise ClusterUnavailable(f"RAY_ADDRESS names no cluster with a Jobs API: {_one_line(error)}") from None
        except RuntimeError as error:  # e.g. no token where RAY_AUTH_TOKEN_PATH points
            raise ClusterUnavailable(f"{self.address} cannot be asked: {_one_line(error)}") from None

    def _find(self, name: str) -> Job | None:
        try:
            return _job(self._call(partial(self._client.get_job_info, name)))
        except NotFound:
            return None

    def _call(self, function: Callable[[], T]) -> T:
        """The result of a call of Ray's client; its errors become ours."""
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError, RayError

        try:
            return function()
        except AuthenticationError as error:
            problem = "refuses this token" if internals.is_wrong_token(error) else "wants a token"
            raise ClusterUnavailable(
                f"{self.address} {problem}: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            ) from None
        except (ConnectionError, requests.exceptions.RequestException, aiohttp.ClientError, RayError):
            raise ClusterUnavailable(
                f"no head answers at {self.address}: start one (`ray start --head`, `ray up`), or correct --address"
            ) from None
        except internals.RequestRefused as error:
            kind = NotFound if error.status == 404 else RunFailed
            raise kind(f"{self.address}: {_one_line(error)}") from error
        except RuntimeError as error:  # the stream of a job's output broke
            raise RunFailed(f"{self.address}: {_one_line(error)}") from None


def package_env(
    settings: Mapping[str, str], more: Mapping[str, Any] | None = None, *, stop_seconds: int = STOP_SECONDS
) -> dict[str, Any]:
    """The runtime environment of a job: this package, `settings` as environment variables, and `stop_seconds` to stop.

    `more` is merged into it and wins. Ray uploads the package with the job, without the result tables and pictures of
    the paper; nodes need only the libraries that the package requires.
    """
    package = Path(__file__).parent.parent
    merged: dict[str, Any] = dict(more or {})
    variables = {**settings, "RAY_JOB_STOP_WAIT_TIME_S": str(stop_seconds), **merged.pop("env_vars", {})}
    return {
        "py_modules": [str(package), *merged.pop("py_modules", [])],
        "excludes": ["__pycache__", "/experiments/results", *merged.pop("excludes", [])],
        "env_vars": {name: str(value) for name, value in variables.items()},
        **merged,
    }


def _check_keys(runtime_env: Mapping[str, Any]) -> None:
    """Raise UserError for a key that Ray does not know: Ray would ignore it."""
    from ray.runtime_env import RuntimeEnv

    unknown = sorted(set(runtime_env) - RuntimeEnv.known_fields)
    if unknown:
        known = ", ".join(sorted(key for key in RuntimeEnv.known_fields if not key.startswith("_")))
        raise UserError(f"--runtime-env: Ray knows no key {unknown[0]!r}; it takes {known}")


def current_job() -> str | None:
    """The name of the job whose driver this process is, None if it is no driver of a job."""
    name = internals.job_metadata().get("job_submission_id")
    return name if isinstance(name, str) else None


def claimant(process: str) -> str:
    """The name under which a driver claims requests: `process`, prefixed with its job if it runs as one."""
    name = current_job()
    if name is None:
        return process
    import ray

    if not ray.is_initialized():
        return process
    return f"job/{session_mark(ray.get_runtime_context().get_session_name())}/{name}/{process}"


def job_of(worker: str | None) -> tuple[str, str] | None:
    """The session mark and the name of the job that made a claim, None if no job made it."""
    match = _CLAIMANT.fullmatch(worker or "")
    return None if match is None else (match[1], match[2])


def session_mark(session: str) -> str:
    """Eight digits that stand for a head's session. Ray gives each start of a head a new session name."""
    return hashlib.sha256(session.encode()).hexdigest()[:8]


@contextmanager
def _override_address(address: str | None) -> Iterator[None]:
    """Make Ray's client use `address` if one is given: RAY_ADDRESS would take precedence over it."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    if address is not None:
        os.environ[name] = address
    try:
        yield
    finally:
        if address is not None:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def _job(details: Any) -> Job:
    def moment(milliseconds: int | None) -> datetime | None:
        return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)

    return Job(
        details.submission_id,
        str(getattr(details.status, "value", details.status)),
        dict(details.metadata or {}),
        details.entrypoint,
        moment(details.start_time),
        moment(details.end_time),
        details.driver_exit_code,
        details.message,
        details.driver_agent_http_address is not None,
    )


def _one_line(error: BaseException) -> str:
    """The message of an error in one line; of a traceback that the head sent, its last line."""
    text = str(error).replace("\\n", "\n").strip()
    if "Traceback" in text:
        text = [line.strip(" \"'}.") for line in text.splitlines() if line.strip(" \"'}.")][-1]
    return " ".join(text.split())[:500]
