"""`fsu submit` and `fsu jobs` where there is no cluster, and what is typed wrong; the real head is in tests/jobs."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from fsu_ray.cli import app as commands
from fsu_ray.cli.jobs import _goes_on
from fsu_ray.cluster import jobs as ray_jobs
from fsu_ray.cluster.jobs import current_job
from fsu_ray.errors import RunFailed
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour
from fsu_ray.service import Service
from jobs import unlearn

Fsu = Callable[..., Result]


@pytest.fixture
def fsu(service: Service, home: Path, trained: Any, monkeypatch: pytest.MonkeyPatch) -> Fsu:
    """Types a command in a folder with the model `m`."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    service.models.register("m", trained.spec, trained.weights)
    return lambda *words: CliRunner().invoke(commands, list(words))


def refused(result: Result, words: str, code: int = 2) -> None:
    """One line that says `words`, no traceback."""
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def nowhere() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("words", [("submit",), ("jobs", "list"), ("jobs", "logs", "j"), ("jobs", "stop", "j")])
def test_a_head_that_is_not_there(fsu: Fsu, nowhere: str, words: tuple[str, ...]) -> None:
    refused(fsu(*words, "--address", nowhere), f"no head answers at {nowhere}")


def test_a_head_that_never_answers(fsu: Fsu, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts the connection and is silent: that ends too, and the queue of `fsu run` does not wait for it."""
    monkeypatch.setattr(ray_jobs, "JobsClient", partial(ray_jobs.JobsClient, answer_seconds=(1, 1)))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        refused(fsu("jobs", "list", "--address", address), f"no head answers at {address}")


@pytest.mark.parametrize(
    ("status", "exit_code", "begun", "ends", "said"),
    [
        ("SUCCEEDED", 0, True, 0, ""),
        ("FAILED", 4, True, 4, ""),
        ("FAILED", -9, True, 1, "was killed (signal 9)"),
        ("FAILED", None, True, 1, "broke: RuntimeError: the supervisor died"),
        ("FAILED", None, False, 1, "could not begin: RuntimeError: the supervisor died"),
        ("STOPPED", None, True, 1, "was stopped"),
    ],
)
@pytest.mark.parametrize("breaks", [False, True])
def test_who_waits_ends_as_the_job(
    fsu: Fsu, service: Service, monkeypatch: pytest.MonkeyPatch, breaks: bool,
    status: str, exit_code: int | None, begun: bool, ends: int, said: str,
) -> None:  # fmt: skip
    """With its exit code, or with what happened to it; a connection that breaks on the way changes nothing."""
    over = ray_jobs.Job("j", status, {}, "", None, None, exit_code, "RuntimeError: the supervisor died", begun)

    class Ending:
        """Stands for a head whose job is over."""

        mark = "0" * 8

        def submit(self, *_: object) -> tuple[ray_jobs.Job, bool]:
            return over, True

        def follow(self, name: str) -> Iterator[str]:
            yield "at work\n"
            if breaks:
                raise RunFailed("the connection broke")

        def wait(self, name: str) -> ray_jobs.Job:
            return over

    service.ledger.requests.submit("m", Behaviour(name="nine", kind="class", targets=(9,)), "0" * 64, 8, Recipe())
    monkeypatch.setattr(ray_jobs, "JobsClient", lambda address: Ending())
    result = fsu("submit", "--address", "http://h:1", "--wait", "--json")
    assert result.exit_code == ends, result.output
    assert said in result.stderr
    assert ("cannot be followed" in result.stderr) == breaks


@pytest.mark.parametrize("words", [("--max", "0"), ("--max", "-1"), ("--workers", "0"), ("--max", "some")])
def test_numbers_of_jobs_unlearn(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no number from 1 on is refused before anything is claimed."""
    monkeypatch.setattr("sys.argv", ["jobs.unlearn", *words])
    with pytest.raises(SystemExit) as ended:
        unlearn.main()
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("command", "order"),
    [
        ("run", ["looks for dead jobs", "carries out"]),
        ("jobs.unlearn", ["looks for dead jobs", "carries out"]),
        ("scheduler", ["looks for dead jobs"]),  # no schedule is due
    ],
)
def test_whoever_carries_out_looks_for_dead_jobs_first(
    fsu: Fsu, service: Service, monkeypatch: pytest.MonkeyPatch, command: str, order: list[str]
) -> None:
    """So what a dead job had is among what is ready."""
    service.ledger.requests.submit("m", Behaviour(name="nine", kind="class", targets=(9,)), "0" * 64, 8, Recipe())
    seen: list[str] = []
    monkeypatch.setattr(Service, "reconcile", lambda *_: seen.append("looks for dead jobs"))
    monkeypatch.setattr(Service, "on_ray", lambda *_, **__: nullcontext())
    monkeypatch.setattr(Service, "carry_out", lambda *_, **__: seen.append("carries out") or [])
    if command == "jobs.unlearn":
        monkeypatch.setattr("sys.argv", ["jobs.unlearn"])
        with pytest.raises(SystemExit):
            unlearn.main()
    else:
        fsu(*([command] if command == "run" else [command, "--once"]))
    assert seen == order


def test_which_cluster_must_be_said(fsu: Fsu) -> None:
    refused(fsu("jobs", "list"), "say which cluster: --address")


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://h:10001", "http://", "http://me:secret@h:8265", "x"])
def test_an_address_that_is_none(fsu: Fsu, address: str) -> None:
    result = fsu("jobs", "list", "--address", address)
    refused(result, "--address takes the URL of a head's Jobs API")
    assert "secret" not in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--runtime-env", "{'pip'"), "--runtime-env takes JSON"),
        (("--runtime-env", "[1]"), "takes a JSON object"),
        (("--runtime-env", '{"env_vars": 3}'), "env_vars takes a JSON object of texts and numbers"),
        (("--runtime-env", '{"env_vars": {"A": null}}'), "env_vars takes a JSON object of texts and numbers"),
        (("--runtime-env", '{"py_modules": null}'), "py_modules takes a list of texts"),
        (("--runtime-env", '{"py_modules": "s3://b/x.zip"}'), "py_modules takes a list of texts"),
        (("--runtime-env", '{"excludes": [3]}'), "excludes takes a list of texts"),
        (("--model", "nobody"), "nobody"),
    ],
)
def test_wrong_words_are_refused_before_a_head_is_asked(fsu: Fsu, nowhere: str, words: Any, said: str) -> None:
    refused(fsu("submit", "--address", nowhere, *words), said)


def test_a_job_on_another_ledger_says_so(fsu: Fsu) -> None:
    """`fsu run --expect`, as a job is sent: silence would look like a queue that is empty."""
    refused(fsu("run", "--expect", "r-0123456789abcdef012"), "it is not that of the sender")


def test_the_job_that_a_driver_runs_as(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "RAY_JOB_CONFIG_JSON_ENV_VAR"
    for value in ("", "no json", "[]", "{}", '{"metadata": null}', '{"metadata": {"job_submission_id": 3}}'):
        monkeypatch.setenv(name, value)
        assert current_job() is None
    monkeypatch.setenv(name, json.dumps({"metadata": {"job_submission_id": "fsu-r-1-1"}}))
    assert current_job() == "fsu-r-1-1"


def test_ray_need_not_be_asked_where_no_job_runs(fsu: Fsu, nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fsu run` with RAY_ADDRESS looks for dead jobs only if the ledger says that one runs."""
    monkeypatch.setenv("RAY_ADDRESS", nowhere.removeprefix("http://"))
    result = fsu("run")
    assert result.exit_code == 0, result.output
    assert "nothing is queued" in result.stdout


def test_an_interrupt_in_the_midst_of_what_is_awaited_is_one_line(
    recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the interrupt comes before aiohttp awaits what it has begun, nobody hears of that."""

    async def read() -> None: ...

    def watch() -> None:
        with _goes_on("fsu-1"):
            read()
            raise KeyboardInterrupt

    with pytest.raises(typer.Exit):
        watch()
    assert capsys.readouterr().err.startswith("interrupted: job fsu-1 goes on")
    assert not recwarn.list
