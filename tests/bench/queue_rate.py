"""Claim-and-complete cycles a second of the ledger's queue, and of procrastinate's on the same server.

    python -m tests.bench.queue_rate [--url postgresql://USER@HOST/DATABASE] [--requests 1000] [--workers 2]

Without `--url` the ledger is an SQLite file in a temporary folder. With `--url`, each side works in a new schema that
is dropped at the end; procrastinate is measured too if it is installed (`pip install procrastinate`). Both sides do the
same: real processes, started together, claim and end requests one by one, over 20 models (procrastinate: locks), with
at most one running request a model. The rate is the number of requests over the time until the last process ends.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fsu_ray.config import sqlite_url
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Digest, ModelSpec
from fsu_ray.storage.ledger import open_ledger

ROOT = Path(__file__).parents[2]
MODELS = 20
SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)


def fill(url: str, number: int) -> None:
    """Make a ledger at `url` with `number` requests over `MODELS` models."""
    with open_ledger(url) as ledger:
        for model in range(MODELS):
            ledger.models.register(f"m{model}", SPEC, _digest("weights"))
        for request in range(number):
            behaviour = Behaviour(name=f"b{request}", kind="subset", targets=(1,))
            ledger.requests.submit(f"m{request % MODELS}", behaviour, _digest(f"samples {request}"), 8, Recipe())


def work(url: str, worker: str) -> int:
    """Claim and end requests until none is left; their number."""
    done = idle = 0
    with open_ledger(url) as ledger:
        _ready()
        while idle < 3:
            request = ledger.requests.claim(worker, 60)
            if request is None:
                idle += 1
                time.sleep(0.005)
                continue
            idle = 0
            ledger.reject(request, "no-op", None, None)
            done += 1
    return done


async def procrastinate_fill(dsn: str, number: int) -> None:
    """Make procrastinate's tables and `number` jobs over `MODELS` locks."""
    app = _procrastinate(dsn)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for job in range(number):
            await app.tasks["noop"].configure(lock=f"m{job % MODELS}").defer_async(number=job)


async def procrastinate_work(dsn: str, raw: bool) -> int:
    """Run procrastinate's worker on its queue; with `raw`, only its claim and finish calls, without the worker."""
    from procrastinate.jobs import Status

    app = _procrastinate(dsn)
    async with app.open_async():
        _ready()
        if not raw:
            await app.run_worker_async(wait=False, concurrency=1, install_signal_handlers=False, listen_notify=False)
            return 0
        worker, done, idle = await app.job_manager.register_worker(), 0, 0
        while idle < 3:
            job = await app.job_manager.fetch_job(queues=None, worker_id=worker)
            if job is None:
                idle += 1
                await asyncio.sleep(0.005)
                continue
            idle = 0
            await app.job_manager.finish_job(job, status=Status.SUCCEEDED, delete_job=False)
            done += 1
    return done


def _procrastinate(dsn: str) -> Any:
    import procrastinate

    async def noop(number: int) -> None:
        """Nothing."""

    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn))
    app.task(name="noop")(noop)
    return app


def rate(number: int, workers: int, *arguments: str) -> float:
    """Cycles a second of `workers` processes of this module, which start together."""
    command = [sys.executable, "-m", "tests.bench.queue_rate", "--work", *arguments]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(workers)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    spans = [[float(word) for word in process.communicate()[0].split()] for process in processes]
    return number / (max(span[1] for span in spans) - min(span[0] for span in spans))


def _ready() -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    print(time.time())


def _digest(text: str) -> Digest:
    return Digest(hashlib.sha256(text.encode()).hexdigest())


@contextmanager
def _schema(url: str) -> Iterator[str]:
    """The name of a new schema on a PostgreSQL server, dropped when the block ends."""
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    name = f"fsu_queue_{secrets.token_hex(4)}"
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
        yield name
        connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")
    engine.dispose()


def measure(url: str | None, number: int, workers: int) -> Iterator[tuple[str, float]]:
    """Measure each side; its name and cycles a second."""
    if url is None:
        with tempfile.TemporaryDirectory() as folder:
            ledger_url = sqlite_url(Path(folder) / "ledger.db")
            fill(ledger_url, number)
            yield "ledger on SQLite", rate(number, workers, "ledger", ledger_url)
        return
    with _schema(url) as schema:
        ledger_url = f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{schema}"
        fill(ledger_url, number)
        yield "ledger on PostgreSQL", rate(number, workers, "ledger", ledger_url)
    if find_spec("procrastinate") is None:
        return
    for side in ("procrastinate-raw", "procrastinate"):
        with _schema(url) as schema:
            plain = sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
            dsn = f"{plain}{'&' if '?' in plain else '?'}options=-csearch_path%3D{schema}"
            asyncio.run(procrastinate_fill(dsn, number))
            yield side, rate(number, workers, side, dsn)


def main() -> None:
    """Print a line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a PostgreSQL database; default: an SQLite file")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", nargs=2, metavar=("SIDE", "URL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        side, url = options.work
        if side == "ledger":
            work(url, f"w-{secrets.token_hex(4)}")
        else:
            asyncio.run(procrastinate_work(url, side.endswith("raw")))
        print(time.time())
        return
    for what, cycles in measure(options.url, options.requests, options.workers):
        print(f"{what}: {cycles:.0f} cycles/s")


if __name__ == "__main__":
    main()
