"""Ray Train: one run of its trainer carries out one work order, all its stages in one worker group.

Starting a group costs 10-20 s, so no stage gets one of its own. A run's name stands for its work order: the
same name finds its checkpoints again, so a later attempt goes on where the last one was cut off, with as many workers
as it likes: the workers of a group share each batch (`method.group`), which changes no result but by rounding.
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
from typing import Any

from fsu_ray.cluster.growth import growth, reach
from fsu_ray.cluster.progress import ProgressCallback, ProgressListener, new_progress_actor
from fsu_ray.errors import ClusterUnavailable, FsuError, RunFailed, Stopped, UserError
from fsu_ray.work import BlobStore, Outcome, TargetResult, WorkOrder

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
"""How long the head of a cluster may take to answer at all."""

STOP_SECONDS = 30.0
"""How long an interrupt waits for the worker's next step."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for the controller's next look: 2 s by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",  # a node that the autoscaler starts takes minutes: 60 s by default
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


def connect(cpus: int | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names (a Ray job has it set), else start one on this machine.

    Ray's own cluster is private to this process: no dashboard, no authentication token, no usage report. SIGTERM
    (Kubernetes, a Ray job that is stopped) is an interrupt from here on, not the end at once that Ray makes of it.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    if ray.is_initialized():
        return
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()  # seconds, while Ray starts
    if address:
        _join(address)
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away with notice
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: Ray's own processes would go before the work
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=200 * 2**20,
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _join(address: str) -> None:
    import ray
    from ray.exceptions import RayError

    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False)
    except (OSError, RayError, RuntimeError, ValueError) as error:
        raise ClusterUnavailable(
            f"no cluster can be joined at RAY_ADDRESS={address} ({cause(error)}): start one, mend the address or the "
            "token, or unset it for a Ray of this process"
        ) from None


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at `address`, HOST:PORT with or without ray://: Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends."""
    import ray

    ray.shutdown()


def resources(workers: int = 1, parallel: int = 1) -> tuple[bool, dict[str, float]]:
    """Whether to use GPUs, and what each of the `workers` of each of `parallel` runs takes.

    One GPU with two CPUs where the cluster has GPUs now or could start nodes that have; else as many CPUs as the nodes
    can give to each worker at the same time. Ray gives a worker as many threads as it has CPUs. Raises UserError where
    the cluster neither has nor can grow to what the `workers` of one run take: Ray would wait for ever.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    limit, most = growth(), reach()
    if most.get("GPU", 0) >= 1:
        roomy = limit.get("GPU", 0) >= 1 or any(node.get("GPU", 0) >= 1 and node.get("CPU", 0) >= 2 for node in nodes)
        each: dict[str, float] = {"GPU": 1, "CPU": 2 if roomy else 1}
    else:
        sizes = [int(node.get("CPU", 0)) for node in nodes]
        fits = (
            c for c in range(max(sizes, default=1), 1, -1) if sum(size // c for size in sizes) >= workers * parallel
        )
        each = {"CPU": next(fits, 1)}
    for kind, amount in each.items():
        if amount * workers > (there := most.get(kind, 0)):
            raise UserError(
                f"{workers} workers take {amount * workers:g} {kind}s, and this cluster has at most {there:g}: "
                "ask for fewer (--workers), or let the cluster grow"
            )
    return "GPU" in each, each


def execute(
    order: WorkOrder,
    store: BlobStore,
    runs: tuple[Any | None, str],
    name: str,
    every: int,
    on_progress: ProgressCallback,
    stop: threading.Event | None = None,
    parallel: int = 1,
    workers: int = 1,
) -> Outcome:
    """Carry out `order` in one Ray Train run called `name`, of as many `workers`, and return its outcome.

    `runs` is where checkpoints go: a filesystem of pyarrow and a path on it, or None and an absolute folder that all
    nodes share. `tell(stage, done, total, figures)` is called in this process. Once `stop` is set, the worker ends at
    its next step. Errors raised on purpose in the worker come back as they are (Stopped is one); anything else is
    RunFailed, after Ray has restarted the workers three times. Raises UserError as `resources` does.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.v2.api.exceptions import ControllerError

    from fsu_ray.cluster.trainer import Processes, Trainer

    use_gpu, each = resources(workers, parallel)
    _goes_round(order, workers)
    stop = stop or threading.Event()
    line = new_progress_actor()

    def hear(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        if stage == "start" and use_gpu and not metrics["cuda"]:
            log.warning("worker %d of %d was given a GPU that its torch cannot use: it works on the CPU", done, total)
        on_progress(stage, done, total, metrics)

    if runs[0] is None:
        _drop_torn(Path(runs[1]) / name)
    listener = ProgressListener(line, hear, stop)
    trainer = Trainer(
        _work,
        train_loop_config={"order": order, "store": store, "every": every, "line": line},
        backend_config=Processes("cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=each),
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
            answer = in_thread(trainer.fit, stop).return_value
    except (TrainingFailedError, ControllerError) as error:
        raise RunFailed(f"run {name} broke: {cause(error)}; see {runs[1]}/{name}") from error
    finally:
        if ray.is_initialized():
            ray.kill(line)
    if isinstance(answer, dict) and "error" in answer:
        raise pickle.loads(answer["error"])  # our own exception, from our own worker
    if not isinstance(answer, dict):
        raise RunFailed(f"run {name} ended without an outcome; see {runs[1]}/{name}")
    found = answer["outcome"]
    return Outcome(**{**found, "targets": tuple(TargetResult(**target) for target in found["targets"])})


def checkpoints(folder: Path) -> list[str]:
    """The folders of the checkpoints that a run in `folder` would go on from, oldest first. Ray reads none but those in
    its list. Raises ValueError where that is torn."""
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    kept = folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    return (
        [each["checkpoint_dir_name"] for each in json.loads(kept.read_text())["checkpoint_results"]]
        if kept.exists()
        else []
    )


def _drop_torn(folder: Path) -> None:
    """Have a run begin anew whose driver died while Ray wrote the list of its checkpoints: Ray would refuse the run for
    ever. (In a bucket nothing is torn.)"""
    try:
        checkpoints(folder)
    except ValueError:
        log.warning("the list of checkpoints in %s is torn: the run begins anew", folder)
        shutil.rmtree(folder)


def _goes_round(order: WorkOrder, workers: int) -> None:
    """Raise UserError where a batch of the recipe has fewer samples than there are workers."""
    classes, recipe = order.spec.classes, order.recipe
    batches = {"relearn.batch": recipe.relearn.batch, "invert.batch": recipe.invert.each(classes) * classes}
    for key, batch in batches.items():
        if batch < workers:
            raise UserError(
                f"{key} of {batch} does not go round {workers} workers: take a larger one, or fewer workers"
            )


def in_thread(fit: Callable[[], Any], stop: threading.Event, patience: float = STOP_SECONDS) -> Any:
    """The result of `fit`, in a thread: in the main one, Ray would make the end of this process of an interrupt.

    An interrupt tells the workers to stop instead, waits for that for `patience` seconds, and is raised then.
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
    """The loop of one worker of a group; what the first one returns counts."""
    import ray
    import ray.train
    import ray.train.torch
    import torch

    from fsu_ray.method.group import Group
    from fsu_ray.method.precision import repeatable
    from fsu_ray.method.unlearn import RunState, unlearn

    group = Group.current()
    last = 0.0

    def progress(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        if done in (0, total) or now - last > 0.5:
            last = now
            if ray.get(config["line"].tell.remote((stage, done, total, metrics))):
                raise Stopped(f"the run was stopped in {stage} at {done} of {total}")

    def keep(saved: RunState) -> None:
        if group.rank:  # a report is one of the whole group
            ray.train.report({})
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(asdict(saved), Path(folder) / "state.pt")
            ray.train.report({"seconds": sum(saved.seconds.values())}, checkpoint=ray.train.Checkpoint(folder))

    repeatable()
    order, store, every = config["order"], config["store"], config["every"]
    try:
        device = ray.train.torch.get_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        processes = group.everyone(os.getpid())

        def begin() -> None:
            for rank, process in enumerate(processes, 1):
                metrics: dict[str, float] = {"threads": torch.get_num_threads(), "pid": process}
                metrics["cuda"] = int(device.type == "cuda")
                progress("start", rank, group.size, metrics)

        group.once(begin)
        outcome = unlearn(order, store, device, progress, keep, _resume(), every, group)
    except FsuError as error:
        if group.size > 1 and not error.agreed:  # the others go on: Ray is to end them
            raise
        return {"error": pickle.dumps(error)}  # not for Ray to retry
    return {"outcome": asdict(outcome)}


def _resume() -> Any:
    """The state of the last checkpoint of this run, if there is one."""
    import ray.train
    import torch

    from fsu_ray.method.unlearn import RunState

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / "state.pt", weights_only=True, map_location="cpu")
    return RunState(**state)


def cause(error: BaseException) -> str:
    """What is at the bottom of an error of Ray's: the last line of the innermost message."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    first: BaseException = next(iter(failures.values()))
    while True:
        inner = getattr(first, "cause", None) or first.__cause__
        if not isinstance(inner, BaseException) or inner is first:
            break
        first = inner
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    return lines[-1] if lines else type(first).__name__
