"""Ray Train: one run of its trainer carries out one work order, all its stages in one worker group.

Starting a group of workers takes 10-20 s, so all stages share one group. A run's name identifies its work order: a
later attempt under the same name resumes from the last checkpoint, with any number of workers. The workers of a group
share each batch (`method.group`), so their number changes results only by rounding.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsu_ray.cluster import internals
from fsu_ray.cluster.capacity import autoscaler_limits, cluster_limits
from fsu_ray.cluster.progress import ProgressListener, new_progress_actor
from fsu_ray.errors import ClusterUnavailable, FsuError, RunFailed, Stopped, UserError
from fsu_ray.records import ProgressCallback
from fsu_ray.work import BlobStore, Outcome, TargetResult, WorkOrder

if TYPE_CHECKING:
    from fsu_ray.method.unlearn import RunState

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how long a report may wait for the controller: 2 s by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",  # the autoscaler takes minutes to start a node: 60 s by default
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


def connect(cpus: int | None = None, *, answer_seconds: float = 10.0) -> None:
    """Join the cluster of RAY_ADDRESS (Ray sets it in a job), else start a cluster of `cpus` on this machine.

    A cluster started here is private to this process: no dashboard, no authentication token, no usage report. From
    here on SIGTERM (sent by Kubernetes, or to a Ray job that is stopped) calls the handler that the caller has set, or
    raises KeyboardInterrupt. Ray's own handler would end the process at once, and leave its request to the lease.

    `answer_seconds`: how long the head may take to accept a connection. Raises ClusterUnavailable if the cluster
    cannot be joined, UserError for a Ray of another version.
    """
    internals.check_version()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    if ray.is_initialized():
        return
    handler = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()  # while Ray starts
    if address:
        _join(address, answer_seconds)
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # this machine is not a spot node
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: behind Ray's own processes
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=200 * 2**20,
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler if callable(handler) else signal.default_int_handler)


def _join(address: str, answer_seconds: float = 10.0) -> None:
    import ray
    from ray.exceptions import RayError

    try:
        _check_listening(address, answer_seconds)
        ray.init(address=address, log_to_driver=False)
    except (OSError, RayError, RuntimeError, ValueError) as error:
        raise ClusterUnavailable(
            f"no cluster can be joined at RAY_ADDRESS={address} ({cause(error)}): start one, correct the address or "
            "the token, or unset RAY_ADDRESS to start Ray on this machine"
        ) from None


def _check_listening(address: str, seconds: float) -> None:
    """Raise OSError if nothing listens at `address` (HOST:PORT with or without ray://): Ray would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()


def disconnect() -> None:
    """Leave the cluster; a cluster that `connect` started ends."""
    import ray

    ray.shutdown()


def resources(workers: int = 1, parallel: int = 1) -> tuple[bool, dict[str, float]]:
    """Whether to use GPUs, and what each of the `workers` of each of `parallel` runs takes.

    With GPUs in the cluster, or in nodes that it can start: one GPU and two CPUs. Else: as many CPUs as the nodes can
    give to all workers at the same time; a worker has as many threads as CPUs. Raises UserError if the cluster neither
    has nor can grow to what the `workers` of one run take: Ray would wait for ever.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    growth = autoscaler_limits()
    limits = cluster_limits(growth)
    if limits.get("GPU", 0) >= 1:
        two_cpus = growth.get("GPU", 0) >= 1 or any(
            node.get("GPU", 0) >= 1 and node.get("CPU", 0) >= 2 for node in nodes
        )
        share: dict[str, float] = {"GPU": 1, "CPU": 2 if two_cpus else 1}
    else:
        sizes = [int(node.get("CPU", 0)) for node in nodes]
        fitting = (
            cpus
            for cpus in range(max(sizes, default=1), 1, -1)
            if sum(size // cpus for size in sizes) >= workers * parallel
        )
        share = {"CPU": next(fitting, 1)}
    for kind, amount in share.items():
        limit = limits.get(kind, 0)
        if amount * workers > limit:
            raise UserError(
                f"{workers} workers take {amount * workers:g} {kind}s, and this cluster has at most {limit:g}: "
                "ask for fewer (--workers), or let the cluster grow"
            )
    return "GPU" in share, share


def execute(
    order: WorkOrder,
    store: BlobStore,
    runs: tuple[Any | None, str],
    name: str,
    every: int,
    on_progress: ProgressCallback | None,
    stop: threading.Event | None = None,
    parallel: int = 1,
    workers: int = 1,
    *,
    stop_seconds: float = 30.0,
) -> Outcome:
    """Carry out `order` in one Ray Train run called `name` with this many `workers`, and return its outcome.

    `runs` says where checkpoints go: a pyarrow filesystem and a path on it, or None and an absolute folder that all
    nodes share; `every` is the number of inversion steps between two checkpoints. `on_progress(stage, done, total,
    metrics)` is called in this process. Once `stop` is set, the workers end at their next step. After an interrupt
    they have `stop_seconds` for that step.

    Errors that fsu_ray raises in a worker (Stopped among them) are raised here as they are. Any other error becomes
    RunFailed after Ray has restarted the workers three times. Raises UserError as `resources` does.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

    from fsu_ray.cluster.trainer import ProcessGroup, Trainer

    use_gpu, share = resources(workers, parallel)
    _check_batches(order, workers)
    stop = stop or threading.Event()
    actor = new_progress_actor()

    def report(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        if stage == "start" and use_gpu and not metrics["cuda"]:
            log.warning("worker %d of %d has a GPU that its torch cannot use: it runs on the CPU", done, total)
        if on_progress is not None:
            on_progress(stage, done, total, metrics)

    if runs[0] is None:
        _drop_unreadable(Path(runs[1]) / name)
    listener = ProgressListener(actor, report, stop)
    trainer = Trainer(
        _work,
        train_loop_config={"order": order, "store": store, "every": every, "actor": actor},
        backend_config=ProcessGroup("cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=share),
        run_config=RunConfig(
            name=name,
            storage_path=runs[1],
            storage_filesystem=runs[0],
            failure_config=FailureConfig(max_failures=3, controller_failure_limit=2, max_preemption_failures=20),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        with listener:
            returned = in_thread(trainer.fit, stop, stop_seconds).return_value
    except TrainingFailedError as error:
        raise RunFailed(f"run {name} broke: {cause(error)}; see {runs[1]}/{name}") from error
    finally:
        if ray.is_initialized():
            ray.kill(actor)
    return _outcome(returned, f"run {name} ended without an outcome; see {runs[1]}/{name}")


def _outcome(returned: Any, missing: str) -> Outcome:
    """The outcome that `_work` returned. Raises the error that it returned instead, or RunFailed(`missing`)."""
    if isinstance(returned, dict) and "error" in returned:
        raise pickle.loads(returned["error"])
    if not isinstance(returned, dict):
        raise RunFailed(missing)
    outcome = returned["outcome"]
    return Outcome(**{**outcome, "targets": tuple(TargetResult(**target) for target in outcome["targets"])})


def checkpoints(folder: Path) -> list[str]:
    """The folder names of the checkpoints from which the run in `folder` would resume, oldest first.

    Ray resumes only from checkpoints in its list. Raises ValueError if that list cannot be parsed.
    """
    file = internals.checkpoint_list(folder)
    if not file.exists():
        return []
    return [entry["checkpoint_dir_name"] for entry in json.loads(file.read_text())["checkpoint_results"]]


def _drop_unreadable(folder: Path) -> None:
    """Delete the folder of a run if its list of checkpoints is cut short, so that the run starts anew.

    That happens when the driver dies while Ray writes the list; Ray would never accept the run again. Objects in a
    bucket are written whole.
    """
    try:
        checkpoints(folder)
    except ValueError:
        log.warning("the list of checkpoints in %s is cut short: the run starts anew", folder)
        shutil.rmtree(folder)


def _check_batches(order: WorkOrder, workers: int) -> None:
    """Raise UserError if a batch of the recipe has fewer samples than there are workers."""
    classes, recipe = order.spec.classes, order.recipe
    batches = {"relearn.batch": recipe.relearn.batch, "invert.batch": recipe.invert.each(classes) * classes}
    for key, batch in batches.items():
        if batch < workers:
            raise UserError(
                f"{key} of {batch} is too small for {workers} workers: take a larger batch or fewer workers"
            )


def in_thread(fit: Callable[[], Any], stop: threading.Event, patience: float = 30.0) -> Any:
    """The result of `fit`, which runs in a thread: in the main thread, Ray would end this process on an interrupt.

    On an interrupt, sets `stop`, waits up to `patience` seconds for `fit` to return, and raises KeyboardInterrupt.
    """
    ended: Future[Any] = Future()

    def act() -> None:
        try:
            ended.set_result(fit())
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=act, daemon=True).start()
    try:
        return ended.result()
    except KeyboardInterrupt:
        stop.set()
        wait([ended], timeout=patience)
        raise


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker of a group runs; Ray returns the result of the first worker."""
    import ray
    import ray.train
    import ray.train.torch
    import torch

    from fsu_ray.method.group import Group
    from fsu_ray.method.precision import repeatable
    from fsu_ray.method.unlearn import unlearn

    group = Group.current()
    last = 0.0

    def progress(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        if stage == "start" or done in (0, total) or now - last > 0.5:
            last = now
            if ray.get(config["actor"].tell.remote((stage, done, total, metrics))):
                raise Stopped(f"the run was stopped in {stage} at {done} of {total}")

    def save(state: RunState) -> None:
        if group.rank:  # every worker must report, one of them with the checkpoint
            ray.train.report({})
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(asdict(state), Path(folder) / "state.pt")
            ray.train.report({"seconds": sum(state.seconds.values())}, checkpoint=ray.train.Checkpoint(folder))

    repeatable()
    order, store, every = config["order"], config["store"], config["every"]
    try:
        device = ray.train.torch.get_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        facts: dict[str, float] = {
            "threads": torch.get_num_threads(),
            "pid": os.getpid(),
            "cuda": int(device.type == "cuda"),
        }
        everyone = group.everyone(facts)

        def report_workers() -> None:
            for number, metrics in enumerate(everyone, 1):
                progress("start", number, group.size, metrics)

        group.once(report_workers)
        outcome = unlearn(order, store, device, progress, save, _resume(), every, group)
    except FsuError as error:
        if group.size > 1 and not error.agreed:  # the other workers go on: Ray must end them
            raise
        return {"error": pickle.dumps(error)}  # raised, Ray would retry it
    return {"outcome": asdict(outcome)}


def _resume() -> RunState | None:
    """The state in the last checkpoint of this run, None without a checkpoint."""
    import ray.train
    import torch

    from fsu_ray.method.unlearn import RunState

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return RunState(**torch.load(Path(folder) / "state.pt", weights_only=True, map_location="cpu"))


def cause(error: BaseException) -> str:
    """The original cause of one of Ray's nested errors: the last line of the innermost message."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    innermost: BaseException = next(iter(failures.values()))
    while True:
        inner = getattr(innermost, "cause", None) or innermost.__cause__
        if not isinstance(inner, BaseException) or inner is innermost:
            break
        innermost = inner
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
    return lines[-1] if lines else type(innermost).__name__
