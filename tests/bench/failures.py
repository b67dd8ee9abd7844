"""Kill and stop parts of a Ray run, start them again, and check the ledger afterwards.

    python -m tests.bench.failures [--url postgresql://...] workers drivers jobs head

`workers`: a Ray Train worker is killed (SIGKILL) in each stage of a run, at moments spread over it; Ray restarts it.
`drivers`: `fsu run` is killed after different checkpoints; another `fsu run` resumes when the leases end (2 minutes).
`jobs`: `fsu submit` sends a Ray job to a head with a token, `fsu jobs stop` stops it, and the next job resumes.
`head`: the head is killed with the job on it and started again; a job that is submitted then finishes the request.

Every kill has its own request and model. All share one classifier of scikit-learn's digits, the recipe and the target
samples, so all must end with the weights of an undisturbed run. Prints a line for each kill and a summary. Exit code 1:
a request did not end once as succeeded, has other weights, or more or less than one version and one erasure; an audit
does not verify; or a digest names no artifact.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsu_ray import pipeline
from fsu_ray.cluster import progress, workers
from fsu_ray.cluster.progress import ProgressActor
from fsu_ray.recipes import Recipe
from fsu_ray.records import Request, Status
from fsu_ray.work import BlobStore, Outcome, WorkOrder
from tests.bench.crashes import App, Subject, find_faults, open_app
from tests.bench.local_head import BIN, PATIENCE, on_head

STAGES = ("invert", "synthesize", "filter", "relearn", "evaluate")
EVERY = 40
"""Inversion steps between two checkpoints in the part `workers`. The other parts use the interval of `fsu run`."""

RECIPE = Recipe.model_validate(
    {
        "invert": {"steps": 200, "batch": 60, "width": 4},
        "synthesize": {"per_class": 150, "entropy_threshold": 2.0, "starved_below": 0.0},
        "relearn": {"epochs": 4},
        "gate": {"agreement_min": 0.0, "forgotten_max": 1.0, "coverage_min": 0.0, "acceptance_min": 0.0},
    }
)


@dataclass
class Bench:
    """One part's ledger and classifier; `expected` are the weights of the undisturbed run, by digest."""

    home: Path
    url: str | None
    app: App
    subject: Subject
    part: str
    stages: tuple[str, ...] = STAGES
    requests: int = 0
    expected: str | None = None
    faults: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the processes that this benchmark starts."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "FSU_ARTIFACTS")}
        return inherited | {"FSU_HOME": str(self.home)} | ({"FSU_LEDGER": self.url} if self.url else {})

    def submit(self) -> Request:
        """Register the classifier as a new model and submit the same erasure for it."""
        self.requests += 1
        name = f"{self.part}-{self.home.name[-8:]}-{self.requests}"
        return self.app.ledger.requests.get(self.subject.submit(self.app, name, RECIPE))

    def note(self, what: str, request: str) -> None:
        """Check a request that must have ended, compare its weights with the undisturbed run's, print a line."""
        self.app.ledger.database.flush()
        ended, ledger = self.app.ledger.requests.get(request), self.app.ledger
        versions, erasures = ledger.models.versions(ended.model), ledger.models.erasures(ended.model)
        self.expected = self.expected or versions[-1].weights
        same = versions[-1].weights == self.expected
        faults = find_faults(self.app, [request]) + ([] if same else [f"{request}: other weights than undisturbed"])
        self.faults += faults
        resumed = ", ".join((ended.report or {}).get("resumed", ())) or "not resumed"
        print(
            f"{what}: {resumed}; {self.seconds(ended):.1f} s, {ended.status}, attempt {ended.attempt}, "
            f"failures {ended.failures}, {len(versions)} versions, {len(erasures)} erasure, "
            f"{'the same' if same else 'OTHER'} weights, {'; '.join(faults) or 'audit verifies, nothing dangles'}",
            flush=True,
        )

    def seconds(self, request: Request) -> float:
        """The seconds of a request's last attempt, from the ledger's events."""
        events = self.app.ledger.requests.events(request.id)
        started = max(event.at for event in events if event.new is Status.RUNNING)
        return (events[-1].at - started).total_seconds()

    def checkpoints(self, request: str, number: int, process: subprocess.Popen[Any] | None = None) -> int:
        """Wait until a run starts to write its checkpoint `number`, or has ended; the number of checkpoints seen."""
        seen: set[str] = set()
        deadline = time.monotonic() + PATIENCE
        while len(seen) < number and time.monotonic() < deadline:
            seen |= {folder.name for folder in self.home.glob(f"runs/{request}-*/checkpoint_*")}
            if self.app.ledger.requests.get(request).status.is_terminal or (process and process.poll() is not None):
                break
            time.sleep(0.02)
        return len(seen)


def killer(stage: str, delay: float) -> type[ProgressActor]:
    """A progress actor that kills the last worker once, `delay` seconds after its first report of `stage`.

    With `delay` 0 it kills at once, while the worker waits for the actor's answer. It reports `killed` to the driver,
    or `missed` if the stage had ended by then.
    """

    class Killer(ProgressActor):
        def __init__(self) -> None:
            super().__init__()
            self.process, self.latest, self.triggered = 0, ("", 0, 0), False

        def tell(self, item: Any) -> bool:
            self.latest = item[:3]
            if item[0] == "start":
                self.process = int(item[3]["pid"])
            if item[0] == stage and not self.triggered:
                self.triggered = True
                if delay:
                    threading.Timer(delay, self.kill).start()
                else:
                    self.kill()
            return super().tell(item)

        def kill(self) -> None:
            hit = self.latest[0] == stage
            if hit:
                os.kill(self.process, signal.SIGKILL)
            super().tell(("killed" if hit else "missed", *self.latest[1:], {}))

    return Killer


def kill_workers(bench: Bench, kills: int) -> None:
    """Kill `kills` workers in each of the bench's stages, all on one Ray that this process starts."""
    reports: list[tuple[str, int, int]] = []

    def execute(order: WorkOrder, store: BlobStore, name: str, stop: threading.Event) -> Outcome:
        def on_progress(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
            reports.append((stage, done, total))

        return workers.execute(order, store, (None, str(bench.home / "runs")), name, EVERY, on_progress, stop)

    def run(request: Request) -> Outcome | None:
        reports.clear()
        claimed = bench.app.ledger.requests.claim("failures", 600.0, request.model)
        assert claimed is not None
        return pipeline.run_request(bench.app.ledger, bench.app.artifacts, execute, claimed)[0].outcome

    workers.connect(2)
    try:
        request = bench.submit()
        outcome = run(request)
        assert outcome is not None
        bench.note("undisturbed", request.id)
        for stage in bench.stages:
            number, share = 0, 1.0
            while number < kills:
                delay = share * outcome.seconds[stage] * number / kills
                setattr(progress, "ProgressActor", killer(stage, delay))  # noqa: B010 - a class, to mypy
                request = bench.submit()
                run(request)
                hit = [report for report in reports if report[0] == "killed"]
                share = 1.0 if hit else share / 2
                number += len(hit)
                where = f"at {hit[0][1]} of {hit[0][2]}, {delay:.2f} s in" if hit else f"was over after {delay:.2f} s"
                bench.note(f"worker killed in {stage} {number}, {where}" if hit else f"{stage} {where}", request.id)
    finally:
        setattr(progress, "ProgressActor", ProgressActor)  # noqa: B010
        workers.disconnect()


def kill_drivers(bench: Bench, kills: int) -> None:
    """Kill `fsu run`s after different checkpoints; then run their requests to the end by further `fsu run`s."""

    def start(request: Request) -> subprocess.Popen[bytes]:
        command = [str(BIN / "fsu"), "run", "--cpus", "2", "--model", request.model]
        with (bench.home / "drivers.log").open("ab") as log:
            return subprocess.Popen(command, env=bench.environment, cwd=bench.home, stdout=log, stderr=log)

    request = bench.submit()
    process = start(request)
    total = bench.checkpoints(request.id, 1000, process)
    process.wait(PATIENCE)
    bench.note(f"undisturbed, {total} checkpoints", request.id)
    killed: list[tuple[str, str]] = []
    for number in range(kills):
        request = bench.submit()
        process = start(request)
        seen = bench.checkpoints(request.id, 1 + number * (total - 1) // kills, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed.append((f"driver killed {number + 1}, after checkpoint {seen}", request.id))
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not ended(bench, [request for _, request in killed]):
        subprocess.run(
            [str(BIN / "fsu"), "run", "--cpus", "2"], env=bench.environment, cwd=bench.home, capture_output=True
        )
        time.sleep(5)
    for what, name in killed:
        bench.note(what, name)


def ended(bench: Bench, requests: list[str]) -> bool:
    """Whether all of the requests have ended."""
    return all(bench.app.ledger.requests.get(request).status.is_terminal for request in requests)


def stop_jobs(bench: Bench, kills: int) -> None:
    """`fsu jobs stop` after different checkpoints: the request is queued again, and the next job resumes it."""
    with on_head(bench.home, bench.environment) as head:
        request = bench.submit()
        head.submit(request.model, "--wait")
        bench.note("undisturbed", request.id)
        for number in range(kills):
            request = bench.submit()
            job = head.submit(request.model)
            assert job is not None
            seen = bench.checkpoints(request.id, 1 + 2 * number)
            started = time.monotonic()
            answer = head.fsu("jobs", "stop", job)
            took, now = time.monotonic() - started, bench.app.ledger.requests.get(request.id)
            if answer.returncode or (now.status, now.failures) != (Status.QUEUED, 0):
                bench.faults.append(f"{request.id}: {now.status} after the stop; {answer.stdout}{answer.stderr}")
            head.submit(request.model, "--wait")
            bench.note(f"job stopped {number + 1} in {took:.1f} s, after checkpoint {seen}", request.id)


def restart_head(bench: Bench, kills: int) -> None:
    """Kill the head and everything on it during the inversion, and start another head in its place."""
    with on_head(bench.home, bench.environment) as head:
        request = bench.submit()
        head.submit(request.model, "--wait")
        bench.note("undisturbed", request.id)
        for number in range(kills):
            request = bench.submit()
            head.submit(request.model)
            seen = bench.checkpoints(request.id, 2)
            head.kill()
            started = time.monotonic()
            head.start()
            while not ended(bench, [request.id]) and time.monotonic() < started + PATIENCE:
                if head.submit(request.model, "--wait") is None:  # the dead job's lease has not ended
                    time.sleep(5)
            took = time.monotonic() - started
            bench.note(f"head killed {number + 1} after checkpoint {seen}, request ended in {took:.0f} s", request.id)


PARTS: dict[str, tuple[Callable[[Bench, int], None], int]] = {
    "workers": (kill_workers, 5),
    "drivers": (kill_drivers, 5),
    "jobs": (stop_jobs, 3),
    "head": (restart_head, 1),
}


def main() -> int:
    """Kill, check, print; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--url", help="of the ledger; default: an SQLite file")
    parser.add_argument("--kills", type=int, help="in each part; default: 5 workers a stage, 5 drivers, 3 jobs, 1 head")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="the stages in which workers are killed"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faults: list[str] = []
    for part in options.parts:
        act, number = PARTS[part]
        home = Path(tempfile.mkdtemp(prefix=f"fsu-{part}-"))
        app = open_app(options.url, home)
        bench = Bench(home, options.url, app, Subject.train(app, options.seed), part, tuple(options.stages))
        act(bench, options.kills or number)
        faults += bench.faults
        print("\n".join(bench.faults) or f"{part}: every request ended once, with the weights of the undisturbed run, "
              "one version and one erasure each; the audit verifies, no digest dangles", flush=True)  # fmt: skip
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
