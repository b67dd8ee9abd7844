"""A driver that dies in the middle: the next `fsu run` takes its request over and goes on from the last checkpoint."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fsu_ray.cluster.workers import checkpoints as kept
from fsu_ray.config import parse_change
from fsu_ray.method.datasets import draw, write_samples
from fsu_ray.records import Behaviour, Status
from fsu_ray.service import Service

FSU = str(Path(sys.executable).parent / "fsu")
CHANGES = ["invert.steps=1200", "invert.batch=30", "invert.width=2", "synthesize.per_class=60", "relearn.epochs=1"]
CHANGES += ["synthesize.entropy_threshold=1.5", "gate.forgotten_max=1", "gate.agreement_min=0"]


@pytest.fixture
def request_of(service: Service, trained: Any, home: Path) -> str:
    """A queued request of the model `m`, whose inversion takes some seconds."""
    service.models.register("m", trained.spec, trained.weights)
    write_samples(trained.train.pixels[draw(trained.train, [8], 8, 0)], home / "samples")
    recipe = service.recipes.preset("digits", tuple(parse_change(change) for change in CHANGES))
    eight = Behaviour(name="eight", kind="class", targets=(8,))
    request, _ = service.requests.submit("m", eight, str(home / "samples"), recipe)
    return request.id


def run_until_checkpoints(service: Service, home: Path, then: Callable[[subprocess.Popen[bytes]], object]) -> int:
    """`fsu run` until Ray would go on from two more checkpoints, and what is done to it then; its exit code."""

    def there() -> set[str]:
        try:
            return {name for run in Path(service.settings.runs).glob("*") for name in kept(run)}
        except ValueError:  # it is being written
            return set()

    before, made = there(), set[str]()
    with (home / "first.log").open("w") as log:
        driver = subprocess.Popen([FSU, "run", "--cpus", "2"], stdout=log, stderr=log)
        for _ in range(1200):
            time.sleep(0.1)
            made |= there() - before
            if len(made) >= 2:
                break
            assert driver.poll() is None, (home / "first.log").read_text()
        then(driver)
        return driver.wait(timeout=120)


@pytest.mark.ray
def test_drivers_that_end_in_the_middle(service: Service, request_of: str, home: Path) -> None:
    """One is asked to end (SIGTERM): its request is queued at once, and the next one need not wait for a lease. That
    one is killed between two checkpoints: once the lease is over, the third resumes there, and finishes."""
    code = run_until_checkpoints(service, home, lambda driver: driver.send_signal(signal.SIGTERM))
    assert code == 130
    log = (home / "first.log").read_text()
    assert "interrupted" in log
    assert "Traceback" not in log
    waiting = service.ledger.requests.get(request_of)
    assert (waiting.status, waiting.reason, waiting.failures) == (Status.QUEUED, "interrupted", 0)

    run_until_checkpoints(service, home, lambda driver: driver.send_signal(signal.SIGKILL))
    running = service.ledger.requests.get(request_of)
    assert (running.status, running.attempt) == (Status.RUNNING, 2)
    early = subprocess.run([FSU, "run"], capture_output=True, text=True, timeout=60, check=True)
    assert "nothing is ready: 1 wait or run elsewhere" in early.stdout  # the lease of the dead driver holds
    with sqlite3.connect(service.settings.home / "ledger.db") as connection:  # ... until now
        connection.execute("UPDATE requests SET lease_until = '2000-01-01T00:00:00.000000+00:00'")

    again = subprocess.run([FSU, "run", "--json", "--cpus", "2"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    (ended,) = json.loads(again.stdout)
    assert (ended["request"]["status"], ended["request"]["attempt"]) == ("succeeded", 3)
    steps = [re.fullmatch(r"invert (\d+)", each) for each in ended["outcome"]["resumed"]]
    first, second = (int(match[1]) for match in steps if match)
    assert 100 < first < second, "the step at which the first was asked to end, then a checkpoint of the second"
    assert [version.number for version in service.ledger.models.versions("m")] == [1, 2]
    assert [erasure.behaviour.name for erasure in service.ledger.models.erasures("m")] == ["eight"]
    assert service.ledger.requests.get(request_of).failures == 1


@pytest.mark.ray
def test_a_cancelled_request_stops_on_ray(service: Service, request_of: str, home: Path) -> None:
    """`fsu request cancel` in another process: the worker stops at its next step, and `fsu run` ends."""

    def cancel(driver: subprocess.Popen[bytes]) -> None:
        subprocess.run([FSU, "request", "cancel", request_of, "--by", "alice"], check=True, capture_output=True)

    code = run_until_checkpoints(service, home, cancel)
    assert code == 0, (home / "first.log").read_text()
    ended = service.ledger.requests.get(request_of)
    assert (ended.status, ended.reason) == (Status.CANCELLED, "cancelled while running")
    assert len(service.ledger.models.versions("m")) == 1
