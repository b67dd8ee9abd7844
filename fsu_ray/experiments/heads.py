"""A Ray head on free ports of this machine, with the Jobs API and a token, for experiments that kill it."""

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

PATIENCE = 300.0
"""Seconds after which a process that has not done what it is to do is given up."""

BIN = Path(sys.executable).parent


@dataclass
class Head:
    """A head in a folder `home`, whose processes find `settings` in their environment and bear a mark there; Prometheus
    asks it at the port `metrics`."""

    home: Path
    settings: dict[str, str]
    metrics: int = 0
    address: str = ""
    mark: str = ""
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What its processes find, and who talks to it."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.home / "token")}
        return self.settings | token | {"RAY_USAGE_STATS_ENABLED": "0"}

    def start(self) -> None:
        """Start it and wait until it takes jobs."""
        gcs, http = free_port(), free_port()
        self.address, self.mark = f"http://127.0.0.1:{http}", f"FSU_FAILURES={self.home}-{gcs}"
        name, value = self.mark.split("=")
        ray = f"--head --port={gcs} --dashboard-host=127.0.0.1 --dashboard-port={http} --num-cpus=2 --block"
        ray += f" --metrics-export-port={self.metrics}" if self.metrics else ""
        ray += " --dashboard-agent-listen-port=0"  # another Ray may have the usual one
        command = [str(BIN / "ray"), "start", *ray.split(), "--object-store-memory=200000000"]
        own = {k: v for k, v in self.environment.items() if k != "PYTHONPATH"} | {name: value}
        own["PATH"] = f"{BIN}:{own['PATH']}"
        with (self.home / "head.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=own, cwd=self.home, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE
        while self.fsu("jobs", "list").returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no head; see {self.home}/head.log")
            time.sleep(1)

    def kill(self) -> None:
        """SIGKILL for it and everything on it, drivers and workers too."""
        while self.mark and (left := marked(self.mark)):
            for process in left:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if self.process is not None:
                self.process.wait()
            time.sleep(0.2)

    def fsu(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of `fsu` that talks to it."""
        command = [str(BIN / "fsu"), *words, "--address", self.address]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=2 * PATIENCE)

    def submit(self, model: str, *words: str) -> str | None:
        """Send a job for a model; its id, None where nothing was ready."""
        done = self.fsu("submit", "--model", model, "--json", *words)
        try:
            return json.loads(done.stdout)["job"]  # type: ignore[no-any-return]
        except (json.JSONDecodeError, KeyError):
            raise RuntimeError(f"fsu submit: {done.stdout}{done.stderr}") from None


@contextmanager
def on_head(home: Path, settings: dict[str, str], metrics: int = 0) -> Iterator[Head]:
    """A head while the block runs, with a token of its own; `metrics` is the port for Prometheus, any where it is 0."""
    token = home / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    head = Head(home, settings, metrics)
    try:
        head.start()
        yield head
    finally:
        head.kill()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def marked(mark: str) -> list[int]:
    """The living processes with NAME=VALUE in the environment that they were started with."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found
