"""What many tests need: a small trained classifier, a store in memory, a home folder of its own for each test."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fsu_ray.app import App
from fsu_ray.config import read_settings
from fsu_ray.errors import StorageError
from fsu_ray.method.datasets import Images, load
from fsu_ray.method.fit import Schedule, fit
from fsu_ray.method.networks import Classifier
from fsu_ray.recipes import Recipe
from fsu_ray.records import ModelSpec

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# Enough to tell the stages apart in seconds; the figures of such a recipe mean nothing.
QUICK = {
    "invert": {"steps": 60, "batch": 60, "width": 4},
    "synthesize": {"per_class": 40, "entropy_threshold": 2.0, "starved_below": 0.0},
    "relearn": {"epochs": 4},
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


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    """Digests depend on the number of threads, so tests fix it."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def trained() -> Trained:
    """LeNet5 on the digits, 8 epochs: about 96 % right."""
    spec = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10, mean=(0.3,), std=(0.37,))
    images, held = load("digits", "train", spec.shape), load("digits", "test", spec.shape)
    torch.manual_seed(0)
    classifier = Classifier(spec)
    fit(classifier, images.pixels, images.labels, Schedule(epochs=8, batch=64))
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
    for name in ("FSU_HOME", "FSU_LEDGER", "FSU_ARTIFACTS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def app(home: Path) -> App:
    """An app on a new ledger in an empty folder."""
    return App.open(read_settings())


@pytest.fixture
def mnist() -> Path:
    """The folder with the full MNIST; skips without it, fails where FSU_REQUIRE says that it must be there."""
    folder = Path(os.environ.get("FSU_DATA", ""))
    if not (folder / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").exists():
        if "mnist" in os.environ.get("FSU_REQUIRE", "").split(","):
            pytest.fail("FSU_REQUIRE names mnist, and FSU_DATA does not hold it")
        pytest.skip("FSU_DATA does not hold MNIST/raw/*.gz")
    return folder
