"""`fsu schedule` and `fsu scheduler`: what people type, what they read, and how a scheduler ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from fsu_ray.cli.schedules import schedule_app, scheduler_app
from fsu_ray.config import read_settings
from fsu_ray.errors import InvalidData
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, ModelSpec, Status
from fsu_ray.service import Service
from fsu_ray.storage import rows
from fsu_ray.storage.ledger import Ledger, open_ledger

Fsu = Callable[..., Result]
ADD = ["schedule", "add", "--model", "m", "--cron", "0 2 * * *", "--timezone", "Europe/Berlin"]
SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)

commands = typer.Typer()
commands.add_typer(schedule_app, name="schedule")
commands.add_typer(scheduler_app)


@pytest.fixture
def ledger(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """The ledger of this test's home, with the model `m`; SIGTERM is as before in the end."""
    monkeypatch.delenv("FSU_ACTOR", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with open_ledger(read_settings().ledger) as opened:
        opened.models.register("m", SPEC, "w" * 64)
        yield opened
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def fsu(ledger: Ledger) -> Fsu:
    return lambda *words: CliRunner().invoke(commands, [str(word) for word in words])


@pytest.fixture
def submit(ledger: Ledger) -> Callable[[int], Any]:
    """Queues a request for one class."""

    def make(target: int) -> Any:
        behaviour = Behaviour(name=f"b{target}", kind="class", targets=(target,))
        return ledger.requests.submit("m", behaviour, f"{target}" * 64, 8, Recipe())[0]

    return make


@pytest.fixture
def missed(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> str:
    """A schedule that has missed at least two nights; its id."""
    real = rows.now
    monkeypatch.setattr(rows, "now", lambda: datetime.now(UTC) - timedelta(days=3))
    made = ledger.schedules.add("m", "0 2 * * *", "Europe/Berlin", 5, None)
    monkeypatch.setattr(rows, "now", real)
    return made.id


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cluster on which every run refuses its data; says when it began and ended, and what ran."""
    told: list[str] = []

    @contextmanager
    def on_ray(*_: Any) -> Iterator[Any]:
        def execute(order: Any, *_: Any) -> Any:
            told.append(order.targets[0].behaviour.name)
            raise InvalidData("no such data")

        told.append("up")
        yield execute
        told.append("down")

    monkeypatch.setattr(Service, "on_ray", on_ray)
    return told


def refused(result: Result, words: str) -> None:
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_schedule_from_its_making_to_its_end(fsu: Fsu, ledger: Ledger) -> None:
    added = fsu(*ADD, "--max-requests", "20", "--minutes", "240", "--by", "alice")
    assert added.exit_code == 0, added.output
    made = ledger.schedules.all()[0]
    assert (made.cron, made.timezone, made.max_requests, made.minutes) == ("0 2 * * *", "Europe/Berlin", 20, 240)
    assert made.actor == "alice"
    assert made.id in added.stdout
    shown = fsu("schedule", "list").stdout
    for words in (made.id, "0 2 * * *", "Europe/Berlin", "20", "240", "active", " 02:00 CE"):
        assert words in shown
    assert "is paused" in fsu("schedule", "pause", made.id, "--by", "bob").stdout
    assert " 02:00 CE" not in fsu("schedule", "list").stdout, "it has no next start"
    assert "is active; its next window starts at" in fsu("schedule", "resume", made.id[:8]).stdout
    assert "is removed" in fsu("schedule", "remove", made.id).stdout
    assert "there are no schedules" in fsu("schedule", "list").stdout
    assert "removed since" in fsu("schedule", "show", made.id).stdout


def test_who_does_it_comes_from_the_option_then_the_environment(
    fsu: Fsu, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsu(*ADD)
    monkeypatch.setenv("FSU_ACTOR", "team-7")
    fsu(*ADD)
    fsu(*ADD, "--by", "alice")
    assert [each.actor for each in ledger.schedules.all()] == ["operator", "team-7", "alice"]


def test_json_has_the_next_start_and_the_last_window(fsu: Fsu, ledger: Ledger) -> None:
    added = json.loads(fsu(*ADD, "--json").stdout)
    assert added["last_window"] is None
    ledger.schedules.fire(ledger.schedules.get(added["id"]), datetime(2027, 1, 1, 1, tzinfo=UTC), 2, "w", 60)
    listed = json.loads(fsu("schedule", "list", "--model", "m", "--json").stdout)[0]
    assert datetime.fromisoformat(listed["next_start"]) > datetime.now(UTC)
    assert listed["last_window"]["starts_at"] == "2027-01-01T01:00:00+00:00"
    assert "2027-01-01 02:00 CET: open, 0 done" in fsu("schedule", "list").stdout
    shown = json.loads(fsu("schedule", "show", added["id"], "--json").stdout)
    assert [each["missed"] for each in shown["windows"]] == [2]
    assert json.loads(fsu("schedule", "pause", added["id"], "--json").stdout)["next_start"] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--model", "x"], "no model 'x'"),
        (["--cron", "0 2 * *"], "five fields"),
        (["--cron", "61 2 * * *"], "bad minute"),
        (["--timezone", "Berlin"], "no time zone 'Berlin'"),
        (["--minutes", "0"], "the window ends before it starts"),
        (["--max-requests", "0"], "--max-requests 0"),
        (["--by", "Alice Smith"], "no opaque id"),
    ],
)
def test_schedules_that_cannot_be_made(fsu: Fsu, ledger: Ledger, changes: list[str], words: str) -> None:
    refused(fsu(*ADD, *changes), words)
    assert ledger.schedules.all() == []


def test_what_cannot_be_done(fsu: Fsu) -> None:
    refused(fsu("schedule", "pause", "s-none"), "no schedule 's-none'; `fsu schedule list` shows the ids")
    refused(fsu("scheduler", "--json"), "--json is for --once")
    made = json.loads(fsu(*ADD, "--json").stdout)
    assert fsu("schedule", "resume", made["id"]).exit_code == 1


def test_once_with_nothing_due_starts_nothing(fsu: Fsu, submit: Any, ray: list[str]) -> None:
    submit(1)
    fsu(*ADD)
    result = fsu("scheduler", "--once")
    assert (result.exit_code, ray) == (0, [])
    assert "no window is due" in result.stdout


def test_once_fires_what_is_due(fsu: Fsu, ledger: Ledger, submit: Any, missed: str, ray: list[str]) -> None:
    """Its results are printed as those of `fsu run`, and decide the exit code; Ray is up once for all of them."""
    for target in (1, 2):
        submit(target)
    result = fsu("scheduler", "--once")
    assert result.exit_code == 1, result.output
    assert ray == ["up", "b1", "b2", "down"]
    assert "failed b1 of m" in result.stdout
    assert f"window of schedule {missed}: 2 requests carried out, closed" in result.stdout
    assert "missed before it too" in result.stderr
    assert fsu("scheduler", "--once").exit_code == 0
    assert len(ledger.schedules.windows(missed)) == 1


def test_once_without_requests_closes_the_window_without_ray(fsu: Fsu, missed: str, ray: list[str]) -> None:
    fired = json.loads(fsu("scheduler", "--once", "--json").stdout)
    assert [(each["schedule"]["id"], each["closed"], each["results"]) for each in fired] == [(missed, True, [])]
    assert ray == []


def test_an_error_in_a_window_is_one_line_and_the_exit_code(
    fsu: Fsu, ledger: Ledger, submit: Any, missed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def no_ray(*_: Any) -> Iterator[Any]:
        raise ConnectionError("no [b]Ray there")
        yield

    monkeypatch.setattr(Service, "on_ray", no_ray)
    request = submit(1)
    result = fsu("scheduler", "--once")
    assert result.exit_code == 1
    assert f"error: schedule {missed}: ConnectionError: no [b]Ray there" in result.stderr
    assert ledger.requests.get(request.id).status is Status.QUEUED, "it was not claimed before Ray was there"
    assert json.loads(fsu("scheduler", "--once", "--json").stdout)[0]["error"] == "ConnectionError: no [b]Ray there"


_SCHEDULER = """
import signal, sys, time
from contextlib import contextmanager
from fsu_ray.service import Service
from fsu_ray.cli.schedules import scheduler_app

@contextmanager
def on_ray(*_):
    def execute(*_):
        print("running", file=sys.stderr, flush=True)
        time.sleep(60)
    yield execute

Service.on_ray = on_ray
scheduler_app()
"""


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_resident_scheduler_ends_cleanly_on_sigterm(
    ledger: Ledger, submit: Any, missed: str, home: Path, busy: bool
) -> None:
    """A request that is under way is queued again; its window is there for the next scheduler."""
    request = submit(1) if busy else None
    process = subprocess.Popen(
        [sys.executable, "-c", _SCHEDULER], cwd=home, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    guard = threading.Timer(30, process.kill)
    guard.start()
    assert process.stderr is not None
    awaited = "running" if request else "window of schedule"
    stream = process.stderr if request else process.stdout
    assert stream is not None
    assert any(awaited in line for line in stream)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    guard.cancel()
    assert (process.returncode, "Traceback" in errors) == (0, False), errors
    assert "scheduler ended" in errors
    if request:
        now = ledger.requests.get(request.id)
        assert (now.status, now.reason) == (Status.QUEUED, "interrupted")
        schedule = ledger.schedules.get(missed)
        assert ledger.schedules.resume_window(schedule, "w2", 60) is not None, "at once, not when a lease is over"


def test_every_command_has_help_and_an_example(fsu: Fsu) -> None:
    words = [["schedule", name] for name in ("add", "list", "show", "pause", "resume", "remove")]
    for command in [*words, ["scheduler"]]:
        shown = fsu(*command, "--help")
        assert shown.exit_code == 0
        assert "Example: fsu" in shown.stdout
