"""`fsu submit` and `fsu jobs` where there is no cluster, and what is typed wrong; the real head is in tests/jobs."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fsu_ray.app import App
from fsu_ray.cli import app as commands
from fsu_ray.cluster.jobs import current_job

Fsu = Callable[..., Result]


@pytest.fixture
def fsu(app: App, home: Path, trained: Any, monkeypatch: pytest.MonkeyPatch) -> Fsu:
    """Types a command in a folder with the model `m`."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    app.register("m", trained.spec, trained.weights)
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
        (("--runtime-env", '{"env_vars": 3}'), "its env_vars another one"),
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
