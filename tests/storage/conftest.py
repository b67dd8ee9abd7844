"""A real ledger in a temporary folder, and what it takes to fill it."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fsu_ray.storage
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, ModelSpec, ModelVersion, Outcome, Request
from fsu_ray.storage.ledger import Ledger, open_ledger

SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)


def digest(text: str) -> str:
    """A digest that stands for an artifact."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Line:
    """A ledger with one model in it, and short words for what tests do to it."""

    ledger: Ledger
    file: Path
    name: str = "digits"

    def submit(self, name: str = "nine", *targets: int, kind: Any = "class", recipe: Recipe | None = None) -> Request:
        behaviour = Behaviour(name=name, kind=kind, targets=targets or (9,))
        return self.ledger.submit(self.name, behaviour, digest(f"samples of {name}"), 8, recipe or Recipe())[0]

    def claim(self, worker: str = "w1", lease: float = 60.0) -> Request:
        request = self.ledger.claim(worker, lease, self.name)
        assert request is not None
        return request

    def outcome(self, request: Request, **changes: Any) -> Outcome:
        known = {
            "reason": None,
            "generator_use": "trained",
            "generator_weights": digest(f"generator of {request.id}"),
            "dataset": digest(f"dataset of {request.id}"),
            "figures": {"agreement": 0.99, "starved": []},
            "refused": (),
            "weights": digest(f"weights of {request.id}"),
            "mask": digest(f"mask of {request.id}"),
            "probes": digest(f"probes of {request.id}"),
            "report": {"forgetting": {"probes_in_target": 0.01}, "retention": {"agreement": 0.98}},
            "seconds": {"invert": 60.0},
        }
        return Outcome(**{**known, **changes})

    def erase(self, name: str = "nine", *targets: int, kind: Any = "class", **changes: Any) -> ModelVersion:
        """Take a behaviour all the way: submitted, claimed, committed."""
        generator = changes.pop("generator_id", None), changes.pop("warm_started_from", None)
        self.submit(name, *targets, kind=kind, recipe=changes.pop("recipe", None))
        request = self.claim()
        return self.ledger.commit(
            request,
            self.outcome(request, **changes),
            self.ledger.version(self.name),
            generator_id=generator[0],
            warm_started_from=generator[1],
        )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(file: Path) -> Iterator[Ledger]:
    with open_ledger(f"sqlite:///{file}") as opened:
        yield opened


@pytest.fixture
def new_line(ledger: Ledger, file: Path) -> Callable[..., Line]:
    """Registers a model, its spec with some changes, and gives its line."""

    def make(name: str, **changes: Any) -> Line:
        ledger.register_model(name, SPEC.model_copy(update=changes), digest("weights"), "digits")
        return Line(ledger, file, name)

    return make


@pytest.fixture
def line(new_line: Callable[..., Line]) -> Line:
    return new_line("digits")


@pytest.fixture
def raw(file: Path, ledger: Ledger) -> Iterator[sqlite3.Connection]:
    """A plain connection to the ledger's file, as any program may open it: no pragma of ours is set."""
    connection = sqlite3.connect(file, isolation_level=None)
    yield connection
    connection.close()


@pytest.fixture
def in_processes() -> Callable[..., list[str]]:
    """Run a script in several real processes at once; gives what each printed."""

    def run(script: str, *arguments: str, processes: int) -> list[str]:
        root = Path(fsu_ray.storage.__file__).parents[2]
        # Each says that it is ready and waits, so that they all begin at one moment.
        gate = "import sys; print('ready', flush=True); sys.stdin.readline()\n"
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "error", "-c", f"{_IMPORTS}{gate}{script}", *arguments, str(number)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(root)},
            )
            for number in range(processes)
        ]
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=120) for process in started]
        for process, (_, errors) in zip(started, answers, strict=True):
            assert process.returncode == 0, errors
        return [output for output, _ in answers]

    return run


_IMPORTS = "from fsu_ray.storage.ledger import open_ledger\n"
