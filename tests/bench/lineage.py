"""Seconds to list the erasures of a model with thousands of versions.

    python -m tests.bench.lineage [--versions 10000] [--url URL]

Fills a new ledger (a temporary SQLite file, or the empty database or schema at URL) and prints the times. The rows
pass every constraint and trigger of the schema, but are not in the audit chain.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from fsu_ray.recipes import Recipe
from fsu_ray.records import Digest, ModelSpec, Status
from fsu_ray.storage.ledger import Ledger, open_ledger
from fsu_ray.storage.schema import erasures, generators, model_versions, rechecks, requests

SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=1000)
REUSES = 100  # erasures that one generator serves
BATCH = 1000  # rows a statement

# Prints the seconds of `fsu erased` without its imports.
_COMMAND = """
import sys, time
import fsu_ray.storage.ledger, fsu_ray.cli.lineage as lineage
started = time.perf_counter()
lineage.erased(sys.argv[1])
print(time.perf_counter() - started, file=sys.stderr)
"""
_WHOLE = "import sys; from fsu_ray.cli import main; main()"


def fill(ledger: Ledger, name: str, versions: int, checks: int = 1, earlier: int = 10) -> None:
    """Make the model `name` with `versions` versions in a row, each but the first from its own request.

    Every erasure has `checks` re-checks on the latest version; its report lists `earlier` earlier erasures.
    """
    model = ledger.models.register(name, SPEC, _digest("weights"))
    began = datetime.now(UTC)
    recipe = Recipe().model_dump(mode="json")
    with ledger.database.writing("the benchmark") as connection:
        for first in range(2, versions + 1, BATCH):
            numbers = range(first, min(first + BATCH, versions + 1))
            batch = [_rows(model.id, number, began, recipe, earlier) for number in numbers]
            connection.execute(sa.insert(requests), [rows[requests] for rows in batch])
            for rows in batch:
                _succeed(connection, rows)
            for table in (generators, model_versions, erasures):
                connection.execute(sa.insert(table), [rows[table] for rows in batch if table in rows])
        for check in range(checks):
            at = began + timedelta(seconds=versions + check)
            for first in range(2, versions + 1, BATCH):
                numbers = range(first, min(first + BATCH, versions + 1))
                rows_of_check = [_recheck(model.id, number, versions, check, at) for number in numbers]
                connection.execute(sa.insert(rechecks), rows_of_check)


def _rows(model: str, number: int, began: datetime, recipe: dict[str, Any], earlier: int) -> dict[sa.Table, Any]:
    """By table, the rows of one request that succeeds as version `number`."""
    at, trained = began + timedelta(seconds=number), number - (number - 2) % REUSES
    request, samples = _id("r", model, number), _digest(f"samples {number}")
    behaviour = {
        "behaviour_name": f"person-{number:06}",
        "behaviour_kind": "subset",
        "behaviour_targets": [number % 1000],
    }
    submitted = {"id": request, "model_id": model, **behaviour, "samples": samples, "sample_count": 8, "recipe": recipe}
    state = {"status": Status.SUBMITTED.value, "changes": 1, "changed_at": at, "changed_by": "benchmark"}
    version = {"id": _id("v", model, number), "model_id": model, "number": number, "parent": number - 1, "root": 1}
    rows: dict[sa.Table, Any] = {
        requests: {**submitted, "idempotency_key": samples, "submitted_at": at, **state},
        model_versions: {**version, "weights": _digest(f"w {number}"), "request_id": request, "created_at": at},
        erasures: {
            "id": _id("e", model, number), "model_id": model, "version": number, "request_id": request, **behaviour,
            "samples": samples, "mask": _digest(f"mask {number}"), "probes": _digest(f"probes {number}"),
            "generator_id": _id("g", model, trained), "generator_use": "trained" if number == trained else "reused",
            "report": _report(number, earlier), "created_at": at,
        },
    }  # fmt: skip
    if number == trained:
        rows[generators] = {
            "id": _id("g", model, number), "model_id": model, "root": 1, "spec": SPEC.model_dump(mode="json"),
            "recipe_digest": _digest("recipe"), "weights": _digest(f"g {number}"), "dataset": _digest(f"d {number}"),
            "origin": "trained", "warm_started_from": None, "figures": {"agreement": 0.99, "starved": []},
            "request_id": request, "created_at": at,
        }  # fmt: skip
    return rows


def _succeed(connection: sa.Connection, rows: dict[sa.Table, Any]) -> None:
    """Take a request through its states, as the triggers and the index of running requests demand."""
    at = rows[requests]["submitted_at"]
    run = {"worker": "benchmark", "attempt": 1, "started_at": at, "lease_until": at + timedelta(minutes=2)}
    end = {"lease_until": None, "finished_at": at, "version": rows[model_versions]["number"]}
    end["report"] = rows[erasures]["report"]
    steps: tuple[tuple[Status, dict[str, Any]], ...]
    steps = ((Status.QUEUED, {}), (Status.RUNNING, run), (Status.SUCCEEDED, end))
    for count, (status, values) in enumerate(steps, 2):
        step = sa.update(requests).where(requests.c.id == rows[requests]["id"])
        connection.execute(step.values(status=status.value, changes=count, changed_at=at, **values))


def _report(number: int, earlier: int) -> dict[str, Any]:
    """A report of the size of a real one."""
    measures = {"samples_in_target": 0.01, "samples_in_target_before": 0.99, "samples_held_out": 2, "samples_given": 8}
    probes = {"probes_in_target": 0.0123, "probes_in_target_before": 0.98, "probes": 450, "probes_held_out": 45}
    policy = {"policy": "class", "threshold": None, "attack_auc_before": 0.71, "attack_auc": 0.52}
    earlier_erasures = [
        {"behaviour": f"person-{n:06}", "request": f"r-{n:020}", "probes_in_target": 0.004, "recorded": 0.002}
        for n in range(max(2, number - earlier), number)
    ]
    by_class = [0.987654321] * 10
    return {
        "forgetting": {**measures, **probes, **policy},
        "retention": {"agreement": 0.985, "by_class": by_class, "kl_to_parent": 0.0123, "samples": 450},
        "earlier": earlier_erasures,
        "test": {when: {"retained": 0.98, "erased": 0.0, "by_class": by_class} for when in ("before", "after")},
        "generator": {"id": "g-0", "use": "reused", "refused": [], "figures": {"count_by_class": by_class}},
        "seconds": {"invert": 60.0, "relearn": 5.0},
        "resumed": [],
    }


def _recheck(model: str, number: int, version: int, check: int, at: datetime) -> dict[str, Any]:
    ids = {"id": _id(f"c{check}", model, number), "erasure_id": _id("e", model, number), "model_id": model}
    measured = {"version": version, "probes": 450, "share": 0.0125, "passed": True}
    return {**ids, **measured, "created_at": at, "actor": "benchmark"}


def _id(prefix: str, model: str, number: int) -> str:
    """A unique id for each model and number, ordered by number, as long as the ids of `rows.new_id`."""
    return f"{prefix}-{number:011}{model[-8:]}"


def _digest(text: str) -> Digest:
    return Digest(hashlib.sha256(text.encode()).hexdigest())


def measure(url: str, name: str, repeats: int = 5) -> dict[str, float]:
    """Median seconds of each read of the model `name`, by the ledger's methods and by commands of `fsu`."""
    with open_ledger(url) as ledger:
        last = ledger.models.version(name).number
        tasks: dict[str, Callable[[], float]] = {
            "fsu erased, from opening the ledger to the last line": lambda: _command(url, _COMMAND, name),
            "fsu erased, the whole process": lambda: _command(url, _WHOLE, "erased", name),
            "fsu model show, the whole process": lambda: _command(url, _WHOLE, "model", "show", name),
            "Ledger.models.erased": lambda: _seconds(lambda: ledger.models.erased(name)),
            "Ledger.models.rechecks": lambda: _seconds(lambda: ledger.models.rechecks(name)),
            "Ledger.models.move_alias": lambda: _seconds(lambda: ledger.models.move_alias(name, "production", last)),
            "Ledger.models.versions": lambda: _seconds(lambda: ledger.models.versions(name)),
            "Ledger.models.erasures, with every report": lambda: _seconds(lambda: ledger.models.erasures(name)),
            "Ledger.models.history": lambda: _seconds(lambda: ledger.models.history(name)),
        }
        return {task: statistics.median(act() for _ in range(repeats)) for task, act in tasks.items()}


def _seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _command(url: str, code: str, *words: str) -> float:
    """The seconds that a new Python process prints to stderr for `code`, or else the seconds of the whole process."""
    started = time.perf_counter()
    command = [sys.executable, "-c", code, *words]
    environment = {**os.environ, "FSU_LEDGER": url}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
    return float(done.stderr or time.perf_counter() - started)


def main() -> None:
    """Fill a ledger and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--checks", type=int, default=2, help="re-checks of each erasure")
    parser.add_argument("--earlier", type=int, default=10, help="earlier erasures in each report")
    parser.add_argument("--url", help="an empty database or schema; it is left filled")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = options.url or f"sqlite:///{folder}/ledger.db"
        with open_ledger(url) as ledger:
            started = time.perf_counter()
            fill(ledger, "line", options.versions, options.checks, options.earlier)
            filled = time.perf_counter() - started
            with ledger.database.reading() as connection:
                engine = connection.dialect.name
        print(f"{engine}: {options.versions} versions, filled in {filled:.1f} s")
        for task, seconds in measure(url, "line").items():
            print(f"{1000 * seconds:8.0f} ms  {task}")


if __name__ == "__main__":
    main()
