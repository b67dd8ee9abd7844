"""`fsu audit`: what it prints, its exit codes, and that a bundle is checked without any ledger."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fsu_ray.cli.audit import audit_app, words
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, ModelSpec
from fsu_ray.service import Service

Fsu = Callable[..., Result]


@pytest.fixture
def fsu() -> Fsu:
    """Types `fsu audit ...`."""
    return lambda *typed: CliRunner().invoke(audit_app, [str(word) for word in typed])


@pytest.fixture
def kept(service: Service) -> Service:
    """A service with a model, a request, and their two artifacts."""
    spec = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)
    service.ledger.models.register("m", spec, service.artifacts.put(b"weights"))
    behaviour = Behaviour(name="nine", kind="class", targets=(9,))
    service.ledger.requests.submit("m", behaviour, service.artifacts.put(b"samples"), 8, Recipe())
    service.ledger.close()
    return service


def tamper(home: Path, sql: str) -> None:
    """Change the ledger's file as anybody can who has it."""
    connection = sqlite3.connect(home / ".fsu" / "ledger.db")
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        connection.execute(f"DROP TRIGGER {name}")
    connection.execute(sql)
    connection.commit()
    connection.close()


def failed(result: Result, code: int, said: str) -> None:
    """One line that begins with `said`, that exit code, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith(f"error: {said}"), result.stderr
    assert result.stderr.count("\n") == 1


def test_a_good_ledger(fsu: Fsu, kept: Service) -> None:
    head = fsu("head").stdout.strip()
    assert head.startswith("5:")
    good = fsu("verify")
    assert good.exit_code == 0
    assert "5 events and 2 artifacts are as they were written" in good.stdout
    assert f"head {head}" in good.stdout
    assert "no artifacts" in fsu("verify", "--no-artifacts").stdout
    assert fsu("verify", "--head", head).exit_code == 0
    found = json.loads(fsu("verify", "--json").stdout)
    seconds = found.pop("seconds")
    assert seconds > 0
    assert found == {
        "good": True, "events": 5, "head": head, "waiting": 0, "artifacts": 2, "found": 0, "findings": [],
    }  # fmt: skip
    assert json.loads(fsu("head", "--json").stdout) == {"seq": 5, "hash": head[2:]}


def test_a_ledger_that_was_tampered_with(fsu: Fsu, kept: Service, home: Path) -> None:
    """The first bad row is named, in one line, with exit code 3."""
    head = fsu("head").stdout.strip()
    tamper(home, "UPDATE audit_events SET actor = 'somebody' WHERE seq = 3")
    failed(fsu("verify"), 3, "audit_events 3: its hash is not that of its content\n")
    tamper(home, "DELETE FROM audit_events WHERE seq = 5")
    failed(fsu("verify", "--head", head), 3, "audit_events 3: its hash is not that of its content (and 2 more)\n")
    spoiled = fsu("verify", "--json")
    assert spoiled.exit_code == 3
    found = json.loads(spoiled.stdout)
    assert (found["good"], found["found"]) == (False, 2)
    assert found["findings"][0] == "audit_events 3: its hash is not that of its content"
    failed(fsu("export", "--out", "a"), 3, "audit_events 3: its hash")
    assert not (home / "a").exists()


def test_artifacts_are_read(fsu: Fsu, kept: Service, home: Path) -> None:
    digest = kept.ledger.models.version("m").weights
    Path(kept.artifacts.path(digest)).write_bytes(b"others")
    failed(fsu("verify"), 3, f"artifact {digest}: its content is not that of its name\n")
    kept.artifacts.delete(digest)
    failed(fsu("verify"), 3, f"artifact {digest}: missing\n")
    assert fsu("verify", "--no-artifacts").exit_code == 0


def test_a_bundle_needs_no_ledger(fsu: Fsu, kept: Service, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public = fsu("keygen", "--out", "key.pem").stdout
    (home / "public.pem").write_text(public)
    for form in ("jsonl", "parquet"):
        made = fsu("export", "--format", form, "--out", f"a.{form}", "--key", "key.pem", "--model", "m")
        assert made.exit_code == 0, made.output
        assert f"a.{form}: 5 events, signed, head 5:" in made.stdout
    failed(fsu("export", "--out", "a.jsonl"), 2, "a.jsonl exists already; give another --out, or --force\n")
    manifest = json.loads(fsu("export", "--out", "a.jsonl", "--force", "--json").stdout)
    assert manifest["events"] == 5

    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("FSU_LEDGER", "nonsense://")
    monkeypatch.setenv("FSU_WORKERS", "many")
    assert fsu("keygen", "--out", "k.pem").exit_code == 0
    (elsewhere / "k.pem").unlink()
    good = fsu("verify", "--bundle", "../a.parquet", "--public-key", "../public.pem", "--head", f"5:{manifest['head']}")
    assert good.exit_code == 0, good.output
    for said in ("5 events", "5 of them of m", "signed with the key given", "it does not prove", "not a guarantee"):
        assert said in good.stdout
    assert json.loads(fsu("verify", "--bundle", "../a.jsonl", "--json").stdout)["signature"] == "not signed"
    failed(fsu("verify", "--bundle", "../a.jsonl", "--public-key", "../public.pem"), 3, "the manifest of the bundle is")
    text = (home / "a.jsonl").read_text()
    (elsewhere / "cut").write_text(text[: len(text) * 2 // 3])
    failed(fsu("verify", "--bundle", "cut"), 3, "the bundle ends after event 2 of 5\n")
    (elsewhere / "cut").unlink()
    assert list(elsewhere.iterdir()) == []


def test_wrong_words(fsu: Fsu, kept: Service, home: Path) -> None:
    (home / "x").write_text("hello\n")
    failed(fsu("verify", "--bundle", "x"), 2, "x is no bundle of `fsu audit export`\n")
    failed(fsu("verify", "--bundle", "nowhere"), 2, "bundle nowhere cannot be read (No such file or directory)\n")
    failed(fsu("verify", "--head", "5"), 2, "'5' is no head of a chain: give SEQ:HASH as `fsu audit head` prints it\n")
    failed(fsu("verify", "--public-key", "x"), 2, "--public-key goes with --bundle\n")
    failed(fsu("export", "--out", "y", "--key", "x"), 2, "x is no Ed25519 private key in PEM")
    failed(fsu("export", "--out", "y", "--model", "z"), 2, "no model 'z'")
    failed(fsu("export", "--out", "no/folder"), 2, "no/folder cannot be written (No such file or directory)")
    failed(fsu("keygen", "--out", "x"), 2, "x exists already; a key is never overwritten\n")
    failed(fsu("log", "--model", "z"), 2, "no model 'z'")
    failed(fsu("log", "--request", "z"), 2, "no request 'z'")


def test_the_log_says_in_words_what_happened(fsu: Fsu, kept: Service) -> None:
    shown = fsu("log").stdout
    for said in (
        "model registered: lenet5, 10 classes",
        "version 1, weights",
        "asked to erase nine (class 9), 8 samples",
        "request to submitted, attempt 0",
        "request from submitted to queued",
    ):
        assert said in shown
    request = kept.ledger.requests.all()[0].id
    events = json.loads(fsu("log", "--request", request[:12], "--json").stdout)
    assert [event["event"] for event in events] == ["submitted", "request_submitted", "request_queued"]
    assert events[0]["detail"]["row"]["sample_count"] == 8
    assert [event["seq"] for event in json.loads(fsu("log", "--model", "m", "--last", 2, "--json").stdout)] == [4, 5]


def test_a_log_that_was_tampered_with_is_still_shown(fsu: Fsu, kept: Service, home: Path) -> None:
    tamper(home, "UPDATE audit_events SET detail = '[/red]', event = '[/red]' WHERE seq = 3")
    shown = fsu("log")
    assert shown.exit_code == 0, shown.output
    assert "[/red]" in shown.stdout


def test_every_event_has_words(kept: Service) -> None:
    """An event that is not known, or has other columns than it has today, is named all the same."""
    assert all(words(event.event, json.loads(event.detail)) for event in kept.ledger.audit.log())
    assert words("moved_away", {"row": {"id": "z-1"}}) == "moved away z-1"
    assert words("erased", {"row": {"id": "e-1"}}) == "erased e-1"
    assert words("erased", {}) == "erased"


def test_every_command_has_help_and_an_example(fsu: Fsu) -> None:
    for name in ("verify", "export", "keygen", "head", "log"):
        shown = fsu(name, "--help")
        assert shown.exit_code == 0
        assert f"Example: fsu audit {name}" in shown.stdout


def test_openssl_makes_keys_too(fsu: Fsu, kept: Service, home: Path) -> None:
    """A key is plain PEM: whoever has another tool may use it."""
    try:
        subprocess.run(
            ["openssl", "genpkey", "-algorithm", "ed25519", "-out", "o.pem"], check=True, capture_output=True
        )
        subprocess.run(["openssl", "pkey", "-in", "o.pem", "-pubout", "-out", "p.pem"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl that makes Ed25519 keys")
    assert os.path.getsize("o.pem")
    assert fsu("export", "--out", "a", "--key", "o.pem").exit_code == 0
    assert "signed with the key given" in fsu("verify", "--bundle", "a", "--public-key", "p.pem").stdout


def test_a_ledger_without_anything_in_it_is_not_called_good(home: Path) -> None:
    """It is more likely that FSU_LEDGER or FSU_HOME names another one than was meant."""
    result = CliRunner().invoke(audit_app, ["verify"])
    assert result.exit_code == 2
    assert "the ledger is empty" in result.stderr
