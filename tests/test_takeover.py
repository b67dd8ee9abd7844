"""A driver that dies in the middle: the next `fsu run` takes its request over and goes on from the last checkpoint."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fsu_ray.app import App
from fsu_ray.config import parse_change
from fsu_ray.method.datasets import draw, write_samples
from fsu_ray.records import Behaviour, Status

FSU = str(Path(sys.executable).parent / "fsu")
CHANGES = ["invert.steps=400", "invert.batch=60", "invert.width=4", "synthesize.per_class=60", "relearn.epochs=3"]
CHANGES += ["synthesize.entropy_threshold=1.5", "gate.forgotten_max=1", "gate.agreement_min=0"]


@pytest.mark.ray
def test_a_killed_driver_leaves_a_request_that_the_next_one_finishes(app: App, trained: Any, home: Path) -> None:
    """SIGKILL between two checkpoints of the inversion; once the lease is over, attempt 2 resumes there, and there is
    one version and one erasure."""
    app.register("m", trained.spec, trained.weights)
    write_samples(trained.train.pixels[draw(trained.train, [8], 8, 0)], home / "samples")
    recipe = app.recipe("digits", tuple(parse_change(change) for change in CHANGES))
    eight = Behaviour(name="eight", kind="class", targets=(8,))
    request, _ = app.submit("m", eight, str(home / "samples"), recipe)
    with (home / "first.log").open("w") as log:
        driver = subprocess.Popen([FSU, "run", "--cpus", "2"], stdout=log, stderr=log)
        for _ in range(1200):
            time.sleep(0.1)
            if len(list(app.settings.runs.glob("*/checkpoint_*"))) >= 2:
                break
            assert driver.poll() is None, (home / "first.log").read_text()
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert app.ledger.request(request.id).status is Status.RUNNING

    early = subprocess.run([FSU, "run"], capture_output=True, text=True, timeout=60, check=True)
    assert "nothing is queued" in early.stdout  # the lease of the dead driver holds
    with sqlite3.connect(app.settings.home / "ledger.db") as connection:  # ... until now
        connection.execute("UPDATE requests SET lease_until = '2000-01-01 00:00:00.000000'")
    again = subprocess.run([FSU, "run", "--json", "--cpus", "2"], capture_output=True, text=True, timeout=300)

    assert again.returncode == 0, again.stderr
    (ended,) = json.loads(again.stdout)
    assert (ended["request"]["status"], ended["request"]["attempt"]) == ("succeeded", 2)
    (resumed,) = ended["outcome"]["resumed"]
    assert resumed in {"invert 100", "invert 200", "invert 300"}
    assert [version.number for version in app.ledger.versions("m")] == [1, 2]
    assert [erasure.behaviour.name for erasure in app.ledger.erasures("m")] == ["eight"]
