"""Jobs on a real local head with its Jobs API and a token, sent by `ray job submit` and by `fsu submit`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fsu_ray.cluster.workers import checkpoints as kept
from fsu_ray.config import parse_change, read_settings
from fsu_ray.method.datasets import draw, load, write_samples
from fsu_ray.records import Behaviour, Request, Status
from fsu_ray.service import Service, connect
from tests.bench.local_head import LocalHead, free_port, on_head

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
QUICK = ["invert.steps=60", "invert.batch=60", "invert.width=4", "synthesize.per_class=60", "relearn.epochs=3"]
QUICK += ["synthesize.entropy_threshold=1.5", "synthesize.starved_below=0", "gate.forgotten_max=1"]
QUICK += ["gate.agreement_min=0", "gate.dataset_agreement_min=0", "gate.coverage_min=0", "gate.acceptance_min=0"]
QUICK += ["gate.bn_distance_max=100", "gate.returned_max=1", "gate.returned_margin=1"]
LONG = [*QUICK, "invert.steps=2500", "invert.batch=30", "invert.width=2"]


@dataclass
class Place:
    """A head with a token, and a ledger and artifacts in a folder that it sees; `metrics` is Prometheus' port."""

    head: LocalHead
    home: Path
    metrics: int

    @property
    def service(self) -> Service:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FSU_HOME", str(self.home / "fsu"))
            for name in ("FSU_LEDGER", "FSU_ARTIFACTS", "FSU_RUNS"):
                patch.delenv(name, raising=False)
            return connect(read_settings(self.home))

    def ask(self, model: str, target: int, changes: list[str]) -> Request:
        """Queue a request to erase a class."""
        service = self.service
        images = load("digits", "train", service.ledger.models.get(model).spec.shape)
        samples = self.home / f"samples-{model}-{target}"
        if not samples.exists():
            write_samples(images.pixels[draw(images, [target], 6, 0)], samples)
        behaviour = Behaviour(name=f"class-{target}", kind="class", targets=(target,))
        recipe = service.recipes.preset("digits", tuple(parse_change(change) for change in changes))
        return service.requests.submit(model, behaviour, str(samples), recipe)[0]

    def ray_job(self, *words: str) -> str:
        """`ray job submit` from the repository's root; its output once it has succeeded."""
        environment = json.dumps({"env_vars": {"FSU_HOME": str(self.home / "fsu")}})
        command = [str(BIN / "ray"), "job", "submit", "--address", self.head.address, "--working-dir", str(ROOT)]
        command += ["--runtime-env-json", environment, "--", "python", "-m", *words]
        ended = subprocess.run(
            command, capture_output=True, text=True, env=self.head.environment, timeout=300, check=False
        )
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
        return ended.stdout

    def scraped(self) -> str:
        """What Prometheus would read."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def fsu(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = self.head.fsu(*words)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def until(self, model: str, checkpoints: int) -> None:
        """Wait until the run of the model's last request would go on from one of so many checkpoints."""
        request = self.service.ledger.requests.all(model)[-1]
        for _ in range(3600):
            time.sleep(0.1)
            with suppress(ValueError):  # torn: Ray is writing it
                if any(len(kept(run)) >= checkpoints for run in self.home.glob(f"fsu/runs/{request.id}-*")):
                    return
            assert not self.service.ledger.requests.get(request.id).status.is_terminal, (
                self.service.ledger.requests.get(request.id)
            )
        pytest.fail("no checkpoint in six minutes")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, trained: Any) -> Iterator[Place]:
    """One head for all tests of this file, with the model `n`."""
    home = tmp_path_factory.mktemp("head")
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "FSU_LEDGER", "FSU_ARTIFACTS", "FSU_RUNS", "FSU_WORKERS")
    settings = {name: value for name, value in os.environ.items() if name not in names}
    metrics = free_port()
    with on_head(home, settings | {"FSU_HOME": str(home / "fsu")}, metrics) as head:
        found = Place(head, home, metrics)
        found.service.models.register("n", trained.spec, trained.weights)
        yield found


@pytest.mark.ray
def test_train_search_and_unlearn_by_rays_own_command(place: Place) -> None:
    """A job trains and registers a model, one searches a recipe for a request of it, one carries the request out."""
    place.ray_job("jobs.train", "--name", "m", "--epochs", "3")
    quick = [*QUICK, "invert.steps=20", "relearn.epochs=1"]
    request = place.ask("m", 8, quick)
    words = ["--model", "m", "--request", request.id, "--trials", "1", "--recipe", "digits"]
    words += [word for change in quick for word in ("--set", change)]
    said = place.ray_job("jobs.search", *words)
    assert '"trials": 1' in said
    place.ray_job("jobs.unlearn", "--max", "1", "--model", "m")
    ledger = place.service.ledger
    assert [erasure.behaviour.name for erasure in ledger.models.erasures("m")] == ["class-8"]
    assert ledger.models.version("m").number == 2
    assert ledger.requests.get(request.id).worker.startswith("job/"), "a claim bears its job, whoever has sent it"


@pytest.mark.ray
def test_a_request_is_sent_stopped_and_sent_again(place: Place) -> None:
    """A job is listed with its labels; stopped, it leaves its request queued; the next one goes on from there."""
    request = place.ask("n", 8, LONG)
    sent = json.loads(place.fsu("submit", "--model", "n", "--max", "1", "--json").stdout)
    job = f"fsu-{request.id}-1"
    assert (sent["job"], sent["new"], sent["request"]) == (job, True, request.id)
    again = place.fsu("submit", "--model", "n", "--max", "1")
    assert f"already: {job}" in again.stdout or "nothing is ready" in again.stdout
    place.until("n", 1)
    listed = {each["id"]: each for each in json.loads(place.fsu("jobs", "list", "--json").stdout)}
    assert listed[job]["labels"].items() >= {"fsu_request": request.id, "fsu_attempt": "1", "fsu_model": "n"}.items()
    assert listed[job]["status"] == "RUNNING"
    watching = subprocess.Popen(
        [str(BIN / "fsu"), "jobs", "logs", job, "--follow", "--address", place.head.address],
        env=place.head.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watching.stdout
    watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=30)
    assert said == f"interrupted: job {job} goes on; `fsu jobs stop {job}` ends it\n"
    assert watching.returncode == 130

    stopped = place.fsu("jobs", "stop", job)
    assert f"job {job} is STOPPED\nrequest {request.id} is queued\n" == stopped.stdout
    waiting = place.service.ledger.requests.get(request.id)
    assert (waiting.status, waiting.failures, waiting.reason) == (Status.QUEUED, 0, "interrupted")
    place.fsu("jobs", "stop", job, code=1)  # it is over
    assert "interrupted: what was running is queued again" in place.fsu("jobs", "logs", job).stdout

    done = place.fsu("submit", "--model", "n", "--max", "1", "--wait")
    assert f"sent fsu-{request.id}-2" in done.stdout
    ended = place.service.ledger.requests.get(request.id)
    assert (ended.status, ended.attempt) == (Status.SUCCEEDED, 2)
    (resumed,) = ended.report["resumed"]
    assert re.fullmatch(r"invert \d+", resumed), "it goes on where it was stopped, and does not begin again"
    for _ in range(30):  # the histogram of a driver that is gone stays for a while
        scraped = place.scraped()
        if "ray_fsu_stage_seconds_count" in scraped:
            break
        time.sleep(1)
    counted = re.findall(r'ray_fsu_stage_seconds_count\{.*stage="relearn".*\} (\S+)', scraped)
    assert counted
    assert float(counted[0]) >= 1


def prometheus_finds_what_the_ledger_says(place: Place) -> None:
    """On Ray's own endpoint, of a driver that is at work on a request of the model `n`, which has had one."""
    wanted = ["ray_fsu_requests{", "ray_fsu_queue_depth{", "ray_fsu_generator_uses{", "ray_fsu_generator_reuse_ratio"]
    said, found = "", False
    for _ in range(120):  # what drivers said that are gone stays for a while
        said = place.scraped()
        states: dict[str, dict[str, float]] = {}
        for line, value in re.findall(r"^ray_fsu_requests\{(.*)\} (\S+)$", said, re.M):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            if labels["model"] == "n":
                states.setdefault(labels["WorkerId"], {})[labels["state"]] = float(value)
        found = any(each["running"] == 1 and each["succeeded"] >= 1 for each in states.values())
        if found and all(name in said for name in wanted):
            break
        time.sleep(0.5)
    assert found, said[-2000:]
    assert all(name in said for name in wanted)


@pytest.mark.ray
def test_a_job_that_died_is_found_and_its_request_retried(place: Place) -> None:
    """The driver is killed; whoever looks next ends its claim, with hours of its lease left to run. Until then its
    figures are on Ray's endpoint."""
    request = place.ask("n", 3, [*LONG, "invert.seed=3"])  # with that of the last one it would not have to invert
    job = json.loads(place.fsu("submit", "--model", "n", "--json").stdout)["job"]
    place.until("n", 1)
    prometheus_finds_what_the_ledger_says(place)
    claimed = place.service.ledger.requests.get(request.id)
    os.kill(int(claimed.worker.rpartition(":")[2]), signal.SIGKILL)
    for _ in range(100):
        listed = {each["id"]: each["status"] for each in json.loads(place.fsu("jobs", "list", "--json").stdout)}
        if listed[job] == "FAILED":
            break
        time.sleep(0.3)
    assert place.service.ledger.requests.get(request.id).status is Status.RUNNING
    sent = json.loads(place.fsu("submit", "--model", "n", "--json", "--wait").stdout)
    assert (sent["job"], sent["status"]) == (f"fsu-{request.id}-2", "SUCCEEDED")
    ended = place.service.ledger.requests.get(request.id)
    assert (ended.status, ended.attempt, ended.failures) == (Status.SUCCEEDED, 2, 1)
    assert ended.report["resumed"]


@pytest.mark.ray
def test_a_runtime_environment_that_does_not_install(place: Place) -> None:
    """The job fails, and says why in one line; the request is as it was. (Its pip would copy this venv first.)"""
    request = place.ask("n", 5, QUICK)
    env = json.dumps({"py_modules": ["https://127.0.0.1:1/no-such-module.zip"]})
    failed = place.fsu("submit", "--model", "n", "--runtime-env", env, "--wait", code=1)
    assert "could not begin: " in failed.stderr
    assert "127.0.0.1" in failed.stderr, failed.stderr
    assert [line for line in failed.stderr.splitlines() if line.startswith("error:")] == [
        failed.stderr.splitlines()[-1]
    ]
    waiting = place.service.ledger.requests.get(request.id)
    assert (waiting.status, waiting.attempt) == (Status.QUEUED, 0)
    for wrong in ('{"pip": 3}', '{"nonsense": 1}', '{"working_dir": "/no/such/folder"}'):
        refused = place.fsu("submit", "--model", "n", "--runtime-env", wrong, code=2)
        assert refused.stderr.startswith("error: --runtime-env: ")
        assert refused.stderr.count("\n") == 1
    place.service.ledger.requests.cancel(request.id)


@pytest.mark.ray
def test_a_wrong_token(place: Place, tmp_path: Path) -> None:
    """And none, and a file that is not there: one line, and no token in it."""
    (tmp_path / "other").write_text("f" * 64)
    base = {name: value for name, value in place.head.environment.items() if not name.startswith("RAY_AUTH")}
    cases: list[tuple[dict[str, str], str]] = [
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}, "refuses this token"),
        ({"RAY_AUTH_TOKEN": "f" * 64}, "refuses this token"),
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, "token"),
    ]
    for more, said in cases:
        command = [str(BIN / "fsu"), "jobs", "list", "--address", place.head.address]
        done = subprocess.run(command, env=base | more, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        assert said in done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert "f" * 64 not in done.stderr
