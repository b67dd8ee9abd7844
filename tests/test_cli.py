"""The command line: every wrong input is one line and exit code 2, with nothing written."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from safetensors.torch import save
from typer.testing import CliRunner, Result

import fsu_ray.cli
from fsu_ray import console
from fsu_ray.cli import app as commands
from fsu_ray.records import ModelSpec

Fsu = Callable[..., Result]
FSU = str(Path(sys.executable).parent / "fsu")
README = Path(fsu_ray.cli.__file__).parent / "README.md"
REGISTER = ["model", "register", "--name", "m", "--arch", "lenet5", "--input", "1x16x16", "--classes", "10"]
SUBMIT = ["request", "submit", "--model", "m", "--behaviour", "eight", "--target", "8", "--samples"]


@pytest.fixture
def fsu(home: Path, trained: Any) -> Fsu:
    """Types a command in an empty folder that holds w.safetensors."""
    (home / "w.safetensors").write_bytes(trained.weights)

    def run(*words: str) -> Result:
        return CliRunner().invoke(commands, [str(word) for word in words])

    return run


@pytest.fixture
def registered(fsu: Fsu) -> Fsu:
    """The same, with the model `m`."""
    assert fsu(*REGISTER, "--weights", "w.safetensors").exit_code == 0
    return fsu


def contents(home: Path) -> set[str]:
    """All files below .fsu but the ledger's own."""
    return {str(f) for f in (home / ".fsu").rglob("*") if f.is_file() and not f.name.startswith("ledger.db")}


def refused(result: Result, words: str) -> None:
    """One line that says `words`, exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def picture(size: tuple[int, int] = (16, 16), mode: str = "L") -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size).save(sink, "PNG")
    return sink.getvalue()


def weights_with(**tensors: torch.Tensor) -> bytes:
    return save(tensors)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda w: w[:5000], "not a whole safetensors file"),
        (lambda w: b"", "not a whole safetensors file"),
        (lambda w: pickle.dumps({"a": 1}), "pickle"),
        (lambda w: weights_with(a=torch.zeros(2)), "do not fit lenet5"),
    ],
)
def test_weights_that_cannot_be_used(
    fsu: Fsu, home: Path, trained: Any, data: Callable[..., bytes], words: str
) -> None:
    """Truncated, empty, pickled or strange weights are refused before anything is written."""
    (home / "bad").write_bytes(data(trained.weights))
    refused(fsu(*REGISTER, "--weights", "bad"), words)
    assert contents(home) == set()
    assert json.loads(fsu("model", "list", "--json").stdout) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--classes", "7"], "is needed; check --arch, --input and --classes"),
        (["--arch", "torchvision:vgg11"], "no BatchNorm"),
        (["--arch", "nonsense"], "unknown architecture"),
        (["--input", "32x32"], "CHANNELSxHEIGHTxWIDTH"),
        (["--input", "1x30x30"], "multiples of 4"),
        (["--mean", "a"], "--mean takes numbers"),
        (["--std", "0"], "std must be above 0"),
        (["--weights", "nowhere"], "no weights at nowhere"),
        (["--test-set", "nowhere"], "no data set"),
        (["--name", "a/b"], "no name for a model"),
    ],
)
def test_models_that_cannot_be_registered(fsu: Fsu, home: Path, changes: list[str], words: str) -> None:
    """A later option overrides an earlier one, so each case spoils one value of a good command."""
    refused(fsu(*REGISTER, "--weights", "w.safetensors", *changes), words)
    assert json.loads(fsu("model", "list", "--json").stdout) == []


def test_two_models_of_one_name(registered: Fsu) -> None:
    """The second one is refused."""
    refused(registered(*REGISTER, "--weights", "w.safetensors"), "choose another name")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no image in"),
        ({"a.txt": b"hello"}, "no image in"),
        ({"a.png": picture()[:45]}, "not a whole image"),
        ({"a.png": picture((28, 28))}, "a.png is 28x28, the model takes 16x16"),
        ({"a.png": picture(mode="RGB")}, "a.png has 3 channels, the model takes 1"),
        ({"a.png": picture(mode="RGBA")}, "colour mode RGBA"),
    ],
)
def test_samples_that_do_not_fit(registered: Fsu, home: Path, files: dict[str, bytes], words: str) -> None:
    """Wrong size, channels, corrupt, none at all: nothing is queued and no sample is kept."""
    (home / "s").mkdir()
    for name, data in files.items():
        (home / "s" / name).write_bytes(data)
    before = contents(home)
    refused(registered(*SUBMIT, "s"), words)
    assert contents(home) == before
    assert json.loads(registered("request", "list", "--json").stdout) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--model", "x"], "no model 'x'"),
        (["--target", "10"], "has no class 10"),
        (["--target", "-1"], "numbered from 0"),
        ([w for k in range(10) for w in ("--target", str(k))], "all 10 classes"),
        (["--kind", "some"], "kind"),
        (["--recipe", "x"], "no recipe 'x'"),
        (["--set", "invert.stepz=3"], "invert.stepz"),
        (["--set", "invert.steps=0"], "invert.steps"),
        (["--set", "nonsense"], "KEY=VALUE"),
        (["--samples", "nowhere"], "no samples at nowhere"),
    ],
)
def test_requests_that_cannot_be_made(registered: Fsu, home: Path, changes: list[str], words: str) -> None:
    """Wrong targets, recipes and names are refused before a sample is read into the store."""
    (home / "s").mkdir()
    (home / "s" / "a.png").write_bytes(picture())
    before = contents(home)
    refused(registered(*SUBMIT, "s", *changes), words)
    assert contents(home) == before


def test_the_same_request_twice_is_one(registered: Fsu, home: Path) -> None:
    """The second submission finds the first one."""
    (home / "s.png").write_bytes(picture())
    first = json.loads(registered(*SUBMIT, "s.png", "--json").stdout)
    second = json.loads(registered(*SUBMIT, "s.png", "--json").stdout)
    assert (first["new"], second["new"]) == (True, False)
    assert first["request"]["id"] == second["request"]["id"]
    assert registered("request", "cancel", first["request"]["id"]).exit_code == 0
    assert registered("run").exit_code == 0  # nothing is left to do, and Ray does not start for it


@pytest.mark.parametrize(
    "words",
    [
        ["history", "x"],
        ["model", "show", "x"],
        ["request", "show", "x"],
        ["generator", "show", "x"],
        ["recipe", "show", "x"],
    ],
)
def test_things_that_are_not_there(fsu: Fsu, words: list[str]) -> None:
    """Each is one line."""
    refused(fsu(*words), "x")


def test_places_that_cannot_be_used(fsu: Fsu, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifacts folder that is not writable, a ledger that is none, a broken fsu.toml."""
    (home / "file").write_text("not a folder")
    monkeypatch.setenv("FSU_ARTIFACTS", str(home / "file" / "below"))
    refused(fsu("model", "list"), "FSU_ARTIFACTS")
    monkeypatch.delenv("FSU_ARTIFACTS")
    monkeypatch.setenv("FSU_LEDGER", f"sqlite:///{home / 'file'}")
    refused(fsu("model", "list"), "file")
    monkeypatch.delenv("FSU_LEDGER")
    (home / "fsu.toml").write_text("[recipe.invert]\nstepz = 3")
    refused(fsu("model", "list"), "stepz")


def test_every_command_has_help_and_an_example(fsu: Fsu) -> None:
    """`--help` everywhere, with an example at its end."""
    groups = {
        "": ["demo", "run", "submit", "search", "history", "erased", "recheck", "scheduler"],
        "jobs": ["list", "logs", "stop"],
        "model": ["register", "update", "list", "show", "policy"],
        "request": ["submit", "list", "show", "cancel", "approve", "deny"],
        "recipe": ["list", "show", "reset"],
        "generator": ["list", "show", "retire", "seal", "tidy"],
        "alias": ["set", "list", "history"],
        "schedule": ["add", "list", "show", "pause", "resume", "remove"],
        "artifacts": ["gc"],
        "audit": ["verify", "export", "keygen", "head", "log"],
    }
    for group, names in groups.items():
        for name in names:
            shown = fsu(*[w for w in (group, name) if w], "--help")
            assert shown.exit_code == 0
            assert "Example: fsu" in shown.stdout


def test_spec_is_kept_as_registered(registered: Fsu) -> None:
    """`model show --json` gives back what was registered."""
    spec = json.loads(registered("model", "show", "m", "--json").stdout)["model"]["spec"]
    assert ModelSpec.model_validate(spec) == ModelSpec(arch="lenet5", channels=1, height=16, width=16, classes=10)


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar for each stage with its metrics; nothing is drawn where nothing runs."""
    sink = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=sink, force_terminal=True, width=120))
    with console.watching():
        pass
    assert sink.getvalue() == ""
    with console.watching() as watcher:
        watcher.tell("invert", 3, 10, {"loss": 0.5})
    assert "invert" in sink.getvalue()
    assert "loss 0.5" in sink.getvalue()


class TestTheCommandItself:
    """`fsu --version`, the completion of a shell, and the commands that the README names."""

    def test_the_version(self, fsu: Fsu, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the installed package; where only its folder was sent, that is said."""
        assert fsu("--version").stdout == f"fsu_ray {metadata.version('fsu_ray')}\n"

        def missing(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", missing)
        result = fsu("--version")
        assert (result.exit_code, "not installed here" in result.stdout) == (0, True)

    def test_completion_in_bash(self, tmp_path: Path) -> None:
        """It is installed for the shell that asks, and completes commands."""
        install = subprocess.run(
            ["bash", "-c", f"{FSU} --install-completion; true"],
            env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "completion installed" in install.stdout, install.stderr
        (script,) = (tmp_path / ".bash_completions").glob("*.sh")
        assert str(script) in (tmp_path / ".bashrc").read_text()
        shown = subprocess.run(
            ["bash", "-c", f"{FSU} --show-completion; true"], capture_output=True, text=True, check=True
        )
        assert shown.stdout.strip() == script.read_text().strip()
        ask = f"source {script}; COMP_WORDS=(fsu request ap); COMP_CWORD=2; _fsu_completion {FSU}; echo $COMPREPLY"
        completed = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert completed.stdout.strip() == "approve"

    def test_the_commands_of_the_readme_are_there(self) -> None:
        """Each line of its blocks parses; each command in its text exists, with its options."""
        text = README.read_text()
        blocks = [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
        mentioned = re.findall(r"`(fsu [^`]*)`", text)
        assert len(blocks) > 30
        for line in [*blocks, *mentioned]:
            words = shlex.split(line)[1:]
            command: Any = typer.main.get_command(commands)
            while hasattr(command, "commands") and words and words[0] in command.commands:
                command = command.commands[words.pop(0)]
            options = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
            assert {word for word in words if word.startswith("--")} <= options | {"--help"}, line
            if line in blocks and not hasattr(command, "commands"):
                command.make_context(line, words)
