"""What is killed, stopped and started again under Ray, and what is in the ledger when all is over.

    python -m fsu_ray.experiments.failures [--url postgresql://...] workers drivers jobs head

`workers`: a Ray Train worker is killed (SIGKILL) in each stage of a run, at moments spread over it; Ray restarts it.
`drivers`: `fsu run` is killed behind different checkpoints; another one takes over once the leases end (2 minutes).
`jobs`: `fsu submit` sends a Ray job to a head with a token, `fsu jobs stop` ends it, the next job goes on.
`head`: the head is killed with the job on it and started again; a job that is sent then finishes the request.

Every kill has a request and a model of its own, all of one classifier of scikit-learn's digits, all with the recipe and
the samples of a run that nobody disturbs, so all must end with its weights. Prints a line a kill and a last one; exit
code 1 if anything is amiss: a request that did not end once as succeeded, other weights, another number of versions
or erasures than one each, an audit that does not verify, a digest that dangles.
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
from fsu_ray.experiments.crashes import App, Subject, amiss, open_app
from fsu_ray.experiments.heads import BIN, PATIENCE, on_head
from fsu_ray.recipes import Recipe
from fsu_ray.records import Request, Status
from fsu_ray.work import BlobStore, Outcome, WorkOrder

STAGES = ("invert", "synthesize", "filter", "relearn", "evaluate")
EVERY = 40
"""Inversion steps between two checkpoints, in the part `workers`; elsewhere they are those of `fsu run`."""

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
    """A ledger in a folder, a classifier, and the weights with which a run ends that nobody disturbs."""

    home: Path
    url: str | None
    app: App
    subject: Subject
    part: str
    stages: tuple[str, ...] = STAGES
    made: int = 0
    expected: str | None = None
    wrong: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What processes of this bench find."""
        found = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "FSU_ARTIFACTS")}
        return found | {"FSU_HOME": str(self.home)} | ({"FSU_LEDGER": self.url} if self.url else {})

    def ask(self) -> Request:
        """A new request to erase the same from the same classifier, as another model."""
        self.made += 1
        name = f"{self.part}-{self.home.name[-8:]}-{self.made}"
        return self.app.ledger.requests.get(self.subject.ask(self.app, name, RECIPE))

    def note(self, what: str, request: str) -> None:
        """Look at a request that must have ended, compare it with the undisturbed one, print a line."""
        self.app.ledger.database.flush()
        found, ledger = self.app.ledger.requests.get(request), self.app.ledger
        versions, erasures = ledger.models.versions(found.model), ledger.models.erasures(found.model)
        self.expected = self.expected or versions[-1].weights
        same = versions[-1].weights == self.expected
        wrong = amiss(self.app, [request]) + ([] if same else [f"{request}: other weights than undisturbed"])
        self.wrong += wrong
        resumed = ", ".join((found.report or {}).get("resumed", ())) or "not resumed"
        print(
            f"{what}: {resumed}; {self.seconds(found):.1f} s, {found.status}, attempt {found.attempt}, "
            f"failures {found.failures}, {len(versions)} versions, {len(erasures)} erasure, "
            f"{'the same' if same else 'OTHER'} weights, {'; '.join(wrong) or 'audit verifies, nothing dangles'}",
            flush=True,
        )

    def seconds(self, request: Request) -> float:
        """How long its last attempt took, by the ledger."""
        events = self.app.ledger.requests.events(request.id)
        begun = max(event.at for event in events if event.new is Status.RUNNING)
        return (events[-1].at - begun).total_seconds()

    def checkpoints(self, request: str, number: int, process: subprocess.Popen[Any] | None = None) -> int:
        """Wait until a run has begun to keep its checkpoint `number`, or has ended; how many there were."""
        seen: set[str] = set()
        deadline = time.monotonic() + PATIENCE
        while len(seen) < number and time.monotonic() < deadline:
            seen |= {folder.name for folder in self.home.glob(f"runs/{request}-*/checkpoint_*")}
            if self.app.ledger.requests.get(request).status.is_terminal or (process and process.poll() is not None):
                break
            time.sleep(0.02)
        return len(seen)


def killer(stage: str, delay: float) -> type[ProgressActor]:
    """A line between worker and driver that kills the last worker of the group, once, `delay` seconds after it has
    first heard of `stage`: at once, while the worker waits for the answer, where `delay` is 0.

    It says `killed` or, where the stage was over by then, `missed` to the driver.
    """

    class Killer(ProgressActor):
        def __init__(self) -> None:
            super().__init__()
            self.process, self.heard, self.begun = 0, ("", 0, 0), False

        def tell(self, item: Any) -> bool:
            self.heard = item[:3]
            if item[0] == "start":
                self.process = int(item[3]["pid"])
            if item[0] == stage and not self.begun:
                self.begun = True
                if delay:
                    threading.Timer(delay, self.kill).start()
                else:
                    self.kill()
            return super().tell(item)

        def kill(self) -> None:
            hit = self.heard[0] == stage
            if hit:
                os.kill(self.process, signal.SIGKILL)
            super().tell(("killed" if hit else "missed", *self.heard[1:], {}))

    return Killer


def kill_workers(bench: Bench, kills: int) -> None:
    """`kills` workers in each of the bench's stages, all on one Ray of this process."""
    words: list[tuple[str, int, int]] = []

    def execute(order: WorkOrder, store: BlobStore, name: str, stop: threading.Event) -> Outcome:
        def on_progress(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
            words.append((stage, done, total))

        return workers.execute(order, store, (None, str(bench.home / "runs")), name, EVERY, on_progress, stop)

    def run(request: Request) -> Outcome | None:
        words.clear()
        claimed = bench.app.ledger.requests.claim("failures", 600.0, request.model)
        assert claimed is not None
        return pipeline.run_request(bench.app.ledger, bench.app.artifacts, execute, claimed)[0].outcome

    workers.connect(2)
    try:
        request = bench.ask()
        outcome = run(request)
        assert outcome is not None
        bench.note("undisturbed", request.id)
        for stage in bench.stages:
            number, share = 0, 1.0
            while number < kills:
                delay = share * outcome.seconds[stage] * number / kills
                setattr(progress, "ProgressActor", killer(stage, delay))  # noqa: B010 - a class, to mypy
                request = bench.ask()
                run(request)
                hit = [word for word in words if word[0] == "killed"]
                share = 1.0 if hit else share / 2
                number += len(hit)
                where = f"at {hit[0][1]} of {hit[0][2]}, {delay:.2f} s in" if hit else f"was over after {delay:.2f} s"
                bench.note(f"worker killed in {stage} {number}, {where}" if hit else f"{stage} {where}", request.id)
    finally:
        setattr(progress, "ProgressActor", ProgressActor)  # noqa: B010
        workers.disconnect()


def kill_drivers(bench: Bench, kills: int) -> None:
    """`fsu run`, killed behind its first checkpoint, and so on; one more takes all their requests over."""

    def start(request: Request) -> subprocess.Popen[bytes]:
        command = [str(BIN / "fsu"), "run", "--cpus", "2", "--model", request.model]
        with (bench.home / "drivers.log").open("ab") as log:
            return subprocess.Popen(command, env=bench.environment, cwd=bench.home, stdout=log, stderr=log)

    request = bench.ask()
    process = start(request)
    there = bench.checkpoints(request.id, 1000, process)
    process.wait(PATIENCE)
    bench.note(f"undisturbed, {there} checkpoints", request.id)
    killed: list[tuple[str, str]] = []
    for number in range(kills):
        request = bench.ask()
        process = start(request)
        seen = bench.checkpoints(request.id, 1 + number * (there - 1) // kills, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed.append((f"driver killed {number + 1}, behind checkpoint {seen}", request.id))
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not ended(bench, [request for _, request in killed]):
        subprocess.run(
            [str(BIN / "fsu"), "run", "--cpus", "2"], env=bench.environment, cwd=bench.home, capture_output=True
        )
        time.sleep(5)
    for what, name in killed:
        bench.note(what, name)


def ended(bench: Bench, requests: list[str]) -> bool:
    """Whether all of them are at their ends."""
    return all(bench.app.ledger.requests.get(request).status.is_terminal for request in requests)


def stop_jobs(bench: Bench, kills: int) -> None:
    """`fsu jobs stop` behind different checkpoints: the request is queued again, and the next job goes on."""
    with on_head(bench.home, bench.environment) as head:
        request = bench.ask()
        head.submit(request.model, "--wait")
        bench.note("undisturbed", request.id)
        for number in range(kills):
            request = bench.ask()
            job = head.submit(request.model)
            assert job is not None
            seen = bench.checkpoints(request.id, 1 + 2 * number)
            begun = time.monotonic()
            done = head.fsu("jobs", "stop", job)
            took, now = time.monotonic() - begun, bench.app.ledger.requests.get(request.id)
            if done.returncode or (now.status, now.failures) != (Status.QUEUED, 0):
                bench.wrong.append(f"{request.id}: {now.status} after the stop; {done.stdout}{done.stderr}")
            head.submit(request.model, "--wait")
            bench.note(f"job stopped {number + 1} in {took:.1f} s, behind checkpoint {seen}", request.id)


def restart_head(bench: Bench, kills: int) -> None:
    """The head and all on it killed in the inversion, and another one started in its place."""
    with on_head(bench.home, bench.environment) as head:
        request = bench.ask()
        head.submit(request.model, "--wait")
        bench.note("undisturbed", request.id)
        for number in range(kills):
            request = bench.ask()
            head.submit(request.model)
            seen = bench.checkpoints(request.id, 2)
            head.kill()
            begun = time.monotonic()
            head.start()
            while not ended(bench, [request.id]) and time.monotonic() < begun + PATIENCE:
                if head.submit(request.model, "--wait") is None:  # the lease of the dead job's process holds
                    time.sleep(5)
            took = time.monotonic() - begun
            bench.note(f"head killed {number + 1} behind checkpoint {seen}, over in {took:.0f} s", request.id)


PARTS: dict[str, tuple[Callable[[Bench, int], None], int]] = {
    "workers": (kill_workers, 5),
    "drivers": (kill_drivers, 5),
    "jobs": (stop_jobs, 3),
    "head": (restart_head, 1),
}


def main() -> int:
    """Kill, look, print; 1 if anything is amiss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--url", help="the ledger's; without it, an SQLite file")
    parser.add_argument("--kills", type=int, help="of each kind; 5 workers a stage and drivers, 3 jobs, 1 head")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="those in which workers are killed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wrong: list[str] = []
    for part in options.parts:
        act, number = PARTS[part]
        home = Path(tempfile.mkdtemp(prefix=f"fsu-{part}-"))
        app = open_app(options.url, home)
        bench = Bench(home, options.url, app, Subject.train(app, options.seed), part, tuple(options.stages))
        act(bench, options.kills or number)
        wrong += bench.wrong
        print("\n".join(bench.wrong) or f"{part}: every request ended once, with the weights of the undisturbed run, "
              "one version and one erasure each; the audit verifies, no digest dangles", flush=True)  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
