"""Kill workers (SIGKILL) at random moments of a run and check the ledger once other workers have finished.

    python -m tests.bench.crashes [--url postgresql://...] [--kills 20] [--home FOLDER]

Each kill has its own model and request. A process claims the request and is killed at a random moment between the
claim and the end of an undisturbed run. The next process claims the request when its lease has ended, and resumes
from the last checkpoint. The method runs inside that process without Ray, for seconds, on scikit-learn's digits, with
checkpoints in files; pipeline, ledger and artifacts are the real ones. Prints a line for each kill and a summary.
Exit code 1: something is wrong in the ledger.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fsu_ray.config import Timings, sqlite_url
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Digest, ModelSpec, Request, Status
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.ledger import Ledger, open_ledger
from fsu_ray.work import BlobStore, Outcome, WorkOrder

ROOT = Path(__file__).parents[2]
LEASE = 1.0  # seconds
RECIPE = {
    "invert": {"steps": 120, "batch": 60, "width": 4},
    "synthesize": {"per_class": 40, "entropy_threshold": 2.0, "starved_below": 0.0},
    "relearn": {"epochs": 4},
    "gate": {"agreement_min": 0.0, "forgotten_max": 1.0, "coverage_min": 0.0, "acceptance_min": 0.0},
}


@dataclass(frozen=True)
class App:
    """A ledger and its artifacts."""

    ledger: Ledger
    artifacts: Artifacts


def open_app(url: str | None, home: Path) -> App:
    """Artifacts in `home`, and the ledger at `url` or, without one, in `home`."""
    return App(open_ledger(url or sqlite_url(home / "ledger.db")), Artifacts.open(str(home / "artifacts")))


def work(url: str | None, home: Path, model: str) -> None:
    """The process that is killed: claim the requests of `model`, one after another, and run them."""
    import torch

    from fsu_ray import pipeline
    from fsu_ray.method.unlearn import RunState, unlearn

    timings = Timings(lease=LEASE, poll=LEASE / 5)
    torch.set_num_threads(1)
    app = open_app(url, home)

    def execute(order: WorkOrder, store: BlobStore, name: str, stop: threading.Event) -> Outcome:
        file = home / "runs" / f"{name}.pt"
        file.parent.mkdir(exist_ok=True)
        saved = RunState(**torch.load(file, weights_only=True)) if file.exists() else None

        def keep(state: RunState) -> None:
            partial = file.with_suffix(f".{os.getpid()}")
            torch.save(asdict(state), partial)
            partial.rename(file)

        return unlearn(order, store, torch.device("cpu"), None, keep, saved, every=10)

    print("ready", flush=True)
    sys.stdin.readline()
    while (request := app.ledger.requests.claim(f"w{os.getpid()}", LEASE, model)) is not None:
        pipeline.run_request(app.ledger, app.artifacts, execute, request, timings=timings)
    app.ledger.close()


def start(url: str | None, home: Path, model: str) -> subprocess.Popen[str]:
    """Start a worker process; it waits for a line on its standard input before it claims."""
    command = [sys.executable, "-m", "tests.bench.crashes", "--work", model, "--home", str(home)]
    command += ["--url", url] if url else []
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def go(process: subprocess.Popen[str]) -> None:
    """Let a process of `start` claim."""
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def wait_for(app: App, request: str, *states: Status) -> Request:
    """Wait until a request is in one of `states`; return it."""
    while (current := app.ledger.requests.get(request)).status not in states:
        time.sleep(0.005)
    return current


def undisturbed(app: App, url: str | None, home: Path, request: str) -> float:
    """Run a request without a kill; the seconds from its claim to its end."""
    process = start(url, home, app.ledger.requests.get(request).model)
    go(process)
    wait_for(app, request, Status.RUNNING)
    claimed = time.monotonic()
    process.wait(timeout=300)
    return time.monotonic() - claimed


def killed(app: App, url: str | None, home: Path, request: str, moment: float) -> Request:
    """Run a request whose first worker is killed `moment` seconds after the claim, unless the request has ended by
    then; return the request as it is when the second worker has ended."""
    model = app.ledger.requests.get(request).model
    process = start(url, home, model)
    go(process)
    wait_for(app, request, Status.RUNNING, Status.SUCCEEDED)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    second = start(url, home, model)
    time.sleep(LEASE)  # the first worker's lease has ended then
    go(second)
    second.wait(timeout=300)
    return app.ledger.requests.get(request)


def find_faults(app: App, requests: list[str]) -> list[str]:
    """What is wrong in the ledger, a sentence each. Every request must have ended once, as succeeded, with one new
    version and one erasure; every referenced artifact must exist; the audit must verify."""
    faults = []
    for request in map(app.ledger.requests.get, requests):
        ends = [event for event in app.ledger.requests.events(request.id) if event.new.is_terminal]
        versions, erasures = app.ledger.models.versions(request.model), app.ledger.models.erasures(request.model)
        if (request.status, len(ends), len(versions), len(erasures)) != (Status.SUCCEEDED, 1, 2, 1):
            faults.append(f"{request.id}: {request.status}, {len(ends)} ends, {len(versions)} versions, "
                         f"{len(erasures)} erasures")  # fmt: skip
    needed, _ = app.ledger.references()
    faults += [f"{digest}: dangling" for digest in sorted(needed) if not app.artifacts.has(digest)]
    faults += list(app.ledger.audit.verify(app.artifacts).findings)
    return faults


@dataclass(frozen=True)
class Subject:
    """A classifier of the digits and target samples of class 8, by their digests in the store."""

    spec: ModelSpec
    weights: Digest
    samples: Digest

    @classmethod
    def train(cls, app: App, seed: int) -> Subject:
        """Train the classifier (seconds) and store it with six target samples."""
        import torch

        from fsu_ray.method.datasets import draw, load
        from fsu_ray.method.fit import TrainingSchedule, fit
        from fsu_ray.method.inputs import save_samples
        from fsu_ray.models.classifier import Classifier

        spec = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10, mean=(0.3,), std=(0.37,))
        images = load("digits", "train", spec.shape)
        torch.manual_seed(seed)
        classifier = Classifier(spec)
        fit(classifier, images.pixels, images.labels, TrainingSchedule(epochs=4, batch=64, seed=seed))
        weights = app.artifacts.put(classifier.to_bytes())
        return cls(spec, weights, app.artifacts.put(save_samples(images.pixels[draw(images, [8], 6, seed)])))

    def submit(self, app: App, model: str, recipe: Recipe) -> str:
        """Register the classifier as `model` and submit a request to erase class 8; the request's id."""
        app.ledger.models.register(model, self.spec, self.weights)
        eight = Behaviour(name="eight", kind="class", targets=(8,))
        return app.ledger.requests.submit(model, eight, self.samples, 6, recipe)[0].id


def main() -> int:
    """Kill, check, print; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of the ledger; default: an SQLite file")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, default=None, help="a folder for artifacts and runs; default: a new one")
    parser.add_argument("--work", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    home: Path = (options.home or Path(tempfile.mkdtemp(prefix="fsu-crashes-"))).resolve()
    home.mkdir(parents=True, exist_ok=True)
    if options.work:
        work(options.url, home, options.work)
        return 0
    app = open_app(options.url, home)
    rng = random.Random(options.seed)
    subject, recipe = Subject.train(app, options.seed), Recipe.model_validate(RECIPE)
    requests = iter([subject.submit(app, f"m{number}", recipe) for number in range(2 * options.kills + 1)])
    done = [next(requests)]
    whole = undisturbed(app, options.url, home, done[0])
    print(f"undisturbed: {whole:.1f} s from claim to end", flush=True)
    hits = 0
    while hits < options.kills:
        moment = rng.uniform(0, whole)
        done.append(next(requests))
        ended = killed(app, options.url, home, done[-1], moment)
        if ended.attempt == 1:
            print(f"{moment:.2f} s: the run had ended by then", flush=True)
            whole = min(whole, moment)
            continue
        hits += 1
        where = ", ".join((ended.report or {}).get("resumed", ())) or "from the beginning"
        print(f"kill {hits} after {moment:.2f} s: {ended.status}, attempt {ended.attempt}, {where}", flush=True)
    for unused in requests:
        app.ledger.requests.cancel(unused)
    app.ledger.database.flush()
    faults = find_faults(app, done)
    print("\n".join(faults) or f"{options.kills} kills: every request ended once, one version and one erasure each, "
          "the audit verifies, no digest dangles")  # fmt: skip
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
