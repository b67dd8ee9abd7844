"""What tables compute at the paper's size, for a few steps: networks and generators as wide as there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors

from fsu_ray.experiments import images
from fsu_ray.experiments.catalogue import NAMES, Cell, find, find_cell_type
from fsu_ray.experiments.mnist import Bench
from fsu_ray.experiments.reproduce import _key
from fsu_ray.method.datasets import Images

FEW = 32
"""Images to train on: one step an epoch."""


def inverters() -> dict[tuple[str, str], Cell]:
    """The cell of an inverter for each network and data set of the tables on images, at the paper's size."""
    originals: dict[tuple[str, str], Cell] = {}
    for name, (module, _) in NAMES.items():
        waiting = [] if module == "moons" else find(name).cells("paper", 1)
        seen: set[str] = set()
        while waiting:
            work = waiting.pop()
            if _key(work) not in seen:
                seen.add(_key(work))
                waiting += find_cell_type(work[0]).needs(work[1])
                if work[0] == "generator":
                    original = work[1]["classifier"]
                    originals.setdefault((original["arch"], images.SCENARIOS[original["scenario"]][0]), work[1])
    return originals


def test_tables_have_the_papers_networks() -> None:
    """All three on MNIST, PreActResNet-18 on CIFAR-10; 7,000 steps, n = 16 and 64."""
    assert {net: (cell["invert"]["steps"], cell["invert"]["width"]) for net, cell in inverters().items()} == {
        ("lenet5", "mnist"): (7000, 16),
        ("preactresnet18", "mnist"): (7000, 16),
        ("resnet50", "mnist"): (7000, 16),
        ("preactresnet18", "cifar10"): (7000, 64),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "data"),
    [("lenet5", "mnist"), ("preactresnet18", "mnist"), ("resnet50", "mnist"), ("preactresnet18", "cifar10")],
)
def test_a_few_steps_at_the_papers_size(
    store: Any, make: Any, monkeypatch: pytest.MonkeyPatch, arch: str, data: str
) -> None:
    """An epoch on 32 random images and two steps of the inversion, two samples a class in a batch."""
    channels, rng = 3 if data == "cifar10" else 1, torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (FEW, channels, 32, 32), generator=rng, dtype=torch.uint8)
    some = Images(noise, torch.arange(FEW) % 10)
    monkeypatch.setattr(images, "bench", lambda name: Bench(some, some, torch.arange(3), torch.arange(3)))
    inner, steps = images.invert.invert, []

    def two(judge: Any, recipe: Any, run: Any, heard: Any) -> Any:
        made = inner(judge, recipe, run, heard, until=2)
        steps.append(run.step)
        return made

    monkeypatch.setattr(images.invert, "invert", two)
    cell = inverters()[arch, data]
    cell = {**cell, "classifier": {**cell["classifier"], "epochs": 1}, "invert": {**cell["invert"], "batch": 20}}
    row = make("generator", cell)
    assert steps == [2]
    trained = load_tensors(store.get(make("classifier", cell["classifier"])["weights"]))
    assert (
        sum(tensor.numel() for tensor in trained.values())
        > {"lenet5": 6e4, "preactresnet18": 1.1e7, "resnet50": 2.3e7}[arch]
    )
    drawn = load_tensors(store.get(row["weights"]))
    assert drawn["conv3.weight"].shape == (channels, 128 if data == "cifar10" else 32, 3, 3)
