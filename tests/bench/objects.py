"""Seconds of a request with artifacts and checkpoints in an S3 bucket, against the same request on local disk.

    python -m tests.bench.objects [--runs 5] [--delay MS] [--endpoint HOST:PORT --bucket NAME]

Each run registers a new model and runs two requests through ledger and Ray: the first trains a generator, the second
reuses it. Disk and bucket take turns. The S3 server is moto's (extra `test`), started on loopback, or the one at
--endpoint, with credentials from the usual chain. --delay delays each request to the server, like a network. Prints the
seconds of each request, the ratio of the medians, and how many artifacts of 250 kB are put and got in a second.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fsu_ray.config import CHECKPOINT_STEPS, make_recipe, sqlite_url
from fsu_ray.errors import FsuError, RunFailed
from fsu_ray.pipeline import Execute, WorkerOptions, drain, run_request
from fsu_ray.records import Behaviour, ModelSpec, Status
from fsu_ray.storage.artifacts import Artifacts, locate
from fsu_ray.storage.ledger import Ledger, open_ledger
from fsu_ray.work import BlobStore, Outcome, WorkOrder
from tests.bench.local_head import free_port

ERASED = (8, 3)
SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10, mean=(0.3,), std=(0.37,))


@dataclass(frozen=True)
class Location:
    """A store of artifacts, and the (file system, path) of the checkpoints."""

    name: str
    artifacts: Artifacts
    runs: tuple[Any, str]


@dataclass(frozen=True)
class Bench:
    """A classifier of the digits, and target samples by erased class, in their stored form."""

    weights: bytes
    samples: dict[int, bytes]


def read_bench() -> Bench:
    """Train the classifier and draw the samples."""
    import torch

    from fsu_ray.method.datasets import draw, load
    from fsu_ray.method.fit import TrainingSchedule, fit
    from fsu_ray.method.inputs import save_samples
    from fsu_ray.models.classifier import Classifier

    images = load("digits", "train", SPEC.shape)
    torch.manual_seed(0)
    classifier = Classifier(SPEC)
    fit(classifier, images.pixels, images.labels, TrainingSchedule(epochs=20, batch=64))
    samples = {k: save_samples(images.pixels[draw(images, [k], 8, 0)]) for k in ERASED}
    return Bench(classifier.to_bytes(), samples)


def executing(location: Location) -> Execute:
    """An `Execute` on the Ray that this process has joined."""
    from fsu_ray.cluster import workers

    def execute(order: WorkOrder, store: BlobStore, name: str, stop: threading.Event) -> Outcome:
        return workers.execute(order, store, location.runs, name, CHECKPOINT_STEPS, lambda *_: None, stop)

    return execute


def requests(ledger: Ledger, location: Location, bench: Bench, seed: int) -> list[float]:
    """The seconds of each request of a new model, from submission to end; a new `seed` makes new artifacts."""
    model, recipe, seconds = f"m-{secrets.token_hex(4)}", make_recipe("digits", [{"invert": {"seed": seed}}]), []
    ledger.models.register(model, SPEC, location.artifacts.put(bench.weights))
    run = partial(run_request, ledger, location.artifacts, executing(location))
    for target, samples in bench.samples.items():
        started = time.monotonic()
        behaviour = Behaviour(name=f"class-{target}", kind="class", targets=(target,))
        ledger.requests.submit(model, behaviour, location.artifacts.put(samples), 8, recipe)
        (result,) = drain(ledger, "benchmark", WorkerOptions(model=model), run)
        if result.request.status is not Status.SUCCEEDED:
            raise RunFailed(f"{location.name}: {result.request.status}, {result.request.reason}")
        seconds.append(time.monotonic() - started)
    return seconds


def throughput(artifacts: Artifacts, number: int = 100, size: int = 250_000) -> tuple[float, float]:
    """Artifacts of `size` bytes that are put and got in a second, one after another."""
    blobs = [os.urandom(size) for _ in range(number)]
    started = time.monotonic()
    digests = [artifacts.put(blob) for blob in blobs]
    middle = time.monotonic()
    for digest in digests:
        artifacts.get(digest)
    return number / (middle - started), number / (time.monotonic() - middle)


@contextmanager
def server() -> Iterator[str]:
    """The address, HOST:PORT, of a new moto server process."""
    port = free_port()
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, **silent)  # type: ignore[call-overload]
    try:
        _await(port)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _await(port: int) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise RunFailed("moto's server does not start: pip install 'fsu_ray[test]', or give --endpoint")


@contextmanager
def delayed(address: str, seconds: float) -> Iterator[str]:
    """The address of a proxy for `address` that delays what it forwards there by `seconds`."""
    host, _, port = address.partition(":")
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, sink: socket.socket, wait: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                time.sleep(wait)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                there = socket.create_connection((host, int(port)))
                for ends in ((client, there, seconds), (there, client, 0.0)):
                    threading.Thread(target=copy, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def measure(locations: list[Location], runs: int) -> None:
    """Run the requests at each location in turn, and print the seconds."""
    bench = read_bench()
    for location in locations:
        puts, gets = throughput(location.artifacts)
        print(f"{location.name}: {puts:.0f} artifacts of 250 kB put a second, {gets:.0f} got", flush=True)
    taken: dict[str, list[list[float]]] = {location.name: [] for location in locations}
    with tempfile.TemporaryDirectory() as folder, open_ledger(sqlite_url(Path(folder) / "ledger.db")) as ledger:
        requests(ledger, locations[0], bench, seed=0)  # warm-up: the first workers of a Ray start slowly
        for seed in range(1, runs + 1):
            for location in locations:
                seconds = requests(ledger, location, bench, seed)
                taken[location.name].append(seconds)
                print(f"{location.name}: {seconds[0]:.1f} s, then {seconds[1]:.1f} s", flush=True)
    disk, bucket = (taken[location.name] for location in locations)
    for number, which in enumerate(("generator trained", "generator reused")):
        on_disk, in_bucket = (statistics.median(seconds[number] for seconds in runs) for runs in (disk, bucket))
        print(
            f"{which}: median {on_disk:.1f} s on disk, {in_bucket:.1f} s in the bucket, ratio {in_bucket / on_disk:.3f}"
        )


def main() -> int:
    """Measure; 0, or the error's exit code."""
    from fsu_ray.cluster import workers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--endpoint", help="HOST:PORT of an S3 server")
    parser.add_argument("--bucket", help="a bucket on that server")
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS", help="milliseconds before each request")
    options = parser.parse_args()
    if bool(options.endpoint) != bool(options.bucket):
        parser.error("--endpoint and --bucket go together")
    if not options.endpoint:  # moto accepts any credentials, but boto3 wants some
        os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
    try:
        with contextlib.ExitStack() as stack:
            address = options.endpoint or stack.enter_context(server())
            if not options.bucket:
                urllib.request.urlopen(urllib.request.Request(f"http://{address}/benchmark", method="PUT")).close()
            if options.delay:
                address = stack.enter_context(delayed(address, options.delay / 1000))
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            uri = f"s3://{options.bucket or 'benchmark'}/{{}}?endpoint_override={address}&scheme=http"
            disk = Location("disk", Artifacts.open(f"{folder}/artifacts"), locate(f"{folder}/runs"))
            bucket = Location("bucket", Artifacts.open(uri.format("artifacts")), locate(uri.format("artifacts/runs")))
            workers.connect()
            stack.callback(workers.disconnect)
            measure([disk, bucket], options.runs)
    except FsuError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
