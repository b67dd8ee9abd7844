"""Run a table or figure of the paper: its cells side by side as Ray tasks, each kept as it ends, then the report.

A folder holds `cells/`, a Parquet file a cell, named by the digest of all that decides it and shared by all tables, and
`small/` or `paper/` with `NAME.parquet`, `NAME.md` and pictures. What is in `cells/` is not computed again.
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
    """All rows, how many cells there are (with those that they need) and how many were computed now, and the files."""

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
    """What is there and what is missing, in `folder`."""

    folder: Path
    cells: dict[str, Work]
    rows: dict[str, list[Row]]
    broken: dict[str, FsuError]

    def ready(self) -> list[Work]:
        """The cells that are missing and whose needs are there: first those that others wait for, else in the table's
        order."""
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
    """Compute the cells of `name` that `folder` does not hold, or all but what they need if `again`, and the report.

    `store` takes what cells leave to others; `tell(done, of, cell)` hears of each. `per_gpu` cells share a GPU.
    Raises NotFound for a name that is none, UserError without matplotlib, RunFailed where cells broke, after the others
    have ended: the same call goes on with those that are missing.
    """
    table, started = find(name), time.monotonic()
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("tables and figures are drawn with matplotlib: pip install 'fsu_ray[report]'")
    wanted = {_key(work): work for work in table.cells(scale, seeds)}
    kept, reports = folder / "cells", folder / scale
    try:
        for each in (kept, reports):
            each.mkdir(parents=True, exist_ok=True)
        for key in wanted if again else ():
            _file(kept, wanted[key]).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"nothing can be written to {folder} ({error.strerror}); give --into another") from None
    progress = _look(kept, list(wanted.values()), store)
    missing = len(progress.cells) - len(progress.rows)
    if missing:
        workers.connect(cpus)
        _compute_all(progress, store, on_progress, per_gpu)
    if progress.broken:
        key, first = next(iter(progress.broken.items()))
        raise RunFailed(
            f"{len(progress.broken)} of {len(progress.cells)} pieces of {name} broke, what has ended is kept: "
            f"{_shown(progress.cells[key])}: {first}; the same command goes on with those that are missing"
        )
    rows = [row for key in wanted for row in progress.rows[key]]
    markdown = _head(name, scale, seeds, rows) + table.report(rows, reports)
    _write(reports / f"{name}.parquet", rows)
    write_above_notes(reports / f"{name}.md", markdown)
    files = sorted(reports.glob(f"{name}.*"))
    return Reproduced(name, scale, rows, len(progress.cells), missing, time.monotonic() - started, markdown, files)


def _look(kept: Path, wanted: list[Work], store: BlobStore) -> _Progress:
    """Those that are wanted, and what these need as far as they are missing themselves. A cell whose blobs have left
    the store is missing for those that need them."""
    lost: set[str] = set()
    while True:
        cells: dict[str, Work] = {}
        rows: dict[str, list[Row]] = {}
        needed: set[str] = set()
        waiting = deque(wanted)
        while waiting:
            work = waiting.popleft()
            key = _key(work)
            if key in cells:
                continue
            cells[key] = work
            found = None if key in lost else _read(_file(kept, work))
            if found is None:
                waiting += _needs(work)
                needed |= {_key(need) for need in _needs(work)}
            else:
                rows[key] = found
        less = {key for key in needed & rows.keys() if not _whole(rows[key], store)}
        if not less:
            return _Progress(kept, cells, rows, {})
        lost |= less


def _whole(rows: list[Row], store: BlobStore) -> bool:
    return all(store.has(row[column]) for row in rows for column in BLOBS if row.get(column))


def _compute_all(
    progress: _Progress, store: BlobStore, on_progress: Callable[[int, int, str], None] | None, per_gpu: int
) -> None:
    """Each cell as soon as what it needs is there and the cluster has room."""
    use_gpu, each = workers.resources()
    each = {kind: amount / per_gpu if kind == "GPU" else amount for kind, amount in each.items()}
    begun: set[str] = set()

    def resources(todo: Todo) -> dict[str, float]:
        made = find_cell_type(todo[0][0])
        return each if use_gpu and made.gpu else {"CPU": made.cpus}

    def more(room: int) -> Iterator[Todo]:
        for work in [work for work in progress.ready() if _key(work) not in begun][:room]:
            begun.add(_key(work))
            yield work, store, [progress.rows[_key(need)] for need in _needs(work)]

    most: dict[str, float] = (
        each if use_gpu and any(find_cell_type(kind).gpu for kind, _ in progress.cells.values()) else {"CPU": 1}
    )
    for (work, *_), found in tasks.side_by_side(_compute, more, resources, most):
        key = _key(work)
        if isinstance(found, FsuError):
            progress.broken[key] = found
        else:
            _write(_file(progress.folder, work), found)
            progress.rows[key] = found
        if on_progress:
            on_progress(len(progress.rows), len(progress.cells), _shown(work))


Todo = tuple[Work, BlobStore, list[list[Row]]]
"""A cell, the store, and the rows of what it needs."""


def _compute(todo: Todo) -> list[Row]:
    """In a Ray task: the rows of a cell, with where they are from."""
    import ray

    (kind, cell), store, given = todo
    made, started = find_cell_type(kind), time.monotonic()
    torch.set_num_threads(made.cpus)
    repeatable()
    device = torch.device("cuda" if made.gpu and ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")
    found = made.run(cell, CellContext(device, store, given))
    worker = torch.cuda.get_device_name() if device.type == "cuda" else f"{_processor()}, {made.cpus} CPU"
    origin = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{worker}, torch {torch.__version__}",
        "code": code(),
        "cell_seconds": round(time.monotonic() - started, 1),
    }
    return [{"piece": kind, **row, **origin} for row in found]


def _needs(work: Work) -> list[Work]:
    return find_cell_type(work[0]).needs(work[1])


def _key(work: Work) -> str:
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:16]


def _file(folder: Path, work: Work) -> Path:
    return folder / f"{work[0]}-{_key(work)}.parquet"


def _shown(work: Work) -> str:
    kind, cell = work
    return f"{kind}: " + ", ".join(f"{key} {value}" for key, value in cell.items() if not isinstance(value, dict))


def _read(file: Path) -> list[Row] | None:
    """The rows of a file, None where there is none or it was not written to its end."""
    try:
        rows: list[Row] = pq.read_table(file).to_pylist()
    except (OSError, pa.ArrowException):
        return None
    return rows


def _write(file: Path, rows: list[Row]) -> None:
    """All of it or nothing."""
    columns = dict.fromkeys(column for row in rows for column in row)
    whole = pa.table({column: [row.get(column) for row in rows] for column in columns})
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    pq.write_table(whole, beside)
    os.replace(beside, file)


def _head(name: str, scale: Scale, seeds: int, rows: list[Row]) -> str:
    """The title, and what an honest reader asks first."""
    said = {column: " and ".join(sorted({row[column] for row in rows})) for column in ("date", "machine", "code")}
    return (
        f"# {name}: {NAMES[name][1]}\n\n`fsu reproduce {name} --scale {scale} --seeds {seeds}`. Computed "
        f"{said['date']} on {said['machine']} a cell; code {said['code']}.\n\n"
    )


@functools.cache
def code() -> str:
    """What made a row: the commit of a checkout, `+` where it was changed since; without one, as in a Ray job, the
    version of the package and a digest of its modules."""
    here = Path(__file__).parent
    asked = [["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--", str(here.parent)]]
    said = []
    for words in asked:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return _packaged(here.parent)
        if done.returncode:
            return _packaged(here.parent)
        said.append(done.stdout.strip())
    return said[0] + ("+" if said[1] else "")


def _packaged(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.py"), key=lambda file: file.relative_to(folder).as_posix()):
        whole = file.read_bytes()
        found.update(f"{file.relative_to(folder).as_posix()} {len(whole)}\n".encode() + whole)
    return f"{metadata.version('fsu_ray')}, sources {found.hexdigest()[:10]}"


def _processor() -> str:
    try:
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]  # fmt: skip
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
