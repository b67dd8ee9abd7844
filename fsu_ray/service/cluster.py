"""A Ray cluster: the queue sent to it as jobs, and the jobs that it has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fsu_ray.errors import UserError
from fsu_ray.records import Request
from fsu_ray.service.stores import Stores

if TYPE_CHECKING:
    from fsu_ray.cluster.jobs import Job, JobsClient
    from fsu_ray.dispatch import SubmittedJob


class Cluster:
    """`service.cluster(address)`: the Jobs API of a head. The head is first asked by the first method that needs it.

    Every method raises UserError where no cluster is named, and ClusterUnavailable where no head answers or it refuses
    the token. Jobs are named by their full id.
    """

    def __init__(self, stores: Stores, address: str | None) -> None:
        self._stores = stores
        self._address = address

    @cached_property
    def _client(self) -> JobsClient:
        from fsu_ray.cluster.jobs import JobsClient

        if self._address is None and not os.environ.get("RAY_ADDRESS"):
            raise UserError("say which cluster: --address http://HEAD:8265, or RAY_API_SERVER_ADDRESS or RAY_ADDRESS")
        return JobsClient(self._address)

    def submit(
        self,
        *,
        model: str | None = None,
        max_requests: int | None = None,
        parallel: int = 1,
        coalesce: bool = False,
        workers: int | None = None,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> SubmittedJob | None:
        """Send what `Service.run` would do, with the same arguments, as a Ray job; None where nothing is ready.

        `runtime_env` is laid over the job's own runtime environment. The job is named for its first request and the
        attempt, so a second call finds the same job. Raises NotFound, UserError.
        """
        from fsu_ray.dispatch import send
        from fsu_ray.pipeline import WorkerOptions

        if model is not None:
            self._stores.ledger.models.get(model)
        _check_runtime_env(runtime_env or {})
        settings = self._stores.settings
        settings = settings if workers is None else replace(settings, workers=workers)
        options = WorkerOptions(max_requests, model, parallel, coalesce)
        return send(self._stores.ledger, settings, self._client, options, runtime_env or {})

    def jobs(self, *, foreign: bool = False) -> list[Job]:
        """The jobs that `submit` has sent, oldest first; with `foreign`, the cluster's other jobs too."""
        from fsu_ray.cluster.jobs import REQUEST

        return [job for job in self._client.jobs() if foreign or REQUEST in job.labels]

    def job(self, job: str) -> Job:
        """One job; raises NotFound."""
        return self._client.job(job)

    def logs(self, job: str) -> str:
        """What a job has printed so far; raises NotFound."""
        return self._client.logs(job)

    def follow(self, job: str) -> Iterator[str]:
        """What a job prints, as it prints it, until it ends; raises NotFound."""
        return self._client.follow(job)

    def wait(self, job: str) -> Job:
        """Wait until a job has ended, and return it; raises NotFound."""
        return self._client.wait(job)

    def stop(self, job: str) -> tuple[Job, list[Request]]:
        """End a job at its next step; returns it, and its requests, which are queued again. Raises NotFound,
        TransitionRefused where it has ended."""
        from fsu_ray.dispatch import stop

        return stop(self._stores.ledger, self._client, job)


def _check_runtime_env(runtime_env: Mapping[str, Any]) -> None:
    """Raise UserError where a value has a type that Ray would answer with a traceback."""
    variables = runtime_env.get("env_vars", {})
    if not isinstance(variables, dict) or not all(isinstance(value, str | int | float) for value in variables.values()):
        raise UserError("--runtime-env: env_vars takes a JSON object of texts and numbers")
    for name in ("py_modules", "excludes"):
        items = runtime_env.get(name, [])
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise UserError(f"--runtime-env: {name} takes a list of texts")
