"""The measured scenarios, on the real MNIST: the figures of the README hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fsu_ray.errors import InvalidData
from fsu_ray.experiments.mnist import read_bench, scenario
from fsu_ray.method.unlearn import unlearn
from fsu_ray.recipes import Recipe
from fsu_ray.search_space import apply
from fsu_ray.service import Service
from fsu_ray.work import Outcome, WorkOrder


@pytest.mark.slow
@pytest.mark.mnist
def test_class_9_is_forgotten_and_the_rest_is_kept(service: Service, mnist: Path) -> None:
    """LeNet5, 3 % of class 9, the default recipe with 180 inversion steps: D_r at least 99, D_e at most 2."""

    def here(order: WorkOrder, store: Any, name: str, stop: Any) -> Outcome:
        return unlearn(order, store, torch.device("cpu"))

    bench = read_bench(mnist)
    recipe = apply(Recipe(), {"invert.steps": 180})
    rows = list(
        scenario(service.ledger, service.artifacts, here, bench, "class9", "lenet5", 2, 0, recipe, lambda _: None)
    )
    before, after = rows
    assert before["class 9"] > 97
    assert after["class 9"] <= 2
    assert after["D_r"] >= min(99.0, before["D_r"] - 0.4)
    assert after["generator"] == "trained"
    assert after["probes"] > 200


def test_a_folder_without_the_lists_is_named(tmp_path: Path) -> None:
    """One line that says what to set."""
    with pytest.raises(InvalidData, match="set FSU_DATA"):
        read_bench(tmp_path)
