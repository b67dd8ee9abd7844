"""Running requests on Ray: starting or joining a cluster, claiming, and carrying out."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fsu_ray.config import CHECKPOINT_STEPS
from fsu_ray.errors import FsuError
from fsu_ray.records import ProgressCallback, Request, Schedule, Window
from fsu_ray.service.stores import Stores

if TYPE_CHECKING:
    from fsu_ray.pipeline import Execute, Result, WorkerOptions
    from fsu_ray.schedule import WindowResult
    from fsu_ray.work import BlobStore, Outcome, WorkOrder

log = logging.getLogger(__name__)

OnClaim = Callable[[Request], object]
"""Called with each request once it is claimed, before it runs."""


@contextmanager
def on_ray(
    stores: Stores,
    on_progress: ProgressCallback | None = None,
    cpus: int | None = None,
    parallel: int = 1,
    workers: int | None = None,
) -> Iterator[Execute]:
    """Join the cluster of RAY_ADDRESS, or start a Ray of `cpus` CPUs; yields the `execute` of the pipeline.

    `parallel` runs of `workers` workers each (None: as the settings say) share the cluster. Raises UserError where it
    can never have enough CPUs, ClusterUnavailable where it does not answer.
    """
    from fsu_ray.cluster import workers as ray_workers
    from fsu_ray.cluster.metrics import MetricsExporter
    from fsu_ray.storage.artifacts import locate

    size, runs = workers or stores.settings.workers, locate(stores.settings.runs)

    ray_workers.connect(cpus)
    try:
        ray_workers.resources(size, parallel)
        with MetricsExporter(stores.ledger.requests.stats) as exporter:

            def execute(order: WorkOrder, store: BlobStore, name: str, stop: threading.Event) -> Outcome:
                outcome = ray_workers.execute(
                    order, store, runs, name, CHECKPOINT_STEPS, on_progress, stop, parallel, size
                )
                exporter.stages(outcome.seconds)
                return outcome

            yield execute
    finally:
        ray_workers.disconnect()


def carry_out(
    stores: Stores, execute: Execute, options: WorkerOptions, on_claim: OnClaim | None = None
) -> list[Result]:
    """Claim what is ready, and run it by `execute`; the results in the order in which they ended."""
    from fsu_ray.pipeline import drain, run_request

    def run(request: Request, halt: threading.Event) -> list[Result]:
        if on_claim is not None:
            on_claim(request)
        return run_request(stores.ledger, stores.artifacts, execute, request, halt, stores.timings)

    return drain(stores.ledger, worker_name(), options, run, stores.timings)


def reconcile(stores: Stores) -> list[Request]:
    """End the claims of Ray jobs that have died, and return their requests, which are ready again.

    Only a cluster that RAY_ADDRESS names is asked. Where its head has no Jobs API, claims end with their leases.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return []
    from fsu_ray.cluster.jobs import JobsClient
    from fsu_ray.dispatch import reconcile

    try:
        return reconcile(stores.ledger, JobsClient)
    except FsuError as error:
        log.info("dead jobs were not looked for: %s", error)
        return []


def run_windows(
    stores: Stores,
    enter_ray: Callable[[], AbstractContextManager[Execute]],
    moment: datetime | None,
    on_claim: OnClaim | None,
    on_window: Callable[[Schedule, Window], object] | None,
    on_results: Callable[[list[Result]], object] | None,
) -> list[WindowResult]:
    """See `Service.run_windows`. `enter_ray` is called once, where a request is ready."""
    from fsu_ray.schedule import run_due

    with ExitStack() as stack:
        started: list[Execute] = []

        def carry(options: WorkerOptions) -> list[Result]:
            if not started:
                started.append(stack.enter_context(enter_ray()))
            results = carry_out(stores, started[0], options, on_claim)
            if on_results is not None:
                on_results(results)
            return results

        moment = moment or datetime.now(UTC)
        return run_due(stores.ledger, stores.artifacts, carry, worker_name(), moment, on_window, timings=stores.timings)


def worker_name() -> str:
    """The name of this process in leases: host and process id, and the Ray job of which it is the driver."""
    from fsu_ray.cluster.jobs import claimant

    return claimant(f"{socket.gethostname()}:{os.getpid()}")
