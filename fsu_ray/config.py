"""Every setting and every preset once. Read when asked for, never at import.

Settings come from the environment (`FSU_HOME`, `FSU_LEDGER`, `FSU_ARTIFACTS`, `FSU_RUNS`, `FSU_WORKERS`), then
`fsu.toml` in the working folder, then the defaults: everything in `.fsu/` below the working folder, and Ray's
checkpoints below the artifacts where these are in a bucket. Unknown keys are refused.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from fsu_ray.errors import InvalidConfig
from fsu_ray.recipes import Recipe, first_fault

MOST_FAILURES = 3
"""A request whose run has broken this often, or whose worker has vanished, ends as failed."""

CHECKPOINT_STEPS = 100
"""Inversion steps between two checkpoints."""


@dataclass(frozen=True)
class Timings:
    """How long the parts of the system wait, in seconds. Tests pass shorter times.

    `lease`: how long a claim holds without a heartbeat; the driver renews it after a third of that. `poll`: how often
    the driver checks whether a running request is to be cancelled. `ledger_wait`: how long the end of a run waits for a
    ledger whose database is away. `halt`: how long parallel runs have for their next step after an interrupt. `lock`:
    how long a connection waits for another's write lock on the ledger. `backoff`: how long a request waits after its
    first failure; each further failure doubles it. `flush`: how long a step of a request waits for the audit chain.
    `abandoned`: how often a worker looks for requests that nobody may take over. `scheduler_pass`: how often a resident
    scheduler looks at the schedules at least.
    """

    lease: float = 120.0
    poll: float = 2.0
    ledger_wait: float = 900.0
    halt: float = 40.0
    lock: float = 30.0
    backoff: float = 30.0
    flush: float = 1.0
    abandoned: float = 5.0
    scheduler_pass: float = 30.0


# Literal presets: what differs from the defaults of `records.Recipe`.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Small images with little detail, e.g. scikit-learn's digits: what `fsu demo` uses.
    "digits": {
        "invert": {"steps": 400, "batch": 120},
        "synthesize": {"per_class": 200},
        "relearn": {"epochs": 20, "lr": 0.003},
    },
    # Networks with many BatchNorm layers, whose statistics would drown the other losses. By that entropy weight D' is
    # surer of its classes, also where a sample looks like two of them.
    "deep": {
        "invert": {
            "steps": 1000,
            "weights": {"bn": 3.0, "entropy": 3.0, "augmentation": 1.0, "diversity": 1.0, "tv": 0.06},
        },
        "filter": {"runner_up": 0.05},
    },
    # Networks with dozens of BatchNorm layers, e.g. ResNet-50's 53: a BN loss that does not grow with them.
    "very-deep": {
        "invert": {
            "steps": 400,
            "form": "relative",
            "weights": {"bn": 120.0, "entropy": 3.0, "augmentation": 1.0, "diversity": 1.0, "tv": 0.06},
        },
        "filter": {"runner_up": 0.05},
    },
    # Section 4 and appendix C.4: squared losses, its weights, labels of the current version, its filter.
    "paper": {
        "form": "paper",
        "invert": {
            "steps": 7000,
            "width": 16,
            "form": "squared",
            "weights": {"bn": 10.0, "entropy": 1.0, "augmentation": 0.03, "diversity": 1.0, "tv": 3.0},
        },
        "synthesize": {"entropy_threshold": 0.5},
        "filter": {"policy": "knee", "runner_up": 0.0},
        "relearn": {"repeats": 0, "lr": 0.003, "augment": "all"},
    },
}


@dataclass(frozen=True)
class Settings:
    """Where things lie: `ledger` is a SQLAlchemy URL, `artifacts` and `runs` (Ray's checkpoints) a folder or URI; and
    how many `workers` a run has."""

    home: Path
    ledger: str
    artifacts: str
    runs: str
    recipe: dict[str, Any]
    workers: int = 1


def read_settings(folder: Path | None = None) -> Settings:
    """The settings for `folder` (the working folder); raises InvalidConfig for a file that does not parse."""
    folder = (folder or Path.cwd()).resolve()
    file = folder / "fsu.toml"
    table: dict[str, Any] = {}
    if file.exists():
        try:
            table = tomllib.loads(file.read_text())
        except (tomllib.TOMLDecodeError, OSError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"{file} does not parse: {error}") from None
    known = {"home", "ledger", "artifacts", "runs", "recipe", "workers"}
    surplus = sorted(table.keys() - known)
    if surplus:
        raise InvalidConfig(f"{file} has the unknown key {surplus[0]!r}; it takes {', '.join(sorted(known))}")
    for key in known - {"recipe", "workers"}:
        if not isinstance(table.get(key, ""), str):
            raise InvalidConfig(f"{file}: {key} must be a string")
    home = (folder / Path(os.environ.get("FSU_HOME") or table.get("home") or ".fsu").expanduser()).resolve()
    ledger = os.environ.get("FSU_LEDGER") or table.get("ledger") or sqlite_url(home / "ledger.db")
    artifacts = _place(folder, os.environ.get("FSU_ARTIFACTS") or table.get("artifacts") or str(home / "artifacts"))
    runs = os.environ.get("FSU_RUNS") or table.get("runs") or _runs_beside(artifacts, home)
    recipe = table.get("recipe", {})
    if not isinstance(recipe, dict):
        raise InvalidConfig(f"{file}: recipe must be a table")
    make_recipe("default", [recipe])
    workers = os.environ.get("FSU_WORKERS") or table.get("workers", 1)
    if not re.fullmatch(r"[1-9][0-9]{0,3}", str(workers)):
        raise InvalidConfig(f"workers must be a number from 1 on, not {workers!r}: mend FSU_WORKERS or {file.name}")
    return Settings(home, ledger, artifacts, _place(folder, runs), recipe, int(workers))


def _place(folder: Path, text: str) -> str:
    """An absolute folder, seen from `folder`, or a URI as it is."""
    return text if "://" in text else str((folder / Path(text).expanduser()).resolve())


def _runs_beside(artifacts: str, home: Path) -> str:
    """Where checkpoints lie if nobody says: with the artifacts in a bucket, so that one permission does for both."""
    return (
        below(artifacts, "runs") if "://" in artifacts and not artifacts.startswith("file://") else str(home / "runs")
    )


def below(place: str, name: str) -> str:
    """The folder of that name in a folder or a URI."""
    folder, mark, options = place.partition("?") if "://" in place else (place, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


def sqlite_url(file: Path) -> str:
    """The SQLAlchemy URL of an SQLite file, whatever signs are in its path."""
    return f"sqlite:///{quote(str(file))}"


def make_recipe(preset: str, changes: Iterable[dict[str, Any]] = ()) -> Recipe:
    """The recipe named `preset` with `changes` (nested dictionaries) laid over it in turn.

    Raises InvalidConfig naming the first key or value that is wrong.
    """
    if preset not in PRESETS:
        raise InvalidConfig(f"no recipe {preset!r}: use {', '.join(PRESETS)}")
    return _laid_over(PRESETS[preset], changes)


def change_recipe(recipe: Recipe, changes: Iterable[dict[str, Any]]) -> Recipe:
    """`recipe` with `changes` laid over it in turn; raises as `make_recipe` does."""
    return _laid_over(recipe.model_dump(mode="json"), changes)


def differences(recipe: Recipe, other: dict[str, Any]) -> dict[str, Any]:
    """The values of `other` (nested dictionaries) that are not those of `recipe`, by keys such as `invert.steps`."""
    own = _flat(recipe.model_dump(mode="json"))
    return {key: value for key, value in _flat(other).items() if own.get(key) != value}


def _flat(nested: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat


def _laid_over(merged: dict[str, Any], changes: Iterable[dict[str, Any]]) -> Recipe:
    for change in changes:
        merged = _merge(merged, change)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise InvalidConfig(f"recipe: {first_fault(error)}") from None


def parse_change(text: str) -> dict[str, Any]:
    """`invert.steps=100` as a nested dictionary; the value is JSON, else a string."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise InvalidConfig(f"--set takes KEY=VALUE such as invert.steps=300, got {text!r}")
    try:
        parsed: Any = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    for key in reversed(path.split(".")):
        parsed = {key: parsed}
    assert isinstance(parsed, dict)
    return parsed


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in change.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if nested else value
    return out
