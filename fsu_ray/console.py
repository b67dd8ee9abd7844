"""What people see: tables, progress, JSON. Progress is shown as bars on a terminal, else as plain lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fsu_ray.records import Behaviour, Status

WIDTH = 160  # of tables, where standard output is no terminal

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else WIDTH)
QUIET_SECONDS = 10.0  # between two plain lines of one stage
REQUEUED = "what was running is queued again and goes on from its last checkpoint"


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def plain(value: Any) -> Any:
    """Records as values that JSON can hold."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return {key: plain(item) for key, item in vars(value).items()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime) else value


def print_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(json.dumps(plain(value), indent=2) + "\n")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table of text; columns of numbers are aligned on the right."""
    result = Table(title=title, title_justify="left", title_style="bold")
    rows = [list(row) for row in rows]
    for i, column in enumerate(columns):
        right = bool(rows) and all(isinstance(row[i], int | float) or row[i] in (None, "") for row in rows)
        result.add_column(column, justify="right" if right else "left")
    for row in rows:
        result.add_row(*("" if cell is None else str(cell) for cell in row))
    return result


def percent(share: float | None) -> str:
    """A share as a percentage with two decimals; a dash for None."""
    return "-" if share is None else f"{100 * share:.2f}"


def when(moment: datetime | None) -> str:
    """A time for people, in the local time zone; empty for None."""
    return "" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


class Watcher:
    """Shows the progress of runs as bars or as lines. Its method `tell` is a `records.ProgressCallback`."""

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._printed_at: dict[str, float] = {}

    def begin(self) -> None:
        """Begin with another request: its stages get new bars."""
        self._tasks.clear()
        self._printed_at.clear()

    def tell(self, stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        """Show that a stage has done `done` of `total` steps."""
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        if self._bars is not None:
            task = self._tasks.get(stage)
            if task is None:
                self._bars.start()
                task = self._tasks[stage] = self._bars.add_task(stage, total=total, metrics="")
            self._bars.update(task, completed=done, total=total, metrics=shown)
            return
        now = time.monotonic()
        if done == total or now - self._printed_at.setdefault(stage, now) >= QUIET_SECONDS:
            self._printed_at[stage] = now
            err.print(f"  {stage} {done}/{total}  {shown}")


@contextmanager
def watching() -> Iterator[Watcher]:
    """A `Watcher` that prints on standard error."""
    if not err.is_terminal:
        yield Watcher(None)
        return
    columns = (
        TextColumn("  {task.description:<10}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
    )
    bars = Progress(*columns, console=err)  # `tell` starts it, so that nothing is drawn where nothing runs
    try:
        yield Watcher(bars)
    finally:
        if bars.live.is_started:
            bars.stop()


GENERATOR_USE = {
    "trained": "trained",
    "reused": "reused",
    "warm_started": "trained from an older generator's weights",
    "transferred": "as asked for, its D' drawn anew",
}


def print_result(result: Any) -> None:
    """One ended request in a few lines."""
    request, outcome = result.request, result.outcome
    name = f"{request.behaviour.name} of {request.model}"
    if result.version is not None:
        out.print(f"[green]erased[/] {name}: version {result.version.number} (request {request.id})")
    elif request.status is Status.QUEUED:
        again = f"; tried again from {when(request.retry_at)} on" if request.retry_at else ""
        out.print(f"[yellow]queued again[/] {name} (request {request.id}): {request.reason}{again}")
    else:
        out.print(f"[red]{request.status}[/] {name} (request {request.id}): {request.reason}")
    if outcome is None:
        return
    refused = f" (the one on offer was refused: {'; '.join(outcome.refused)})" if outcome.refused else ""
    metrics = outcome.metrics
    out.print(f"  generator {GENERATOR_USE[outcome.generator_use]}{refused}")
    out.print(
        f"  D' for this version: acceptance >= {metrics['acceptance']:.3f}, coverage {metrics['coverage']:.3f}, "
        f"BN distance {metrics['bn_distance']:.3f}, agreement {metrics['agreement']:.3f}"
    )
    out.print("  seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in outcome.seconds.items()))
    if outcome.resumed:
        out.print(f"  resumed from a checkpoint: {', '.join(outcome.resumed)}")
    if result.report:
        _print_report(result.report)


def _print_report(report: Mapping[str, Any]) -> None:
    """The measures of one erasure."""
    forgetting, retention = report["forgetting"], report["retention"]
    held_out, unseen = forgetting["samples_held_out"], forgetting["probes_held_out"]
    samples = (
        f"{held_out} held-out target samples"
        if held_out
        else f"the {forgetting['samples_given']} target samples (used: too few to hold out)"
    )
    probes = f"{unseen} held out: {percent(forgetting['probes_held_out_in_target'])} %" if unseen else "none held out"
    out.print(
        f"  still in a target class: {percent(forgetting['samples_in_target'])} % of {samples}, "
        f"{percent(forgetting['probes_in_target'])} % of {forgetting['probes']} probes ({probes})"
    )
    out.print(
        f"  agreement with the parent {percent(retention['agreement'])} % on {retention['samples']} held-out samples "
        f"of D', KL {retention['kl_to_parent']:.4f}; membership attack AUC "
        f"{_auc(forgetting['attack_auc_before'])} -> {_auc(forgetting['attack_auc'])}"
    )
    if "test_missing" in report:
        out.print(f"  accuracy not measured: {report['test_missing']}")
    for erasure in report["earlier"]:
        out.print(
            f"  earlier erasure {erasure['behaviour']}: {percent(erasure['probes_in_target'])} % of its probes "
            f"({percent(erasure['recorded'])} % when erased)"
        )


def _auc(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def accuracy_table(results: Sequence[Any], classes: int, earlier: Iterable[Behaviour] = ()) -> Table | None:
    """Test accuracy by class before the first request and after each; None without a test set.

    `earlier` are the behaviours that were erased before the first request.
    """
    reports = [(r.request.behaviour, r.report) for r in results if r.report]
    reports = [(b, report) for b, report in reports if report.get("test")]
    if not reports:
        return None
    steps = [("before", reports[0][1]["test"]["before"])]
    steps += [(f"after {behaviour.name}", report["test"]["after"]) for behaviour, report in reports]
    erased_classes = [{target for behaviour in earlier if behaviour.kind == "class" for target in behaviour.targets}]
    for behaviour, _ in reports:
        targets = set(behaviour.targets) if behaviour.kind == "class" else set()
        erased_classes.append(erased_classes[-1] | targets)
    rows = []
    for k in range(classes):
        label = f"class {k}" + (" (erased)" if k in erased_classes[-1] else "")
        rows.append([label, *(percent(step["by_class"][k]) for _, step in steps)])
    for label, erased in (("mean of what is kept", False), ("mean of what is erased", True)):
        means = []
        for (_, step), classes_then in zip(steps, erased_classes, strict=True):
            values = [v for k, v in enumerate(step["by_class"]) if v is not None and (k in classes_then) == erased]
            means.append(percent(sum(values) / len(values)) if values else "-")
        rows.append([label, *means])
    return table("Accuracy on the test split, %", ["", *(name for name, _ in steps)], rows)


def history_table(model: str, events: Iterable[Mapping[str, Any]]) -> Table:
    """The history of a model as a table."""
    rows = []
    for event in events:
        detail = {k: v for k, v in event["detail"].items() if v is not None}
        shown = ", ".join(f"{k} {v[:12] if k == 'weights' else v}" for k, v in detail.items())
        version = "" if event["version"] is None else str(event["version"])
        rows.append([when(event["at"]), event["event"], version, event["request"] or "", shown])
    return table(f"History of {model}", ["at", "event", "version", "request", "detail"], rows)


def results_json(results: Iterable[Any]) -> list[dict[str, Any]]:
    """Ended requests as `--json` prints them."""
    return [
        {
            "request": plain(r.request) | {"report": None},
            "version": plain(r.version),
            "outcome": _outcome_json(r),
        }
        for r in results
    ]


def _outcome_json(result: Any) -> dict[str, Any] | None:
    """The outcome of a run as one of its requests sees it: with this request's mask, probes and report."""
    if result.outcome is None:
        return None
    outcome = plain(asdict(result.outcome))
    del outcome["targets"]
    target = {name: value for name, value in plain(asdict(result.target)).items() if name != "request"}
    return {**outcome, **target}


def exit_code(results: Iterable[Any]) -> int:
    """The exit code after requests ran: 1 a request failed or is queued again, 4 one was rejected, 0 all succeeded."""
    states = {result.request.status for result in results}
    return 1 if states & {Status.FAILED, Status.QUEUED} else 4 if Status.REJECTED in states else 0
