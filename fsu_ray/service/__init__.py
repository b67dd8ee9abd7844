"""The service: every use case of fsu_ray once, with its checks of input. Commands, jobs and notebooks call it.

    with fsu_ray.connect() as fsu:
        fsu.requests.submit("m", behaviour, "samples/")
        results = fsu.run(max_requests=5)

Importing this module loads neither Ray nor torch nor SQLAlchemy; the methods load what they need.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fsu_ray.config import Settings, Timings, below
from fsu_ray.errors import FsuError
from fsu_ray.records import ModelSpec, ProgressCallback, Request, Schedule, Window
from fsu_ray.service import running, training
from fsu_ray.service.audit import Audit
from fsu_ray.service.cluster import Cluster
from fsu_ray.service.generators import Generators
from fsu_ray.service.models import Models
from fsu_ray.service.recipes import Recipes
from fsu_ray.service.requests import Requests
from fsu_ray.service.retention import Retention
from fsu_ray.service.running import OnClaim
from fsu_ray.service.schedules import Schedules
from fsu_ray.service.stores import Stores

if TYPE_CHECKING:
    from fsu_ray.experiments.reproduce import Reproduced
    from fsu_ray.pipeline import Execute, Result, WorkerOptions
    from fsu_ray.schedule import WindowResult
    from fsu_ray.storage.artifacts import Artifacts
    from fsu_ray.storage.ledger import Ledger


def connect(settings: Settings | None = None, timings: Timings | None = None) -> Service:
    """Open the ledger and the artifacts that `settings` name, and create them where they are missing.

    Without `settings` they come from the environment and from fsu.toml in the working folder. `timings` says how long
    leases, retries and polls take. Raises InvalidConfig and StorageError for a setting that cannot be used,
    LedgerUnavailable where the ledger's database does not answer.
    """
    service = Service(settings, timings)
    _ = service.ledger, service.artifacts
    return service


class Service:
    """What fsu_ray does, on one ledger and one artifact store. `connect` opens it; a `with` block closes it.

    Methods raise `FsuError` and its kinds, with a message of one line that says what to do. A `Service` that is
    made directly reads its settings and opens its stores on first use.
    """

    def __init__(self, settings: Settings | None = None, timings: Timings | None = None) -> None:
        self._stores = Stores(settings, timings or Timings())
        self.models = Models(self._stores)
        self.recipes = Recipes(self._stores)
        self.requests = Requests(self._stores, self.recipes)
        self.generators = Generators(self._stores)
        self.retention = Retention(self._stores)
        self.schedules = Schedules(self._stores)
        self.audit = Audit(self._stores)

    @property
    def settings(self) -> Settings:
        """Where the ledger, the artifacts and the runs are; raises InvalidConfig."""
        return self._stores.settings

    @property
    def ledger(self) -> Ledger:
        """The open ledger, for experiments and tests. Callers that act on models use the methods of the service."""
        return self._stores.ledger

    @property
    def artifacts(self) -> Artifacts:
        """The open artifact store, likewise."""
        return self._stores.artifacts

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the ledger's connections."""
        self._stores.close()

    def places(self) -> str:
        """Where the ledger and the artifacts are, in one line."""
        return f"Ledger {self.settings.ledger}, artifacts {self.settings.artifacts}"

    def train(
        self,
        data: str,
        arch: str = "lenet5",
        epochs: int = 30,
        seed: int = 0,
        shape: tuple[int, int, int] | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> tuple[ModelSpec, bytes]:
        """Train a classifier in this process; returns its spec and its weights as safetensors.

        `data` is `digits`, `mnist`, `cifar10`, an image folder or a Parquet file. Images are resized to `shape`
        (channels, height, width), by default (3, 32, 32) for cifar10 and (1, 32, 32) otherwise. Raises InvalidData,
        UnsupportedModel.
        """
        return training.train(data, arch, epochs, seed, shape, on_progress)

    def run(
        self,
        *,
        model: str | None = None,
        max_requests: int | None = None,
        parallel: int = 1,
        coalesce: bool = False,
        until: datetime | None = None,
        workers: int | None = None,
        cpus: int | None = None,
        on_progress: ProgressCallback | None = None,
        on_claim: OnClaim | None = None,
    ) -> list[Result]:
        """Claim what is ready and carry it out on Ray, until nothing is ready; the results as they ended.

        `model`: only its requests. `max_requests`: at most so many. `parallel`: so many models at a time. `coalesce`:
        all class requests of a model in one run. `until`: claim nothing from then on. `workers`: processes of each
        run, by default as the settings say. `cpus`: of the Ray that this call starts where RAY_ADDRESS names none.

        Ray is started only where a request is ready, and is stopped at the end. What a request's run raises is in its
        result. An interrupt queues the running requests again and is raised. Raises NotFound for an unknown model,
        UserError where the cluster can never have enough CPUs, ClusterUnavailable.
        """
        from fsu_ray.pipeline import WorkerOptions

        self.reconcile()
        if not self.ledger.requests.claimable(model):
            return []
        options = WorkerOptions(max_requests, model, parallel, coalesce, until)
        with self.on_ray(on_progress, cpus, parallel, workers) as execute:
            return self.carry_out(execute, options, on_claim)

    def on_ray(
        self,
        on_progress: ProgressCallback | None = None,
        cpus: int | None = None,
        parallel: int = 1,
        workers: int | None = None,
    ) -> AbstractContextManager[Execute]:
        """Start or join Ray for several calls of `carry_out`; the arguments are those of `run`."""
        return running.on_ray(self._stores, on_progress, cpus, parallel, workers)

    def carry_out(
        self, execute: Execute, options: WorkerOptions | None = None, on_claim: OnClaim | None = None
    ) -> list[Result]:
        """What `run` does, by an `execute` of one's own, such as that of `on_ray`."""
        from fsu_ray.pipeline import WorkerOptions

        return running.carry_out(self._stores, execute, options or WorkerOptions(), on_claim)

    def reconcile(self) -> list[Request]:
        """End the claims of Ray jobs that have died on the cluster of RAY_ADDRESS; returns their requests, which are
        ready again. `run` and `run_windows` begin with it."""
        return running.reconcile(self._stores)

    def run_windows(
        self,
        moment: datetime | None = None,
        *,
        cpus: int | None = None,
        on_progress: ProgressCallback | None = None,
        on_claim: OnClaim | None = None,
        on_window: Callable[[Schedule, Window], object] | None = None,
        on_results: Callable[[list[Result]], object] | None = None,
    ) -> list[WindowResult]:
        """One pass of a scheduler: open the windows that are due at `moment` (now) and carry out what is ready.

        Windows that an earlier pass left open are continued. Each window is opened by one scheduler, however many
        run. What breaks in one schedule is the `error` of its entry and stops no other. `on_window` is called with
        each window that begins, `on_results` with the results of each request. Ray is started only where a request
        is ready, and a handler of SIGTERM that the caller has set stays.
        """
        self.reconcile()
        return running.run_windows(
            self._stores, lambda: self.on_ray(on_progress, cpus), moment, on_claim, on_window, on_results
        )

    def serve_windows(self, one_pass: Callable[[datetime], object], on_error: Callable[[FsuError], None]) -> None:
        """Call `one_pass(moment)` at every start of a window and at least every 30 s, until an interrupt.

        `one_pass` calls `run_windows`. `on_error` is called with errors that end a pass early, such as a database that
        does not answer; the next pass comes all the same.
        """
        from fsu_ray.schedule import serve

        serve(self.ledger, one_pass, on_error, timings=self._stores.timings)

    def reproduce(
        self,
        name: str,
        scale: Literal["small", "paper"] = "small",
        seeds: int = 5,
        folder: Path | None = None,
        *,
        again: bool = False,
        cpus: int | None = None,
        per_gpu: int = 1,
        on_cell: Callable[[int, int, str], None] | None = None,
    ) -> Reproduced:
        """Compute a table or figure of the paper on Ray, and write it to `folder` (reproduce/ in the home folder).

        Cells that `folder` already holds are not computed again, unless `again` is set. `on_cell` is called with how
        many cells have ended, how many there are, and the name of the last. Raises NotFound for an unknown name,
        UserError, StorageError, RunFailed where cells broke.
        """
        from fsu_ray.experiments.reproduce import reproduce
        from fsu_ray.storage.artifacts import Artifacts

        folder = (folder or self.settings.home / "reproduce").resolve()
        store = Artifacts.open(below(self.settings.artifacts, "reproduce"))
        return reproduce(name, scale, seeds, folder, store, on_cell, cpus, again, per_gpu)

    def cluster(self, address: str | None = None) -> Cluster:
        """The Ray cluster whose head has its Jobs API at `address`, such as http://HEAD:8265; None: that of
        RAY_ADDRESS. It takes the queue as jobs: `service.cluster(address).submit(model="m")`."""
        return Cluster(self._stores, address)
