"""Small things that the tests of the method share: specs, classifiers with settled BatchNorm statistics, generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fsu_ray.method.networks import Classifier
from fsu_ray.records import ModelSpec


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
