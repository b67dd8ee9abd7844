"""Compute a table or figure of the paper: its cells side by side as Ray tasks, then the report.

The folder holds `cells/`, with a Parquet file for each cell, and `small/` or `paper/` with `NAME.parquet`, `NAME.md`
and pictures. A cell's file is named by the digest of the cell and shared by all tables. A cell is stored as soon as it
ends, and a cell whose file exists is not computed again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fsu_ray.cluster import tasks, workers
from fsu_ray.errors import FsuError, RunFailed, StorageError, UserError
from fsu_ray.experiments.catalogue import BLOBS, NAMES, CellContext, Row, Scale, Work, find, find_cell_type
from fsu_ray.experiments.markdown import write_above_notes
from fsu_ray.method.precision import repeatable
from fsu_ray.work import BlobStore


@dataclass(frozen=True)
class Reproduced:
    """A table's rows and files; `cells` counts its cells and their needs, `computed` the cells computed now."""

    name: str
    scale: Scale
    rows: list[Row]
    cells: int
    computed: int
    seconds: float
    markdown: str
    files: list[Path]


@dataclass
class _Progress:
    """The cells of a table and their needs, by key, with the rows of finished cells and the errors of broken cells."""

    folder: Path
    cells: dict[str, Work]
    rows: dict[str, list[Row]]
    broken: dict[str, FsuError]

    def ready(self) -> list[Work]:
        """The missing cells whose needs are computed, in the table's order; cells that others wait for come first."""
        missing = [work for key, work in self.cells.items() if key not in self.rows and key not in self.broken]
        needed = {_key(need) for work in missing for need in _needs(work)}
        ready = [work for work in missing if all(_key(need) in self.rows for need in _needs(work))]
        return sorted(ready, key=lambda work: _key(work) not in needed)


def reproduce(
    name: str,
    scale: Scale,
    seeds: int,
    folder: Path,
    store: BlobStore,
    on_progress: Callable[[int, int, str], None] | None = None,
    cpus: int | None = None,
    again: bool = False,
    per_gpu: int = 1,
) -> Reproduced:
    """Compute the missing cells of the table `name`, or with `again` all cells but their needs, and write the report.

    `store` holds the blobs that cells need of each other. `on_progress(done, total, cell)` is called after each cell.
    `per_gpu` cells share a GPU. Raises NotFound for an unknown name, UserError without matplotlib, StorageError where
    `folder` is not writable, and RunFailed if cells broke, after all others have ended; the same call then computes
    the missing cells.
    """
    table, started = find(name), time.monotonic()
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("tables and figures are drawn with matplotlib: pip install 'fsu_ray[report]'")
    table_cells = {_key(work): work for work in table.cells(scale, seeds)}
    cells, reports = folder / "cells", folder / scale
    try:
        for path in (cells, reports):
            path.mkdir(parents=True, exist_ok=True)
        for key in table_cells if again else ():
            _file(cells, table_cells[key]).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {folder} ({error.strerror}); name another folder with --into") from None
    progress = _find_missing(cells, list(table_cells.values()), store)
    missing = len(progress.cells) - len(progress.rows)
    if missing:
        workers.connect(cpus)
        _compute_all(progress, store, on_progress, per_gpu)
    if progress.broken:
        key, first = next(iter(progress.broken.items()))
        raise RunFailed(
            f"{len(progress.broken)} of {len(progress.cells)} cells of {name} broke: {_describe(progress.cells[key])}: "
            f"{first}; the others are stored, and the same command computes the missing cells"
        )
    rows = [row for key in table_cells for row in progress.rows[key]]
    markdown = _head(name, scale, seeds, rows) + table.report(rows, reports)
    _write(reports / f"{name}.parquet", rows)
    write_above_notes(reports / f"{name}.md", markdown)
    files = sorted(reports.glob(f"{name}.*"))
    return Reproduced(name, scale, rows, len(progress.cells), missing, time.monotonic() - started, markdown, files)


def _find_missing(folder: Path, table_cells: list[Work], store: BlobStore) -> _Progress:
    """The state of a table's cells and, for missing ones, of the cells that they need. A stored cell that others need
    counts as missing if its blobs are no longer in the store."""
    lost: set[str] = set()
    while True:
        cells: dict[str, Work] = {}
        rows: dict[str, list[Row]] = {}
        needed: set[str] = set()
        waiting = deque(table_cells)
        while waiting:
            work = waiting.popleft()
            key = _key(work)
            if key in cells:
                continue
            cells[key] = work
            stored = None if key in lost else _read(_file(folder, work))
            if stored is None:
                waiting += _needs(work)
                needed |= {_key(need) for need in _needs(work)}
            else:
                rows[key] = stored
        now_lost = {key for key in needed & rows.keys() if not _has_blobs(rows[key], store)}
        if not now_lost:
            return _Progress(folder, cells, rows, {})
        lost |= now_lost


def _has_blobs(rows: list[Row], store: BlobStore) -> bool:
    return all(store.has(row[column]) for row in rows for column in BLOBS if row.get(column))


def _compute_all(
    progress: _Progress, store: BlobStore, on_progress: Callable[[int, int, str], None] | None, per_gpu: int
) -> None:
    """Compute each cell as soon as the cells that it needs are there and the cluster has room."""
    use_gpu, worker = workers.resources()
    worker = {kind: amount / per_gpu if kind == "GPU" else amount for kind, amount in worker.items()}
    started: set[str] = set()

    def resources(todo: Todo) -> dict[str, float]:
        cell_type = find_cell_type(todo[0][0])
        return worker if use_gpu and cell_type.gpu else {"CPU": cell_type.cpus}

    def more(room: int) -> Iterator[Todo]:
        for work in [work for work in progress.ready() if _key(work) not in started][:room]:
            started.add(_key(work))
            yield work, store, [progress.rows[_key(need)] for need in _needs(work)]

    most: dict[str, float] = (
        worker if use_gpu and any(find_cell_type(kind).gpu for kind, _ in progress.cells.values()) else {"CPU": 1}
    )
    for (work, *_), result in tasks.side_by_side(_compute, more, resources, most):
        key = _key(work)
        if isinstance(result, FsuError):
            progress.broken[key] = result
        else:
            _write(_file(progress.folder, work), result)
            progress.rows[key] = result
        if on_progress:
            on_progress(len(progress.rows), len(progress.cells), _describe(work))


Todo = tuple[Work, BlobStore, list[list[Row]]]
"""A cell, the store, and the rows of the cells that it needs."""


def _compute(todo: Todo) -> list[Row]:
    """In a Ray task: the rows of a cell, with date, machine, code and seconds."""
    import ray

    (kind, cell), store, needs = todo
    cell_type, started = find_cell_type(kind), time.monotonic()
    torch.set_num_threads(cell_type.cpus)
    repeatable()
    device = torch.device("cuda" if cell_type.gpu and ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")
    rows = cell_type.run(cell, CellContext(device, store, needs))
    worker = torch.cuda.get_device_name() if device.type == "cuda" else f"{_processor()}, {cell_type.cpus} CPU"
    origin = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{worker}, torch {torch.__version__}",
        "code": code(),
        "cell_seconds": round(time.monotonic() - started, 1),
    }
    return [{"piece": kind, **row, **origin} for row in rows]


def _needs(work: Work) -> list[Work]:
    return find_cell_type(work[0]).needs(work[1])


def _key(work: Work) -> str:
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:16]


def _file(folder: Path, work: Work) -> Path:
    return folder / f"{work[0]}-{_key(work)}.parquet"


def _describe(work: Work) -> str:
    kind, cell = work
    return f"{kind}: " + ", ".join(f"{key} {value}" for key, value in cell.items() if not isinstance(value, dict))


def _read(file: Path) -> list[Row] | None:
    """The rows of a file; None if the file is missing or incomplete."""
    try:
        rows: list[Row] = pq.read_table(file).to_pylist()
    except (OSError, pa.ArrowException):
        return None
    return rows


def _write(file: Path, rows: list[Row]) -> None:
    """Write a Parquet file, all of it or nothing."""
    columns = dict.fromkeys(column for row in rows for column in row)
    columns_of_rows = pa.table({column: [row.get(column) for row in rows] for column in columns})
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    pq.write_table(columns_of_rows, partial)
    os.replace(partial, file)


def _head(name: str, scale: Scale, seeds: int, rows: list[Row]) -> str:
    """The title, the command, and date, machine and code of the rows."""
    origin = {column: " and ".join(sorted({row[column] for row in rows})) for column in ("date", "machine", "code")}
    return (
        f"# {name}: {NAMES[name][1]}\n\n`fsu reproduce {name} --scale {scale} --seeds {seeds}`. Computed "
        f"{origin['date']} on {origin['machine']} a cell; code {origin['code']}.\n\n"
    )


@functools.cache
def code() -> str:
    """The code that computes rows: the commit of the checkout, with `+` if files differ from the commit.

    Without a checkout, as in a Ray job: the version of the package and a digest of its modules.
    """
    here = Path(__file__).parent
    commands = [["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--", str(here.parent)]]
    answers = []
    for words in commands:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return _packaged(here.parent)
        if done.returncode:
            return _packaged(here.parent)
        answers.append(done.stdout.strip())
    return answers[0] + ("+" if answers[1] else "")


def _packaged(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py"), key=lambda file: file.relative_to(folder).as_posix()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return f"{metadata.version('fsu_ray')}, sources {digest.hexdigest()[:10]}"


def _processor() -> str:
    try:
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]  # fmt: skip
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
