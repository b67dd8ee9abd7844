"""The client of the Jobs API against a server that answers as a head does, and the package that goes with a job."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import fsu_ray
from fsu_ray.cluster.jobs import JobsClient, package_env
from fsu_ray.errors import ClusterUnavailable, NotFound, RunFailed, UserError

PACKAGE = Path(fsu_ray.__file__).parent
NO_AGENT = "No available agent to submit job, please try again later."
TAKEN = "Traceback (most recent call last):\n  ...\nValueError: Job with submission_id j already exists."


class Head:
    """A server that plays a head: jobs by name, and the refusals (status, text) of the next submissions."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.refusals: list[tuple[int, str]] = []
        self.taken_by_another = False
        self.uploads: list[bytes] = []
        head = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, document: Any, status: int = 200) -> None:
                text = (document if isinstance(document, str) else json.dumps(document)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                if self.path == "/api/version":
                    version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": "session_1"}
                    self.answer(version)
                elif name in head.jobs:
                    self.answer(
                        {"type": "SUBMISSION", "submission_id": name, "status": head.jobs[name], "entrypoint": ""}
                    )
                else:
                    self.answer(f"Job {name} does not exist", 404)

            def do_PUT(self) -> None:
                head.uploads.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer("")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if head.refusals:
                    if head.taken_by_another:
                        head.jobs[body["submission_id"]] = "RUNNING"
                    status, text = head.refusals.pop(0)
                    self.answer(text, status)
                    return
                head.jobs[body["submission_id"]] = "PENDING"
                self.answer({"job_id": body["submission_id"], "submission_id": body["submission_id"]})

            def log_message(self, *_: Any) -> None:
                """Nothing is printed."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    head = Head()
    thread = threading.Thread(target=head.server.serve_forever, daemon=True)
    thread.start()
    yield head
    head.server.shutdown()
    head.server.server_close()
    thread.join()


def test_a_name_is_submitted_once_and_continued_after_its_end(head: Head) -> None:
    client = JobsClient(head.address)
    job, new = client.submit("true", "j", {}, {})
    assert (job.id, job.status, new) == ("j", "PENDING", True)
    assert client.submit("true", "j", {}, {})[1] is False
    head.jobs["j"] = "FAILED"
    assert client.submit("true", "j", {}, {})[0].id == "j.2"


def test_a_job_that_another_process_submits_at_the_same_time(head: Head) -> None:
    """The head refuses the second submission of a name; the first one counts."""
    head.refusals, head.taken_by_another = [(400, TAKEN)], True
    job, new = JobsClient(head.address).submit("true", "j", {}, {})
    assert (job.id, job.status, new) == ("j", "RUNNING", False)


def test_a_head_whose_agent_starts_late(head: Head) -> None:
    """Submission is repeated for `agent_seconds`, and only while the agent is what is missing."""
    head.refusals = [(500, NO_AGENT)]
    assert JobsClient(head.address).submit("true", "j", {}, {})[1] is True
    head.refusals = [(500, NO_AGENT)]
    with pytest.raises(ClusterUnavailable, match="has no agent that starts jobs"):
        JobsClient(head.address, agent_seconds=-1).submit("true", "k", {}, {})
    head.refusals = [(500, "Traceback (most recent call last):\n ...\nKeyError: 'x'\n")]
    with pytest.raises(RunFailed, match="KeyError: 'x"):
        JobsClient(head.address).submit("true", "k", {}, {})


def test_answers_with_another_status(head: Head) -> None:
    with pytest.raises(NotFound, match="has no job 'none'; `fsu jobs list` shows its jobs"):
        JobsClient(head.address).job("none")
    with pytest.raises(UserError, match="Ray knows no key 'pipp'"):
        JobsClient(head.address).submit("true", "j", {"pipp": []}, {})


def test_a_token_file_that_is_not_there_is_one_line(head: Head, tmp_path: Path) -> None:
    """In a process of its own: Ray reads the token once per process."""
    code = f"from fsu_ray.cluster.jobs import JobsClient\nJobsClient({head.address!r})"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PACKAGE.parent), "HOME": str(tmp_path)}
    environment["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "none")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"fsu_ray.errors.ClusterUnavailable: {head.address} wants a token: set RAY_AUTH_MODE=token")


def test_the_package_that_a_job_uploads_is_small_and_complete(head: Head, tmp_path: Path) -> None:
    """At most 600 kB; all of the package but the results of the paper; unpacked by Ray's code for nodes, it runs."""
    from ray._private.runtime_env.packaging import unzip_package

    JobsClient(head.address).submit("true", "j", package_env({}), {})
    (upload,) = head.uploads
    assert len(upload) <= 600_000
    (tmp_path / "package.zip").write_bytes(upload)
    unzip_package(str(tmp_path / "package.zip"), str(tmp_path), remove_top_level_directory=False, unlink_zip=True)
    packed = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    results = PACKAGE / "experiments" / "results"
    files = {file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert packed == {str(file.relative_to(PACKAGE.parent)) for file in files if not file.is_relative_to(results)}
    code = (
        "import fsu_ray, runpy; print(fsu_ray.__file__, flush=True); runpy.run_module('fsu_ray', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "run", "--help"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "fsu_ray"))
