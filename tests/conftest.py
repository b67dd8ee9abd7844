"""What many tests need: a small trained classifier, a store in memory, a home folder of its own for each test."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

from fsu_ray.config import read_settings
from fsu_ray.errors import StorageError
from fsu_ray.method.datasets import Images, load
from fsu_ray.method.fit import TrainingSchedule, fit
from fsu_ray.models.classifier import Classifier
from fsu_ray.recipes import Recipe
from fsu_ray.records import ModelSpec
from fsu_ray.service import Service, connect
from fsu_ray.storage.ledger import open_ledger

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # one of as many processes as there are cores
    os.environ["OMP_NUM_THREADS"] = "1"
# Digests depend on the number of threads.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# Enough to tell the stages apart in seconds; the figures of such a recipe mean nothing.
QUICK = {
    "invert": {"steps": 24, "batch": 30, "width": 4},
    "synthesize": {"per_class": 40, "entropy_threshold": 2.3, "starved_below": 0.0, "max_draws": 8},
    "relearn": {"epochs": 3},
    "gate": {"agreement_min": 0.0, "forgotten_max": 1.0, "coverage_min": 0.0, "acceptance_min": 0.0,
             "dataset_agreement_min": 0.0, "bn_distance_max": 100.0, "returned_max": 1.0, "returned_margin": 1.0},
}  # fmt: skip


class MemoryStore(dict[str, bytes]):
    """A `BlobStore` in memory, for tests of the method alone."""

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self[digest] = data
        return digest

    def get(self, digest: str) -> bytes:  # type: ignore[override]
        if digest not in self:
            raise StorageError(f"artifact {digest} is missing")
        return self[digest]

    def has(self, digest: str) -> bool:
        return digest in self


@dataclass(frozen=True)
class Trained:
    """A classifier of the digits: its spec, its weights as bytes, and the data."""

    spec: ModelSpec
    weights: bytes
    train: Images
    test: Images


@pytest.fixture(scope="session")
def trained() -> Trained:
    """LeNet5 on the digits at 16x16 pixels, 12 epochs: about 98 % right, at a fifth of the cost of 32x32."""
    spec = ModelSpec(arch="lenet5", channels=1, height=16, width=16, classes=10, mean=(0.3,), std=(0.37,))
    images, held = load("digits", "train", spec.shape), load("digits", "test", spec.shape)
    torch.manual_seed(7)  # one whose inverter of QUICK draws all classes, whatever the threads and the precision
    classifier = Classifier(spec)
    fit(classifier, images.pixels, images.labels, TrainingSchedule(epochs=12, batch=64))
    return Trained(spec, classifier.to_bytes(), images, held)


@pytest.fixture
def store() -> MemoryStore:
    """An empty store in memory."""
    return MemoryStore()


@pytest.fixture
def quick() -> Recipe:
    """A recipe of seconds whose gates let everything through."""
    return Recipe.model_validate(QUICK)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with no settings from outside."""
    for name in ("FSU_HOME", "FSU_LEDGER", "FSU_ARTIFACTS", "FSU_RUNS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def new_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of SQLite in which nothing is yet. Tests copy it: making one takes a fifth of a second, and they are
    many."""
    file = tmp_path_factory.mktemp("ledger") / "ledger.db"
    open_ledger(f"sqlite:///{file}").close()
    return file


@pytest.fixture
def service(home: Path, new_ledger: Path) -> Service:
    """A service on a new ledger in an empty folder."""
    settings = read_settings()
    settings.home.mkdir()
    shutil.copy(new_ledger, settings.home / "ledger.db")
    return connect(settings)


@dataclass(frozen=True)
class Bucket:
    """A bucket of a server on loopback (kind s3 or gs), seen with plain HTTP: past everything that is tested."""

    kind: str
    address: str
    name: str

    def uri(self, prefix: str = "store", address: str | None = None) -> str:
        """The place `prefix` in it, reached directly or at another address."""
        user = "anonymous@" if self.kind == "gs" else ""
        return f"{self.kind}://{user}{self.name}/{prefix}?endpoint_override={address or self.address}&scheme=http"

    def make(self) -> None:
        if self.kind == "s3":
            self._ask("PUT", f"/{self.name}")
        else:
            self._ask("POST", "/storage/v1/b", json.dumps({"name": self.name}).encode(), "application/json")

    def names(self, prefix: str = "store") -> list[str]:
        """The objects below `prefix`, without those that stand for folders and the one that tries writing."""
        if self.kind == "s3":
            answer = self._ask("GET", f"/{self.name}?list-type=2").decode()
            found = re.findall("<Key>(.*?)</Key>", answer)
        else:
            found = [item["name"] for item in json.loads(self._ask("GET", self._objects())).get("items", [])]
        below = [name.removeprefix(f"{prefix}/") for name in found if name.startswith(f"{prefix}/")]
        return [name for name in below if not name.endswith("/") and name not in ("", ".writable")]

    def read(self, name: str, prefix: str = "store") -> bytes:
        key = f"{prefix}/{name}"
        if self.kind == "s3":
            return self._ask("GET", f"/{self.name}/{key}")
        return self._ask("GET", f"{self._objects()}/{quote(key, safe='')}?alt=media")

    def write(self, name: str, data: bytes, prefix: str = "store") -> None:
        key = f"{prefix}/{name}"
        if self.kind == "s3":
            self._ask("PUT", f"/{self.name}/{key}", data)
        else:
            self._ask("POST", f"/upload{self._objects()}?uploadType=media&name={quote(key, safe='')}", data)

    def _objects(self) -> str:
        return f"/storage/v1/b/{self.name}/o"

    def _ask(self, method: str, path: str, data: bytes | None = None, kind: str = "application/octet-stream") -> bytes:
        signed = "AWS4-HMAC-SHA256 Credential=us/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=00"
        headers = {"Content-Type": kind, "Authorization": signed}
        request = urllib.request.Request(f"http://{self.address}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())


@contextmanager
def _serving(*command: str) -> Iterator[str]:
    """A server on loopback in a process of its own, begun by `command` and its port: its address.

    In this process it would wait for Python's lock while a client of pyarrow, which has it, waits for the server.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[str]]:
    """Begins a server on loopback, and ends it: see `_serving`."""
    return _serving


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A server that speaks S3 (moto's): its address. Credentials are in the environment, where they are looked for."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "the-key-id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
        with _serving(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p") as address:
            yield address


@pytest.fixture(scope="session")
def gs_server() -> Iterator[str]:
    """A server that speaks Google Cloud Storage's protocol (gcp-storage-emulator's): its address."""
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--in-memory", "--host", "127.0.0.1", "--port"]
    with _serving(*command) as address:
        yield address


def _bucket(kind: str, address: str) -> Bucket:
    bucket = Bucket(kind, address, f"bucket-{secrets.token_hex(4)}")
    bucket.make()
    return bucket


@pytest.fixture
def s3_bucket(s3_server: str) -> Bucket:
    """An empty bucket of S3."""
    return _bucket("s3", s3_server)


@pytest.fixture
def gs_bucket(gs_server: str) -> Bucket:
    """An empty bucket of Google Cloud Storage."""
    return _bucket("gs", gs_server)


@pytest.fixture
def mnist() -> Path:
    """The folder with the full MNIST; skips without it, fails where FSU_REQUIRE says that it must be there."""
    folder = Path(os.environ.get("FSU_DATA", ""))
    if not (folder / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").exists():
        if "mnist" in os.environ.get("FSU_REQUIRE", "").split(","):
            pytest.fail("FSU_REQUIRE names mnist, and FSU_DATA does not hold it")
        pytest.skip("FSU_DATA does not hold MNIST/raw/*.gz")
    return folder


def make_spec(arch: str = "lenet5", channels: int = 1, size: int = 16, classes: int = 3, **more: object) -> ModelSpec:
    """A small model; `more` goes to ModelSpec."""
    return ModelSpec(arch=arch, channels=channels, height=size, width=size, classes=classes, **more)


def make_classifier(arch: str = "lenet5", seed: int = 0, **more: object) -> Classifier:
    """A classifier in eval mode whose BatchNorm statistics come from noise, not from the initial 0 and 1."""
    torch.manual_seed(seed)
    spec = make_spec(arch, **more)
    classifier = Classifier(spec).train()
    with torch.no_grad():
        for _ in range(3):
            classifier(torch.rand(16, *spec.shape))
    return classifier.eval()


@pytest.fixture
def spec() -> Callable[..., ModelSpec]:
    """`make_spec`."""
    return make_spec


@pytest.fixture
def classifier() -> Callable[..., Classifier]:
    """`make_classifier`."""
    return make_classifier


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors as small as these are faster on one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
