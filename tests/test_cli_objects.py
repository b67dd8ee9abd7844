"""The command line with its artifacts in a bucket: audit, garbage, and what is said of a bucket that is not right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fsu_ray.cli import app as commands
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, ModelSpec
from fsu_ray.service import Service, connect

Fsu = Callable[..., Result]
SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)


@pytest.fixture
def fsu(home: Path) -> Fsu:
    """Types a command in an empty folder."""
    return lambda *typed: CliRunner().invoke(commands, [str(word) for word in typed])


@pytest.fixture
def service(home: Path, s3_bucket: Any, monkeypatch: pytest.MonkeyPatch) -> Service:
    """A service with its artifacts in a bucket: a model and a request, of two artifacts."""
    monkeypatch.setenv("FSU_ARTIFACTS", s3_bucket.uri())
    service = connect()
    service.ledger.models.register("m", SPEC, service.artifacts.put(b"weights"))
    behaviour = Behaviour(name="nine", kind="class", targets=(9,))
    service.ledger.requests.submit("m", behaviour, service.artifacts.put(b"samples"), 8, Recipe())
    return service


def test_the_audit_reads_the_bucket(service: Service, fsu: Fsu, s3_bucket: Any) -> None:
    """Good, then damaged, then missing."""
    good = fsu("audit", "verify")
    assert (good.exit_code, "2 artifacts" in good.stdout) == (0, True), good.output
    digest = service.ledger.models.version("m").weights
    s3_bucket.write(f"{digest[:2]}/{digest}", b"WEIGHTS")
    damaged = fsu("audit", "verify")
    assert (damaged.exit_code, f"{digest}: its content is not that of its name" in damaged.stderr) == (3, True)
    assert service.artifacts.delete(digest)
    missing = fsu("audit", "verify")
    assert (missing.exit_code, f"{digest}: missing" in missing.stderr) == (3, True)


def test_garbage_is_collected_from_the_bucket(service: Service, fsu: Fsu, s3_bucket: Any) -> None:
    """What nobody refers to and what killed writers have left; checkpoints and what is needed stay."""
    before = set(s3_bucket.names())
    stray = service.artifacts.put(b"nobody's")
    s3_bucket.write("ab/.writing-0123", b"half")
    s3_bucket.write("runs/r-1/checkpoint_1/state.pt", b"a checkpoint")
    s3_bucket.write("runs/search-0123456789abcdef/t/state.pt", b"a trial")

    assert "nothing to delete" in fsu("artifacts", "gc").stdout, "they are not old"
    dry = json.loads(fsu("artifacts", "gc", "--older-than", 0, "--dry-run", "--json").stdout)
    unfinished, checkpoints = {"ab/.writing-0123": 4}, {"search-0123456789abcdef": 7}
    expected = {"stray": {stray: 8}, "late": {}, "unfinished": unfinished, "checkpoints": checkpoints}
    assert dry == {"deleted": False, **expected}
    assert service.artifacts.has(stray)
    done = fsu("artifacts", "gc", "--older-than", 0)
    assert (done.exit_code, "3 in all, 19 bytes: deleted" in done.stdout) == (0, True), done.output
    assert set(s3_bucket.names()) == before | {"runs/r-1/checkpoint_1/state.pt"}


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("s3://no-such-bucket/p?{options}", "The specified bucket does not exist"),
        ("s3://AKIAKEY:hunter2@bucket/p?{options}", "take them out: they come from the environment"),
        ("s3://bucket/p?secret_key=hunter2&{options}", "take them out: they come from the environment"),
        ("s3://bucket/p?surplus=1&{options}", "unknown option 'surplus'; it takes region"),
        ("s3://", "names no bucket; give s3://BUCKET/PREFIX"),
        ("nosuch://place", "is not understood"),
    ],
)
def test_a_place_that_cannot_be_used(
    fsu: Fsu, s3_server: str, monkeypatch: pytest.MonkeyPatch, location: str, words: str
) -> None:
    """One line, exit code 2, no secret."""
    options = f"endpoint_override={s3_server}&scheme=http"
    monkeypatch.setenv("FSU_ARTIFACTS", location.format(options=options))
    refused = fsu("model", "list")
    assert refused.exit_code == 2, refused.output
    assert words in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert "hunter2" not in refused.output
    assert "Traceback" not in refused.output


def test_checkpoints_that_cannot_be_written(service: Service, fsu: Fsu, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before Ray starts, and the request stays in the queue."""
    monkeypatch.setenv("FSU_RUNS", service.settings.runs.replace("://", "://no-such-"))
    refused = fsu("run")
    assert refused.exit_code == 2, refused.output
    assert "checkpoints s3://no-such-bucket" in refused.stderr
    assert "set FSU_RUNS to" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert [request.status for request in service.ledger.requests.all("m")] == ["queued"]
