"""Ray's Jobs API: jobs are sent to a head, listed, read and stopped; and who a driver is that runs as one.

A claim of a driver that runs as a job bears the job in its name (`claimant`), with a mark of the head's session: two
clusters may have jobs of one name, and a head that was started again knows nothing of its jobs before.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from fsu_ray.errors import ClusterUnavailable, NotFound, RunFailed, TransitionRefused, UserError

STOP_SECONDS = 60
"""How long a job that is stopped has for its next step and the checkpoint of it; Ray's own patience is 3 s."""

AGENT_SECONDS = 60.0
"""How long a head that has just started may be without the agent that begins jobs."""

ANSWER_SECONDS = (10, 60)
"""How long a head may take to be reached, and to answer."""

REQUEST, ATTEMPT, MODEL = "fsu_request", "fsu_attempt", "fsu_model"
"""The labels of a job, in its metadata: the request that it begins with, which attempt that is, and of which model."""

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
    """Whether there was ever a process that carried it out."""

    @property
    def over(self) -> bool:
        """Whether it has ended, however it did."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class JobsClient:
    """The Jobs API of the head at an `address` such as http://HEAD:8265; without one, of the cluster of RAY_ADDRESS.

    With `RAY_AUTH_MODE=token`, or where RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH is set, the token goes along. Raises
    UserError for an address that is none, ClusterUnavailable where nobody answers or the token is not right; so does
    every method.
    """

    def __init__(self, address: str | None = None) -> None:
        if address is not None and not re.fullmatch(r"https?://[^/\s@]+/?", address):
            raise UserError("--address takes the URL of a head's Jobs API, such as http://127.0.0.1:8265")
        if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        self.address = address or "the cluster of RAY_ADDRESS"
        with _meant(address):
            importlib.import_module("ray.job_submission")  # which sets the levels of its loggers

            for name in (
                "dashboard.modules.dashboard_sdk",
                "dashboard.modules.job.sdk",
                "_private.runtime_env.packaging",
            ):
                logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
            self._client: Any = self._asked(lambda: _client(address))
        version = self._asked(lambda: self._client._do_request("GET", "/api/version")).json()
        self.mark = session_mark(version["session_name"])

    def submit(
        self, entrypoint: str, name: str, runtime_env: Mapping[str, Any], labels: Mapping[str, str]
    ) -> tuple[Job, bool]:
        """Send a job called `name` and return it, and whether it is new: one of that name that has not ended stands.

        A name whose job has ended is continued, as `name.2`; Ray never gives a name a second time. Raises UserError
        for a `runtime_env` that is none.
        """
        _check(runtime_env)
        number, deadline = 1, time.monotonic() + AGENT_SECONDS
        while True:
            own = name if number == 1 else f"{name}.{number}"
            known = self._find(own)
            if known is not None and not known.over:
                return known, False
            if known is None:
                try:
                    self._asked(
                        lambda own=own: self._client.submit_job(  # type: ignore[misc]
                            entrypoint=entrypoint,
                            submission_id=own,
                            runtime_env=dict(runtime_env),
                            metadata=dict(labels),
                        )
                    )
                except (TypeError, ValueError) as error:
                    raise UserError(f"--runtime-env: {_line(error)}") from None
                except RunFailed as error:
                    if "already exists" in str(error):  # somebody else has sent it at this very moment
                        continue
                    if "No available agent" not in str(error):
                        raise
                    if time.monotonic() > deadline:
                        raise ClusterUnavailable(f"{self.address} has no agent for jobs: look at the head") from None
                    time.sleep(1)  # a head that has just started
                    continue
                return self.job(own), True
            number += 1

    def jobs(self) -> list[Job]:
        """All jobs that the head knows of and that were sent to it, oldest first."""
        found = [_job(each) for each in self._asked(self._client.list_jobs) if each.submission_id]
        return sorted(found, key=lambda job: (job.started_at or datetime.max.replace(tzinfo=UTC), job.id))

    def job(self, name: str) -> Job:
        """One job; raises NotFound."""
        found = self._find(name)
        if found is None:
            raise NotFound(f"{self.address} has no job {name!r}; `fsu jobs list` shows those that it has")
        return found

    def logs(self, name: str) -> str:
        """What a job has printed up to now; raises NotFound."""
        self.job(name)
        said: str = self._asked(lambda: self._client.get_job_logs(name))
        return said

    def follow(self, name: str) -> Iterator[str]:
        """What a job prints, until it ends; raises NotFound."""
        while self.job(name).status == "PENDING":
            time.sleep(0.5)
        lines, loop = self._client.tail_job_logs(name), asyncio.new_event_loop()

        async def more() -> str | None:
            return await anext(lines, None)

        async def end() -> None:  # an interrupt leaves `more` where it was
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await lines.aclose()

        try:
            while (said := self._asked(lambda: loop.run_until_complete(more()))) is not None:
                yield said
        finally:
            loop.run_until_complete(end())
            loop.close()

    def wait(self, name: str, seconds: float | None = None) -> Job:
        """The job once it is over; as it is where that takes longer than `seconds`. Raises NotFound."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not (job := self.job(name)).over and (deadline is None or time.monotonic() < deadline):
            time.sleep(0.5)
        return job

    def stop(self, name: str) -> Job:
        """Have a job end at its next step and wait for that. Raises NotFound, TransitionRefused where it is over, and
        RunFailed where it does not end."""
        job = self.job(name)
        if job.over:
            raise TransitionRefused(f"job {name} is {job.status} already")
        self._asked(lambda: self._client.stop_job(name))
        job = self.wait(name, STOP_SECONDS + 30)
        if not job.over:
            raise RunFailed(f"job {name} was told to stop and is still {job.status}: `fsu jobs logs {name}`")
        return job

    def _find(self, name: str) -> Job | None:
        try:
            return _job(self._asked(lambda: self._client.get_job_info(name)))
        except NotFound:
            return None

    def _asked(self, ask: Callable[[], T]) -> T:
        """The answer of the head, its refusals as errors of ours."""
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError, RayError

        try:
            return ask()
        except AuthenticationError as error:
            what = "refuses this token" if "failed" in str(error).lower() else "wants a token"
            raise ClusterUnavailable(
                f"{self.address} {what}: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            ) from None
        except (ConnectionError, requests.exceptions.RequestException, aiohttp.ClientError, RayError):
            raise ClusterUnavailable(
                f"no head answers at {self.address}: start one (`ray start --head`, `ray up`), or mend --address"
            ) from None
        except RuntimeError as error:
            said = str(error)
            if "status code 404" in said:
                raise NotFound(_line(error)) from None
            token = "token" in said.lower() and "auth" in said.lower()
            if token:  # none is where RAY_AUTH_TOKEN_PATH says
                raise ClusterUnavailable(f"{self.address} cannot be asked: {_line(error)}") from None
            raise RunFailed(f"{self.address}: {_line(error)}") from None


def _client(address: str | None) -> Any:
    """Ray's client, which by itself would wait for an answer for ever."""
    from ray.job_submission import JobSubmissionClient

    class Impatient(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, *words: Any, **more: Any) -> Any:
            return super()._do_request(*words, **{"timeout": ANSWER_SECONDS, **more})

    try:
        return Impatient(address)
    except ValueError as error:  # what RAY_ADDRESS says
        raise ClusterUnavailable(f"RAY_ADDRESS names no cluster that can be asked: {_line(error)}") from None


def package_env(settings: Mapping[str, str], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The runtime environment of a job of ours: this very package, `settings` as environment variables, time to stop;
    `more` of it on top. Nodes need the libraries that the package needs, not the package."""
    package = Path(__file__).parent.parent
    own: dict[str, Any] = dict(more or {})
    variables = {**settings, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **own.pop("env_vars", {})}
    return {
        "py_modules": [str(package), *own.pop("py_modules", [])],
        "excludes": ["__pycache__", *own.pop("excludes", [])],
        "env_vars": {name: str(value) for name, value in variables.items()},
        **own,
    }


def _check(runtime_env: Mapping[str, Any]) -> None:
    """Raise UserError for a key that Ray does not know: it would pass it over."""
    from ray.runtime_env import RuntimeEnv

    surplus = sorted(set(runtime_env) - RuntimeEnv.known_fields)
    if surplus:
        known = ", ".join(sorted(RuntimeEnv.known_fields - {"_ray_release", "_ray_commit", "_inject_current_ray"}))
        raise UserError(f"--runtime-env: Ray knows no {surplus[0]!r}; it takes {known}")


def current_job() -> str | None:
    """The name of the job that this process is the driver of, None where it is none."""
    try:
        metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata") or {}
    except (json.JSONDecodeError, AttributeError):
        return None
    name = metadata.get("job_submission_id")
    return name if isinstance(name, str) else None


def claimant(process: str) -> str:
    """The name by which a driver claims requests: `process`, after its job where it is on Ray as one."""
    name = current_job()
    if name is None:
        return process
    import ray

    if not ray.is_initialized():
        return process
    return f"job/{session_mark(ray.get_runtime_context().get_session_name())}/{name}/{process}"


def job_of(worker: str | None) -> tuple[str, str] | None:
    """The session's mark and the name of the job that a claim was made by, None where it was by none."""
    found = _CLAIMANT.fullmatch(worker or "")
    return None if found is None else (found[1], found[2])


def session_mark(session: str) -> str:
    """A short mark of a head's session, which Ray names anew whenever a head starts."""
    return hashlib.sha256(session.encode()).hexdigest()[:8]


@contextmanager
def _meant(address: str | None) -> Iterator[None]:
    """Have Ray's client take the address that it is given: RAY_ADDRESS would come before it."""
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


def _line(error: BaseException) -> str:
    """What an error says, in one line: where the head sends a traceback, the last line of it."""
    said = str(error).replace("\\n", "\n").strip()
    if "Traceback" in said:
        said = [line.strip(" \"'}.") for line in said.splitlines() if line.strip(" \"'}.")][-1]
    return " ".join(said.split())[:500]
