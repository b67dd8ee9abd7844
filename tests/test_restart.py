"""PostgreSQL goes away in the middle of a run and comes back: the run waits and goes on, nothing is lost."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch

from fsu_ray.config import Timings, read_settings
from fsu_ray.errors import InvalidConfig
from fsu_ray.method.datasets import draw, write_samples
from fsu_ray.method.unlearn import unlearn
from fsu_ray.pipeline import WorkerOptions, drain, run_request
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Status
from fsu_ray.service import Service, connect
from fsu_ray.storage.ledger import open_ledger
from fsu_ray.work import Outcome, WorkOrder

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Callable[..., None], str]]:
    """A PostgreSQL of our own, which may be stopped: `control("stop", "-m", "immediate")`, and its URL."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    pg_ctl = shutil.which("pg_ctl") or (str(programs[-1]) if programs else None)
    if pg_ctl is None:
        if "postgres" in os.environ.get("FSU_REQUIRE", "").split(","):
            pytest.fail("FSU_REQUIRE names postgres, and there is no pg_ctl to start one that may be stopped")
        pytest.skip("no pg_ctl: no PostgreSQL that may be stopped")
    folder = tmp_path_factory.mktemp("server")
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # which PostgreSQL refuses to be
        folder = Path("/tmp") / f"fsu-server-{os.getpid()}"
        folder.mkdir(mode=0o700)
        shutil.chown(folder, "postgres")
        user = {"user": "postgres", "cwd": "/tmp", "extra_groups": []}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=60, **user)
    initdb = Path(pg_ctl).with_name("initdb")
    run([initdb, "-D", folder / "data", "-U", "postgres", "-A", "trust", "--no-sync"])
    access = folder / "data" / "pg_hba.conf"
    access.write_text(f"host all bob 127.0.0.1/32 scram-sha-256\n{access.read_text()}")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"

    def control(*words: str) -> None:
        log = ["-l", folder / "log", "-o", options] if words[0] in ("start", "restart") else []
        run([pg_ctl, "-D", folder / "data", "-w", *log, *words], stdout=subprocess.DEVNULL, capture_output=False)

    control("start")
    yield control, f"postgresql://postgres@127.0.0.1:{port}/postgres"
    control("stop", "-m", "immediate")
    shutil.rmtree(folder)


@pytest.fixture
def opened(control: tuple[Any, str], home: Path, trained: Any) -> Iterator[tuple[Service, Callable[..., None]]]:
    """An service on that server, with the model `m`, and what stops the server."""
    service = connect(replace(read_settings(), ledger=control[1]))
    name = f"m{len(service.ledger.models.all())}"
    service.models.register(name, trained.spec, trained.weights)
    yield service, control[0]
    service.ledger.close()


def test_a_run_outlives_a_restart(
    opened: tuple[Service, Callable[..., None]], trained: Any, quick: Recipe, home: Path
) -> None:
    """The server is restarted, at once and without goodbye, in the middle of the run; connections break."""
    result = carry_out(opened, trained, quick, home, lambda control: control("restart", "-m", "immediate"))
    assert result.request.status is Status.SUCCEEDED
    assert result.request.attempt == 1


def test_the_end_of_a_run_waits_for_the_server(
    opened: tuple[Service, Callable[..., None]], trained: Any, quick: Recipe, home: Path
) -> None:
    """The server is away when the run ends, and comes back two seconds later."""

    def away(control: Callable[..., None]) -> None:
        control("stop", "-m", "immediate")
        threading.Timer(2.0, control, ["start"]).start()

    result = carry_out(opened, trained, quick, home, away, late=True)
    assert result.request.status is Status.SUCCEEDED
    assert result.request.attempt == 1


def test_a_wrong_password_is_one_line_without_it(control: tuple[Any, str]) -> None:
    """What the server says, and what to set."""
    url = sa.make_url(control[1]).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE ROLE bob LOGIN PASSWORD 'right'")
    engine.dispose()
    with pytest.raises(InvalidConfig, match='password authentication failed for user "bob"') as caught:
        open_ledger(control[1].replace("postgres@", "bob:s3cret@", 1))
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def carry_out(
    opened: tuple[Service, Callable[..., None]],
    trained: Any,
    quick: Recipe,
    home: Path,
    break_it: Any,
    late: bool = False,
) -> Any:
    """One request of the newest model; `break_it` is done to the server before the method, or after it."""
    service, control = opened
    model = service.ledger.models.all()[-1].name
    write_samples(trained.train.pixels[draw(trained.train, [8], 6, 0)], home / "samples")
    service.requests.submit(model, Behaviour(name="eight", kind="class", targets=(8,)), str(home / "samples"), quick)

    def execute(order: WorkOrder, store: Any, name: str, stop: threading.Event) -> Outcome:
        if not late:
            break_it(control)
        outcome = unlearn(order, store, torch.device("cpu"))
        if late:
            break_it(control)
        return outcome

    run = functools.partial(run_request, service.ledger, service.artifacts, execute, timings=Timings(poll=0.05))
    (result,) = drain(service.ledger, "w", WorkerOptions(model=model), run)
    assert [version.number for version in service.ledger.models.versions(model)] == [1, 2]
    assert [erasure.behaviour.name for erasure in service.ledger.models.erasures(model)] == ["eight"]
    needed, _ = service.ledger.references()
    assert all(service.artifacts.has(digest) for digest in needed)
    return result
