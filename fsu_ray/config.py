"""Settings and presets. They are read when a function is called, never at import.

Settings come from the environment (`FSU_HOME`, `FSU_LEDGER`, `FSU_ARTIFACTS`, `FSU_RUNS`, `FSU_WORKERS`), then
`fsu.toml` in the working folder, then the defaults: everything in `.fsu/` in the working folder, and Ray's
checkpoints beside the artifacts where these are in a bucket. Unknown keys are refused.
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


# The presets: what differs from the defaults of `recipes.Recipe`.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Small images with little detail, e.g. scikit-learn's digits: what `fsu demo` uses.
    "digits": {
        "invert": {"steps": 400, "batch": 120},
        "synthesize": {"per_class": 200},
        "relearn": {"epochs": 20, "lr": 0.003},
    },
    # Networks with many BatchNorm layers. A lower weight keeps their statistics from drowning the other losses. The
    # higher entropy weight makes samples of D' belong clearly to one class, even where they look like two.
    "deep": {
        "invert": {
            "steps": 1000,
            "weights": {"bn": 3.0, "entropy": 3.0, "augmentation": 1.0, "diversity": 1.0, "tv": 0.06},
        },
        "filter": {"runner_up": 0.05},
    },
    # Networks with dozens of BatchNorm layers, such as ResNet-50: the BN loss does not grow with their number.
    "very-deep": {
        "invert": {
            "steps": 400,
            "form": "relative",
            "weights": {"bn": 120.0, "entropy": 3.0, "augmentation": 1.0, "diversity": 1.0, "tv": 0.06},
        },
        "filter": {"runner_up": 0.05},
    },
    # The paper's section 4 and appendix C.4: squared losses and their weights, labels of the current version, the knee.
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
    """Where everything is stored, and how runs are made.

    `ledger` is a SQLAlchemy URL. `artifacts` and `runs` (Ray's checkpoints) are folders or URIs. `recipe` is laid over
    every preset. `workers` is the number of processes of a run.
    """

    home: Path
    ledger: str
    artifacts: str
    runs: str
    recipe: dict[str, Any]
    workers: int = 1


def read_settings(folder: Path | None = None) -> Settings:
    """The settings for `folder`, by default the working folder; raises InvalidConfig for a bad file or value."""
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
        raise InvalidConfig(f"workers must be a number from 1 on, not {workers!r}: change FSU_WORKERS or {file.name}")
    return Settings(home, ledger, artifacts, _place(folder, runs), recipe, int(workers))


def _place(folder: Path, text: str) -> str:
    """`text` as an absolute folder, relative to `folder`, or unchanged where it is a URI."""
    return text if "://" in text else str((folder / Path(text).expanduser()).resolve())


def _runs_beside(artifacts: str, home: Path) -> str:
    """The default for checkpoints: in the bucket of the artifacts, so that one permission is enough, else in `home`."""
    return (
        below(artifacts, "runs") if "://" in artifacts and not artifacts.startswith("file://") else str(home / "runs")
    )


def below(place: str, name: str) -> str:
    """The folder `name` in a folder or a URI; query options of the URI are kept."""
    folder, mark, options = place.partition("?") if "://" in place else (place, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


def sqlite_url(file: Path) -> str:
    """The SQLAlchemy URL of an SQLite file; characters of its path are escaped."""
    return f"sqlite:///{quote(str(file))}"


def make_recipe(preset: str, changes: Iterable[dict[str, Any]] = ()) -> Recipe:
    """The preset with `changes` (nested dictionaries) laid over it in turn.

    Raises InvalidConfig for an unknown preset, and for the first key or value that is wrong.
    """
    if preset not in PRESETS:
        raise InvalidConfig(f"no recipe {preset!r}: use {', '.join(PRESETS)}")
    return _merged(PRESETS[preset], changes)


def change_recipe(recipe: Recipe, changes: Iterable[dict[str, Any]]) -> Recipe:
    """`recipe` with `changes` laid over it in turn; raises as `make_recipe` does."""
    return _merged(recipe.model_dump(mode="json"), changes)


def differences(recipe: Recipe, other: dict[str, Any]) -> dict[str, Any]:
    """The values of `other` (nested dictionaries) that differ from `recipe`, by keys such as `invert.steps`."""
    values = _flat(recipe.model_dump(mode="json"))
    return {key: value for key, value in _flat(other).items() if values.get(key) != value}


def _flat(nested: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat


def _merged(values: dict[str, Any], changes: Iterable[dict[str, Any]]) -> Recipe:
    for change in changes:
        values = _merge(values, change)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise InvalidConfig(f"recipe: {first_fault(error)}") from None


def parse_change(text: str) -> dict[str, Any]:
    """`invert.steps=100` as a nested dictionary. A value that is not JSON is a string. Raises InvalidConfig."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise InvalidConfig(f"--set takes KEY=VALUE such as invert.steps=300, got {text!r}")
    try:
        parsed: Any = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    return nested(path, parsed)


def nested(path: str, value: Any) -> dict[str, Any]:
    """`{"invert": {"steps": value}}` for the path `invert.steps`."""
    *folders, name = path.split(".")
    tree = {name: value}
    for folder in reversed(folders):
        tree = {folder: tree}
    return tree


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
