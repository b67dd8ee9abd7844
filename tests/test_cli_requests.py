"""`fsu request`, `fsu generator`, `fsu artifacts`: terms, deadlines, approvals, what is destroyed."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from fsu_ray.cli import app as commands
from fsu_ray.method.datasets import draw, write_samples
from fsu_ray.method.unlearn import unlearn
from fsu_ray.pipeline import run_request
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Policy
from fsu_ray.service import Service

Fsu = Callable[..., Result]


@pytest.fixture
def fsu(service: Service, home: Path, trained: Any, monkeypatch: pytest.MonkeyPatch) -> Fsu:
    """Types a command in a folder with the model `m` and the image s.png."""
    monkeypatch.delenv("FSU_ACTOR", raising=False)
    service.models.register("m", trained.spec, trained.weights)
    sink = io.BytesIO()
    Image.new("L", (16, 16)).save(sink, "PNG")
    (home / "s.png").write_bytes(sink.getvalue())

    def run(*words: str) -> Result:
        return CliRunner().invoke(commands, [str(word) for word in words])

    return run


def submit(fsu: Fsu, target: int, *more: str) -> Result:
    name = f"class-{target}"
    words = ["request", "submit", "--model", "m", "--behaviour", name, "--target", target, "--samples", "s.png", *more]
    return fsu(*words)


def refused(result: Result, words: str, code: int = 2) -> None:
    """One line that says `words`, no traceback."""
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_terms_are_kept(fsu: Fsu, service: Service) -> None:
    """Times in local time or from now, a key, a priority, who asks."""
    made = submit(fsu, 8, "--key", "t-1", "--priority", 7, "--not-before", "+2h", "--due", "2031-05-06T07:00")
    assert made.exit_code == 0, made.output
    (request,) = service.ledger.requests.all()
    assert (request.key, request.priority, request.requested_by) == ("t-1", 7, None)
    assert request.not_before is not None
    assert abs(request.not_before - datetime.now(UTC) - timedelta(hours=2)) < timedelta(minutes=1)
    assert request.due_at == datetime(2031, 5, 6, 7).astimezone()
    again = submit(fsu, 8, "--key", "t-1")
    assert f"the same request is already queued: {request.id}" in again.stdout
    refused(submit(fsu, 4, "--key", "t-1"), "which asks for something else")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--not-before", "soon"], "--not-before takes a time such as"),
        (["--due", "2027-13-01"], "--due takes a time such as"),
        (["--not-before", "+2h", "--due", "+1h"], "due_at must be later than not_before"),
        (["--priority", "9999"], "priority"),
        (["--key", "two words"], "key"),
        (["--by", "bob@example.org"], "requested_by"),
    ],
)
def test_terms_that_cannot_be(fsu: Fsu, service: Service, more: list[str], words: str) -> None:
    """Nothing is queued."""
    refused(submit(fsu, 8, *more), words)
    assert service.ledger.requests.all() == []


def test_monitoring_sees_what_is_overdue(fsu: Fsu) -> None:
    """Exit code 5, and only what has not ended."""
    submit(fsu, 8, "--due", "2020-01-01")
    submit(fsu, 3)
    late = fsu("request", "list", "--overdue")
    assert late.exit_code == 5
    assert "class-8" in late.stdout
    assert "class-3" not in late.stdout
    (found,) = json.loads(fsu("request", "list", "--overdue", "--json").stdout)
    assert "overdue" in fsu("request", "list").stdout
    assert fsu("request", "cancel", found["id"]).exit_code == 0
    assert fsu("request", "list", "--overdue").exit_code == 0
    refused(fsu("request", "cancel", found["id"]), "only one that has not ended can be cancelled", 1)


def test_approval_is_somebody_elses(fsu: Fsu, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requester is refused, nobody is refused, another one is heard."""
    service.ledger.models.set_policy("m", Policy(approval=True))
    refused(submit(fsu, 8), "say who asks")
    monkeypatch.setenv("FSU_ACTOR", "alice")
    made = submit(fsu, 8)
    assert "awaits approval" in made.stdout
    (request,) = service.ledger.requests.all()
    refused(fsu("request", "approve", request.id), "somebody else must decide")
    monkeypatch.delenv("FSU_ACTOR")
    refused(fsu("request", "approve", request.id), "say who decides")
    assert "queued" in fsu("request", "approve", request.id, "--by", "bob").stdout
    shown = fsu("request", "show", request.id).stdout
    assert "bob" in shown
    submit(fsu, 3, "--by", "alice")
    denied = service.ledger.requests.all()[-1]
    assert "rejected" in fsu("request", "deny", denied.id, "--by", "bob").stdout


def erased(service: Service, trained: Any, quick: Recipe, home: Path) -> str:
    """Class 8 is erased from `m`, with the method in this process; the generator."""
    write_samples(trained.train.pixels[draw(trained.train, [8], 6, 0)], home / "eights")
    service.requests.submit("m", Behaviour(name="class-8", kind="class", targets=(8,)), str(home / "eights"), quick)
    request = service.ledger.requests.claim("tester", 60)
    assert request is not None

    def here(order: Any, store: Any, name: str, stop: threading.Event) -> Any:
        return unlearn(order, store, torch.device("cpu"))

    run_request(service.ledger, service.artifacts, here, request)
    return service.ledger.generators.all("m")[0].id


def test_what_is_destroyed_says_what_that_costs(
    fsu: Fsu, service: Service, trained: Any, quick: Recipe, home: Path
) -> None:
    """Tidy, seal, retire, collect: each says what it did, and a second time that there is nothing to do."""
    generator = erased(service, trained, quick, home)
    assert "in use" in fsu("generator", "list").stdout
    assert "nothing is due" in fsu("generator", "tidy").stdout
    assert "samples_days    0.0" in fsu("model", "policy", "m", "--samples-days", "0").stdout
    assert "purged the samples" in fsu("generator", "tidy", "--model", "m").stdout
    sealed = fsu("generator", "seal", generator, "--by", "alice")
    assert "as of version 2" in sealed.stdout, sealed.output
    assert "sealed as of version 2" in fsu("generator", "show", generator).stdout
    refused(fsu("generator", "seal", generator), "is sealed already")
    retired = fsu("generator", "retire", generator, "--by", "alice")
    assert "trains anew: this one took" in retired.stdout, retired.output
    assert "(deleted)" in fsu("generator", "show", generator).stdout
    refused(fsu("generator", "retire", generator), "is retired already")

    stray = service.artifacts.put(b"nobody's")
    dry = fsu("artifacts", "gc", "--dry-run", "--older-than", "0")
    assert stray in dry.stdout
    assert "would be deleted" in dry.stdout
    assert service.artifacts.has(stray)
    assert fsu("artifacts", "gc").stdout == "nothing to delete\n", "it is not a day old"
    assert json.loads(fsu("artifacts", "gc", "--older-than", "0", "--json").stdout)["deleted"]
    assert not service.artifacts.has(stray)
    refused(fsu("generator", "retire", "g-none"), "no generator 'g-none'")
    refused(fsu("generator", "tidy", "--model", "x"), "no model 'x'")
