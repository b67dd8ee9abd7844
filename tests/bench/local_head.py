"""A Ray head on free ports of this machine, with the Jobs API and a token: for tests and benchmarks that kill it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 300.0  # seconds: how long to wait for a process before giving up

BIN = Path(sys.executable).parent


@dataclass
class LocalHead:
    """A head whose log is in `home` and whose processes have `settings` in their environment.

    `mark` is one more variable there, NAME=VALUE: `kill` finds the head's processes by it. `metrics` is the port for
    Prometheus; 0 leaves it to Ray.
    """

    home: Path
    settings: dict[str, str]
    metrics: int = 0
    address: str = ""
    mark: str = ""
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the head's processes and of the commands that talk to the head."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.home / "token")}
        return self.settings | token | {"RAY_USAGE_STATS_ENABLED": "0"}

    def start(self) -> None:
        """Start the head and wait until it accepts jobs. Raises RuntimeError after `PATIENCE` seconds."""
        gcs, http = free_port(), free_port()
        self.address, self.mark = f"http://127.0.0.1:{http}", f"FSU_FAILURES={self.home}-{gcs}"
        name, value = self.mark.split("=")
        ray = f"--head --port={gcs} --dashboard-host=127.0.0.1 --dashboard-port={http} --num-cpus=2 --block"
        ray += f" --metrics-export-port={self.metrics}" if self.metrics else ""
        ray += " --dashboard-agent-listen-port=0"  # the usual port may be taken
        command = [str(BIN / "ray"), "start", *ray.split(), "--object-store-memory=200000000"]
        environment = {k: v for k, v in self.environment.items() if k != "PYTHONPATH"} | {name: value}
        environment["PATH"] = f"{BIN}:{environment['PATH']}"
        with (self.home / "head.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=self.home, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE
        while self.fsu("jobs", "list").returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the Ray head did not start; see {self.home}/head.log")
            time.sleep(1)

    def kill(self) -> None:
        """SIGKILL the head and everything on it, drivers and workers too."""
        while self.mark and (processes := marked(self.mark)):
            for process in processes:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if self.process is not None:
                self.process.wait()
            time.sleep(0.2)

    def fsu(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of `fsu` against the head."""
        command = [str(BIN / "fsu"), *words, "--address", self.address]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=2 * PATIENCE)

    def submit(self, model: str, *words: str) -> str | None:
        """Submit a job for a model; the job's id, or None where no request was ready."""
        done = self.fsu("submit", "--model", model, "--json", *words)
        try:
            return json.loads(done.stdout)["job"]  # type: ignore[no-any-return]
        except (json.JSONDecodeError, KeyError):
            raise RuntimeError(f"fsu submit: {done.stdout}{done.stderr}") from None


@contextmanager
def on_head(home: Path, settings: dict[str, str], metrics: int = 0) -> Iterator[LocalHead]:
    """A running `LocalHead` with a new token, killed when the block ends."""
    token = home / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    head = LocalHead(home, settings, metrics)
    try:
        head.start()
        yield head
    finally:
        head.kill()


def free_port() -> int:
    """A port that no process listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def marked(mark: str) -> list[int]:
    """The ids of the processes that were started with NAME=VALUE in their environment."""
    processes = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                processes.append(int(entry.name))
        except OSError:
            continue
    return processes
