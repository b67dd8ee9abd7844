"""Table 5: whose generator draws for whom, and whether the gate's verdict is what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fsu_ray.experiments import images, transfer
from fsu_ray.experiments.catalogue import Row, find_cell_type
from fsu_ray.experiments.mnist import Bench
from fsu_ray.experiments.reproduce import _key


def test_each_for_each() -> None:
    """Sixteen D' of four generators; where a generator is a classifier's own, D' is that of the other tables."""
    works = transfer.TABLES["table5a"].cells("small", 2)
    assert len(works) == 32
    drawn = {_key(("dataset", cell["dataset"])): cell["dataset"] for _, cell in works}
    assert len(drawn) == 16
    assert len({_key(("generator", cell["generator"])) for cell in drawn.values()}) == 4
    assert sum("classifier" in cell for cell in drawn.values()) == 12
    for _, cell in works:
        source, target = (transfer.NETS["small"][name] for name in cell["variant"].split(" > "))
        assert [need[1]["arch"] for need in find_cell_type("erasure").needs(cell) if need[0] == "classifier"] == [
            target[0]
        ]
        assert cell["dataset"]["generator"]["classifier"]["arch"] == source[0]


@pytest.mark.mnist
def test_a_borrowed_generator(part: Bench, make: Any) -> None:
    """D' is labelled by the classifier that is unlearned, and so is its agreement."""
    first, second = ({**images.classifier("class9", "lenet5", seed, "small"), "epochs": 3} for seed in (1, 2))
    inverter = images.generator(first, {"steps": 60, "batch": 60, "width": 4, "weights": {"entropy": 10.0}})
    changes = {"per_class": 20, "entropy_threshold": 2.3, "max_draws": 8, "starved_below": 0.0}
    drawn = images.dataset(inverter, changes, second)
    kind, cell = images.erasure(drawn, 0.2, {"relearn": {"epochs": 3, "lr": 0.01}}, 5)
    row = make(kind, cell)
    assert row["before_D_r"] == make("classifier", second)["D_r"]
    assert make("dataset", drawn)["agreement"] == 1
    assert make("dataset", drawn)["generator"] == make("generator", inverter)["weights"]
    assert row["seed"] == 5


def test_the_verdict_stands_beside_the_result(tmp_path: Path) -> None:
    """What the gate lets and what it refuses, and how often that is what came of it."""
    rows: list[Row] = []
    for source in transfer.PAPER["class9"]:
        for target in transfer.PAPER["class9"]:
            bad = source == "ResNet-50" and target != "ResNet-50"
            refused = "starved classes [9]" if source == "ResNet-50" else ""
            rows += [{"variant": f"{source} > {target}", "scenario": "class9", "D_r": 99.0, "D_e": 30.0 if bad else 0.0,
                      "before_D_r": 99.4, "before_D_e": 99.0, "generator": refused, "acceptance": 0.5, "coverage": 0.9,
                      "seed": seed} for seed in (0, 1)]  # fmt: skip
    text = transfer.TABLES["table5a"].report(rows, tmp_path)
    assert "| Original | 99.40 / 99.00 |" in text
    assert "| ResNet-50 > LeNet5 | 0.500 | 0.90 | starved classes [9] | 99.00 ± 0.00 / 30.00 ± 0.00 | 2 of 2 |" in text
    assert "The gate is right about 15 of 16 pairs, by the result of most seeds" in text
    assert "it refuses 3 of the 3 that failed, and 1 of the others" in text
    assert transfer.failed({"scenario": "class9", "D_e": 0.0, "D_r": 98.0, "before_D_r": 99.4})
