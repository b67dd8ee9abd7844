"""Fixtures: a real ledger on SQLite and on PostgreSQL, and a driver that fills it."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import fsu_ray.storage
from fsu_ray.config import Timings
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Digest, ModelSpec, ModelVersion, Request
from fsu_ray.storage.ledger import Ledger, open_ledger
from fsu_ray.work import Outcome, TargetResult

SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)


def digest(text: str) -> Digest:
    """The digest of an artifact that no test stores."""
    return Digest(hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True)
class ModelDriver:
    """A ledger with one model, and short methods for the steps of tests."""

    ledger: Ledger
    name: str = "digits"

    def submit(self, name: str = "nine", *targets: int, kind: Any = "class", recipe: Recipe | None = None) -> Request:
        behaviour = Behaviour(name=name, kind=kind, targets=targets or (9,))
        return self.ledger.requests.submit(self.name, behaviour, digest(f"samples of {name}"), 8, recipe or Recipe())[0]

    def claim(self, worker: str = "w1", lease: float = 60.0) -> Request:
        request = self.ledger.requests.claim(worker, lease, self.name)
        assert request is not None
        return request

    def outcome(self, request: Request, **changes: Any) -> Outcome:
        """What a run of one request brings back; `mask`, `probes` and `report` are those of its target."""
        own = {name: changes.pop(name) for name in ("mask", "probes", "report") if name in changes}
        values = {
            "reason": None,
            "generator_use": "trained",
            "generator_weights": digest(f"generator of {request.id}"),
            "dataset": digest(f"dataset of {request.id}"),
            "metrics": {"agreement": 0.99, "starved": []},
            "refused": (),
            "weights": digest(f"weights of {request.id}"),
            "targets": (self.result(request, **own),),
            "seconds": {"invert": 60.0},
        }
        return Outcome(**{**values, **changes})

    def result(self, request: Request, **changes: Any) -> TargetResult:
        """What a run brings back for one request."""
        known = {
            "mask": digest(f"mask of {request.id}"),
            "probes": digest(f"probes of {request.id}"),
            "report": {"forgetting": {"probes_in_target": 0.01}, "retention": {"agreement": 0.98}},
        }
        return TargetResult(request.id, **{**known, **changes})

    def erase(self, name: str = "nine", *targets: int, kind: Any = "class", **changes: Any) -> ModelVersion:
        """Take a behaviour all the way: submitted, claimed, committed."""
        generator = changes.pop("generator_id", None), changes.pop("warm_started_from", None)
        self.submit(name, *targets, kind=kind, recipe=changes.pop("recipe", None))
        request = self.claim()
        return self.ledger.commit(
            request,
            self.outcome(request, **changes),
            self.ledger.models.version(self.name),
            generator_id=generator[0],
            warm_started_from=generator[1],
        )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of this test's ledger on SQLite."""
    return tmp_path / "ledger.db"


SERVER = os.environ.get("FSU_POSTGRES", "postgresql+psycopg://postgres@127.0.0.1:5432/test")


@pytest.fixture(scope="session")
def server() -> Iterator[sa.Engine]:
    """A PostgreSQL server for schemas; without one, skips, or fails where FSU_REQUIRE names postgres."""
    try:
        engine = sa.create_engine(SERVER, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 5})
        engine.connect().close()
    except (ImportError, sa.exc.OperationalError) as error:
        if "postgres" in os.environ.get("FSU_REQUIRE", "").split(","):
            pytest.fail(f"FSU_REQUIRE names postgres, and there is none at {SERVER}: {error}")
        pytest.skip(f"no PostgreSQL at {SERVER} (FSU_POSTGRES)")
    yield engine
    engine.dispose()


@contextmanager
def _schema(server: sa.Engine) -> Iterator[str]:
    """The URL of a new schema, dropped at the end."""
    name = f"fsu_test_{secrets.token_hex(6)}"
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
        yield f"{SERVER}?options=-csearch_path%3D{name}"
        connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")


@pytest.fixture
def postgresql(server: sa.Engine) -> Iterator[str]:
    """The URL of an empty schema for this test."""
    with _schema(server) as url:
        yield url


@pytest.fixture(scope="session")
def migrating(server: sa.Engine) -> str:
    """The SQL that creates a ledger on PostgreSQL: replaying it takes a quarter of the migrations' time."""
    statements: list[str] = []
    hook: Any = ("before_cursor_execute", lambda connection, cursor, statement, *_: statements.append(statement))
    with _schema(server) as url:
        sa.event.listen(sa.Engine, *hook)
        open_ledger(url).close()
        sa.event.remove(sa.Engine, *hook)
    writes = [each for each in statements if each.split()[0] in ("CREATE", "ALTER", "DROP", "INSERT", "UPDATE")]
    return ";\n".join(writes)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, file: Path, new_ledger: Path) -> str:
    """The URL of this test's ledger, on each engine in turn; the ledger exists already if the test uses `ledger`."""
    exists = "ledger" in request.fixturenames
    if request.param == "postgresql":
        schema_url: str = request.getfixturevalue("postgresql")
        if exists:
            script = request.getfixturevalue("migrating")
            engine = sa.create_engine(schema_url)
            with engine.begin() as connection:
                connection.exec_driver_sql(script)
            engine.dispose()
        return schema_url
    if exists:
        shutil.copy(new_ledger, file)
    return f"sqlite:///{file}"


@pytest.fixture
def timings() -> Timings:
    """The timings of `ledger`; a test parametrizes or overrides this fixture for others."""
    return Timings()


@pytest.fixture
def ledger(url: str, timings: Timings) -> Iterator[Ledger]:
    with open_ledger(url, timings) as opened:
        yield opened


@pytest.fixture
def new_driver(ledger: Ledger) -> Callable[..., ModelDriver]:
    """Registers a model, its spec with some changes, and returns its driver."""

    def make(name: str, **changes: Any) -> ModelDriver:
        ledger.models.register(name, SPEC.model_copy(update=changes), digest("weights"), "digits")
        return ModelDriver(ledger, name)

    return make


@pytest.fixture
def driver(new_driver: Callable[..., ModelDriver]) -> ModelDriver:
    return new_driver("digits")


@dataclass(frozen=True)
class Raw:
    """A plain connection to the ledger, as another program would open it: none of our settings, autocommit."""

    connection: sa.Connection

    @property
    def engine(self) -> str:
        return self.connection.dialect.name

    def execute(self, sql: str, parameters: dict[str, Any] | None = None) -> sa.CursorResult[Any]:
        """One statement of SQL, with `:name` for parameters."""
        text = sa.text(sql) if parameters else sa.text(sql.replace(":", "\\:"))
        return self.connection.execute(text, parameters or {})

    def columns(self, table: str) -> list[str]:
        return [column["name"] for column in sa.inspect(self.connection).get_columns(table)]


@pytest.fixture
def raw(url: str) -> Iterator[Raw]:
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield Raw(connection)
    engine.dispose()


@pytest.fixture
def in_processes() -> Callable[..., list[str]]:
    """Runs a script in several processes at once; returns the output of each."""

    def run(script: str, *arguments: str, processes: int) -> list[str]:
        root = Path(fsu_ray.storage.__file__).parents[2]
        # Each prints that it is ready and waits, so that all begin at one moment.
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
