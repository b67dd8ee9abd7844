"""The jobs under `ray job submit`, on a real local head with its Jobs API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
QUICK = ["invert.steps=100", "invert.batch=60", "synthesize.per_class=60", "synthesize.entropy_threshold=1.5"]
QUICK += ["relearn.epochs=10", "gate.forgotten_max=1", "gate.agreement_min=0", "synthesize.starved_below=0"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(home: Path) -> Iterator[str]:
    """The address of a head's Jobs API."""
    port, api = free_port(), free_port()
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={api}"]
    command += ["--num-cpus=2", "--dashboard-host=127.0.0.1", "--dashboard-agent-listen-port=0"]
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{api}"
        for _ in range(120):
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(f"{address}/api/version", timeout=2):
                    break
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                assert process.poll() is None, (home / "head.log").read_text()
        else:
            pytest.fail("the head did not come up: " + (home / "head.log").read_text())
        yield address
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def submit(head: str, home: Path, *words: str) -> str:
    """`ray job submit` from the repository's root; its output once it has succeeded."""
    environment = json.dumps({"env_vars": {"FSU_HOME": str(home / "fsu")}})
    command = [str(BIN / "ray"), "job", "submit", "--address", head, "--working-dir", "jobs_folder"]
    command += ["--runtime-env-json", environment, "--", sys.executable, "-m", *words]
    command[command.index("jobs_folder")] = str(ROOT)
    variables = os.environ | {"RAY_AUTH_MODE": "disabled"}
    ended = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.ray
def test_train_and_unlearn_as_ray_jobs(head: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job trains and registers a model, another one carries out the request that was queued in between."""
    from fsu_ray.app import App
    from fsu_ray.config import parse_change, read_settings
    from fsu_ray.method.datasets import draw, load, write_samples
    from fsu_ray.records import Behaviour

    monkeypatch.setenv("FSU_HOME", str(home / "fsu"))
    submit(head, home, "jobs.train", "--name", "m", "--epochs", "6")
    app = App.open(read_settings())
    images = load("digits", "train", app.ledger.model("m").spec.shape)
    write_samples(images.pixels[draw(images, [8], 6, 0)], home / "s")
    behaviour = Behaviour(name="eight", kind="class", targets=(8,))
    app.submit("m", behaviour, str(home / "s"), app.recipe("digits", tuple(parse_change(c) for c in QUICK)))
    submit(head, home, "jobs.unlearn", "--max", "1")
    assert [e.behaviour.name for e in app.ledger.erasures("m")] == ["eight"]
    assert app.ledger.version("m").number == 2
